"""`lavender demo`: the main job from end to end on the small world, in minutes on a CPU."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..batches.collator import Collator
from ..config import Rows, to_dict
from ..evaluation.localization import SpanMaps
from ..files import read_file, write_within
from ..patching import patch
from ..students.loading import load_student
from ..students.patch import StudentPatch
from . import STUDENT
from .experiment import ExperimentConfig, extract_targets, held_out_scenes, measure, target_maps, train_arm, training_scenes
from .measures import compare_targets, student_maps
from .report import RESULTS, environment, save_examples, table_rows, write_report
from .scenes import Scene

NUM_EXAMPLES = 6
WORDS_SHOWN = 7


def run_demo(out: Path, config: ExperimentConfig) -> Path:
    """Pictures, targets, two fine-tunings (plain and with the teacher's maps), measurements, report; returns the report's path.

    Every stage continues where a killed run stopped. Raises `TargetError` when `out` holds a demo with other settings.
    """
    console, rows = Console(), config.alignment.rows
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    training, held_out = training_scenes(config), held_out_scenes(config.num_held_out)

    console.rule("1/4  Teacher: where does each word lie?")
    targets = extract_targets(out, training, config.teacher)
    held_out_store = extract_targets(out / "held_out", held_out, config.teacher)
    teacher_maps = target_maps(held_out_store)

    console.rule("2/4  Student before")
    student, processor = load_student(STUDENT)
    handles: dict[str, StudentPatch] = {"before": patch(student)}
    arms = [{"name": "before", **measure(handles["before"], processor, held_out, rows)}]
    for number, (name, store) in enumerate([("none", None), ("teacher", targets)], start=3):
        console.rule(f"{number}/4  Fine-tuning {'with the teacher maps' if store else 'without maps'}")
        handles[name] = train_arm(name, out, config, store)
        history = json.loads(read_file(out / name / "history.json"))
        arms.append({"name": name, **measure(handles[name], processor, held_out, rows, teacher_maps), "history": history})

    results = {
        "arms": arms,
        "teacher": compare_targets(held_out, teacher_maps),
        "config": to_dict(config),
        "environment": environment(),
        "duration_s": round(time.monotonic() - started, 1),
    }
    write_within(out, RESULTS, json.dumps(results, indent=2) + "\n")
    _save_examples(out, held_out, handles, processor, rows, teacher_maps)
    for handle in handles.values():
        handle.unpatch()
    report = write_report(out)
    _print_table(console, results)
    console.print(f"Report: {report}")
    return report


def _save_examples(
    out: Path,
    held_out: Sequence[Scene],
    handles: dict[str, StudentPatch],
    processor: Any,
    rows: Rows,
    teacher_maps: Sequence[SpanMaps],
) -> None:
    chosen = [i for i, scene in enumerate(held_out) if len(scene.objects) > 1][:NUM_EXAMPLES]
    scenes = [held_out[i] for i in chosen]
    spans = [[(w.start, w.end) for w in Collator.words(s.caption)][:WORDS_SHOWN] for s in scenes]
    maps: dict[str, list[list[np.ndarray]]] = {
        "diffusion": [[teacher_maps[i][span] for span in caption_spans] for i, caption_spans in zip(chosen, spans, strict=True)]
    }
    for name, handle in handles.items():
        raw, _ = student_maps(handle, processor, scenes, rows)
        maps[name] = [[by_span[span] for span in caption_spans] for by_span, caption_spans in zip(raw, spans, strict=True)]
    words = [[s.caption[a:b] for a, b in caption_spans] for s, caption_spans in zip(scenes, spans, strict=True)]
    save_examples(out, [s.image for s in scenes], [s.caption for s in scenes], words, maps)


def _print_table(console: Console, results: dict[str, Any]) -> None:
    table = Table(title="Does attention find the object? (held-out pictures)")
    table.add_column("")
    for name in ("pointing", "own object", "IoU", "AUC"):
        table.add_column(name, justify="right")
    for title, row in table_rows(results):
        table.add_row(title, *(f"{row[key]:.3f}" for key in ("pointing", "own_object", "iou", "auc")))
    console.print(table)
    answers = ", ".join(f"{arm['name']} {arm['answers']['all']['accuracy']:.3f}" for arm in results["arms"])
    console.print(f"Right answers: {answers}")
