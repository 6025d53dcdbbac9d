"""`row_maps` by kernels of its own: the operation around them, whatever language they are written in.

Passes over word rows and keys: `lse` (unless the caller has it) and `maps`; backward: `delta`, `query_gradient` and
`key_gradient`. Each costs one product of the word rows with the keys; the last two cost one more.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ...types import WordRows
from ..checks import in_full_precision
from ..grids import last_axis_dense
from ..numerics import HEADROOM, largest

LOG2E = math.log2(math.e)
"""Kernels work in base 2: exp(x) = exp2(x * LOG2E)."""


@dataclass(frozen=True)
class RowGradients:
    """What the gradients of query and key are made from, beside the call's tensors.

    Args:
        lse: float32 [B, H, R], as `RowKernels.lse` gives it.
        delta: float32 [B, H, R], as `RowKernels.delta` gives it.
        full: G over every key, float32, contiguous [B, C, W, N].
        head_weights: float32 [H]; None keeps the heads apart.
        peak: a scalar that `full` and `delta` were divided by, and that a gradient is multiplied by before it is rounded; or None.
    """

    lse: torch.Tensor
    delta: torch.Tensor
    full: torch.Tensor
    head_weights: torch.Tensor | None
    peak: torch.Tensor | None


class RowKernels(ABC):
    """One call's launches, in whatever language the kernels are written, and what they share: tensors and sizes.

    Args:
        query: [B, H, T, D].
        key: [B, G, N, D] of the same dtype.
        rows: [B, R], the words' query rows; -1 is padding. Like `words`, `weights` and `columns` it is contiguous.
        words: [B, R], the word of each row; -1 is padding.
        weights: float32 [B, R], each row's share of its word, zero at padding.
        columns: [B, M], the keys that are kept; -1 is padding.
        bias: additive, broadcastable to [B, H, R, N]; None for no mask.
        causal: whether row i sees keys 0, ..., i only.
        scale: softmax scale.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        rows: torch.Tensor,
        words: torch.Tensor,
        weights: torch.Tensor,
        columns: torch.Tensor,
        bias: torch.Tensor | None,
        causal: bool,
        scale: float,
    ) -> None:
        self.query, self.key = last_axis_dense(query), last_axis_dense(key)
        self.rows, self.words, self.weights, self.columns = rows, words, weights, columns
        self.batch, self.heads, _, self.width = query.shape
        self.groups, self.num_keys = key.shape[1:3]
        self.num_rows, self.num_columns = rows.shape[1], columns.shape[1]
        self.causal, self.scale, self.device = causal, scale, query.device
        self.bias = None if bias is None else bias.expand(self.batch, self.heads, self.num_rows, self.num_keys)
        self.bias_strides = (0, 0, 0, 0) if self.bias is None else self.bias.stride()

    @abstractmethod
    def lse(self) -> torch.Tensor:
        """Base-2 log-sum-exp of the word rows, float32 [B, H, R]; +inf where a row sees nothing."""

    @abstractmethod
    def maps(self, lse: torch.Tensor, num_words: int, head_weights: torch.Tensor | None) -> torch.Tensor:
        """Maps, float32 [B, C, W, M]; zero at padded columns."""

    @abstractmethod
    def delta(self, lse: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Each row's sum of P Ghat, float32 [B, H, R]; the gradient, contiguous [B, C, W, M], is zero at padded columns."""

    @abstractmethod
    def query_gradient(self, flow: RowGradients) -> torch.Tensor:
        """dq, contiguous, in the query's shape and dtype."""

    @abstractmethod
    def key_gradient(self, flow: RowGradients) -> torch.Tensor:
        """dk, contiguous, in the key's shape and dtype."""


def row_maps_operation(name: str, kernels: type[RowKernels]) -> Callable[..., torch.Tensor]:
    """Registers `lavender::row_maps_{name}` and its backward pass; returns `row_maps` for validated arguments."""

    def row_maps(
        query: torch.Tensor,
        key: torch.Tensor,
        rows: torch.Tensor,
        words: torch.Tensor,
        weights: torch.Tensor,
        columns: torch.Tensor,
        num_words: int,
        bias: torch.Tensor | None,
        causal: bool,
        scale: float,
        head_weights: torch.Tensor | None,
        lse: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps [B, C, W, M] and the rows' base-2 log-sum-exp [B, H, R], which the backward pass needs again."""
        call = kernels(query, key, rows, words, weights, columns, bias, causal, scale)
        normalizer = call.lse() if lse is None else torch.where(lse == -torch.inf, torch.inf, lse * LOG2E)
        return call.maps(normalizer, num_words, head_weights), normalizer

    def row_maps_backward(
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        rows: torch.Tensor,
        words: torch.Tensor,
        weights: torch.Tensor,
        columns: torch.Tensor,
        bias: torch.Tensor | None,
        causal: bool,
        scale: float,
        head_weights: torch.Tensor | None,
        normalizer: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key and head weights (those of heads that are kept mean nothing)."""
        call = kernels(query, key, rows, words, weights, columns, bias, causal, scale)
        gradient = gradient.masked_fill((columns < 0)[:, None, None], 0)
        peak = None
        # dS is rounded to the inputs' dtype for its products: float16 needs it in its range, whatever the loss's scale.
        if query.dtype == torch.float16:
            peak = largest(gradient) / HEADROOM
            gradient = gradient / peak
        delta = call.delta(normalizer, gradient)
        full = gradient.new_zeros(*gradient.shape[:3], key.shape[2])
        full.scatter_add_(3, columns.clamp_min(0)[:, None, None].expand_as(gradient), gradient)
        flow = RowGradients(normalizer, delta, full, head_weights, peak)
        head_gradient = delta.sum(dim=(0, 2))
        return call.query_gradient(flow), call.key_gradient(flow), head_gradient if peak is None else head_gradient * peak

    operation = torch.library.custom_op(f"lavender::row_maps_{name}", row_maps, mutates_args=())
    operation.register_fake(_fake)
    backward_operation = torch.library.custom_op(f"lavender::row_maps_{name}_backward", row_maps_backward, mutates_args=())
    backward_operation.register_fake(_backward_fake)

    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, bias, head_weights, normalizer = ctx.saved_tensors
        arguments = (gradient.contiguous(), *tensors, bias, ctx.causal, ctx.scale, head_weights, normalizer)
        with in_full_precision(gradient):
            query_gradient, key_gradient, head_gradient = backward_operation(*arguments)
        nothing = (None,) * 8
        return query_gradient, key_gradient, *nothing, head_gradient if head_weights is not None else None, None

    operation.register_autograd(backward, setup_context=_setup_context)

    def validated(
        query: torch.Tensor,
        key: torch.Tensor,
        rows: WordRows,
        columns: torch.Tensor,
        bias: torch.Tensor | None,
        causal: bool,
        scale: float,
        head_weights: torch.Tensor | None,
        lse: torch.Tensor | None,
    ) -> torch.Tensor:
        """`row_maps` for validated arguments; `bias` is additive, broadcastable to [B, H, R, N], and `lse` [B, H, R]."""
        # Padding speaks for no word, whatever weight it was given.
        weights = rows.weights.detach().float().masked_fill((rows.rows < 0) | (rows.words < 0), 0)
        indices = (rows.rows.contiguous(), rows.words.contiguous(), weights.contiguous(), columns.contiguous())
        heads = None if head_weights is None else head_weights.contiguous()
        return operation(query, key, *indices, rows.num_words, bias, causal, scale, heads, lse)[0]

    return validated


def _fake(query, key, rows, words, weights, columns, num_words, bias, causal, scale, head_weights, lse):  # type: ignore[no-untyped-def]
    batch, heads = query.shape[:2]
    channels = heads if head_weights is None else 1
    maps = weights.new_empty(batch, channels, num_words, columns.shape[1])
    return maps, weights.new_empty(batch, heads, rows.shape[1])


def _backward_fake(gradient, query, key, *arguments):  # type: ignore[no-untyped-def]
    query_gradient = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return query_gradient, torch.empty(key.shape, dtype=key.dtype, device=key.device), gradient.new_empty(query.shape[1])


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, rows, words, weights, columns, _, bias, ctx.causal, ctx.scale, head_weights, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, rows, words, weights, columns, bias, head_weights, output[1])
