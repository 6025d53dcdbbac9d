"""Tiny diffusion models with random weights: one denoiser per family that diffusers has.

Nothing comes from the hub. Every builder gives the same weights each time and leaves torch's random state as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import diffusers
import torch
from torch import nn

BATCH = 2
FRAMES, ROWS, COLUMNS = 2, 4, 6
"""Frames of the video models; rows and columns of all models' image tokens (U-Nets have them at their own levels)."""
TOKENS = 7
"""Text tokens that the denoisers are given."""
KEPT = 5
"""How many of them the second sample keeps where a model takes a text mask."""
WIDTH = 32
"""Channels of the text embeddings."""
POOLED = 16
"""Channels of the pooled text embedding."""
LATENTS = 4
"""Channels of a latent; packed latents have four times as many."""
HEIGHT_PIXELS, WIDTH_PIXELS = 32, 48
"""The size at which the pipelines' denoisers see `ROWS` times `COLUMNS` patches (U-Nets twice that)."""


@dataclass
class Denoiser:
    """A denoiser and one call of it.

    Attributes:
        model: the model, in evaluation mode.
        inputs: keyword arguments of one forward call, for two samples.
        text: which of them holds the text embeddings, [samples, tokens, channels].
        image: which of them holds the latents.
        layout: "cross" where the text is read by cross-attention; else "text first" or "image first": the order of the keys in the
            first joint attention.
        grid: frames, rows and columns of the image tokens; a U-Net's are those of the latents, which its levels halve.
    """

    model: nn.Module
    inputs: dict[str, Any]
    text: str = "encoder_hidden_states"
    image: str = "hidden_states"
    layout: str = "cross"
    grid: tuple[int, int, int] = (1, ROWS, COLUMNS)


Built = TypeVar("Built")

DENOISERS: dict[str, Callable[[], Denoiser]] = {}
"""Class name of a denoiser, with "/" and a variant where there are several -> its builder."""


def entry(zoo: dict[str, Callable[[], Built]], key: str, **settings: Any) -> Callable[[Callable[..., Built]], Callable[..., Built]]:
    """Adds a function, called with these settings under a fixed seed, to a zoo; one function may have several entries."""

    def build(function: Callable[..., Built]) -> Built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return function(**settings)

    def add(function: Callable[..., Built]) -> Callable[..., Built]:
        zoo[key] = partial(build, function)
        return function

    return add


# Inputs


