"""Regions: where spans of a text lie, in every form, drawn as they are defined, and refused where they say nothing."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lavender.data.conversations import sound_regions
from lavender.data.regions import POINT_SIZE, Region
from lavender.data.run_lengths import run_lengths
from lavender.data.samples import Conversation, Message, Sample, as_conversation, read_samples
from lavender.errors import DataError
from lavender.training.train import _texts

RED, BLUE = (Image.new("RGB", (64, 64), color) for color in ("red", "blue"))
QUESTION, ANSWER = "Where is the zebra?", "Left of a hat."
SIDE = 400
"""Of the fine raster that maps are compared with."""


def sound(**place) -> Region:
    (region,) = as_conversation(Sample("x", RED, QUESTION, ANSWER, regions=(Region(1, **place),))).regions
    return region


def by_sampling(inside, size: int, crop) -> np.ndarray:
    """The mean over each cell of a function of (y, x), at SIDE places of the cropped part of the picture."""
    top, left, bottom, right = crop
    centers = (np.arange(SIDE) + 0.5) / SIDE
    values = inside((top + centers * (bottom - top))[:, None], (left + centers * (right - left))[None, :])
    return np.broadcast_to(values, (SIDE, SIDE)).reshape(size, SIDE // size, size, SIDE // size).mean(axis=(1, 3))


CROPS = [(0.0, 0.0, 1.0, 1.0), (0.25, 0.0, 0.75, 1.0), (0.1, 0.2, 0.9, 0.7)]
HUNDREDTHS = st.integers(0, 100).map(lambda n: n / 100)


@st.composite
def boxes(draw):
    (top, bottom), (left, right) = (sorted(draw(st.lists(HUNDREDTHS, min_size=2, max_size=2, unique=True))) for _ in "yx")
    return top, left, bottom, right


@settings(deadline=None, max_examples=60)
@given(given_boxes=st.lists(boxes(), min_size=1, max_size=3), crop=st.sampled_from(CROPS), size=st.sampled_from([4, 8]))
def test_boxes_are_the_shares_of_cells_that_they_cover(given_boxes, crop, size):
    """Several are one region: where they overlap, they cover a place once."""

    def inside(y, x):
        return np.any([(box[0] <= y) & (y < box[2]) & (box[1] <= x) & (x < box[3]) for box in given_boxes], axis=0)

    drawn = sound(boxes=given_boxes).raster(size, crop)
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(drawn, by_sampling(inside, size, crop), atol=2.5 * size / SIDE)
    assert np.array_equal(drawn, sound(boxes=np.array(given_boxes)).raster(size, crop))
    if len(given_boxes) == 1:
        assert np.array_equal(drawn, sound(box=given_boxes[0]).raster(size, crop))


@pytest.mark.parametrize("crop", CROPS)
def test_masks_and_maps_are_means_over_cells(crop):
    random = np.random.default_rng(0)
    mask, values = random.random((40, 20)) < 0.3, random.random((10, 25))

    def of(array):
        return lambda y, x: array[(y * len(array)).astype(int), (x * len(array[0])).astype(int)]

    for size in (4, 8):
        for given_mask in (mask, mask.astype(np.uint8), mask.tolist(), torch.from_numpy(mask), run_lengths(mask)):
            np.testing.assert_allclose(sound(mask=given_mask).raster(size, crop), by_sampling(of(mask), size, crop), atol=0.02)
        np.testing.assert_allclose(sound(map=values).raster(size, crop), by_sampling(of(values), size, crop), atol=0.02)


def test_a_map_of_the_targets_size_is_drawn_as_it_is():
    values = np.random.default_rng(0).random((32, 32))
    np.testing.assert_allclose(sound(map=values).raster(32), values, rtol=1e-6)
    mask = np.zeros((16, 16), bool)
    mask[3:9, 5] = True
    np.testing.assert_allclose(sound(mask=mask).raster(8), mask.reshape(8, 2, 8, 2).mean(axis=(1, 3)), atol=1e-7)


def test_nothing_is_too_small_to_be_drawn():
    assert sound(box=(0.5001, 0.5001, 0.5002, 0.5002)).raster(8).sum() == pytest.approx((64 * 1e-8), rel=1e-3)
    dot = np.zeros((1000, 1000), bool)
    dot[501, 3] = True
    assert np.argwhere(sound(mask=dot).raster(8)).tolist() == [[4, 0]]
    assert np.unravel_index(sound(points=(0.99, 0.01)).raster(4).argmax(), (4, 4)) == (3, 0)


@pytest.mark.parametrize("crop", CROPS)
def test_points_are_soft_discs_of_the_documented_size(crop):
    points = [(0.5, 0.25), (0.7, 0.6)]

    def discs(y, x):
        return sum(np.exp(-((y - py) ** 2 + (x - px) ** 2) / (2 * POINT_SIZE**2)) for py, px in points)

    np.testing.assert_allclose(sound(points=points).raster(8, crop), by_sampling(discs, 8, crop), atol=1e-4)
    one = sound(points=points[0]).raster(8, crop)
    assert np.array_equal(one, sound(points=[points[0]]).raster(8, crop))
    assert np.array_equal(one, sound(points=torch.tensor([points[0]], dtype=torch.float64)).raster(8, crop))


def test_a_region_outside_of_the_crop_is_nothing_there():
    for place in ({"box": (0, 0, 0.2, 1)}, {"mask": np.arange(100).reshape(10, 10) < 20}):
        assert not sound(**place).raster(8, (0.5, 0.0, 1.0, 1.0)).any()


THOUGHT = "<think>\nHm, a hat.\n</think>\n\nA hat."
TALK = (
    Message("system", "Be brief."),
    Message("user", "<image>\nWhat?"),
    Message("assistant", THOUGHT),
    Message("user", " \n"),
    Message("assistant", "Said before.", is_learned=False),
)
BOX = (0.0, 0.0, 0.5, 0.5)
NAN = float("nan")


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({"turn": 1}, "has no place; give exactly one of map, box, boxes, mask, points, word"),
        ({"turn": 1, "box": BOX, "mask": [[1]]}, "has box and mask; give exactly one of"),
        ({"turn": 1, "box": BOX, "boxes": [BOX]}, "has box and boxes; give exactly one of"),
        ({"box": BOX}, r"has box; expected turn, start and end"),
        ({}, r"has nothing; expected turn, start and end"),
        ({"turn": 1, "where": BOX}, r"has turn, where; expected turn, start and end"),
        ("zebra", "is a str; expected a Region, or a mapping"),
        ({"turn": 9, "box": BOX}, "is of turn 9; the sample has 5 messages, counted from 0"),
        ({"turn": -6, "box": BOX}, "is of turn -6; the sample has 5 messages"),
        ({"turn": 1.5, "box": BOX}, r"its turn is 1\.5; expected a whole number"),
        ({"turn": True, "box": BOX}, "its turn is True; expected a whole number"),
        ({"turn": 0, "box": BOX}, "is of a message of the system; expected one of the user or the assistant"),
        ({"turn": 1, "start": 8, "end": 99, "box": BOX}, "has the characters 8 to 99 of a text of 13; expected start < end in it"),
        ({"turn": 1, "start": 9, "end": 9, "box": BOX}, "has the characters 9 to 9 of a text of 13"),
        ({"turn": 1, "start": -4, "end": 9, "box": BOX}, "has the characters -4 to 9 of a text of 13"),
        ({"turn": 1, "start": 9, "box": BOX}, "has the characters 9 to None of .*; expected start < end in it, or neither"),
        ({"turn": 1, "start": 0, "end": 7, "box": BOX}, "has no text in it, but white space or a picture"),
        ({"turn": 3, "box": BOX}, "has no text in it, but white space or a picture"),
        ({"turn": 2, "start": 8, "end": 10, "box": BOX}, "is a part of the answer's thinking, which ends at character 29"),
        ({"turn": 2, "role": "prompt end", "start": 30, "end": 31, "box": BOX}, '"prompt end" is the last token before an answer'),
        ({"turn": 1, "role": "prompt end", "box": BOX}, '"prompt end" is the last token before an answer'),
        ({"turn": 4, "role": "prompt end", "box": BOX}, '"prompt end" is the last token before an answer that is learned'),
        ({"turn": 1, "role": "answer", "box": BOX}, "has the role 'answer', and its message is of the user; leave the role out"),
        ({"turn": 1, "role": "asks", "box": BOX}, "its role is 'asks'; expected 'prompt end', or None"),
        ({"turn": 1, "image": 1, "box": BOX}, "lies in image 1; the sample has 1, counted from 0"),
        ({"turn": 1, "box": (0, 0, 0.5)}, r"its boxes are \[\(0, 0, 0\.5\)\]; expected \(top, left, bottom, right\) in fractions"),
        ({"turn": 1, "box": (0.5, 0, 0.5, 1)}, "its boxes are .*with an area"),
        ({"turn": 1, "box": (0, 0, 64, 64)}, "its boxes are .*in fractions of the picture, 0 to 1"),
        ({"turn": 1, "box": (0, NAN, 1, 1)}, "its boxes are .*in fractions"),
        ({"turn": 1, "boxes": []}, r"its boxes are \[\]; expected"),
        ({"turn": 1, "boxes": BOX}, "its boxes are .*; expected"),
        ({"turn": 1, "box": "all"}, "its boxes are .*; expected"),
        ({"turn": 1, "mask": [[0, 2]]}, "its mask has values other than 0 and 1"),
        ({"turn": 1, "mask": [[0, 0]]}, "its mask is empty, it is nowhere in the picture; leave the region out"),
        ({"turn": 1, "mask": [[1], [0, 1]]}, r"its mask is \[\[1\], \[0, 1\]\]; expected \[y, x\]"),
        ({"turn": 1, "mask": np.ones((2, 2, 3))}, r"its mask is of the shape \[2, 2, 3\]; expected \[y, x\]"),
        ({"turn": 1, "mask": {"size": [2, 2], "counts": [1, 1]}}, "the runs of a mask are .* counts that sum to 2 x 2 pixels"),
        ({"turn": 1, "mask": {"counts": [4]}}, 'a run-length mask is .*; expected "size"'),
        ({"turn": 1, "map": [[0.0, 0.0]]}, "its map is empty"),
        ({"turn": 1, "map": [[0.0, -1.0]]}, r"its map is of the shape \[1, 2\]; expected .* finite and not negative"),
        ({"turn": 1, "map": [[0.0, NAN]]}, r"its map is of the shape \[1, 2\]; expected .* finite and not negative"),
        ({"turn": 1, "map": "hot"}, "its map is 'hot'; expected"),
        ({"turn": 1, "points": (0.5, 1.5)}, r"its points are \(0\.5, 1\.5\); expected \(y, x\) in fractions of the picture"),
        ({"turn": 1, "points": [(0.5, NAN)]}, "its points are .*; expected"),
        ({"turn": 1, "points": []}, r"its points are \[\]; expected"),
        ({"turn": 1, "points": 3}, "its points are 3; expected"),
        ({"turn": 1, "word": "two words"}, "its word is 'two words'; expected one word"),
        ({"turn": 1, "word": ""}, "its word is ''; expected one word"),
        ({"turn": 1, "word": (5, 3)}, r"its word is \(5, 3\); expected a word of the target's caption, or its \(start, end\)"),
        ({"turn": 1, "word": 7}, "its word is 7; expected"),
    ],
)  # fmt: skip
def test_what_says_nothing_is_refused(region, message):
    for given_region in (
        (region, Region(**region))
        if isinstance(region, dict) and region.keys() <= vars(Region(0)).keys() and ("turn" in region)
        else (region,)
    ):
        with pytest.raises(DataError, match=f"sample 'x', region 2:? {message}"):
            as_conversation(Conversation("x", (RED,), TALK, regions=(Region(1, box=BOX), given_region)))
    with pytest.raises(DataError, match="sample 'x': its regions are a dict; expected a list"):
        as_conversation(Conversation("x", (RED,), TALK, regions={"turn": 1}))


def test_spans_are_those_of_what_was_given():
    """Whatever pictures are put before it; of parts, those of their texts."""
    place = {"box": BOX}
    at = QUESTION.index("zebra")
    zebra = {"turn": 0, "start": at, "end": at + 5} | place
    parts = [{"type": "text", "text": QUESTION[: at + 2]}, {"type": "image"}, {"type": "text", "text": QUESTION[at + 2 :]}]
    forms = [
        Sample("x", RED, QUESTION, ANSWER, regions=(Region(**zebra),)),
        {"id": "x", "image": RED, "question": QUESTION, "answer": ANSWER, "regions": [zebra]},
        Conversation("x", (RED,), (Message("user", QUESTION), Message("assistant", ANSWER)), regions=(Region(**zebra),)),
        {"images": [RED], "prompt": QUESTION, "completion": ANSWER, "regions": [zebra | {"turn": -2, "map": None}]},
        {
            "images": [RED],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
                {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
            ],
            "regions": [zebra, zebra | {"turn": 1, "start": 0, "end": 4}],
        },
        {
            "images": [RED],
            "messages": [{"role": "user", "content": f"<image>\n{QUESTION}"}, {"role": "assistant", "content": ANSWER}],
            "regions": [zebra | {"start": at + 8, "end": at + 13}],
        },
    ]
    for form in forms:
        conversation = as_conversation(form)
        first = conversation.regions[0]
        assert (first.turn, conversation.messages[0].content[first.start : first.end]) == (0, "zebra")
        again = as_conversation(conversation).regions[0]
        assert (again.turn, again.start, again.end) == (first.turn, first.start, first.end)
    assert [(r.start, r.end) for r in as_conversation(forms[4]).regions][1] == (0, 4)
    apart = {"images": [RED], "messages": [{"role": "user", "content": parts}, *forms[5]["messages"][1:]], "regions": [zebra]}
    conversation = as_conversation(apart)
    (region,) = conversation.regions
    assert conversation.messages[0].content[region.start : region.end] == "ze<image>bra"
    with pytest.raises(DataError, match=f"has the characters 5 to 24 of a text of {len(QUESTION)}"):
        as_conversation(apart | {"regions": [zebra | {"start": 5, "end": 24}]})


def test_of_several_pictures_a_region_names_its_own():
    talk = (Message("user", "<image> and <image>?"), Message("assistant", ANSWER))
    with pytest.raises(DataError, match="region 1 does not say in which of 2 pictures it lies; give its number as image"):
        as_conversation(Conversation("x", (RED, BLUE), talk, regions=(Region(1, box=BOX),)))
    assert as_conversation(Conversation("x", (RED, BLUE), talk, regions=(Region(1, box=BOX, image=1),))).regions[0].image == 1
    assert as_conversation(Conversation("x", (RED, BLUE), talk, regions=(Region(1, word="hat"),))).regions[0].image is None


def test_files_and_tables_have_regions(tmp_path):
    RED.save(tmp_path / "red.png")
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2] = True
    regions = [
        {"turn": 1, "start": 0, "end": 4, "box": [0, 0, 0.5, 0.5]},
        {"turn": 0, "mask": run_lengths(mask)},
        {"turn": 1, "role": "prompt end", "points": [[0.5, 0.5], [0.25, 0.75]]},
        {"turn": 1, "start": 10, "end": 13, "word": "hat"},
    ]
    plain = {"image": "red.png", "question": QUESTION, "answer": ANSWER, "regions": regions}
    talk = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]
    (tmp_path / "data.json").write_text(
        json.dumps([plain, {"id": "b", "image": "red.png", "conversations": talk, "regions": regions}])
    )
    samples = read_samples(tmp_path / "data.json")
    row = Dataset.from_list([{"id": "c", "question": QUESTION, "answer": ANSWER, "regions": regions}])[0]
    for sample in (*samples, row | {"image": RED}):
        found = as_conversation(sample).regions
        assert [region.turn for region in found] == [1, 0, 1, 1]
        assert (found[0].start, found[0].end, found[0].boxes) == (0, 4, ((0, 0, 0.5, 0.5),))
        assert np.array_equal(found[1].mask, mask)
        assert found[2].points == ((0.5, 0.5), (0.25, 0.75))
        assert (found[3].word, found[3].is_place) == ("hat", False)
    (tmp_path / "bad.json").write_text(json.dumps(plain | {"regions": [{"turn": 1, "start": 0, "end": 99, "box": BOX}]}))
    with pytest.raises(DataError, match=r"bad\.json, line 1: sample 'red\.png', region 1 has the characters 0 to 99"):
        read_samples(tmp_path / "bad.json")


def test_a_runs_record_knows_regions():
    """A run goes on with the same regions only; samples without any are recorded as they always were."""
    plain = Sample("x", RED, QUESTION, ANSWER)
    assert _texts(plain) == ["x", [], QUESTION, ANSWER]
    values = np.random.default_rng(0).random((4, 4))
    places = [
        {"box": BOX}, {"box": (0, 0, 0.5, 0.6)}, {"map": values}, {"map": values + 1}, {"mask": values > 0.5}, {"word": "hat"},
        {"word": (3, 5)}, {"points": (0.5, 0.5)}, {"box": BOX, "start": 1, "end": 3}, {"box": BOX, "role": "prompt end"},
        {"mask": run_lengths(values > 0.5)}, {"map": torch.from_numpy(values)},
    ]  # fmt: skip
    records = [json.dumps(_texts(Sample("x", RED, QUESTION, ANSWER, regions=(Region(1, **place),)))) for place in places]
    assert records[-1] == records[2]
    assert len({*records}) == len(records) - 1


def test_regions_are_sound_once_and_for_all():
    conversation = as_conversation(Sample("x", RED, QUESTION, ANSWER, regions=(Region(-1, mask=[[0, 1]]),)))
    (again,) = sound_regions(conversation)
    assert again.turn == 1
    assert np.array_equal(again.mask, conversation.regions[0].mask)


@pytest.mark.parametrize("crop", CROPS)
def test_a_target_has_a_maximum_of_one_whatever_the_size_and_the_scale(crop):
    values = np.random.default_rng(0).random((32, 32))
    fine = np.kron(values, np.ones((4, 4)))
    expected = sound(map=values).raster(8, crop).astype(np.float64)
    for given_map in (
        values,
        values * 1e-35,
        values * 1e35,
        values / values.sum(),
        fine,
        fine / fine.sum(),
        values[..., None][..., 0],
    ):
        np.testing.assert_allclose(sound(map=given_map).target(8, crop), expected / expected.max(), rtol=1e-5)
    for place in (
        {"box": (0.5, 0.5, 0.5001, 0.5001)},
        {"box": (0.4, 0.4, 0.45, 0.6)},
        {"points": (0.5, 0.5)},
        {"mask": values > 0.99},
    ):
        target, raster = sound(**place).target(8, crop), sound(**place).raster(8, crop).astype(np.float64)
        assert target.dtype == np.float32
        assert target.max() == 1
        np.testing.assert_allclose(target, raster / raster.max(), rtol=1e-4)


def test_what_is_the_same_all_over_what_is_compared_is_no_target():
    whole, right = (0.0, 0.0, 1.0, 1.0), (0.0, 0.5, 1.0, 1.0)
    gradient = np.arange(64.0).reshape(8, 8)
    same = [
        {"box": whole}, {"box": (0, 0, 1, 0.999)}, {"mask": np.ones((9, 7))}, {"map": np.full((5, 5), 3e-9)},
        {"map": 1e6 + gradient}, {"boxes": [(0, 0, 1, 0.5), (0, 0.5, 1, 1)]},
    ]  # fmt: skip
    for place in same:
        assert sound(**place).target(8) is None, place
    for place in ({"box": (0, 0, 1, 0.9)}, {"map": 10 + gradient}, {"points": (0.5, 0.5)}):
        assert sound(**place).target(8) is not None, place
    # Within a crop, and within what a student's processor shows of it.
    for place in ({"box": (0, 0.4, 1, 1)}, {"box": (0, 0, 1, 0.5)}, {"map": np.eye(8)[:1]}, {"mask": np.eye(2)[[0]]}):
        assert sound(**place).target(8) is not None
        assert sound(**place).target(8, right) is None
        assert sound(**place).target(8, whole, right) is None
    left = sound(box=(0, 0, 1, 0.25))
    assert left.target(8, whole, right) is None
    assert np.array_equal(left.target(8), left.raster(8))
    assert sound(box=BOX).target(8, (0.0, 0.0, 0.4, 1.0), (0.6, 0.0, 1.0, 1.0)) is None


def test_a_point_is_where_its_center_is():
    """The tail of a disc in another part of the picture is no place in this one."""
    crop = (0.5, 0.0, 1.0, 1.0)
    for y in (0.45, 0.3, 0.0):
        assert sound(points=(y, 0.5)).target(8, crop) is None
        assert not sound(points=(y, 0.5)).raster(8, crop).any()
        both = sound(points=[(y, 0.5), (0.75, 0.25)])
        assert np.array_equal(both.target(8, crop), sound(points=(0.75, 0.25)).target(8, crop))
    assert sound(points=(0.5, 0.5)).target(8, crop).argmax() // 8 == 0
    for corner in ((0, 0), (1, 1), (-0.0005, 1.0005)):
        assert sound(points=corner).target(8) is not None


@pytest.mark.parametrize("value", [[[1e39, 0.0]], [[float("inf"), 0.0]], np.full((2, 2), np.finfo(np.float64).max)])
def test_maps_that_float32_cannot_hold_are_refused(value):
    with pytest.raises(DataError, match=r"its map is of the shape \[\d, 2\]; expected \[y, x\] over the whole picture, finite"):
        sound(map=value)


def compressed(counts) -> str:
    """COCO's text of run lengths, as pycocotools writes it: from the fourth on differences, five bits a character."""
    text = ""
    for n, count in enumerate(counts):
        value = count - (counts[n - 2] if n > 2 else 0)
        while True:
            bits, value = value & 0x1F, value >> 5
            more = value != -1 if bits & 0x10 else value != 0
            text += chr((bits | 0x20 if more else bits) + 48)
            if not more:
                break
    return text


