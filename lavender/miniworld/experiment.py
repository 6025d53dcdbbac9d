"""Does alignment teach a student where to look? The small world's experiment: the demo runs two arms of it, the study all four.

Arms, all with the same samples, steps and seeds: `none` (plain fine-tuning), `teacher` (the teacher's maps), `oracle` (exact
masks) and `shuffled` (every word gets the teacher's map of a random word of another picture).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..batches.collator import Collator
from ..config import AlignmentConfig, Rows, TeacherConfig, TrainingConfig
from ..data.samples import read_pairs, read_samples
from ..evaluation.alignment_error import alignment_error, best_constant_error
from ..evaluation.localization import SpanMaps, maps_by_span
from ..extraction.extract import extract
from ..patching import patch
from ..students.loading import load_adapter, load_student
from ..students.patch import StudentPatch
from ..targets.store import Target, TargetStore, TargetWriter
from ..teachers.model import Teacher
from ..training.train import fine_tune
from . import HELD_OUT_SEED, STUDENT, TEACHER, TRAINING_SEED, write_dataset
from .measures import compare_targets, evaluate_answers, evaluate_attention, student_maps, teacher_maps
from .scenes import Scene, make_scenes

ARMS = ("none", "teacher", "oracle", "shuffled")


@dataclass(frozen=True)
class ExperimentConfig:
    """One experiment: which pictures, which teacher settings, which fine-tuning."""

    num_train: int = 320
    """Pictures to fine-tune on."""
    num_held_out: int = 150
    """Pictures to measure on."""
    seed: int = 0
    """Chooses a fresh set of training pictures, their order and the new weights; held-out pictures stay the same."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


def training_scenes(config: ExperimentConfig) -> list[Scene]:
    """The pictures of this seed: no two seeds share one."""
    return list(make_scenes(TRAINING_SEED, config.num_train, start=config.seed * config.num_train))


def held_out_scenes(count: int, seed: int = HELD_OUT_SEED) -> list[Scene]:
    """Pictures that neither the embedded models nor any fine-tuning has seen."""
    return list(make_scenes(seed, count))


def extract_targets(folder: Path, scenes: Sequence[Scene], config: TeacherConfig, progress: bool = True) -> TargetStore:
    """Writes the scenes as a data set and the teacher's targets for it, below `folder`."""
    captions = write_dataset(scenes, folder)
    extract(TEACHER, read_pairs(captions), folder / "targets", config, progress=progress)
    return TargetStore(folder / "targets")


def oracle_targets(folder: Path, scenes: Sequence[Scene], teacher: TargetStore) -> TargetStore:
    """A store that differs from the teacher's in its maps alone: exact masks for words that name objects, none for others."""
    size = teacher.config.map_size

    def maps_of(number: int, target: Target) -> np.ndarray:
        scene = scenes[number]
        by_span = {(r.start, r.end): scene.word_mask(r) for r in scene.referents}
        maps = np.full_like(target.word_maps.maps, np.nan)
        for w, word in enumerate(target.word_maps.words):
            mask = by_span.get((word.start, word.end))
            if mask is not None:
                small = Image.fromarray(mask.astype(np.float32)).resize((size, size), Image.Resampling.BOX)
                maps[w] = np.asarray(small)
        return maps

    return _store_with(folder, teacher, "oracle", maps_of)


def shuffled_targets(folder: Path, teacher: TargetStore, seed: int) -> TargetStore:
    """A store in which every word has the map of a random content word of another picture."""
    rng = np.random.default_rng([seed, 1])
    pool = [(number, values) for number, maps in enumerate(target_maps(teacher)) for values in maps.values()]

    def maps_of(number: int, target: Target) -> np.ndarray:
        maps = np.empty_like(target.word_maps.maps)
        for w in range(len(maps)):
            owner = number
            while owner == number:
                owner, maps[w] = pool[int(rng.integers(len(pool)))]
        return maps

    return _store_with(folder, teacher, "shuffled", maps_of)


