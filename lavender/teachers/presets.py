"""Maps as two other tools compute them: which layers and steps, how they are resampled, and in what order tokens are averaged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch.nn import functional as F

from ..errors import CaptureError, ConfigError, ModelError
from ..maps import LayerMaps, Maps, of_frame, of_head

Preset = Literal["daam", "amd"]
"""A tool whose maps `lavender.patch` gives: `DaamMaps` and `AmdMaps` say how it computes them."""

_COMPARED: dict[str, tuple[str, ...]] = {
    "daam": ("UNet2DConditionModel",),
    "amd": ("UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"),
}
"""Denoisers whose maps were compared with the tools' own."""


class DaamMaps(Maps):
    """Heat maps as DAAM makes them (Tang et al. 2022; the package daam, 0.2), of a U-Net with classifier-free guidance.

    A map is a token's: of every head of the cross-attentions of the down and up blocks, the sum over the steps is resampled to a
    square of 64 places (96 where the U-Net was made for pictures other than 512 or 1024 pixels) by bicubic interpolation, whose
    undershoot is set to 0; then comes the mean over heads and layers. A word's map is the mean over its tokens, those of every
    occurrence unless one is chosen. Layers at an eighth of the square's side are left out. Only square pictures have maps.
    """

    FACTORS: ClassVar = (0, 1, 2, 4, 16, 32, 64)
    """How many times smaller than the square a grid is that counts."""

    def __init__(self, *args: Any, shares: torch.Tensor, side: int) -> None:
        """`shares` [W, K] are those of the K tokens, whose maps `entries` has, in the words; `side` is the square's, in places."""
        super().__init__(*args)
        self._shares, self._side = shares, side

    def _places(self, word: str | int, occurrence: int | None) -> list[int]:
        places = super()._places(word, occurrence)
        if occurrence is not None or min(places) < 0:  # a token's lies behind the words
            return places
        parts = [self.words[place].text.casefold() for place in places]
        everywhere = [start + n for start in self._starts(parts, fold=True) for n in range(len(parts))]
        return everywhere or places  # or a part of a run without spaces

    def _title(self, word: str | int, places: Sequence[int]) -> str:
        return str(word)

    def _mean(self, entries: Sequence[LayerMaps], places: Sequence[int], head: int | None, frame: int | None) -> torch.Tensor:
        tokens = (self._shares[places] > 0).any(dim=0).nonzero().flatten()
        total: torch.Tensor | None = None
        num_maps = 0
        for entry in entries:
            height, width = entry.maps.shape[-2:]
            if entry.maps.ndim != 4 or height != width or frame is not None:
                raise CaptureError(
                    f"{entry.layer} has a grid of {tuple(entry.maps.shape[2:])}; DAAM has maps of square pictures alone. Draw a "
                    "square one, or patch the pipeline without preset='daam'"
                )
            if not _is_daams(entry.layer) or math.isqrt(self._side**2 // (height * width)) not in self.FACTORS:
                continue
            maps = of_head(entry, entry.maps[:, tokens.to(entry.maps.device)], head).float() * entry.forwards
            maps = F.interpolate(maps, size=(self._side, self._side), mode="bicubic").clamp_min(0)
            num_maps += len(maps)
            total = maps.sum(dim=0) if total is None else total + maps.sum(dim=0)
        if total is None:
            grids = sorted({entry.maps.shape[-1] for entry in entries if _is_daams(entry.layer)})
            raise CaptureError(
                f"DAAM leaves out all of these layers: it reads down and up blocks, and of its side of {self._side} grids of "
                f"about 1/{', 1/'.join(map(str, self.FACTORS[1:]))}; here are {', '.join(map(str, grids)) or 'none'}"
            )
        return total.mean(dim=0) / num_maps


class AmdMaps(Maps):
    """Heat maps as Attention-Map-Diffusers makes them (the package attention-map-diffusers, 1.0): its aggregate of "image->text".

    The mean over heads is resampled to the finest grid by bilinear interpolation, without a filter against aliasing; then comes the
    mean over layers, without Flux's single ones. Without `step`, it is that of the last forward; `step="all"` is the tool's
    `timesteps="all"`. The tool has a map for each token; a word's is the mean over its tokens.
    """

    def _wanted(self, layers: Sequence[str | int], step: int | Literal["all"] | None) -> list[LayerMaps]:
        last = max(entry.step or 0 for entry in self.entries)
        entries = super()._wanted(layers, last if step is None else step)
        read = [entry for entry in entries if not entry.layer.startswith("single_")]
        if not read:
            raise CaptureError("Attention-Map-Diffusers leaves out all of these layers; choose others than single ones")
        return read

    def _mean(self, entries: Sequence[LayerMaps], places: Sequence[int], head: int | None, frame: int | None) -> torch.Tensor:
        size = max((entry.maps.shape[-2:] for entry in entries), key=lambda s: s[0] * s[1])
        resized = []
        for entry in entries:
            maps = of_frame(of_head(entry, entry.maps[:, places].mean(dim=1), head).mean(dim=0), frame)
            resized.append(F.interpolate(maps[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0])
        return torch.stack(resized).mean(dim=0)


def require_preset(preset: Any, heads: bool, steps: bool, denoiser: torch.nn.Module) -> None:
    """Raises `ConfigError` unless a preset is known and alone chooses heads and steps; `ModelError` if it cannot read it."""
    if preset is None:
        return
    if preset not in get_args(Preset):
        raise ConfigError(f"preset is {preset!r}; choose {' or '.join(get_args(Preset))}, or leave it out")
    if heads or steps:
        raise ConfigError(f"preset={preset!r} chooses which heads and steps are kept; leave heads and steps out")
    known = _COMPARED[preset]
    if not any(kind.__name__ in known for kind in type(denoiser).__mro__):
        raise ModelError(
            f"preset={preset!r} is known to give the tool's maps of {', '.join(known)}, not of {type(denoiser).__name__}; leave "
            "it out"
        )


def daam_side(pipe: Any, denoiser: torch.nn.Module) -> int:
    """The side of DAAM's maps, in places."""
    size: Any = getattr(denoiser.config, "sample_size", None)
    return 64 if isinstance(size, int) and size * pipe.vae_scale_factor in (512, 1024) else 96


def by_token(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of single tokens, [B, K, N], in place of the words' [B, W, N], and the K tokens' shares in the words, [B, W, K]."""
    columns = words.sum(dim=(0, 1)).nonzero().flatten()
    columns = columns if len(columns) else torch.zeros(1, dtype=torch.long)  # no word has one, which `maps` says
    tokens = torch.eye(words.shape[2])[columns]
    return tokens.expand(len(words), -1, -1), words[:, :, columns]


def _is_daams(layer: str) -> bool:
    return layer.startswith(("down_blocks.", "up_blocks."))
