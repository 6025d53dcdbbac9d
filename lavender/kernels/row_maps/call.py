"""One checked call of `row_maps`: the value that every implementation takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...types import WordRows
from ..numerics import accumulator, additive


@dataclass(frozen=True, eq=False)
class RowCall:
    """The tensors and numbers of one call.

    Attributes:
        query: [B, H, T, D].
        key: [B, G, N, D] of the same dtype; head h reads key head h // (H / G).
        rows: int64 [B, R], the words' query rows; -1 is padding.
        words: int64 [B, R], the word of each row; -1 is padding.
        weights: [B, R], each row's share of its word; zero at padding.
        columns: int64 [B, M], the keys that are kept; -1 is padding.
        num_words: W.
        bias: additive, broadcastable to [B, H, R, N], in the accumulator's dtype; None for no mask.
        causal: whether row i sees keys 0, ..., i only; not together with `bias`.
        scale: softmax scale.
        head_weights: [H] in the accumulator's dtype; None keeps the heads apart.
        lse: [B, H, R] in the accumulator's dtype, the natural log-sum-exp of each row's scores; None if it is not known.
    """

    query: torch.Tensor
    key: torch.Tensor
    rows: torch.Tensor
    words: torch.Tensor
    weights: torch.Tensor
    columns: torch.Tensor
    num_words: int
    bias: torch.Tensor | None
    causal: bool
    scale: float
    head_weights: torch.Tensor | None
    lse: torch.Tensor | None

    @property
    def num_channels(self) -> int:
        """C."""
        return self.query.shape[1] if self.head_weights is None else 1

    @property
    def maps_shape(self) -> tuple[int, int, int, int]:
        """B, C, W, M."""
        return self.query.shape[0], self.num_channels, self.num_words, self.columns.shape[1]

    def indicator(self) -> torch.Tensor:
        """The words' weights as a dense matrix [B, W, R] in the accumulator's dtype."""
        return WordRows(self.rows, self.words, self.weights, self.num_words).indicator(accumulator(self.query))

    def gather_rows(self) -> torch.Tensor:
        """The word rows of the query, [B, H, R, D] in the accumulator's dtype."""
        index = self.rows.clamp_min(0)[:, None, :, None].expand(-1, self.query.shape[1], -1, self.query.shape[3])
        return self.query.gather(2, index).to(accumulator(self.query))

    def visible_bias(self) -> torch.Tensor | None:
        """The bias; if the call is causal, [B, 1, R, N] that lets rows see the keys up to their own number."""
        if not self.causal:
            return self.bias
        keys = torch.arange(self.key.shape[2], device=self.key.device)
        return additive(keys <= self.rows.clamp_min(0)[:, None, :, None], accumulator(self.query))

    def spread(self, gradient: torch.Tensor) -> torch.Tensor:
        """A gradient of the maps [B, C, W, M] over every key, [B, C, W, N]: zero outside the columns."""
        gradient = gradient.masked_fill((self.columns < 0)[:, None, None], 0)
        spread = gradient.new_zeros(*gradient.shape[:3], self.key.shape[2])
        return spread.scatter_add_(3, self.columns.clamp_min(0)[:, None, None].expand_as(gradient), gradient)
