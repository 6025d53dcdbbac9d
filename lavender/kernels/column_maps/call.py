"""One checked call of `column_maps` or `column_attention`: the value that every implementation takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ONE_PASS_KEYS = 128
"""The most keys of `triton`'s one-pass kernel."""


@dataclass(frozen=True, eq=False)
class ColumnCall:
    """The tensors and numbers of one call.

    Attributes:
        query: [B, H, Q, D].
        key: [B, H, N, D] of the same dtype.
        value: [B, H, N, E] of the same dtype; E is zero where maps alone are wanted.
        word_weights: [B, W, N] in the accumulator's dtype.
        bias: additive, broadcastable to [B, H, Q, N], in the accumulator's dtype; None for no mask.
        scale: softmax scale.
        head_weights: [H] in the accumulator's dtype; None keeps the heads apart.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    word_weights: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    head_weights: torch.Tensor | None

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """B, H, Q, E."""
        batch, heads, num_queries, _ = self.query.shape
        return batch, heads, num_queries, self.value.shape[3]

    @property
    def maps_shape(self) -> tuple[int, int, int, int]:
        """B, C, W, Q."""
        batch, heads, num_queries, _ = self.query.shape
        return batch, heads if self.head_weights is None else 1, self.word_weights.shape[1], num_queries
