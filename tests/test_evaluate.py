from __future__ import annotations

import numpy as np
import pytest
import torch

import lavender
from lavender.evaluate import (
    MeasuredWord,
    accuracy,
    alignment_error,
    best_constant_error,
    chance,
    compare_targets,
    evaluate_answers,
    evaluate_attention,
    generate,
    localization,
    word_agnostic,
)


def two_objects():
    masks = np.zeros((2, 8, 8), bool)
    masks[0, :2, :2] = True
    masks[1, 5:, 5:] = True
    return masks


def test_perfect_wrong_and_constant_maps():
    masks = two_objects()
    perfect = localization([MeasuredWord(masks[i].astype(float), masks, i) for i in (0, 1)])
    assert (perfect.pointing, perfect.own_object, perfect.iou, perfect.auc) == (1, 1, 1, 1)
    wrong = localization([MeasuredWord(masks[1 - i].astype(float), masks, i) for i in (0, 1)])
    assert (wrong.pointing, wrong.own_object, wrong.iou) == (0, 0, 0)
    assert wrong.auc < 0.5
    flat = localization([MeasuredWord(np.ones((8, 8)), masks, 1)])
    assert (flat.pointing, flat.own_object, flat.auc) == (0, 0, 0.5)


def test_auc_counts_ordered_pairs_and_halves_ties():
    masks = np.array([[[True, True, False, False]]])
    values = np.array([[3.0, 1.0, 1.0, 0.0]])
    # Pairs inside over outside: 3>1, 3>0, 1=1, 1>0.
    assert localization([MeasuredWord(values, masks, 0)]).auc == pytest.approx(3.5 / 4)


def test_own_object_counts_scenes_of_several_objects_only():
    masks = two_objects()
    words = [MeasuredWord(masks[0].astype(float), masks[:1], 0), MeasuredWord(masks[0].astype(float), masks, 1)]
    assert localization(words).own_object == 0


def test_the_control_gives_every_word_the_mean_map():
    masks = two_objects()
    words = [MeasuredWord(masks[i].astype(float), masks, i) for i in (0, 1)]
    control = word_agnostic(words)
    np.testing.assert_array_equal(control[0].values, masks.mean(axis=0))
    np.testing.assert_array_equal(control[0].values, control[1].values)
    assert localization(control).own_object == 0  # a tie is no find
    assert localization(control).auc > 0.5  # yet it finds objects


def test_chance_is_what_noise_scores():
    masks = two_objects()
    rng = np.random.default_rng(0)
    noise = [MeasuredWord(rng.random((8, 8)), masks, i % 2) for i in range(4000)]
    measured, expected = localization(noise), chance(noise)
    for name in ("pointing", "own_object", "iou", "auc"):
        assert getattr(measured, name) == pytest.approx(getattr(expected, name), abs=0.025), name


def test_nothing_to_measure_is_said():
    with pytest.raises(ValueError, match="no measured words"):
        localization([])


def test_exact_masks_score_as_they_must(scenes):
    """The scenes' own masks, at the resolution of targets: the ceiling of every measure."""
    maps = [{(r.start, r.end): s.word_mask(r)[::2, ::2].astype(np.float32) for r in s.referents} for s in scenes]
    figures = compare_targets(scenes, maps)
    assert figures["maps"]["pointing"] > 0.97
    assert figures["maps"]["own_object"] == 1
    assert figures["maps"]["auc"] > 0.97
    assert figures["control"]["own_object"] < 0.6


def test_wilson_interval():
    """Against the closed form worked by hand for 8 of 10."""
    result = accuracy([True] * 8 + [False] * 2)
    assert (result.accuracy, result.low, result.high) == (0.8, 0.4902, 0.9433)
    assert accuracy([True] * 5).high == 1.0


def test_best_constant_is_the_mean_of_the_targets():
    targets = np.random.default_rng(0).random((50, 6, 6))
    normalized = (targets - targets.mean((1, 2), keepdims=True)) / targets.std((1, 2), keepdims=True)
    best = best_constant_error(targets, "zscore")
    assert best == pytest.approx(((normalized - normalized.mean(0)) ** 2).mean(), rel=1e-4)
    for constant in np.random.default_rng(1).random((20, 6, 6)):
        assert ((normalized - constant) ** 2).mean() > best


def test_alignment_error_of_the_targets_themselves_is_zero():
    maps = [{(0, 3): np.random.default_rng(0).random((16, 16), np.float32)}]
    config = lavender.AlignmentConfig()
    assert alignment_error(maps, maps, config) == pytest.approx(0, abs=1e-10)
    assert alignment_error([{(0, 3): np.zeros((8, 8), np.float32)}], maps, config) == pytest.approx(1, rel=1e-3)


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
    from lavender import evaluate
    from lavender.miniworld.scenes import Question, make_scene

    scene = make_scene(0, 0)
    monkeypatch.setattr(evaluate, "generate", lambda *_, **__: [said])
    object.__setattr__(scene, "questions", (Question("color", "What color is it?", "red"),))
    assert evaluate_answers(student, processor, [scene])["color"]["accuracy"] == right


def test_generated_answers_do_not_depend_on_the_batch(processor, scenes):
    from lavender.miniworld import STUDENT
    from lavender.train import load_student

    model, own = load_student(STUDENT)
    questions = [s.questions[i % 3].text for i, s in enumerate(scenes[:6])]
    together = generate(model, own, [s.image for s in scenes[:6]], questions, 6)
    alone = [generate(model, own, [s.image], [q], 6)[0] for s, q in zip(scenes[:6], questions, strict=True)]
    assert together == alone
    assert together == [s.questions[i % 3].answer for i, s in enumerate(scenes[:6])]


def test_aligned_maps_come_from_the_aligner(student, processor, scenes):
    from lavender.evaluate import student_maps

    torch.manual_seed(0)
    with lavender.patch(student, lavender.AlignmentConfig()) as patch:
        raw, aligned = student_maps(patch, processor, scenes[:2])
    span = next(iter(raw[0]))
    assert raw[0][span].shape == aligned[0][span].shape == (8, 8)
    assert not np.allclose(raw[0][span], aligned[0][span])
