"""`report.html`: one self-contained file that shows where teacher and student look, and what alignment changed."""

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

from ..errors import DataError
from ..files import read_file, write_within
from ..maps import overlay

RESULTS = "results.json"
EXAMPLES = "examples.npz"

TITLES = {
    "before": "Student before",
    "none": "Plain fine-tuning",
    "teacher": "Lavender",
    "oracle": "Lavender, exact masks",
    "shuffled": "Lavender, shuffled maps",
}
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


def save_examples(
    folder: Path,
    images: Sequence[Image.Image],
    captions: Sequence[str],
    words: Sequence[Sequence[str]],
    maps: Mapping[str, Sequence[Sequence[np.ndarray]]],
) -> None:
    """Writes a few pictures and every arm's maps of their words, which `write_report` draws as heat maps.

    `maps[arm][i]` has a map [y, x] for each of `words[i]`, the words of image i.
    """
    arrays: dict[str, np.ndarray] = {}
    for i, image in enumerate(images):
        arrays[f"{i}/picture"] = np.asarray(image.convert("RGB"))
        arrays[f"{i}/caption"] = np.array(captions[i])
        arrays[f"{i}/words"] = np.array(list(words[i]))
        for arm, maps_per_image in maps.items():
            arrays[f"{i}/{arm}"] = np.stack(maps_per_image[i]).astype(np.float32)
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    write_within(folder, EXAMPLES, file.getvalue())


def write_report(run: str | Path) -> Path:
    """Renders `results.json` and `examples.npz` of a demo's folder to `report.html` in it; returns its path.

    Raises `DataError` when the folder has no results.
    """
    from jinja2 import Environment, PackageLoader, select_autoescape

    run = Path(run)
    if not (run / RESULTS).exists():
        raise DataError(f"{run} has no {RESULTS}; expected the folder of a finished `lavender demo`")
    try:
        results = json.loads(read_file(run / RESULTS))
    except json.JSONDecodeError as error:
        raise DataError(f"{run / RESULTS} is damaged ({error}); run the demo again") from None
    page = Environment(loader=PackageLoader("lavender.miniworld", ""), autoescape=select_autoescape(default=True), trim_blocks=True)
    html = page.get_template("report.html.jinja").render(
        results=results,
        rows=table_rows(results),
        answer_rows=answer_rows(results),
        titles=TITLES,
        examples=_draw_examples(run / EXAMPLES),
        curves=_draw_curves(results),
        config=json.dumps(results["config"], indent=2),
    )
    path = run / "report.html"
    write_within(run, path.name, html)
    return path


def table_rows(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """The localization table: a title and a `Localization` per row, controls beside what they control."""
    rows: list[tuple[str, Mapping[str, float]]] = []
    teacher = results.get("teacher")
    if teacher:
        rows += [("Teacher", teacher["maps"]), ("Teacher, word-agnostic control", teacher["control"])]
    for arm in results["arms"]:
        title = TITLES.get(arm["name"], arm["name"])
        raw, aligned = arm["attention"]["raw"], arm["attention"]["aligned"]
        rows += [(f"{title}: raw attention", raw["maps"]), (f"{title}: word-agnostic control", raw["control"])]
        if aligned["maps"] != raw["maps"]:  # the identity aligner changes nothing
            rows.append((f"{title}: after the aligner", aligned["maps"]))
    rows.append(("Chance", results["arms"][0]["attention"]["raw"]["chance"]))
    return rows


def answer_rows(results: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Answer accuracy: question type, then `share [low, high]` per arm."""
    kinds = list(results["arms"][0]["answers"])
    return [
        (kind, ["{accuracy:.3f} [{low:.3f}, {high:.3f}]".format(**arm["answers"][kind]) for arm in results["arms"]])
        for kind in kinds
    ]


def _draw_examples(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with np.load(io.BytesIO(read_file(path))) as arrays:
        stored = dict(arrays)
    examples = []
    for i in range(1 + max(int(key.split("/")[0]) for key in stored)):
        pixels, words = stored[f"{i}/picture"], [str(w) for w in stored[f"{i}/words"]]
        arms = [key.split("/")[1] for key in stored if key.startswith(f"{i}/")]
        rows = [
            (
                "Teacher" if arm == "diffusion" else TITLES.get(arm, arm),
                [_to_uri(Image.fromarray(overlay(pixels, values))) for values in stored[f"{i}/{arm}"]],
            )
            for arm in arms
            if arm not in ("picture", "caption", "words")
        ]
        caption, image = str(stored[f"{i}/caption"]), _to_uri(Image.fromarray(pixels))
        examples.append({"caption": caption, "image": image, "words": words, "rows": rows})
    return examples


def _draw_curves(results: Mapping[str, Any]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for arm in results["arms"]:
        history = arm.get("history") or []
        if not history:
            continue
        title = TITLES.get(arm["name"], arm["name"])
        weight = results["config"]["alignment"]["weight"]
        steps = [entry["step"] for entry in history]
        left.plot(steps, [entry["loss"] for entry in history], label=title)
        if "alignment_loss" in history[0]:
            right.plot(steps, [entry["alignment_loss"] for entry in history], label=f"{title} (weight {weight:g})")
    left.set(title="Training loss (as optimized)", xlabel="step")
    right.set(title="Alignment loss", xlabel="step")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _to_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
