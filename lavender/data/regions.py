"""Where a span of a conversation lies in its picture, as a data set says it: by boxes, a mask, points, a map, or another word."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..types import ROLES, WHOLE_PICTURE, Box
from ..words import words_of
from .run_lengths import mask_of_runs

POINT_SIZE = 0.05
"""Standard deviation of the soft disc (a Gaussian) that a point is drawn as, in fractions of the picture's height and width."""
_SLACK = 1e-3
"""How far a box or a point may reach over the picture's border by rounding."""
PLACES = ("map", "box", "boxes", "mask", "points", "word")
"""The fields of a region that say where it is; one of them is given."""


@dataclass(frozen=True, eq=False)
class Region:
    """A span of what is said in a sample, and where it lies in the picture: `lavender.Collator` makes one word of it.

    Exactly one of `map`, `box`, `boxes`, `mask`, `points` and `word` says where.

    Attributes:
        turn: the number of the message, from 0, or from the end if it is negative. Of a `Sample` 0 is the question, 1 the answer.
        start, end: the characters `[start, end)` of the message's content, or of its texts joined if it comes in parts; None for
            all that it says. Thinking is no part of it.
        role: `"prompt end"` for the last token before the answer `turn` instead, which is the first thing that an answer is made
            of; None for what is said.
        map: not negative [y, x], of any size, over the whole picture.
        box, boxes: `(top, left, bottom, right)` in fractions of the picture; several of them together.
        mask: bool [y, x] over the whole picture, or COCO's run lengths, `{"size", "counts"}`.
        points: (y, x) in fractions of the picture, or several of them; each is drawn as a soft disc of `POINT_SIZE`.
        word: a word of the target's caption, or its characters `(start, end)` there: the place is the stored map. Of a word that
            repeats, the mean.
        image: which picture, from 0, in the order in which they stand in the conversation; None for the only one, or with
            `word`.
    """

    turn: int
    start: int | None = None
    end: int | None = None
    role: str | None = None
    map: Any = None
    box: Any = None
    boxes: Any = None
    mask: Any = None
    points: Any = None
    word: Any = None
    image: int | None = None

    @property
    def is_place(self) -> bool:
        """Whether it says itself where it is, and needs no target."""
        return self.word is None

    def raster(self, size: int, crop: Box = WHOLE_PICTURE) -> NDArray[np.float32]:
        """The map [size, size] of a sound region over a part of the picture: each cell's mean. All zero where none of it is there.

        Masks and boxes give the share of a cell that they cover, maps their mean over it, points that of their discs.
        """
        cells = [np.linspace(low, high, size + 1) for low, high in ((crop[0], crop[2]), (crop[1], crop[3]))]
        if self.points is not None:
            discs = [[_disc_shares(cells[axis], point[axis]) for axis in (0, 1)] for point in self.points]
            return np.sum([np.outer(*shares) for shares in discs], axis=0).astype(np.float32)
        if self.boxes is not None:
            edges = [np.unique([box[side] for box in self.boxes for side in sides]) for sides in ((0, 2), (1, 3))]
            values = np.zeros([max(len(axis) - 1, 0) for axis in edges])
            for box in self.boxes:
                rows, columns = (slice(*np.searchsorted(edges[axis], [box[axis], box[axis + 2]])) for axis in (0, 1))
                values[rows, columns] = 1
        else:
            values = np.asarray(self.map if self.mask is None else self.mask, dtype=np.float64)
            edges = [np.linspace(0, 1, side + 1) for side in values.shape]
        down, across = (_shares(*pair) for pair in zip(cells, edges, strict=True))
        return (down @ values @ across.T).astype(np.float32)

    def record(self) -> list[Any]:
        """What it says, in plain values: of a map and a mask their sizes and a hash."""
        return [_plain(getattr(self, field.name)) for field in fields(self)]


def regions_of(value: Any, name: str) -> tuple[Region, ...]:
    """A sample's regions, given as `Region`s or as mappings of their fields, in which None counts as missing.

    Raises `DataError`, which begins with `name`, for anything else, and for a place that is none.
    """
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise DataError(f"{name}: its regions are a {type(value).__name__}; expected a list")
    return tuple(_region_of(entry, f"{name}, region {n}") for n, entry in enumerate(value, start=1))


