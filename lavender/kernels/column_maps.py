r"""Word maps of the columns orientation: words own key columns, the map runs over queries (a U-Net's cross-attention).

    P[b,h,i,n] = exp(scale * q[b,h,i].k[b,h,n] + mask - LSE[b,h,i])
    A[b,h,w,i] = sum over keys n of word w of weight[n] * P[b,h,i,n]

Backward, with G = dLoss/dA and Ghat[i,n] = sum over w of weight[w,n] G[w,i]:

    delta[i] = sum over n of P Ghat,    dS = P (Ghat - delta),    dq = scale dS k,    dk = scale dS^T q.

Nothing of size [B, H, Q, N] exists: `torch` works in chunks of queries that respect a byte budget and recomputes them in the
backward pass. Implementations: `reference`, `torch`. Sums run in float32, or in float64 for float64 inputs.
"""

from __future__ import annotations

import torch

from ..errors import ConfigError
from .dispatch import able, choose
from .numerics import accumulator, additive, masked_softmax, masked_softmax_

BYTE_BUDGET = 32 * 2**20
"""Bytes that one chunk's probabilities may take in the `torch` implementation."""


def column_maps(
    query: torch.Tensor,
    key: torch.Tensor,
    word_weights: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Per-head maps of words over queries, differentiable in `query` and `key`.

    Args:
        query: [B, H, Q, D], float16, bfloat16, float32 or float64.
        key: [B, H, N, D] of the same dtype.
        word_weights: [B, W, N], each key's share of each word; a word's mean over its tokens has 1 / tokens at each of them.
        mask: bool (True may be seen) or additive float, broadcastable to [B, H, Q, N]; None for no mask.
        scale: softmax scale; D ** -0.5 when None.
        impl: `"auto"`, `"torch"` or `"reference"`.

    Returns:
        [B, H, W, Q], float32 (float64 for float64 inputs). Queries that may see nothing give zeros.

    Raises:
        ConfigError: shapes or dtypes do not fit, or `impl` is unknown.
    """
    if query.ndim != 4 or key.ndim != 4 or query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        raise ConfigError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} do not fit; expected [B, H, Q, D] and [B, H, N, D]"
        )
    if query.dtype != key.dtype or not query.is_floating_point():
        raise ConfigError(f"query is {query.dtype} and key {key.dtype}; expected one floating-point dtype for both")
    if word_weights.ndim != 3 or word_weights.shape[0] != key.shape[0] or word_weights.shape[2] != key.shape[2]:
        raise ConfigError(f"word_weights {tuple(word_weights.shape)} does not fit key {tuple(key.shape)}; expected [B, W, N]")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dtype = accumulator(query)
    bias = None if mask is None else additive(mask[(None,) * (4 - mask.ndim)], dtype)
    weights = word_weights.to(dtype)
    if choose("column_maps", impl, {"torch": able, "reference": able}) == "reference":
        return column_maps_reference(query, key, weights, bias, scale)
    return _column_maps_torch(query, key, weights, bias, scale)


def column_maps_reference(
    query: torch.Tensor, key: torch.Tensor, word_weights: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The specification of `column_maps`, by plain differentiable operations; `bias` is additive, 4-D."""
    scores = scale * query.to(word_weights.dtype) @ key.to(word_weights.dtype).mT
    probabilities = masked_softmax(scores if bias is None else scores + bias)
    return word_weights[:, None] @ probabilities.mT


def _probabilities(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    scores = (query @ key.mT).mul_(scale)
    if bias is not None:
        scores += bias
    return masked_softmax_(scores)


def _queries_per_chunk(query: torch.Tensor, key: torch.Tensor, itemsize: int) -> int:
    return max(16, BYTE_BUDGET // max(1, query.shape[0] * query.shape[1] * key.shape[2] * itemsize))


def _slice_queries(bias: torch.Tensor | None, start: int, stop: int) -> torch.Tensor | None:
    return bias if bias is None or bias.shape[2] == 1 else bias[:, :, start:stop]


@torch.library.custom_op("lavender::column_maps_torch", mutates_args=())
def _column_maps_torch(
    query: torch.Tensor, key: torch.Tensor, word_weights: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    dtype = word_weights.dtype
    batch, heads, num_queries, _ = query.shape
    maps = query.new_empty((batch, heads, word_weights.shape[1], num_queries), dtype=dtype)
    full_key = key.to(dtype)
    step = _queries_per_chunk(query, key, maps.element_size())
    for start in range(0, num_queries, step):
        stop = min(start + step, num_queries)
        chunk = query[:, :, start:stop].to(dtype)
        probabilities = _probabilities(chunk, full_key, _slice_queries(bias, start, stop), scale)
        maps[..., start:stop] = word_weights[:, None] @ probabilities.mT
    return maps


@_column_maps_torch.register_fake
def _(query, key, word_weights, bias, scale):  # type: ignore[no-untyped-def]
    shape = (query.shape[0], query.shape[1], word_weights.shape[1], query.shape[2])
    return query.new_empty(shape, dtype=word_weights.dtype)


@torch.library.custom_op("lavender::column_maps_torch_backward", mutates_args=())
def _column_maps_torch_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    word_weights: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = word_weights.dtype
    full_key = key.to(dtype)
    query_gradient = torch.empty_like(query)
    key_gradient = torch.zeros_like(full_key)
    step = _queries_per_chunk(query, key, full_key.element_size())
    for start in range(0, query.shape[2], step):
        stop = min(start + step, query.shape[2])
        chunk = query[:, :, start:stop].to(dtype)
        probabilities = _probabilities(chunk, full_key, _slice_queries(bias, start, stop), scale)
        wanted = gradient[..., start:stop].mT @ word_weights[:, None]
        delta = (probabilities * wanted).sum(dim=-1, keepdim=True)
        scores_gradient = probabilities.mul_(wanted.sub_(delta)).mul_(scale)
        query_gradient[:, :, start:stop] = scores_gradient @ full_key
        key_gradient += scores_gradient.mT @ chunk
    return query_gradient, key_gradient.to(key.dtype, copy=True)


@_column_maps_torch_backward.register_fake
def _(gradient, query, key, word_weights, bias, scale):  # type: ignore[no-untyped-def]
    return torch.empty_like(query), torch.empty_like(key)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, word_weights, bias, ctx.scale = inputs
    ctx.save_for_backward(query, key, word_weights, bias)


def _backward(ctx, gradient):  # type: ignore[no-untyped-def]
    return (*_column_maps_torch_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.scale), None, None, None)


_column_maps_torch.register_autograd(_backward, setup_context=_setup_context)
