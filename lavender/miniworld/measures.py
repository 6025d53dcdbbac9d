"""Measures on scenes, whose masks are exact: where teachers and students look, and what students answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from ..batches.collator import Collator
from ..config import Rows, TeacherConfig
from ..data.samples import Sample
from ..evaluation.answers import accuracy, generate
from ..evaluation.localization import MeasuredWord, SpanMaps, compare, maps_by_span, measured_words
from ..images import Picture
from ..patching import patch
from ..students.loading import load_adapter, load_student
from ..students.patch import StudentPatch
from ..words import Caption
from . import HELD_OUT_SEED
from .language import require_all_layers
from .scenes import DESCRIBE, MEASURED_KINDS, QUESTION_TYPES, STUDY_TYPES, Scene, make_scenes

if TYPE_CHECKING:
    from ..teachers.model import Teacher

BATCH_SIZE = 50
"""Scenes or questions per batch of a model under measurement."""

RESAMPLES = 4000
"""Draws of pictures that an interval is made from."""

Item = TypeVar("Item")


def held_out_scenes(count: int, seed: int = HELD_OUT_SEED) -> list[Scene]:
    """Pictures that neither the embedded models nor any fine-tuning has seen."""
    return list(make_scenes(seed, count))


def scene_words(scene: Scene, maps: SpanMaps) -> list[MeasuredWord]:
    """A scene's color and shape words that have a map, each beside the scene's masks."""
    referents = [r for r in scene.referents if r.kind in MEASURED_KINDS]
    return measured_words(scene.masks, [(maps.get((r.start, r.end)), r.object_index) for r in referents])


def compare_targets(scenes: Sequence[Scene], maps: Sequence[SpanMaps]) -> dict[str, dict[str, float]]:
    """Localization of the word maps of each scene's caption, beside control and chance."""
    return compare(scene_words(scene, maps_of_scene) for scene, maps_of_scene in zip(scenes, maps, strict=True))


def teacher_maps(teacher: Teacher, scenes: Iterable[Scene]) -> list[SpanMaps]:
    """A teacher's maps of its captions' words, per scene."""
    return [
        maps_by_span(word_maps)
        for batch in split_into_batches(scenes)
        for word_maps in teacher.word_maps_of([Picture.open(s.image) for s in batch], [Caption.of(s.caption) for s in batch])
    ]


def student_maps(
    handle: StudentPatch, processor: Any, scenes: Sequence[Scene], rows: Rows = "predicts"
) -> tuple[list[SpanMaps], list[SpanMaps]]:
    """A patched student's maps of its captions' words, per scene: raw (mean over all layers and heads), and aligned.

    `rows` says which row of the attention speaks for a token. Without an aligner the aligned maps are the raw ones. Raises
    `ModelError` if the patch reads some of the layers alone.
    """
    require_all_layers(handle)
    model = handle.model
    collator = Collator(processor, model_config=model.config)
    raw: list[SpanMaps] = []
    aligned: list[SpanMaps] = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for scenes_of_batch in split_into_batches(scenes):
            samples = [Sample(str(i), s.image, DESCRIBE, s.caption) for i, s in enumerate(scenes_of_batch)]
            batch = {key: value.to(model.device) for key, value in collator(samples).items()}
            plain = handle.capture(rows, **batch).mean(dim=(1, 2))
            learned = handle.align(**batch) if handle.trains else plain
            for b, scene in enumerate(scenes_of_batch):
                spans = [(w.start, w.end) for w in Collator.words(scene.caption)]
                raw.append({span: plain[b, w].float().cpu().numpy() for w, span in enumerate(spans)})
                aligned.append({span: learned[b, w].float().cpu().numpy() for w, span in enumerate(spans)})
    model.train(was_training)
    return raw, aligned


def evaluate_attention(
    handle: StudentPatch, processor: Any, scenes: Sequence[Scene], rows: Rows = "predicts"
) -> dict[str, dict[str, dict[str, float]]]:
    """Localization of a patched student's raw and aligned maps: `{"raw": compare(...), "aligned": compare(...)}`."""
    raw, aligned = student_maps(handle, processor, scenes, rows)
    return {"raw": compare_targets(scenes, raw), "aligned": compare_targets(scenes, aligned)}


