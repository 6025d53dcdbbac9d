r"""Comparing a student's word maps with their targets: normalize both per map, mean squared error, mean over present words.

    loss = 1 / max(1, present words) * sum over present (b, w) of mean over y, x of (norm(student[b,w]) - norm(target[b,w]))^2

`zscore` is (A - mean) / sqrt(variance + eps) and leaves the scale of A open, so that nothing pulls a linear aligner toward a
constant; `minmax` is (A - min) / (max - min + eps), the published choice. With no word present the loss is exactly zero and so
are its gradients.
"""

from __future__ import annotations

import torch

from ..errors import ConfigError
from .numerics import accumulator

EPSILON = 1e-6


def map_loss(student: torch.Tensor, target: torch.Tensor, present: torch.Tensor, *, normalization: str = "zscore") -> torch.Tensor:
    """Mean squared error of normalized word maps.

    Args:
        student: [B, W, y, x], floating point.
        target: [B, W, y, x]; whatever stands where `present` is False, NaN included, is ignored.
        present: bool [B, W], whether a word has both a student's map and a target.
        normalization: `"zscore"` or `"minmax"`.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ConfigError: the shapes differ, or `normalization` is unknown.
    """
    if student.shape != target.shape or student.ndim != 4 or present.shape != student.shape[:2]:
        raise ConfigError(
            f"student {tuple(student.shape)}, target {tuple(target.shape)} and present {tuple(present.shape)} do not fit; "
            "expected [B, W, y, x] twice and [B, W]"
        )
    dtype = accumulator(student)
    # Absent words become zeros before any arithmetic: a product with zero would let NaN through, into the gradient too.
    absent = ~present[..., None, None]
    ours = normalize(student.to(dtype).masked_fill(absent, 0), normalization)
    theirs = normalize(target.to(dtype).masked_fill(absent, 0), normalization)
    per_word = (ours - theirs).square().mean(dim=(-2, -1)).masked_fill(~present, 0)
    return per_word.sum() / present.sum().clamp_min(1)


def normalize(maps: torch.Tensor, normalization: str) -> torch.Tensor:
    """Normalizes each map [..., y, x]; a constant map becomes zeros."""
    if normalization == "zscore":
        centered = maps - maps.mean(dim=(-2, -1), keepdim=True)
        return centered * (centered.square().mean(dim=(-2, -1), keepdim=True) + EPSILON).rsqrt()
    if normalization == "minmax":
        low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
        return (maps - low) / (high - low + EPSILON)
    raise ConfigError(f"normalization is {normalization!r}; choose zscore or minmax")
