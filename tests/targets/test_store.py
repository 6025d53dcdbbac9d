from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
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

SOURCE = {"model": "test", "weights": "abc", "inversion_steps": 5}
CONFIG = StoreConfig(map_size=4)


def make_target(number, caption="a red circle", size=4):
    words = words_of(caption)
    maps = np.random.default_rng(number).random((len(words), size, size), np.float32)
    return Target(f"s{number}", f"{number:064x}", WordMaps(caption, words, maps))


def fill(folder, numbers, shard_size=3):
    writer = TargetWriter(folder, SOURCE, CONFIG, shard_size)
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


def test_a_store_is_continued_where_it_stopped(tmp_path):
    fill(tmp_path / "whole", range(8)).close()
    fill(tmp_path / "t", range(5))  # no close: as if killed, with one shard and two pending samples
    with pytest.raises(TargetError, match="has not finished"):
        TargetStore(tmp_path / "t")
    fill(tmp_path / "t", range(8)).close()
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and p.name != ".lock"}


def test_a_kill_between_shard_and_clean_up_duplicates_nothing(tmp_path):
    fill(tmp_path / "t", range(2))
    pending = {p.name: p.read_bytes() for p in (tmp_path / "t" / "pending").iterdir()}
    fill(tmp_path / "t", range(3))  # writes the shard and empties `pending`
    for name, data in pending.items():
        (tmp_path / "t" / "pending" / name).write_bytes(data)
    fill(tmp_path / "t", range(4)).close()
    assert list(TargetStore(tmp_path / "t")) == ["s0", "s1", "s2", "s3"]


def shards(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith(".parquet")}


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_shards_do_not_depend_on_the_order_of_work_or_on_restarts(data):
    """Any batches, finished in any order, with advances and restarts anywhere: the shards of a run in order."""
    count = data.draw(st.integers(1, 14))
    failed = data.draw(st.sets(st.integers(0, count - 1)))
    batches: list[list[int]] = []
    for n in range(count):
        if batches and data.draw(st.booleans()):
            batches[data.draw(st.integers(0, len(batches) - 1))].append(n)
        else:
            batches.append([n])
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        good = [n for n in range(count) if n not in failed]
        fill(folder / "whole", good).close()
        finished: set[int] = set()
        writer = TargetWriter(folder / "t", SOURCE, CONFIG, 3)
        for batch in data.draw(st.permutations(batches)):
            places = [n for n in batch if n not in failed]
            writer.add(*[make_target(n) for n in places], position=places)
            finished |= set(batch)
            if data.draw(st.booleans()):
                writer.advance(next(n for n in range(count + 1) if n not in finished))
            if data.draw(st.booleans()):
                writer.release()
                writer = TargetWriter(folder / "t", SOURCE, CONFIG, 3)
        writer.close()
        assert shards(folder / "t") == shards(folder / "whole")
        assert contents(folder / "t") == contents(folder / "whole")


def test_samples_stay_pending_until_the_input_has_passed_them(tmp_path):
    with TargetWriter(tmp_path / "t", SOURCE, CONFIG, 3) as writer:
        writer.add(*[make_target(n) for n in (4, 5, 6, 7)], position=4)
        writer.advance(4)
        assert not shards(tmp_path / "t")
        writer.add(*[make_target(n) for n in (0, 1, 3)], position=[0, 1, 3])
        writer.advance(6)  # 2 failed
        assert [ids_of(tmp_path / "t", n) for n in range(1)] == [["s0", "s1", "s3"]]
        assert len(list((tmp_path / "t/pending").iterdir())) == 1
        writer.advance(7)
        assert ids_of(tmp_path / "t", 1) == ["s4", "s5", "s6"]
        writer.add(make_target(8))  # behind everything so far
        writer.close()
        assert ids_of(tmp_path / "t", 2) == ["s7", "s8"]
        assert not (tmp_path / "t/pending").exists()


def ids_of(folder, shard):
    return pq.read_table(folder / f"data-{shard:05d}.parquet")["id"].to_pylist()


class Killed(BaseException):
    pass


