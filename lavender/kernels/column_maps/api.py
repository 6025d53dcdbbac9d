r"""Word maps of the columns orientation: words own key columns, the map runs over queries (a U-Net's cross-attention).

    P[b,h,i,n] = exp(scale * q[b,h,i].k[b,h,n] + mask - LSE[b,h,i]),    O = P v
    A[b,c,w,i] = sum over heads h of a[c,h] * sum over keys n of weight[w,n] * P[b,h,i,n]

Heads are kept (C = H, a = 1) or summed by `head_weights` (C = 1). Words are extra columns of the values, so output and map come
out of one pass. Backward, with G = dLoss/dA and Ghat[h,i,n] = a[h] sum over w of weight[w,n] G[w,i]:

    dP = dO v^T + Ghat,    delta[i] = sum over n of P dP,    dS = P (dP - delta),
    dq = scale dS k,    dk = scale dS^T q,    dv = P^T dO,    da[h] = sum over i, n of P Ghat / a[h].

Nothing of size [B, H, Q, N] exists. Implementations: `reference`; `torch`, in chunks under a byte budget, recomputed in the
backward pass, any device; `triton`, compute capability 8.0 and newer: one pass up to 128 keys (a text encoder's window), and for
more keys (joint attention) maps alone, by the rows' log-sum-exp and a second pass; `cuda`, float16, 7.0 and newer, any number of
keys. Sums run in float32, or in float64 for float64 inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...errors import ConfigError
from ..checks import in_full_precision, require_attention, require_head_weights, require_mask, require_tensors
from ..dispatch import able, choose, cuda_reasons, triton_reasons
from ..numerics import accumulator, additive, masked_softmax, masked_softmax_

BYTE_BUDGET = 3 * 2**19
"""Bytes that one chunk's probabilities may take in the `torch` implementation: about what a processor's caches hold."""

ONE_PASS_KEYS = 128
"""The most keys of `triton`'s one-pass kernel."""

WIDEST_FLOAT32 = 64
"""The widest heads of `triton` in float32."""

KEY_MULTIPLE = 8
"""What the `torch` implementation pads the number of keys to: on a CPU a matrix product with 77 keys takes up to 1.5 times as long
as one with 80, and that is more than the maps cost."""


