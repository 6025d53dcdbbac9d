"""Pipelines with something switched on that changes how often, where or by what the denoiser attends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn
from torch.nn import functional as F

from . import dits, unets
from .parts import Walked

SWITCHED: dict[str, Walked] = {}
"""Class name of a pipeline, "/" and what is switched on -> how it is built and called."""


def switched(name: str, what: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Adds a pipeline of the walk with what a function does to it."""

    def add(prepare: Callable[[Any], Any]) -> Callable[[Any], Any]:
        walked = {**unets.WALK, **dits.WALK}[name]
        SWITCHED[f"{name}/{what}"] = replace(walked, prepare=prepare)
        return prepare

    return add


SCHEDULERS = [
    "PNDMScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
]
"""Some ask the denoiser twice at a timestep."""


def _scheduler(kind: str, pipe: Any) -> None:
    pipe.scheduler = getattr(diffusers, kind).from_config({**pipe.scheduler.config, "skip_prk_steps": True})


for _kind in SCHEDULERS:
    switched("StableDiffusionPipeline", _kind)(partial(_scheduler, _kind))


@switched("StableDiffusionPipeline", "FreeU")
def _free_u(pipe: Any) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


@switched("StableDiffusion3Pipeline", "fused projections")
@switched("FluxPipeline", "fused projections")
@switched("StableDiffusionXLPipeline", "fused projections")
def _fused(pipe: Any) -> None:
    (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).fuse_qkv_projections()


@switched("StableDiffusionPipeline", "attention slicing")
def _sliced(pipe: Any) -> None:
    pipe.enable_attention_slicing()


@switched("StableDiffusionPipeline", "deep shrink in the first step")
def _shrunk(pipe: Any) -> None:
    """The first step at half the height and width."""
    unet, begun = pipe.unet, []

    def shrink(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        begun.append(output.shape[-2:])
        return F.interpolate(output, scale_factor=0.5) if len(begun) % 2 else output

    def grow(module: nn.Module, args: tuple) -> tuple:
        return (F.interpolate(args[0], size=tuple(begun[-1])),)

    unet.conv_in.register_forward_hook(shrink)
    unet.conv_norm_out.register_forward_pre_hook(grow)


class _Merged(AttnProcessor2_0):
    """Every fourth place stands for four."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = super().__call__(attn, hidden_states[:, ::4], *args, **kwargs)
        return output.repeat_interleave(4, dim=1)[:, : hidden_states.shape[1]]


class _Tiled(AttnProcessor2_0):
    """Two tiles, each a sample of its own."""

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        tiles = hidden_states.unflatten(1, (2, -1)).flatten(0, 1)
        return super().__call__(attn, tiles, encoder_hidden_states.repeat_interleave(2, 0)).unflatten(0, (-1, 2)).flatten(1, 2)


class _Padded(AttnProcessor2_0):
    """More keys than columns."""

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        more = torch.cat([encoder_hidden_states[:, :1], encoder_hidden_states], dim=1)
        return super().__call__(attn, hidden_states, more, *args, **kwargs)


def _in_cross_attention(processor: type, pipe: Any) -> None:
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(processor())


for _what, _processor in {
    "merged tokens": _Merged,
    "tiles": _Tiled,
    "more keys": _Padded,
    "a softmax of its own": AttnProcessor,
}.items():
    switched("StableDiffusionPipeline", _what)(partial(_in_cross_attention, _processor))


def _cache(config: Any, pipe: Any) -> None:
    pipe.transformer.enable_cache(config)


for _name in ("FluxPipeline", "WanPipeline"):
    switched(_name, "FirstBlockCache")(partial(_cache, diffusers.FirstBlockCacheConfig(threshold=10.0)))
    switched(_name, "TaylorSeerCache")(
        partial(_cache, diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1))
    )


@switched("WanPipeline", "PyramidAttentionBroadcast")
@switched("FluxPipeline", "PyramidAttentionBroadcast")
def _broadcast(pipe: Any) -> None:
    pipe.transformer.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 2000),
            cross_attention_block_skip_range=2,
            cross_attention_timestep_skip_range=(-1, 2000),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    )


def _backend(name: str, pipe: Any) -> None:
    pipe.transformer.set_attention_backend(name)


for _name in ("FluxPipeline", "WanPipeline"):
    switched(_name, "backend _native_math")(partial(_backend, "_native_math"))
