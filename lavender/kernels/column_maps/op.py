"""`column_maps` and `column_attention` by kernels of their own: the operation around their launches, whatever their language.

The forward pass gives output, maps and log-sum-exp; the backward pass is `query_gradient`, which also gives delta, and
`key_gradient`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..grids import last_axis_dense
from ..numerics import HEADROOM, largest
from ..operation import register
from .call import ColumnCall


@dataclass(frozen=True, eq=False)
class ColumnGradients:
    """What the gradients of query, key and value are made from, beside the call.

    Attributes:
        lse: float32 [B, H, Q], as `ColumnKernels.forward` gives it.
        maps: the gradient of the maps, float32, contiguous [B, C, W, Q].
        output: the gradient of the output, contiguous [B, H, Q, E], in the inputs' dtype.
        grad_scale: a scalar that `maps` was divided by, and that dq and dk are multiplied by before they are rounded; or None.
        output_scale: a scalar that `output` was divided by, and that dv is multiplied by; None without values, or without a
            `grad_scale`. Beside `maps`, `output` counts output_scale / grad_scale.
    """

    lse: torch.Tensor
    maps: torch.Tensor
    output: torch.Tensor
    grad_scale: torch.Tensor | None
    output_scale: torch.Tensor | None


class ColumnKernels(ABC):
    """The launches of one call, and what they share: dense tensors, and sizes."""

    def __init__(self, call: ColumnCall) -> None:
        self.query, self.key, self.value = (last_axis_dense(t) for t in (call.query, call.key, call.value))
        self.word_weights = call.word_weights.contiguous()
        self.head_weights = None if call.head_weights is None else call.head_weights.contiguous()
        self.batch, self.heads, self.num_queries, self.width = call.query.shape
        self.num_keys, self.value_width = call.value.shape[2:]
        self.num_words, self.scale, self.device = call.word_weights.shape[1], call.scale, call.query.device
        self.bias = None if call.bias is None else call.bias.expand(self.batch, self.heads, self.num_queries, self.num_keys)
        self.bias_strides = (0, 0, 0, 0) if self.bias is None else self.bias.stride()

    @abstractmethod
    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output [B, H, Q, E], maps, float32 [B, C, W, Q], and the queries' base-2 log-sum-exp, float32 [B, H, Q].

        The log-sum-exp is +inf where a query sees nothing.
        """

    @abstractmethod
    def query_gradient(self, saved: ColumnGradients) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dq, contiguous, in the query's shape and dtype; delta; and its part by the maps per unit of head weight.

        The last two are float32 [B, H, Q], and stay divided by `grad_scale`.
        """

    @abstractmethod
    def key_gradient(self, saved: ColumnGradients, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dk and dv, contiguous, in the inputs' shapes and dtypes."""


def column_maps_operation(name: str, kernels: type[ColumnKernels]) -> Callable[[ColumnCall], tuple[torch.Tensor, torch.Tensor]]:
    """Registers `lavender::column_maps_{name}`, which keeps the log-sum-exp; returns `column_attention` of checked calls."""

    def forward(call: ColumnCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return kernels(call).forward()

    def backward(
        call: ColumnCall, lse: torch.Tensor, output_gradient: torch.Tensor, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        launches, grad_scale, output_scale = kernels(call), None, None
        # dS is rounded to the inputs' dtype for its products: float16 needs it in its range, whatever the loss's scale. So is the
        # output's gradient, which may be small beside that of the maps, and has a scale of its own.
        if call.query.dtype == torch.float16:
            grad_scale = largest(gradient) / HEADROOM
            if launches.value_width:
                output_scale = largest(output_gradient)
                grad_scale = torch.maximum(grad_scale, output_scale)
                output_gradient = (output_gradient.float() / output_scale).to(call.query.dtype)
            gradient = gradient / grad_scale
        saved = ColumnGradients(lse, gradient, output_gradient, grad_scale, output_scale)
        query_gradient, delta, head_delta = launches.query_gradient(saved)
        key_gradient, value_gradient = launches.key_gradient(saved, delta)
        head_gradient = head_delta.sum(dim=(0, 2))
        head_gradient = head_gradient if grad_scale is None else head_gradient * grad_scale
        return query_gradient, key_gradient, value_gradient, head_gradient

    differentiable = ("query", "key", "value", "head_weights")
    operation = register(
        f"column_maps_{name}", ColumnCall, forward, _fake, backward, differentiable, num_outputs=3, saves_last=True
    )
    return lambda call: operation(call)[:2]


def _fake(call: ColumnCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    maps, lse = (call.word_weights.new_empty(shape) for shape in (call.maps_shape, call.query.shape[:3]))
    return call.query.new_empty(call.output_shape), maps, lse
