from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavender.miniworld.scenes import COLORS, IMAGE_SIZE, NUMBERS, QUESTION_TYPES, SHAPES, make_scene, make_scenes

scene_numbers = st.tuples(st.integers(0, 2**31), st.integers(0, 2**31))


@settings(max_examples=60, deadline=None)
@given(scene_numbers)
def test_every_scene_is_what_it_says(numbers):
    scene = make_scene(*numbers)
    assert scene.pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert scene.pixels.dtype == np.uint8
    assert len({o.shape for o in scene.objects}) == len({o.color for o in scene.objects}) == len(scene.objects)
    assert (scene.masks.sum(axis=0) <= 1).all(), "objects do not overlap"
    for thing, mask in zip(scene.objects, scene.masks, strict=True):
        area = mask.mean() * IMAGE_SIZE**2
        assert 0.25 * thing.radius**2 < area < 3.2 * thing.radius**2
        ys, xs = np.nonzero(mask)
        assert abs(xs.mean() - thing.x) < 0.35 * thing.radius
        assert abs(ys.mean() - thing.y) < 0.35 * thing.radius
        # Inside the mask, away from its edge, is the color that the caption names.
        inner = mask & np.roll(mask, 1, 0) & np.roll(mask, -1, 0) & np.roll(mask, 1, 1) & np.roll(mask, -1, 1)
        painted = scene.pixels[inner].astype(int)
        nearest = min(COLORS, key=lambda c: np.abs(painted - np.array(COLORS[c])).sum())
        assert nearest == thing.color


@settings(max_examples=60, deadline=None)
@given(scene_numbers)
def test_captions_are_correct_english_and_name_their_objects(numbers):
    scene = make_scene(*numbers)
    assert scene.caption[0] in "A"
    assert scene.caption.endswith(".")
    words = scene.caption.rstrip(".").replace(",", "").split()
    for article, following in itertools.pairwise(words):
        if article.lower() in ("a", "an"):
            assert (article.lower() == "an") == (following[0] in "aeiou")
    for referent in scene.referents:
        thing = scene.objects[referent.object_index]
        expected = {"color": thing.color, "shape": thing.shape, "size": thing.size}[referent.kind]
        assert scene.caption[referent.start : referent.end] == expected
    named = [(r.kind, r.object_index) for r in scene.referents if r.kind != "size"]
    assert sorted(named) == sorted((k, i) for i in range(len(scene.objects)) for k in ("color", "shape"))


@settings(max_examples=80, deadline=None)
@given(scene_numbers)
def test_answers_follow_from_the_objects(numbers):
    scene = make_scene(*numbers)
    assert {q.type for q in scene.questions} == set(QUESTION_TYPES) - ({"position"} if len(scene.objects) == 1 else set())
    by_shape, by_color = {o.shape: o for o in scene.objects}, {o.color: o for o in scene.objects}
    for question in scene.questions:
        words = question.text.rstrip("?").split()
        if question.type == "color":
            truth = by_shape[words[-1]].color
        elif question.type == "shape":
            truth = by_color[words[-2]].shape
        elif question.type == "count":
            truth = NUMBERS[len(scene.objects)]
        elif question.type == "existence":
            named = words[3]
            truth = "yes" if named in by_shape or named in by_color else "no"
        else:
            first, second = by_shape[words[2]], by_shape[words[-1]]
            dx, dy = second.x - first.x, second.y - first.y
            holds = {"left": dx > 0, "right": dx < 0, "above": dy > 0, "below": dy < 0}
            truth = "yes" if holds[next(w for w in words if w in holds)] else "no"
        assert question.answer == truth, (question, scene.objects)


def test_scenes_are_deterministic_and_independent_of_their_neighbors():
    alone = make_scene(3, 7)
    among = list(make_scenes(3, 10))[7]
    assert np.array_equal(alone.pixels, among.pixels)
    assert (alone.caption, alone.questions) == (among.caption, among.questions)
    assert not np.array_equal(alone.pixels, make_scene(4, 7).pixels)


def test_the_world_does_not_change_between_versions():
    """The embedded models were trained on exactly these pictures: a change of the generator needs new models."""
    digest = hashlib.sha256()
    for scene in make_scenes(1, 20):
        digest.update(scene.pixels.tobytes() + scene.caption.encode())
    assert digest.hexdigest()[:16] == "eefcc9f7f029a80e"


def test_yes_and_no_are_balanced_and_every_word_occurs():
    scenes = list(make_scenes(5, 600))
    for kind in ("existence", "position"):
        answers = [q.answer == "yes" for s in scenes for q in s.questions if q.type == kind]
        assert 0.44 < np.mean(answers) < 0.56
    seen = {w for s in scenes for w in s.caption.rstrip(".").replace(",", "").split()}
    assert set(SHAPES) | set(COLORS) | {"small", "large", "left", "right", "above", "below"} <= seen


def test_an_unknown_shape_is_named():
    from lavender.miniworld.scenes import _inside

    with pytest.raises(ValueError, match="heptagon"):
        _inside("heptagon", np.zeros(1), np.zeros(1))
