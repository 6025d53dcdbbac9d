from __future__ import annotations

import json
import re

import numpy as np
import pytest

from lavender.config import AlignmentConfig, to_dict
from lavender.errors import DataError
from lavender.maps import overlay
from lavender.miniworld import report
from lavender.miniworld.report import TILE, attention_rows, draw_map, environment, example_scene, headline, unclear, write_report


def figures(pointing):
    return {"pointing": pointing, "own_object": 0.5, "iou": 0.25, "auc": 0.75, "words": 9}


def compared(pointing):
    return {"maps": figures(pointing), "control": figures(0.11), "chance": figures(0.05)}


def interval(mean, low, high):
    return {"mean": mean, "low": low, "high": high}


def row(plain, aligned, difference, usual):
    of_plain, of_aligned = (interval(mean, mean - 0.03, mean + 0.03) for mean in (plain, aligned))
    return {"first": of_plain, "second": of_aligned, "difference": interval(*difference), "usual": usual, "questions": 1234}


ROWS = {
    "color": row(0.14, 0.99, (0.85, 0.82, 0.88), 0.13),
    "position": row(0.50, 0.49, (-0.01, -0.04, 0.02), 0.50),
    "place": row(0.32, 0.26, (-0.06, -0.10, -0.02), 0.27),
    "all": row(0.32, 0.58, (0.26, 0.244, 0.276), 0.30),
}


def word(text, role, index, found):
    maps = {arm: np.eye(8).tolist() for arm in ("plain", "aligned")}
    more = {} if found is None else {"found": dict(zip(("plain", "aligned"), found, strict=True))}
    return {"word": text, "role": role, "object": index, "maps": maps, **more}


def results_of_a_demo():
    question = {
        "type": "color",
        "text": "What color is the <ring>?",
        "answer": "red",
        "said": {"plain": "blue", "aligned": "red"},
        "words": [word("ring", "question", 0, (False, True)), word("red", "answer", 0, (False, True))],
    }
    counting = {**question, "text": "How many?", "answer": "three", "words": [word("three", "answer", None, None)]}
    history = [{"step": 100, "cpu_s": 4.0, "answers": {"color": 0.1, "place": 0.3}}]
    return {
        "answers": {"in distribution": ROWS, "clutter": ROWS},
        "attention": {
            arm: {"question": compared(first), "answer": compared(0.4)} for arm, first in (("plain", 0.31), ("aligned", 0.92))
        },
        "history": {
            "plain": [*history, {"step": 200, "cpu_s": 8.0, "answers": {"color": 0.2, "place": 0.4}}],
            "aligned": [*history, {"step": 200, "cpu_s": 10.0, "answers": {"color": 0.9, "place": 0.3}}],
        },
        "examples": [{"picture": 4, "questions": [question, counting]}] * 2,
        "teacher": compared(0.95),
        "config": {
            "num_train": 1000,
            "num_fresh": 200,
            "num_curve": 40,
            "alignment": to_dict(AlignmentConfig(question_rows="reads", weight=10.0, aligner="sim")),
        },
        "environment": environment(),
    }


@pytest.fixture
def run(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results_of_a_demo()))
    return tmp_path


def page_of(run):
    """With plain spaces."""
    return write_report(run).read_text().replace("\N{NO-BREAK SPACE}", " ")


def test_the_report_is_one_file_with_everything_in_it(run):
    html = page_of(run)
    assert not re.findall(r'(?:src|href)="(?!data:)', html), "nothing is loaded from elsewhere"
    assert "What color is the &lt;ring&gt;?" in html
    assert "<ring>" not in html
    assert html.count("data:image/jpeg") == 2 * (1 + 3 * 2)
    first = re.search(r"<body>\s*<h1>(.*?)</h1>", html)[1]
    assert first == "With the teacher&#39;s maps 58 % of the answers are right, without them 32 %: +26 (+24 to +28) points."
    assert headline({"answers": {"in distribution": ROWS}}).replace("\N{NO-BREAK SPACE}", " ") == first.replace("&#39;", "'")
    for text in (
        '+85 <span class="soft">(+82 to +88)</span>',
        "1,234",
        "0.950",
        "0.310",
        "0.920",
        environment()["torch"],
        "40 ms",
        "50 ms",
        "1.25 times",
    ):
        assert text in html, text
    assert html.count('class="mark yes"') == html.count('class="mark no"') == 2 * 2
    assert html.count('class="said no"') == 2 * 3, "plain is wrong twice, and the other says red where three is right"


def test_what_the_text_says_follows_from_the_figures():
    assert unclear(ROWS) == {"better": ["color"], "worse": ["place"], "even": ["position"], "guessed": ["position", "place"]}


@pytest.mark.parametrize(
    ("alignment", "text"),
    [
        (
            AlignmentConfig(rows="predicts", question_rows="reads", weight=10.0, aligner="sim"),
            "of a word of the question the row that reads it, of an answer (→) the row that predicts it; "
            "the mean over all heads of all layers",
        ),
        (
            AlignmentConfig(rows="last", question_rows=None, layers=(1,), aligner="sim"),
            "of a word of the question the row that reads its last token, of an answer (→) the row that reads its last token; "
            "the mean over all heads of layer 1",
        ),
        (
            AlignmentConfig(rows="both", question_rows=None, layers=(0, 2), question_heads="0.1,2.3"),
            "of a word of the question the rows that predict and read it, of an answer (→) the rows that predict and read it; "
            "the mean over heads 0.1,2.3; of an answer all heads of layers 0, 2",
        ),
    ],
)
def test_the_page_says_which_attention_it_shows(alignment, text):
    assert report._reading(to_dict(alignment)) == text