def _region_of(entry: Any, name: str) -> Region:
    if isinstance(entry, Mapping):
        held = {key: value for key, value in entry.items() if value is not None}
        unknown = sorted(map(str, held.keys() - {field.name for field in fields(Region)}))
        if unknown or "turn" not in held:
            raise DataError(
                f"{name} has {', '.join(map(str, held)) or 'nothing'}; expected turn, start and end for a part of the message, one "
                f"of {', '.join(PLACES)}, and maybe role and image"
            )
        entry = Region(**held)
    if not isinstance(entry, Region):
        raise DataError(f"{name} is a {type(entry).__name__}; expected a Region, or a mapping of its fields")
    for field in ("turn", "start", "end", "image"):
        number = getattr(entry, field)
        if not (_is_whole(number) or (number is None and field != "turn")):
            raise DataError(f"{name}: its {field} is {number!r}; expected a whole number")
    if entry.role not in (None, *ROLES):
        raise DataError(f"{name}: its role is {entry.role!r}; expected 'prompt end', or None for what is said")
    given = [place for place in PLACES if getattr(entry, place) is not None]
    if len(given) != 1:
        raise DataError(f"{name} has {' and '.join(given) or 'no place'}; give exactly one of {', '.join(PLACES)}")
    kind = given[0]
    value = getattr(entry, kind)
    if kind == "word":
        return replace(entry, word=_word(value, name))
    if kind in ("box", "boxes"):
        return replace(entry, box=None, boxes=_boxes([value] if kind == "box" else value, name))
    if kind == "points":
        return replace(entry, points=_points(value, name))
    return replace(entry, mask=_mask(value, name)) if kind == "mask" else replace(entry, map=_array(value, "map", name))


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _word(value: Any, name: str) -> str | tuple[int, int]:
    if isinstance(value, str):
        if [word.text for word in words_of(value)] != [value]:
            raise DataError(f"{name}: its word is {value!r}; expected one word of the target's caption, or its characters there")
        return value
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(map(_is_whole, value)) or not 0 <= value[0] < value[1]:
        raise DataError(f"{name}: its word is {value!r:.80}; expected a word of the target's caption, or its (start, end) there")
    return int(value[0]), int(value[1])


def _numbers(value: Any, length: int) -> tuple[float, ...] | None:
    """So many finite numbers; None if it holds anything else."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    sound = isinstance(plain, list | tuple) and len(plain) == length
    if not sound or not all(isinstance(v, Real) and not isinstance(v, bool) and math.isfinite(v) for v in plain):
        return None
    return tuple(map(float, plain))


def _boxes(value: Any, name: str) -> tuple[Box, ...]:
    boxes = [_numbers(box, 4) for box in value] if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) else []
    for box in boxes or [None]:
        if box is None or not all(-_SLACK <= box[i] < box[i + 2] <= 1 + _SLACK for i in (0, 1)):
            raise DataError(
                f"{name}: its boxes are {value!r:.80}; expected (top, left, bottom, right) in fractions of the picture, 0 to 1, "
                "with an area"
            )
    return tuple(boxes)  # type: ignore[arg-type]  # four numbers each


def _points(value: Any, name: str) -> tuple[tuple[float, float], ...]:
    single = _numbers(value, 2)
    points = [single] if single else [_numbers(p, 2) for p in value] if isinstance(value, Sequence | np.ndarray) else []
    for point in points or [None]:
        if point is None or not all(-_SLACK <= v <= 1 + _SLACK for v in point):
            raise DataError(f"{name}: its points are {value!r:.80}; expected (y, x) in fractions of the picture, 0 to 1")
    return tuple(points)  # type: ignore[arg-type]  # two numbers each


def _array(value: Any, what: str, name: str) -> NDArray[np.float64]:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.ndim != 2 or not array.size or not np.isfinite(array).all() or (array < 0).any():
        shape = f"of the shape {list(array.shape)}" if array.size else f"{value!r:.80}"
        raise DataError(f"{name}: its {what} is {shape}; expected [y, x] over the whole picture, finite and not negative")
    if not array.any():
        raise DataError(f"{name}: its {what} is empty, it is nowhere in the picture; leave the region out")
    return array


def _mask(value: Any, name: str) -> NDArray[np.bool_]:
    array = _array(mask_of_runs(_lists_in(value), name) if isinstance(value, Mapping) else value, "mask", name)
    if not np.isin(array, (0, 1)).all():
        raise DataError(f"{name}: its mask has values other than 0 and 1; expected bools [y, x] (a map may have others)")
    return array.astype(bool)


def _lists_in(runs: Mapping[str, Any]) -> dict[str, Any]:
    """Run lengths whose numbers lie in arrays or tuples, as tables have them, in lists."""
    return {key: value if isinstance(value, str) else np.asarray(value).tolist() for key, value in runs.items()}


def _shares(cells: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share [cells, segments] of each cell that lies in each segment between two edges."""
    low, high = np.maximum(cells[:-1, None], edges[None, :-1]), np.minimum(cells[1:, None], edges[None, 1:])
    return (high - low).clip(min=0) / (cells[1:] - cells[:-1])[:, None]


def _disc_shares(cells: NDArray[np.float64], center: float) -> NDArray[np.float64]:
    """The mean of a disc's profile over each cell."""
    area = POINT_SIZE * math.sqrt(math.pi / 2)
    integrals = np.array([area * math.erf((edge - center) / (POINT_SIZE * math.sqrt(2))) for edge in cells])
    return np.diff(integrals) / np.diff(cells)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    array = np.asarray(value)
    return [list(array.shape), hashlib.sha256(array.astype(np.float64).tobytes()).hexdigest()]
