"""How well word maps find their objects: the word maps of any store or model, on masks or boxes of the objects.

Four measures of a word map A against the mask of the object that the word names:

- `pointing`: the hottest pixel lies inside the mask;
- `own_object` ("ref"): among the picture's objects, the word's own has the highest mean attention (pictures of two and more);
- `iou`: intersection over union of the mask with the pixels above half of the map's range;
- `auc`: the probability that a pixel of the mask is hotter than one outside it.

A map that merely finds objects, whatever the word, scores well on `auc`. So every figure stands beside two others: the
word-agnostic `control` (each word's map replaced by the mean map of all measured words of its caption) and `chance`.
Maps are resampled to the masks' size bilinearly first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from ..errors import DataError
from ..types import Span, WordMaps
from .grounding import Grounding, Groundings

if TYPE_CHECKING:
    from ..targets.store import TargetStore

SpanMaps = Mapping[Span, np.ndarray]
"""A caption's word maps, each [y, x], by the characters of its word."""

COUNTS = ("samples", "samples_measured", "samples_without_grounding", "words_measured", "words_without_map", "words_not_measurable")
"""What `evaluate_maps` counts, in the order of its result."""


@dataclass(frozen=True)
class Localization:
    """Means over `words` measured words, all in [0, 1]; `own_object` over those in pictures of two and more objects, or NaN."""

    pointing: float
    own_object: float
    iou: float
    auc: float
    words: int


@dataclass(frozen=True, eq=False)
class MeasuredWord:
    """One word's map [y, x] beside what it is measured against."""

    values: np.ndarray
    masks: np.ndarray
    object_index: int


class _Scores(NamedTuple):
    """One word's part of a `Localization`; `own_object` is NaN in a picture of one object."""

    pointing: float
    own_object: float
    iou: float
    auc: float


def maps_by_span(word_maps: WordMaps) -> SpanMaps:
    """Maps by the characters of their words; words whose map has a NaN are left out."""
    return {(w.start, w.end): m for w, m in zip(word_maps.words, word_maps.maps, strict=True) if not np.isnan(m).any()}


def measured_words(masks: np.ndarray, maps: Iterable[tuple[np.ndarray | None, int]]) -> list[MeasuredWord]:
    """Words beside the masks [objects, y, x] of their picture, given by map [y, x] and object; those without a map are left out."""
    return [MeasuredWord(_resample(values, masks.shape[1:]), masks, index) for values, index in maps if values is not None]


def word_agnostic(words: Sequence[MeasuredWord]) -> list[MeasuredWord]:
    """The control: every word of one caption gets the mean map of them all."""
    mean = np.mean([w.values for w in words], axis=0) if words else None
    return [MeasuredWord(mean, w.masks, w.object_index) for w in words if mean is not None]


def localization(words: Iterable[MeasuredWord]) -> Localization:
    """Measures maps against masks. Raises `ValueError` when there is nothing to measure."""
    return _average([_score(word) for word in words])


def chance(words: Iterable[MeasuredWord]) -> Localization:
    """What a map of independent noise is expected to score (`iou`: against a random half of the pixels)."""
    return _average([_score_noise(word) for word in words])


def compare(per_caption: Iterable[Sequence[MeasuredWord]]) -> dict[str, dict[str, float]]:
    """Maps, control and chance: `{"maps": ..., "control": ..., "chance": ...}`, each a `Localization` as a dict.

    Takes the captions one after another and keeps none, so that a large store needs no more memory than a small one.
    """
    scores: dict[str, list[_Scores]] = {"maps": [], "control": [], "chance": []}
    for words in per_caption:
        scores["maps"] += map(_score, words)
        scores["control"] += map(_score, word_agnostic(words))
        scores["chance"] += map(_score_noise, words)
    return {name: asdict(_average(scores_of_words)) for name, scores_of_words in scores.items()}


