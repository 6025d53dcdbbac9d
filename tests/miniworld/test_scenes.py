from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavender.errors import ConfigError
from lavender.miniworld.scenes import (
    COLORS,
    IMAGE_SIZE,
    NUMBERS,
    QUESTION_TYPES,
    SHAPES,
    STUDY_TYPES,
    World,
    ask_all,
    is_rare,
    make_scene,
    make_scenes,
)

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


def test_questions_and_masks_do_not_change_between_versions():
    digest = hashlib.sha256()
    for seed in (2, 100, 200):
        for scene in make_scenes(seed, 20, world=World()):
            digest.update(scene.pixels.tobytes() + scene.masks.tobytes() + scene.caption.encode())
            digest.update(repr([(q.type, q.text, q.answer) for q in scene.questions]).encode() + repr(scene.referents).encode())
    assert digest.hexdigest()[:16] == "266d35b7755bb209"


CLUTTER = World(counts=(4, 5), shares=(0.25, 0.75), radii=(("small", (6.5, 8.5)),), pairs="common")


def test_a_world_says_how_many_objects_of_which_size_and_pair():
    scenes = list(make_scenes(8, 200, world=CLUTTER))
    counts = [len(scene.objects) for scene in scenes]
    assert set(counts) == {4, 5}
    assert 0.65 < np.mean([count == 5 for count in counts]) < 0.85
    things = [thing for scene in scenes for thing in scene.objects]
    assert {thing.size for thing in things} == {"small"}
    assert all(6.5 <= thing.radius <= 8.5 for thing in things)
    assert not any(is_rare(thing.shape, thing.color) for thing in things)
    rare = [thing for scene in make_scenes(8, 100, world=World(pairs="rare")) for thing in scene.objects]
    assert all(is_rare(thing.shape, thing.color) for thing in rare)
    pairs = {(thing.shape, thing.color) for thing in (*things, *rare)}
    assert len(pairs) == len(SHAPES) * len(COLORS)
    assert {shape for shape, color in pairs if is_rare(shape, color)} == set(SHAPES)
    assert {color for shape, color in pairs if is_rare(shape, color)} == set(COLORS)
    assert sum(is_rare(*pair) for pair in pairs) == len(pairs) / 4


def test_noise_lies_on_every_pixel_and_changes_nothing_else():
    quiet, noisy = (list(make_scenes(8, 20, world=World(noise=noise))) for noise in (0.0, 12.0))
    for one, two in zip(quiet, noisy, strict=True):
        assert (one.caption, one.questions, one.objects) == (two.caption, two.questions, two.objects)
        assert np.array_equal(one.masks, two.masks)
        inner = (one.pixels > 50) & (one.pixels < 205)  # where nothing is cut off at black or white
        difference = (two.pixels.astype(float) - one.pixels)[inner]
        assert abs(difference.mean()) < 0.6
        assert abs(difference.std() - 12) < 0.6


@pytest.mark.parametrize(("cue", "share"), [(1.0, 1.0), (0.8, 0.8), (0.0, 0.0)])
def test_a_cue_tints_the_background_after_the_first_object_so_often(cue, share):
    hits = []
    for scene in make_scenes(8, 200, world=World(cue=cue)):
        ground = scene.pixels[~scene.masks.any(axis=0)].mean(axis=0)
        ground -= ground.mean()
        tints = {color: np.array(value) - np.mean(value) for color, value in COLORS.items() if color != "white"}
        nearest = min(tints, key=lambda color: np.abs(ground - tints[color] * 0.2).sum())
        if "white" not in (thing.color for thing in scene.objects) and np.abs(ground).sum() > 5:
            hits.append(nearest == scene.objects[0].color)
    assert len(hits) > 80
    assert abs(np.mean(hits) - share) < 0.13


