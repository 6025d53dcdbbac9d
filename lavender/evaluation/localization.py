"""How well word maps find their objects, and how well a student answers: on scenes whose masks are known exactly, and word maps
of any target store on whatever masks or boxes its pictures have.

Four measures of a word map A against the mask of the object that the word names:

- `pointing`: the hottest pixel lies inside the mask;
- `own_object` ("ref"): among the picture's objects, the word's own has the highest mean attention (pictures of two and more);
- `iou`: intersection over union of the mask with the pixels above half of the map's range;
- `auc`: the probability that a pixel of the mask is hotter than one outside it.

A map that merely finds objects, whatever the word, scores well on `auc`. So every figure stands beside two others: the
word-agnostic `control` (each word's map replaced by the mean map of all measured words of its caption) and `chance`.
Measured are a scene's color and shape words, or the words that a grounding names; maps are resampled to the masks' size
bilinearly first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from ..batches.collator import Collator
from ..config import AlignmentConfig, Rows
from ..data.samples import Sample
from ..errors import DataError
from ..miniworld.scenes import DESCRIBE, QUESTION_TYPES, Scene

if TYPE_CHECKING:
    from ..targets.store import TargetStore
    from ..teachers.model import Teacher
    from ..types import WordMaps
    from .grounding import Grounding, Groundings

MEASURED_KINDS = ("color", "shape")
COUNTS = (
    "samples",
    "samples_measured",
    "samples_without_grounding",
    "words_measured",
    "words_without_map",
    "words_not_measurable",
)
BATCH_SIZE = 50


@dataclass(frozen=True)
class Localization:
    """Means over `words` measured words, all in [0, 1]; `own_object` over those in pictures of two and more objects, or NaN."""

    pointing: float
    own_object: float
    iou: float
    auc: float
    words: int


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers, with its 95 % Wilson score interval `[low, high]`."""

    accuracy: float
    low: float
    high: float
    questions: int


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


def measured_words(masks: np.ndarray, maps: Iterable[tuple[np.ndarray | None, int]]) -> list[MeasuredWord]:
    """Words beside the masks [objects, y, x] of their picture, given by map [y, x] and object; those without a map are left out."""
    return [MeasuredWord(_resample(values, masks.shape[1:]), masks, index) for values, index in maps if values is not None]


def word_agnostic(words: Sequence[MeasuredWord]) -> list[MeasuredWord]:
    """The control: every word of one caption gets the mean map of them all."""
    mean = np.mean([w.values for w in words], axis=0) if words else None
    return [MeasuredWord(mean, w.masks, w.object_index) for w in words if mean is not None]


def localization(words: Iterable[MeasuredWord]) -> Localization:
    """Measures maps against masks. Raises `ValueError` when there is nothing to measure."""
    return _mean([_scores(word) for word in words])


def chance(words: Iterable[MeasuredWord]) -> Localization:
    """What a map of independent noise is expected to score (`iou`: against a random half of the pixels)."""
    return _mean([_expected(word) for word in words])


def compare(per_caption: Iterable[Sequence[MeasuredWord]]) -> dict[str, dict[str, float]]:
    """Maps, control and chance: `{"maps": ..., "control": ..., "chance": ...}`, each a `Localization` as a dict.

    Takes the captions one after another and keeps none, so that a large store needs no more memory than a small one.
    """
    scores: dict[str, list[_Scores]] = {"maps": [], "control": [], "chance": []}
    for words in per_caption:
        scores["maps"] += map(_scores, words)
        scores["control"] += map(_scores, word_agnostic(words))
        scores["chance"] += map(_expected, words)
    return {name: asdict(_mean(own)) for name, own in scores.items()}


