"""The finished study's arms once more, on pictures that no choice has seen: `python bench/miniworld_fresh.py STUDY_FOLDER JSON`.

The study's rows, aligner and learning rate were picked by looking at its own held-out pictures. This measures the adapters that it
trained on another seed's pictures, for both kinds of rows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from miniworld_study import mean_and_interval
from peft import PeftModel

import lavender
from lavender.miniworld import STUDENT
from lavender.miniworld.measures import evaluate_answers, evaluate_attention, held_out_scenes
from lavender.miniworld.report import environment
from lavender.students.loading import load_student

FRESH_SEED = 400
NUM_SCENES = 150
ARMS = ("none", "teacher", "shuffled")


def measure(adapter: Path) -> dict[str, float]:
    """Raw pointing for both kinds of rows, and the share of right answers, of one adapter."""
    scenes = held_out_scenes(NUM_SCENES, FRESH_SEED)
    student, processor = load_student(STUDENT)
    model = PeftModel.from_pretrained(student, adapter)
    with lavender.patch(model) as handle:
        figures = {
            f"pointing_{rows}": evaluate_attention(handle, processor, scenes, rows)["raw"]["maps"]["pointing"]  # type: ignore[arg-type]
            for rows in ("reads", "predicts")
        }
        return figures | {"answers": evaluate_answers(model, processor, scenes)["all"]["accuracy"]}


def main() -> None:
    study, out = Path(sys.argv[1]), Path(sys.argv[2])
    seeds = sorted(study.glob("seed*"))
    runs = {arm: [measure(seed / arm / "adapter") for seed in seeds] for arm in ARMS}
    summary: dict[str, Any] = {}
    for arm, figures in runs.items():
        summary[arm] = {}
        for name in figures[0]:
            summary[arm][name] = mean_and_interval([run[name] for run in figures])
            if arm != "none":
                differences = [run[name] - plain[name] for run, plain in zip(figures, runs["none"], strict=True)]
                summary[arm][name]["minus_none"] = mean_and_interval(differences)
    record = {"environment": environment(), "scenes": NUM_SCENES, "scene_seed": FRESH_SEED, "summary": summary, "runs": runs}
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
