"""Stores that were damaged or edited, or that came from elsewhere: what reaches a batch is what was written, or nothing does."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lavender.batches.collator import Collator
from lavender.config import TrainingConfig
from lavender.data.samples import Sample
from lavender.errors import DataError, LavenderError, TargetError
from lavender.images import image_sha256
from lavender.miniworld.scenes import DESCRIBE
from lavender.targets.maintenance import info, merge, verify
from lavender.targets.manifest import StoreConfig
from lavender.targets.shards import encoded, sha256_of
from lavender.targets.store import Target, TargetStore, TargetWriter
from lavender.training.train import fine_tune
from lavender.types import OUTCOMES, WordMaps
from lavender.words import words_of

from .stores import CONFIG, SOURCE, fill, make_target

SIZE = 8
STORES = ("float16", "uint8", "zscore")
"""The storages of raw attention, and normalized maps, which are negative too."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, scenes):
    """The samples, and a store of their maps for each of `STORES`, in shards of nine and three."""
    root = tmp_path_factory.mktemp("stores")
    samples = [Sample(f"s{n}", scene.image, DESCRIBE, scene.caption) for n, scene in enumerate(scenes[:12])]
    for name in STORES:
        config = StoreConfig(SIZE, "uint8", "none") if name == "uint8" else StoreConfig(SIZE, "float16", "none")
        if name == "zscore":
            config = StoreConfig(SIZE, normalization="zscore")
        with TargetWriter(root / name, {"model": "m", "weights": "w", "steps": [1, 2]}, config, 9) as writer:
            for n, sample in enumerate(samples):
                words = words_of(sample.answer)
                maps = np.random.default_rng(n).random((len(words), SIZE, SIZE), np.float32)
                maps = maps if name != "zscore" else (maps - 0.5) * 4
                writer.add(Target(sample.id, image_sha256(sample.image), WordMaps(sample.answer, words, maps)))
            writer.fail("bad", "too dark")
            writer.close()
    return samples, root


def flip(rng, folder):
    path = any_file(rng, folder)
    data = bytearray(path.read_bytes())
    for place in rng.integers(0, len(data), int(rng.choice([1, 2, 64]))):
        data[place] ^= int(rng.integers(1, 256))
    path.write_bytes(data)


def flip_in_footer(rng, folder):
    """Where parquet says what the bytes mean."""
    path = folder / f"data-0000{rng.integers(2)}.parquet"
    data = bytearray(path.read_bytes())
    data[-int(rng.integers(1, 1500))] ^= int(rng.integers(1, 256))
    path.write_bytes(data)


def cut(rng, folder):
    path = any_file(rng, folder)
    data = path.read_bytes()
    path.write_bytes(data[: rng.integers(len(data))])


def lengthen(rng, folder):
    path = any_file(rng, folder)
    path.write_bytes(path.read_bytes() + bytes(rng.integers(0, 256, rng.integers(1, 100), np.uint8)))


def overwrite(rng, folder):
    """A page of the disk that holds something else."""
    path = any_file(rng, folder)
    data = bytearray(path.read_bytes())
    place = int(rng.integers(len(data)))
    data[place : place + 64] = bytes(rng.integers(0, 256, 64, np.uint8))[: len(data) - place]
    path.write_bytes(data)


def exchange(rng, folder):
    one, other = folder / "data-00000.parquet", folder / "data-00001.parquet"
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 8, 9, 12, 16, 1.5, 1e300, 10**30, "", "x", "0" * 64, "../x.parquet", "/etc/passwd", "none",
    "minmax", "float16", "uint8", [], ["x"], {}, {"a": 1}, {"sha256": "0" * 64, "samples": 3},
]  # fmt: skip


