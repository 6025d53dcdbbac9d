"""Does alignment make better answers? The small world's study: learning curves with controls, registered before it was run.

    python bench/alignment_study.py --out runs/alignment [--cells grid main ...] [--json bench/results/alignment_study.json]

`bench/alignment_study.md` is the plan: what is asked, the arms, seeds, measures, and how the grid chooses; it was committed before
the first run of the main cell. Every finished run is a file below the output folder: the same command continues after an
interruption, within a run from its last 200 steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from alignment_results import CELLS, CURVES, area, by_type, plot, summarize, summary_line, title_of
from filelock import FileLock
from transformers import LlavaForConditionalGeneration

from lavender import choose_heads, patch
from lavender.batches.collator import Collator
from lavender.config import PUBLISHED, AlignmentConfig, TeacherConfig, WordsConfig, to_dict
from lavender.files import write_within
from lavender.miniworld import STUDENT, experiment
from lavender.miniworld.language import (
    BEFORE_FALL,
    CAPTION,
    LanguageStage,
    QuestionSet,
    conversation_of,
    features_of,
    pointing,
    right_answers,
    small_student,
    train_language,
)
from lavender.miniworld.packing import PackedPictures
from lavender.miniworld.report import environment
from lavender.miniworld.scenes import DESCRIBE, Question, Scene, World, ask_all, make_scenes
from lavender.miniworld.stores import agnostic_targets, exact_targets, shuffled_targets, teacher_targets
from lavender.students.channels import is_chosen
from lavender.students.loading import load_student
from lavender.targets.store import TargetStore

TEACHER = TeacherConfig(inversion="noise", timesteps=(151,), map_size=8)
COMMON = experiment.WORLDS["in distribution"]
WORLDS: dict[str, World] = {
    **experiment.WORLDS,
    "small": replace(COMMON, counts=(2, 3), shares=(0.5, 0.5), radii=(("small", (4.5, 6.0)),)),
    "rare pairs": World(pairs="rare"),
    "noise": replace(COMMON, noise=30.0),
    "other backgrounds": replace(COMMON, backgrounds=("rings", "slopes")),
    "cue": replace(COMMON, cue=0.9),
    "broken cue": replace(COMMON, cue=0.0),
}
TEST_SEED, OTHER_SEED, VALIDATION_SEED = 2001, 2002, 950
TEST_PICTURES, CURVE_PICTURES = 300, 100
TESTS: dict[str, tuple[str, int]] = {
    **{name: (name, TEST_SEED) for name in ("in distribution", "clutter", "small", "rare pairs", "noise")},
    "other seed": ("in distribution", OTHER_SEED),
    "other backgrounds": ("other backgrounds", OTHER_SEED + 1),
}
"""Test sets of every cell: the world, and the seed of its pictures."""
CUE_TESTS = {"cue": ("cue", TEST_SEED), "broken cue": ("broken cue", TEST_SEED)}
SEEDS = (1, 2, 3, 4, 5)
GRID_SEEDS = (901, 902)


@dataclass(frozen=True)
class Recipe:
    """What of a student is aligned with what.

    Attributes:
        alignment, words: as everywhere.
        referents: whether answers that name nothing are compared too; see `conversation_of`.
    """

    alignment: AlignmentConfig
    words: WordsConfig
    referents: bool = False


BASE = Recipe(
    AlignmentConfig(weight=1.0, rows="predicts", question_rows="reads", aligner="identity"),
    WordsConfig(roles=("question", "answer")),
)
"""The screen's recipe, from which the grid starts."""
LAVENDER = Recipe(PUBLISHED, WordsConfig(exclude=()))
"""The published settings: the answers' words alone, by the rows that predict them."""


def _with(base: Recipe, **changes: Any) -> Recipe:
    words = {name: changes.pop(name) for name in ("roles", "exclude") if name in changes}
    referents = changes.pop("referents", base.referents)
    return Recipe(replace(base.alignment, **changes), replace(base.words, **words), referents)


