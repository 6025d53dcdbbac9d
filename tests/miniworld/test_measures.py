from __future__ import annotations

import numpy as np
import pytest
import torch

import lavender
from lavender.miniworld import measures
from lavender.miniworld.measures import compare_targets, evaluate_answers, evaluate_attention, student_maps
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
    with lavender.patch(student, lavender.AlignmentConfig()) as patch:
        raw, aligned = student_maps(patch, processor, scenes[:2])
    span = next(iter(raw[0]))
    assert raw[0][span].shape == aligned[0][span].shape == (8, 8)
    assert not np.allclose(raw[0][span], aligned[0][span])