def test_run_lengths_stay_compressed_until_they_are_drawn():
    mask = np.zeros((480, 640), bool)
    mask[100:220, 300:400] = True
    runs = run_lengths(mask)
    counts = runs["counts"]
    forms = [
        runs, {"size": (480, 640), "counts": tuple(counts)}, {"size": np.array([480, 640]), "counts": np.array(counts, np.uint32)},
        {"size": torch.tensor([480, 640]), "counts": torch.tensor(counts)}, {"size": [480, 640], "counts": compressed(counts)},
        {"size": [480, 640], "counts": compressed(counts).encode()},
    ]  # fmt: skip
    drawn = sound(mask=mask).target(16)
    for form in forms:
        region = sound(mask=form)
        assert len(pickle.dumps(region)) < 10_000 < mask.nbytes
        assert np.array_equal(region.mask, mask)
        assert np.array_equal(region.target(16), drawn)
        assert region.record() == sound(mask=runs).record()
        (again,) = as_conversation(Sample("x", RED, QUESTION, ANSWER, regions=(region,))).regions
        assert again.mask is region.mask
    with pytest.raises(DataError, match="its mask is empty, it is nowhere in the picture"):
        sound(mask=run_lengths(np.zeros((4, 4), bool)))
    with pytest.raises(DataError, match="the runs of a mask are"):
        sound(mask={"size": [4, 4], "counts": b"\xff\xfe"})


