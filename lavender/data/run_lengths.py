"""Masks in COCO's run-length form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

_MAX_PIXELS = 2**28
"""Limit of a mask in run-length form, which can claim any size in a few bytes."""


def run_lengths(mask: NDArray[np.bool_]) -> dict[str, list[int]]:
    """A mask [y, x] as COCO writes it: lengths of runs down the columns, the first of pixels outside."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff([0, *changes, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


@dataclass(frozen=True, eq=False)
class RunLengths:
    """A mask as its run lengths; `numpy.asarray` makes the mask, bool [y, x].

    Attributes:
        size: its height and width.
        counts: int64, lengths of runs down the columns, the first of pixels outside.
    """

    size: tuple[int, int]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, value: Any, place: str) -> RunLengths:
        """Of COCO's form, compressed or not. Raises `DataError`, which begins with `place`, if it is none."""
        size = _plain(value.get("size")) if isinstance(value, Mapping) else None
        if not isinstance(size, list) or len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise DataError(f'{place}: a run-length mask is {value!r:.80}; expected "size": [height, width] and "counts"')
        counts = _plain(value.get("counts"))
        if isinstance(counts, bytes):  # as pycocotools has them
            counts = counts.decode("ascii", errors="replace")
        if isinstance(counts, str):
            counts = _unpack_runs(counts)
        pixels = size[0] * size[1]
        sound = isinstance(counts, list) and all(isinstance(count, int) and count >= 0 for count in counts)
        if not sound or sum(counts) != pixels or pixels > _MAX_PIXELS:
            raise DataError(
                f"{place}: the runs of a mask are {counts!r:.80}; expected counts that sum to {size[0]} x {size[1]} pixels"
            )
        return cls((size[0], size[1]), np.array(counts, dtype=np.int64))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        flat = np.repeat(np.arange(len(self.counts)) % 2 == 1, self.counts)
        return flat.reshape(self.size[1], self.size[0]).T.astype(dtype or np.bool_, copy=False)

    def is_empty(self) -> bool:
        """Whether no pixel is inside."""
        return not self.counts[1::2].any()

    def record(self) -> dict[str, list[int]]:
        """Its plain form."""
        return {"size": [*self.size], "counts": self.counts.tolist()}


def mask_of_runs(value: Any, place: str) -> NDArray[np.bool_]:
    """The mask [y, x] of run lengths, compressed or not. Raises `DataError`, which begins with `place`, if they are none."""
    return np.asarray(RunLengths.of(value, place))


def _plain(value: Any) -> Any:
    """A list of what an array, a tensor or a tuple holds."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    return [*plain] if isinstance(plain, tuple) else plain


def _unpack_runs(packed: str) -> list[int]:
    """Runs from COCO's compressed text: five bits a character, the sixth says that more follow, from the fourth on differences."""
    counts: list[int] = []
    value = shift = 0
    for character in packed:
        bits = ord(character) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            value -= (bits & 0x10) << shift - 4  # the last character's highest bit is the sign
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    return counts
