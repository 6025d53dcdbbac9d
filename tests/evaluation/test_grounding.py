"""Masks and boxes of data sets: what is read, what names it, and what is refused."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from lavender.errors import DataError
from lavender.evaluation.grounding import RASTER, Region, read_groundings, run_lengths
from lavender.miniworld import write_dataset


def named(grounding, caption):
    """Words that name an object, with the index of it."""
    return [(caption[w.start : w.end], w.object_index) for w in grounding.words]


def cells(top, left, bottom, right):
    """A raster that is true in these rows and columns."""
    raster = np.zeros((RASTER, RASTER), bool)
    raster[top:bottom, left:right] = True
    return raster


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


# Regions


def test_a_cell_is_in_a_box_if_its_center_is():
    box = (1.5 / RASTER, 0.0, 3.5 / RASTER, 2.49 / RASTER)
    np.testing.assert_array_equal(Region(boxes=(box,)).raster(), cells(1, 0, 3, 2))


def test_a_region_is_the_union_of_its_parts():
    mask = np.zeros((2, 4), bool)
    mask[1, 3] = True
    region = Region(boxes=((0, 0, 0.5, 0.25), (0, 0, 0.25, 0.5)), masks=(mask,))
    expected = cells(0, 0, 32, 16) | cells(0, 0, 16, 32) | cells(32, 48, 64, 64)
    np.testing.assert_array_equal(region.raster(), expected)


def test_a_crop_shows_its_part_and_nothing_beyond_the_picture():
    everything = Region(boxes=((0, 0, 1, 1),))
    np.testing.assert_array_equal(everything.raster((-0.5, 0.0, 0.5, 1.0)), cells(32, 0, 64, 64))
    np.testing.assert_array_equal(Region(masks=(np.ones((3, 5), bool),)).raster((0.0, -1.0, 1.0, 3.0)), cells(0, 16, 64, 32))
    quarter = Region(boxes=((0.25, 0.25, 0.5, 0.5),))
    np.testing.assert_array_equal(quarter.raster((0.25, 0.0, 0.75, 0.5)), cells(0, 32, 32, 64))
    assert not quarter.raster((0.5, 0.0, 1.0, 1.0)).any()


fractions = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


@settings(max_examples=50, deadline=None)
@given(fractions, fractions)
def test_a_rectangle_is_the_same_as_box_and_as_polygon(vertical, horizontal):
    (top, bottom), (left, right) = vertical, horizontal
    corners = np.array([[top, left], [top, right], [bottom, right], [bottom, left]])
    box = Region(boxes=((top, left, bottom, right),)).raster()
    np.testing.assert_array_equal(Region(polygons=(corners,)).raster(), box)
    np.testing.assert_array_equal(Region(polygons=(corners[::-1],)).raster(), box)


def test_a_triangle_has_half_of_its_rectangle():
    raster = Region(polygons=(np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]),)).raster()
    np.testing.assert_array_equal(raster, np.tri(RASTER, k=-1, dtype=bool) | (raster & np.eye(RASTER, dtype=bool)))


masks = arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9))


def packed(counts):
    """COCO's compressed text, as its C code (rleToString) writes it."""
    text = ""
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        while True:
            bits = value & 0x1F
            value >>= 5
            more = value != -1 if bits & 0x10 else value != 0
            text += chr((bits | 0x20 if more else bits) + 48)
            if not more:
                break
    return text


@settings(max_examples=60, deadline=None)
@given(mask=masks, compressed=st.booleans())
def test_run_lengths_keep_a_mask(tmp_path_factory, mask, compressed):
    runs = run_lengths(mask)
    assert sum(runs["counts"]) == mask.size
    if compressed:
        runs["counts"] = packed(runs["counts"])
    path = tmp_path_factory.mktemp("runs") / "g.jsonl"
    write_lines(path, {"id": "a", "objects": [{"rle": runs}], "words": []})
    region = read_groundings(path).of("a", "").objects[0]
    np.testing.assert_array_equal(region.masks[0], mask)


def test_run_lengths_go_down_the_columns():
    mask = np.array([[True, False, False], [True, True, False]])
    assert run_lengths(mask) == {"size": [2, 3], "counts": [0, 2, 1, 1, 2]}


# Our own lines


