"""What a patched student's maps and loss are by definition: computed from the probabilities that eager attention returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lavender.config import AlignmentConfig
from lavender.students.aligner import Alignment
from lavender.students.boxes import grid_of, rasterize
from lavender.types import WordBatch


@contextmanager
def attention_weights(model: nn.Module, attention_class: str) -> Iterator[list[torch.Tensor]]:
    """Within, what the eager attention modules of a class return: [B, H, T, N] of each, in order, with its graph."""
    weights: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        weights.append(output[1])

    handles = [m.register_forward_hook(keep) for m in model.modules() if type(m).__name__ == attention_class]
    try:
        yield weights
    finally:
        for handle in handles:
            handle.remove()


def word_maps(
    weights: list[torch.Tensor], words: WordBatch, config: AlignmentConfig, *, first_row: int = 0, first_key: int = 0
) -> torch.Tensor:
    """Maps [B, L, H, W, M] in float64: the mean over a word's tokens of what the row of each sees of the image tokens.

    `first_row` and `first_key` are where the text begins in the attention's rows and keys.
    """
    first_row -= config.rows == "predicts"
    stacked = torch.stack(weights, dim=1).double()
    maps = stacked.new_zeros(*stacked.shape[:3], words.present.shape[1], words.image_positions.shape[1])
    rows = []
    for b, (tokens, of_words, shares) in enumerate(zip(words.tokens, words.token_words, words.token_weights, strict=True)):
        placed = words.image_positions[b] >= 0
        for token, word, share in zip(tokens.tolist(), of_words.tolist(), shares.tolist(), strict=True):
            if word < 0:
                continue
            seen = stacked[b, :, :, first_row + token][..., first_key + words.image_positions[b, placed]]
            if config.renormalize:
                seen = seen / seen.sum(dim=-1, keepdim=True).clamp_min(1e-30)
            row = torch.zeros_like(maps)
            row[b, :, :, word, placed] = share * seen
            rows.append(row)
    return maps + sum(rows)


def alignment_loss(
    alignment: Alignment, maps: torch.Tensor, words: WordBatch, config: AlignmentConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over matched words, by an aligner in float64, and the aligned maps [B, W, y, x]."""
    assert words.boxes is not None
    assert words.targets is not None
    boxes = words.boxes
    size = tuple(min(side, config.max_grid) for side in grid_of(boxes))
    per_word, aligned = alignment(
        maps,
        lambda values: rasterize(values, boxes, size),
        words.targets.double(),
        words.present,  # type: ignore[arg-type]
    )
    assert per_word is not None
    return per_word.sum() / words.present.sum().clamp_min(1), aligned