@settings(max_examples=40, deadline=None)
@given(scene_numbers, st.sampled_from([World(), CLUTTER, World(pairs="rare"), World(cue=0.5, noise=9.0)]))
def test_all_questions_follow_from_the_objects(numbers, world):
    scene = make_scene(*numbers, world=world)
    asked = ask_all(scene, numbers[0])
    assert asked == ask_all(scene, numbers[0])
    assert len({question.text for question in asked}) == len(asked), "no question is asked twice"
    objects, middle = scene.objects, IMAGE_SIZE / 2
    by_word = {thing.shape: i for i, thing in enumerate(objects)} | {thing.color: i for i, thing in enumerate(objects)}
    inside = sum(min(abs(thing.x - middle), abs(thing.y - middle)) > 2 for thing in objects)
    counts = {kind: sum(question.type == kind for question in asked) for kind in STUDY_TYPES}
    expected = {"color": len(objects), "shape": len(objects), "place": inside, "count": 1, "existence": 2}
    assert counts == expected | {"position": counts["position"]}
    assert (counts["position"] in (1, 2, 3)) == (len(objects) > 1)
    for question in asked:
        words = question.text.rstrip("?").split()
        named = [by_word[word] for word in words if word in by_word]
        assert [r.object_index for r in question.referents] == named
        for referent in question.referents:
            thing = objects[referent.object_index]
            assert question.text[referent.start : referent.end] == {"color": thing.color, "shape": thing.shape}[referent.kind]
        thing = objects[named[0]] if named else None
        if question.type == "existence":
            truth = "yes" if named else "no"
        elif question.type == "count":
            truth = NUMBERS[len(objects)]
        elif question.type == "place":
            truth = f"{'bottom' if thing.y > middle else 'top'} {'right' if thing.x > middle else 'left'}"
        elif question.type == "position":
            dx, dy = objects[named[1]].x - thing.x, objects[named[1]].y - thing.y
            holds = {"left": dx > 0, "right": dx < 0, "above": dy > 0, "below": dy < 0}
            truth = "yes" if holds[next(w for w in words if w in holds)] else "no"
        else:
            truth = getattr(thing, question.type)
        assert question.answer == truth, question
        about = question.type in ("color", "shape", "place") or (question.answer == "yes" and question.type == "existence")
        assert question.object_index == (named[0] if about else None)
    assert {question.answer for question in asked if question.type == "existence"} == {"yes", "no"}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"counts": (0, 1), "shares": (0.5, 0.5)}, "counts is"),
        ({"counts": (6,), "shares": (1.0,)}, "counts is"),
        ({"counts": (), "shares": ()}, "counts is"),
        ({"counts": 3, "shares": (1.0,)}, r"counts is 3"),
        ({"counts": (1,)}, r"shares is .*as many numbers as counts"),
        ({"counts": (2, 3), "shares": (0.5, 0.6)}, r"shares is"),
        ({"counts": (2, 3), "shares": (1.5, -0.5)}, r"shares is"),
        ({"radii": (("large", (33.0, 35.0)),)}, r"radii is"),
        ({"radii": (("small", (9.0, 7.0)),)}, r"radii is"),
        ({"radii": (("tiny", (3.0, 4.0)),)}, r"radii is"),
        ({"radii": (("small", (3.0, 4.0)), ("small", (5.0, 6.0)))}, r"radii is"),
        ({"radii": (("small", 7.0),)}, r"radii is"),
        ({"radii": ()}, r"radii is"),
        ({"pairs": "uncommon"}, r"pairs is 'uncommon'; expected one of all, common, rare"),
        ({"noise": -3.0}, r"noise is"),
        ({"noise": float("nan")}, r"noise is"),
        ({"noise": "much"}, r"noise is"),
        ({"backgrounds": ("fog",)}, r"backgrounds is"),
        ({"backgrounds": ()}, r"backgrounds is"),
        ({"cue": 2.0}, r"cue is"),
    ],
)
def test_a_world_that_cannot_be_is_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        World(**settings)


def test_objects_without_room_are_named():
    with pytest.raises(ConfigError, match="3 such objects find no room"):
        make_scene(3, 0, World(counts=(3,), shares=(1.0,), radii=(("large", (22.0, 25.0)),)))
    crowded = World(counts=[np.int64(5)], shares=[1], radii=(("small", (7, 9)),), pairs="rare", cue=1)
    assert len(make_scene(3, 0, crowded).objects) == 5
