"""Value types, and the shape legend of the package.

Legend: B samples, L layers, H query heads, G key-value heads, T query rows, N keys, D head width, R word rows, M image tokens
(the keys that show the picture), W words, C channels, Q queries of an image-side attention, y x height and width of a map.
A suffix like `maps_BWyx` on a tensor's name spells its axes. Maps are dimensionless; places in a picture are fractions of its
height and width, y pointing down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import CaptureError

Span = tuple[int, int]
"""Characters `[start, end)` of a text."""

Box = tuple[float, float, float, float]
"""`(top, left, bottom, right)` as fractions of the original picture, each in [0, 1]."""

WHOLE_PICTURE: Box = (0.0, 0.0, 1.0, 1.0)

OUTCOMES = ("matched", "no target", "no word matched", "cut off", "skipped")
"""What becomes of a training sample, by the numbers in `WordBatch.outcomes`."""

ROLES = ("question", "answer", "prompt end")
"""Where a word stands, by the numbers in `WordBatch.roles`: in what the user says, in what the assistant says, or the token before
what an answer says, behind its thinking, which is no word: it is read at its own row, which predicts the answer's first token, and
is the answer's otherwise."""


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

    def to(self, device: torch.device) -> WordRows:
        """The same on a device."""
        return WordRows(self.rows.to(device), self.words.to(device), self.weights.to(device), self.num_words)

    def indicator(self, dtype: torch.dtype) -> torch.Tensor:
        """The words' weights as a dense matrix [B, W, R]."""
        matrix = self.weights.new_zeros(self.rows.shape[0], self.num_words, self.rows.shape[1], dtype=dtype)
        valid = ((self.rows >= 0) & (self.words >= 0)).to(dtype)
        return matrix.scatter_(1, self.words.clamp_min(0)[:, None], (self.weights.to(dtype) * valid)[:, None])


@dataclass(frozen=True, eq=False)
class WordBatch:
    """The words and image tokens of a batch: what a collator adds to the model's inputs, and what a patched model reads.

    In the batch, a mapping, each field has the key that `KEYS` names; a field that is None has none.

    Attributes:
        tokens: int64 [B, R], positions of the words' tokens in the text; -1 is padding.
        token_words: int64 [B, R], the word in [0, W) that each token belongs to; -1 is padding.
        token_weights: float32 [B, R], each token's share of its word; 0 in the padding.
        image_positions: int64 [B, M], positions of the image tokens (keys of the cross-attention, if the model has one); -1 is
            padding.
        present: bool [B, W], the words that are compared.
        boxes: float32 [B, M, 4], the image tokens' places in fractions of the picture, NaN where there is none; through a
            resampler [B, K, 4], those of its K patches. Maps have no grid without them.
        outcomes: int64 [B], what became of each sample, as an index into `OUTCOMES`.
        targets: float32 [B, W, y, x], the teacher's maps. The loss is computed only with them.
        input_ids: int64 [B, T], the text that the positions are of. A forward over another text is refused.
        roles: int64 [B, W], where each word stands, as an index into `ROLES`; all are the answer's without it.
    """

    tokens: torch.Tensor
    token_words: torch.Tensor
    token_weights: torch.Tensor
    image_positions: torch.Tensor
    present: torch.Tensor
    boxes: torch.Tensor | None = None
    outcomes: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    input_ids: torch.Tensor | None = None
    roles: torch.Tensor | None = None

    KEYS: ClassVar[dict[str, str]] = {
        "tokens": "lavender_tokens",
        "token_words": "lavender_token_words",
        "token_weights": "lavender_token_weights",
        "image_positions": "lavender_columns",
        "present": "lavender_present",
        "boxes": "lavender_boxes",
        "outcomes": "lavender_outcomes",
        "targets": "lavender_targets",
        "input_ids": "lavender_input_ids",
        "roles": "lavender_roles",
    }
    """Field -> its key in a batch."""

    @classmethod
    def split(cls, batch: Mapping[str, Any]) -> tuple[dict[str, Any], WordBatch | None]:
        """A batch without lavender's keys, and what these hold; None if it has none of them.

        MiniCPM-V takes its inputs in one mapping: the keys may be in there. Raises `CaptureError` where some keys are missing.
        """
        fields = {key: field for field, key in cls.KEYS.items()}
        inputs: dict[str, Any] = {}
        values: dict[str, Any] = {}
        for name, value in batch.items():
            if name in fields:
                values[fields[name]] = value
            elif isinstance(value, Mapping) and not fields.keys().isdisjoint(value):
                values |= {fields[key]: inner for key, inner in value.items() if key in fields}
                inputs[name] = {key: inner for key, inner in value.items() if key not in fields}
            else:
                inputs[name] = value
        if not values:
            return inputs, None
        optional: tuple[str, ...] = () if values.get("targets") is not None else ("boxes",)
        optional += ("outcomes", "targets", "input_ids", "roles")
        missing = [key for field, key in cls.KEYS.items() if field not in (*values, *optional)]
        if missing:
            raise CaptureError(f"the batch lacks {', '.join(missing)}; make it with lavender.Collator")
        return inputs, cls(**values)

    def to(self, device: torch.device) -> WordBatch:
        """The same on a device."""
        present = {field: getattr(self, field) for field in self.KEYS if getattr(self, field) is not None}
        return replace(self, **{field: value.to(device) for field, value in present.items()})

    def to_batch(self) -> dict[str, Any]:
        """The fields that are not None, by their keys."""
        return {key: getattr(self, field) for field, key in self.KEYS.items() if getattr(self, field) is not None}
