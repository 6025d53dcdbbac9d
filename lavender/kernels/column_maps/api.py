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

import torch

from ...errors import ConfigError
from ..checks import in_full_precision, require_attention, require_head_weights, require_mask, require_tensors
from ..dispatch import able, choose, cuda_reasons, triton_reasons
from ..numerics import accumulator, additive
from .call import ONE_PASS_KEYS, ColumnCall
from .chunked import column_maps_chunked
from .reference import column_maps_reference

WIDEST_FLOAT32 = 64
"""The widest heads of `triton` in float32."""


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
        dtype = accumulator(query)
        call = ColumnCall(
            query=query,
            key=key,
            value=value,
            word_weights=word_weights.detach().to(dtype),
            bias=None if mask is None else additive(mask.detach()[(None,) * (4 - mask.ndim)], dtype),
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            head_weights=None if head_weights is None else head_weights.to(dtype),
        )
        return _run(call, impl)


def _run(call: ColumnCall, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, _, width = call.query.shape
    candidates = {
        "triton": lambda: [
            *triton_reasons(call.query, width, WIDEST_FLOAT32, impl == "triton"),
            *_width_reasons(call),
            *_key_reasons(call),
        ],
        "cuda": lambda: _width_reasons(call) or cuda_reasons("column_maps", call.query, width, batch * heads, impl == "cuda"),
        "torch": able,
        "reference": able,
    }
    chosen = choose("column_maps", impl, candidates)
    if chosen == "triton":
        from .triton_kernels import column_maps_triton

        return column_maps_triton(call)
    if chosen == "cuda":
        from .cuda_launch import column_maps_cuda

        return column_maps_cuda(call)
    return column_maps_chunked(call) if chosen == "torch" else column_maps_reference(call)


def _width_reasons(call: ColumnCall) -> list[str]:
    width, value_width = call.query.shape[3], call.value.shape[3]
    if value_width in (0, width):
        return []
    return [f"values are {value_width} wide and queries {width}; its kernels take equal widths"]


def _key_reasons(call: ColumnCall) -> list[str]:
    num_keys = call.key.shape[2]
    if call.value.shape[3] and num_keys > ONE_PASS_KEYS:
        return [f"there are {num_keys} keys; with more than {ONE_PASS_KEYS} it gives maps, but no attention output"]
    return []
