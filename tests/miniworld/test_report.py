from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from lavender.errors import DataError
from lavender.maps import overlay
from lavender.miniworld.report import answer_rows, environment, save_examples, table_rows, write_report


def figures(pointing):
    return {"pointing": pointing, "own_object": 0.5, "iou": 0.25, "auc": 0.75, "words": 9}


def compared(pointing):
    return {"maps": figures(pointing), "control": figures(0.11), "chance": figures(0.05)}


def arm(name, pointing, **more):
    answers = {"color": {"accuracy": 0.9, "low": 0.8, "high": 0.95, "questions": 50}}
    return {
        "name": name,
        "attention": {"raw": compared(pointing), "aligned": compared(pointing + (0.1 if "aligner" in more else 0))},
        "answers": answers,
        **more,
    }


@pytest.fixture
def run(tmp_path):
    history = [{"step": 10, "loss": 2.0, "alignment_loss": 1.5}, {"step": 20, "loss": 1.0, "alignment_loss": 0.7}]
    results = {
        "arms": [
            arm("before", 0.3),
            arm("none", 0.31, history=[{"step": 10, "loss": 1.0}]),
            arm("teacher", 0.62, history=history, aligner={"error": 0.4, "best_constant_error": 0.9}),
        ],
        "teacher": compared(0.95),
        "config": {"num_train": 320, "num_held_out": 150, "alignment": {"weight": 0.5}},
        "environment": environment(),
        "duration_s": 61.2,
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    maps = [[np.eye(8), np.zeros((8, 8))]]
    picture = Image.new("RGB", (64, 64), "teal")
    save_examples(tmp_path, [picture], ["A <red> circle."], [["red", "circle"]], {"diffusion": maps, "before": maps})
    return tmp_path


def test_the_report_is_one_file_with_everything_in_it(run):
    html = write_report(run).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', html), "nothing is loaded from elsewhere"
    assert "A &lt;red&gt; circle." in html
    assert "A <red>" not in html
    assert html.count("data:image/png") == 1 + 2 * 2
    for text in ("0.950", "0.620", "0.720", "0.310", "0.900 [0.800, 0.950]", "0.400", "61 s", environment()["torch"]):
        assert text in html, text


def test_every_arm_stands_beside_its_control(run):
    titles = [title for title, _ in table_rows(json.loads((run / "results.json").read_text()))]
    assert titles == [
        *("Teacher", "Teacher, word-agnostic control"),
        *("Student before: raw attention", "Student before: word-agnostic control"),
        *("Plain fine-tuning: raw attention", "Plain fine-tuning: word-agnostic control"),
        *("Lavender: raw attention", "Lavender: word-agnostic control", "Lavender: after the aligner"),
        "Chance",
    ]


def test_answer_rows(run):
    rows = answer_rows(json.loads((run / "results.json").read_text()))
    assert rows == [("color", ["0.900 [0.800, 0.950]"] * 3)]


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(DataError, match=r"results\.json"):
        write_report(tmp_path)


def test_the_hottest_place_is_the_brightest():
    picture = np.full((64, 64, 3), 40, np.uint8)
    values = np.zeros((8, 8))
    values[2, 5] = 1
    drawn = overlay(picture, values)
    assert drawn.shape == picture.shape
    y, x = np.unravel_index(drawn.sum(axis=2).argmax(), (64, 64))
    assert (y // 8, x // 8) == (2, 5)
    flat = overlay(picture, np.ones((8, 8)))
    assert (flat == flat[0, 0]).all()