def test_a_kill_at_any_step_is_harmless(tmp_path, monkeypatch):
    """Stops the writer at each of its steps in turn, as a kill would; the next one ends with the store of a quiet run."""
    work = [([3, 4], 0), ([0], 0), ([1, 2], 5), ([6], 5), ([5, 7], 8)]

    def run(folder, steps):
        left = iter(range(steps))

        def counted(step):
            def counting(*arguments, **options):
                if next(left, None) is None:
                    raise Killed
                return step(*arguments, **options)

            return counting

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            writer = TargetWriter(folder, SOURCE, CONFIG, 3)
            try:
                for numbers, passed in work:
                    new = [n for n in numbers if f"s{n}" not in writer.done]
                    writer.add(*[make_target(n) for n in new], position=new)
                    writer.advance(passed)
                writer.close()
            finally:
                writer._lock._lock.release()  # and nothing else: that is what a kill leaves

    run(tmp_path / "whole", 10**6)
    for steps in range(1, 100):
        folder = tmp_path / str(steps)
        try:
            run(folder, steps)
        except Killed:
            ended = False
            run(folder, 10**6)
        else:
            ended = True
        assert shards(folder) == shards(tmp_path / "whole"), steps
        assert contents(folder) == contents(tmp_path / "whole"), steps
        if ended:
            break
    assert steps > 15


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


HOLD = """
import sys, time
from pathlib import Path
from tests.targets.test_store import fill
writer = fill(Path(sys.argv[1]), range(5))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", HOLD, str(tmp_path / "t")]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(TargetError, match=rf"another process \(process {first.pid} on .*, since 2.*\) is writing") as error:
            fill(tmp_path / "t", [])
        assert "wait until it has finished, or give another folder" in str(error.value)
        first.send_signal(signal.SIGKILL)
    writer = fill(tmp_path / "t", range(6))
    assert len(writer.done) == 6
    with pytest.raises(TargetError, match=f"process {os.getpid()} on"):  # in one process too
        fill(tmp_path / "t", [])
    writer.close()
    fill(tmp_path / "t", range(7)).close()
    assert not {".lock.json"} & {path.name for path in (tmp_path / "t").iterdir()}


FILL_LIMITED = """
import resource, sys
from pathlib import Path
from lavender.errors import TargetError
from tests.targets.test_store import fill
folder = Path(sys.argv[1])
for limit in sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), -1))
    try:
        fill(folder, range(20), 16).close()
    except TargetError as error:
        print(f"{error}; partial: {list(folder.rglob('*.partial'))}; samples: {len(list(folder.glob('pending/*.parquet')))}")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on the size of files, which this system lacks")
def test_a_full_disk_is_named_and_loses_nothing(tmp_path):
    fill(tmp_path / "whole", range(20), 16).close()
    shard = (tmp_path / "whole/data-00000.parquet").stat().st_size
    # No space for a manifest, for a sample, for a shard.
    command = [sys.executable, "-c", FILL_LIMITED, str(tmp_path / "t"), "300", "2000", str(shard - 1)]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    said = "cannot write to {}: File too large. What is stored there is safe; free some space and run the same command again to"
    folder = tmp_path / "t"
    for line, (place, samples) in zip(
        result.stdout.splitlines(), [(folder, 0), (folder / "pending", 0), (folder, 16)], strict=True
    ):
        assert line.startswith(said.format(place)), result
        assert line.endswith(f"partial: []; samples: {samples}"), result
    fill(tmp_path / "t", range(20), 16).close()
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")


def test_any_error_that_means_a_full_disk_is_named(tmp_path, monkeypatch):
    numbers = iter((errno.ENOSPC, errno.EDQUOT, errno.EIO))

    def fail(descriptor):
        raise OSError(next(numbers), "broken")

    with fill(tmp_path / "t", range(2)) as writer, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        for error, message in ((TargetError, "free some space"), (TargetError, "free some space"), (OSError, "broken")):
            with pytest.raises(error, match=message):
                writer.add(make_target(2))
            assert "s2" not in writer.done


