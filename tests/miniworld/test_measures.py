from __future__ import annotations

import numpy as np
import pytest
import torch

import lavender
from lavender.errors import ModelError
from lavender.miniworld import measures
from lavender.miniworld.measures import compare_answers, compare_targets, evaluate_answers, evaluate_attention, student_maps
from lavender.miniworld.scenes import Question, make_scene


def test_exact_masks_score_as_they_must(scenes):
    """The scenes' own masks, at the resolution of targets: the ceiling of every measure."""
    maps = [{(r.start, r.end): s.word_mask(r)[::2, ::2].astype(np.float32) for r in s.referents} for s in scenes]
    figures = compare_targets(scenes, maps)
    assert figures["maps"]["pointing"] > 0.97
    assert figures["maps"]["own_object"] == 1
    assert figures["maps"]["auc"] > 0.97
    assert figures["control"]["own_object"] < 0.6


def test_evaluating_a_student_leaves_it_as_it_was(student, processor, scenes):
    student.train()
    with lavender.patch(student) as patch:
        figures = evaluate_attention(patch, processor, scenes[:6])
        answers = evaluate_answers(student, processor, scenes[:6])
    assert student.training
    assert figures["raw"]["maps"]["words"] == sum(r.kind != "size" for s in scenes[:6] for r in s.referents)
    assert figures["raw"] == figures["aligned"]
    assert answers["all"]["questions"] == sum(len(s.questions) for s in scenes[:6])


@pytest.mark.parametrize(
    ("said", "right"), [("red", 1.0), (" Red\n", 1.0), ("", 0.0), ("re", 0.0), ("red ring", 0.0), ("blue", 0.0)]
)
def test_only_the_whole_answer_is_right(monkeypatch, student, processor, said, right):
    scene = make_scene(0, 0)
    monkeypatch.setattr(measures, "generate", lambda *_, **__: [said])
    object.__setattr__(scene, "questions", (Question("color", "What color is it?", "red"),))
    assert evaluate_answers(student, processor, [scene])["color"]["accuracy"] == right


def test_aligned_maps_come_from_the_aligner(student, processor, scenes):
    torch.manual_seed(0)
    with lavender.patch(student, lavender.AlignmentConfig(weight=10.0, aligner="sim")) as patch:
        raw, aligned = student_maps(patch, processor, scenes[:2])
    span = next(iter(raw[0]))
    assert raw[0][span].shape == aligned[0][span].shape == (8, 8)
    assert not np.allclose(raw[0][span], aligned[0][span])


def test_some_layers_are_not_measured_as_all(student, processor, scenes):
    for settings in ({"layers": (3,)}, {"heads": "3.1,0.2"}):
        with (
            lavender.patch(student, lavender.AlignmentConfig(**settings)) as patch,
            pytest.raises(ModelError, match=r"reads [12] of the model's 4 layers"),
        ):
            student_maps(patch, processor, scenes[:1])


def drawn_answers(num_pictures, share_plain, share_aligned, seed=1):
    """Two questions of one type and one of another per picture; of each picture all or none are right."""
    rng = np.random.default_rng(seed)
    kinds = [["color", "color", "count"]] * num_pictures
    plain, aligned = ([[bool(hit)] * 3 for hit in rng.random(num_pictures) < share] for share in (share_plain, share_aligned))
    return kinds, plain, aligned


def test_differences_of_answers_have_the_interval_of_the_pictures():
    """Where all questions of a picture are alike, the interval is that of so many pictures, however many the questions."""
    kinds, plain, aligned = drawn_answers(400, 0.4, 0.7)
    rows = compare_answers(kinds, plain, aligned)
    assert rows.keys() == {"color", "count", "all"}
    one = np.array([hits[0] for hits in aligned], float) - np.array([hits[0] for hits in plain])
    mean, half = one.mean(), 1.96 * one.std(ddof=1) / np.sqrt(len(one))
    for name, count in (("color", 800), ("count", 400), ("all", 1200)):
        found = rows[name]["difference"]
        assert found["mean"] == pytest.approx(mean, abs=1e-4)
        assert found["low"] == pytest.approx(mean - half, abs=0.006)
        assert found["high"] == pytest.approx(mean + half, abs=0.006)
        assert rows[name]["questions"] == count
    share = np.mean([hits[0] for hits in plain])
    assert rows["all"]["first"]["mean"] == pytest.approx(share, abs=1e-4)
    assert rows["all"]["first"]["low"] == pytest.approx(share - 1.96 * np.sqrt(share * (1 - share) / 400), abs=0.006)
    assert rows == compare_answers(kinds, plain, aligned), "the same every time"
    same = compare_answers(kinds, plain, plain)["all"]
    assert same["difference"] == {"mean": 0, "low": 0, "high": 0}, "both are drawn alike"


def test_the_mean_over_types_is_not_that_over_questions():
    kinds = [["color"] * 8 + ["count"], ["color"] * 2]
    plain = [[True] * 8 + [False], [False] * 2]
    rows = compare_answers(kinds, plain, plain)
    assert rows["color"]["first"]["mean"] == 0.8
    assert rows["all"]["first"]["mean"] == 0.4
    assert compare_answers(kinds, plain, plain, counted=("color",)).keys() == {"color", "all"}
