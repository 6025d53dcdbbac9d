"""Does alignment teach a student where to look? The small world's study, with its controls.

    python bench/miniworld_study.py --out runs/study [--seeds 5] [--jobs 2] [--json bench/results/miniworld_study.json]

1. Lambda is chosen on a validation split: plain fine-tuning and one run of the teacher arm for each candidate, on training
   pictures of a seed that is not used again. Of the candidates whose answers on validation pictures are at most 0.02 less often
   right than after plain fine-tuning, the one with the best raw pointing wins (the best answers, if all lose more).
2. Every seed has training pictures, batch order and new weights of its own, and four arms that differ in the targets alone:
   none (plain fine-tuning), teacher, oracle (exact masks) and shuffled (maps of random words of other pictures).
3. The teacher arm is run with the other candidates for lambda as well: what attention gains, and answers pay, by lambda.
4. All arms are measured on the same held-out pictures. Differences to plain fine-tuning are paired by seed.

Finished arms are kept in the output folder: the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from lavender.config import AlignmentConfig, TeacherConfig, TrainingConfig, to_dict
from lavender.data.samples import read_samples
from lavender.evaluation.alignment_error import alignment_error, best_constant_error
from lavender.miniworld import STUDENT, TRAINING_SEED
from lavender.miniworld.measures import held_out_scenes, measure, student_maps
from lavender.miniworld.report import environment
from lavender.miniworld.scenes import Scene, make_scenes
from lavender.miniworld.stores import exact_targets, shuffled_targets, target_maps, teacher_targets
from lavender.patching import patch
from lavender.students.loading import load_student
from lavender.students.patch import StudentPatch
from lavender.targets.store import TargetStore
from lavender.training.train import fine_tune

ARMS = ("none", "teacher", "oracle", "shuffled")
TITLES = {
    "none": "Plain fine-tuning",
    "teacher": "Lavender",
    "oracle": "Lavender, exact masks",
    "shuffled": "Lavender, shuffled maps",
}
LAMBDAS = (0.03, 0.1, 0.3, 1.0)
TOLERATED_LOSS = 0.02
"""Answer accuracy that the chosen lambda may cost on the validation split."""
VALIDATION_SEED = 300
LAMBDA_SEED = 1000
"""Training seed of the runs that choose lambda; the study's own seeds start at 1."""
T_95 = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Two-sided 95 % quantiles of Student's t by degrees of freedom."""