def edit_manifest(rng, folder):
    """One entry, at any depth, gets another value, another name, or is removed; or there is one more."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    containers = [manifest]
    for entry in containers:
        for value in entry.values() if isinstance(entry, dict) else entry:
            if isinstance(value, dict | list) and value:
                containers.append(value)
    entry = containers[rng.integers(len(containers))]
    keys = list(entry) if isinstance(entry, dict) else list(range(len(entry)))
    key = keys[rng.integers(len(keys))]
    value = VALUES[rng.integers(len(VALUES))]
    what = rng.integers(4)
    if what == 0:
        del entry[key]
    elif what == 1 and isinstance(entry, dict):
        entry[["unknown", "../x.parquet", "data-00002.parquet"][rng.integers(3)]] = entry[key] if rng.integers(2) else value
    elif what == 2 and isinstance(entry, dict):
        entry[["unknown", "../x.parquet", "data-00002.parquet"][rng.integers(3)]] = entry.pop(key)
    else:
        entry[key] = value
    path.write_text(json.dumps(manifest))


def change_row(rows, rng):
    """A field of a row that stays of its type, so that the file can be written."""
    row = rows[rng.integers(len(rows))]
    name = ["id", "image_sha256", "caption", "words", "maps", "grid", "crop"][rng.integers(7)]
    if isinstance(row[name], str):
        row[name] = ["", "x", row[name] + "x", row[name][::-1], rows[0][name]][rng.integers(5)]
    elif name == "words":
        row["words"] = [row["words"][1:], row["words"][::-1], [{**w, "start": -1} for w in row["words"]]][rng.integers(3)]
    elif name == "maps":
        row["maps"] = [row["maps"][1:], row["maps"][::-1], [[[type(v)(v / 2) for v in x] for x in y] for y in row["maps"]]][
            rng.integers(3)
        ]
    elif name == "grid":
        row["grid"] = [[], [SIZE], [4, 16], [-SIZE, -SIZE], [0, 0]][rng.integers(5)]
    else:
        row["crop"] = [[], [0, 0, 0.5, 0.5], [1, 1, 0, 0], [float("nan")] * 4, [0, 0, 2, 2]][rng.integers(5)]


def edit_rows(rng, folder):
    """A change that is written by a tool for parquet, which leaves the manifest as it is."""
    path = folder / f"data-0000{rng.integers(2)}.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    change_row(rows, rng)
    path.write_bytes(encoded(pa.Table.from_pylist(rows, schema=table.schema), "zstd"))


ATTACKS = (flip, flip, flip_in_footer, cut, lengthen, overwrite, exchange, edit_manifest, edit_manifest, edit_manifest, edit_rows)


def any_file(rng, folder):
    return folder / ["manifest.json", "data-00000.parquet", "data-00001.parquet"][rng.integers(3)]


def batch_of(processor, folder, samples, on_error):
    return Collator(processor, TargetStore(folder), on_error=on_error)(samples)


def message_of(use):
    """What an error of lavender's says; None where there is none."""
    try:
        use()
    except LavenderError as error:
        return str(error)
    return None


def require_harmless(processor, folder, samples, expected):
    """Every sample's targets are those that were written, or it is skipped, or one line says what is wrong. Whether all are."""
    for one in (samples[3:4], samples[10:11], samples):
        said = message_of(lambda one=one: batch_of(processor, folder, one, "raise"))
        assert said is None or ("\n" not in said and str(folder) in said), said
    if said is None:
        batch = batch_of(processor, folder, samples, "raise")
        assert torch.equal(batch["lavender_targets"], expected["lavender_targets"])
        assert torch.equal(batch["lavender_present"], expected["lavender_present"])
    try:
        batch = batch_of(processor, folder, samples, "skip")
    except LavenderError:
        return False
    for b in range(len(samples)):
        if OUTCOMES[batch["lavender_outcomes"][b]] == "skipped":
            assert not batch["lavender_present"][b].any()
        else:
            assert torch.equal(batch["lavender_present"][b], expected["lavender_present"][b])
            assert torch.equal(batch["lavender_targets"][b], expected["lavender_targets"][b])
    return all(OUTCOMES[n] == "matched" for n in batch["lavender_outcomes"])


