"""Where the objects of a picture lie and which words of its caption name them, read from a data set's masks or boxes.

`read_groundings` reads three formats and recognizes them by their content:

- JSON lines in lavender's own format, one per sample, with its id in the target store; `miniworld.write_dataset` writes them.

      {"id": "a.jpg", "objects": [{"boxes": [[top, left, bottom, right], ...]}, {"mask": "masks/a.png"}, {"rle": {...}}],
       "words": [{"start": 2, "end": 5, "object": 0}, ...]}

  Boxes are fractions of the picture. A mask is an image file beside the JSON lines, not black where the object is, and covers the
  whole picture; `rle` is a mask in COCO's run-length form. `start` and `end` are characters of the caption.
- COCO's instances, a JSON object with `images`, `annotations` and `categories`. An object is a category, all its instances
  together, because a word does not say which one it means: pointing at any of them counts. A segmentation is preferred to a box.
  Words name a category if they are its name or its simple plural (-s, -es, -ies; not "people"), whatever their case; all words
  of "traffic light" count, side by side.
- The folder of Flickr30k Entities, with `Sentences/<picture>.txt` and `Annotations/<picture>.xml`. An object is an entity with
  boxes; entities with the same boxes are one. The words of a phrase name its entity, function words left out. A sample's caption
  is the line with the same letters and digits: spaces differ, and a store does not keep the order of an image's captions.

COCO and Entities list pictures, not samples. A sample's picture is the one that its id names, with or without folders and the
number of a caption ("images/a.jpg#3"), for Entities also without the ending.
"""

from __future__ import annotations

import io
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from ..data.run_lengths import mask_of_runs
from ..data.run_lengths import run_lengths as run_lengths  # importable from here
from ..errors import DataError
from ..files import open_regular, parse_json
from ..images import load_image
from ..types import WHOLE_PICTURE, Box, Span
from ..words import FUNCTION_WORDS, words_of

RASTER = 64
"""Side of a region's raster, in cells: fine beside word maps, which have 8 to 64."""

_SLACK = 1e-3
"""How far a box in fractions may reach over the picture's border by rounding; pixels reach further."""


@dataclass(frozen=True, eq=False)
class Region:
    """A part of a picture: what lies in any of its boxes, polygons or masks.

    Attributes:
        boxes: as fractions of the picture.
        polygons: corners float64 [n, 2], each (y, x) as fractions of the picture; inside by the even-odd rule.
        masks: bool [y, x] over the whole picture.
    """

    boxes: tuple[Box, ...] = ()
    polygons: tuple[NDArray[np.float64], ...] = ()
    masks: tuple[NDArray[np.bool_], ...] = ()

    def raster(self, crop: Box = WHOLE_PICTURE) -> NDArray[np.bool_]:
        """Bool [RASTER, RASTER] over a box, which may reach over the picture's border: a cell is in if its center is."""
        top, left, bottom, right = crop
        centers = (np.arange(RASTER) + 0.5) / RASTER
        y, x = top + centers * (bottom - top), left + centers * (right - left)
        inside = np.zeros((RASTER, RASTER), bool)
        for upper, first, lower, last in self.boxes:
            inside |= ((upper <= y) & (y < lower))[:, None] & ((first <= x) & (x < last))
        for corners in self.polygons:
            inside |= _in_polygon(corners, y, x)
        for mask in self.masks:
            at_y, at_x = ((places * side).astype(int).clip(0, side - 1) for places, side in zip((y, x), mask.shape, strict=True))
            inside |= mask[at_y[:, None], at_x]
        return inside & ((y >= 0) & (y < 1))[:, None] & ((x >= 0) & (x < 1))


@dataclass(frozen=True)
class NamingWord:
    """Characters `[start, end)` of a caption that name an object, and the object's index."""

    start: int
    end: int
    object_index: int


@dataclass(frozen=True, eq=False)
class Grounding:
    """The objects of a sample's picture, and the words of its caption that name one."""

    objects: tuple[Region, ...]
    words: tuple[NamingWord, ...]


class Groundings(Protocol):
    """What a data set knows; `ids` are its names for samples or pictures."""

    @property
    def ids(self) -> Collection[str]: ...

    def of(self, sample_id: str, caption: str) -> Grounding | None:
        """The grounding of a sample, None if there is none. Raises `DataError` where it is damaged."""


def read_groundings(path: str | Path) -> Groundings:
    """Opens the masks or boxes of a data set; the module's text says which. Regions are read when they are asked for.

    Raises:
        DataError: there is nothing, or nothing of a known form, at `path`.
    """
    path = Path(path)
    if path.is_dir():
        return _Entities(path)
    if not path.is_file():
        raise DataError(f"there are no masks at {path}; expected JSON lines, COCO's instances or a folder of Flickr30k Entities")
    text = _read_text(path)
    try:
        whole = parse_json(text)
    except ValueError:
        whole = None
    if isinstance(whole, dict) and "annotations" in whole:
        return _Coco(path, whole)
    return _Lines(path, text)