@dataclass(frozen=True)
class ExperimentConfig:
    """Which pictures, which teacher settings, which fine-tuning.

    Captions list objects in random order, so the row that predicts a color cannot know which object is meant; the row that reads
    it can. The identity aligner makes the term act on the raw attention, which is what is measured.
    """

    num_train: int = 320
    num_held_out: int = 150
    seed: int = 0
    """Chooses a fresh set of training pictures, their order and the new weights; held-out pictures stay the same."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    alignment: AlignmentConfig = field(default_factory=lambda: AlignmentConfig(weight=1.0, rows="reads", aligner="identity"))
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(learning_rate=1e-3))


def training_scenes(config: ExperimentConfig) -> list[Scene]:
    """The pictures of this seed: no two seeds share one."""
    return list(make_scenes(TRAINING_SEED, config.num_train, start=config.seed * config.num_train))


def train_arm(name: str, folder: Path, config: ExperimentConfig, targets: TargetStore | None) -> StudentPatch:
    """Fine-tunes the embedded student on `folder/captions.jsonl` and returns it, patched; `folder/<name>` is the run folder."""
    samples = read_samples(folder / "captions.jsonl")
    alignment = config.alignment
    return patch(fine_tune(STUDENT, samples, folder / name, config.training, targets=targets, alignment=alignment, progress=False))


def aligner_error(handle: StudentPatch, processor: Any, held_out: list[Scene], store: TargetStore, rows: str) -> dict[str, float]:
    """The alignment loss on held-out pictures, beside that of the best constant map."""
    targets = target_maps(store)
    _, aligned = student_maps(handle, processor, held_out, rows)
    everything = np.stack([m for maps in targets for m in maps.values()])
    return {
        "error": alignment_error(aligned, targets, handle.config),
        "best_constant_error": best_constant_error(everything, handle.config.normalization),
    }


def run_arm(folder: Path, arm: str, config: ExperimentConfig, measured_seed: int | None) -> dict[str, Any]:
    """Trains and measures one arm, or reads what an earlier run found."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    result_path = folder / f"{arm}.json"
    if result_path.exists():
        return json.loads(result_path.read_text())
    scenes = training_scenes(config)
    targets: TargetStore | None = None
    if arm != "none":
        targets = TargetStore(folder / "targets")
        if arm == "oracle":
            targets = exact_targets(folder / "exact_targets", scenes, targets.config.map_size)
        elif arm == "shuffled":
            targets = shuffled_targets(folder / "shuffled_targets", targets, config.seed)
    handle = train_arm(arm, folder, config, targets)
    _, processor = load_student(STUDENT)
    held_out = held_out_scenes(config.num_held_out, **({} if measured_seed is None else {"seed": measured_seed}))
    rows = config.alignment.rows
    result = {"arm": arm, "seed": config.seed, **measure(handle, processor, held_out, rows)}
    if measured_seed is None and hasattr(handle.model, "lavender"):
        store = TargetStore(folder.parent / "held_out" / "targets")
        result["aligner"] = aligner_error(handle, processor, held_out, store, rows)
    handle.unpatch()
    partial = result_path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=2))
    os.replace(partial, result_path)
    shutil.rmtree(folder / arm / "checkpoints", ignore_errors=True)
    print(f"{folder.name}/{arm}: pointing {figure(result, 'pointing'):.3f}, answers {figure(result, 'answers'):.3f}", flush=True)
    return result


def prepare(folder: Path, config: ExperimentConfig) -> None:
    """The teacher's targets of one seed's pictures."""
    import torch

    torch.set_num_threads(1)
    teacher_targets(folder, training_scenes(config), config.teacher, progress=False)


def prepare_held_out(folder: Path, config: ExperimentConfig) -> None:
    """The teacher's maps of the held-out pictures, which aligners are compared on."""
    teacher_targets(folder, held_out_scenes(config.num_held_out), config.teacher, progress=False)


def run_seed(folder: Path, config: ExperimentConfig) -> dict[str, dict[str, Any]]:
    """Every arm of one seed, and the teacher arm with every other candidate for lambda."""
    prepare(folder, config)
    results = {arm: run_arm(folder, arm, config, None) for arm in ARMS}
    for weight in LAMBDAS:
        if weight != config.alignment.weight:
            other = replace(config, alignment=replace(config.alignment, weight=weight))
            results[f"teacher-{weight:g}"] = run_arm(folder, f"teacher-{weight:g}", other, None)
    return results


def choose_lambda(out: Path, config: ExperimentConfig, pool: ProcessPoolExecutor) -> tuple[float, list[dict[str, float]]]:
    """The chosen weight, and the validation figures of plain fine-tuning (weight 0) and of every candidate."""
    base = replace(config, seed=LAMBDA_SEED)
    pool.submit(prepare, out / "lambda" / "data", base).result()
    jobs = [pool.submit(run_arm, out / "lambda" / "data", "none", base, VALIDATION_SEED)]
    for weight in LAMBDAS:
        folder = out / "lambda" / f"{weight:g}"
        if not folder.exists():
            shutil.copytree(out / "lambda" / "data", folder, ignore=shutil.ignore_patterns("none*"))
        candidate = replace(base, alignment=replace(base.alignment, weight=weight))
        jobs.append(pool.submit(run_arm, folder, "teacher", candidate, VALIDATION_SEED))
    rows = [
        {"weight": weight, "pointing": figure(r, "pointing"), "answers": figure(r, "answers")}
        for weight, r in zip((0.0, *LAMBDAS), (job.result() for job in jobs), strict=True)
    ]
    plain, *tried = rows
    harmless = [row for row in tried if row["answers"] >= plain["answers"] - TOLERATED_LOSS]
    best = max(harmless, key=lambda row: row["pointing"]) if harmless else max(tried, key=lambda row: row["answers"])
    return best["weight"], rows