def test_rows_of_tables_have_arrays_for_lists_and_numbers():
    nan = float("nan")
    entries = [
        {"turn": 1.0, "start": 0.0, "end": 4.0, "box": np.array(BOX), "word": None, "image": nan},
        {"turn": np.array(1), "start": np.array(10), "end": torch.tensor(13), "points": torch.tensor([[0.5, 0.5]]), "role": None},
        {"turn": torch.tensor(-2), "word": np.array([3, 5])},
    ]
    rows = np.empty(len(entries), dtype=object)
    rows[:] = entries
    for regions in (rows, entries, tuple(entries)):
        found = as_conversation({"id": "x", "image": RED, "question": QUESTION, "answer": ANSWER, "regions": regions}).regions
        assert [region.turn for region in found] == [1, 1, 0]
        assert [(region.start, region.end) for region in found] == [(0, 4), (10, 13), (None, None)]
        assert (found[0].boxes, found[1].points, found[2].word) == ((BOX,), ((0.5, 0.5),), (3, 5))
    with pytest.raises(DataError, match=r"its start is 0\.5; expected a whole number"):
        as_conversation({"id": "x", "image": RED, "question": QUESTION, "answer": ANSWER, "regions": [entries[0] | {"start": 0.5}]})


def test_a_region_counts_pictures_as_they_are_given():
    """Those that no message has a place for come first, whatever their number."""
    messages = [
        {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."},
        {"role": "user", "content": "<image>And here?"}, {"role": "assistant", "content": "There."},
    ]  # fmt: skip
    for n, picture in enumerate((RED, BLUE)):
        given = {"id": "x", "images": [RED, BLUE], "messages": messages, "regions": [{"turn": 3, "box": BOX, "image": n}]}
        conversation = as_conversation(given)
        (region,) = conversation.regions
        assert conversation.images[region.image] is picture
        assert as_conversation(conversation).regions[0].image == region.image
    held = [{"role": "user", "content": [{"type": "image", "image": RED}, {"type": "image"}, {"type": "text", "text": "Where?"}]}]
    mixed = {"id": "x", "images": [BLUE], "messages": [*held, messages[1]]}
    assert as_conversation(mixed).images == (RED, BLUE)
    with pytest.raises(DataError, match=r'sample .x. has pictures in its messages and under "images", and regions that name one'):
        as_conversation(mixed | {"regions": [{"turn": 1, "box": BOX, "image": 0}]})


def test_characters_are_those_of_the_content_and_of_a_list_of_parts_its_texts():
    content = "Is it <image>there a ring?"
    message = Message("user", content, ("Is it ", "<image>", "there a ring?"))
    answer, at = Message("assistant", "Yes."), content.index("ring")
    listed = [{"type": "text", "text": "Is it "}, {"type": "image"}, {"type": "text", "text": "there a ring?"}]
    samples = [Conversation("x", (RED,), (message, answer), regions=(Region(0, at, at + 4, box=BOX),))]
    for said, start in ((message, at), (vars(message), at), ({"content": content}, at), ({"content": listed}, at - len("<image>"))):
        said = said if isinstance(said, Message) else {"role": "user"} | said
        regions = [Region(0, start, start + 4, box=BOX)]
        samples.append({"id": "x", "images": [RED], "messages": [said, answer], "regions": regions})
    for sample in samples:
        for conversation in (as_conversation(sample), as_conversation(as_conversation(sample))):
            (region,) = conversation.regions
            assert conversation.messages[0].content[region.start : region.end] == "ring"


@pytest.mark.parametrize("regions", [0, False, "", {}, {"turn": 1}, "all", 1.5])
def test_a_files_regions_are_a_list_or_nothing(tmp_path, regions):
    RED.save(tmp_path / "red.png")
    plain = {"image": "red.png", "question": QUESTION, "answer": ANSWER}
    talk = {"image": "red.png", "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]}
    for entry in (plain, talk):
        for nothing in (None, []):
            (tmp_path / "data.json").write_text(json.dumps([entry | {"regions": nothing}]))
            assert read_samples(tmp_path / "data.json")[0].regions == ()
        (tmp_path / "data.json").write_text(json.dumps([entry | {"regions": regions}]))
        with pytest.raises(DataError, match=r"its regions are a \w+; expected a list"):
            read_samples(tmp_path / "data.json")
