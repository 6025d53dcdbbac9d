"""`report.html`: one self-contained file that shows what two students answer, and where they look."""

from __future__ import annotations

import base64
import io
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DataError, first_line, importing
from ..files import read_json, write_within
from ..maps import overlay
from . import HELD_OUT_SEED
from .experiment import ARMS, MAIN_WORLD, WORLDS
from .measures import RESAMPLES
from .results import SHAPE, impossible, misfit
from .scenes import Scene, make_scene

RESULTS = "results.json"
STUDY = Path(__file__).parent / "study.json"
"""The study's headline: what the demo's difference is over several seeds."""

TITLES = {"plain": "Plain", "aligned": "With the teacher's maps"}
TILE = 192
"""Pixels of a drawn map's side."""
_PACKAGES = ("lavender-attention", "torch", "transformers", "diffusers", "peft", "accelerate", "datasets", "numpy")


def environment() -> dict[str, str]:
    """Machine and package versions, for reports and benchmark results."""
    machine = {"python": sys.version.split()[0], "system": f"{platform.system()} {platform.machine()}", "cpus": str(os.cpu_count())}
    for package in _PACKAGES:
        try:
            machine[package] = version(package)
        except PackageNotFoundError:
            machine[package] = "not installed"
    return machine


def read_results(run: str | Path) -> dict[str, Any]:
    """The results of a finished demo. Raises `DataError` when the folder has none that this version can read."""
    path = Path(run) / RESULTS
    if not path.exists():
        raise DataError(f"{run} has no {RESULTS}; expected the folder of a finished `lavender demo`")
    try:
        results: Any = read_json(path)
    except ValueError as error:
        raise DataError(f"{path} is damaged ({first_line(error)}); run the demo again") from None
    if isinstance(results, dict) and "arms" in results:
        raise DataError(
            f"{path} is of an earlier version of lavender, and so is the report beside it; run the demo again, elsewhere"
        )
    if problem := misfit(results, SHAPE) or impossible(results):
        raise DataError(f"{path} is damaged ({problem}); run the demo again")
    return results


def write_report(run: str | Path) -> Path:
    """Renders `results.json` of a demo's folder to `report.html` in it; returns its path.

    Raises `DataError` when the folder has no results.
    """
    with importing():
        from jinja2 import Environment, PackageLoader, select_autoescape

    run, results = Path(run), read_results(run)
    page = Environment(loader=PackageLoader("lavender.miniworld", ""), autoescape=select_autoescape(default=True), trim_blocks=True)
    html = page.get_template("report.html.jinja").render(
        results=results,
        headline=headline(results),
        study=study_line(),
        arms=ARMS,
        titles=TITLES,
        worlds=[world for world in WORLDS if world in results["answers"]],
        percent=percent,
        points=points,
        unclear=unclear,
        examples=[_draw_example(example) for example in results["examples"]],
        chart=_chart(results["history"]),
        costs=_costs(results["history"]),
        attention=attention_rows(results),
        resamples=RESAMPLES,
        reading=_reading(results["config"]["alignment"]),
        config=json.dumps(results["config"], indent=2),
    )
    path = run / "report.html"
    write_within(run, path.name, html)
    return path