def column_maps(
    query: torch.Tensor,
    key: torch.Tensor,
    word_weights: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    head_weights: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Maps of words over queries, differentiable in `query`, `key` and `head_weights`.

    Args:
        query: [B, H, Q, D], float16, bfloat16, float32 or float64.
        key: [B, H, N, D] of the same dtype.
        word_weights: [B, W, N], each key's share of each word; a word's mean over its tokens has 1 / tokens at each of them. It
            gets no gradient.
        mask: bool (True may be seen) or additive float, broadcastable to [B, H, Q, N]; None for no mask. It gets no gradient.
        scale: softmax scale; D ** -0.5 when None.
        head_weights: floating point [H], what each head adds to one map per word; None keeps the heads apart.
        impl: `"auto"`, `"triton"`, `"cuda"`, `"torch"` or `"reference"`.

    Returns:
        [B, C, W, Q], float32 (float64 for float64 inputs); C is H, or 1 with `head_weights`. Queries that may see nothing give
        zeros.

    Raises:
        ConfigError: shapes, dtypes or devices do not fit, something is empty, or `impl` is unknown or cannot run here.
    """
    require_tensors(key=key)
    no_value = key.new_empty(*key.shape[:3], 0)
    return _checked_columns(query, key, no_value, word_weights, mask, scale, head_weights, impl)[1]


def column_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    word_weights: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    head_weights: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention's output and `column_maps` in one pass; differentiable in `query`, `key`, `value` and `head_weights`.

    Args:
        value: [B, H, N, E] of the same dtype as `query` and `key`; see `column_maps` for the others.

    Returns:
        The output [B, H, Q, E] in the inputs' dtype, equal to `scaled_dot_product_attention`'s up to rounding (it may be a
        strided view), and the maps. Queries that may see nothing give zeros.

    Raises:
        ConfigError: as `column_maps`.
    """
    require_tensors(value=value, key=key)
    if value.ndim != 4 or value.shape[:3] != key.shape[:3] or value.dtype != key.dtype:
        raise ConfigError(
            f"value {tuple(value.shape)} of {value.dtype} does not fit key {tuple(key.shape)} of {key.dtype}; expected [B, H, N, E]"
        )
    return _checked_columns(query, key, value, word_weights, mask, scale, head_weights, impl)


def _checked_columns(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    word_weights: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    head_weights: torch.Tensor | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    require_tensors(query=query, key=key, word_weights=word_weights, mask=mask, head_weights=head_weights)
    require_attention(query, key)
    if query.shape[1] != key.shape[1]:
        raise ConfigError(f"query has {query.shape[1]} heads and key {key.shape[1]}; repeat_interleave the key's, one for each")
    if word_weights.ndim != 3 or word_weights.shape[0] != key.shape[0] or word_weights.shape[2] != key.shape[2]:
        raise ConfigError(f"word_weights {tuple(word_weights.shape)} does not fit key {tuple(key.shape)}; expected [B, W, N]")
    require_mask(mask, query, key)
    require_head_weights(head_weights, query.shape[1])
    with in_full_precision(query):
        return _columns(query, key, value, word_weights.detach(), mask, scale, head_weights, impl)


def _columns(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    word_weights: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    head_weights: torch.Tensor | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dtype = accumulator(query)
    bias = None if mask is None else additive(mask.detach()[(None,) * (4 - mask.ndim)], dtype)
    weights = word_weights.to(dtype)
    if head_weights is not None:
        head_weights = head_weights.to(dtype)
    triton = partial(_triton_reasons, query, key, value, impl)
    cuda = partial(_cuda_reasons, query, value, impl)
    chosen = choose("column_maps", impl, {"triton": triton, "cuda": cuda, "torch": able, "reference": able})
    if chosen == "reference":
        return column_maps_reference(query, key, value, weights, bias, scale, head_weights)
    if chosen == "triton":
        from .triton_kernels import column_maps_triton

        return column_maps_triton(query, key, value, weights, bias, scale, head_weights)
    if chosen == "cuda":
        from .cuda_launch import column_maps_cuda

        return column_maps_cuda(query, key, value, weights, bias, scale, head_weights)
    both = _column_maps_torch(query, key, value, weights, bias, scale)
    maps = both[..., value.shape[3] :].mT
    if head_weights is not None:
        # Not a matrix product: a head's gradient is a sum whose terms nearly cancel, and `sum` adds them pairwise.
        maps = (head_weights[:, None, None] * maps.mT).sum(dim=1, keepdim=True).mT
    return both[..., : value.shape[3]].to(query.dtype), maps


def column_maps_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    word_weights: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    head_weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification of `column_attention`, by plain differentiable operations; `bias` is additive, 4-D."""
    dtype = word_weights.dtype
    scores = scale * query.to(dtype) @ key.to(dtype).mT
    probabilities = masked_softmax(scores if bias is None else scores + bias)
    maps = word_weights[:, None] @ probabilities.mT
    if head_weights is not None:
        maps = torch.einsum("h,bhwq->bwq", head_weights, maps)[:, None]
    return (probabilities @ value.to(dtype)).to(query.dtype), maps


def _triton_reasons(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, impl: str) -> list[str]:
    reasons = triton_reasons(query, query.shape[3], WIDEST_FLOAT32, impl == "triton") + _width_reasons(query, value)
    if value.shape[3] and key.shape[2] > ONE_PASS_KEYS:
        reasons.append(f"there are {key.shape[2]} keys; with more than {ONE_PASS_KEYS} it gives maps, but no attention output")
    return reasons


def _cuda_reasons(query: torch.Tensor, value: torch.Tensor, impl: str) -> list[str]:
    return _width_reasons(query, value) or cuda_reasons(
        "column_maps", query, query.shape[3], query.shape[0] * query.shape[1], impl == "cuda"
    )


def _width_reasons(query: torch.Tensor, value: torch.Tensor) -> list[str]:
    if value.shape[3] in (0, query.shape[3]):
        return []
    return [f"values are {value.shape[3]} wide and queries {query.shape[3]}; its kernels take equal widths"]


class _Chunks:
    """Some heads' queries against their keys, or a part of one head's queries: what forward and backward share."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None, scale: float, dtype: torch.dtype) -> None:
        self.batch, self.heads = query.shape[:2]
        self.num_keys = key.shape[2]
        self.query = query.flatten(0, 1)
        self.scaled_key = (_padded_keys(key).to(dtype) * scale).flatten(0, 1)
        if bias is not None:
            bias = _padded_keys(bias.mT, -torch.inf).mT if bias.shape[3] > 1 else bias
            bias = bias.expand(self.batch, self.heads, *bias.shape[2:]).flatten(0, 1)
        self.bias = bias

    def __iter__(self) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
        """Slices of [B * H] and of queries, those queries, and their probabilities [.., q, padded N] to be used up."""
        total, num_queries = self.query.shape[:2]
        width, dtype = self.scaled_key.shape[1], self.scaled_key.dtype
        fitting = max(1, BYTE_BUDGET // max(1, width * self.scaled_key.element_size()))
        head_step, query_step = min(total, max(1, fitting // num_queries)), min(num_queries, fitting)
        # One buffer for every chunk: fresh memory of this size is paged in anew each time, which costs more than the softmax.
        buffer = self.scaled_key.new_empty(head_step * query_step * width)
        for start in range(0, total, head_step):
            s = slice(start, min(start + head_step, total))
            for first in range(0, num_queries, query_step):
                i = slice(first, min(first + query_step, num_queries))
                queries = self.query[s, i].to(dtype)
                bias = self.bias
                if bias is not None:
                    bias = bias[s] if bias.shape[1] == 1 else bias[s, i]
                shape = (queries.shape[0], queries.shape[1], width)
                scores = buffer[: queries.shape[0] * queries.shape[1] * width].view(shape)
                torch.bmm(queries, self.scaled_key[s].mT, out=scores)
                scores[..., self.num_keys :] = -torch.inf
                yield s, i, queries, masked_softmax_(scores, bias)


def _padded_keys(tensor: torch.Tensor, value: float = 0.0) -> torch.Tensor:
    """[B, H, N, X] with N padded to a multiple of `KEY_MULTIPLE`."""
    return F.pad(tensor, (0, 0, 0, -tensor.shape[2] % KEY_MULTIPLE), value=value)


def _extended_values(value: torch.Tensor, word_weights: torch.Tensor) -> torch.Tensor:
    """Values with the words as extra columns, [B * H, padded N, E + W]."""
    words = word_weights.mT[:, None].expand(-1, value.shape[1], -1, -1)
    return _padded_keys(torch.cat([value.to(words.dtype), words], dim=-1)).flatten(0, 1)


@torch.library.custom_op("lavender::column_maps_torch", mutates_args=())
def _column_maps_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, word_weights: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Output and maps side by side, [B, H, Q, E + W]: an operation may not return two views of one tensor."""
    extended = _extended_values(value, word_weights)
    both = extended.new_empty(query.shape[0] * query.shape[1], query.shape[2], extended.shape[2])
    for s, i, _, probabilities in _Chunks(query, key, bias, scale, extended.dtype):
        torch.bmm(probabilities, extended[s], out=both[s, i])
    return both.unflatten(0, query.shape[:2])


@_column_maps_torch.register_fake
def _(query, key, value, word_weights, bias, scale):  # type: ignore[no-untyped-def]
    return word_weights.new_empty(*query.shape[:3], value.shape[3] + word_weights.shape[1])


@torch.library.custom_op("lavender::column_maps_torch_backward", mutates_args=())
def _column_maps_torch_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    word_weights: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    extended = _extended_values(value, word_weights)
    chunks = _Chunks(query, key, bias, scale, extended.dtype)
    gradient = gradient.flatten(0, 1)
    width = value.shape[3]
    query_gradient = torch.empty(chunks.query.shape, dtype=query.dtype, device=query.device)
    key_gradient = torch.zeros_like(chunks.scaled_key)
    value_gradient = extended.new_zeros(*extended.shape[:2], width)
    for s, i, queries, probabilities in chunks:
        wanted = torch.bmm(gradient[s, i], extended[s].mT)
        value_gradient[s] += torch.bmm(probabilities.mT, gradient[s, i, :width])
        scores_gradient = wanted.mul_(probabilities)
        delta = scores_gradient.sum(dim=-1, keepdim=True)
        scores_gradient.addcmul_(probabilities, delta, value=-1)
        query_gradient[s, i] = torch.bmm(scores_gradient, chunks.scaled_key[s])
        key_gradient[s] += torch.bmm(scores_gradient.mT, queries)
    heads, num_keys = query.shape[:2], key.shape[2]
    return (
        query_gradient.unflatten(0, heads),
        key_gradient[:, :num_keys].mul_(scale).to(key.dtype, copy=True).unflatten(0, heads),
        value_gradient[:, :num_keys].to(value.dtype, copy=True).unflatten(0, heads),
    )


@_column_maps_torch_backward.register_fake
def _(gradient, query, key, value, word_weights, bias, scale):  # type: ignore[no-untyped-def]
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


@once_differentiable
def _backward(ctx, gradient):  # type: ignore[no-untyped-def]
    with in_full_precision(gradient):
        return (*_column_maps_torch_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.scale), None, None, None)


_column_maps_torch.register_autograd(_backward, setup_context=_setup_context)
