"""Where a span of a conversation lies in its picture, as a data set says it: by boxes, a mask, points, a map, or another word."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..types import ROLES, WHOLE_PICTURE, Box
from ..words import words_of
from .run_lengths import RunLengths

POINT_SIZE = 0.05
"""Standard deviation of the soft disc (a Gaussian) that a point is drawn as, in fractions of the picture's height and width."""
_SLACK = 1e-3
"""How far a box or a point may reach over the picture's border by rounding."""
_LEAST = 0.01
"""By how much of its highest value a region's map must differ within what is compared, to say where in it something lies."""
PLACES = ("map", "box", "boxes", "mask", "points", "word")
"""The fields of a region that say where it is; one of them is given."""
_NUMBERS = ("turn", "start", "end", "image")


@dataclass(frozen=True, eq=False)
class Region:
    """A span of what is said in a sample, and where it lies in the picture: `lavender.Collator` makes one word of it.

    Exactly one of `map`, `box`, `boxes`, `mask`, `points` and `word` says where.

    Attributes:
        turn: the number of the message, from 0, or from the end if it is negative. Of a `Sample` 0 is the question, 1 the answer.
        start, end: the characters `[start, end)` of the message's content; of a mapping's list of parts those of its texts joined.
            None for all that it says. Thinking is no part of it.
        role: `"prompt end"` for the token whose row predicts the first token of what the answer `turn` says, behind its thinking:
            with most templates the prompt's last; None for what is said.
        map: not negative [y, x], of any size and scale, over the whole picture.
        box, boxes: `(top, left, bottom, right)` in fractions of the picture; several of them together.
        mask: bool [y, x] over the whole picture, or COCO's run lengths, `{"size", "counts"}`, which stay `RunLengths`.
        points: (y, x) in fractions of the picture, or several of them; each is drawn as a soft disc of `POINT_SIZE`. Of a part of
            the picture those are drawn whose center lies in it.
        word: a word of the target's caption, or its characters `(start, end)` there: the place is the stored map. Of a word that
            repeats, the mean.
        image: which picture, from 0, in the order of the sample's images, or in which the messages hold them; None for the only
            one, or with `word`, which then is of whichever has targets.
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

    def target(self, size: int, crop: Box = WHOLE_PICTURE, shown: Box = WHOLE_PICTURE) -> NDArray[np.float32] | None:
        """Its raster over `crop`, divided by its maximum: neither the size of what it shows nor the scale of a map decides.

        None where it says nothing within `shown`, which is all of the crop that is compared: it lies outside, or is the same
        all over it, to a hundredth of its highest value in the picture.
        """
        part = (max(crop[0], shown[0]), max(crop[1], shown[1]), min(crop[2], shown[2]), min(crop[3], shown[3]))
        if part[0] >= part[2] or part[1] >= part[3]:
            return None
        raster = self._means(size, crop)
        within = raster if part == crop else self._means(size, part)
        highest = max(within.max(), self._means(size, WHOLE_PICTURE).max() if part != WHOLE_PICTURE else 0)
        if not within.max() - within.min() > _LEAST * highest:
            return None
        return (raster / raster.max()).astype(np.float32)

    def raster(self, size: int, crop: Box = WHOLE_PICTURE) -> NDArray[np.float32]:
        """The map [size, size] of a sound region over a part of the picture: each cell's mean. All zero where none of it is there.

        Masks and boxes give the share of a cell that they cover, maps their mean over it, points that of their discs.
        """
        return self._means(size, crop).astype(np.float32)

    def _means(self, size: int, crop: Box) -> NDArray[np.float64]:
        """`raster` in float64, in which the smallest box is more than nothing."""
        cells = [np.linspace(low, high, size + 1) for low, high in ((crop[0], crop[2]), (crop[1], crop[3]))]
        if self.points is not None:
            inside = [point for point in self.points if all(crop[i] <= point[i] <= crop[i + 2] for i in (0, 1))]
            discs = [[_disc_shares(cells[axis], point[axis]) for axis in (0, 1)] for point in inside]
            return sum((np.outer(*shares) for shares in discs), np.zeros((size, size)))
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
        return down @ values @ across.T

    def record(self) -> list[Any]:
        """What it says, in plain values: of a map and a mask their sizes and a hash."""
        return [_plain(getattr(self, field.name)) for field in fields(self)]


def has_places(regions: Any) -> bool:
    """Whether any of a sample's regions, sound or not, needs no target."""
    listed = regions if isinstance(regions, list | tuple) else []
    return any(isinstance(region, Region) and region.is_place for region in listed)


def record_of(regions: Any) -> list[Any]:
    """What a sample's regions say, in plain values, sound or not."""
    listed = regions if isinstance(regions, list | tuple) else [] if regions is None else [regions]
    return [region.record() if isinstance(region, Region) else str(region) for region in listed]


