r"""Word maps of the rows orientation: words own query rows, the map runs over keys (a vision-language model's attention).

    P[b,h,i,n] = exp(scale * q[b,h,i].k[b,g(h),n] + mask - LSE[b,h,i])
    A[b,c,w,m] = sum over heads h of a[c,h] * sum over rows i of word w of weight[i] * P[b,h,i,columns[m]]

The softmax runs over every key that a row may see; only the chosen columns are kept. Heads are kept (C = H, a = 1) or summed by
`head_weights` (C = 1). Backward, with G = dLoss/dA and Ghat[i,n] = weight[i] G[w(i),n] (zero outside the columns):

    delta[h,i] = sum over n of P Ghat,    dS = a P (Ghat - delta),    dq = scale dS k,    dk = scale dS^T q,
    da[h] = sum over rows i of delta[h,i].

This is route R4 of a flash backward: it recomputes the word rows alone and never touches the model's own attention. Nothing of
size [B, H, T, N] exists. Implementations: `reference`; `torch`, chunked under a byte budget, any device; `triton`, compute
capability 8.0 and newer; `cuda`, float16, 7.0 and newer. Sums run in float32, or in float64 for float64 inputs. Results are the
same bits every time; of `torch` on CUDA only if no row belongs to three or more words (it adds their gradients in any order).
"""

from __future__ import annotations

import torch

from ...errors import ConfigError
from ...types import WordRows
from ..checks import in_full_precision, require_attention, require_head_weights, require_mask, require_places, require_tensors
from ..dispatch import able, choose, cuda_reasons, triton_reasons
from ..numerics import accumulator, additive
from .call import RowCall
from .chunked import row_maps_chunked
from .reference import row_maps_reference

WIDEST_FLOAT32 = 128
"""The widest heads of `triton` in float32."""


def row_maps(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: WordRows,
    columns: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    renormalize: bool = False,
    head_weights: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Maps of words over key columns, differentiable in `query`, `key` and `head_weights`.

    Args:
        query: [B, H, T, D], float16, bfloat16, float32 or float64.
        key: [B, G, N, D] of the same dtype; head h reads key head h // (H / G).
        rows: the words' query rows, indices in [0, T).
        columns: int64 [B, M], indices in [0, N) of the keys that show the picture, each once; -1 is padding and gives zeros.
        mask: bool (True may be seen) or additive float, broadcastable to [B, H, T, N]; None for no mask. It gets no gradient.
        causal: whether row i sees keys 0, ..., i only. Not together with `mask`.
        scale: softmax scale; D ** -0.5 when None.
        renormalize: whether the softmax runs over the columns alone.
        head_weights: floating point [H], what each head adds to one map per word; None keeps the heads apart.
        lse: [B, H, T], the natural log-sum-exp of each row's scaled and masked scores, if the model's attention gave it; it
            saves a pass. Gradients are those of the whole softmax all the same. Not together with `renormalize`.
        impl: `"auto"`, `"triton"`, `"cuda"`, `"torch"` or `"reference"`.

    Returns:
        [B, C, W, M], float32 (float64 for float64 inputs); C is H, or 1 with `head_weights`. Words without rows, and rows that
        may see nothing, give zeros.

    Raises:
        ConfigError: shapes, dtypes or devices do not fit, something is empty, an index is out of range (this is checked on
            the CPU alone), `causal` comes with `mask`, or `impl` is unknown or cannot run here.
    """
    require_tensors(query=query, key=key, rows=rows.rows, columns=columns, mask=mask, head_weights=head_weights, lse=lse)
    require_attention(query, key)
    if query.shape[1] % key.shape[1]:
        raise ConfigError(f"{query.shape[1]} query heads cannot share {key.shape[1]} key heads evenly")
    require_places(rows, columns, query, key)
    require_mask(mask, query, key)
    require_head_weights(head_weights, query.shape[1])
    if causal and mask is not None:
        raise ConfigError("causal=True comes with a mask; put causality into the mask")
    if lse is not None and renormalize:
        raise ConfigError("lse comes with renormalize=True; it belongs to a softmax over every key")
    if lse is not None and lse.shape != query.shape[:3]:
        raise ConfigError(f"lse is {tuple(lse.shape)}; expected [B, H, T], {tuple(query.shape[:3])}")
    with in_full_precision(query):
        dtype, index = accumulator(query), rows.rows.clamp_min(0)
        if causal and renormalize:  # the columns are about to change places: let the mask go with them
            causal = False
            mask = torch.arange(key.shape[2], device=key.device) <= torch.arange(query.shape[2], device=key.device)[:, None]
        bias = _bias_of_rows(mask, index, dtype)
        if renormalize:
            key, bias, columns = _columns_alone(key, bias, columns, dtype)
        call = RowCall(
            query=query,
            key=key,
            rows=rows.rows,
            words=rows.words,
            # Padding speaks for no word, whatever weight it was given.
            weights=rows.weights.detach().masked_fill((rows.rows < 0) | (rows.words < 0), 0),
            columns=columns,
            num_words=rows.num_words,
            bias=bias,
            causal=causal,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            head_weights=None if head_weights is None else head_weights.to(dtype),
            lse=None if lse is None else lse.detach().gather(2, index[:, None].expand(-1, query.shape[1], -1)).to(dtype),
        )
        return _run(call, impl)


def _run(call: RowCall, impl: str) -> torch.Tensor:
    batch, heads, _, width = call.query.shape
    candidates = {
        "triton": lambda: triton_reasons(call.query, width, WIDEST_FLOAT32, impl == "triton"),
        "cuda": lambda: cuda_reasons("row_maps", call.query, width, batch * heads, impl == "cuda"),
        "torch": able,
        "reference": able,
    }
    chosen = choose("row_maps", impl, candidates)
    if chosen == "triton":
        from .triton_kernels import row_maps_triton

        return row_maps_triton(call)
    if chosen == "cuda":
        from .cuda_launch import row_maps_cuda

        return row_maps_cuda(call)
    return row_maps_chunked(call) if chosen == "torch" else row_maps_reference(call)


def _bias_of_rows(mask: torch.Tensor | None, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The mask of the word rows alone, additive, [B or 1, H or 1, R or 1, N or 1]; None if there is none."""
    if mask is None:
        return None
    mask = mask.detach()[(None,) * (4 - mask.ndim)]
    if mask.shape[2] > 1:
        mask = mask.expand(len(index), -1, -1, -1)
        mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    return additive(mask, dtype)


def _columns_alone(
    key: torch.Tensor, bias: torch.Tensor | None, columns: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, bias and columns of a softmax over the columns alone; padded columns may not be seen."""
    valid, index = columns >= 0, columns.clamp_min(0)
    key = key.gather(2, index[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3]))
    seen = additive(valid, dtype)[:, None, None]
    if bias is not None:
        if bias.shape[3] > 1:
            bias = bias.expand(len(key), -1, -1, -1)
            bias = bias.gather(3, index[:, None, None].expand(-1, *bias.shape[1:3], -1))
        seen = bias + seen
    return key, seen, torch.where(valid, torch.arange(columns.shape[1], device=columns.device), -1)
