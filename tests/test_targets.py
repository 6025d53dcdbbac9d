from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lavender.config import TeacherConfig
from lavender.errors import TargetError
from lavender.targets import Target, TargetStore, TargetWriter, image_sha256
from lavender.types import WordMaps
from lavender.words import words_of

TEACHER = {"model": "test", "weights": "abc"}
CONFIG = TeacherConfig(map_size=4)


def make_target(number, caption="a red circle", size=4):
    words = words_of(caption)
    maps = np.random.default_rng(number).random((len(words), size, size), np.float32)
    return Target(f"s{number}", f"{number:064x}", WordMaps(caption, words, maps))


def fill(folder, numbers, shard_size=3):
    writer = TargetWriter(folder, CONFIG, TEACHER, shard_size)
    for number in numbers:
        if f"s{number}" not in writer.done:
            writer.add(make_target(number))
    return writer


captions = st.text(st.characters(codec="utf-8"), max_size=30).filter(lambda t: words_of(t))


@settings(max_examples=25, deadline=None)
@given(st.lists(captions, min_size=1, max_size=7), st.integers(1, 5), st.integers(1, 6))
def test_what_goes_in_comes_out(texts, shard_size, size):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "targets"
        writer = TargetWriter(folder, TeacherConfig(map_size=size), TEACHER, shard_size)
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


def test_words_without_a_map_stay_nan(tmp_path):
    target = make_target(0)
    target.word_maps.maps[1] = np.nan
    writer = TargetWriter(tmp_path / "t", CONFIG, TEACHER)
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


def test_a_store_is_continued_where_it_stopped(tmp_path):
    fill(tmp_path / "whole", range(8)).close()
    fill(tmp_path / "t", range(5))  # no close: as if killed, with one shard and two pending samples
    with pytest.raises(TargetError, match="has not finished"):
        TargetStore(tmp_path / "t")
    fill(tmp_path / "t", range(8)).close()
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_a_kill_between_shard_and_clean_up_duplicates_nothing(tmp_path):
    fill(tmp_path / "t", range(2))
    pending = {p.name: p.read_bytes() for p in (tmp_path / "t" / "pending").iterdir()}
    fill(tmp_path / "t", range(3))  # writes the shard and empties `pending`
    for name, data in pending.items():
        (tmp_path / "t" / "pending" / name).write_bytes(data)
    fill(tmp_path / "t", range(4)).close()
    assert list(TargetStore(tmp_path / "t")) == ["s0", "s1", "s2", "s3"]


def test_half_written_files_are_ignored(tmp_path):
    fill(tmp_path / "t", range(2))
    (tmp_path / "t" / "pending" / "000002.parquet.partial").write_bytes(b"half")
    (tmp_path / "t" / "data-00000.parquet.partial").write_bytes(b"half")
    fill(tmp_path / "t", range(3)).close()
    assert list(TargetStore(tmp_path / "t")) == ["s0", "s1", "s2"]


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_nothing(tmp_path):
    """Start, kill after a random while, start again: the store ends as that of an undisturbed run."""
    numbers = 60
    code = (
        "import sys; from pathlib import Path; from tests.test_targets import fill\n"
        f"fill(Path(sys.argv[1]), range({numbers}), 4).close(); print('done')"
    )
    root = Path(__file__).parents[1]
    rng = np.random.default_rng(0)
    for _ in range(40):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "t")], cwd=root, stdout=subprocess.PIPE)
        while process.poll() is None and not (tmp_path / "t" / "pending").exists():
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.12)))
        process.send_signal(signal.SIGKILL)
        if b"done" in process.communicate()[0]:
            break
    else:
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "t")], cwd=root, check=True)
    fill(tmp_path / "whole", range(numbers), 4).close()
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")


def test_an_unfinished_store_is_refused_whatever_it_holds(tmp_path):
    fill(tmp_path / "t", range(3))  # one whole shard, nothing pending, never closed
    with pytest.raises(TargetError, match="has not finished"):
        TargetStore(tmp_path / "t")
    fill(tmp_path / "t", range(3)).close()
    assert len(TargetStore(tmp_path / "t")) == 3


def test_an_empty_store_may_be_begun_anew(tmp_path):
    TargetWriter(tmp_path / "t", TeacherConfig(map_size=4, inversion_steps=7), TEACHER)
    fill(tmp_path / "t", range(2)).close()
    assert TargetStore(tmp_path / "t").config == CONFIG


def test_a_stored_sample_is_known_by_picture_and_caption(tmp_path):
    picture, other = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    writer = TargetWriter(tmp_path / "t", CONFIG, TEACHER)
    target = make_target(0)
    writer.add(Target("s0", image_sha256(picture), target.word_maps))
    for again in (writer, TargetWriter(tmp_path / "t", CONFIG, TEACHER)):
        assert again.has("s0", picture, target.word_maps.caption)
        assert not again.has("s1", picture, target.word_maps.caption)
        with pytest.raises(TargetError, match="another picture"):
            again.has("s0", other, target.word_maps.caption)
        with pytest.raises(TargetError, match="another caption"):
            again.has("s0", picture, "a blue disk")


def test_a_truncated_shard_is_named(tmp_path):
    fill(tmp_path / "t", range(2)).close()
    path = tmp_path / "t/data-00000.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TargetError, match=r"data-00000\.parquet is damaged"):
        TargetStore(tmp_path / "t")


def test_another_config_or_teacher_is_refused(tmp_path):
    fill(tmp_path / "t", range(2)).close()
    with pytest.raises(TargetError, match=r"inversion_steps: 5 there, 7 now"):
        TargetWriter(tmp_path / "t", TeacherConfig(map_size=4, inversion_steps=7), TEACHER)
    with pytest.raises(TargetError, match="other weights"):
        TargetWriter(tmp_path / "t", CONFIG, {"model": "test", "weights": "xyz"})


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TargetError, match="no target store"):
        TargetWriter(tmp_path, CONFIG, TEACHER)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "no manifest"),
        ("{", "damaged"),
        (json.dumps({"format": "other"}), "'other'"),
        (json.dumps({"format": "lavender-targets", "version": 1}), "lacks"),
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


def test_a_sample_twice_is_refused(tmp_path):
    writer = fill(tmp_path / "t", range(2))
    with pytest.raises(TargetError, match="'s1'"):
        writer.add(make_target(1))


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
    writer = TargetWriter(tmp_path / "t", CONFIG, TEACHER)
    writer.add(Target("s0", image_sha256(picture), target.word_maps))
    writer.close()
    store = TargetStore(tmp_path / "t")
    assert store.checked("s0", picture).id == "s0"
    with pytest.raises(TargetError, match="another picture"):
        store.checked("s0", Image.new("RGB", (4, 4), "blue"))
