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

from collections.abc import Iterator
from functools import partial

import torch
from torch.autograd.function import once_differentiable

from ...errors import ConfigError
from ...types import WordRows
from ..checks import in_full_precision, require_attention, require_head_weights, require_mask, require_places, require_tensors
from ..dispatch import able, choose, cuda_reasons, triton_reasons
from ..numerics import accumulator, additive, masked_softmax, masked_softmax_

BYTE_BUDGET = 3 * 2**20
"""Bytes that one chunk's probabilities may take in the `torch` implementation: about what a processor's caches hold."""

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
        ConfigError: shapes, dtypes or devices do not fit, something is empty, an index is out of range (this is looked at on
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
        return _row_maps(query, key, rows, columns, mask, causal, scale, renormalize, head_weights, lse, impl)


def _row_maps(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: WordRows,
    columns: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    renormalize: bool,
    head_weights: torch.Tensor | None,
    lse: torch.Tensor | None,
    impl: str,
) -> torch.Tensor:
    """`row_maps` for checked arguments: what the implementations share is done, and one of them called."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dtype = accumulator(query)
    index = rows.rows.clamp_min(0)
    if lse is not None:
        lse = lse.detach().gather(2, index[:, None].expand(-1, query.shape[1], -1)).to(dtype)
    if causal and renormalize:  # the columns are about to change places: let the mask go with them
        causal, mask = (
            False,
            torch.arange(key.shape[2], device=key.device) <= torch.arange(query.shape[2], device=key.device)[:, None],
        )
    bias = _bias_of_rows(mask, index, dtype)
    if renormalize:
        key, bias, columns = _columns_alone(key, bias, columns, dtype)
    if head_weights is not None:
        head_weights = head_weights.to(dtype)
    triton = partial(triton_reasons, query, query.shape[3], WIDEST_FLOAT32, impl == "triton")
    cuda = partial(cuda_reasons, "row_maps", query, query.shape[3], query.shape[0] * query.shape[1], impl == "cuda")
    chosen = choose("row_maps", impl, {"triton": triton, "cuda": cuda, "torch": able, "reference": able})
    if chosen == "reference":
        return row_maps_reference(query, key, rows, columns, bias, causal, scale, head_weights, lse)
    if chosen == "triton":
        from .triton_kernels import row_maps_triton

        return row_maps_triton(query, key, rows, columns, bias, causal, scale, head_weights, lse)
    if chosen == "cuda":
        from .cuda_launch import row_maps_cuda

        return row_maps_cuda(query, key, rows, columns, bias, causal, scale, head_weights, lse)
    if causal:
        bias = _causal_bias(index, key.shape[2], dtype)
    return _row_maps_torch(query, key, rows.rows, rows.indicator(dtype), columns, bias, scale, head_weights, lse)


def row_maps_reference(
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
    """The specification of `row_maps`, by plain differentiable operations.

    `bias` is additive, broadcastable to [B, H, R, N]; `lse` is [B, H, R] and only its value is used, not its gradient.
    """
    dtype = accumulator(query)
    if causal:
        bias = _causal_bias(rows.rows.clamp_min(0), key.shape[2], dtype)
    scores = scale * _gather_rows(query, rows.rows) @ key.to(dtype).repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT
    scores = scores if bias is None else scores + bias
    probabilities = masked_softmax(scores)
    if lse is not None:  # the softmax's gradient with the given normalizer's value
        given = (scores - lse[..., None]).exp().nan_to_num(0.0, posinf=0.0)
        probabilities = probabilities * (given / probabilities).detach().nan_to_num(0.0, posinf=0.0)
    column_index = columns.clamp_min(0)[:, None, None].expand(-1, *probabilities.shape[1:3], -1)
    kept = probabilities.gather(3, column_index) * (columns >= 0)[:, None, None].to(dtype)
    maps = rows.indicator(dtype).detach()[:, None] @ kept
    return maps if head_weights is None else torch.einsum("h,bhwm->bwm", head_weights, maps)[:, None]


def _bias_of_rows(mask: torch.Tensor | None, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The mask of the word rows alone, additive, [B or 1, H or 1, R or 1, N or 1]; None if there is none."""
    if mask is None:
        return None
    mask = mask.detach()[(None,) * (4 - mask.ndim)]
    if mask.shape[2] > 1:
        mask = mask.expand(len(index), -1, -1, -1)
        mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    return additive(mask, dtype)


def _causal_bias(index: torch.Tensor, num_keys: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, R, N]: rows see the keys up to their own number."""
    return additive(torch.arange(num_keys, device=index.device) <= index[:, None, :, None], dtype)


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


def _gather_rows(query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    index = rows.clamp_min(0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return query.gather(2, index).to(accumulator(query))


class _Chunks:
    """The word rows against all keys, some samples, key heads or rows at a time: what forward and backward share."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        rows: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        lse: torch.Tensor | None,
    ) -> None:
        self.rows = _gather_rows(query, rows).mul_(scale)
        self.key, self.bias, self.lse = key, bias, lse
        self.group = query.shape[1] // key.shape[1]

    def __iter__(self) -> Iterator[tuple[slice, slice, slice, slice, torch.Tensor]]:
        """Slices of samples, query heads, key heads and rows, and their probabilities [b, h, r, N] to be used up."""
        batch, _, num_rows, _ = self.rows.shape
        groups, num_keys = self.key.shape[1:3]
        fitting = max(1, BYTE_BUDGET // max(1, self.group * num_keys * self.rows.element_size()))
        row_step = min(num_rows, fitting)
        key_head_step = max(1, min(groups, fitting // num_rows))
        batch_step = max(1, fitting // (num_rows * groups))
        for b in _slices(batch, batch_step):
            for g in _slices(groups, key_head_step):
                h = slice(g.start * self.group, g.stop * self.group)
                for r in _slices(num_rows, row_step):
                    yield b, h, g, r, self._probabilities(b, h, g, r)

    def _probabilities(self, b: slice, h: slice, g: slice, r: slice) -> torch.Tensor:
        rows = self.rows[b, h, r]
        scores = product(rows, self.key[b, g].mT, self.group)
        bias = self.bias
        if bias is not None:
            bias = bias[
                tuple(whole if n == 1 else s for n, s, whole in zip(bias.shape[:3], (b, h, r), [slice(None)] * 3, strict=True))
            ]
        if self.lse is None:
            return masked_softmax_(scores, bias)
        scores = scores if bias is None else scores.add_(bias)
        lse = self.lse[b, h, r, None]
        return scores.sub_(lse.masked_fill(lse == -torch.inf, torch.inf)).exp_()


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def product(left: torch.Tensor, right: torch.Tensor, group: int) -> torch.Tensor:
    """[b, heads, r, X] @ [b, key heads, X, Y] in the left side's precision; the heads of a group are stacked as rows."""
    batch, heads, num_rows, width = left.shape
    stacked = left.reshape(batch, heads // group, group * num_rows, width)
    return (stacked @ right.to(left.dtype)).view(batch, heads, num_rows, right.shape[-1])


@torch.library.custom_op("lavender::row_maps_torch", mutates_args=())
def _row_maps_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    indicator: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    head_weights: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> torch.Tensor:
    # A sum over heads keeps every key until its end: columns are then chosen once.
    channels, places = (query.shape[1], columns.shape[1]) if head_weights is None else (1, key.shape[2])
    maps = indicator.new_zeros(query.shape[0], channels, indicator.shape[1], places)
    valid = (columns >= 0).to(maps.dtype)[:, None, None]
    index = columns.clamp_min(0)[:, None, None]
    for b, h, _, r, probabilities in _Chunks(query, key, rows, bias, scale, lse):
        shares = indicator[b, None, :, r]
        if head_weights is not None:
            shares = (shares * head_weights[h, None, None]).transpose(1, 2).flatten(2)
            maps[b, 0] += shares @ probabilities.flatten(1, 2)
        else:
            summed = shares @ probabilities
            maps[b, h] += summed.gather(3, index[b].expand(-1, *summed.shape[1:3], -1))
    if head_weights is not None:
        maps = maps.gather(3, index.expand(-1, *maps.shape[1:3], -1))
    return maps.mul_(valid)


@_row_maps_torch.register_fake
def _(query, key, rows, indicator, columns, bias, scale, head_weights, lse):  # type: ignore[no-untyped-def]
    channels = query.shape[1] if head_weights is None else 1
    return indicator.new_empty(query.shape[0], channels, indicator.shape[1], columns.shape[1])


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
    head_weights: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chunks = _Chunks(query, key, rows, bias, scale, lse)
    rows_gradient = torch.zeros_like(chunks.rows)
    key_gradient = torch.zeros(key.shape, dtype=rows_gradient.dtype, device=key.device)
    head_gradient = rows_gradient.new_zeros(query.shape[1])
    # G over every key, zero outside the columns.
    gradient = gradient * (columns >= 0)[:, None, None].to(gradient.dtype)
    full = gradient.new_zeros(*gradient.shape[:3], key.shape[2])
    full.scatter_add_(3, columns.clamp_min(0)[:, None, None].expand_as(gradient), gradient)
    for b, h, g, r, probabilities in chunks:
        wanted = indicator[b, None, :, r].mT @ full[b, h if head_weights is None else slice(None)]
        scores_gradient = probabilities * wanted
        # A pairwise sum: its terms nearly cancel, and a dot product would lose them.
        delta = scores_gradient.sum(dim=-1, keepdim=True)
        head_gradient[h] += delta.sum(dim=(0, 2, 3))
        scores_gradient.addcmul_(probabilities, delta, value=-1)
        if head_weights is not None:
            scores_gradient *= head_weights[h, None, None]
        rows_gradient[b, h, r] = product(scores_gradient, chunks.key[b, g], chunks.group)
        shape = (*chunks.key[b, g].shape[:2], -1)
        key_gradient[b, g] += scores_gradient.reshape(*shape, key.shape[2]).mT @ chunks.rows[b, h, r].reshape(*shape, key.shape[3])
    query_gradient = torch.zeros_like(query, dtype=rows_gradient.dtype)
    valid = (rows >= 0)[:, None, :, None].to(rows_gradient.dtype)
    row_index = rows.clamp_min(0)[:, None, :, None].expand_as(rows_gradient)
    query_gradient.scatter_add_(2, row_index, rows_gradient.mul_(valid * scale))
    return query_gradient.to(query.dtype), key_gradient.to(key.dtype), head_gradient


@_row_maps_torch_backward.register_fake
def _(gradient, query, key, rows, indicator, columns, bias, scale, head_weights, lse):  # type: ignore[no-untyped-def]
    return torch.empty_like(query), torch.empty(key.shape, dtype=key.dtype, device=key.device), gradient.new_empty(query.shape[1])


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.scale, head_weights, lse = inputs
    ctx.save_for_backward(*tensors, head_weights, lse)


@once_differentiable
def _backward(ctx, gradient):  # type: ignore[no-untyped-def]
    *tensors, head_weights, lse = ctx.saved_tensors
    arguments = (gradient.contiguous(), *tensors, ctx.scale, head_weights, lse)
    with in_full_precision(gradient):
        query_gradient, key_gradient, head_gradient = _row_maps_torch_backward(*arguments)
    return query_gradient, key_gradient, None, None, None, None, None, head_gradient if head_weights is not None else None, None


_row_maps_torch.register_autograd(_backward, setup_context=_setup_context)