@pytest.mark.parametrize(
    ("name", "count"),
    [*((name, 66) for name in STORES), *(pytest.param(name, 440, marks=pytest.mark.full) for name in STORES)],
)
def test_no_attack_trains(whole, processor, tmp_path, name, count):
    samples, root = whole
    expected = batch_of(processor, root / name, samples, "raise")
    assert expected["lavender_present"].any(dim=1).all()
    harmless = 0
    for seed in range(count):
        rng = np.random.default_rng([count, seed])
        folder = tmp_path / str(seed)
        shutil.copytree(root / name, folder)
        ATTACKS[seed % len(ATTACKS)](rng, folder)
        harmless += require_harmless(processor, folder, samples, expected)
    assert harmless <= count / 4  # names of a source, reasons of failures, edits that change nothing


def forge(folder, change):
    """Changes the first shard's rows, and the manifest with them."""
    path = folder / "data-00000.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    path.write_bytes(encoded(pa.Table.from_pylist(rows, schema=table.schema), "zstd"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][path.name] = {"sha256": sha256_of(path), "samples": len(rows)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def add_to_maps(rows, value):
    rows[3]["maps"] = [[[x + value for x in line] for line in word] for word in rows[3]["maps"]]


FORGED = {
    "values": lambda rows: add_to_maps(rows, 2500.0),
    "negative": lambda rows: add_to_maps(rows, -0.7),
    "infinite": lambda rows: rows[3]["maps"][0][0].__setitem__(0, float("inf")),
    "some missing": lambda rows: rows[3]["maps"][0][0].__setitem__(0, float("nan")),
    "caption": lambda rows: rows[3].update(caption=rows[3]["caption"].upper()),
    "negative span": lambda rows: rows[3]["words"][0].update(start=-5, end=-1, text=rows[3]["caption"][-5:-1]),
    "beyond the caption": lambda rows: rows[3]["words"][-1].update(end=10_000),
    "empty cell": lambda rows: rows[3].update(caption=None),
    "empty span": lambda rows: rows[3]["words"][0].update(start=None),
    "empty value": lambda rows: rows[3]["maps"][0][0].__setitem__(0, None),
    "fewer maps": lambda rows: rows[3]["maps"].pop(),
    "grid": lambda rows: rows[3].update(grid=[SIZE // 2, SIZE * 2]),
    "other size": lambda rows: rows[3].update(grid=[1, 1], maps=[[[0.5]]] * len(rows[3]["maps"])),
    "crop": lambda rows: rows[3].update(crop=[0.0, 0.0, 0.0, 1.0]),
    "NaN crop": lambda rows: rows[3].update(crop=[float("nan")] * 4),
    "twice": lambda rows: rows[4].update(id="s3"),
    "in both shards": lambda rows: rows[3].update(id="s10"),
}


@pytest.mark.parametrize("fault", FORGED)
def test_what_contradicts_itself_is_refused_whatever_the_manifest_says(whole, processor, tmp_path, fault):
    samples, root = whole
    shutil.copytree(root / "float16", tmp_path / "t")
    forge(tmp_path / "t", FORGED[fault])
    with pytest.raises(TargetError, match=r"s3|s10|empty cells") as error:
        batch_of(processor, tmp_path / "t", samples[3:4], "raise")
    assert "\n" not in str(error.value)
    assert verify(tmp_path / "t")
    if fault in (
        "values",
        "negative",
        "infinite",
        "caption",
        "fewer maps",
        "crop",
        "other size",
    ):  # the others of its shard are sound
        expected = batch_of(processor, root / "float16", samples[2:3], "raise")
        found = batch_of(processor, tmp_path / "t", samples[2:3], "raise")
        assert torch.equal(found["lavender_targets"], expected["lavender_targets"])


@pytest.mark.parametrize("ranges", [[1.0, 0.0], [float("nan"), 1.0], [0.0, float("inf")], [-1.0, 0.5], [0.0, 2500.0], [0.0]])
def test_ranges_of_eight_bits_are_those_of_attention(whole, processor, tmp_path, ranges):
    samples, root = whole
    shutil.copytree(root / "uint8", tmp_path / "t")
    forge(tmp_path / "t", lambda rows: rows[3]["ranges"].__setitem__(1, ranges))
    with pytest.raises(TargetError, match="s3"):
        batch_of(processor, tmp_path / "t", samples[3:4], "raise")
    assert verify(tmp_path / "t")


@pytest.mark.parametrize("change", ["type", "order", "column"])
def test_shards_of_other_columns_are_refused(whole, tmp_path, change):
    shutil.copytree(whole[1] / "float16", tmp_path / "t")
    path = tmp_path / "t/data-00000.parquet"
    table = pq.read_table(path)
    if change == "type":
        table = table.set_column(0, "id", table["id"].cast(pa.large_string()))
    elif change == "order":
        table = table.select(table.column_names[::-1])
    else:
        table = table.append_column("more", table["id"])
    pq.write_table(table, path, row_group_size=8)
    with pytest.raises(TargetError, match=r"data-00000\.parquet is damaged \(it has other columns or types"):
        TargetStore(tmp_path / "t")


def test_rows_in_other_groups_are_never_taken_for_each_other(whole, tmp_path):
    shutil.copytree(whole[1] / "float16", tmp_path / "t")
    path = tmp_path / "t/data-00000.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=5)
    with pytest.raises(TargetError, match="its row group 0 has 5 rows, expected 8"):
        TargetStore(tmp_path / "t")


def replaced(path, data):
    (path.parent / "new").write_bytes(data)
    os.replace(path.parent / "new", path)


def rewritten_in_its_time(path, data):
    """In place, and as old as it was."""
    times = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("change", [replaced, Path.write_bytes, rewritten_in_its_time])
def test_a_shard_that_changes_while_it_is_used_is_compared_again(whole, tmp_path, change):
    shutil.copytree(whole[1] / "float16", tmp_path / "t")
    path = tmp_path / "t/data-00000.parquet"
    data = path.read_bytes()
    store = TargetStore(tmp_path / "t")
    expected = store["s3"].word_maps.maps
    change(path, data[:200] + bytes([data[200] ^ 1]) + data[201:])
    for reader in (store, pickle.loads(pickle.dumps(store)), TargetStore(tmp_path / "t")):
        with pytest.raises(TargetError, match=r"data-00000\.parquet is damaged, its sha256"):
            reader["s3"]
        assert reader["s10"].id == "s10"
    change(path, data)
    np.testing.assert_array_equal(store["s3"].word_maps.maps, expected)
    path.unlink()
    with pytest.raises(TargetError, match=r"cannot read .*data-00000\.parquet .*put it back"):
        store["s3"]


def test_a_sample_is_missing_only_from_a_store_that_is_whole(whole, tmp_path):
    """A damaged id would be that of no sample."""
    shutil.copytree(whole[1] / "float16", tmp_path / "t")
    store = TargetStore(tmp_path / "t")
    assert "nowhere" not in store
    path = tmp_path / "t/data-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    for ask in (lambda: "nowhere" in store, lambda: store["nowhere"], lambda: store.of_pictures(["0"], ()), store.contents):
        with pytest.raises(TargetError, match=r"data-00001\.parquet is damaged"):
            ask()
    assert "s3" in store


def test_training_on_a_damaged_store_does_not_begin(whole, student_folder, tmp_path):
    samples, root = whole
    shutil.copytree(root / "float16", tmp_path / "t")
    path = tmp_path / "t/data-00000.parquet"
    data = bytearray(path.read_bytes())
    data[1000:1064] = bytes(byte ^ 0x55 for byte in data[1000:1064])
    path.write_bytes(data)
    with pytest.raises(TargetError, match=r"data-00000\.parquet is damaged"):
        fine_tune(student_folder, samples, tmp_path / "run", TrainingConfig(steps=1), targets=TargetStore(tmp_path / "t"))
    assert not (tmp_path / "run").exists()


def test_what_builds_on_a_store_compares_it_too(whole, tmp_path):
    for name in ("t", "begun"):
        fill(tmp_path / name, range(7)).close()
    path = tmp_path / "t/data-00001.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:300] + bytes([data[300] ^ 1]) + data[301:])
    for use in (lambda: fill(tmp_path / "t", [8]), lambda: info(tmp_path / "t"), lambda: merge([tmp_path / "t"], tmp_path / "u")):
        with pytest.raises(TargetError, match=r"data-00001\.parquet is damaged, its sha256"):
            use()
    assert not (tmp_path / "u").exists()
    # Nothing vouches for what is pending, or for a shard that no manifest lists yet: their rows are looked at.
    fill(tmp_path / "begun", range(8)).release()
    pending = sorted((tmp_path / "begun/pending").iterdir())[-1]
    for name in (f"pending/{pending.name}", "data-00003.parquet"):
        table = pq.read_table(pending)
        table = table if name.startswith("pending") else table.drop_columns(["position"])
        rows = table.to_pylist()
        rows[0]["caption"] = "other words"
        kept = pending.read_bytes()
        (tmp_path / "begun" / name).write_bytes(encoded(pa.Table.from_pylist(rows, schema=table.schema), "none"))
        with pytest.raises(TargetError, match=r"parquet is damaged \(sample 's.': the word 'a' is not at 0 to 1 of its caption\)"):
            fill(tmp_path / "begun", [9])
        (tmp_path / "begun/data-00003.parquet").unlink(missing_ok=True)
        pending.write_bytes(kept)
    assert len(fill(tmp_path / "begun", [9]).done) == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": np.zeros((2, 4, 4), np.float32)}, r"shape \[2, 4, 4\]; expected \[3, y, x\]"),
        ({"maps": np.zeros((3, 0, 4), np.float32)}, r"shape \[3, 0, 4\]"),
        ({"caption": "a rod circle"}, "the word 'red' is not at 2 to 5"),
        ({"crop": (0.5, 0.0, 0.5, 1.0)}, "the crop .* is no"),
    ],
)
def test_a_writer_takes_nothing_that_a_reader_would_refuse(tmp_path, change, message):
    known = make_target(0).word_maps
    values = {"caption": known.caption, "words": known.words, "maps": known.maps, "crop": known.crop} | change
    with TargetWriter(tmp_path / "t", SOURCE, CONFIG) as writer, pytest.raises(DataError, match=f"sample 's0': .*{message}"):
        writer.add(Target("s0", "0" * 64, WordMaps(**values)))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes, which this system lacks")
