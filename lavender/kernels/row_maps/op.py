"""`row_maps` by kernels of its own: the operation around their launches, whatever language they are written in.

Passes over word rows and keys: `lse` (unless the caller has it) and `maps`; backward: `delta`, `query_gradient` and
`key_gradient`. Each costs one product of the word rows with the keys; the last two cost one more.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..grids import last_axis_dense
from ..numerics import HEADROOM, largest
from ..operation import register
from .call import RowCall

LOG2E = math.log2(math.e)
"""Kernels work in base 2: exp(x) = exp2(x * LOG2E)."""


@dataclass(frozen=True, eq=False)
class RowGradients:
    """What the gradients of query and key are made from, beside the call.

    Attributes:
        lse: float32 [B, H, R], as `RowKernels.lse` gives it.
        delta: float32 [B, H, R], as `RowKernels.delta` gives it.
        full: G over every key, float32, contiguous [B, C, W, N].
        grad_scale: a scalar that `full` and `delta` were divided by, and that a gradient is multiplied by before it is rounded;
            None if they were not.
    """

    lse: torch.Tensor
    delta: torch.Tensor
    full: torch.Tensor
    grad_scale: torch.Tensor | None


class RowKernels(ABC):
    """The launches of one call, and what they share: dense tensors, and sizes."""

    def __init__(self, call: RowCall) -> None:
        self.query, self.key = last_axis_dense(call.query), last_axis_dense(call.key)
        self.rows, self.words, self.columns = call.rows.contiguous(), call.words.contiguous(), call.columns.contiguous()
        self.weights = call.weights.float().contiguous()
        self.head_weights = None if call.head_weights is None else call.head_weights.contiguous()
        self.batch, self.heads, self.num_queries, self.width = call.query.shape
        self.groups, self.num_keys = call.key.shape[1:3]
        self.num_rows, self.num_columns, self.num_words = call.rows.shape[1], call.columns.shape[1], call.num_words
        self.causal, self.scale, self.device = call.causal, call.scale, call.query.device
        self.bias = None if call.bias is None else call.bias.expand(self.batch, self.heads, self.num_rows, self.num_keys)
        self.bias_strides = (0, 0, 0, 0) if self.bias is None else self.bias.stride()

    @abstractmethod
    def lse(self) -> torch.Tensor:
        """Base-2 log-sum-exp of the word rows, float32 [B, H, R]; +inf where a row sees nothing."""

    @abstractmethod
    def maps(self, lse: torch.Tensor) -> torch.Tensor:
        """Maps, float32 [B, C, W, M]; zero at padded columns."""

    @abstractmethod
    def delta(self, lse: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Each row's sum of P Ghat, float32 [B, H, R]; the gradient, contiguous [B, C, W, M], is zero at padded columns."""

    @abstractmethod
    def query_gradient(self, saved: RowGradients) -> torch.Tensor:
        """dq, contiguous, in the query's shape and dtype."""

    @abstractmethod
    def key_gradient(self, saved: RowGradients) -> torch.Tensor:
        """dk, contiguous, in the key's shape and dtype."""


def row_maps_operation(name: str, kernels: type[RowKernels]) -> Callable[[RowCall], torch.Tensor]:
    """Registers `lavender::row_maps_{name}`, which keeps the rows' base-2 log-sum-exp; returns `row_maps` of checked calls."""

    def forward(call: RowCall) -> tuple[torch.Tensor, torch.Tensor]:
        launches = kernels(call)
        lse = launches.lse() if call.lse is None else torch.where(call.lse == -torch.inf, torch.inf, call.lse * LOG2E)
        return launches.maps(lse), lse

    def backward(call: RowCall, lse: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        launches, grad_scale = kernels(call), None
        gradient = gradient.masked_fill((call.columns < 0)[:, None, None], 0)
        # dS is rounded to the inputs' dtype for its products: float16 needs it in its range, whatever the loss's scale.
        if call.query.dtype == torch.float16:
            grad_scale = largest(gradient) / HEADROOM
            gradient = gradient / grad_scale
        saved = RowGradients(lse, launches.delta(lse, gradient), call.spread(gradient), grad_scale)
        head_gradient = saved.delta.sum(dim=(0, 2))
        head_gradient = head_gradient if grad_scale is None else head_gradient * grad_scale
        return launches.query_gradient(saved), launches.key_gradient(saved), head_gradient

    differentiable = ("query", "key", "head_weights")
    operation = register(f"row_maps_{name}", RowCall, forward, _fake, backward, differentiable, num_outputs=2, saves_last=True)
    return lambda call: operation(call)[0]


def _fake(call: RowCall) -> tuple[torch.Tensor, torch.Tensor]:
    lse_shape = (*call.query.shape[:2], call.rows.shape[1])
    return call.query.new_empty(call.maps_shape, dtype=torch.float32), call.query.new_empty(lse_shape, dtype=torch.float32)