def percent(share: float) -> str:
    """`0.84` as `84 %`, which no line breaks."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def points(value: Mapping[str, float]) -> str:
    """A difference of shares with its interval, in points: `+24 (+20 to +28)`."""
    return "{:+d} ({:+d} to {:+d})".format(*(round(100 * value[name]) for name in ("mean", "low", "high")))


def headline(results: Mapping[str, Any]) -> str:
    """The difference in answers, in a sentence."""
    row = results["answers"][MAIN_WORLD]["all"]
    first, second, difference = row["first"]["mean"], row["second"]["mean"], row["difference"]
    return (
        f"With the teacher's maps {percent(second)} of the answers are right, without them {percent(first)}: "
        f"{points(difference)} points."
    )


def study_line() -> str | None:
    """What the study found over several seeds, in a sentence; None in a package without its figures."""
    if not STUDY.exists():
        return None
    study = json.loads(STUDY.read_text())["headline"]
    found = (
        f"after {at['steps']:,} steps {percent(at['teacher'])} with the maps and {percent(at['plain'])} without, "
        f"{points(at['difference'])} points"
        for at in study["results"]
    )
    return f"Over the study's {study['seeds']} seeds ({study['pictures']:,} pictures): {'; '.join(found)}."


def unclear(rows: Mapping[str, Any]) -> dict[str, list[str]]:
    """The types of questions by what their figures say: where the aligned student is `"better"` or `"worse"`, where the interval of
    the difference holds zero (`"even"`), and where it is not above the most frequent answer (`"guessed"`)."""
    kinds = {kind: row for kind, row in rows.items() if kind != "all"}
    return {
        "better": [kind for kind, row in kinds.items() if row["difference"]["low"] > 0],
        "worse": [kind for kind, row in kinds.items() if row["difference"]["high"] < 0],
        "even": [kind for kind, row in kinds.items() if row["difference"]["low"] <= 0 <= row["difference"]["high"]],
        "guessed": [kind for kind, row in kinds.items() if row["second"]["low"] <= row["usual"]],
    }


def attention_rows(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """The localization table: a title and a `Localization` per row, controls beside what they control."""
    rows: list[tuple[str, Mapping[str, float]]] = []
    for role, title in (("question", "Words of questions"), ("answer", "Answers")):
        of_role = {arm: results["attention"][arm][role] for arm in ARMS}
        for arm in ARMS:
            rows += [
                (f"{title}: {TITLES[arm].lower()}", of_role[arm]["maps"]),
                (f"{title}: {TITLES[arm].lower()}, word-agnostic control", of_role[arm]["control"]),
            ]
        rows.append((f"{title}: chance", of_role["plain"]["chance"]))
    teacher = results["teacher"]
    return [
        *rows,
        ("The teacher itself, on captions", teacher["maps"]),
        ("The teacher: word-agnostic control", teacher["control"]),
        ("The teacher: chance", teacher["chance"]),
    ]


def example_scene(example: Mapping[str, Any]) -> Scene:
    """The scene of an example."""
    return make_scene(HELD_OUT_SEED, example["picture"], WORLDS[MAIN_WORLD])


def draw_map(scene: Scene, values: Sequence[Sequence[float]], object_index: int | None) -> np.ndarray:
    """A map over a scene's picture, with the outline of an object; uint8 [TILE, TILE, 3]."""
    picture = np.asarray(scene.image.resize((TILE, TILE), Image.Resampling.BICUBIC))
    drawn = overlay(picture, np.array(values, np.float32))
    if object_index is None:
        return drawn
    if not 0 <= object_index < len(scene.masks):
        raise DataError(f"the results name object {object_index} of a picture with {len(scene.masks)}; run the demo again")
    return _outline(drawn, scene.masks[object_index])


def draw_scene(scene: Scene) -> np.ndarray:
    """A scene's picture with the outline of every object; uint8 [TILE, TILE, 3]."""
    picture = np.asarray(scene.image.resize((TILE, TILE), Image.Resampling.BICUBIC))
    return _outline(picture, scene.masks.any(axis=0))


def _outline(picture: np.ndarray, mask: Any) -> np.ndarray:
    """The border of a mask [64, 64], white in black, on a picture of a multiple of its size."""
    resized = Image.fromarray(mask.astype(np.float32)).resize(picture.shape[1::-1], Image.Resampling.BICUBIC)
    large = np.asarray(resized) > 0.5
    inner, outer = _grown(large, 2), _grown(large, 4)
    result = picture.copy()
    result[outer & ~large] = 0
    result[inner & ~large] = 255
    return result


def _grown(mask: np.ndarray, by: int) -> np.ndarray:
    """The places at most so many from one that is in a mask."""
    for _ in range(by):
        padded = np.pad(mask, 1)
        mask = mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask


def _draw_example(example: Mapping[str, Any]) -> dict[str, Any]:
    scene = example_scene(example)
    questions = []
    for question in example["questions"]:
        words = [
            word | {"images": {arm: _to_uri(draw_map(scene, values, word["object"])) for arm, values in word["maps"].items()}}
            for word in question["words"]
        ]
        questions.append(question | {"words": words})
    found = {
        arm: [word["found"][arm] for question in example["questions"] for word in question["words"] if "found" in word]
        for arm in ARMS
    }
    right = {arm: [q["said"][arm] == q["answer"] for q in example["questions"]] for arm in ARMS}
    return {
        "image": _to_uri(draw_scene(scene)),
        "caption": scene.caption,
        "questions": questions,
        "found": {arm: f"{sum(hits)} of {len(hits)}" for arm, hits in found.items()},
        "right": {arm: f"{sum(hits)} of {len(hits)}" for arm, hits in right.items()},
    }


_ROWS = {
    "predicts": "the row that predicts it",
    "reads": "the row that reads it",
    "both": "the rows that predict and read it",
    "last": "the row that reads its last token",
}


def _reading(alignment: Mapping[str, Any]) -> str:
    """Which attention the maps are of, in words."""

    def where(layers: Any, heads: str) -> str:
        named = "all layers" if not layers else f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
        return f"heads {heads}" if heads != "mean" else f"all heads of {named}"

    of_answer = where(alignment["layers"], alignment["heads"])
    layers, heads = (alignment[f"question_{name}"] for name in ("layers", "heads"))
    of_question = where(alignment["layers"] if layers is None else layers, heads or alignment["heads"])
    rows = alignment["question_rows"] or alignment["rows"]
    places = of_answer if of_answer == of_question else f"{of_question}; of an answer {of_answer}"
    return f"of a word of the question {_ROWS[rows]}, of an answer (→) {_ROWS[alignment['rows']]}; the mean over {places}"


def _shares(history: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """The learning curve: steps, and the mean share of right answers over the types of questions."""
    return [(entry["step"], float(np.mean(list(entry["answers"].values())))) for entry in history]


_CHART = (480, 300)
_FRAME = (44, 12, 468, 258)
"""Of the plot in the chart: left, top, right, bottom."""


def _chart(histories: Mapping[str, Any]) -> dict[str, Any]:
    """The learning curves as coordinates of an SVG picture."""
    left, top, right, bottom = _FRAME
    last = max(entry["step"] for history in histories.values() for entry in history)

    def x(step: float) -> float:
        return round(left + (right - left) * step / last, 1)

    def y(share: float) -> float:
        return round(bottom - (bottom - top) * share, 1)

    return {
        "size": _CHART,
        "frame": _FRAME,
        "curves": {arm: [(x(step), y(share), step, share) for step, share in _shares(histories[arm])] for arm in ARMS},
        "steps": [(x(last * n / 4), f"{round(last * n / 4):,}") for n in range(5)],
        "shares": [(y(n / 5), percent(n / 5)) for n in range(6)],
    }


def _costs(histories: Mapping[str, Any]) -> dict[str, Any]:
    """What a step costs, and when the aligned student has what the plain one ends with."""
    last = {arm: histories[arm][-1] for arm in ARMS}
    per_step = {arm: entry["cpu_s"] / entry["step"] for arm, entry in last.items()}
    end = _shares(histories["plain"])[-1][1]
    reached = next((n for n, (_, share) in enumerate(_shares(histories["aligned"])) if share >= end), None)
    return {
        "ms": {arm: 1000 * seconds for arm, seconds in per_step.items()},
        "ratio": per_step["aligned"] / per_step["plain"],
        "cpu_s": {arm: entry["cpu_s"] for arm, entry in last.items()},
        "steps": {arm: entry["step"] for arm, entry in last.items()},
        "end": end,
        "reached": None if reached is None else histories["aligned"][reached],
    }


def _to_uri(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