class _Lines:
    """Our own JSON lines."""

    def __init__(self, path: Path, text: str) -> None:
        self._folder = path.parent
        self._entries: dict[str, tuple[str, dict[str, Any]]] = {}
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                entry = parse_json(line)
            except ValueError as error:
                raise DataError(f"{place} is no JSON ({getattr(error, 'msg', error)})") from None
            if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
                raise DataError(f'{place} is {_short(entry)}; expected an object with "id", "objects" and "words"')
            if entry["id"] in self._entries:
                raise DataError(f"{place}: the id {entry['id']!r} occurs twice; write one line a sample")
            self._entries[entry["id"]] = place, entry
        if not self._entries:
            raise DataError(f'{path} is empty; expected JSON lines with "id", "objects" and "words"')

    @property
    def ids(self) -> Collection[str]:
        return self._entries

    def of(self, sample_id: str, caption: str) -> Grounding | None:
        if sample_id not in self._entries:
            return None
        place, entry = self._entries[sample_id]
        objects = [
            self._read_region(region, f"{place}, object {n}")
            for n, region in enumerate(_require_list(entry.get("objects"), place, "objects"))
        ]
        words = []
        for word in _require_list(entry.get("words"), place, "words"):
            values: list[Any] = [word.get(key) for key in ("start", "end", "object")] if isinstance(word, dict) else []
            if not values or not all(isinstance(v, int) for v in values) or not 0 <= values[0] < values[1]:
                raise DataError(f'{place}: a word is {_short(word)}; expected whole numbers "start" < "end" and "object"')
            if not 0 <= values[2] < len(objects):
                raise DataError(f"{place}: a word names object {values[2]}; the line has {len(objects)} objects, counted from 0")
            words.append(NamingWord(*values))
        return Grounding(tuple(objects), tuple(words))

    def _read_region(self, entry: Any, place: str) -> Region:
        if not isinstance(entry, dict) or len(entry.keys() & {"boxes", "mask", "rle"}) != 1:
            raise DataError(f'{place} is {_short(entry)}; expected an object with "boxes", "mask" or "rle"')
        if "boxes" in entry:
            return Region(boxes=tuple(_read_box(box, place) for box in _require_list(entry["boxes"], place, "boxes")))
        if "rle" in entry:
            return Region(masks=(mask_of_runs(entry["rle"], place),))
        name = entry["mask"]
        if not isinstance(name, str) or "\0" in name or not (self._folder / name).resolve().is_relative_to(self._folder.resolve()):
            raise DataError(f"{place}: the mask is {_short(name)}; expected a path below {self._folder}")
        return Region(masks=(np.asarray(load_image(self._folder / name)).max(axis=2) > 0,))


class _Coco:
    """COCO's instances."""

    def __init__(self, path: Path, coco: Mapping[str, Any]) -> None:
        self._images: dict[str, dict[str, Any]] = {}
        self._annotations: dict[Any, list[tuple[str, dict[str, Any]]]] = {}
        self._categories: dict[tuple[str, ...], Any] = {}
        for place, image in _read_records(path, coco, "images", ("id", "file_name", "width", "height")):
            _require_numbers([image["width"], image["height"]], f"{place}: its size", above=0)
            self._images[str(image["file_name"])] = image
            self._annotations[image["id"]] = []
        categories = set()
        for _, category in _read_records(path, coco, "categories", ("id", "name")):
            categories.add(category["id"])
            for form in _inflect(str(category["name"])):
                self._categories.setdefault(form, category["id"])
        for place, annotation in _read_records(path, coco, "annotations", ("image_id", "category_id")):
            if annotation["image_id"] not in self._annotations or annotation["category_id"] not in categories:
                raise DataError(
                    f"{place} belongs to image {annotation['image_id']!r} and category {annotation['category_id']!r}; "
                    "the file does not have both"
                )
            self._annotations[annotation["image_id"]].append((place, annotation))
        self._by_name = dict(self._images)
        last_parts = Counter(PurePosixPath(name).name for name in self._images)
        for name, image in self._images.items():
            if last_parts[PurePosixPath(name).name] == 1:
                self._by_name.setdefault(PurePosixPath(name).name, image)

    @property
    def ids(self) -> Collection[str]:
        return self._images

    def of(self, sample_id: str, caption: str) -> Grounding | None:
        image = next((self._by_name[name] for name in _image_names(sample_id) if name in self._by_name), None)
        if image is None:
            return None
        instances = defaultdict(list)
        for place, annotation in self._annotations[image["id"]]:
            instances[annotation["category_id"]].append(_read_instance(place, annotation, image["height"], image["width"]))
        index_of = {category: index for index, category in enumerate(instances)}
        words = tuple(NamingWord(*span, index_of[c]) for span, c in self._categories_in(caption) if c in index_of)
        return Grounding(tuple(_unite(regions) for regions in instances.values()), words)

    def _categories_in(self, caption: str) -> list[tuple[Span, Any]]:
        """Words that name a category, in the picture or not: the "dog" of a "hot dog" is none."""
        words = words_of(caption)
        folded = [word.text.casefold() for word in words]
        beside = [not caption[a.end : b.start].strip() for a, b in pairwise(words)]
        longest = max(map(len, self._categories), default=0)
        categories: list[tuple[Span, Any]] = []
        at = 0
        while at < len(words):
            for length in range(longest, 0, -1):
                category = self._categories.get(tuple(folded[at : at + length]))
                if category is not None and at + length <= len(words) and all(beside[at : at + length - 1]):
                    categories += [((word.start, word.end), category) for word in words[at : at + length]]
                    break
            else:
                length = 1
            at += length
        return categories


