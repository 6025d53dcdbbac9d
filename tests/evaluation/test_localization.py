from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
from typer.testing import CliRunner

from lavender.cli import app
from lavender.data.samples import read_pairs
from lavender.errors import DataError, LavenderError
from lavender.evaluation.grounding import RASTER, Grounding, NamingWord, Region, read_groundings
from lavender.evaluation.localization import (
    MeasuredWord,
    chance,
    evaluate_maps,
    localization,
    word_agnostic,
)
from lavender.images import image_sha256
from lavender.miniworld import write_dataset
from lavender.miniworld.measures import compare_targets
from lavender.miniworld.scenes import make_scene
from lavender.targets.manifest import StoreConfig
from lavender.targets.store import Target, TargetStore, TargetWriter
from lavender.types import WHOLE_PICTURE, WordMaps
from lavender.words import words_of


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


@dataclass(frozen=True)
class Known:
    """Groundings by sample id."""

    by_id: dict[str, Grounding]

    @property
    def ids(self):
        return self.by_id

    def of(self, sample_id, caption):
        return self.by_id.get(sample_id)


def target(sample_id, caption, maps, crop=WHOLE_PICTURE):
    return Target(sample_id, "", WordMaps(caption, words_of(caption), np.asarray(maps, np.float32), crop))


HALVES = (Region(boxes=((0, 0, 1, 0.5),)), Region(boxes=((0, 0.5, 1, 1),)))
CAPTION = "cat dog left"
CAT, DOG, LEFT = NamingWord(0, 3, 0), NamingWord(4, 7, 1), NamingWord(8, 12, 0)
IN_LEFT, IN_RIGHT, FLAT = np.repeat([[1.0, 0.0]], 2, 0), np.repeat([[0.0, 1.0]], 2, 0), np.ones((2, 2))


def measured(maps, objects=HALVES, words=(CAT, DOG, LEFT), crop=WHOLE_PICTURE):
    return evaluate_maps({"a": target("a", CAPTION, maps, crop)}, Known({"a": Grounding(objects, words)}), progress=False)


def scores(figures):
    return tuple(figures[name] for name in ("pointing", "own_object", "iou", "auc"))


def test_a_store_of_three_words_worked_by_hand():
    figures = measured([IN_LEFT, IN_LEFT, IN_LEFT])
    # The second word points at the other object: its hot half and its object share nothing.
    assert scores(figures["maps"]) == (0.6667, 0.6667, 0.6667, 0.6667)
    assert scores(figures["control"]) == (0.6667, 0.6667, 0.6667, 0.6667)
    assert scores(figures["chance"]) == (0.5, 0.5, 0.3333, 0.5)
    figures = measured([IN_LEFT, IN_RIGHT, FLAT])
    # A flat map: its first pixel is its hottest and lies in the left half, nothing is above half its range, every pair is a tie.
    assert scores(figures["maps"]) == (1, 0.6667, 0.6667, 0.8333)
    assert scores(figures["control"]) == (0.6667, 0, 0, 0.5)
    assert figures["maps"]["words"] == 3
    assert figures["counts"] == {
        "samples": 1, "samples_measured": 1, "samples_without_grounding": 0,
        "words_measured": 3, "words_without_map": 0, "words_not_measurable": 0,
    }  # fmt: skip


def test_perfect_constant_and_random_maps_of_a_store():
    rng = np.random.default_rng(0)
    regions = tuple(Region(masks=(mask,)) for mask in rng.random((3, RASTER, RASTER)) < 0.3)
    words = tuple(NamingWord(*span, index) for index, span in enumerate([(0, 3), (4, 7), (8, 12)]))
    masks = np.stack([region.raster() for region in regions])
    assert scores(measured(masks, regions, words)["maps"]) == (1, 1, 1, 1)
    constant = measured(np.ones_like(masks), regions, words)["maps"]
    assert (constant["own_object"], constant["auc"]) == (0, 0.5)
    store = {str(n): target(str(n), CAPTION, rng.random((3, RASTER, RASTER))) for n in range(300)}
    figures = evaluate_maps(store, Known(dict.fromkeys(store, Grounding(regions, words))), progress=False)
    np.testing.assert_allclose(scores(figures["maps"]), scores(figures["chance"]), atol=0.05)
    assert figures["counts"]["samples_measured"] == 300


def test_what_cannot_be_measured_is_counted():
    whole, none = Region(boxes=((0, 0, 1, 1),)), Region(boxes=((0.5, 0.5, 0.501, 0.501),))
    maps = np.stack([IN_LEFT, np.full((2, 2), np.nan), IN_RIGHT])
    figures = measured(
        maps,
        (*HALVES, whole, none),
        (CAT, DOG, NamingWord(8, 11, 0), NamingWord(8, 12, 2), NamingWord(8, 12, 3)),
    )
    assert figures["counts"]["words_measured"] == figures["maps"]["words"] == 1
    assert figures["counts"]["words_without_map"] == 2  # the map of NaN, and "lef"
    assert figures["counts"]["words_not_measurable"] == 2  # fills the picture; too small for the raster
    assert figures["chance"]["own_object"] == 0.3333  # nobody finds what no map can show
    store = {sample_id: target(sample_id, CAPTION, [IN_LEFT] * 3) for sample_id in "abc"}
    figures = evaluate_maps(store, Known({"a": Grounding(HALVES, (CAT,)), "b": Grounding(HALVES, ())}), progress=False)
    assert [figures["counts"][name] for name in ("samples", "samples_measured", "samples_without_grounding")] == [3, 1, 1]