PLACES: dict[str, Recipe] = {
    "base": BASE,
    **{f"layer {layer}": _with(BASE, layers=(layer,)) for layer in range(3)},
    "best layer": _with(BASE, layers="best:1"),
    **{f"best {count} heads": _with(BASE, heads=f"best:{count}") for count in (2, 4)},
}
"""The layers and heads that the grid tries first."""
PLACED = PLACES["layer 2"]
"""What it chose of them."""
GRID: dict[str, Recipe] = {
    **{f"weight {weight:g}": _with(PLACED, weight=weight) for weight in (0.1, 0.3, 3.0, 10.0)},
    "question words alone": _with(PLACED, roles=("question",)),
    "answers alone": _with(PLACED, roles=("answer",)),
    "all words": _with(PLACED, exclude=()),
    "referents": _with(PLACED, referents=True),
    "both rows": _with(PLACED, rows="both", question_rows="both"),
    "answers by reading rows": _with(PLACED, rows="reads"),
    "sim aligner": _with(PLACED, aligner="sim"),
    "minmax": _with(PLACED, normalization="minmax"),
    "kl": _with(PLACED, normalization="sum", distance="kl"),
    "renormalized": _with(PLACED, renormalize=True),
    "until half": _with(PLACED, until=0.5),
    "linear": _with(PLACED, schedule="linear"),
}
"""What the grid tries then, each in one thing other than that."""
CHOSEN = PLACED
"""What the grid chose."""
RECIPES = {"chosen": CHOSEN, "lavender": LAVENDER, "placed": PLACED, **PLACES, **GRID}
RATES = {"plain": 2e-3, "aligned": 3e-3}
"""What the grid chose."""
GRID_RATES = (1e-3, 2e-3, 3e-3)
SHIPPED_RATE = 5e-4
"""For a student that is trained already: a sixth of what the others get."""
LONGER_STEPS, LONGEST_STEPS = 2800, 4800
"""Steps of the plain student that had as much CPU time as the aligned one, and twice its steps."""
EARLY_SEED, EARLY_PICTURES, EARLY_STEPS = 990, 3000, 300
VALIDATION = {name: (name, VALIDATION_SEED) for name in CURVES}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        cell: what it is part of.
        arm: what it is trained with: `plain`, `captions` (plain, and the captions too), or whose targets.
        seed: of its pictures, weights and order.
        student: `random` (width 64, 3 layers, random weights), `early` (the same after 300 plain steps on other pictures) or
            `shipped`.
        pictures, steps, learning_rate: of the training.
        recipe: what is aligned, and its name.
        world: of its pictures.
        begins: the run whose first steps are the same.
    """

    cell: str
    arm: str
    seed: int
    student: str = "random"
    pictures: int = 1000
    steps: int = 2400
    learning_rate: float = 0.0
    recipe: str = "chosen"
    world: str = "in distribution"
    begins: str = ""

    @property
    def name(self) -> str:
        """Its folder's."""
        return f"{self.cell}/{title_of(asdict(self))}-{self.seed}".replace(", ", "_").replace(" ", "_")

    @property
    def rate(self) -> float:
        """Its learning rate: its arm's own, if none is given."""
        return self.learning_rate or RATES["plain" if self.arm in PLAIN else "aligned"]

    @property
    def data_seed(self) -> int:
        """Of its pictures, which no other seed's are among."""
        return 1000 + self.seed


PLAIN = ("plain", "captions")
"""Arms without targets."""


@cache
def scenes_of(world: str, seed: int, count: int) -> list[Scene]:
    """The first pictures of a world."""
    return list(make_scenes(seed, count, world=WORLDS[world]))


