"""Where denoisers keep text and picture in their attention: one layout per denoiser class of diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import CaptureError, ModelError

Grid = tuple[int, int, int]
"""Frames, height and width of the grid of image tokens; one frame for pictures."""


def _no_lead(denoiser: nn.Module) -> int:
    return 0


def _text_tokens(denoiser: nn.Module, inputs: Mapping[str, Any]) -> list[int]:
    """Text tokens in the attention's sequence, per sample: all that the denoiser was given."""
    text = inputs["encoder_hidden_states"]
    return [text.shape[1]] * text.shape[0]


def _patches(denoiser: nn.Module, inputs: Mapping[str, Any]) -> Grid:
    """Latents [B, C, (F,) y, x] cut into patches."""
    latents = inputs["hidden_states"]
    config: Any = denoiser.config
    patch = config.patch_size
    if not isinstance(patch, int):
        frame_patch, patch = patch[0], patch[-1]
    else:
        frame_patch = getattr(config, "patch_size_t", None) or 1
    frames = latents.shape[2] // frame_patch if latents.ndim == 5 else 1
    return frames, latents.shape[-2] // patch, latents.shape[-1] // patch


def _latent_places(denoiser: nn.Module, inputs: Mapping[str, Any]) -> Grid:
    """A U-Net's latents [B, C, y, x], which its levels halve."""
    sample = inputs["sample"]
    return 1, sample.shape[-2], sample.shape[-1]


