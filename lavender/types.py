"""Value types, and the shape legend of the package.

Legend: B samples, L layers, H query heads, G key-value heads, T query rows, N keys, D head width, R word rows, M columns (the
keys that show the picture), W words, C channels, Q queries of an image-side attention, y x height and width of a map.
A suffix like `maps_BWyx` on a tensor's name spells its axes. Maps are dimensionless; places in a picture are fractions of its
height and width, y pointing down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Span = tuple[int, int]
"""Characters `[start, end)` of a text."""

Box = tuple[float, float, float, float]
"""`(top, left, bottom, right)` as fractions of the original picture, each in [0, 1]."""

WHOLE_PICTURE: Box = (0.0, 0.0, 1.0, 1.0)

OUTCOMES = ("matched", "no target", "no word matched", "cut off")
"""What becomes of a training sample, by the numbers in a batch's `lavender_outcomes`."""


@dataclass(frozen=True)
class Word:
    """A word of a text: its letters as they stand there, and its characters `[start, end)`."""

    text: str
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class WordMaps:
    """Where each word of a caption lies in its picture: the hinge between whatever made the maps and whatever uses them.

    Attributes:
        caption: the text that `words` index.
        words: W words, in the order of the text.
        maps: float32 [W, y, x]. Rows of NaN where a word has no map (cut off by the text encoder's window).
        crop: the box of the original picture that the maps cover.
    """

    caption: str
    words: tuple[Word, ...]
    maps: NDArray[np.float32]
    crop: Box = WHOLE_PICTURE

    def __getitem__(self, word: str) -> NDArray[np.float32]:
        """Map [y, x] of the first occurrence of a word, whatever its case. Raises `KeyError` if the caption lacks it."""
        for known, values in zip(self.words, self.maps, strict=True):
            if known.text.casefold() == word.casefold():
                return values
        raise KeyError(f"no word {word!r} in the caption {self.caption!r}; its words: {[w.text for w in self.words]}")


@dataclass(frozen=True, eq=False)
class WordRows:
    """Which query rows speak for which words, padded over a batch.

    Attributes:
        rows: int64 [B, R], indices of query rows; -1 is padding.
        words: int64 [B, R], the word in [0, W) that each row belongs to; -1 is padding.
        weights: float32 [B, R], each row's share of its word; 0 in the padding. Shares of a word sum to one for a mean.
        num_words: W.
    """

    rows: torch.Tensor
    words: torch.Tensor
    weights: torch.Tensor
    num_words: int

    def indicator(self, dtype: torch.dtype) -> torch.Tensor:
        """The words' weights as a dense matrix [B, W, R]."""
        matrix = self.weights.new_zeros(self.rows.shape[0], self.num_words, self.rows.shape[1], dtype=dtype)
        valid = ((self.rows >= 0) & (self.words >= 0)).to(dtype)
        return matrix.scatter_(1, self.words.clamp_min(0)[:, None], (self.weights.to(dtype) * valid)[:, None])
