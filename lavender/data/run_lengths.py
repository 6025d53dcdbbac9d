"""Masks in COCO's run-length form."""

from __future__ import annotations

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


def mask_of_runs(value: Any, place: str) -> NDArray[np.bool_]:
    """The mask [y, x] of run lengths, compressed or not. Raises `DataError`, which begins with `place`, if they are none."""
    size = value.get("size") if isinstance(value, dict) else None
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise DataError(f'{place}: a run-length mask is {value!r:.80}; expected "size": [height, width] and "counts"')
    counts = value.get("counts")
    if isinstance(counts, str):
        counts = _unpack_runs(counts)
    pixels = size[0] * size[1]
    sound = isinstance(counts, list) and all(isinstance(count, int) and count >= 0 for count in counts)
    if not sound or sum(counts) != pixels or pixels > _MAX_PIXELS:
        raise DataError(f"{place}: the runs of a mask are {counts!r:.80}; expected counts that sum to {size[0]} x {size[1]} pixels")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size[1], size[0]).T


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
