"""`column_maps` and `column_attention` by kernels of their own: the operation around them, whatever their language.

The forward pass gives output, maps and log-sum-exp; the backward pass is `query_gradient`, which also gives delta, and
`key_gradient`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..checks import in_full_precision
from ..grids import last_axis_dense
from ..numerics import HEADROOM, largest


@dataclass(frozen=True)
class ColumnGradients:
    """What the gradients of query, key and value are made from, beside the call's tensors.

    Args:
        lse: float32 [B, H, Q], as `ColumnKernels.forward` gives it.
        maps: the gradient of the maps, float32, contiguous [B, C, W, Q].
        output: the gradient of the output, contiguous [B, H, Q, E], in the inputs' dtype.
        peak: a scalar that `maps` was divided by, and that dq and dk are multiplied by before they are rounded; or None.
        output_peak: a scalar that `output` was divided by, and that dv is multiplied by; None without values, or without a peak.
            Beside `maps`, `output` counts output_peak / peak.
    """

    lse: torch.Tensor
    maps: torch.Tensor
    output: torch.Tensor
    peak: torch.Tensor | None
    output_peak: torch.Tensor | None


class ColumnKernels(ABC):
    """One call's launches, in whatever language the kernels are written, and what they share: tensors and sizes.

    Args:
        query: [B, H, Q, D].
        key: [B, H, N, D] of the same dtype.
        value: [B, H, N, E] of the same dtype; E is zero where maps alone are asked for.
        word_weights: float32 [B, W, N], contiguous.
        bias: additive, broadcastable to [B, H, Q, N]; None for no mask.
        scale: softmax scale.
        head_weights: float32 [H]; None keeps the heads apart.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        word_weights: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        head_weights: torch.Tensor | None,
    ) -> None:
        self.query, self.key, self.value = (last_axis_dense(t) for t in (query, key, value))
        self.word_weights, self.head_weights = word_weights, head_weights
        self.batch, self.heads, self.num_queries, self.width = query.shape
        self.num_keys, self.value_width = value.shape[2:]
        self.num_words, self.scale, self.device = word_weights.shape[1], scale, query.device
        self.bias = None if bias is None else bias.expand(self.batch, self.heads, self.num_queries, self.num_keys)
        self.bias_strides = (0, 0, 0, 0) if self.bias is None else self.bias.stride()

    @abstractmethod
    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output [B, H, Q, E], maps, float32 [B, C, W, Q], and the queries' base-2 log-sum-exp, float32 [B, H, Q].

        The log-sum-exp is +inf where a query sees nothing.
        """

    @abstractmethod
    def query_gradient(self, flow: ColumnGradients) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dq, contiguous, in the query's shape and dtype; delta; and its part by the maps per unit of head weight.

        The last two are float32 [B, H, Q], and stay divided by the peak.
        """

    @abstractmethod
    def key_gradient(self, flow: ColumnGradients, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dk and dv, contiguous, in the inputs' shapes and dtypes."""


def column_maps_operation(name: str, kernels: type[ColumnKernels]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Registers `lavender::column_maps_{name}` and its backward pass; returns `column_attention` for validated arguments."""

    def column_maps(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        word_weights: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        head_weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output [B, H, Q, E], maps [B, C, W, Q], and the queries' base-2 log-sum-exp [B, H, Q] for the backward pass."""
        return kernels(query, key, value, word_weights, bias, scale, head_weights).forward()

    def column_maps_backward(
        output_gradient: torch.Tensor,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        word_weights: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        head_weights: torch.Tensor | None,
        lse: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key, value and head weights (those of heads that are kept mean nothing)."""
        call = kernels(query, key, value, word_weights, bias, scale, head_weights)
        peak, output_peak = None, None
        # dS is rounded to the inputs' dtype for its products: float16 needs it in its range, whatever the loss's scale. So is the
        # output's gradient, which may be small beside that of the maps, and has a peak of its own.
        if query.dtype == torch.float16:
            peak = largest(gradient) / HEADROOM
            if value.shape[3]:
                output_peak = largest(output_gradient)
                peak = torch.maximum(peak, output_peak)
                output_gradient = (output_gradient.float() / output_peak).to(query.dtype)
            gradient = gradient / peak
        flow = ColumnGradients(lse, gradient, output_gradient, peak, output_peak)
        query_gradient, delta, head_delta = call.query_gradient(flow)
        key_gradient, value_gradient = call.key_gradient(flow, delta)
        head_gradient = head_delta.sum(dim=(0, 2))
        return query_gradient, key_gradient, value_gradient, head_gradient if peak is None else head_gradient * peak

    operation = torch.library.custom_op(f"lavender::column_maps_{name}", column_maps, mutates_args=())
    operation.register_fake(_fake)
    backward_operation = torch.library.custom_op(f"lavender::column_maps_{name}_backward", column_maps_backward, mutates_args=())
    backward_operation.register_fake(_backward_fake)

    @once_differentiable
    def backward(
        ctx: Any, output_gradient: torch.Tensor, gradient: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        *tensors, bias, head_weights, lse = ctx.saved_tensors
        arguments = (*tensors, bias, ctx.scale, head_weights, lse)
        with in_full_precision(gradient):
            *gradients, head_gradient = backward_operation(output_gradient.contiguous(), gradient.contiguous(), *arguments)
        return (*gradients, None, None, None, head_gradient if head_weights is not None else None)

    operation.register_autograd(backward, setup_context=_setup_context)

    def validated(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        word_weights: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        head_weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`column_attention` for validated arguments; a value of width zero asks for maps alone."""
        heads = None if head_weights is None else head_weights.contiguous()
        output, maps, _ = operation(query, key, value, word_weights.contiguous(), bias, scale, heads)
        return output, maps

    return validated


def _fake(query, key, value, word_weights, bias, scale, head_weights):  # type: ignore[no-untyped-def]
    output = query.new_empty(*query.shape[:3], value.shape[3])
    channels = query.shape[1] if head_weights is None else 1
    maps = word_weights.new_empty(query.shape[0], channels, word_weights.shape[1], query.shape[2])
    return output, maps, word_weights.new_empty(query.shape[:3])


def _backward_fake(output_gradient, gradient, query, key, value, *arguments):  # type: ignore[no-untyped-def]
    gradients = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value)]
    return (*gradients, gradient.new_empty(query.shape[1]))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, word_weights, bias, ctx.scale, head_weights = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(query, key, value, word_weights, bias, head_weights, output[2])
