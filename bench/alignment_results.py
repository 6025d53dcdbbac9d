"""What the alignment study found: figures, tables and the plot, made of its runs.

    python bench/alignment_results.py

writes, from `bench/results/alignment_study.json`, the tables of `docs/alignment-study.md`, the plot beside the JSON, and what the
demo's report cites (`lavender/miniworld/study.json`).
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lavender.miniworld.experiment import UNASKED
from lavender.miniworld.language import CAPTION
from lavender.miniworld.scenes import STUDY_TYPES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "alignment_study.json"
PAGE = ROOT / "docs" / "alignment-study.md"
HEADLINE = ROOT / "lavender" / "miniworld" / "study.json"

CURVES = ("in distribution", "clutter")
"""Test sets that are asked every 100 steps."""
CELLS = ("main", "300", "3000", "early", "shipped", "cue")
"""What is summarized; the other runs choose."""
LONGER = ("plain, 2800 steps", "plain, 4800 steps")
"""The plain student with as much CPU time as the aligned one, and with twice its steps."""
BESIDE = ("plain", "shuffled", "agnostic", "captions", *LONGER)
"""Arms that the others are compared with."""
LEVELS = (0.7, 0.8, 0.9)
EARLIER = 800
"""The step of the screen's end, which the headline has beside the last one."""
COLORS_OF = {
    "plain": "#777777",
    "teacher": "#6f51a8",
    "exact": "#2a8c82",
    "shuffled": "#c8553d",
    "agnostic": "#d9a441",
    "captions": "#4a7fb5",
    "teacher lavender": "#b58fd8",
}
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Two-sided 95 % quantiles of Student's t by degrees of freedom."""

Counts = Mapping[str, Sequence[int]]
"""Right answers and questions by type."""


def by_type(right: dict[str, list[bool]]) -> dict[str, list[int]]:
    """Right answers and questions by type."""
    return {kind: [sum(hits), len(hits)] for kind, hits in right.items() if kind != CAPTION}


def share(counts: Counts, world: str, kinds: Iterable[str] = STUDY_TYPES) -> float:
    """Right answers in a test set: the mean over the types of question, but for those that no training could teach."""
    return statistics.mean(counts[kind][0] / counts[kind][1] for kind in kinds if kind not in UNASKED.get(world, ()))


def area(history: list[dict[str, Any]]) -> float:
    """What the grid chooses by: the mean share over the second half of a learning curve, in distribution and in clutter."""
    half = history[len(history) // 2 :]
    return statistics.mean(share(entry[name], name) for entry in half for name in CURVES)


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean with its 95 % interval by Student's t over seeds."""
    mean = statistics.mean(values)
    half = T_95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}


def steps_to(history: list[dict[str, Any]], level: float) -> int | None:
    """The first measured step at which the share in distribution reaches a level and keeps it at the next; None if none does."""
    shares = [share(entry["in distribution"], "in distribution") for entry in history]
    reached = (n for n, value in enumerate(shares) if value >= level and (n + 1 == len(shares) or shares[n + 1] >= level))
    return next((history[n]["step"] for n in reached), None)


def title_of(run: Mapping[str, Any]) -> str:
    """A run's arm, with what tells it from others of its cell."""
    more = "" if run["recipe"] == "chosen" else f" {run['recipe']}"
    return run["arm"] + more + (f", {run['steps']} steps" if run["begins"] else "")


def summary_line(result: dict[str, Any]) -> str:
    """A finished run in one line."""
    shares = ", ".join(f"{name} {share(counts, name):.3f}" for name, counts in result["answers"].items())
    return f"{shares}; {result['history'][-1]['cpu_s'] / result['steps'] * 1e3:.1f} ms a step"