def _read_records(path: Path, coco: Mapping[str, Any], name: str, keys: tuple[str, ...]) -> Iterable[tuple[str, dict[str, Any]]]:
    """The objects of one of COCO's lists, each with its place."""
    for number, record in enumerate(_require_list(coco.get(name), str(path), name), start=1):
        place = f"{path}, {name} {number}"
        if not isinstance(record, dict) or any(not isinstance(record.get(key), str | int | float) for key in keys):
            raise DataError(f"{place} is {_short(record)}; expected an object with {', '.join(keys)}")
        yield place, record


def _inflect(name: str) -> list[tuple[str, ...]]:
    """A category's name and its simple plurals, as words."""
    words = tuple(word.text.casefold() for word in words_of(name))
    if not words:
        return []
    *first, last = words
    plurals = [last + "s", last + "es"] + ([last[:-1] + "ies"] if last.endswith("y") else [])
    return [words, *((*first, plural) for plural in plurals)]


def _read_instance(place: str, annotation: Mapping[str, Any], height: float, width: float) -> Region:
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return Region(masks=(mask_of_runs(segmentation, place),))
    if segmentation:
        polygons = []
        for corners in _require_list(segmentation, place, "segmentation"):
            numbers = _require_numbers(corners, f"{place}: a polygon")
            if len(numbers) < 6 or len(numbers) % 2:
                raise DataError(f"{place}: a polygon has {len(numbers)} numbers; expected x and y of three or more corners")
            polygons.append(np.reshape(numbers, (-1, 2))[:, ::-1] / [height, width])
        return Region(polygons=tuple(polygons))
    left, top, wide, tall = _require_numbers(annotation.get("bbox"), f"{place}: its bbox", length=4)
    return Region(boxes=((top / height, left / width, (top + tall) / height, (left + wide) / width),))


def _unite(regions: Sequence[Region]) -> Region:
    return Region(
        tuple(box for region in regions for box in region.boxes),
        tuple(polygon for region in regions for polygon in region.polygons),
        tuple(mask for region in regions for mask in region.masks),
    )


class _Entities:
    """The folder of Flickr30k Entities."""

    _PHRASE = re.compile(r"\[/EN#(\d+)/\S+ ([^\[\]]*)\]")

    def __init__(self, root: Path) -> None:
        # By listing, for a sample's id is no path to open.
        self._sentences, self._annotations = (
            {file.stem: file for file in sorted((root / folder).glob(f"*.{ending}"))}
            for folder, ending in (("Sentences", "txt"), ("Annotations", "xml"))
        )
        if not self._sentences or not self._annotations:
            raise DataError(f"{root} is no folder of Flickr30k Entities; expected Sentences/*.txt and Annotations/*.xml in it")

    @property
    def ids(self) -> Collection[str]:
        return self._sentences

    def of(self, sample_id: str, caption: str) -> Grounding | None:
        stems = (stem for name in _image_names(sample_id) for stem in (name, PurePosixPath(name).stem))
        stem = next((stem for stem in stems if stem in self._sentences and stem in self._annotations), None)
        named = None if stem is None else self._entities_in(caption, self._sentences[stem])
        if stem is None or named is None:
            return None
        boxes_of = _read_entity_boxes(self._annotations[stem])
        regions = sorted(set(boxes_of.values()))
        words = tuple(NamingWord(*span, regions.index(boxes_of[entity])) for span, entity in named if entity in boxes_of)
        return Grounding(tuple(Region(boxes=boxes) for boxes in regions), words)

    def _entities_in(self, caption: str, file: Path) -> list[tuple[Span, str]] | None:
        """Words of a caption and the entities that they name; None if it is no caption of the file."""
        letters = _letters(caption)
        for number, line in enumerate(_read_text(file).split("\n"), start=1):
            owners: list[tuple[str, str | None]] = []  # letters of the line without markup, each with its entity
            end = 0
            for phrase in self._PHRASE.finditer(line):
                owners += [(letter, None) for letter, _ in _letters(line[end : phrase.start()])]
                owners += [(letter, phrase[1]) for letter, _ in _letters(phrase[2])]
                end = phrase.end()
            owners += [(letter, None) for letter, _ in _letters(line[end:])]
            if "[/EN#" in self._PHRASE.sub("", line):
                raise DataError(f"{file}, line {number} has a phrase that is not closed; expected [/EN#<number>/<kind> <words>]")
            if owners and [letter for letter, _ in owners] == [letter for letter, _ in letters]:
                entity_at = {place: entity for (_, place), (_, entity) in zip(letters, owners, strict=True)}
                content = [word for word in words_of(caption) if word.text.casefold() not in FUNCTION_WORDS]
                return [((w.start, w.end), entity) for w in content if (entity := entity_at[w.start]) is not None]
        return None