def test_the_time_of_equal_answers_is_said(run):
    html = " ".join(write_report(run).read_text().split())
    assert "What the plain student has at the end (30 %, 200 steps), the other has by step 200, after 10 s." in html
    results = json.loads((run / "results.json").read_text())
    results["history"]["aligned"][1]["answers"] = {"color": 0.1, "place": 0.2}
    (run / "results.json").write_text(json.dumps(results))
    assert "never has what the plain one has at the end (30 %)" in " ".join(write_report(run).read_text().split())


def test_the_curves_are_drawn_where_their_figures_are(run):
    html = write_report(run).read_text()
    lines = re.findall(r'<polyline class="(\w+)" points="(.*?) ?"', html)
    left, top, right, bottom = 44, 12, 468, 258
    places = {arm: [tuple(map(float, point.split(","))) for point in text.split()] for arm, text in lines}
    middle = (left + right) / 2
    assert places["plain"] == [
        (middle, pytest.approx(bottom - 0.2 * (bottom - top))),
        (right, pytest.approx(bottom - 0.3 * (bottom - top))),
    ]
    assert places["aligned"][1] == (right, pytest.approx(bottom - 0.6 * (bottom - top)))


def test_every_map_stands_beside_its_control_and_chance(run):
    titles = [title for title, _ in attention_rows(json.loads((run / "results.json").read_text()))]
    assert titles == [
        *("Words of questions: plain", "Words of questions: plain, word-agnostic control"),
        *("Words of questions: with the teacher's maps", "Words of questions: with the teacher's maps, word-agnostic control"),
        "Words of questions: chance",
        *("Answers: plain", "Answers: plain, word-agnostic control"),
        *("Answers: with the teacher's maps", "Answers: with the teacher's maps, word-agnostic control"),
        "Answers: chance",
        *("The teacher itself, on captions", "The teacher: word-agnostic control", "The teacher: chance"),
    ]


def test_the_studys_interval_over_seeds_stands_beside_the_demos(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "STUDY", tmp_path / "study.json")
    assert "Over the study" not in write_report(run).read_text()
    early = {"steps": 800, "plain": 0.47, "teacher": 0.7, "difference": interval(0.23, 0.13, 0.34)}
    late = {"steps": 2400, "plain": 0.71, "teacher": 0.8, "difference": interval(0.09, -0.1, 0.288)}
    study = {"seeds": 5, "pictures": 1000, "results": [early, late]}
    report.STUDY.write_text(json.dumps({"headline": study}))
    expected = (
        "Over the study&#39;s 5 seeds (1,000 pictures): after 800 steps 70 % with the maps and 47 % without, +23 (+13 to +34) "
        "points; after 2,400 steps 80 % with the maps and 71 % without, +9 (-10 to +29) points."
    )
    assert expected in page_of(run)


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(DataError, match=r"results\.json"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text('{"arms": []}')
    with pytest.raises(DataError, match="earlier version"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        write_report(tmp_path)


def test_an_outline_runs_around_its_object():
    scene = example_scene({"picture": 4})
    values = np.ones((8, 8))
    bare, outlined = draw_map(scene, values, None).astype(int), draw_map(scene, values, 0).astype(int)
    assert bare.shape == outlined.shape == (TILE, TILE, 3)
    changed = (bare != outlined).any(axis=2)
    mask = np.kron(scene.masks[0], np.ones((3, 3))) > 0
    rows, columns = np.nonzero(mask)
    ys, xs = np.nonzero(changed)
    assert changed[mask].mean() < 0.1, "what is inside is seen"
    assert 1 <= rows.min() - ys.min() <= 6
    assert 1 <= columns.min() - xs.min() <= 6
    assert 1 <= ys.max() - rows.max() <= 6
    assert 1 <= xs.max() - columns.max() <= 6


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


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda results: results.pop("teacher"), "it lacks 'teacher'"),
        (lambda results: results["history"].update(plain=[]), "history.plain has no steps"),
        (
            lambda results: results["history"]["plain"][0].update(step="x"),
            r"history.plain\[0\].step is 'x', expected one of type int",
        ),
        (lambda results: results["history"]["aligned"][0].update(step=0), "history.aligned has no steps"),
        (
            lambda results: results["answers"]["clutter"]["all"]["first"].update(mean=float("nan")),
            "answers.clutter.all.first.mean is 'nan'",
        ),
        (lambda results: results.update(answers={}), "answers lacks 'in distribution'"),
        (lambda results: results["config"]["alignment"].update(rows="x"), "config.alignment.rows is 'x'"),
        (lambda results: results["config"].update(alignment=None), "config.alignment is 'None', expected a mapping"),
        (lambda results: results["examples"][0].update(picture=-1), r"examples\[0\].picture is -1"),
        (lambda results: results["examples"][0]["questions"][0]["words"][0]["maps"].update(plain=[[1.0], []]), "not equally long"),
        (lambda results: results["examples"][0]["questions"][0]["words"][0].update(object=99), "name object 99 of a picture with"),
    ],
)
def test_results_of_another_shape_are_one_line(run, change, why):
    results = json.loads((run / "results.json").read_text())
    change(results)
    (run / "results.json").write_text(json.dumps(results))
    with pytest.raises(DataError, match=why):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("content", ["", "[]", "7", "NaN", "[" * 100_000, "1" + "0" * 5000])
def test_results_that_are_none_are_one_line(run, content):
    (run / "results.json").write_text(content)
    with pytest.raises(DataError, match=r"results.json is damaged \("):
        write_report(run)
