from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lavender.errors import TargetError
from lavender.targets import maintenance
from lavender.targets.maintenance import info, merge, verify
from lavender.targets.manifest import StoreConfig
from lavender.targets.shards import encoded, schema, sha256_of
from lavender.targets.store import Target, TargetStore, TargetWriter
from lavender.types import WordMaps
from lavender.words import words_of

SOURCE = {"model": "test", "weights": "abc", "seed": 0}
STORAGES = ("float16", "uint8")


def make_target(number, caption="a red circle", **changes):
    words = words_of(caption)
    maps = np.random.default_rng(number).random((len(words), 4, 4), np.float32)
    if number % 3 == 0:
        maps[-1] = np.nan
    values = {"crop": (0.0, 0.25, 1.0, 0.75), "words": words, "maps": maps} | changes
    return Target(f"s{number}", f"{number:064x}", WordMaps(caption, **values))


def begun(folder, targets, shard_size=3, seed=0, **config):
    writer = TargetWriter(folder, SOURCE | {"seed": seed}, StoreConfig(map_size=4, **config), shard_size)
    writer.add(*targets)
    return writer


def store(folder, targets, failed=(), **settings):
    with begun(folder, targets, **settings) as writer:
        for sample_id, reason in failed:
            writer.fail(sample_id, reason)
        writer.close()
    return folder


def pairs(*numbers, caption="a red circle"):
    return [SimpleNamespace(id=f"s{n}", caption=caption) for n in numbers]


@pytest.mark.parametrize("storage", STORAGES)
def test_info(tmp_path, storage):
    folder = store(tmp_path / "t", [make_target(n) for n in range(7)], [("x", "dark"), ("s1", "odd word")], storage=storage, seed=3)
    found = info(folder)
    assert (found.samples, found.words, found.words_without_map, found.failed) == (7, 21, 3, 1)
    assert (found.source, found.complete, found.shards) == (SOURCE | {"seed": 3}, True, 3)
    assert found.config == StoreConfig(4, storage)
    assert found.num_bytes == sum(path.stat().st_size for path in folder.iterdir() if path.name != ".lock")
    assert found.bytes_per_sample == found.num_bytes / 7


@pytest.mark.parametrize("storage", STORAGES)
def test_info_of_an_unfinished_store(tmp_path, storage):
    with begun(tmp_path / "t", [make_target(n) for n in range(5)], storage=storage) as writer:
        file = next((tmp_path / "t/pending").iterdir())  # has rows that are in a shard already
        assert pq.read_table(file).num_rows == 5
        found = info(tmp_path / "t")
        assert (found.samples, found.words, found.words_without_map, found.shards) == (5, 15, 2, 1)
        assert not found.complete
        writer.fail("x", "dark")
    assert info(tmp_path / "t").failed == 1
    begun(tmp_path / "empty", []).release()
    assert (info(tmp_path / "empty").samples, info(tmp_path / "empty").bytes_per_sample) == (0, 0)
    with pytest.raises(TargetError, match="no target store"):
        info(tmp_path)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_sound_store(tmp_path, storage):
    folder = store(tmp_path / "t", [make_target(n) for n in range(7)], [("s7", "dark"), ("bad", "no text")], storage=storage)
    assert verify(folder) == []
    assert verify(folder, [*pairs(*range(8)), SimpleNamespace(id="bad", reason="no text")]) == []
    many = store(tmp_path / "many", [make_target(n, crop=(0.1, 0.2, 0.7, 0.9)) for n in range(20)], shard_size=20)
    assert verify(many) == []


def test_what_is_missing_or_other_in_the_data_set(tmp_path):
    folder = store(tmp_path / "t", [make_target(n) for n in range(4)], [("s9", "dark")])
    data = [*pairs(0, 1, 8, 9), *pairs(2, caption="a blue disk"), SimpleNamespace(id="bad", reason="no text")]
    assert verify(folder, data) == [
        "2 samples of the data set are neither stored nor listed as failed: 's8', 'bad'",
        "1 samples have another caption in the data set: 's2'",
        "1 samples are stored, but not in the data set: 's3'",
    ]
    assert verify(folder, pairs(*range(30)))[0].endswith(
        ": 's4', 's5', 's6', 's7', 's8', 's10', 's11', 's12', 's13', 's14' and 15 more"
    )