def compare_targets(scenes: Sequence[Scene], maps: Sequence[Mapping[tuple[int, int], np.ndarray]]) -> dict[str, dict[str, float]]:
    """Localization of word maps given by span for each scene, beside control and chance."""
    return compare(
        measured_words(
            scene.masks, [(own.get((r.start, r.end)), r.object_index) for r in scene.referents if r.kind in MEASURED_KINDS]
        )
        for scene, own in zip(scenes, maps, strict=True)
    )


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
        for own_id in tqdm(store, desc="measured", unit="sample", disable=not progress):
            word_maps = store[own_id].word_maps
            grounding = groundings.of(own_id, word_maps.caption)
            counts["samples_without_grounding"] += grounding is None
            words = [] if grounding is None else _grounded_words(word_maps, grounding, counts)
            counts["samples_measured"] += bool(words)
            yield words
        if not counts["words_measured"]:
            raise DataError(
                "nothing to measure: {samples_without_grounding} of {samples} samples have no masks, {words_without_map} words no "
                "map, and {words_not_measurable} no object to find in it. ".format_map(counts)
                + f"The store's ids are {_some(store)}; those of the masks are {_some(groundings.ids)}"
            )

    return compare(per_caption()) | {"counts": {name: counts[name] for name in COUNTS}}


def _grounded_words(word_maps: WordMaps, grounding: Grounding, counts: Counter[str]) -> list[MeasuredWord]:
    by_span = {(w.start, w.end): m for w, m in zip(word_maps.words, word_maps.maps, strict=True) if not np.isnan(m).any()}
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


def _some(ids: Iterable[str]) -> str:
    first = [repr(own_id) for own_id in islice(ids, 4)]
    return ", ".join(first[:3] + ["..."] * (len(first) > 3))


def teacher_maps(teacher: Teacher, scenes: Iterable[Scene]) -> list[dict[tuple[int, int], np.ndarray]]:
    """A teacher's maps of its captions' words, by span, per scene."""
    found = []
    for chunk in _batches(scenes):
        for known in teacher.word_maps_of([scene.image for scene in chunk], [scene.caption for scene in chunk]):
            found.append({(w.start, w.end): m for w, m in zip(known.words, known.maps, strict=True)})
    return found


def student_maps(
    patch: Any, processor: Any, scenes: Sequence[Scene], rows: Rows = "predicts"
) -> tuple[list[dict[tuple[int, int], np.ndarray]], list[dict[tuple[int, int], np.ndarray]]]:
    """A patched student's maps of its captions' words: raw (mean over layers and heads) and aligned, by span, per scene.

    `rows` says which row of the attention speaks for a token. Without an aligner the aligned maps are the raw ones.
    """
    model = patch.model
    collator = Collator(processor, model_config=model.config)
    raw, aligned = [], []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for chunk in _batches(scenes):
            batch = collator([Sample(str(i), s.image, DESCRIBE, s.caption) for i, s in enumerate(chunk)])
            moved = {key: value.to(model.device) for key, value in batch.items()}
            captured = patch.capture(rows, **moved)
            plain = captured.mean(dim=(1, 2))
            learned = patch.align(**moved) if patch.trains else plain
            for b, scene in enumerate(chunk):
                spans = [(w.start, w.end) for w in Collator.words(scene.caption)]
                raw.append({span: plain[b, w].float().cpu().numpy() for w, span in enumerate(spans)})
                aligned.append({span: learned[b, w].float().cpu().numpy() for w, span in enumerate(spans)})
    model.train(was_training)
    return raw, aligned


def evaluate_attention(
    patch: Any, processor: Any, scenes: Sequence[Scene], rows: Rows = "predicts"
) -> dict[str, dict[str, dict[str, float]]]:
    """Localization of a patched student's raw and aligned maps: `{"raw": compare(...), "aligned": compare(...)}`."""
    raw, aligned = student_maps(patch, processor, scenes, rows)
    return {"raw": compare_targets(scenes, raw), "aligned": compare_targets(scenes, aligned)}