def test_own_lines_hold_boxes_masks_and_runs(tmp_path):
    (tmp_path / "masks").mkdir()
    label = np.zeros((8, 8), np.uint8)
    label[:4] = 1  # as good as 255
    Image.fromarray(label).save(tmp_path / "masks/a.png")
    line = {
        "id": "a.jpg",
        "objects": [
            {"boxes": [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]},
            {"mask": "masks/a.png"},
            {"rle": {"size": [1, 2], "counts": [1, 1]}},
        ],
        "words": [{"start": 2, "end": 5, "object": 0}, {"start": 9, "end": 12, "object": 1}],
    }
    groundings = read_groundings(write_lines(tmp_path / "g.jsonl", line, "", {"id": "b", "objects": [], "words": []}))
    caption = "a cat in hat"
    grounding = groundings.of("a.jpg", caption)
    rasters = [region.raster() for region in grounding.objects]
    np.testing.assert_array_equal(rasters[0], cells(0, 0, 32, 32) | cells(32, 32, 64, 64))
    np.testing.assert_array_equal(rasters[1], cells(0, 0, 32, 64))
    np.testing.assert_array_equal(rasters[2], cells(0, 32, 64, 64))
    assert named(grounding, caption) == [("cat", 0), ("hat", 1)]
    assert groundings.of("a", caption) is None
    assert list(groundings.ids) == ["a.jpg", "b"]


def test_the_small_world_writes_its_exact_masks(scenes, tmp_path):
    write_dataset(scenes, tmp_path)
    groundings = read_groundings(tmp_path / "grounding.jsonl")
    for number, scene in enumerate(scenes):
        grounding = groundings.of(f"images/{number:05d}.png", scene.caption)
        np.testing.assert_array_equal([region.raster() for region in grounding.objects], scene.masks)
        measured = [(scene.caption[r.start : r.end], r.object_index) for r in scene.referents if r.kind != "size"]
        assert named(grounding, scene.caption) == measured


BOX = {"boxes": [[0, 0, 1, 1]]}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is no JSON"),
        ("[]", "line 2 is []"),
        ({"objects": []}, "line 2 is {'objects'"),
        ({"id": "a", "objects": [], "words": []}, "'a' occurs twice"),
        ({"id": "b", "objects": None, "words": []}, "'objects' is None"),
        ({"id": "b", "objects": [], "words": {}}, "'words' is {}"),
        ({"id": "b", "objects": [{}], "words": []}, "line 2, object 0 is {}"),
        ({"id": "b", "objects": [{**BOX, "mask": "m.png"}], "words": []}, "object 0 is"),
        ({"id": "b", "objects": [BOX, {"boxes": [[0, 0, 40, 30]]}], "words": []}, "object 1: a box is .* fractions"),
        ({"id": "b", "objects": [{"boxes": [[0.5, 0, 0.4, 1]]}], "words": []}, "a box is"),
        ({"id": "b", "objects": [{"boxes": [[0, 0, 1]]}], "words": []}, "list of 4 numbers"),
        ('{"id": "b", "objects": [{"boxes": [[0, 0, NaN, 1]]}], "words": []}', "list of 4 numbers"),
        ({"id": "b", "objects": [{"mask": "../m.png"}], "words": []}, "expected a path below"),
        ({"id": "b", "objects": [{"mask": "/etc/passwd"}], "words": []}, "expected a path below"),
        ({"id": "b", "objects": [{"mask": "m.png"}], "words": []}, "no image at"),
        ({"id": "b", "objects": [{"rle": {"size": [2, 2], "counts": [1, 2]}}], "words": []}, "sum to 2 x 2"),
        ({"id": "b", "objects": [{"rle": {"size": [2, 2], "counts": [-1, 5]}}], "words": []}, "sum to 2 x 2"),
        ({"id": "b", "objects": [{"rle": {"size": [2, 2], "counts": "oo"}}], "words": []}, "sum to 2 x 2"),
        ({"id": "b", "objects": [{"rle": {"size": [0, 2], "counts": []}}], "words": []}, "height, width"),
        ({"id": "b", "objects": [BOX], "words": [{"start": 3, "end": 3, "object": 0}]}, "a word is"),
        ({"id": "b", "objects": [BOX], "words": [{"start": 0, "end": 3}]}, "a word is"),
        ({"id": "b", "objects": [BOX], "words": [{"start": 0, "end": 3, "object": 1}]}, "object 1; the line has 1"),
    ],
)
def test_damage_in_own_lines_is_named(tmp_path, line, said):
    path = write_lines(tmp_path / "g.jsonl", {"id": "a", "objects": [], "words": []}, line)
    with pytest.raises(DataError, match=said.replace("[", r"\[")):
        read_groundings(path).of("b", "a red cat")


def test_what_is_no_grounding_is_refused(tmp_path):
    with pytest.raises(DataError, match="no masks at"):
        read_groundings(tmp_path / "nothing")
    with pytest.raises(DataError, match="no folder of Flickr30k Entities"):
        read_groundings(tmp_path)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        read_groundings(tmp_path / "empty")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="no text in UTF-8"):
        read_groundings(tmp_path / "bytes")


# COCO


