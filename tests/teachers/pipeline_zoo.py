"""A few tiny pipelines with random weights, whole, around the denoisers of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from string import ascii_lowercase
from typing import Any

import diffusers
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from recipes.teacher import make_scheduler

from .zoo import DENOISERS, LATENTS, POOLED, WIDTH, entry

CAPTIONS = ["a cat in a red hat", "two birds over the blue house", "an astronaut riding a green chair"]
WORDS = list(dict.fromkeys(" ".join(CAPTIONS).split()))
"""What the tokenizers know; a longer word may take several tokens."""

PIPELINES: dict[str, Callable[[], Any]] = {}
"""Class name of a pipeline, with "/" and a variant where there are several -> its builder.

All run at `zoo.HEIGHT_PIXELS` x `zoo.WIDTH_PIXELS`.
"""

MORE_TEACHERS: dict[str, Callable[[], Any]] = {}
"""Pipelines that are asked for maps of pictures in addition to those above, of the same kind of names."""


def clip_tokenizer(length: int = 16) -> CLIPTokenizer:
    """CLIP's tokenizer with merges that build the known words from the left; other words fall into letters."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        merges.update(dict.fromkeys(zip(accumulate(parts), parts[1:], strict=False)))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=length)


def t5_tokenizer() -> T5Tokenizer:
    """T5's tokenizer with a piece for the first three letters of each of the known words and one for every letter."""
    starts = dict.fromkeys(f"▁{word[:3]}" for word in WORDS)
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    pieces = [(piece, -1.0) for piece in starts] + [(letter, -5.0) for letter in f"▁{ascii_lowercase}"]
    return T5Tokenizer(vocab=special + pieces, extra_ids=0, model_max_length=64)


def clip_encoder(tokenizer: CLIPTokenizer, width: int, projection: int | None = None) -> nn.Module:
    """CLIP's text encoder, with the pooled text's projection if its width is given."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection or width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def autoencoder(latents: int = LATENTS, blocks: int = 3) -> diffusers.AutoencoderKL:
    """Latents of a quarter of the picture's height and width, or of half of that for every block more."""
    model = diffusers.AutoencoderKL(
        block_out_channels=(4, *[8] * (blocks - 1)),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=latents,
        norm_num_groups=4,
        shift_factor=0.0,
    )
    return model.eval()


def _assemble(pipeline: type, **parts: Any) -> Any:
    """A pipeline of the given parts and an autoencoder, without progress bars."""
    pipe = pipeline(vae=autoencoder(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@entry(MORE_TEACHERS, "StableDiffusionPipeline/v", name="StableDiffusionPipeline", prediction_type="v_prediction")
@entry(PIPELINES, "StableDiffusionPAGPipeline", name="StableDiffusionPAGPipeline", pag_applied_layers=["mid"])
@entry(PIPELINES, "StableDiffusionPipeline", name="StableDiffusionPipeline")
def _stable_diffusion(name: str, prediction_type: str = "epsilon", **options: Any) -> Any:
    """Stable Diffusion 1.5, or 2.x, whose U-Net predicts a velocity."""
    tokenizer = clip_tokenizer()
    scheduler = make_scheduler()
    scheduler.register_to_config(prediction_type=prediction_type)
    return _assemble(
        getattr(diffusers, name),
        unet=DENOISERS["UNet2DConditionModel"]().model,
        tokenizer=tokenizer,
        text_encoder=clip_encoder(tokenizer, WIDTH),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **options,
    )


@entry(PIPELINES, "StableDiffusionXLPipeline")
def _stable_diffusion_xl() -> Any:
    tokenizer = clip_tokenizer()
    return _assemble(
        diffusers.StableDiffusionXLPipeline,
        unet=DENOISERS["UNet2DConditionModel/sdxl"]().model,
        tokenizer=tokenizer,
        text_encoder=clip_encoder(tokenizer, WIDTH // 2),
        tokenizer_2=clip_tokenizer(),
        text_encoder_2=clip_encoder(tokenizer, WIDTH // 2, projection=POOLED),
        scheduler=diffusers.EulerDiscreteScheduler(steps_offset=1),
        add_watermarker=False,
    )


@entry(PIPELINES, "StableDiffusion3Pipeline/3.5", variant="SD3Transformer2DModel/3.5")
@entry(PIPELINES, "StableDiffusion3Pipeline", variant="SD3Transformer2DModel")
def _stable_diffusion_3(variant: str) -> Any:
    """The CLIP embeddings lie side by side, padded to T5's width."""
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()
    return _assemble(
        diffusers.StableDiffusion3Pipeline,
        transformer=DENOISERS[variant]().model,
        tokenizer=tokenizer,
        text_encoder=clip_encoder(tokenizer, 12, projection=POOLED // 2),
        tokenizer_2=clip_tokenizer(),
        text_encoder_2=clip_encoder(tokenizer, 16, projection=POOLED // 2),
        tokenizer_3=tokenizer_3,
        text_encoder_3=t5_encoder(tokenizer_3),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@entry(PIPELINES, "FluxPipeline")
def _flux_pipeline() -> Any:
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    return _assemble(
        diffusers.FluxPipeline,
        transformer=DENOISERS["FluxTransformer2DModel"]().model,
        tokenizer=tokenizer,
        text_encoder=clip_encoder(tokenizer, POOLED),
        tokenizer_2=tokenizer_2,
        text_encoder_2=t5_encoder(tokenizer_2),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


@entry(MORE_TEACHERS, "PixArtAlphaPipeline")
def _pixart_pipeline() -> Any:
    """T5's text under a mask; its scheduler spaces timesteps in the way that it comes with."""
    tokenizer = t5_tokenizer()
    return _assemble(
        diffusers.PixArtAlphaPipeline,
        transformer=DENOISERS["PixArtTransformer2DModel"]().model,
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