def evaluate_answers(model: Any, processor: Any, scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """Greedy answers to the scenes' questions: an `Accuracy` as a dict per question type, and for `"all"`."""
    asked = [(scene, question) for scene in scenes for question in scene.questions]
    right: dict[str, list[bool]] = {kind: [] for kind in QUESTION_TYPES}
    was_training = model.training
    model.eval()
    for chunk in _batches(asked):
        answers = generate(model, processor, [s.image for s, _ in chunk], [q.text for _, q in chunk], max_new_tokens=6)
        for (_, question), answer in zip(chunk, answers, strict=True):
            right[question.type].append(answer.strip().casefold() == question.answer)
    model.train(was_training)
    right["all"] = [hit for hits in right.values() for hit in hits]
    return {kind: asdict(accuracy(hits)) for kind, hits in right.items() if hits}


@torch.no_grad()
def generate(model: Any, processor: Any, images: Sequence[Any], questions: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy answers to one question per picture."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for question in questions
    ]
    batch = processor(
        images=list(images),
        text=texts,
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    ).to(model.device)
    written = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(hits: Sequence[bool]) -> Accuracy:
    """Share of hits with its 95 % Wilson score interval (Wilson 1927)."""
    n, z = len(hits), 1.959964
    share = sum(hits) / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Accuracy(round(share, 4), round(center - half, 4), round(center + half, 4), n)


def best_constant_error(targets: np.ndarray, normalization: str) -> float:
    """Alignment loss of the best single map for all words: what an aligner must beat to have learned anything.

    `targets` is [K, y, x]. The error's minimizer over one map that stays as it is (no second normalization) is the mean of the
    normalized targets; its error is a lower bound for every constant map.
    """
    from ..kernels.map_loss import normalize

    normalized = normalize(torch.from_numpy(targets).double(), normalization)
    return float((normalized - normalized.mean(dim=0)).square().mean())


def alignment_error(
    aligned: Sequence[Mapping[tuple[int, int], np.ndarray]],
    targets: Sequence[Mapping[tuple[int, int], np.ndarray]],
    config: AlignmentConfig,
) -> float:
    """Alignment loss of given maps against targets, mean over the words that both have."""
    from ..kernels.map_loss import map_loss

    errors = []
    for ours, theirs in zip(aligned, targets, strict=True):
        for span in ours.keys() & theirs.keys():
            target = torch.from_numpy(theirs[span]).float()[None, None]
            student = torch.from_numpy(ours[span]).float()[None, None]
            errors.append(float(map_loss(student, target, torch.ones(1, 1, dtype=torch.bool), normalization=config.normalization)))
    return float(np.mean(errors))


def _batches(items: Iterable[Any]) -> Iterable[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, BATCH_SIZE)):
        yield chunk


def _scores(word: MeasuredWord) -> _Scores:
    mask = word.masks[word.object_index]
    heat = [word.values[m].mean() for m in word.masks]
    # A tie is no find: a constant map must not win by the order of objects.
    own = all(heat[word.object_index] > h for i, h in enumerate(heat) if i != word.object_index)
    hot = word.values > (word.values.min() + word.values.max()) / 2
    return _Scores(
        pointing=float(mask.flat[int(word.values.argmax())]),
        own_object=float(own) if len(heat) > 1 else math.nan,
        iou=float((hot & mask).sum() / (hot | mask).sum()),
        auc=_auc(word.values, mask),
    )


def _expected(word: MeasuredWord) -> _Scores:
    share, several = float(word.masks[word.object_index].mean()), len(word.masks)
    return _Scores(share, 1 / several if several > 1 else math.nan, (share / 2) / (0.5 + share / 2), 0.5)


def _mean(scores: Sequence[_Scores]) -> Localization:
    if not scores:
        raise ValueError("no measured words: the captions name no objects, or no word has a map")
    columns = [[value for value in column if not math.isnan(value)] for column in zip(*scores, strict=True)]
    means = _Scores(*(round(float(np.mean(column)), 4) if column else math.nan for column in columns))
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