def test_half_written_files_are_ignored(tmp_path):
    fill(tmp_path / "t", range(2))
    (tmp_path / "t" / "pending" / "000002.parquet.partial").write_bytes(b"half")
    (tmp_path / "t" / "data-00000.parquet.partial").write_bytes(b"half")
    fill(tmp_path / "t", range(3)).close()
    assert list(TargetStore(tmp_path / "t")) == ["s0", "s1", "s2"]


KILLED = """
import sys
import numpy as np
from pathlib import Path
from lavender.targets.shards import encoded, to_table
from lavender.targets.manifest import StoreConfig
from lavender.targets.store import TargetWriter
from tests.targets.test_store import CONFIG, SOURCE, make_target
encoded(to_table([make_target(0)], "float16"), "zstd")  # what is imported late is imported now
folder, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
writer = TargetWriter(folder, SOURCE, CONFIG, 4)
batches = [range(n, n + 3) for n in range(0, count, 3)]
finished = set()
for batch in np.random.default_rng(seed).permutation(len(batches)):
    new = [n for n in batches[batch] if f"s{n}" not in writer.done]
    writer.add(*[make_target(n) for n in new], position=new)
    finished.update(batches[batch])
    writer.advance(next(n for n in range(count + 1) if n not in finished))
writer.close()
print("done")
"""


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_nothing(tmp_path):
    """Start, kill after a random while, start again with another order: the store ends as that of an undisturbed run."""
    count = 60
    root = Path(__file__).parents[2]
    rng = np.random.default_rng(0)
    kills = 0
    for seed in range(60):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "t"), str(count), str(seed)]
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE)
        while process.poll() is None and not (tmp_path / "t/.lock.json").exists():
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.15)))
        process.send_signal(signal.SIGKILL)
        if b"done" in process.communicate()[0]:
            break
        (tmp_path / "t/.lock.json").unlink(missing_ok=True)  # so that the next wait is for the next process
        kills += 1
    else:
        pytest.fail("killed too early each time")
    assert kills >= 2
    fill(tmp_path / "whole", range(count), 4).close()
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")


def test_an_unfinished_store_is_refused_whatever_it_holds(tmp_path):
    fill(tmp_path / "t", range(3))  # one whole shard, nothing pending, never closed
    with pytest.raises(TargetError, match="has not finished"):
        TargetStore(tmp_path / "t")
    fill(tmp_path / "t", range(3)).close()
    assert len(TargetStore(tmp_path / "t")) == 3


def test_an_empty_store_may_be_begun_anew(tmp_path):
    TargetWriter(tmp_path / "t", SOURCE | {"inversion_steps": 7}, CONFIG)
    fill(tmp_path / "t", range(2)).close()
    assert TargetStore(tmp_path / "t").source == SOURCE


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
    writer = TargetWriter(tmp_path / "t", SOURCE, CONFIG)
    writer.add(Target("s0", image_sha256(picture), target.word_maps))
    writer.close()
    store = TargetStore(tmp_path / "t")
    assert store.checked("s0", picture).id == "s0"
    with pytest.raises(TargetError, match="another picture"):
        store.checked("s0", Image.new("RGB", (4, 4), "blue"))


def test_a_finished_store_stays_finished_until_something_is_added(tmp_path):
    fill(tmp_path / "t", range(3)).close()
    before = (tmp_path / "t/manifest.json").read_bytes()
    with TargetWriter(tmp_path / "t", SOURCE, CONFIG, 3) as writer:
        writer.begin_run()
        with pytest.raises(TargetError, match="another caption"):
            writer.has("s0", Image.new("RGB", (4, 4)), "other words")
    assert (tmp_path / "t/manifest.json").read_bytes() == before
    assert len(TargetStore(tmp_path / "t")) == 3
    with TargetWriter(tmp_path / "t", SOURCE, CONFIG, 3) as writer:
        writer.add(make_target(3))
    with pytest.raises(TargetError, match="has not finished"):
        TargetStore(tmp_path / "t")
    fill(tmp_path / "t", range(4)).close()
    assert list(TargetStore(tmp_path / "t")) == ["s0", "s1", "s2", "s3"]
