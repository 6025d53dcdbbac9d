"""The tables and the headline of the alignment study are those of its runs."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from lavender.miniworld.report import percent, points

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("alignment_results", ROOT / "bench" / "alignment_results.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def run_of(arm, seed, right, recipe="chosen", begins=""):
    """A run whose share in distribution is right / 10 in every type but the count, which is always right."""
    answers = {kind: [right, 10] for kind in ("color", "shape", "existence", "position", "place")} | {"count": [10, 10]}
    early = {kind: [right - 1, 10] for kind in answers}
    history = [{"step": step, "cpu_s": 1.0, "in distribution": early, "clutter": early} for step in (400, 800)]
    return {
        **{"cell": "main", "arm": arm, "seed": seed, "recipe": recipe, "begins": begins, "steps": 100, "history": history},
        "answers": {"in distribution": answers, "clutter": answers},
        "pointing": {"in distribution": {"question": right / 10, "answer": 0.5}},
    }


def test_differences_are_paired_by_seed_and_their_intervals_students(results):
    right = {"plain": [2, 4, 3, 5, 1], "teacher": [5, 9, 6, 7, 6], "shuffled": [2, 3, 3, 3, 2]}
    runs = [run_of(arm, seed, value) for arm, values in right.items() for seed, value in enumerate(values, start=1)]
    summary = results.summarize(reversed(runs))["main"]
    shares = {arm: (5 * np.array(values) / 10 + 1) / 6 for arm, values in right.items()}
    found = summary["teacher"]["answers"]["in distribution"]["minus plain"]
    differences = shares["teacher"] - shares["plain"]
    half = 2.776 * statistics.stdev(differences) / math.sqrt(5)  # Student's t, four degrees of freedom
    for name, value in (("mean", differences.mean()), ("low", differences.mean() - half), ("high", differences.mean() + half)):
        assert found[name] == pytest.approx(value, abs=1e-4)
    assert summary["plain"]["answers"]["in distribution"]["share"]["mean"] == pytest.approx(shares["plain"].mean(), abs=1e-4)
    early = summary["teacher"]["earlier"]["in distribution"]
    assert early["share"]["mean"] == pytest.approx(0.56)  # (4 + 8 + 5 + 6 + 5) / 50
    assert early["minus plain"]["mean"] == pytest.approx(0.36)
    assert early["minus shuffled"]["mean"] == pytest.approx(0.4)
    # In clutter nobody could learn to count.
    assert summary["plain"]["answers"]["clutter"]["share"]["mean"] == pytest.approx(0.3)
    assert summary["teacher"]["pointing"]["in distribution"]["question"]["mean"] == pytest.approx(0.66)


def test_an_arm_helps_if_it_is_above_plain_and_above_its_shuffled_control(results):
    def verdict(plain, shuffled):
        differences = (dict(zip(("low", "mean", "high"), values, strict=True)) for values in (plain, shuffled))
        return results._compared(dict(zip(("minus plain", "minus shuffled"), differences, strict=True)))[-1]

    assert verdict((0.1, 0.2, 0.3), (0.01, 0.2, 0.3)) == "yes"
    assert verdict((0.1, 0.2, 0.3), (-0.01, 0.2, 0.3)) == verdict((-0.1, 0.2, 0.3), (0.1, 0.2, 0.3)) == "not shown"
    assert verdict((-0.3, -0.2, -0.1), (0.1, 0.2, 0.3)) == "hurts"


def test_the_page_and_the_reports_figures_are_those_of_the_runs(results):
    document = json.loads(results.RESULTS.read_text())
    assert results.summarize(run for run in document["runs"] if run["cell"] in results.CELLS) == document["summary"]
    page = results.PAGE.read_text()
    assert results.with_tables(page, results.tables(document)) == page
    headline = results.headline(document["summary"])
    assert json.loads(results.HEADLINE.read_text()) == {"headline": headline}
    readme = (ROOT / "README.md").read_text()
    for at in headline["results"]:
        row = f"| after {at['steps']:,} steps | {percent(at['plain'])} | {percent(at['teacher'])} | {points(at['difference'])}"
        assert row.replace("\N{NO-BREAK SPACE}", " ") in readme


def test_steps_to_a_level_are_those_at_which_it_stays(results):
    def history(values):
        kinds = ("color", "shape", "count", "existence", "position", "place")
        return [{"step": 100 * n, "in distribution": dict.fromkeys(kinds, (v, 10))} for n, v in enumerate(values, start=1)]

    assert results.steps_to(history([5, 9, 6, 9, 9, 7]), 0.9) == 400
    assert results.steps_to(history([5, 6, 7]), 0.9) is None
    assert results.steps_to(history([5, 6, 9]), 0.9) == 300