@pytest.fixture
def folder(tmp_path):
    return store(tmp_path / "t", [make_target(n) for n in range(7)])


def test_an_unfinished_store_is_a_problem(tmp_path):
    with begun(tmp_path / "t", [make_target(n) for n in range(5)]):
        pass
    assert verify(tmp_path / "t") == ["the store is not finished: run the same command again to continue it"]
    begun(tmp_path / "t", []).close()
    (tmp_path / "t/pending").mkdir()
    assert verify(tmp_path / "t") == ["the store is marked as finished, but samples are pending: run the same command again"]


def test_every_flipped_byte_is_found(folder):
    path = folder / "data-00001.parquet"
    data = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(data), 20):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert verify(folder, pairs(*range(7))) == [
            "data-00001.parquet: it is damaged, its sha256 is not that of the manifest: restore it, or extract anew",
            "the data set was not compared with the store, which is not whole",
        ]
    path.write_bytes(data)
    assert verify(folder, pairs(*range(7))) == []


def test_shards_that_are_gone_or_too_many_are_found(folder):
    data = (folder / "data-00001.parquet").read_bytes()
    (folder / "data-00005.parquet").write_bytes(data)
    assert verify(folder) == ["data-00005.parquet is not listed in the manifest: move it elsewhere"]
    os.remove(folder / "data-00005.parquet")
    os.remove(folder / "data-00001.parquet")
    assert verify(folder) == ["data-00001.parquet: it is missing: put it back, or extract into a new folder"]


def forge(folder, number, change):
    """Changes a shard's rows, and the manifest with them, as a careless tool would."""
    path = folder / f"data-{number:05d}.parquet"
    table = change(pq.read_table(path))
    path.write_bytes(encoded(table, "zstd") if isinstance(table, pa.Table) else table)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][path.name]["sha256"] = sha256_of(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rows_with(row, **values):
    def change(table):
        rows = table.to_pylist()
        rows[row] |= values
        return pa.Table.from_pylist(rows, schema=table.schema)

    return change


NAN = [[float("nan")] * 4] * 4
ONES = [[1.0] * 4] * 4


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda table: table.slice(0, 2), "it has 2 samples, the manifest says 3"),
        (lambda table: table.drop_columns(["crop"]), "it has other columns or types than the storage 'float16': extract anew"),
        (lambda table: b"PAR1 no parquet", "is damaged"),
        (rows_with(1, id="s0"), "sample 's0' is there twice"),
        (rows_with(1, caption=None), "its row group 0 has empty cells"),
        (rows_with(1, caption="a rod circle"), "sample 's4': the word 'red' is not at 2 to 5 of its caption"),
        (
            rows_with(1, words=[{"text": "", "start": 2, "end": 2}] * 3),
            "sample 's4': the word '' is not at 2 to 2 of its caption",
        ),
        (rows_with(1, maps=[ONES] * 2), "sample 's4': it has 2 maps for 3 words"),
        (rows_with(1, grid=[2, 8]), "sample 's4': its maps are not of its grid [2, 8]"),
        (rows_with(1, grid=[4, 5]), "sample 's4': its maps are not of its grid [4, 5]"),
        (rows_with(1, maps=[ONES, ONES[:3], ONES]), "sample 's4': its maps are not of its grid [4, 4]"),
        (rows_with(1, maps=[ONES, [*NAN[:3], ONES[0]], NAN]), "sample 's4': the map of 'red' has values that are not finite"),
        (
            rows_with(1, maps=[ONES, [[*ONES[0][:3], float("inf")], *ONES[:3]], ONES]),
            "sample 's4': the map of 'red' has values that are not finite",
        ),
        (
            rows_with(1, maps=[ONES, [[*ONES[0][:3], -0.1], *ONES[:3]], ONES]),
            "sample 's4': the map of 'red' has negative values, though it is raw attention",
        ),
        (rows_with(1, crop=[0, 0, 1]), "sample 's4': the crop [0.0, 0.0, 1.0] is no [top, left, bottom, right]"),
        (rows_with(1, crop=[0, 0, 1, 1.5]), "the crop [0.0, 0.0, 1.0, 1.5] is no"),
        (rows_with(1, crop=[0.5, 0, 0.5, 1]), "the crop [0.5, 0.0, 0.5, 1.0] is no"),
    ],
)
def test_wrong_rows_are_found(folder, change, problem):
    forge(folder, 1, change)
    found = verify(folder)
    assert problem in found[0], found
    assert found[0].startswith("data-00001.parquet: ")


