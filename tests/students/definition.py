"""What a patched student's maps and loss are by definition: computed from the probabilities that eager attention returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lavender.config import AlignmentConfig
from lavender.kernels.map_loss import map_loss
from lavender.students.aligner import Alignment
from lavender.students.boxes import grid_of, rasterize
from lavender.types import ROLES, WordBatch


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


def compared_rows(words: WordBatch, config: AlignmentConfig, b: int, w: int) -> list[list[tuple[int, float]]]:
    """The comparisons of one word: of each its rows with their shares, counted in the text."""
    role = "answer" if words.roles is None else ROLES[words.roles[b, w]]
    kind = (config.question_rows or config.rows) if role == "question" else config.rows
    own = words.token_words[b] == w
    tokens, shares = words.tokens[b][own].tolist(), words.token_weights[b][own].tolist()
    read = list(zip(tokens, shares, strict=True))
    predicted = [(token - 1, share) for token, share in read if token]
    if not read:
        return []
    if role == "prompt end" or kind == "reads":
        return [read]
    return {"predicts": [predicted], "both": [read, predicted], "last": [[(max(tokens), sum(shares))]]}[kind]


def compared_maps(
    weights: list[torch.Tensor], words: WordBatch, config: AlignmentConfig, *, first_row: int = 0, first_key: int = 0
) -> torch.Tensor:
    """Maps [2, B, L, H, W, M] in float64 of each word's first and second comparison: what its rows see of the image tokens.

    `first_row` and `first_key` are where the text begins in the attention's rows and keys.
    """
    stacked = torch.stack(weights, dim=1).double()
    maps = stacked.new_zeros(2, *stacked.shape[:3], words.present.shape[1], words.image_positions.shape[1])
    seen_by_rows = []
    for b in range(len(stacked)):
        placed = words.image_positions[b] >= 0
        for w in range(words.present.shape[1]):
            for place, rows in enumerate(compared_rows(words, config, b, w)):
                for row, share in rows:
                    seen = stacked[b, :, :, first_row + row][..., first_key + words.image_positions[b, placed]]
                    if config.renormalize:
                        seen = seen / seen.sum(dim=-1, keepdim=True).clamp_min(1e-30)
                    one = torch.zeros_like(maps)
                    one[place, b, :, :, w, placed] = share * seen
                    seen_by_rows.append(one)
    return maps + sum(seen_by_rows)


def word_maps(words: WordBatch, config: AlignmentConfig, compared: torch.Tensor) -> torch.Tensor:
    """The mean over each word's comparisons, [B, L, H, W, M]."""
    counts = [[max(1, len(compared_rows(words, config, b, w))) for w in range(compared.shape[4])] for b in range(compared.shape[1])]
    return compared.sum(0) / torch.tensor(counts)[:, None, None, :, None]


def alignment_loss(
    alignment: Alignment, compared: torch.Tensor, words: WordBatch, config: AlignmentConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over comparisons of matched words, by an aligner in float64, and the aligned maps [B, W, y, x].

    Layers' maps go through the aligner apart; chosen heads are the channels of one map.
    """
    assert words.boxes is not None
    assert words.targets is not None
    size = [min(side, config.max_grid) for side in grid_of(words.boxes)]
    placed = rasterize(compared.transpose(0, 1), words.boxes, (size[0], size[1])).transpose(0, 1) * (size[0] * size[1])
    losses, aligned = [placed.sum() * 0], placed.new_zeros(*words.present.shape, *size)
    for b, w in words.present.nonzero().tolist():
        asked = words.roles is not None and ROLES[words.roles[b, w]] == "question"
        heads = config.question_heads if asked and config.question_heads else config.heads
        comparisons = compared_rows(words, config, b, w)
        for place in range(len(comparisons)):
            maps = placed[place, b, :, :, w]
            if heads != "mean":
                maps = torch.stack([maps[tuple(map(int, item.split(".")))] for item in heads.split(",")])[None]
            one = alignment.aligner(maps).mean(0)
            aligned[b, w] += one.detach() / len(comparisons)
            target = words.targets[b, w].double()[None, None]
            present = torch.ones(1, 1, dtype=torch.bool)
            losses.append(map_loss(one[None, None], target, present, normalization=config.normalization, impl="reference"))
    return sum(losses) / max(1, len(losses) - 1), aligned