def summarize(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Per cell and arm: shares by test set and type, differences paired by seed, pointing, steps to a level."""
    by_cell: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for result in results:
        by_cell.setdefault(result["cell"], {}).setdefault(title_of(result), {})[result["seed"]] = result
    return {cell: _summarize_cell({title: by_cell[cell][title] for title in sorted(by_cell[cell], key=_order)}) for cell in by_cell}


def _order(title: str) -> tuple[int, str]:
    """Arms in the plan's order."""
    known = [*COLORS_OF]
    return (known.index(title) if title in known else len(known), title)


def _summarize_cell(arms: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for title, runs in arms.items():
        entry: dict[str, Any] = {"seeds": sorted(runs), "answers": {}}
        for name, kinds in next(iter(runs.values()))["answers"].items():
            entry["answers"][name] = _beside(arms, title, lambda run, name=name: share(run["answers"][name], name))
            entry["answers"][name]["types"] = {
                kind: interval([run["answers"][name][kind][0] / run["answers"][name][kind][1] for run in runs.values()])
                for kind in kinds
            }
        first = next(iter(runs.values()))
        if any(point["step"] == EARLIER for point in first["history"]):
            entry["earlier"] = {name: _beside(arms, title, partial(_at, step=EARLIER, name=name)) for name in CURVES}
        entry["pointing"] = {
            name: {role: interval([run["pointing"][name][role] for run in runs.values()]) for role in first["pointing"][name]}
            for name in first["pointing"]
        }
        entry["curve"] = [
            {"step": point["step"], "cpu_s": round(statistics.mean(run["history"][n]["cpu_s"] for run in runs.values()), 1)}
            | {name: interval([share(run["history"][n][name], name) for run in runs.values()]) for name in CURVES}
            for n, point in enumerate(first["history"])
        ]
        entry["steps_to"] = {str(level): [steps_to(run["history"], level) for run in runs.values()] for level in LEVELS}
        summary[title] = entry
    return summary


def _beside(
    arms: Mapping[str, Mapping[int, dict[str, Any]]], title: str, figure: Callable[[dict[str, Any]], float]
) -> dict[str, Any]:
    """An arm's figure over its seeds, and what it has more than other arms, paired by seed."""
    values = {seed: figure(run) for seed, run in arms[title].items()}
    found = {"share": interval(list(values.values()))}
    for other in BESIDE:
        both = sorted(values.keys() & arms.get(other, {}).keys())
        if title != other and len(both) > 1:
            found[f"minus {other}"] = interval([values[seed] - figure(arms[other][seed]) for seed in both])
    return found


def _at(run: Mapping[str, Any], step: int, name: str) -> float:
    """The share at a step of the learning curve."""
    return next(share(point[name], name) for point in run["history"] if point["step"] == step)


def plot(summary: dict[str, Any], path: Path) -> None:
    """Learning curves of the main cell: right answers by step, in distribution and in clutter, and by CPU time; intervals over
    seeds for the arms of the headline. Beyond the last step of the arms goes the plain student with twice the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    main = summary.get("main", {})
    curves = {title: main[title]["curve"] for title in COLORS_OF if title in main}
    steps = max((point["step"] for curve in curves.values() for point in curve), default=0)
    longest = [point for point in main.get(LONGER[-1], {"curve": []})["curve"] if point["step"] >= steps]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", sharey=True)
    panels = [(CURVES[0], "step", 1), (CURVES[1], "step", 1), (CURVES[0], "cpu_s", 60)]
    for axis, (name, along, unit) in zip(axes, panels, strict=True):
        for title, curve in {**curves, LONGER[-1]: longest}.items():
            where = [point[along] / unit for point in curve]
            color, style = COLORS_OF.get(title, COLORS_OF["plain"]), "-" if title in COLORS_OF else "--"
            axis.plot(where, [point[name]["mean"] for point in curve], style, color=color, label=title)
            if title in ("plain", "teacher", "shuffled"):
                low, high = ([point[name][end] for point in curve] for end in ("low", "high"))
                axis.fill_between(where, low, high, color=color, alpha=0.15, linewidth=0)
        axis.set(title=name.capitalize(), xlabel="step" if along == "step" else "CPU minutes", ylim=(0, 1))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("right answers")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=8, ncols=8)
    with plt.rc_context({"svg.hashsalt": path.stem}):  # the same figures give the same file
        figure.savefig(path, metadata={"Date": None})


def headline(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the demo's report cites: plain and aligned answers in distribution and their difference, at step 800 and at the end."""
    arms = summary["main"]
    found = []
    for steps, place in ((EARLIER, "earlier"), (arms["teacher"]["curve"][-1]["step"], "answers")):
        plain, teacher = (arms[title][place]["in distribution"] for title in ("plain", "teacher"))
        found.append(
            {
                "steps": steps,
                "plain": plain["share"]["mean"],
                "teacher": teacher["share"]["mean"],
                "difference": teacher["minus plain"],
            }
        )
    return {"seeds": len(arms["teacher"]["seeds"]), "pictures": 1000, "results": found}


def _cells(value: Mapping[str, float] | None, signed: bool = False) -> str:
    """`mean (low to high)`."""
    if value is None or math.isnan(value["low"]):
        return "" if value is None else f"{value['mean']:.3f}"
    form = "+.3f" if signed else ".3f"
    return f"{value['mean']:{form}} ({value['low']:{form}} to {value['high']:{form}})"


def _compared(answers: Mapping[str, Any]) -> list[str]:
    """The aligned arm minus plain, minus its shuffled control, and whether it helps: if both intervals lie above zero."""
    differences = [answers.get(f"minus {other}") for other in ("plain", "shuffled")]
    if None in differences:
        return ["", "", ""]
    above = all(difference["low"] > 0 for difference in differences)
    below = differences[0]["high"] < 0
    return [*(_cells(difference, signed=True) for difference in differences), "yes" if above else "hurts" if below else "not shown"]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def tables(document: Mapping[str, Any]) -> dict[str, str]:
    """The page's tables by name, in Markdown."""
    summary = document["summary"]
    main = summary.get("main", {})
    found = {}
    sets = list(next(iter(main.values()))["answers"]) if main else []
    found["main"] = _table(
        ["arm", "right answers", "minus plain", "minus shuffled", f"at step {EARLIER}", "minus plain", "minus shuffled"],
        [
            [
                title,
                *(
                    cell
                    for at in (arm["answers"]["in distribution"], arm["earlier"]["in distribution"])
                    for cell in (
                        _cells(at["share"]),
                        _cells(at.get("minus plain"), signed=True),
                        _cells(at.get("minus shuffled"), signed=True),
                    )
                ),
            ]
            for title, arm in main.items()
        ],
    )
    found["sets"] = _table(
        [
            "test pictures",
            *(title for title in main if title in COLORS_OF),
            "teacher minus plain",
            "teacher minus shuffled",
            "helps",
        ],
        [
            [
                name,
                *(f"{arm['answers'][name]['share']['mean']:.3f}" for title, arm in main.items() if title in COLORS_OF),
                *_compared(main["teacher"]["answers"][name]),
            ]
            for name in sets
        ],
    )
    found["longer"] = _table(
        ["test pictures", "teacher", *LONGER, *(f"teacher minus {title}" for title in LONGER)],
        [
            [
                name,
                *(f"{main[title]['answers'][name]['share']['mean']:.3f}" for title in ("teacher", *LONGER)),
                *(_cells(main["teacher"]["answers"][name].get(f"minus {title}"), signed=True) for title in LONGER),
            ]
            for name in sets
        ],
    )
    found["types"] = _table(
        ["question", *(title for title in main if title in COLORS_OF)],
        [
            [kind, *(_cells(arm["answers"]["in distribution"]["types"][kind]) for title, arm in main.items() if title in COLORS_OF)]
            for kind in STUDY_TYPES
        ],
    )
    found["steps"] = _table(
        ["arm", *(f"steps to {level}" for level in LEVELS), "question words point", "answers point"],
        [
            [
                title,
                *(", ".join("-" if step is None else str(step) for step in arm["steps_to"][str(level)]) for level in LEVELS),
                *(_cells(arm["pointing"]["in distribution"].get(role)) for role in ("question", "answer")),
            ]
            for title, arm in main.items()
        ],
    )
    found["cells"] = _table(
        ["cell", "test pictures", "plain", "teacher", "shuffled", "teacher minus plain", "teacher minus shuffled", "helps"],
        [
            [
                cell,
                name,
                *(f"{arms[title]['answers'][name]['share']['mean']:.3f}" for title in ("plain", "teacher", "shuffled")),
                *_compared(arms["teacher"]["answers"][name]),
            ]
            for cell, arms in summary.items()
            if cell != "main" and {"plain", "teacher", "shuffled"} <= arms.keys()
            for name in arms["plain"]["answers"]
        ],
    )
    found["shipped"] = _table(
        ["test pictures", *(summary.get("shipped", {})), "chosen minus plain", "all heads minus plain", "2 heads minus plain"],
        [
            [
                name,
                *(f"{arm['answers'][name]['share']['mean']:.3f}" for arm in summary["shipped"].values()),
                *(
                    _cells(summary["shipped"][title]["answers"][name].get("minus plain"), signed=True)
                    for title in ("teacher", "teacher base", "teacher best 2 heads")
                ),
            ]
            for name in summary.get("shipped", {}).get("plain", {"answers": {}})["answers"]
        ],
    )
    found["grid"] = _table(
        ["change", "figure by seed", "mean"],
        [
            [_change(name), " ".join(f"{value:.3f}" for value in values), f"{statistics.mean(values):.3f}"]
            for name, values in document["grid"].items()
        ],
    )
    return found


def _change(name: str) -> str:
    """A choosing run's name as a reader wants it: `grid/teacher_weight_3` is `weight 3`."""
    cell, _, change = name.replace("_", " ").rpartition("/")
    return change.removeprefix("teacher ") if cell == "grid" else f"{change.split()[0]}, {cell.replace('/', ' ')}"


def with_tables(page: str, found: Mapping[str, str]) -> str:
    """A page whose `<!-- table: NAME -->` ... `<!-- end -->` hold the tables."""
    for name, table in found.items():
        page = re.sub(
            rf"(<!-- table: {name} -->\n).*?(<!-- end -->)",
            lambda match, t=table: f"{match[1]}{t}\n{match[2]}",
            page,
            flags=re.DOTALL,
        )
    return page


def main() -> None:
    document = json.loads(RESULTS.read_text())
    PAGE.write_text(with_tables(PAGE.read_text(), tables(document)))
    HEADLINE.write_text(json.dumps({"headline": headline(document["summary"])}, indent=2) + "\n")
    plot(document["summary"], RESULTS.with_suffix(".svg"))


if __name__ == "__main__":
    main()