def _by_ids(denoiser: nn.Module, inputs: Mapping[str, Any]) -> Grid:
    """Packed latents, whose places are in `img_ids` [(B,) N, 3 or 4]."""
    ids = inputs["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    tokens = ids[ids[:, 0] == ids[0, 0]]  # a reference picture's tokens follow, at another place in time
    height, width = (tokens[:, 1:3].amax(dim=0) + 1).int().tolist()
    return 1, height, width


def _by_shapes(denoiser: nn.Module, inputs: Mapping[str, Any]) -> Grid:
    """Packed latents, whose grid is in `img_shapes`: per sample one (frames, height, width), or a list of them."""
    shape = inputs["img_shapes"][0]
    shape = shape[0] if isinstance(shape, list) else shape
    return int(shape[0]), int(shape[1]), int(shape[2])


def _by_numbers(denoiser: nn.Module, inputs: Mapping[str, Any]) -> Grid:
    """Packed latents, whose grid is in three arguments."""
    if any(inputs.get(name) is None for name in ("num_frames", "height", "width")):
        raise CaptureError(
            f"this pipeline does not give {type(denoiser).__name__} num_frames, height and width, which say where its tokens stand"
        )
    return inputs["num_frames"], inputs["height"], inputs["width"]


def _registers(denoiser: Any) -> int:
    """Learned tokens that AuraFlow puts before the text."""
    return int(denoiser.register_tokens.shape[1])


def _unpadded(denoiser: nn.Module, inputs: Mapping[str, Any]) -> list[int]:
    """Lumina2 leaves the padding out: the picture follows each sample's own text."""
    lengths: list[int] = inputs["encoder_attention_mask"].sum(dim=1).int().tolist()
    return lengths


def _packed(inputs: Mapping[str, Any]) -> int:
    """All that the pipeline made tokens of before."""
    return int(inputs["hidden_states"].shape[1])


def _unet_level(name: str) -> str:
    """The block of transformer layers, or the module of the attention itself where there is none."""
    around, found, _ = name.rpartition(".transformer_blocks.")
    return around if found else name.rpartition(".")[0]


@dataclass(frozen=True)
class Layout:
    """How one class of denoisers attends to text.

    Attributes:
        modules: pattern that the names of the attention modules match whose queries are image tokens and whose keys include text.
        order: "cross" where text alone is attended to; "text first" or "image first" where text and picture are one sequence.
        grid: the grid of image tokens, from the denoiser and its arguments.
        lead: tokens before the text.
        text_tokens: text tokens in the joint sequence, per sample.
        image_tokens: image tokens in the joint sequence, those of further pictures with them; the grid's if None.
        level: of a U-Net, the name of the module around an attention module whose input [B, C, y, x] has that level's grid.
    """

    modules: str
    order: str
    grid: Callable[[nn.Module, Mapping[str, Any]], Grid]
    lead: Callable[[Any], int] = _no_lead
    text_tokens: Callable[[nn.Module, Mapping[str, Any]], list[int]] = _text_tokens
    image_tokens: Callable[[Mapping[str, Any]], int] | None = None
    level: Callable[[str], str] | None = None


_DOUBLE_AND_SINGLE = r"(single_)?transformer_blocks\.\d+\.attn"
_SECOND = r"(transformer_)?blocks\.\d+\.attn2"

LAYOUTS = {
    "UNet2DConditionModel": Layout(r".*\.attn2", "cross", _latent_places, level=_unet_level),
    "SD3Transformer2DModel": Layout(r"transformer_blocks\.\d+\.attn", "image first", _patches),
    "FluxTransformer2DModel": Layout(_DOUBLE_AND_SINGLE, "text first", _by_ids, image_tokens=_packed),
    "Flux2Transformer2DModel": Layout(_DOUBLE_AND_SINGLE, "text first", _by_ids, image_tokens=_packed),
    "ChromaTransformer2DModel": Layout(_DOUBLE_AND_SINGLE, "text first", _by_ids, image_tokens=_packed),
    "QwenImageTransformer2DModel": Layout(r"transformer_blocks\.\d+\.attn", "text first", _by_shapes, image_tokens=_packed),
    "AuraFlowTransformer2DModel": Layout(r"(joint|single)_transformer_blocks\.\d+\.attn", "text first", _patches, lead=_registers),
    "Lumina2Transformer2DModel": Layout(r"layers\.\d+\.attn", "text first", _patches, text_tokens=_unpadded),
    "CogView4Transformer2DModel": Layout(r"transformer_blocks\.\d+\.attn1", "text first", _patches),
    "HunyuanVideoTransformer3DModel": Layout(_DOUBLE_AND_SINGLE, "image first", _patches),
    "PixArtTransformer2DModel": Layout(_SECOND, "cross", _patches),
    "SanaTransformer2DModel": Layout(_SECOND, "cross", _patches),
    "WanTransformer3DModel": Layout(_SECOND, "cross", _patches),
    "LTXVideoTransformer3DModel": Layout(_SECOND, "cross", _by_numbers),
}
"""Class name of a denoiser -> its layout."""


def layout_of(denoiser: object) -> Layout:
    """The layout of a denoiser, by its class or the nearest one that it inherits from. Raises `ModelError` naming the known."""
    for kind in type(denoiser).__mro__:
        if kind.__name__ in LAYOUTS:
            return LAYOUTS[kind.__name__]
    raise ModelError(f"lavender cannot read word maps from a {type(denoiser).__name__}; it reads {sorted(LAYOUTS)}")


def unwrapped(denoiser: nn.Module) -> nn.Module:
    """The one denoiser that lavender reads in a module: itself, or what torch.compile, PEFT or a wrapper of one's own holds.

    A module that holds none of them, or several, is returned as it is.
    """
    found = [module for module in denoiser.modules() if any(kind.__name__ in LAYOUTS for kind in type(module).__mro__)]
    return found[0] if len(found) == 1 else denoiser


@dataclass(frozen=True)
class Places:
    """Where image tokens and words stand in one attention call.

    Attributes:
        grid: of the image tokens.
        image_start: int64 [B], the first image token among the queries.
        text_start: the first text token among the keys.
        num_tokens: of the whole sequence.
    """

    grid: Grid
    image_start: torch.Tensor
    text_start: int
    num_tokens: int


def places_of(layout: Layout, denoiser: nn.Module, inputs: Mapping[str, Any]) -> Places:
    """Where things stand in a denoiser's attention, from the arguments of its forward."""
    grid, lead = layout.grid(denoiser, inputs), layout.lead(denoiser)
    text_tokens = torch.tensor(layout.text_tokens(denoiser, inputs))
    if len(text_tokens) == 1:  # one text for all samples
        text_tokens = text_tokens.repeat(len(inputs.get("sample", inputs.get("hidden_states"))))
    num_image_tokens = math.prod(grid) if layout.image_tokens is None else layout.image_tokens(inputs)
    if layout.order == "text first":
        starts = lead + text_tokens
        return Places(grid, starts, lead, int(starts.max()) + num_image_tokens)
    starts = torch.zeros_like(text_tokens)
    if layout.order == "image first":
        return Places(grid, starts, num_image_tokens, num_image_tokens + int(text_tokens.max()))
    return Places(grid, starts, 0, num_image_tokens)