def regions_of(value: Any, name: str) -> tuple[Region, ...]:
    """A sample's regions, given as `Region`s or as mappings of their fields, in which None counts as missing.

    Raises `DataError`, which begins with `name`, for anything else, and for a place that is none.
    """
    if value is None:
        return ()
    plain = value.tolist() if isinstance(value, np.ndarray) and value.ndim else value  # a table's row
    if not isinstance(plain, list | tuple):
        raise DataError(f"{name}: its regions are a {type(value).__name__}; expected a list")
    return tuple(_region_of(entry, f"{name}, region {n}") for n, entry in enumerate(plain, start=1))


def _region_of(entry: Any, name: str) -> Region:
    if isinstance(entry, Mapping):
        held = {key: cell for key, value in entry.items() if (cell := _cell(value)) is not None}
        held |= {key: int(value) for key in _NUMBERS if isinstance(value := held.get(key), float) and value.is_integer()}
        unknown = sorted(map(str, held.keys() - {field.name for field in fields(Region)}))
        if unknown or "turn" not in held:
            raise DataError(
                f"{name} has {', '.join(map(str, held)) or 'nothing'}; expected turn, start and end for a part of the message, one "
                f"of {', '.join(PLACES)}, and maybe role and image"
            )
        entry = Region(**held)
    if not isinstance(entry, Region):
        raise DataError(f"{name} is a {type(entry).__name__}; expected a Region, or a mapping of its fields")
    for field in _NUMBERS:
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


def _cell(value: Any) -> Any:
    """What a cell of a table holds: a number may be an array of no axes, and what is missing NaN."""
    plain = value.tolist() if getattr(value, "ndim", None) == 0 else value
    return None if isinstance(plain, float) and math.isnan(plain) else plain


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _word(value: Any, name: str) -> str | tuple[int, int]:
    if isinstance(value, str):
        if [word.text for word in words_of(value)] != [value]:
            raise DataError(f"{name}: its word is {value!r}; expected one word of the target's caption, or its characters there")
        return value
    span = _items(value)
    if len(span) != 2 or not all(map(_is_whole, span)) or not 0 <= span[0] < span[1]:
        raise DataError(f"{name}: its word is {value!r:.80}; expected a word of the target's caption, or its (start, end) there")
    return int(span[0]), int(span[1])


def _numbers(value: Any, length: int) -> tuple[float, ...] | None:
    """So many finite numbers; None if it holds anything else."""
    plain = _items(value)
    if len(plain) != length or not all(isinstance(v, Real) and not isinstance(v, bool) and math.isfinite(v) for v in plain):
        return None
    return tuple(map(float, plain))


def _items(value: Any) -> list[Any]:
    """What a list, a tuple or an array holds; nothing for anything else."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    return [*plain] if isinstance(plain, list | tuple) else []


def _boxes(value: Any, name: str) -> tuple[Box, ...]:
    boxes = [_numbers(box, 4) for box in _items(value)]
    for box in boxes or [None]:
        if box is None or not all(-_SLACK <= box[i] < box[i + 2] <= 1 + _SLACK for i in (0, 1)):
            raise DataError(
                f"{name}: its boxes are {value!r:.80}; expected (top, left, bottom, right) in fractions of the picture, 0 to 1, "
                "with an area"
            )
    return tuple(boxes)  # type: ignore[arg-type]  # four numbers each


def _points(value: Any, name: str) -> tuple[tuple[float, float], ...]:
    single = _numbers(value, 2)
    points = [single] if single else [_numbers(point, 2) for point in _items(value)]
    for point in points or [None]:
        if point is None or not all(-_SLACK <= v <= 1 + _SLACK for v in point):
            raise DataError(f"{name}: its points are {value!r:.80}; expected (y, x) in fractions of the picture, 0 to 1")
    return tuple((min(max(y, 0.0), 1.0), min(max(x, 0.0), 1.0)) for y, x in points)  # type: ignore[misc]  # two numbers each


def _array(value: Any, what: str, name: str) -> NDArray[np.float64]:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.ndim != 2 or not array.size or not (array <= np.finfo(np.float32).max).all() or (array < 0).any():
        shape = f"of the shape {list(array.shape)}" if array.size else f"{value!r:.80}"
        raise DataError(f"{name}: its {what} is {shape}; expected [y, x] over the whole picture, finite and not negative")
    if not array.any():
        raise _nowhere(what, name)
    return array


def _nowhere(what: str, name: str) -> DataError:
    return DataError(f"{name}: its {what} is empty, it is nowhere in the picture; leave the region out")


def _mask(value: Any, name: str) -> NDArray[np.bool_] | RunLengths:
    if isinstance(value, RunLengths | Mapping):
        runs = value if isinstance(value, RunLengths) else RunLengths.of(value, name)
        if runs.is_empty():
            raise _nowhere("mask", name)
        return runs
    if isinstance(value, np.ndarray) and value.dtype == np.bool_ and value.ndim == 2 and value.any():
        return value
    array = _array(value, "mask", name)
    if not np.isin(array, (0, 1)).all():
        raise DataError(f"{name}: its mask has values other than 0 and 1; expected bools [y, x] (a map may have others)")
    return array.astype(bool)


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
    if isinstance(value, RunLengths):
        return value.record()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    array = np.asarray(value)
    return [list(array.shape), hashlib.sha256(array.astype(np.float64).tobytes()).hexdigest()]
