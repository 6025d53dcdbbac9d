"""`row_maps` by matrix products of some rows at a time, under a byte budget, on any device (`impl="torch"`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..numerics import accumulator, masked_softmax_
from ..operation import register
from .call import RowCall

BYTE_BUDGET = 3 * 2**20
"""Bytes that one chunk's probabilities may take: about what a processor's caches hold."""


class _Chunks:
    """The word rows against all keys, some samples, key heads or rows at a time: what forward and backward share."""

    def __init__(self, call: RowCall) -> None:
        self.rows = call.gather_rows().mul_(call.scale)
        self.key, self.bias, self.lse = call.key, call.visible_bias(), call.lse
        self.group = call.query.shape[1] // call.key.shape[1]

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
        scores = _multiply(rows, self.key[b, g].mT, self.group)
        bias = self.bias
        if bias is not None:
            bias = bias[tuple(slice(None) if n == 1 else part for n, part in zip(bias.shape[:3], (b, h, r), strict=True))]
        if self.lse is None:
            return masked_softmax_(scores, bias)
        scores = scores if bias is None else scores.add_(bias)
        lse = self.lse[b, h, r, None]
        return scores.sub_(lse.masked_fill(lse == -torch.inf, torch.inf)).exp_()


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _multiply(left: torch.Tensor, right: torch.Tensor, group: int) -> torch.Tensor:
    """[b, heads, r, X] @ [b, key heads, X, Y] in the left side's precision; the heads of a group are stacked as rows."""
    batch, heads, num_rows, width = left.shape
    stacked = left.reshape(batch, heads // group, group * num_rows, width)
    return (stacked @ right.to(left.dtype)).view(batch, heads, num_rows, right.shape[-1])


def _forward(call: RowCall) -> torch.Tensor:
    # A sum over heads keeps every key until its end: columns are then chosen once.
    indicator, head_weights = call.indicator(), call.head_weights
    places = call.columns.shape[1] if head_weights is None else call.key.shape[2]
    maps = indicator.new_zeros(call.query.shape[0], call.num_channels, call.num_words, places)
    index = call.columns.clamp_min(0)[:, None, None]
    for b, h, _, r, probabilities in _Chunks(call):
        shares = indicator[b, None, :, r]
        if head_weights is not None:
            shares = (shares * head_weights[h, None, None]).transpose(1, 2).flatten(2)
            maps[b, 0] += shares @ probabilities.flatten(1, 2)
        else:
            summed = shares @ probabilities
            maps[b, h] += summed.gather(3, index[b].expand(-1, *summed.shape[1:3], -1))
    if head_weights is not None:
        maps = maps.gather(3, index.expand(-1, *maps.shape[1:3], -1))
    return maps.mul_((call.columns >= 0).to(maps.dtype)[:, None, None])


def _fake(call: RowCall) -> torch.Tensor:
    return call.query.new_empty(call.maps_shape, dtype=accumulator(call.query))


def _backward(call: RowCall, _: None, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chunks, indicator, head_weights = _Chunks(call), call.indicator(), call.head_weights
    rows_gradient = torch.zeros_like(chunks.rows)
    key_gradient = torch.zeros(call.key.shape, dtype=rows_gradient.dtype, device=call.key.device)
    head_gradient = rows_gradient.new_zeros(call.query.shape[1])
    gradient_over_keys = call.spread(gradient)
    for b, h, g, r, probabilities in chunks:
        wanted = indicator[b, None, :, r].mT @ gradient_over_keys[b, h if head_weights is None else slice(None)]
        scores_gradient = probabilities * wanted
        # A pairwise sum: its terms nearly cancel, and a dot product would lose them.
        delta = scores_gradient.sum(dim=-1, keepdim=True)
        head_gradient[h] += delta.sum(dim=(0, 2, 3))
        scores_gradient.addcmul_(probabilities, delta, value=-1)
        if head_weights is not None:
            scores_gradient *= head_weights[h, None, None]
        rows_gradient[b, h, r] = _multiply(scores_gradient, chunks.key[b, g], chunks.group)
        shape = (*chunks.key[b, g].shape[:2], -1)
        stacked = scores_gradient.reshape(*shape, call.key.shape[2])
        key_gradient[b, g] += stacked.mT @ chunks.rows[b, h, r].reshape(*shape, call.key.shape[3])
    query_gradient = torch.zeros(call.query.shape, dtype=rows_gradient.dtype, device=call.query.device)
    valid = (call.rows >= 0)[:, None, :, None].to(rows_gradient.dtype)
    row_index = call.rows.clamp_min(0)[:, None, :, None].expand_as(rows_gradient)
    query_gradient.scatter_add_(2, row_index, rows_gradient.mul_(valid * call.scale))
    return query_gradient.to(call.query.dtype), key_gradient.to(call.key.dtype), head_gradient


row_maps_chunked = register("row_maps_torch", RowCall, _forward, _fake, _backward, ("query", "key", "head_weights"), num_outputs=1)