def figure(result: dict[str, Any], name: str) -> float:
    """One headline figure of one run."""
    if name == "answers":
        return result["answers"]["all"]["accuracy"]
    return result["attention"]["raw"]["maps"][name]


def mean_and_interval(values: list[float]) -> dict[str, float]:
    """Mean with its 95 % interval by Student's t over seeds."""
    mean = statistics.mean(values)
    half = T_95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}


def summarize(by_seed: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Per arm each figure's mean over seeds, and its difference to plain fine-tuning, paired by seed."""
    summary: dict[str, Any] = {}
    for arm in by_seed[0]:
        summary[arm] = {}
        for name in ("pointing", "own_object", "iou", "auc", "answers"):
            values = [figure(seed[arm], name) for seed in by_seed]
            plain = [figure(seed["none"], name) for seed in by_seed]
            summary[arm][name] = mean_and_interval(values)
            if arm != "none":
                summary[arm][name]["minus_none"] = mean_and_interval([v - p for v, p in zip(values, plain, strict=True)])
        for kind in by_seed[0][arm]["answers"]:
            summary[arm].setdefault("answers_by_type", {})[kind] = mean_and_interval(
                [seed[arm]["answers"][kind]["accuracy"] for seed in by_seed]
            )
        if "aligner" in by_seed[0][arm]:
            for key in ("error", "best_constant_error"):
                summary[arm].setdefault("aligner", {})[key] = mean_and_interval([seed[arm]["aligner"][key] for seed in by_seed])
    return summary


def plot(summary: dict[str, Any], path: Path) -> None:
    """Raw pointing and answer accuracy per arm, with intervals over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure_, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    for axis, name, title in zip(axes, ("pointing", "answers"), ("Raw attention: pointing", "Right answers"), strict=True):
        for row, arm in enumerate(ARMS):
            value = summary[arm][name]
            axis.plot([value["low"], value["high"]], [row, row], color="#6f51a8", linewidth=2)
            axis.plot(value["mean"], row, "o", color="#6f51a8")
            axis.annotate(f"{value['mean']:.3f}", (value["mean"], row), textcoords="offset points", xytext=(0, 7), ha="center")
        axis.set(title=title, yticks=range(len(ARMS)), yticklabels=[TITLES[arm] for arm in ARMS], xlim=(0, 1.02))
        axis.set_ylim(len(ARMS) - 0.4, -0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure_.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--json", type=Path, help="also write the summary here, and a plot beside it")
    parser.add_argument("--seeds", type=int, default=5, choices=range(3, 11))
    parser.add_argument("--jobs", type=int, default=2, help="processes; each uses one core")
    arguments = parser.parse_args()
    out: Path = arguments.out
    config = ExperimentConfig()
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        held_out = pool.submit(prepare_held_out, out / "held_out", config)
        weight, candidates = choose_lambda(out, config, pool)
        print(f"lambda = {weight:g} of {candidates}", flush=True)
        held_out.result()
        config = replace(config, alignment=replace(config.alignment, weight=weight))
        seeds = range(1, arguments.seeds + 1)
        jobs = [pool.submit(run_seed, out / f"seed{seed}", replace(config, seed=seed)) for seed in seeds]
        by_seed = [job.result() for job in jobs]
    result = {
        "environment": environment(),
        "config": to_dict(config),
        "lambda": {"chosen": weight, "validation": candidates},
        "seeds": list(seeds),
        "summary": summarize(by_seed),
        "runs": [
            {"arm": r["arm"], "seed": r["seed"], "attention": r["attention"], "answers": r["answers"]}
            for s in by_seed
            for r in s.values()
        ],
    }
    for path in filter(None, (out / "study.json", arguments.json)):
        path.write_text(json.dumps(result, indent=1) + "\n")
        plot(result["summary"], path.with_suffix(".svg"))
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