def _letters(text: str) -> list[tuple[str, int]]:
    """Letters and digits of a text without case, each with its place."""
    return [(character.lower(), place) for place, character in enumerate(text) if character.isalnum()]


def _read_entity_boxes(path: Path) -> dict[str, tuple[Box, ...]]:
    """Boxes of every entity of a picture that has some; pixels are counted from 1, and a box has both its ends."""
    text = _read_text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DataError(f"{path} declares a document type or entities, which annotations do not need; remove the declaration")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise DataError(f"{path} is no XML ({error})") from None

    def read_numbers(element: ElementTree.Element | None, names: tuple[str, ...], place: str, above: float | None) -> list[float]:
        texts = [None if element is None else element.findtext(name) for name in names]
        try:
            return _require_numbers([float(text or "") for text in texts], place, above=above)
        except ValueError:
            raise DataError(f"{place} is {texts}; expected numbers in {', '.join(names)}") from None

    width, height = read_numbers(root.find("size"), ("width", "height"), f"{path}: the size", 0)
    boxes: dict[str, list[Box]] = defaultdict(list)
    for number, thing in enumerate(root.iter("object"), start=1):
        box = thing.find("bndbox")
        if box is None:  # <nobndbox>, or <scene>: the whole picture
            continue
        place = f"{path}, object {number}"
        left, top, right, bottom = read_numbers(box, ("xmin", "ymin", "xmax", "ymax"), place, None)
        if right < left or bottom < top:
            raise DataError(f"{place} has a box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}), which is turned around")
        for name in thing.iter("name"):
            boxes[(name.text or "").strip()].append(((top - 1) / height, (left - 1) / width, bottom / height, right / width))
    return {entity: tuple(sorted(set(boxes_of_entity))) for entity, boxes_of_entity in boxes.items()}


def _in_polygon(corners: NDArray[np.float64], y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Bool [y, x]: whether a ray from the point to the right crosses the outline an odd number of times."""
    inside = np.zeros((len(y), len(x)), bool)
    for (y0, x0), (y1, x1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        crossed = (y0 <= y) != (y1 <= y)
        at = x0 + (y[crossed] - y0) / (y1 - y0) * (x1 - x0) if y0 != y1 else np.empty(0)
        inside[crossed] ^= x < at[:, None]
    return inside


def _image_names(sample_id: str) -> list[str]:
    """What the picture of a sample may be called, the likeliest first."""
    whole = re.sub(r"#\d+$", "", sample_id)
    return [sample_id, whole, PurePosixPath(whole).name]


def _read_box(value: Any, place: str) -> Box:
    top, left, bottom, right = _require_numbers(value, f"{place}: a box", length=4)
    if not (-_SLACK <= top <= bottom <= 1 + _SLACK and -_SLACK <= left <= right <= 1 + _SLACK):
        raise DataError(f"{place}: a box is {value}; expected top, left, bottom, right as fractions of the picture, 0 to 1")
    return top, left, bottom, right


def _require_numbers(value: Any, name: str, length: int | None = None, above: float | None = None) -> list[float]:
    sound = isinstance(value, list) and all(isinstance(v, int | float) and np.isfinite(v) for v in value)
    if not sound or (length is not None and len(value) != length):
        raise DataError(f"{name} is {_short(value)}; expected a list of {length or ''} numbers".replace("  ", " "))
    if above is not None and min(value) <= above:
        raise DataError(f"{name} is {_short(value)}; expected numbers above {above:g}")
    return [float(v) for v in value]


def _require_list(value: Any, place: str, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{place}: {name!r} is {_short(value)}; expected a list")
    return value


def _read_text(path: Path) -> str:
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from None


def _short(value: Any) -> str:
    return repr(value)[:80]
