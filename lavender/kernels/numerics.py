"""The arithmetic that the operations share: the precision of sums, masks as additive biases and their softmax, padded sizes."""

from __future__ import annotations

import torch


def accumulator(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that sums over this tensor run in: float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


HEADROOM = 1024.0
"""How large kernels let the largest gradient of a map be in float16, which reaches to 65504. dS is at most twice as large, times
the weights of its row and head; where probabilities are small it is much smaller, and must not vanish."""


def largest(gradient: torch.Tensor) -> torch.Tensor:
    """The largest absolute value, float32, above zero: a scale to divide by. NaN and infinity stay what they are."""
    return gradient.float().abs().amax().clamp_min(torch.finfo(torch.float32).tiny * HEADROOM)


def power_of_two(number: int) -> int:
    """The smallest power of two, 16 or more, that is not below a number: what a kernel's tile of this size is padded to."""
    return max(16, 1 << (number - 1).bit_length())


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean (True may be seen) or additive mask as an additive one of this dtype, -inf where nothing may be seen.

    The lowest finite number of an additive mask's dtype means -inf, as in transformers' masks.
    """
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return mask.to(dtype).masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)


def masked_softmax(scores: torch.Tensor) -> torch.Tensor:
    """Differentiable softmax over the last axis; zeros, and zero gradients, in rows that are -inf throughout."""
    blind = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return scores.masked_fill(blind, 0).softmax(dim=-1).masked_fill(blind, 0)


def masked_softmax_(scores: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`masked_softmax(scores + bias)` in place, without autograd; `bias` broadcasts to `scores`."""
    if bias is None:
        return torch.softmax(scores, dim=-1, out=scores)
    torch.softmax(scores.add_(bias), dim=-1, out=scores)
    return scores.masked_fill_((bias == -torch.inf).all(dim=-1, keepdim=True), 0)
