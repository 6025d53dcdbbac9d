"""Measures on scenes, whose masks are exact: where teachers and students look, and what students answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any, TypeVar

import torch

from ..batches.collator import Collator
from ..config import Rows
from ..data.samples import Sample
from ..evaluation.answers import accuracy, generate
from ..evaluation.localization import MeasuredWord, SpanMaps, compare, maps_by_span, measured_words
from ..images import Picture
from ..students.patch import StudentPatch
from ..teachers.model import Teacher
from ..words import Caption
from .scenes import DESCRIBE, MEASURED_KINDS, QUESTION_TYPES, Scene

BATCH_SIZE = 50
"""Scenes or questions per batch of a model under measurement."""

Item = TypeVar("Item")


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
    """A patched student's maps of its captions' words, per scene: raw (mean over layers and heads), and aligned.

    `rows` says which row of the attention speaks for a token. Without an aligner the aligned maps are the raw ones.
    """
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


def split_into_batches(items: Iterable[Item]) -> Iterable[list[Item]]:
    """Lists of up to `BATCH_SIZE` items, in order."""
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH_SIZE)):
        yield batch
