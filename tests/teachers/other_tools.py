"""What two other tools, DAAM and Attention-Map-Diffusers, make of tiny pipelines; as a script, it runs them and records that.

They are installed apart, and none of their code is here:

    pip install --no-deps --target FOLDER daam==0.2.0 attention-map-diffusers==1.0.0
    PYTHONPATH=FOLDER python -m tests.teachers.other_tools
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import diffusers
import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from .pipeline_zoo import CAPTIONS, PIPELINES, clip_tokenizer
from .zoo import HEIGHT_PIXELS, WIDTH_PIXELS

RECORDED = Path(__file__).parent / "recorded/other_tools.npz"
PROMPT = "a red cat in two hats over the red chair"
"""A word comes twice, and one has several tokens."""
WORDS = ("cat", "hats", "red", "red cat", "chair")
SIDES = {"sd": 192, "sdxl": 512}
"""Of the pictures, in pixels."""
STEPS = 3
ZOOS = ("StableDiffusion3Pipeline", "StableDiffusion3Pipeline/3.5", "FluxPipeline")
"""Pipelines of the zoo, which DAAM does not read."""
COLUMNS = 17
"""Of AMD's maps those of the first text columns are recorded."""
STRIDE = 3
"""Of DAAM's maps every third row and column is recorded."""
_WIDTH = 32


def _text_encoder(tokenizer: Any, width: int, projection: int | None = None) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection or width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _unet(sample_size: int, **config: Any) -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=sample_size,
        layers_per_block=1,
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
        cross_attention_dim=_WIDTH,
        **config,
    ).eval()
    for name, module in unet.named_modules():
        if name.endswith("attn2"):  # as sharp as that of a trained model: else nothing undershoots
            module.to_q.weight.data *= 12
            module.to_k.weight.data *= 12
    return unet


def _tokenizer() -> Any:
    """DAAM reads attention to 77 tokens alone."""
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer


def _parts() -> dict[str, Any]:
    """An autoencoder with latents of an eighth of the picture's sides."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    )
    return {"vae": vae.eval(), "tokenizer": _tokenizer(), "scheduler": diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)}


def _stable_diffusion() -> Any:
    """Made for pictures of 768 pixels; its second level is what DAAM leaves out."""
    parts = _parts()
    unet = _unet(
        96,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
    )
    encoder = _text_encoder(parts["tokenizer"], _WIDTH)
    return diffusers.StableDiffusionPipeline(
        unet=unet, text_encoder=encoder, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
    )


def _stable_diffusion_xl() -> Any:
    """Made for pictures of 1024 pixels, with other numbers of heads and of layers at each level."""
    parts = _parts()
    unet = _unet(
        128,
        attention_head_dim=(2, 2, 4),
        transformer_layers_per_block=(1, 2, 1),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    return diffusers.StableDiffusionXLPipeline(
        unet=unet,
        text_encoder=_text_encoder(parts["tokenizer"], _WIDTH // 2),
        text_encoder_2=_text_encoder(parts["tokenizer"], _WIDTH // 2, projection=16),
        tokenizer_2=_tokenizer(),
        add_watermarker=False,
        **parts,
    )


BUILDERS = {"sd": _stable_diffusion, "sdxl": _stable_diffusion_xl}


def build(name: str) -> Any:
    """A pipeline with the same random weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = BUILDERS[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompt: str = PROMPT) -> np.ndarray:
    """The picture, with guidance, as floats [y, x, 3]."""
    generator = torch.Generator().manual_seed(1)
    side = SIDES["sd" if type(pipe).__name__ == "StableDiffusionPipeline" else "sdxl"]
    drawn = pipe(
        prompt, height=side, width=side, num_inference_steps=STEPS, guidance_scale=5.0, generator=generator, output_type="np"
    )
    image: np.ndarray = drawn.images[0]
    return image


def _of_daam(pipe: Any) -> dict[str, np.ndarray]:
    for missing in ("scipy", "scipy.optimize", "spacy", "spacy.tokens"):  # which no map needs
        sys.modules.setdefault(missing, MagicMock())
    from daam import trace

    with trace(pipe) as tracer:
        draw(pipe)
    whole, of_head = tracer.compute_global_heat_map(PROMPT), tracer.compute_global_heat_map(PROMPT, head_idx=1)
    maps = {word: whole.compute_word_heat_map(word).value for word in WORDS}
    maps |= {"cat, head 1": of_head.compute_word_heat_map("cat").value, "red, second": whole.heat_maps[11]}
    return {f"daam/{name}": value.detach().numpy()[::STRIDE, ::STRIDE] for name, value in maps.items()}


def _of_amd(pipe: Any, draw: Callable[[Any], np.ndarray] = draw) -> dict[str, np.ndarray]:
    """The aggregates that it draws its pictures from, [tokens, y, x]."""
    from attention_map_diffusers import AttentionCapture
    from attention_map_diffusers.visualization import _aggregate_compatible

    found = {}
    for timesteps in ("last", "all"):
        with AttentionCapture(pipe, timesteps=timesteps) as capture:
            draw(pipe)
        record, data, _ = _aggregate_compatible(capture.compute().records, None, 1)
        grid = (record.q_shape.height, record.q_shape.width)
        tokens = min(len(data[0].T), COLUMNS)
        found[f"amd/{timesteps}"] = data[0].T[:tokens].reshape(tokens, *grid).detach().numpy()
    return found


def draw_zoos(pipe: Any) -> np.ndarray:
    """Its latents, with the guidance that it has by itself."""
    generator = torch.Generator().manual_seed(1)
    size = {"height": HEIGHT_PIXELS, "width": WIDTH_PIXELS}
    drawn = pipe(CAPTIONS[0], num_inference_steps=STEPS, generator=generator, output_type="latent", **size)
    latents: np.ndarray = drawn.images.numpy()
    return latents


def main() -> None:
    """Runs the tools and writes what they found."""
    recorded: dict[str, Any] = {"versions": f"daam {version('daam')}, amd {version('attention-map-diffusers')}"}
    for name in BUILDERS:
        found = {**_of_daam(build(name)), **_of_amd(build(name)), "image": draw(build(name))[::8, ::8]}
        recorded |= {f"{name}/{key}": value.astype(np.float32) for key, value in found.items()}
    for name in ZOOS:
        pipe = PIPELINES[name]()
        found = {**_of_amd(pipe, draw_zoos), "image": draw_zoos(pipe)}
        recorded |= {f"{name}/{key}": value.astype(np.float32) for key, value in found.items()}
    np.savez_compressed(RECORDED, **recorded)


if __name__ == "__main__":
    main()
