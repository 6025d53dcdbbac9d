"""The forms that maps are compared in: one grid for both sides, and a normalization per map."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ...errors import ConfigError

EPSILON = 1e-6
"""What normalizations add to what they divide by."""
NORMALIZATIONS = ("zscore", "sum", "minmax", "max", "none")
DISTANCES = ("mse", "kl")


def resample(maps: torch.Tensor, size: tuple[int, int] | torch.Size) -> torch.Tensor:
    """Bilinear, antialiased resampling of [B, W, y, x] to another height and width."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)


def normalize(maps: torch.Tensor, normalization: str) -> torch.Tensor:
    """Normalizes each map [..., y, x]; see the formulas of `map_loss`."""
    places = (-2, -1)
    if normalization == "zscore":
        centered = maps - maps.mean(dim=places, keepdim=True)
        return centered * (centered.square().mean(dim=places, keepdim=True) + EPSILON).rsqrt()
    if normalization == "sum":
        return maps / (maps.sum(dim=places, keepdim=True) + EPSILON)
    if normalization == "minmax":
        low, high = maps.amin(dim=places, keepdim=True), maps.amax(dim=places, keepdim=True)
        return (maps - low) / (high - low + EPSILON)
    if normalization == "max":
        return maps / (maps.amax(dim=places, keepdim=True) + EPSILON)
    if normalization == "none":
        return maps
    raise ConfigError(f"normalization is {normalization!r}; choose one of {', '.join(NORMALIZATIONS)}")
