from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lavender.errors import DataError, TargetError
from lavender.images import image_sha256
from lavender.targets.manifest import StoreConfig
from lavender.targets.store import Target, TargetStore, TargetWriter
from lavender.types import WordMaps
from lavender.words import words_of

from .stores import CONFIG, SOURCE, fill, make_target

captions = st.text(st.characters(codec="utf-8"), max_size=30).filter(lambda t: words_of(t))


@settings(max_examples=25, deadline=None)
@given(st.lists(captions, min_size=1, max_size=7), st.integers(1, 5), st.integers(1, 6))
def test_what_goes_in_comes_out(texts, shard_size, size):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "targets"
        writer = TargetWriter(folder, SOURCE, StoreConfig(map_size=size), shard_size)
        targets = [make_target(i, text, size) for i, text in enumerate(texts)]
        for target in targets:
            writer.add(target)
        writer.close()
        store = TargetStore(folder)
        assert list(store) == [t.id for t in targets]
        for target in targets:
            back = store[target.id]
            assert (back.id, back.image_sha256) == (target.id, target.image_sha256)
            assert back.word_maps.caption == target.word_maps.caption
            assert back.word_maps.words == target.word_maps.words
            np.testing.assert_array_equal(back.word_maps.maps, target.word_maps.maps.astype(np.float16))


map_values = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(map_values, min_size=6, max_size=6), min_size=1, max_size=3), st.integers(-1, 2))
def test_maps_of_8_bits_are_off_by_half_a_step_at_most(maps, missing):
    maps = np.array(maps, np.float32).reshape(-1, 2, 3)
    maps[missing : missing + 1] = np.nan
    words = words_of("a red circle")[: len(maps)]
    target = Target("s", "0" * 64, WordMaps("a red circle", words, maps))
    with tempfile.TemporaryDirectory() as folder:
        with TargetWriter(Path(folder) / "t", SOURCE, StoreConfig(storage="uint8")) as writer:
            writer.add(target)
            writer.close()
        found = TargetStore(Path(folder) / "t")["s"].word_maps.maps
    assert found.dtype == np.float32
    exact = maps.astype(np.float64)
    low, high = exact.min(axis=(1, 2), keepdims=True), exact.max(axis=(1, 2), keepdims=True)
    rounding = np.spacing(np.abs(maps).max(axis=(1, 2), keepdims=True))  # of the result to float32
    np.testing.assert_array_equal(np.isnan(found), np.isnan(maps))
    there = ~np.isnan(maps)
    bound = np.broadcast_to((high - low) / 255 / 2 * (1 + 1e-9) + rounding, maps.shape)
    assert (np.abs(found - exact)[there] <= bound[there]).all()
    # The ends of the range are exact.
    np.testing.assert_array_equal(
        np.nanmin(found, axis=(1, 2), initial=1e9, where=there), np.where(np.isnan(low), 1e9, low).ravel()
    )
    np.testing.assert_array_equal(
        np.nanmax(found, axis=(1, 2), initial=-1e9, where=there), np.where(np.isnan(high), -1e9, high).ravel()
    )


def test_8_bits_take_half_the_space(tmp_path):
    words = words_of("a red circle")
    sizes = []
    for storage in ("float16", "uint8"):
        with TargetWriter(tmp_path / storage, SOURCE, StoreConfig(storage=storage)) as writer:
            for n in range(32):
                maps = np.random.default_rng(n).random((3, 32, 32), np.float32)
                writer.add(Target(f"s{n}", "0" * 64, WordMaps("a red circle", words, maps)))
            writer.close()
        sizes.append((tmp_path / storage / "data-00000.parquet").stat().st_size)
    assert sizes[1] / 32 < 1.15 * 3 * 32 * 32  # all in all little more than a byte a value
    assert sizes[1] < 0.65 * sizes[0]  # float16 of [0, 1) has less than 16 bits of noise


