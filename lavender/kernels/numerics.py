"""The arithmetic that the operations share: what precision sums run in, masks as additive biases, and their softmax."""

from __future__ import annotations

import torch


def accumulator(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that sums over this tensor run in: float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean (True may be seen) or additive mask as an additive one of this dtype, -inf where nothing may be seen."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return mask.to(dtype)


def masked_softmax(scores: torch.Tensor) -> torch.Tensor:
    """Differentiable softmax over the last axis; zeros, and zero gradients, in rows that are -inf throughout."""
    blind = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return scores.masked_fill(blind, 0).softmax(dim=-1).masked_fill(blind, 0)


def masked_softmax_(scores: torch.Tensor) -> torch.Tensor:
    """`masked_softmax` in place, without autograd."""
    lse = scores.logsumexp(dim=-1, keepdim=True)
    return scores.sub_(lse.masked_fill_(lse == -torch.inf, torch.inf)).exp_()