def test_wrong_rows_of_8_bits_are_found(tmp_path):
    folder = store(tmp_path / "t", [make_target(n) for n in range(3)], storage="uint8")
    for ranges, problem in (
        ([[0, 1], [0, 1]], "its ranges are no [low, high] for each of 3 words"),
        ([[0, 1], [0, 1, 2], [0, 1]], "its ranges are no [low, high] for each of 3 words"),
        ([[0, 1], [1, 0], [0, 1]], "the map of 'red' has values that are not finite"),
        ([[0, 1], [0, float("nan")], [0, 1]], "the map of 'red' has values that are not finite"),
        ([[0, 1], [-1, 0], [0, 1]], "the map of 'red' has negative values, though it is raw attention"),
    ):
        forge(folder, 0, rows_with(1, ranges=ranges))
        assert verify(folder) == [f"data-00000.parquet: sample 's1': {problem}"]


def test_normalized_maps_may_be_negative(tmp_path):
    maps = np.random.default_rng(0).standard_normal((3, 4, 4)).astype(np.float32)
    for storage in STORAGES:
        folder = store(tmp_path / storage, [make_target(0, maps=maps)], storage=storage, normalization="zscore")
        assert verify(folder) == []


def test_rows_must_be_grouped_as_they_are_read(tmp_path):
    folder = store(tmp_path / "t", [make_target(n) for n in range(12)], shard_size=12)

    def regroup(table):
        sink = pa.BufferOutputStream()
        pq.write_table(table.cast(schema("float16")), sink, row_group_size=5)
        return sink.getvalue().to_pybytes()

    forge(folder, 0, regroup)
    assert verify(folder)[0] == "data-00000.parquet: its row group 0 has 5 rows, expected 8"


@pytest.mark.parametrize("storage", STORAGES)
def test_merge(tmp_path, storage):
    a = store(tmp_path / "a", [make_target(n) for n in (5, 1, 2, 9)], [("s7", "dark"), ("x", "gone")], storage=storage)
    b = store(tmp_path / "b", [make_target(n) for n in (2, 7, 5, 0)], [("s9", "dark"), ("y", "gone")], storage=storage)
    assert merge([a, b], tmp_path / "t") == 6
    assert verify(tmp_path / "t", [*pairs(5, 1, 2, 9, 7, 0), *pairs()]) == []
    found = TargetStore(tmp_path / "t")
    assert list(found) == ["s5", "s1", "s2", "s9", "s7", "s0"]
    assert found.failed == {"x": "gone", "y": "gone"}
    assert (found.source, found.fingerprint) == (SOURCE, TargetStore(a).fingerprint)
    for sample_id in found:
        source = TargetStore(a if sample_id in TargetStore(a) else b)[sample_id]
        assert maintenance._are_equal(found[sample_id], source)
    assert not (tmp_path / "t.merging").exists()
    with pytest.raises(TargetError, match="t exists; give a new folder"):
        merge([a, b], tmp_path / "t")
    with pytest.raises(TargetError, match="nothing to merge"):
        merge([], tmp_path / "u")