@pytest.mark.parametrize("storage", ["float16", "uint8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_values_that_cannot_be_stored_are_refused(tmp_path, storage, value):
    target = make_target(0)
    target.word_maps.maps[1, 2, 3] = value
    with TargetWriter(tmp_path / "t", SOURCE, StoreConfig(storage=storage)) as writer:
        if (storage, value) == ("uint8", 1e9):
            writer.add(target)
        else:
            with pytest.raises(DataError, match="sample 's0': the map of the word 'red' has values that are not finite"):
                writer.add(make_target(1), target)
            assert not writer.done  # all or none
            writer.add(make_target(1))


def test_words_without_a_map_stay_nan(tmp_path):
    target = make_target(0)
    target.word_maps.maps[1] = np.nan
    writer = TargetWriter(tmp_path / "t", SOURCE, CONFIG)
    writer.add(target)
    writer.close()
    assert np.isnan(TargetStore(tmp_path / "t")["s0"].word_maps["red"]).all()


def test_datasets_reads_the_shards(tmp_path):
    from datasets import load_dataset

    fill(tmp_path / "t", range(7)).close()
    files = str(tmp_path / "t" / "*.parquet")
    dataset = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset["id"][:] == [f"s{i}" for i in range(7)]
    row = dataset[4]
    expected = make_target(4).word_maps
    np.testing.assert_array_equal(np.array(row["maps"], np.float16), expected.maps.astype(np.float16))
    assert [w["text"] for w in row["words"]] == ["a", "red", "circle"]
    assert row["grid"] == [4, 4]
    assert row["crop"] == [0, 0, 1, 1]
    assert row["caption"] == expected.caption


def test_a_shard_that_is_gone_or_foreign_is_named(tmp_path):
    fill(tmp_path / "t", range(7)).close()
    shard = tmp_path / "t/data-00001.parquet"
    (tmp_path / "t/data-00007.parquet").write_bytes(shard.read_bytes())
    with pytest.raises(TargetError, match=r"data-00007\.parquet is no shard of this store"):
        fill(tmp_path / "t", [])
    (tmp_path / "t/data-00007.parquet").rename(tmp_path / "t/data-00003.parquet")
    with pytest.raises(TargetError, match=r"data-00003\.parquet is no shard of this store"):
        fill(tmp_path / "t", [])
    os.remove(tmp_path / "t/data-00003.parquet")
    data = shard.read_bytes()
    shard.unlink()
    for use in (TargetStore, lambda folder: fill(folder, [])):
        with pytest.raises(TargetError, match=r"data-00001\.parquet is missing"):
            use(tmp_path / "t")
    shard.write_bytes(data)
    fill(tmp_path / "t", range(7)).close()
    assert len(TargetStore(tmp_path / "t")) == 7
    for path in (tmp_path / "t").glob("*.parquet"):
        path.unlink()
    with pytest.raises(TargetError, match="lost all its shards"):
        fill(tmp_path / "t", [])


def test_the_manifest_says_what_there_is(tmp_path):
    def manifest():
        return json.loads((tmp_path / "t/manifest.json").read_text())

    with fill(tmp_path / "t", range(4)) as writer:
        writer.fail("x", "too dark")
        writer.fail("x", "and too small")
        writer.fail("y", "gone")
        assert writer.failed == {"x": "too dark\nand too small", "y": "gone"}
    assert not manifest()["complete"]
    assert manifest()["failed"] == [{"id": "x", "reason": "too dark\nand too small"}, {"id": "y", "reason": "gone"}]
    with pytest.raises(TargetError, match="closed"):
        writer.add(make_target(4))
    with suppress(ZeroDivisionError), fill(tmp_path / "t", [4]) as writer:
        assert writer.failed.keys() == {"x", "y"}
        writer.begin_run()
        writer.fail("z", "odd")
        raise ZeroDivisionError
    assert [entry["id"] for entry in manifest()["failed"]] == ["z"]
    fill(tmp_path / "t", [5]).close()
    found = manifest()
    assert found["complete"]
    assert (found["version"], found["config"]["map_size"]) == (3, 4)
    for name, samples in (("data-00000.parquet", 3), ("data-00001.parquet", 3)):
        data = (tmp_path / "t" / name).read_bytes()
        assert found["shards"][name] == {"sha256": hashlib.sha256(data).hexdigest(), "samples": samples}
    assert TargetStore(tmp_path / "t").failed == {"z": "odd"}


def test_a_preview_may_lie_there_before(tmp_path):
    (tmp_path / "preview.png").write_bytes(b"preview")
    fill(tmp_path, range(2)).close()
    assert list(TargetStore(tmp_path)) == ["s0", "s1"]
    assert (tmp_path / "preview.png").read_bytes() == b"preview"


def test_a_new_store_in_the_place_of_another_is_read_anew(tmp_path):
    fill(tmp_path / "t", [0]).close()
    assert TargetStore(tmp_path / "t")["s0"].word_maps.maps.shape == (3, 4, 4)
    shutil.rmtree(tmp_path / "t")
    with TargetWriter(tmp_path / "t", SOURCE, CONFIG) as writer:
        writer.add(make_target(0, size=2))
        writer.close()
    assert TargetStore(tmp_path / "t")["s0"].word_maps.maps.shape == (3, 2, 2)


def test_an_unfinished_store_is_refused_whatever_it_holds(tmp_path):
    fill(tmp_path / "t", range(3))  # one whole shard, nothing pending, never closed
    with pytest.raises(TargetError, match="has not finished"):
        TargetStore(tmp_path / "t")
    fill(tmp_path / "t", range(3)).close()
    assert len(TargetStore(tmp_path / "t")) == 3


def test_a_stored_sample_is_known_by_picture_and_caption(tmp_path):
    picture, other = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    target = make_target(0)
    with TargetWriter(tmp_path / "t", SOURCE, CONFIG) as writer:
        writer.add(Target("s0", image_sha256(picture), target.word_maps))
        check_known(writer, picture, other, target.word_maps.caption)
    with TargetWriter(tmp_path / "t", SOURCE, CONFIG) as writer:
        check_known(writer, picture, other, target.word_maps.caption)


def check_known(writer, same, other, caption):
    assert writer.has("s0", same, caption)
    assert not writer.has("s1", same, caption)
    with pytest.raises(TargetError, match="another picture"):
        writer.has("s0", other, caption)
    with pytest.raises(TargetError, match="another caption"):
        writer.has("s0", same, "a blue disk")


def test_a_stored_sample_is_known_by_its_bytes_without_decoding(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.bmp")
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "blue.png")
    caption = make_target(0).word_maps.caption
    with TargetWriter(tmp_path / "t", SOURCE, CONFIG) as writer:
        path = tmp_path / "red.png"
        digest = image_sha256(Image.open(path))
        writer.add(Target("s0", digest, make_target(0).word_maps, hashlib.sha256(path.read_bytes()).hexdigest()))
    with TargetWriter(tmp_path / "t", SOURCE, CONFIG) as writer:
        check_known(writer, str(path), tmp_path / "blue.png", caption)
        assert writer.has("s0", tmp_path / "red.bmp", caption)  # the same picture in another file
        with pytest.raises(DataError, match="no image at"):
            writer.has("s0", tmp_path / "gone.png", caption)
        monkeypatch.setattr("lavender.targets.store.load_image", lambda source: 1 / 0)
        assert writer.has("s0", path, caption)
        assert writer.has("s0", path.read_bytes(), caption)
        assert not writer.has("s1", tmp_path / "gone.png", caption)
        with pytest.raises(ZeroDivisionError):
            writer.has("s0", tmp_path / "red.bmp", caption)


def test_a_truncated_shard_is_named(tmp_path):
    fill(tmp_path / "t", range(2)).close()
    path = tmp_path / "t/data-00000.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TargetError, match=r"data-00000\.parquet is damaged"):
        TargetStore(tmp_path / "t")


def test_another_config_or_teacher_is_refused(tmp_path):
    fill(tmp_path / "t", range(2)).close()
    with pytest.raises(TargetError, match=r"inversion_steps: 5 there, 7 now"):
        TargetWriter(tmp_path / "t", SOURCE | {"inversion_steps": 7}, CONFIG)
    with pytest.raises(TargetError, match="other weights"):
        TargetWriter(tmp_path / "t", SOURCE | {"weights": "xyz"}, CONFIG)


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TargetError, match="no target store"):
        TargetWriter(tmp_path, SOURCE, CONFIG)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "no manifest"),
        ("{", "damaged"),
        (json.dumps({"format": "other"}), "'other'"),
        ("[]", r"format \[\]"),
        (json.dumps({"format": "lavender-targets", "version": 2}), "lacks"),
        (
            json.dumps({"format": "lavender-targets", "version": 1, "complete": True}),
            "version 1; this lavender reads the versions 2 and 3: extract anew",
        ),
    ],
)
def test_damaged_stores_are_named(tmp_path, manifest, message):
    fill(tmp_path / "t", range(2)).close()
    path = tmp_path / "t" / "manifest.json"
    if manifest is None:
        os.remove(path)
    else:
        path.write_text(manifest)
    with pytest.raises(TargetError, match=message):
        TargetStore(tmp_path / "t")


def test_a_missing_sample_is_named(tmp_path):
    fill(tmp_path / "t", range(2)).close()
    with pytest.raises(TargetError, match="'s9'"):
        TargetStore(tmp_path / "t")["s9"]


def test_image_sha256_knows_the_picture_not_the_file(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8))
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "a.bmp")
    digests = {image_sha256(Image.open(tmp_path / name)) for name in ("a.png", "a.bmp")} | {image_sha256(picture)}
    assert len(digests) == 1
    assert image_sha256(picture.transpose(Image.Transpose.ROTATE_90)) not in digests
    assert image_sha256(picture.resize((35, 1))) != image_sha256(picture.resize((1, 35)))


def test_targets_of_another_picture_are_refused(tmp_path):
    picture = Image.new("RGB", (4, 4), "red")
    target = make_target(0)
    writer = TargetWriter(tmp_path / "t", SOURCE, CONFIG)
    writer.add(Target("s0", image_sha256(picture), target.word_maps))
    writer.close()
    store = TargetStore(tmp_path / "t")
    assert store.checked("s0", picture).id == "s0"
    with pytest.raises(TargetError, match="another picture"):
        store.checked("s0", Image.new("RGB", (4, 4), "blue"))