def coco(**changes):
    return {
        "images": [
            {"id": 7, "file_name": "val/a.jpg", "width": 128, "height": 64},
            {"id": 8, "file_name": "val/b.jpg", "width": 64, "height": 64},
        ],
        "categories": [
            {"id": 1, "name": "person"},
            {"id": 2, "name": "dog"},
            {"id": 3, "name": "traffic light"},
            {"id": 4, "name": "hot dog"},
            {"id": 5, "name": "bus"},
            {"id": 6, "name": "Berry"},
        ],
        "annotations": [
            {"image_id": 7, "category_id": 2, "bbox": [0, 0, 32, 16]},
            {"image_id": 7, "category_id": 3, "bbox": [0, 0, 9, 9], "segmentation": [[64, 32, 128, 32, 128, 64, 64, 64]]},
            {"image_id": 7, "category_id": 2, "bbox": [96, 48, 32, 16], "segmentation": []},
            {"image_id": 8, "category_id": 5, "bbox": [0, 0, 1, 1], "segmentation": {"size": [2, 2], "counts": [0, 1, 3]}},
            {"image_id": 8, "category_id": 6, "bbox": [0, 0, 64, 64]},
        ],
        **changes,
    }


@pytest.fixture
def instances(tmp_path):
    return read_groundings(write_lines(tmp_path / "instances.json", coco()))


def test_instances_of_a_category_are_one_object(instances):
    grounding = instances.of("a.jpg", "")
    dogs, light = (region.raster() for region in grounding.objects)
    np.testing.assert_array_equal(dogs, cells(0, 0, 16, 16) | cells(48, 48, 64, 64))
    np.testing.assert_array_equal(light, cells(32, 32, 64, 64))
    bus = instances.of("b.jpg", "").objects[0].raster()
    np.testing.assert_array_equal(bus, cells(0, 0, 32, 32))


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog under a traffic light.", [("dog", 0), ("traffic", 1), ("light", 1)]),
        ("Two Dogs, two traffic lights", [("Dogs", 0), ("traffic", 1), ("lights", 1)]),
        ("Light traffic: a hot dog, a hot, dog", [("dog", 0)]),
        ("a traffic, light; a person and people, doghouse", []),
        ("hot dogs", []),
        ("", []),
        ("the light of traffic", []),
    ],
)
def test_words_that_name_a_category(instances, caption, expected):
    assert named(instances.of("a.jpg", caption), caption) == expected


def test_simple_plurals(instances):
    caption = "bus buses berry berries"
    assert named(instances.of("b.jpg", caption), caption) == [("bus", 0), ("buses", 0), ("berry", 1), ("berries", 1)]


@pytest.mark.parametrize("own_id", ["val/a.jpg", "a.jpg", "a.jpg#3", "val/a.jpg#12", "elsewhere/a.jpg"])
def test_an_id_finds_its_picture(instances, own_id):
    assert len(instances.of(own_id, "").objects) == 2


def test_an_id_that_fits_no_picture_or_two_finds_none(instances, tmp_path):
    assert instances.of("c.jpg", "") is None
    assert instances.of("a", "") is None
    images = [{"id": n, "file_name": f"{n}/a.jpg", "width": 8, "height": 8} for n in (7, 8)]
    twice = read_groundings(write_lines(tmp_path / "twice.json", coco(images=images)))
    assert twice.of("a.jpg", "") is None
    assert len(twice.of("7/a.jpg", "").objects) == 2


def annotation(**changes):
    return [{"image_id": 7, "category_id": 2, "bbox": [0, 0, 1, 1], **changes}]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": None}, "'images' is None"),
        ({"images": [{"id": 7, "file_name": "a.jpg", "width": 4}]}, "images 1 is"),
        ({"images": [{"id": 7, "file_name": "a.jpg", "width": 4, "height": 0}]}, "images 1: its size"),
        ({"categories": [{"id": 2}]}, "categories 1 is"),
        ({"annotations": {}}, "'annotations' is {}"),
        ({"annotations": annotation(image_id=9)}, "annotations 1 belongs to image 9"),
        ({"annotations": annotation(category_id=9)}, "category 9"),
        ({"annotations": annotation(bbox=[1, 2, 3])}, "annotations 1: its bbox"),
        ({"annotations": annotation(segmentation=[[1, 2, 3, 4]])}, "4 numbers; expected x and y"),
        ({"annotations": annotation(segmentation=[[1, 2, 3, 4, 5, "6"]])}, "a polygon is"),
        ({"annotations": annotation(segmentation={"size": [4, 4], "counts": [3]})}, "annotations 1: the runs"),
    ],
)
def test_damage_in_instances_is_named(tmp_path, changes, said):
    with pytest.raises(DataError, match=said):
        read_groundings(write_lines(tmp_path / "i.json", coco(**changes))).of("a.jpg", "")


# Flickr30k Entities

