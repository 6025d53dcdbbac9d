"""`column_attention` by matrix products of some heads or queries at a time, under a byte budget, on any device (`impl="torch"`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.nn import functional as F

from ..numerics import masked_softmax_
from ..operation import register
from .call import ColumnCall

BYTE_BUDGET = 3 * 2**19
"""Bytes that one chunk's probabilities may take: about what a processor's caches hold."""

KEY_MULTIPLE = 8
"""What the number of keys is padded to: on a CPU a matrix product with 77 keys takes up to 1.5 times as long as one with 80, and
that is more than the maps cost."""


class _Chunks:
    """Some heads' queries against their keys, or a part of one head's queries: what forward and backward share."""

    def __init__(self, call: ColumnCall) -> None:
        self.num_keys, dtype, bias = call.key.shape[2], call.word_weights.dtype, call.bias
        self.query = call.query.flatten(0, 1)
        self.scaled_key = (_padded_keys(call.key).to(dtype) * call.scale).flatten(0, 1)
        if bias is not None:
            bias = _padded_keys(bias.mT, -torch.inf).mT if bias.shape[3] > 1 else bias
            bias = bias.expand(*call.query.shape[:2], *bias.shape[2:]).flatten(0, 1)
        self.bias = bias
        # Values with the words as extra columns, [B * H, padded N, E + W].
        words = call.word_weights.mT[:, None].expand(-1, call.value.shape[1], -1, -1)
        self.extended = _padded_keys(torch.cat([call.value.to(dtype), words], dim=-1)).flatten(0, 1)

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


def _forward(call: ColumnCall) -> torch.Tensor:
    """Output and maps side by side, [B, H, Q, E + W]: an operation may not return two views of one tensor."""
    chunks = _Chunks(call)
    both = chunks.extended.new_empty(*chunks.query.shape[:2], chunks.extended.shape[2])
    for s, i, _, probabilities in chunks:
        torch.bmm(probabilities, chunks.extended[s], out=both[s, i])
    return both.unflatten(0, call.query.shape[:2])


def _fake(call: ColumnCall) -> torch.Tensor:
    return call.word_weights.new_empty(*call.query.shape[:3], call.value.shape[3] + call.word_weights.shape[1])


def _backward(call: ColumnCall, _: None, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chunks, width = _Chunks(call), call.value.shape[3]
    gradient = gradient.flatten(0, 1)
    query_gradient = torch.empty(chunks.query.shape, dtype=call.query.dtype, device=call.query.device)
    key_gradient = torch.zeros_like(chunks.scaled_key)
    value_gradient = chunks.extended.new_zeros(*chunks.extended.shape[:2], width)
    for s, i, queries, probabilities in chunks:
        wanted = torch.bmm(gradient[s, i], chunks.extended[s].mT)
        value_gradient[s] += torch.bmm(probabilities.mT, gradient[s, i, :width])
        scores_gradient = wanted.mul_(probabilities)
        delta = scores_gradient.sum(dim=-1, keepdim=True)
        scores_gradient.addcmul_(probabilities, delta, value=-1)
        query_gradient[s, i] = torch.bmm(scores_gradient, chunks.scaled_key[s])
        key_gradient[s] += torch.bmm(scores_gradient.mT, queries)
    heads, num_keys = call.query.shape[:2], call.key.shape[2]
    return (
        query_gradient.unflatten(0, heads),
        key_gradient[:, :num_keys].mul_(call.scale).to(call.key.dtype, copy=True).unflatten(0, heads),
        value_gradient[:, :num_keys].to(call.value.dtype, copy=True).unflatten(0, heads),
    )


_operation = register("column_maps_torch", ColumnCall, _forward, _fake, _backward, ("query", "key", "value"), num_outputs=1)


def column_maps_chunked(call: ColumnCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, H, Q, E] and maps [B, C, W, Q]."""
    both = _operation(replace(call, head_weights=None))
    maps = both[..., call.value.shape[3] :].mT
    if call.head_weights is not None:
        # Not a matrix product: a head's gradient is a sum whose terms nearly cancel, and `sum` adds them pairwise.
        maps = (call.head_weights[:, None, None] * maps.mT).sum(dim=1, keepdim=True).mT
    return both[..., : call.value.shape[3]].to(call.query.dtype), maps