def evaluate_answers(model: Any, processor: Any, scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """Greedy answers to the scenes' questions: an `Accuracy` as a dict per question type, and for `"all"`."""
    questions = [(scene.image, question) for scene in scenes for question in scene.questions]
    hits: dict[str, list[bool]] = {kind: [] for kind in QUESTION_TYPES}
    was_training = model.training
    model.eval()
    for batch in split_into_batches(questions):
        answers = generate(model, processor, [image for image, _ in batch], [q.text for _, q in batch], max_new_tokens=6)
        for (_, question), answer in zip(batch, answers, strict=True):
            hits[question.type].append(answer.strip().casefold() == question.answer)
    model.train(was_training)
    hits["all"] = [hit for hits_of_kind in hits.values() for hit in hits_of_kind]
    return {kind: asdict(accuracy(hits_of_kind)) for kind, hits_of_kind in hits.items() if hits_of_kind}


def measure(handle: StudentPatch, processor: Any, held_out: Sequence[Scene], rows: Rows) -> dict[str, Any]:
    """Attention (of the chosen rows) and answers of a patched student on held-out scenes: `{"attention", "answers"}`."""
    return {
        "attention": evaluate_attention(handle, processor, held_out, rows),
        "answers": evaluate_answers(handle.model, processor, held_out),
    }


def evaluate_student_folder(student: str, adapter: str | Path | None, count: int, rows: Rows) -> dict[str, Any]:
    """`measure` of a student, with a LoRA adapter if one is given, on held-out scenes. Raises `ModelError`."""
    model, processor = load_student(student)
    with patch(model if adapter is None else load_adapter(model, adapter)) as handle:
        return measure(handle, processor, held_out_scenes(count), rows)


def evaluate_teacher_folder(teacher: str, count: int, config: TeacherConfig | None = None) -> dict[str, Any]:
    """Localization of a teacher's word maps on held-out scenes, beside control and chance. Raises `ModelError`."""
    from ..teachers.model import Teacher

    scenes = held_out_scenes(count)
    return compare_targets(scenes, teacher_maps(Teacher(teacher, config or TeacherConfig()), scenes))


def compare_answers(
    kinds: Sequence[Sequence[str]],
    first: Sequence[Sequence[bool]],
    second: Sequence[Sequence[bool]],
    counted: Sequence[str] = STUDY_TYPES,
) -> dict[str, dict[str, Any]]:
    """The right answers of two students to the same questions.

    Args:
        kinds: per picture the type of each question.
        first, second: per picture which answers are right, of each student.
        counted: the types that count.

    Returns:
        Per type that is asked, and for `"all"`, the mean over these types: `first`, `second` and `difference` (second minus first),
        each `{"mean", "low", "high"}` with its 95 % interval over pictures, and the number of `questions`. Intervals are
        percentiles of a bootstrap that draws pictures, each with all its questions, for both students alike.
    """
    asked_kinds = {kind for row in kinds for kind in row}
    names = [kind for kind in counted if kind in asked_kinds]
    asked = np.array([[row.count(name) for name in names] for row in map(list, kinds)])
    right = np.array(
        [
            [[sum(hit for hit, kind in zip(hits, row, strict=True) if kind == name) for name in names] for hits, row in pairs]
            for pairs in (list(zip(student, kinds, strict=True)) for student in (first, second))
        ]
    )
    draws = np.random.default_rng(0).multinomial(len(asked), np.full(len(asked), 1 / len(asked)), RESAMPLES)
    # The pictures as they are come first.
    weights = np.concatenate([np.ones((1, len(asked)), dtype=int), draws])
    with np.errstate(invalid="ignore"):  # a draw may hold no question of a type
        shares = (weights @ right) / (weights @ asked)
    shares = np.concatenate([shares, np.nanmean(shares, axis=2, keepdims=True)], axis=2)
    of_both = np.concatenate([shares, shares[1:] - shares[:1]])
    low, high = np.nanpercentile(of_both[:, 1:], (2.5, 97.5), axis=1)
    counts = [*asked.sum(axis=0), asked.sum()]
    return {
        name: {
            part: {"mean": round(of_both[s, 0, k], 4), "low": round(low[s, k], 4), "high": round(high[s, k], 4)}
            for s, part in enumerate(("first", "second", "difference"))
        }
        | {"questions": int(counts[k])}
        for k, name in enumerate([*names, "all"])
    }


def split_into_batches(items: Iterable[Item]) -> Iterable[list[Item]]:
    """Lists of up to `BATCH_SIZE` items, in order."""
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH_SIZE)):
        yield batch