SENTENCES = """[/EN#1/people A man] in [/EN#2/clothing an orange hat] starring at [/EN#3/other something] .
[/EN#1/people A man] wears [/EN#2/clothing an orange hat] and [/EN#4/bodyparts glasses] with [/EN#0/notvisual the man 's] pride .
"""
ANNOTATION = """<annotation>
<filename>12.jpg</filename><size><width>128</width><height>64</height><depth>3</depth></size>
<object><name>1</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>64</xmax><ymax>64</ymax></bndbox></object>
<object><name>2</name><name>5</name><bndbox><xmin>65</xmin><ymin>1</ymin><xmax>128</xmax><ymax>16</ymax></bndbox></object>
<object><name>2</name><bndbox><xmin>1</xmin><ymin>49</ymin><xmax>32</xmax><ymax>64</ymax></bndbox></object>
<object><name>3</name><scene>1</scene><nobndbox>0</nobndbox></object>
<object><name>6</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>64</xmax><ymax>64</ymax></bndbox></object>
</annotation>
"""


@pytest.fixture
def entities(tmp_path):
    for folder, name, text in (("Sentences", "12.txt", SENTENCES), ("Annotations", "12.xml", ANNOTATION)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    return tmp_path


def test_phrases_name_entities_that_have_boxes(entities):
    groundings = read_groundings(entities)
    caption = "A man wears an orange hat and glasses with the man's pride."
    grounding = groundings.of("12.jpg#1", caption)
    words = named(grounding, caption)
    assert [word for word, _ in words] == ["man", "orange", "hat"]
    man, hat = (grounding.objects[words[n][1]].raster() for n in (0, 2))
    # Pixels 1 to 64 of 128 are the left half; 65 to 128 the right one.
    np.testing.assert_array_equal(man, cells(0, 0, 64, 32))
    np.testing.assert_array_equal(hat, cells(0, 32, 16, 64) | cells(48, 0, 64, 16))
    assert words[1][1] == words[2][1]
    # Entity 6 has the man's box, 5 one of the hat's two.
    assert len(grounding.objects) == 3


def test_the_line_of_a_caption_shows_in_its_letters(entities):
    groundings = read_groundings(entities)
    caption = "a MAN in an orange-hat, starring at something"
    for own_id in ("12", "12.jpg", "12.jpg#4", "images/12.jpg"):
        assert [word for word, _ in named(groundings.of(own_id, caption), caption)] == ["MAN", "orange-hat"]
    assert groundings.of("12.jpg", "Another man.") is None
    assert groundings.of("12.jpg", "") is None
    assert groundings.of("13.jpg", caption) is None
    assert groundings.of("../Sentences/12", caption) is not None  # the name alone counts
    assert list(groundings.ids) == ["12"]


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("Sentences/12.txt", "hat] starring", "hat starring", "12.txt, line 1 has a phrase"),
        ("Annotations/12.xml", "</annotation>", "", "12.xml is no XML"),
        ("Annotations/12.xml", "<annotation>", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>', "declares a document type"),
        ("Annotations/12.xml", "<width>128</width>", "", "the size is"),
        ("Annotations/12.xml", "<height>64</height>", "<height>0</height>", "numbers above 0"),
        ("Annotations/12.xml", "<xmin>65</xmin>", "<xmin>129</xmin>", "object 2 has a box from"),
        ("Annotations/12.xml", "<ymin>49</ymin>", "<ymin>top</ymin>", "object 3 is"),
        ("Annotations/12.xml", "<ymin>49</ymin>", "<ymin>nan</ymin>", "object 3 is"),
    ],
)
def test_damage_in_entities_is_named(entities, file, old, new, said):
    path = entities / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=said):
        read_groundings(entities).of("12.jpg", "A man in an orange hat starring at something.")


def test_a_picture_without_annotation_has_no_grounding(entities):
    (entities / "Sentences/13.txt").write_text("[/EN#1/people A man] .")
    assert read_groundings(entities).of("13.jpg", "A man.") is None


def test_a_pipe_among_the_files_is_named_and_never_waited_for(tmp_path):
    (tmp_path / "masks").mkdir()
    os.mkfifo(tmp_path / "masks/a.png")
    lines = write_lines(tmp_path / "a.jsonl", {"id": "x", "caption": "A cat.", "objects": [{"mask": "masks/a.png"}], "words": []})
    with pytest.raises(DataError, match="expected a regular file, and this is a pipe"):
        read_groundings(lines).of("x", "A cat.").objects[0]
    (tmp_path / "Sentences").mkdir()
    (tmp_path / "Annotations").mkdir()
    os.mkfifo(tmp_path / "Sentences/1.txt")
    (tmp_path / "Annotations/1.xml").write_text("<annotation/>")
    with pytest.raises(DataError, match=r"cannot read .*1\.txt: .*expected a regular file, and this is a pipe"):
        read_groundings(tmp_path).of("1.jpg", "A cat.")