@pytest.mark.parametrize("name", ["manifest.json", "data-00000.parquet"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, name):
    fill(tmp_path / "t", range(3)).close()
    path = tmp_path / "t" / name
    for make, kind in ((lambda: os.mkfifo(path), "a pipe"), (lambda: path.symlink_to("/dev/zero"), "a device")):
        path.unlink()
        make()
        for use in (TargetStore, lambda folder: fill(folder, []), info):
            with pytest.raises(TargetError, match=kind):
                use(tmp_path / "t")


LED_OUT = [".lock.json", ".lock.json.partial", "manifest.json.partial", "data-00001.parquet.partial"]


@pytest.mark.parametrize("name", [*LED_OUT, ".lock", "pending", "data-00001.parquet"])
def test_nothing_outside_of_a_store_is_written_or_removed(tmp_path, name):
    victim = tmp_path / "mine"
    fill(tmp_path / "t", range(3)).close()
    victim.mkdir()
    (victim / "a.parquet").write_text("mine")
    (tmp_path / "t" / name).unlink(missing_ok=True)
    (tmp_path / "t" / name).symlink_to(victim if name == "pending" else victim / "a.parquet")
    if name in LED_OUT:
        fill(tmp_path / "t", range(7)).close()
        assert len(TargetStore(tmp_path / "t")) == 7
        assert not any(path.is_symlink() for path in (tmp_path / "t").iterdir())
    else:
        with pytest.raises(TargetError, match=rf"t/{name} is (a link to .*mine|damaged)"):
            fill(tmp_path / "t", range(7))
    assert {path.name: path.read_text() for path in victim.iterdir()} == {"a.parquet": "mine"}


def test_a_store_whose_files_are_links_as_in_a_cache_is_read_and_continued_beside_them(tmp_path):
    fill(tmp_path / "blobs", range(4)).close()
    (tmp_path / "t").mkdir()
    blobs = {path.name: path.read_bytes() for path in (tmp_path / "blobs").iterdir()}
    for name in blobs:
        (tmp_path / "t" / name).symlink_to(tmp_path / "blobs" / name)
    (tmp_path / "t/.lock").unlink()
    np.testing.assert_array_equal(
        TargetStore(tmp_path / "t")["s3"].word_maps.maps, TargetStore(tmp_path / "blobs")["s3"].word_maps.maps
    )
    fill(tmp_path / "t", range(8)).close()
    assert len(TargetStore(tmp_path / "t")) == 8
    assert {path.name: path.read_bytes() for path in (tmp_path / "blobs").iterdir()} == blobs


@pytest.mark.parametrize("name", ["../data-00000.parquet", "/etc/passwd", "data-1.parquet", "data-00001.parquet", ""])
def test_a_manifest_names_no_other_files(tmp_path, name):
    fill(tmp_path / "t", range(3)).close()
    path = tmp_path / "t/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"] = {name: manifest["shards"]["data-00000.parquet"]}
    path.write_text(json.dumps(manifest))
    for use in (TargetStore, lambda folder: fill(folder, []), info, verify):
        with pytest.raises(TargetError, match=r"manifest\.json is damaged \(it lists a shard '.*' where data-00000\.parquet is"):
            use(tmp_path / "t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["config"].update(map_size=8), "its source and config have the fingerprint"),
        (lambda m: m["config"].update(normalization="zscore"), "its source and config have the fingerprint"),
        (lambda m: m["config"].update(map_size="4"), "its config: map_size is '4'"),
        (lambda m: m["config"].update(storage="float64"), "its config: storage is 'float64'"),
        (lambda m: m["config"].update(more=1), "its config: StoreConfig has no setting more"),
        (lambda m: m["config"].pop("storage"), "its source and config have the fingerprint"),
        (lambda m: m["source"].update(weights="other"), "its source and config have the fingerprint"),
        (lambda m: m.update(fingerprint=7), "fingerprint is 7, expected a text"),
        (lambda m: m.update(complete=1), "complete is 1, expected true or false"),
        (lambda m: m.update(shards=[]), r"shards is \[\], expected a mapping"),
        (lambda m: m.update(failed=[{"id": "x"}]), "failed has .*, expected an id and a reason"),
        (lambda m: m.update(failed=[{"id": "x", "reason": 3}]), "failed has .*, expected an id and a reason"),
        (lambda m: m.update(more=1), "it has the unknown entry 'more'"),
        (lambda m: m["shards"]["data-00000.parquet"].update(samples=True), "the samples of data-00000.parquet are True"),
        (lambda m: m["shards"]["data-00000.parquet"].update(samples=-3), "the samples of data-00000.parquet are -3"),
        (lambda m: m["shards"]["data-00000.parquet"].update(sha256="../x"), "the sha256 of data-00000.parquet is '../x'"),
        (lambda m: m["shards"]["data-00000.parquet"].update(size=3), "of data-00000.parquet it says"),
        (lambda m: m["shards"].pop("data-00000.parquet"), "data-00000.parquet' where|it lists a shard"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_one_line(tmp_path, change, message):
    fill(tmp_path / "t", range(6)).close()
    path = tmp_path / "t/manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(TargetError, match=rf"manifest\.json is damaged \(.*{message}") as error:
        TargetStore(tmp_path / "t")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": NaN}', "\ud800", '{"a": 1', "\0"])
def test_what_is_no_json_is_one_line(tmp_path, text):
    fill(tmp_path / "t", range(3)).close()
    (tmp_path / "t/manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(TargetError, match=r"manifest\.json is damaged"):
        TargetStore(tmp_path / "t")


def test_a_finished_store_has_all_its_shards_listed_and_nothing_pending(tmp_path):
    fill(tmp_path / "t", range(7)).close()
    path = tmp_path / "t/manifest.json"
    text = path.read_text()
    manifest = json.loads(text)
    del manifest["shards"]["data-00002.parquet"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(TargetError, match=r"data-00002\.parquet is not listed in the manifest"):
        TargetStore(tmp_path / "t")
    path.write_text(text)
    fill(tmp_path / "t", [7]).release()
    path.write_text(path.read_text().replace('"complete": false', '"complete": true'))
    with pytest.raises(TargetError, match="marked as finished, but samples are pending"):
        TargetStore(tmp_path / "t")