def evaluate_maps(store: TargetStore, groundings: Groundings, progress: bool = True) -> dict[str, dict[str, float]]:
    """Localization of a store's word maps on the masks or boxes of its pictures, beside control and chance.

    Objects are seen as the maps see the picture: cut to the maps' crop, on a raster of `grounding.RASTER` cells a side.

    Args:
        store: word maps of any origin.
        groundings: see `lavender.evaluation.grounding.read_groundings`.
        progress: whether to show a progress bar.

    Returns:
        What `compare` does, and `"counts"`: `samples` of the store, of these `samples_measured` (with a measured word) and
        `samples_without_grounding`; of the words that name objects, `words_measured`, `words_without_map` (NaN, or no word of
        the store), and `words_not_measurable`, whose object has no cell of the raster, as if outside the crop, or all of them.

    Raises:
        DataError: there is nothing to measure, or a grounding is damaged.
    """
    counts = Counter(samples=len(store))

    def per_caption() -> Iterator[list[MeasuredWord]]:
        for sample_id in tqdm(store, desc="measured", unit="sample", disable=not progress):
            word_maps = store[sample_id].word_maps
            grounding = groundings.of(sample_id, word_maps.caption)
            counts["samples_without_grounding"] += grounding is None
            words = [] if grounding is None else _match_words(word_maps, grounding, counts)
            counts["samples_measured"] += bool(words)
            yield words
        if not counts["words_measured"]:
            raise DataError(
                "nothing to measure: {samples_without_grounding} of {samples} samples have no masks, {words_without_map} words no "
                "map, and {words_not_measurable} no object to find in it. ".format_map(counts)
                + f"The store's ids are {_list_some(store)}; those of the masks are {_list_some(groundings.ids)}"
            )

    return compare(per_caption()) | {"counts": {name: counts[name] for name in COUNTS}}


def _match_words(word_maps: WordMaps, grounding: Grounding, counts: Counter[str]) -> list[MeasuredWord]:
    """The words of a grounding that can be measured; all are added to `counts`."""
    by_span = maps_by_span(word_maps)
    rasters = [region.raster(word_maps.crop) for region in grounding.objects]
    seen = [index for index, raster in enumerate(rasters) if raster.any()]
    maps = []
    for word in grounding.words:
        values = by_span.get((word.start, word.end))
        if values is None:
            counts["words_without_map"] += 1
        elif word.object_index not in seen or rasters[word.object_index].all():
            counts["words_not_measurable"] += 1
        else:
            counts["words_measured"] += 1
            maps.append((values, seen.index(word.object_index)))
    return measured_words(np.stack([rasters[index] for index in seen]), maps) if maps else []


def _list_some(ids: Iterable[str]) -> str:
    first = [repr(sample_id) for sample_id in islice(ids, 4)]
    return ", ".join(first[:3] + ["..."] * (len(first) > 3))


def _score(word: MeasuredWord) -> _Scores:
    mask = word.masks[word.object_index]
    heat = [word.values[m].mean() for m in word.masks]
    # A tie does not count: a constant map must not win by the order of objects.
    is_hottest = all(heat[word.object_index] > h for i, h in enumerate(heat) if i != word.object_index)
    hot = word.values > (word.values.min() + word.values.max()) / 2
    return _Scores(
        pointing=float(mask.flat[int(word.values.argmax())]),
        own_object=float(is_hottest) if len(heat) > 1 else math.nan,
        iou=float((hot & mask).sum() / (hot | mask).sum()),
        auc=_auc(word.values, mask),
    )


def _score_noise(word: MeasuredWord) -> _Scores:
    share, several = float(word.masks[word.object_index].mean()), len(word.masks)
    return _Scores(share, 1 / several if several > 1 else math.nan, (share / 2) / (0.5 + share / 2), 0.5)


def _average(scores: Sequence[_Scores]) -> Localization:
    if not scores:
        raise ValueError("no measured words: the captions name no objects, or no word has a map")
    measures = [[value for value in values if not math.isnan(value)] for values in zip(*scores, strict=True)]
    means = _Scores(*(round(float(np.mean(values)), 4) if values else math.nan for values in measures))
    return Localization(*means, words=len(scores))


def _resample(values: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    tensor = torch.from_numpy(np.ascontiguousarray(values)).double()[None, None]
    return F.interpolate(tensor, size=tuple(size), mode="bilinear", align_corners=False)[0, 0].numpy()


def _auc(values: np.ndarray, mask: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half (Mann-Whitney)."""
    flat = values.ravel()
    _, inverse, counts = np.unique(flat, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    inside = mask.ravel()
    n, m = int(inside.sum()), int((~inside).sum())
    return float((ranks[inside].sum() - n * (n + 1) / 2) / (n * m))