def test_maps_of_a_part_of_the_picture_meet_that_part():
    # The maps cover the middle: what lies left in it lies at 0.25 to 0.5 of the picture.
    crop = (0.0, 0.25, 1.0, 0.75)
    thin = (Region(boxes=((0, 0.25, 1, 0.5),)), Region(boxes=((0, 0.5, 1, 0.75),)), Region(boxes=((0, 0.8, 1, 1),)))
    figures = measured([IN_LEFT, IN_RIGHT, IN_LEFT], thin, (CAT, DOG, NamingWord(8, 12, 2)), crop)
    assert scores(figures["maps"]) == (1, 1, 1, 1)
    assert figures["chance"]["pointing"] == figures["chance"]["own_object"] == 0.5
    assert figures["counts"]["words_not_measurable"] == 1
    # Over the whole picture the same maps are too wide.
    assert measured([IN_LEFT, IN_RIGHT, IN_LEFT], thin, (CAT, DOG))["maps"]["iou"] == 0.5
    # Maps of twice the picture, padded to the right: its objects lie in their left half.
    figures = measured([IN_LEFT] * 3, HALVES, (CAT,), (0.0, 0.0, 1.0, 2.0))
    assert scores(figures["maps"])[2:] == (0.5, 1)
    assert figures["chance"]["pointing"] == 0.25


def test_nothing_to_measure_names_what_both_sides_have():
    store = {sample_id: target(sample_id, CAPTION, [IN_LEFT] * 3) for sample_id in ("a", "b", "c", "d")}
    with pytest.raises(DataError, match=r"4 of 4 samples have no masks.* ids are 'a', 'b', 'c', \.\.\.; .* are 'a.jpg'"):
        evaluate_maps(store, Known({"a.jpg": Grounding(HALVES, (CAT,))}), progress=False)
    with pytest.raises(DataError, match="0 of 1 samples have no masks, 1 words no map"):
        measured(np.full((3, 2, 2), np.nan), words=(CAT,))


def test_a_picture_of_one_object_has_no_other_to_win_against():
    figures = measured([IN_LEFT] * 3, HALVES[:1], (CAT,))
    assert all(math.isnan(figures[name]["own_object"]) for name in ("maps", "control", "chance"))


@pytest.fixture
def small_world(scenes, tmp_path):
    """A folder with the scenes as a data set and `targets`, a store of their masks with noise."""
    captions = write_dataset(scenes, tmp_path)
    writer = TargetWriter(tmp_path / "targets", {"model": "test", "weights": "noisy masks"}, StoreConfig(map_size=8))
    rng = np.random.default_rng(0)
    for pair, scene in zip(read_pairs(captions), scenes, strict=True):
        words = words_of(scene.caption)
        maps = rng.random((len(words), 8, 8), np.float32)
        for referent in scene.referents:
            index = [(w.start, w.end) for w in words].index((referent.start, referent.end))
            maps[index] += scene.word_mask(referent)[4::8, 4::8]
        writer.add(Target(pair.id, image_sha256(scene.image), WordMaps(scene.caption, words, maps)))
    writer.close()
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_a_small_world_store_scores_as_its_scenes_do(scenes, small_world):
    """To the digit: the grounding beside the captions says what the scenes know."""
    store, out = TargetStore(small_world / "targets"), small_world / "figures.json"
    figures = evaluate_maps(store, read_groundings(small_world / "grounding.jsonl"), progress=False)
    known = [store[sample_id].word_maps for sample_id in store]
    expected = compare_targets(scenes, [{(w.start, w.end): m for w, m in zip(k.words, k.maps, strict=True)} for k in known])
    assert {name: figures[name] for name in expected} == expected
    assert expected["maps"]["own_object"] > expected["control"]["own_object"]
    num_words = figures["counts"]["words_measured"]
    assert num_words == sum(r.kind != "size" for s in scenes for r in s.referents)

    result = run("evaluate", "maps", small_world / "targets", "--masks", small_world / "grounding.jsonl", "--out", out)
    assert result.exit_code == 0
    assert json.loads(out.read_text()) == figures
    table = [line.split() for line in result.stdout.splitlines()]
    assert ["maps", *(f"{value:.4f}" for value in scores(figures["maps"]))] in table
    assert f"{num_words} words of 64 samples measured, of 64 in the store" in result.stdout


def test_the_command_leaves_no_nan_in_its_file(small_world, tmp_path):
    line = {"id": "images/00000.png", "objects": [{"boxes": [[0, 0, 0.5, 0.5]]}], "words": []}
    line["words"] = [{"start": word.start, "end": word.end, "object": 0} for word in words_of(make_scene(11, 0).caption)]
    (tmp_path / "one.jsonl").write_text(json.dumps(line))
    result = run("evaluate", "maps", small_world / "targets", "--masks", tmp_path / "one.jsonl", "--out", tmp_path / "f.json")
    assert result.exit_code == 0
    written = json.loads((tmp_path / "f.json").read_text())
    assert written["maps"]["own_object"] is None
    assert written["counts"]["samples_without_grounding"] == 63


@pytest.mark.parametrize(
    ("before", "masks", "after", "said"),
    [
        ((), "nothing", (), "no masks at"),
        ((), "grounding.jsonl", ("--out", "/nowhere/f.json"), "no folder /nowhere"),
        (("--scenes", 3), "grounding.jsonl", (), "--scenes stands before maps"),
    ],
)
def test_mistakes_with_the_command(small_world, before, masks, after, said):
    result = run("evaluate", *before, "maps", small_world / "targets", "--masks", small_world / masks, *after)
    assert isinstance(result.exception, LavenderError)
    assert said in str(result.exception)