def _store_with(folder: Path, teacher: TargetStore, name: str, maps_of: Callable[[int, Target], np.ndarray]) -> TargetStore:
    """The teacher's store with other maps: `maps_of` its number-th sample."""
    writer = TargetWriter(folder, {"model": name, "weights": f"{name} of {teacher.fingerprint}"}, teacher.config)
    for number, sample_id in enumerate(teacher):
        target = teacher[sample_id]
        maps = maps_of(number, target)  # drawn for finished samples too, so that a restart draws the same
        if sample_id not in writer.done:
            writer.add(Target(sample_id, target.image_sha256, replace(target.word_maps, maps=maps)))
    writer.close()
    return TargetStore(folder)


def train_arm(
    name: str, folder: Path, config: ExperimentConfig, targets: TargetStore | None, *, progress: bool = True
) -> StudentPatch:
    """Fine-tunes the embedded student on `folder/captions.jsonl` and returns it, patched; `folder/<name>` is the run folder."""
    trained = fine_tune(
        STUDENT,
        read_samples(folder / "captions.jsonl"),
        folder / name,
        config.training,
        targets=targets,
        alignment=config.alignment,
        progress=progress,
    )
    return patch(trained)


def measure(
    handle: StudentPatch, processor: Any, held_out: Sequence[Scene], rows: Rows, held_out_targets: Sequence[SpanMaps] | None = None
) -> dict[str, Any]:
    """Attention (of the chosen rows) and answers of a patched student on held-out scenes: `{"attention", "answers"}`.

    With the teacher's maps of the same scenes, an aligned student's aligner is compared with the best constant map: `"aligner"`.
    """
    result: dict[str, Any] = {
        "attention": evaluate_attention(handle, processor, held_out, rows),
        "answers": evaluate_answers(handle.model, processor, held_out),
    }
    if held_out_targets is not None and hasattr(handle.model, "lavender"):
        _, aligned = student_maps(handle, processor, held_out, rows)
        everything = np.stack([m for maps in held_out_targets for m in maps.values()])
        result["aligner"] = {
            "error": alignment_error(aligned, held_out_targets, handle.config),
            "best_constant_error": best_constant_error(everything, handle.config.normalization),
        }
    return result


def target_maps(store: TargetStore) -> list[SpanMaps]:
    """A store's maps of the content words, per sample."""
    maps: list[SpanMaps] = []
    for sample_id in store:
        word_maps = store[sample_id].word_maps
        content = {(w.start, w.end) for w in Collator.words(word_maps.caption)}
        maps.append({span: values for span, values in maps_by_span(word_maps).items() if span in content})
    return maps


def demo_config(seed: int = 0) -> ExperimentConfig:
    """The settings of `lavender demo` and of the study, which chose the weight; smaller ones cost fewer answers.

    Captions list objects in random order, so the row that predicts a color cannot know which object is meant; the row that reads
    it can. The identity aligner makes the term act on the raw attention, which is what is measured.
    """
    return ExperimentConfig(
        seed=seed,
        alignment=AlignmentConfig(weight=1.0, rows="reads", aligner="identity"),
        training=TrainingConfig(learning_rate=1e-3),
    )


def evaluate_student_folder(student: str, adapter: str | Path | None, count: int, rows: Rows) -> dict[str, Any]:
    """`measure` of a student, with a LoRA adapter if one is given, on held-out scenes. Raises `ModelError`."""
    model, processor = load_student(student)
    with patch(model if adapter is None else load_adapter(model, adapter)) as handle:
        return measure(handle, processor, held_out_scenes(count), rows)


def evaluate_teacher_folder(teacher: str, count: int, config: TeacherConfig | None = None) -> dict[str, Any]:
    """Localization of a teacher's word maps on held-out scenes, beside control and chance. Raises `ModelError`."""
    scenes = held_out_scenes(count)
    return compare_targets(scenes, teacher_maps(Teacher(teacher, config or TeacherConfig()), scenes))
