"""The small teacher: a Stable-Diffusion-like text-to-image model of about two million parameters, and the recipe that trains it.

What comes out is an ordinary diffusers folder: `StableDiffusionPipeline.from_pretrained(folder)` loads it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lavender.miniworld.scenes import IMAGE_SIZE, make_scenes

from .fitting import declare_float32, fit

MAX_TOKENS = 32
LATENT_SIZE = IMAGE_SIZE // 4


@dataclass(frozen=True)
class TeacherRecipe:
    """Everything that decides the teacher's weights. Learning rates are AdamW's peak; batches count pictures."""

    seed: int = 0
    scene_seed: int = 1
    num_scenes: int = 12288
    autoencoder_steps: int = 1200
    autoencoder_batch: int = 16
    autoencoder_learning_rate: float = 2e-3
    unet_steps: int = 6500
    unet_batch: int = 32
    unet_learning_rate: float = 1.5e-3
    empty_caption_rate: float = 0.1
    """How often the caption is left out, so that classifier-free guidance has an unconditional branch."""
    words_only_rate: float = 0.5
    """How often the end and padding tokens are hidden from the U-Net.

    They have read the whole caption, so a U-Net that always sees them learns to read all from them and nothing from the words.
    """


def train_teacher(folder: Path, recipe: TeacherRecipe) -> None:
    """Trains tokenizer, autoencoder, then U-Net and text encoder together; writes a diffusers folder and `recipe.json`.

    Stages that were finished before are taken from `folder/training/`, unfinished ones continue.
    """
    states = folder / "training"
    states.mkdir(parents=True, exist_ok=True)
    scenes = list(tqdm(make_scenes(recipe.scene_seed, recipe.num_scenes), "scenes", recipe.num_scenes, mininterval=5))
    pixels = torch.from_numpy(np.stack([s.pixels for s in scenes])).permute(0, 3, 1, 2).contiguous()
    captions = [s.caption for s in scenes]

    tokenizer = train_tokenizer(captions)
    autoencoder, autoencoder_cost = _train_autoencoder(pixels, recipe, states)
    moments = _encode(autoencoder, pixels)
    unet, text_encoder, unet_cost = _train_unet(moments, captions, tokenizer, recipe, states, autoencoder)

    pipe = make_pipeline(tokenizer, autoencoder, unet, text_encoder)
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    declare_float32(folder / "text_encoder" / "config.json")
    record = {"recipe": asdict(recipe), "cost": {"autoencoder": autoencoder_cost, "unet": unet_cost}}
    (folder / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")


def make_pipeline(
    tokenizer: CLIPTokenizer,
    autoencoder: AutoencoderKL | None = None,
    unet: UNet2DConditionModel | None = None,
    text_encoder: CLIPTextModel | None = None,
) -> StableDiffusionPipeline:
    """The teacher's parts as a pipeline; parts that are not given have random weights."""
    return StableDiffusionPipeline(
        vae=autoencoder or make_autoencoder(),
        text_encoder=text_encoder or make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet or make_unet(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.x's noise schedule (1,000 steps, scaled linear, epsilon prediction)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE with end-of-word marks) whose merges come from the small world's captions."""
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    learner.train_from_iterator(
        (c.lower() for c in captions), BpeTrainer(end_of_word_suffix="</w>", vocab_size=2000, show_progress=False)
    )
    merges: Any = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [f"{letter}</w>" for letter in alphabet] + [a + b for a, b in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def _train_autoencoder(pixels: torch.Tensor, recipe: TeacherRecipe, states: Path) -> tuple[AutoencoderKL, dict]:
    torch.manual_seed(recipe.seed)
    autoencoder = make_autoencoder()

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(pixels), (recipe.autoencoder_batch,), generator=generator)
        images = to_float(pixels[chosen])
        posterior = autoencoder.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = autoencoder.decode(posterior.mean + posterior.std * noise).sample
        error = decoded - images
        return error.square().mean() + 0.1 * error.abs().mean() + 1e-6 * posterior.kl().mean()

    cost = fit(
        "autoencoder",
        autoencoder,
        loss_of,
        steps=recipe.autoencoder_steps,
        learning_rate=recipe.autoencoder_learning_rate,
        seed=recipe.seed,
        folder=states,
        ema_decay=0.99,
    )
    return autoencoder, cost


@torch.no_grad()
def _encode(autoencoder: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation of every picture's latent, [pictures, 2, 4, 16, 16]; sets the scaling factor."""
    moments = []
    for chunk in tqdm(pixels.split(64), "encode", mininterval=5):
        posterior = autoencoder.encode(to_float(chunk)).latent_dist
        moments.append(torch.stack([posterior.mean, posterior.std], dim=1))
    everything = torch.cat(moments)
    autoencoder.register_to_config(scaling_factor=round(1.0 / float(everything[:, 0].std()), 5))
    return everything


def _train_unet(
    moments: torch.Tensor,
    captions: list[str],
    tokenizer: CLIPTokenizer,
    recipe: TeacherRecipe,
    states: Path,
    autoencoder: AutoencoderKL,
) -> tuple[UNet2DConditionModel, CLIPTextModel, dict]:
    torch.manual_seed(recipe.seed)
    unet, text_encoder = make_unet(), make_text_encoder(tokenizer)
    scheduler = make_scheduler()
    scale = autoencoder.config.scaling_factor
    ids = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids
    empty = tokenizer("", padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    last_step = scheduler.config.num_train_timesteps

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        size = recipe.unet_batch
        chosen = torch.randint(len(moments), (size,), generator=generator)
        mean, std = moments[chosen].unbind(1)
        latents = (mean + std * torch.randn(mean.shape, generator=generator)) * scale
        # Half of the timesteps from the lower half, where a picture is still visible and words are matched to places.
        low = torch.rand(size, generator=generator) < 0.5
        timesteps = torch.where(
            low,
            torch.randint(last_step // 2, (size,), generator=generator),
            torch.randint(last_step, (size,), generator=generator),
        )
        noise = torch.randn(latents.shape, generator=generator)
        noised = scheduler.add_noise(latents, noise, timesteps)
        tokens = ids[chosen]
        dropped = torch.rand(size, generator=generator) < recipe.empty_caption_rate
        tokens = torch.where(dropped[:, None], empty, tokens)
        hide = (torch.rand(size, generator=generator) < recipe.words_only_rate) & ~dropped
        visible = ~((tokens == tokenizer.eos_token_id) & hide[:, None])
        states_ = text_encoder(tokens).last_hidden_state
        predicted = unet(noised, timesteps, states_, encoder_attention_mask=visible).sample
        return (predicted - noise).square().mean()

    both = nn.ModuleList([unet, text_encoder])
    cost = fit(
        "unet",
        both,
        loss_of,
        steps=recipe.unet_steps,
        learning_rate=recipe.unet_learning_rate,
        seed=recipe.seed,
        folder=states,
    )
    return unet, text_encoder, cost


def make_autoencoder() -> AutoencoderKL:
    """The untrained autoencoder: 64x64 pictures to 16x16 latents of four channels."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    ).to(memory_format=torch.channels_last)


def make_unet() -> UNet2DConditionModel:
    """The untrained U-Net: cross-attention at 16x16 and 8x8, two heads."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=2,
        norm_num_groups=8,
    ).to(memory_format=torch.channels_last)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The untrained text encoder: two causal layers of width 96."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels [..., 3, 64, 64] to floats in [-1, 1], as diffusers' image processor does."""
    return (pixels.float() / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)