def test_what_cannot_be_merged_is_named(tmp_path):
    a = store(tmp_path / "a", [make_target(n) for n in range(3)])
    for name, target in (
        ("caption", make_target(1, caption="a blue disk")),
        ("picture", Target("s1", "0" * 64, make_target(1).word_maps)),
        ("maps", make_target(1, maps=make_target(1).word_maps.maps + np.float32(0.01))),
        ("crop", make_target(1, crop=(0.0, 0.0, 1.0, 1.0))),
        ("missing", make_target(1, maps=np.full((3, 4, 4), np.nan, np.float32))),
    ):
        b = store(tmp_path / name, [target])
        with pytest.raises(TargetError, match=f"sample 's1' is not the same in {a} and {b}"):
            merge([a, b], tmp_path / f"out of {name}")
        assert not (tmp_path / f"out of {name}").exists()
    other = store(tmp_path / "other", [make_target(1)], seed=5)
    with pytest.raises(TargetError, match=rf"another teacher or config \(seed: 0 in {a}, 5 in {other}\)"):
        merge([a, other], tmp_path / "t")
    begun(tmp_path / "begun", [make_target(4)]).release()
    with pytest.raises(TargetError, match="has not finished"):
        merge([a, tmp_path / "begun"], tmp_path / "t")
    path = a / "data-00000.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    with pytest.raises(TargetError, match=r"data-00000\.parquet is damaged, its sha256"):
        merge([a], tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_merge_is_continued(tmp_path, monkeypatch):
    sources = [
        store(tmp_path / "a", [make_target(n) for n in range(5)]),
        store(tmp_path / "b", [make_target(n) for n in range(3, 9)]),
    ]
    merge(sources, tmp_path / "whole")
    add = TargetWriter.add
    monkeypatch.setattr(TargetWriter, "add", lambda writer, *targets: add(writer, *targets) if len(writer.done) < 5 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge(sources, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    monkeypatch.undo()
    shutil.copytree(tmp_path / "t.merging", tmp_path / "u.merging")
    assert merge(sources, tmp_path / "t") == 9
    names = ["manifest.json", "data-00000.parquet"]
    assert [(tmp_path / "t" / n).read_bytes() for n in names] == [(tmp_path / "whole" / n).read_bytes() for n in names]
    with pytest.raises(TargetError, match=r"u\.merging is left from a merge of other stores"):
        merge(sources[1:], tmp_path / "u")


def lavender(*arguments):
    return subprocess.run([sys.executable, "-m", "lavender", "targets", *map(str, arguments)], capture_output=True, text=True)


def test_the_commands(folder, tmp_path):
    more = store(tmp_path / "more", [make_target(n) for n in range(5, 10)])
    result = lavender("merge", folder, more, "--out", tmp_path / "all")
    assert (result.returncode, result.stdout) == (0, f"{tmp_path / 'all'}: 10 samples\n"), result.stderr
    result = lavender("info", tmp_path / "all")
    assert result.returncode == 0, result.stderr
    for line in (
        "settings  map_size=4",
        "finished  yes",
        "samples   10 in 1 shards; 0 failed",
        "words     30, 4 of them without a map",
    ):
        assert line in result.stdout.splitlines(), result.stdout
    result = lavender("verify", tmp_path / "all")
    assert (result.returncode, result.stdout) == (0, "10 samples in 1 shards: sound\n"), result.stderr
    os.remove(folder / "data-00001.parquet")
    result = lavender("verify", folder)
    assert result.returncode == 1
    assert result.stdout == "data-00001.parquet: it is missing: put it back, or extract into a new folder\n"
    Image.new("RGB", (4, 4)).save(tmp_path / "s.png")
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"id": f"s{n}", "image": "s.png", "caption": "a red circle"}) + "\n" for n in range(11))
    )
    result = lavender("verify", tmp_path / "all", "--data", tmp_path / "data.jsonl", "--images", tmp_path)
    assert result.returncode == 1, result.stderr
    assert result.stdout == "1 samples of the data set are neither stored nor listed as failed: 's10'\n"
