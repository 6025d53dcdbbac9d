"""`map_loss` by batched operations, any device (`impl="torch"`): nothing is larger than the maps, so it needs no chunks."""

from __future__ import annotations

import torch

from ..numerics import accumulator
from .call import LossCall
from .normalization import EPSILON, normalize


def map_loss_chunked(call: LossCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances [B, W] and their gradients by the student's maps, [B, W, y, x]."""
    dtype, matrices = accumulator(call.student), call.matrices()
    absent = ~call.present[..., None, None]
    ours = call.student.to(dtype).masked_fill(absent, 0)
    if matrices is not None:
        ours = matrices[0] @ ours @ matrices[1].mT
    normalized = normalize(ours, call.normalization)
    theirs = normalize(call.target.to(dtype).masked_fill(absent, 0), call.normalization)
    places = (-2, -1)
    if call.distance == "mse":
        difference = normalized - theirs
        per_word = difference.square().mean(dim=places)
        pull = difference * (2 / (theirs.shape[2] * theirs.shape[3]))
    else:
        per_word = (theirs * (theirs.clamp_min(EPSILON) / normalized.clamp_min(EPSILON)).log()).sum(dim=places)
        pull = torch.where(normalized >= EPSILON, -theirs / normalized.clamp_min(EPSILON), 0)
    gradient = _normalize_backward(pull, ours, normalized, call.normalization)
    if matrices is not None:
        gradient = matrices[0].mT @ gradient @ matrices[1]
    return per_word.masked_fill(~call.present, 0), gradient.masked_fill(absent, 0)


def _normalize_backward(pull: torch.Tensor, maps: torch.Tensor, normalized: torch.Tensor, normalization: str) -> torch.Tensor:
    """The gradient by `maps`, given the one by `normalized`; ties of an extreme share its gradient evenly, as in torch.amax."""
    places = (-2, -1)
    along = (pull * normalized).sum(dim=places, keepdim=True)

    def share_of(extreme: torch.Tensor) -> torch.Tensor:
        ties = maps == extreme
        return ties / ties.sum(dim=places, keepdim=True)

    if normalization == "zscore":
        size = maps.shape[-2] * maps.shape[-1]
        variance = (maps - maps.mean(dim=places, keepdim=True)).square().mean(dim=places, keepdim=True)
        return (pull - pull.mean(dim=places, keepdim=True) - normalized * (along / size)) * (variance + EPSILON).rsqrt()
    if normalization == "sum":
        return (pull - along) / (maps.sum(dim=places, keepdim=True) + EPSILON)
    if normalization == "none":
        return pull
    high = maps.amax(dim=places, keepdim=True)
    if normalization == "max":
        return (pull - share_of(high) * along) / (high + EPSILON)
    low = maps.amin(dim=places, keepdim=True)
    total = pull.sum(dim=places, keepdim=True)
    return (pull - share_of(high) * along + share_of(low) * (along - total)) / (high - low + EPSILON)
