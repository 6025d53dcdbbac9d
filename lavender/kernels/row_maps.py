r"""Word maps of the rows orientation: words own query rows, the map runs over keys (a vision-language model's attention).

    P[b,h,i,n] = exp(scale * q[b,h,i].k[b,g(h),n] + mask - LSE[b,h,i])
    A[b,h,w,m] = sum over rows i of word w of weight[i] * P[b,h,i,columns[m]]

The softmax runs over every key that a row may see; only the chosen columns are kept. Backward, with G = dLoss/dA and
Ghat[i,n] = sum over w of weight[i] G[w,n] (zero outside the columns):

    delta[i] = sum over n of P Ghat,    dS = P (Ghat - delta),    dq = scale dS k,    dk = scale dS^T q.

Nothing of size [B, H, T, N] exists: only word rows are ever multiplied with keys, and `torch` does that in chunks of heads that
respect a byte budget and recomputes them in the backward pass. Implementations: `reference`, `torch`. Sums run in float32, or
in float64 for float64 inputs.
"""

from __future__ import annotations

import torch

from ..errors import ConfigError
from ..types import WordRows
from .dispatch import able, choose
from .numerics import accumulator, additive, masked_softmax, masked_softmax_

BYTE_BUDGET = 64 * 2**20
"""Bytes that one chunk's probabilities may take in the `torch` implementation."""


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
    impl: str = "auto",
) -> torch.Tensor:
    """Per-head maps of words over key columns, differentiable in `query` and `key`.

    Args:
        query: [B, H, T, D], float16, bfloat16, float32 or float64.
        key: [B, G, N, D] of the same dtype; head h reads key head h // (H / G).
        rows: the words' query rows, indices in [0, T).
        columns: int64 [B, M], indices in [0, N) of the keys that show the picture; -1 is padding and gives zeros.
        mask: bool (True may be seen) or additive float, broadcastable to [B, H, T, N]; None for no mask.
        causal: whether row i sees keys 0, ..., i only. Not together with `mask`.
        scale: softmax scale; D ** -0.5 when None.
        renormalize: whether the softmax runs over the columns alone.
        impl: `"auto"`, `"torch"` or `"reference"`.

    Returns:
        [B, H, W, M], float32 (float64 for float64 inputs). Words without rows, and rows that may see nothing, give zeros.

    Raises:
        ConfigError: shapes or dtypes do not fit, `causal` comes with `mask`, or `impl` is unknown.
    """
    _validate(query, key, rows, columns, mask, causal)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    bias = _bias_of_rows(query, key, rows, mask, causal)
    if renormalize:
        valid = columns >= 0
        index = columns.clamp_min(0)
        key = key.gather(2, index[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3]))
        if bias is not None:
            bias = bias.expand(len(key), -1, -1, -1)
            bias = bias.gather(3, index[:, None, None].expand(-1, *bias.shape[1:3], -1))
        unseen = additive(valid, accumulator(query))[:, None, None]
        bias = unseen if bias is None else bias + unseen
        columns = torch.where(valid, torch.arange(columns.shape[1], device=columns.device), -1)
    chosen = choose("row_maps", impl, {"torch": able, "reference": able})
    if chosen == "reference":
        return row_maps_reference(query, key, rows, columns, bias, scale)
    return _row_maps_torch(query, key, rows.rows, rows.indicator(accumulator(query)), columns, bias, scale)


