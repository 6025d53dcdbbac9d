"""The specification of `map_loss`: plain differentiable operations, on any device."""

from __future__ import annotations

import torch

from ..numerics import accumulator
from .call import LossCall
from .normalization import EPSILON, normalize, resample


def map_loss_reference(call: LossCall) -> torch.Tensor:
    """Distances [B, W], not reduced."""
    dtype, size = accumulator(call.student), call.target.shape[-2:]
    # Absent words become zeros before any arithmetic: a product with zero would let NaN through, into the gradient too.
    absent = ~call.present[..., None, None]
    ours = normalize(resample(call.student.to(dtype).masked_fill(absent, 0), size), call.normalization)
    theirs = normalize(call.target.detach().to(dtype).masked_fill(absent, 0), call.normalization)
    if call.distance == "mse":
        per_word = (ours - theirs).square().mean(dim=(-2, -1))
    else:
        per_word = (theirs * (theirs.clamp_min(EPSILON) / ours.clamp_min(EPSILON)).log()).sum(dim=(-2, -1))
    return per_word.masked_fill(~call.present, 0)