def _noise(*shape: int) -> torch.Tensor:
    """Normal noise that depends on the shape only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _text() -> torch.Tensor:
    return _noise(BATCH, TOKENS, WIDTH)


def _pooled() -> torch.Tensor:
    return _noise(BATCH, POOLED)


def _latents(*sizes: int) -> torch.Tensor:
    """Unpacked latents of the given frames (if any), rows and columns."""
    return _noise(BATCH, LATENTS, *sizes)


def _packed() -> torch.Tensor:
    """Latents whose 2x2 patches were made tokens by the pipeline."""
    return _noise(BATCH, ROWS * COLUMNS, 4 * LATENTS)


def _each(value: float) -> torch.Tensor:
    """A timestep or guidance scale for every sample."""
    return torch.full((BATCH,), value)


def _mask() -> torch.Tensor:
    """1 at the text tokens to keep, as tokenizers that pad on the right give it."""
    return (torch.arange(TOKENS) < torch.tensor([[TOKENS], [KEPT]])).long()


def _places(axes: int, *, text_axis: int | None = None) -> dict[str, torch.Tensor]:
    """Position ids of text and image tokens: rows and columns on axes 1 and 2, text tokens numbered on `text_axis` if given."""
    image = torch.zeros(ROWS, COLUMNS, axes)
    image[..., 1] = torch.arange(ROWS)[:, None]
    image[..., 2] = torch.arange(COLUMNS)
    text = torch.zeros(TOKENS, axes)
    if text_axis is not None:
        text[:, text_axis] = torch.arange(TOKENS)
    return {"img_ids": image.reshape(-1, axes), "txt_ids": text}


# Denoisers

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_ROTARY = (4, 6, 6)
"""Rotary channels of a head per axis."""


def _unet(levels: int, latents: tuple[int, int], inputs: dict[str, Any] | None = None, **config: Any) -> Denoiser:
    """A U-Net whose channels grow at the second level; `config` says what blocks it has."""
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENTS,
        out_channels=LATENTS,
        layers_per_block=1,
        block_out_channels=(8, *[16] * (levels - 1)),
        norm_num_groups=4,
        attention_head_dim=2,
        **{"cross_attention_dim": WIDTH, **config},
    )
    call = {"sample": _latents(*latents), "timestep": _each(500), "encoder_hidden_states": _text(), **(inputs or {})}
    return Denoiser(model.eval(), call, image="sample", grid=(1, *latents))


@entry(DENOISERS, "UNet2DConditionModel")
def _unet_sd() -> Denoiser:
    return _unet(
        levels=2,
        latents=(ROWS, COLUMNS),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


@entry(DENOISERS, "UNet2DConditionModel/kolors", cross_attention_dim=24, encoder_hid_dim=WIDTH, encoder_hid_dim_type="text_proj")
@entry(DENOISERS, "UNet2DConditionModel/sdxl")
def _unet_sdxl(**config: Any) -> Denoiser:
    """No attention at the first level, two and three transformer layers at the others; Kolors projects the text first."""
    sizes = torch.tensor([2 * ROWS, 2 * COLUMNS, 0, 0, 2 * ROWS, 2 * COLUMNS]).float()
    return _unet(
        levels=3,
        latents=(2 * ROWS, 2 * COLUMNS),
        inputs={"added_cond_kwargs": {"text_embeds": _pooled(), "time_ids": sizes.repeat(BATCH, 1)}},
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=POOLED + 6 * 8,
        **config,
    )


@entry(DENOISERS, "SD3Transformer2DModel/3.5", dual_attention_layers=(0,), qk_norm="rms_norm")
@entry(DENOISERS, "SD3Transformer2DModel")
def _sd3(**config: Any) -> Denoiser:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=LATENTS,
        out_channels=LATENTS,
        num_layers=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=8,
        **_HEADS,
        **config,
    )
    inputs = {
        "hidden_states": _latents(2 * ROWS, 2 * COLUMNS),
        "timestep": _each(500),
        "encoder_hidden_states": _text(),
        "pooled_projections": _pooled(),
    }
    return Denoiser(model.eval(), inputs, layout="image first")


@entry(DENOISERS, "FluxTransformer2DModel")
def _flux() -> Denoiser:
    model = diffusers.FluxTransformer2DModel(
        in_channels=4 * LATENTS,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=_ROTARY,
        **_HEADS,
    )
    inputs = {
        "hidden_states": _packed(),
        "timestep": _each(0.5),
        "guidance": _each(3.5),
        "encoder_hidden_states": _text(),
        "pooled_projections": _pooled(),
        **_places(axes=3),
    }
    return Denoiser(model.eval(), inputs, layout="text first")


@entry(DENOISERS, "Flux2Transformer2DModel")
def _flux2() -> Denoiser:
    model = diffusers.Flux2Transformer2DModel(
        in_channels=4 * LATENTS,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        **_HEADS,
    )
    inputs = {
        "hidden_states": _packed(),
        "timestep": _each(0.5),
        "guidance": _each(3.5),
        "encoder_hidden_states": _text(),
        **{name: ids.expand(BATCH, -1, -1) for name, ids in _places(axes=4, text_axis=3).items()},
    }
    return Denoiser(model.eval(), inputs, layout="text first")


@entry(DENOISERS, "ChromaTransformer2DModel")
def _chroma() -> Denoiser:
    model = diffusers.ChromaTransformer2DModel(
        in_channels=4 * LATENTS,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=WIDTH,
        axes_dims_rope=_ROTARY,
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
        **_HEADS,
    )
    inputs = {
        "hidden_states": _packed(),
        "timestep": _each(0.5),
        "encoder_hidden_states": _text(),
        # The pipeline's mask is of the text's floating type and goes on over the image tokens.
        "attention_mask": torch.cat([_mask().float(), torch.ones(BATCH, ROWS * COLUMNS)], dim=1),
        **_places(axes=3),
    }
    return Denoiser(model.eval(), inputs, layout="text first")


@entry(DENOISERS, "QwenImageTransformer2DModel")
def _qwen_image() -> Denoiser:
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=4 * LATENTS,
        out_channels=LATENTS,
        num_layers=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=_ROTARY,
        **_HEADS,
    )
    inputs = {
        "hidden_states": _packed(),
        "timestep": _each(0.5),
        "encoder_hidden_states": _text(),
        "encoder_hidden_states_mask": _mask(),
        "img_shapes": [[(1, ROWS, COLUMNS)]] * BATCH,
    }
    return Denoiser(model.eval(), inputs, layout="text first")


@entry(DENOISERS, "AuraFlowTransformer2DModel")
def _aura_flow() -> Denoiser:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=LATENTS,
        out_channels=LATENTS,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pos_embed_max_size=64,
        **_HEADS,
    )
    inputs = {"hidden_states": _latents(2 * ROWS, 2 * COLUMNS), "timestep": _each(0.5), "encoder_hidden_states": _text()}
    return Denoiser(model.eval(), inputs, layout="text first")


@entry(DENOISERS, "Lumina2Transformer2DModel")
def _lumina2() -> Denoiser:
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=LATENTS,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=_ROTARY,
        axes_lens=(32, 16, 16),
        cap_feat_dim=WIDTH,
    )
    inputs = {
        "hidden_states": _latents(2 * ROWS, 2 * COLUMNS),
        "timestep": _each(0.5),
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": _mask(),
    }
    return Denoiser(model.eval(), inputs, layout="text first")


@entry(DENOISERS, "CogView4Transformer2DModel")
def _cogview4() -> Denoiser:
    model = diffusers.CogView4Transformer2DModel(
        in_channels=LATENTS,
        out_channels=LATENTS,
        num_layers=2,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        condition_dim=8,
        sample_size=8,
        rope_axes_dim=(16, 16),
        **_HEADS,
    )
    size = torch.tensor([[8.0 * ROWS, 8.0 * COLUMNS]]).repeat(BATCH, 1)
    inputs = {
        "hidden_states": _latents(2 * ROWS, 2 * COLUMNS),
        "timestep": _each(500),
        "encoder_hidden_states": _text(),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(BATCH, 2),
    }
    return Denoiser(model.eval(), inputs, layout="text first")


@entry(DENOISERS, "HunyuanVideoTransformer3DModel")
def _hunyuan_video() -> Denoiser:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=LATENTS,
        out_channels=LATENTS,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        pooled_projection_dim=POOLED,
        rope_axes_dim=_ROTARY,
        **_HEADS,
    )
    inputs = {
        "hidden_states": _latents(FRAMES, 2 * ROWS, 2 * COLUMNS),
        "timestep": _each(500),
        "guidance": _each(6000),
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": _mask().float(),
        "pooled_projections": _pooled(),
    }
    return Denoiser(model.eval(), inputs, layout="image first", grid=(FRAMES, ROWS, COLUMNS))


@entry(DENOISERS, "PixArtTransformer2DModel")
def _pixart() -> Denoiser:
    model = diffusers.PixArtTransformer2DModel(
        in_channels=LATENTS,
        out_channels=2 * LATENTS,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=8,
        **_HEADS,
    )
    inputs = {
        "hidden_states": _latents(2 * ROWS, 2 * COLUMNS),
        "timestep": _each(500),
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": _mask(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return Denoiser(model.eval(), inputs)


@entry(DENOISERS, "SanaTransformer2DModel")
def _sana() -> Denoiser:
    model = diffusers.SanaTransformer2DModel(
        in_channels=LATENTS,
        out_channels=LATENTS,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=8,
        **_HEADS,
    )
    inputs = {
        "hidden_states": _latents(ROWS, COLUMNS),
        "timestep": _each(500),
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": _mask(),
    }
    return Denoiser(model.eval(), inputs)


@entry(DENOISERS, "WanTransformer3DModel")
def _wan() -> Denoiser:
    model = diffusers.WanTransformer3DModel(
        in_channels=LATENTS,
        out_channels=LATENTS,
        num_layers=2,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=64,
        rope_max_seq_len=16,
        **_HEADS,
    )
    inputs = {
        "hidden_states": _latents(FRAMES, 2 * ROWS, 2 * COLUMNS),
        "timestep": _each(500),
        "encoder_hidden_states": _text(),
    }
    return Denoiser(model.eval(), inputs, grid=(FRAMES, ROWS, COLUMNS))


@entry(DENOISERS, "LTXVideoTransformer3DModel")
def _ltx() -> Denoiser:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=LATENTS,
        out_channels=LATENTS,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        **_HEADS,
    )
    inputs = {
        "hidden_states": _noise(BATCH, FRAMES * ROWS * COLUMNS, LATENTS),
        "timestep": _each(500),
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": _mask().bool(),
        "num_frames": FRAMES,
        "height": ROWS,
        "width": COLUMNS,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }
    return Denoiser(model.eval(), inputs, grid=(FRAMES, ROWS, COLUMNS))