def row_maps_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: WordRows,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The specification of `row_maps`, by plain differentiable operations; `bias` is additive, [B or 1, H or 1, R, N]."""
    dtype = accumulator(query)
    groups = query.shape[1] // key.shape[1]
    index = rows.rows.clamp_min(0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    chosen = query.gather(2, index).to(dtype)
    scores = scale * chosen @ key.to(dtype).repeat_interleave(groups, dim=1).mT
    probabilities = masked_softmax(scores if bias is None else scores + bias)
    column_index = columns.clamp_min(0)[:, None, None].expand(-1, *probabilities.shape[1:3], -1)
    kept = probabilities.gather(3, column_index) * (columns >= 0)[:, None, None].to(dtype)
    return rows.indicator(dtype)[:, None] @ kept


def _validate(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: WordRows,
    columns: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
) -> None:
    if query.ndim != 4 or key.ndim != 4 or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ConfigError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} do not fit; expected [B, H, T, D] and [B, G, N, D]"
        )
    if query.shape[1] % key.shape[1]:
        raise ConfigError(f"{query.shape[1]} query heads cannot share {key.shape[1]} key heads evenly")
    if query.dtype != key.dtype or not query.is_floating_point():
        raise ConfigError(f"query is {query.dtype} and key {key.dtype}; expected one floating-point dtype for both")
    if rows.rows.shape[0] != query.shape[0] or columns.ndim != 2 or columns.shape[0] != query.shape[0]:
        raise ConfigError(
            f"rows {tuple(rows.rows.shape)} and columns {tuple(columns.shape)} do not fit {query.shape[0]} samples; "
            "expected [B, R] and [B, M]"
        )
    if causal and mask is not None:
        raise ConfigError("causal=True comes with a mask; put causality into the mask")


def _bias_of_rows(
    query: torch.Tensor, key: torch.Tensor, rows: WordRows, mask: torch.Tensor | None, causal: bool
) -> torch.Tensor | None:
    """The mask of the word rows alone, additive, [B or 1, H or 1, R, N]; None if there is none."""
    dtype = accumulator(query)
    index = rows.rows.clamp_min(0)
    if causal:
        visible = torch.arange(key.shape[2], device=query.device) <= index[:, None, :, None]
        return additive(visible, dtype)
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.ndim)]
    if mask.shape[2] > 1:
        mask = mask.expand(query.shape[0], -1, -1, -1)
        mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    return additive(mask, dtype)


def _heads_per_chunk(batch: int, num_rows: int, num_keys: int, group: int, itemsize: int) -> int:
    """How many query heads fit the byte budget, a multiple of the group that shares a key head."""
    fitting = BYTE_BUDGET // max(1, batch * num_rows * num_keys * itemsize)
    return max(group, fitting // group * group)


def _slice_heads(bias: torch.Tensor | None, start: int, stop: int) -> torch.Tensor | None:
    return bias if bias is None or bias.shape[1] == 1 else bias[:, start:stop]


class _Chunk:
    """Word rows of a few heads against all keys: the part that forward and backward share."""

    def __init__(
        self,
        query_rows: torch.Tensor,
        key: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        start: int,
        stop: int,
    ) -> None:
        group = query_rows.shape[1] // key.shape[1]
        self.rows = query_rows[:, start:stop]
        self.key = key[:, start // group : stop // group]
        self.group = group
        scores = self.product(self.rows, self.key.mT).mul_(scale)
        bias = _slice_heads(bias, start, stop)
        if bias is not None:
            scores += bias
        self.probabilities = masked_softmax_(scores)

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """[B, heads, R, X] @ [B, key heads, X, Y] in the accumulator's precision; heads of a group are stacked as rows."""
        batch, heads, num_rows, width = left.shape
        stacked = left.reshape(batch, heads // self.group, self.group * num_rows, width)
        return (stacked @ right.to(left.dtype)).view(batch, heads, num_rows, right.shape[-1])


def _gather_rows(query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    index = rows.clamp_min(0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return query.gather(2, index).to(accumulator(query))


@torch.library.custom_op("lavender::row_maps_torch", mutates_args=())
def _row_maps_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    indicator: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    query_rows = _gather_rows(query, rows)
    batch, heads, num_rows, _ = query_rows.shape
    maps = query_rows.new_empty(batch, heads, indicator.shape[1], columns.shape[1])
    index = columns.clamp_min(0)[:, None, None]
    valid = (columns >= 0)[:, None, None].to(maps.dtype)
    step = _heads_per_chunk(batch, num_rows, key.shape[2], heads // key.shape[1], maps.element_size())
    for start in range(0, heads, step):
        stop = min(start + step, heads)
        chunk = _Chunk(query_rows, key, bias, scale, start, stop)
        kept = chunk.probabilities.gather(3, index.expand(-1, stop - start, num_rows, -1))
        maps[:, start:stop] = (indicator[:, None] @ kept) * valid
    return maps


@_row_maps_torch.register_fake
def _(query, key, rows, indicator, columns, bias, scale):  # type: ignore[no-untyped-def]
    shape = (query.shape[0], query.shape[1], indicator.shape[1], columns.shape[1])
    return query.new_empty(shape, dtype=accumulator(query))


@torch.library.custom_op("lavender::row_maps_torch_backward", mutates_args=())
def _row_maps_torch_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    indicator: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    query_rows = _gather_rows(query, rows)
    batch, heads, num_rows, width = query_rows.shape
    group = heads // key.shape[1]
    query_gradient = torch.zeros(query.shape, dtype=query_rows.dtype, device=query.device)
    key_gradient = torch.empty(key.shape, dtype=query_rows.dtype, device=key.device)
    gradient = gradient * (columns >= 0)[:, None, None].to(gradient.dtype)
    index = columns.clamp_min(0)[:, None, None]
    row_index = rows.clamp_min(0)[:, None, :, None]
    step = _heads_per_chunk(batch, num_rows, key.shape[2], group, query_rows.element_size())
    for start in range(0, heads, step):
        stop = min(start + step, heads)
        chunk = _Chunk(query_rows, key, bias, scale, start, stop)
        column_index = index.expand(-1, stop - start, num_rows, -1)
        wanted = indicator.mT[:, None] @ gradient[:, start:stop]
        kept = chunk.probabilities.gather(3, column_index)
        delta = (kept * wanted).sum(dim=-1, keepdim=True)
        # dS = P (Ghat - delta), written over P: Ghat is zero outside the columns. Padded columns have zero gradient.
        scores_gradient = chunk.probabilities * -delta
        scores_gradient.scatter_add_(3, column_index, kept * wanted)
        rows_gradient = chunk.product(scores_gradient, chunk.key).mul_(scale)
        query_gradient[:, start:stop].scatter_add_(2, row_index.expand(-1, stop - start, -1, width), rows_gradient)
        stacked = (batch, (stop - start) // group, group * num_rows)
        key_rows = scores_gradient.reshape(*stacked, -1).mT @ chunk.rows.reshape(*stacked, width)
        key_gradient[:, start // group : stop // group] = key_rows.mul_(scale)
    return query_gradient.to(query.dtype), key_gradient.to(key.dtype)


@_row_maps_torch_backward.register_fake
def _(gradient, query, key, rows, indicator, columns, bias, scale):  # type: ignore[no-untyped-def]
    return torch.empty_like(query), torch.empty_like(key)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, rows, indicator, columns, bias, ctx.scale = inputs
    ctx.save_for_backward(query, key, rows, indicator, columns, bias)


def _backward(ctx, gradient):  # type: ignore[no-untyped-def]
    query_gradient, key_gradient = _row_maps_torch_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.scale)
    return query_gradient, key_gradient, None, None, None, None, None


_row_maps_torch.register_autograd(_backward, setup_context=_setup_context)