@cache
def start_of(student: str, seed: int, out: Path) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """A student's first weights, its config and its processor."""
    if student == "shipped":
        model, processor = load_student(STUDENT)
    else:
        model, processor = small_student(seed)
    if student == "early":
        early = question_set("in distribution", EARLY_SEED, EARLY_PICTURES, None, BASE)
        stage = LanguageStage(steps=EARLY_STEPS * 5 // 4, seed=EARLY_SEED)
        model, _ = small_student(EARLY_SEED)
        with FileLock(out / "early.lock"):
            if not (out / "early" / BEFORE_FALL).exists():
                train_language(model, early, stage, out / "early")
        weights = torch.load(out / "early" / BEFORE_FALL, weights_only=True)["weights"]
        model.load_state_dict(weights, strict=False)
    return {name: value.clone() for name, value in model.state_dict().items()}, model.config, processor


@cache
def features_of_world(world: str, seed: int, count: int) -> torch.Tensor:
    """What the frozen tower, which all students share, makes of the first pictures of a world."""
    model, processor = load_student(STUDENT)
    return features_of(model, processor, scenes_of(world, seed, count))


def question_set(
    world: str, seed: int, count: int, store: TargetStore | None, recipe: Recipe, captions: bool = False
) -> QuestionSet:
    """The questions about the first pictures of a world, with the targets of a store."""
    model, processor = load_student(STUDENT)
    scenes = scenes_of(world, seed, count)
    asked = [[*ask_all(scene, seed), *([Question(CAPTION, DESCRIBE, scene.caption)] if captions else [])] for scene in scenes]
    collator = Collator(processor, store, recipe.words, model_config=model.config, on_error="raise")
    conversations = (
        conversation_of(str(n), *pair, referents=recipe.referents) for n, pair in enumerate(zip(scenes, asked, strict=True))
    )
    packed = PackedPictures(collator, conversations)
    return QuestionSet(packed, features_of_world(world, seed, count), [[q.type for q in questions] for questions in asked])


@cache
def test_set(name: str, seed: int, count: int, out: Path) -> QuestionSet:
    """A test set, with exact masks for the words of questions and answers."""
    folder = out / "tests" / f"{name.replace(' ', '_')}-{seed}-{count}"
    with FileLock(out / "stores.lock"):  # every process asks for it
        store = exact_targets(folder, scenes_of(name, seed, count), TEACHER.map_size)
    return question_set(name, seed, count, store, BASE)


def batches_of(data: QuestionSet, model: Any, count: int = 200) -> Iterator[dict[str, Any]]:
    """The questions about the first pictures, by which layers and heads are chosen."""
    for first in range(0, count, 25):
        pictures = range(first, first + 25)
        yield data.batch(model, pictures, [range(len(data.kinds[picture])) for picture in pictures], with_words=True)


def store_of(run: Run, out: Path) -> TargetStore | None:
    """The targets of a run's arm. Runs of several cells share them."""
    if run.arm in PLAIN:
        return None
    with FileLock(out / "stores.lock"):
        return _made(run, out)


def _made(run: Run, out: Path) -> TargetStore:
    scenes = scenes_of(run.world, run.data_seed, run.pictures)
    folder = out / "data" / f"{run.world.replace(' ', '_')}-{run.data_seed}-{run.pictures}"
    if run.arm == "exact":
        return exact_targets(folder / "exact", scenes, TEACHER.map_size)
    teacher = teacher_targets(folder, scenes, TEACHER, progress=False)
    if run.arm == "shuffled":
        return shuffled_targets(folder / "shuffled", teacher, run.seed)
    if run.arm == "agnostic":
        return agnostic_targets(folder / "agnostic", teacher)
    return teacher


def execute(run: Run, out: Path) -> dict[str, Any]:
    """Trains and measures, or reads what an earlier call found."""
    folder = out / "runs" / run.name
    path = folder / "result.json"
    if path.exists():
        return json.loads(path.read_text())
    weights, config, _ = start_of(run.student, run.seed, out)
    torch.manual_seed(run.seed)
    model = LlavaForConditionalGeneration(config)
    model.load_state_dict(weights)
    captions, recipe = run.arm == "captions", RECIPES[run.recipe]
    data = question_set(run.world, run.data_seed, run.pictures, store_of(run, out), recipe, captions)
    tests = VALIDATION if run.cell not in CELLS else {**TESTS, **(CUE_TESTS if run.world == "cue" else {})}
    curve = {name: test_set(*tests[name], CURVE_PICTURES, out) for name in CURVES}

    def measure(student: Any) -> dict[str, Any]:
        return {name: by_type(right_answers(student, questions)) for name, questions in curve.items()}

    alignment = None if run.arm in PLAIN else recipe.alignment
    if alignment is not None and not is_chosen(alignment):
        alignment = choose_heads(model, alignment, batches_of(data, model)).config
    history = train_language(
        model,
        data,
        LanguageStage(steps=run.steps, learning_rate=run.rate, seed=run.seed),
        folder,
        alignment=alignment,
        measure=measure,
        start=out / "runs" / run.begins if run.begins else None,
    )
    count = CURVE_PICTURES if run.cell not in CELLS else TEST_PICTURES
    answers = {name: by_type(right_answers(model, test_set(*where, count, out))) for name, where in tests.items()}
    with patch(model, replace(BASE.alignment, aligner="identity")) as handle:
        looks = {name: pointing(handle, test_set(*tests[name], CURVE_PICTURES, out)) for name in CURVES}
    settings = asdict(run) | {"learning_rate": run.rate, "alignment": None if alignment is None else to_dict(alignment)}
    result = {"name": run.name, **settings, "answers": answers, "pointing": looks, "history": history}
    write_within(folder, path.name, json.dumps(result) + "\n")
    print(f"{time.strftime('%H:%M:%S')} {run.name}: {summary_line(result)}", flush=True)
    return result


def _shipped(arm: str, seed: int, recipe: str) -> Run:
    return Run("shipped", arm, seed, student="shipped", steps=800, learning_rate=SHIPPED_RATE, recipe=recipe)


def cells() -> dict[str, list[Run]]:
    """Every run of the study, seed by seed, so that the runs of a seed find its pictures ready."""
    found: dict[str, list[Run]] = {
        name: [] for name in ("places", "rates", "grid", "main", "300", "3000", "early", "shipped", "cue")
    }
    for seed in GRID_SEEDS:
        found["places"] += [Run("grid", "teacher", seed, steps=800, recipe=name) for name in PLACES]
        for arm, recipe in (("plain", "base"), ("teacher", "placed")):
            found["rates"] += [
                Run(f"rates/{rate:g}", arm, seed, steps=800, learning_rate=rate, recipe=recipe) for rate in GRID_RATES
            ]
        found["grid"] += [Run("grid", "teacher", seed, steps=800, recipe=name) for name in GRID]
    for seed in SEEDS:
        plain = Run("main", "plain", seed)
        found["main"] += [plain, *(Run("main", arm, seed) for arm in ("teacher", "shuffled", "exact"))]
        found["main"] += [
            Run("main", "teacher", seed, recipe="lavender"),
            *(Run("main", arm, seed) for arm in ("agnostic", "captions")),
        ]
        found["main"] += [replace(plain, steps=steps, begins=plain.name) for steps in (LONGER_STEPS, LONGEST_STEPS)]
        found["shipped"] += [_shipped("teacher", seed, recipe) for recipe in ("base", "best 2 heads")]
        for arm in ("plain", "teacher", "shuffled"):
            found["300"].append(Run("300", arm, seed, pictures=300, steps=1200))
            found["3000"].append(Run("3000", arm, seed, pictures=3000, steps=1200))
            found["early"].append(Run("early", arm, seed, student="early", steps=1200))
            found["shipped"].append(_shipped(arm, seed, "chosen"))
            found["cue"].append(Run("cue", arm, seed, world="cue", steps=1200))
    return found


def step_costs(out: Path, rounds: int = 12) -> dict[str, float]:
    """CPU milliseconds of a plain and of an aligned step, ten of each in turn: the median over rounds, without measuring."""
    costs: dict[str, list[float]] = {"plain": [], "teacher": []}
    for n in range(rounds):
        for arm in costs:
            run = Run("costs", arm, GRID_SEEDS[0])
            weights, config, _ = start_of("random", run.seed, out)
            model = LlavaForConditionalGeneration(config)
            model.load_state_dict(weights)
            recipe = RECIPES[run.recipe]
            data = _cost_data(arm, out)
            folder = out / "costs" / f"{arm}-{n}"
            alignment = None if arm == "plain" else recipe.alignment
            history = train_language(model, data, LanguageStage(steps=40), folder, alignment=alignment, measure_every=10)
            costs[arm].append((history[-1]["cpu_s"] - history[0]["cpu_s"]) / 30 * 1e3)
    return {arm: round(statistics.median(values), 2) for arm, values in costs.items()}


@cache
def _cost_data(arm: str, out: Path) -> QuestionSet:
    run = Run("costs", arm, GRID_SEEDS[0])
    return question_set(run.world, run.data_seed, run.pictures, store_of(run, out), RECIPES[run.recipe])


def grid_figures(results: Iterable[dict[str, Any]]) -> dict[str, list[float]]:
    """What the grid chooses by, per run's name without the seed."""
    found: dict[str, list[float]] = {}
    for result in results:
        if result["cell"] not in CELLS:
            found.setdefault(result["name"].rpartition("-")[0], []).append(round(area(result["history"]), 4))
    return found


def _run_all(runs: Sequence[Run], out: Path) -> list[dict[str, Any]]:
    """The runs of one seed of a cell, in one process, with one thread."""
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    return [execute(run, out) for run in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--json", type=Path, help="also write the results here, and a plot beside them")
    parser.add_argument("--jobs", type=int, default=2, help="processes; each uses one core")
    parser.add_argument("--cells", nargs="+", choices=list(cells()), default=list(cells()))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    every = cells()
    groups: dict[tuple[str, int], list[Run]] = {}
    for cell in arguments.cells:
        for run in every[cell]:
            groups.setdefault((cell, run.seed), []).append(run)
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_run_all, runs, arguments.out) for runs in groups.values()]
        costs = pool.submit(step_costs, arguments.out) if arguments.json else None
        results = [result for job in jobs for result in job.result()]
        document = {
            "environment": environment(),
            "recipes": {
                name: {"alignment": to_dict(r.alignment), "words": to_dict(r.words), "referents": r.referents}
                for name, r in RECIPES.items()
            },
            "teacher": to_dict(TEACHER),
            "step_costs_ms": None if costs is None else costs.result(),
            "grid": grid_figures(results),
            "summary": summarize(result for result in results if result["cell"] in CELLS),
            "runs": results,
        }
    for path in filter(None, (arguments.out / "study.json", arguments.json)):
        path.write_text(json.dumps(document) + "\n")
        plot(document["summary"], path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
