"""How well word maps find their objects, and how well a student answers, on scenes whose masks are known exactly.

Four measures of a word map A against the mask of the object that the word names:

- `pointing`: the hottest pixel lies inside the mask;
- `own_object` ("ref"): among the scene's objects, the word's own has the highest mean attention (scenes of two and more);
- `iou`: intersection over union of the mask with the pixels above half of the map's range;
- `auc`: the probability that a pixel of the mask is hotter than one outside it.

A map that merely finds objects, whatever the word, scores well on `auc`. So every figure stands beside two others: the
word-agnostic `control` (each word's map replaced by the mean map of all measured words of its caption) and `chance`.
Measured are color and shape words; maps are resampled to the picture's size bilinearly first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from .collator import Collator
from .config import AlignmentConfig, Rows
from .data import Sample
from .miniworld.scenes import DESCRIBE, QUESTION_TYPES, Referent, Scene

if TYPE_CHECKING:
    from .teacher.extract import Teacher

MEASURED_KINDS = ("color", "shape")
BATCH_SIZE = 50


@dataclass(frozen=True)
class Localization:
    """Means over `words` measured words; `own_object` over those in scenes of two and more objects. All in [0, 1]."""

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


def measured_words(scene: Scene, map_of: Callable[[Referent], np.ndarray | None]) -> list[MeasuredWord]:
    """The measured words of a scene that `map_of` has a map [y, x] for."""
    found = []
    for referent in scene.referents:
        values = map_of(referent) if referent.kind in MEASURED_KINDS else None
        if values is not None:
            found.append(MeasuredWord(_resample(values, scene.masks.shape[1:]), scene.masks, referent.object_index))
    return found


def word_agnostic(words: Sequence[MeasuredWord]) -> list[MeasuredWord]:
    """The control: every word of one scene gets the mean map of them all."""
    mean = np.mean([w.values for w in words], axis=0) if words else None
    return [MeasuredWord(mean, w.masks, w.object_index) for w in words if mean is not None]


def localization(words: Iterable[MeasuredWord]) -> Localization:
    """Measures maps against masks. Raises `ValueError` when there is nothing to measure."""
    pointing, own, iou, auc = [], [], [], []
    for word in words:
        mask = word.masks[word.object_index]
        pointing.append(bool(mask.flat[int(word.values.argmax())]))
        if len(word.masks) > 1:
            heat = [word.values[m].mean() for m in word.masks]
            # A tie is no find: a constant map must not win by the order of objects.
            own.append(heat[word.object_index] > max(h for i, h in enumerate(heat) if i != word.object_index))
        hot = word.values > (word.values.min() + word.values.max()) / 2
        iou.append((hot & mask).sum() / (hot | mask).sum())
        auc.append(_auc(word.values, mask))
    if not pointing:
        raise ValueError("no measured words: the scenes' captions name no objects, or no word has a map")
    means = (round(float(np.mean(v)), 4) if v else math.nan for v in (pointing, own, iou, auc))
    return Localization(*means, words=len(pointing))  # type: ignore[misc, arg-type]


def chance(words: Iterable[MeasuredWord]) -> Localization:
    """What a map of independent noise is expected to score (`iou`: against a random half of the pixels)."""
    words = list(words)
    share = np.array([w.masks[w.object_index].mean() for w in words])
    several = [1 / len(w.masks) for w in words if len(w.masks) > 1]
    own = float(np.mean(several)) if several else math.nan
    iou = (share / 2) / (0.5 + share / 2)
    return Localization(round(float(share.mean()), 4), round(own, 4), round(float(iou.mean()), 4), 0.5, len(words))


def compare(per_scene: Sequence[Sequence[MeasuredWord]]) -> dict[str, dict[str, float]]:
    """Maps, control and chance: `{"maps": ..., "control": ..., "chance": ...}`, each a `Localization` as a dict."""
    words = [word for scene in per_scene for word in scene]
    control = [word for scene in per_scene for word in word_agnostic(scene)]
    return {
        "maps": asdict(localization(words)),
        "control": asdict(localization(control)),
        "chance": asdict(chance(words)),
    }


def compare_targets(scenes: Sequence[Scene], maps: Sequence[Mapping[tuple[int, int], np.ndarray]]) -> dict[str, dict[str, float]]:
    """Localization of word maps given by span for each scene, beside control and chance."""
    return compare([measured_words(scene, _by_span(own)) for scene, own in zip(scenes, maps, strict=True)])


def _by_span(maps: Mapping[tuple[int, int], np.ndarray]) -> Callable[[Referent], np.ndarray | None]:
    return lambda referent: maps.get((referent.start, referent.end))


def teacher_maps(teacher: Teacher, scenes: Iterable[Scene]) -> list[dict[tuple[int, int], np.ndarray]]:
    """A teacher's maps of its captions' words, by span, per scene."""
    found = []
    for scene in scenes:
        known = teacher.word_maps(scene.image, scene.caption)
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
    from .kernels.map_loss import normalize

    normalized = normalize(torch.from_numpy(targets).double(), normalization)
    return float((normalized - normalized.mean(dim=0)).square().mean())


def alignment_error(
    aligned: Sequence[Mapping[tuple[int, int], np.ndarray]],
    targets: Sequence[Mapping[tuple[int, int], np.ndarray]],
    config: AlignmentConfig,
) -> float:
    """Alignment loss of given maps against targets, mean over the words that both have."""
    from .kernels.map_loss import map_loss

    errors = []
    for ours, theirs in zip(aligned, targets, strict=True):
        for span in ours.keys() & theirs.keys():
            target = torch.from_numpy(theirs[span]).float()[None, None]
            student = torch.from_numpy(ours[span]).float()[None, None]
            errors.append(float(map_loss(student, target, torch.ones(1, 1, dtype=torch.bool), normalization=config.normalization)))
    return float(np.mean(errors))


def _batches(items: Sequence[Any]) -> Iterable[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, BATCH_SIZE)):
        yield chunk


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
