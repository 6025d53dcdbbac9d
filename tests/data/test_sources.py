"""Every form of a data set gives the same pictures and captions, in order, again and again, and harms nobody."""

from __future__ import annotations

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lavender.data.samples import read_pairs
from lavender.data.sources import BadPair, open_pairs
from lavender.errors import ConfigError, DataError
from lavender.images import StoredImage
from lavender.miniworld import write_dataset

from .forms import (
    COUNT,
    FORMS,
    IDS,
    as_parquet_of_paths,
    as_shards,
    encoded,
    require_world,
    seen,
    write_tar,
)


@pytest.mark.parametrize("place", ["path", "file", "memory"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_world(world, tmp_path, memory, form, place):
    data = FORMS[form](world, tmp_path / "data")
    if place == "file":
        data = f"file://{data}"
    elif place == "memory":
        memory.put(str(tmp_path / "data"), "/data", recursive=True)
        data = f"memory://data{str(data).removeprefix(str(tmp_path / 'data'))}"
    pairs = open_pairs(data)
    ids = require_world(pairs, world)
    if form in IDS:
        assert ids == [IDS[form].format(n) for n in range(COUNT)]
    elif form == "shards":
        assert ids == ["00000/00000", "00000/00001", "00001/00002", "00001/00003", "00001/00004"]
    else:
        assert ids == ["train-0.parquet#0", "train-0.parquet#1", *(f"train-1.parquet#{n}" for n in range(3))]
    assert pairs.count == (None if form == "shards" else COUNT)
    first = [seen(pair) for pair in pairs]
    assert [seen(pair) for pair in pairs] == first
    assert [seen(pair) for pair in pickle.loads(pickle.dumps(pairs))] == first


@pytest.mark.parametrize("form", ["shards", "parquet_of_datasets"])
def test_files_may_be_given_one_by_one_or_by_a_pattern(world, tmp_path, memory, form):
    folder = FORMS[form](world, tmp_path / "data")
    memory.put(str(folder), "/data", recursive=True)
    ending = "tar" if form == "shards" else "parquet"
    one = next(iter(sorted(folder.glob(f"*.{ending}"))))
    require_world(open_pairs(one), world[:2])
    for pattern in (folder / f"*.{ending}", f"{tmp_path}/*/*.{ending}", f"memory://data/*.{ending}", f"file://{folder}/*.{ending}"):
        require_world(open_pairs(pattern), world)
    (folder / "readme.txt").write_text("Hi")
    require_world(open_pairs(folder), world)
    with pytest.raises(DataError, match=r"\* stands for .*readme.txt; expected a pattern of parquet files alone, or of tars"):
        open_pairs(folder / "*")
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        open_pairs(folder, images=tmp_path / "nowhere")
    for nothing in (folder / "x*.tar", "memory://data/x*.tar"):
        with pytest.raises(DataError, match="stands for nothing"):
            open_pairs(nothing)


def test_pictures_may_be_in_another_folder(world, tmp_path, memory):
    data = as_parquet_of_paths(world, tmp_path / "data")
    (tmp_path / "data/images").rename(tmp_path / "images")
    memory.put(str(tmp_path / "images"), "/pictures/images", recursive=True)
    for images in (tmp_path, f"file://{tmp_path}", "memory://pictures"):
        require_world(open_pairs(data, images=images), world)
        require_world(open_pairs(tmp_path / "data/captions.jsonl", images=images), world)


def test_a_hub_data_set_is_streamed(world, monkeypatch):
    import datasets

    rows = [{"picture": scene.image, "sentence": scene.caption, "other": n} for n, scene in enumerate(world)]
    features = datasets.Features(
        {"picture": datasets.Image(), "sentence": datasets.Value("string"), "other": datasets.Value("int64")}
    )
    table = datasets.Dataset.from_list(rows, features)
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        if options["split"] != "train":
            raise ValueError("Bad split: val. Available splits: ['train']\nmore")
        return table.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.Image, "decode_example", None)  # no picture is decoded on the way
    for name, revision in (("owner/name", None), ("hf://datasets/owner/name", None), ("owner/na.me-1@v1", "v1")):
        pairs = open_pairs(name)
        assert require_world(pairs, world) == [f"train#{n}" for n in range(COUNT)]
        assert require_world(pickle.loads(pickle.dumps(pairs)), world) == [f"train#{n}" for n in range(COUNT)]
        assert asked[-1][1] == {"split": "train", "revision": revision, "streaming": True}
    assert require_world(open_pairs("owner/name", id_column="other"), world) == [str(n) for n in range(COUNT)]
    with pytest.raises(
        DataError, match=r"no file or folder owner/name here, and .* split 'val' cannot be opened: ValueError: Bad sp"
    ):
        open_pairs("owner/name", split="val")
    with pytest.raises(ConfigError, match="--split"):
        open_pairs("owner/name", split=None)
    with pytest.raises(ConfigError, match=r"has no column of captions .*; it has picture, sentence, other.*--caption-column"):
        open_pairs("owner/name", caption_column="text")


def test_a_hub_data_set_without_types_and_one_that_breaks_off(world, tmp_path, monkeypatch):
    import datasets

    root = "hf://datasets/owner/name"

    def rows():
        yield {"image": {"bytes": encoded(world[0].image), "path": None}, "text": world[0].caption}
        yield {"image": {"bytes": None, "path": f"{root}@abc/a.png"}, "text": "In the same commit."}
        yield {"image": {"bytes": None, "path": "b.png"}, "text": "Beside."}
        yield {"image": "https://evil/a.png", "text": "Elsewhere."}
        yield {"image": {"bytes": b"", "path": "c.png"}}
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: datasets.IterableDataset.from_generator(rows))
    entries = iter(open_pairs("owner/name"))
    require_world([next(entries)], world[:1])
    assert [next(entries).image for _ in range(2)] == [f"{root}@abc/a.png", f"{root}/b.png"]
    elsewhere, without = next(entries), next(entries)
    assert (elsewhere.id, without.id) == ("https://evil/a.png", "c.png")
    assert "is not in hf://datasets/owner/name" in elsewhere.reason
    assert without.reason == "no caption; expected a text or a list of texts, found none"
    with pytest.raises(DataError, match="reading hf://datasets/owner/name broke off: ConnectionError: gone"):
        next(entries)


def test_what_looks_like_a_file_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/captions.jsonl", "./captions", "data/a.tar", "data/a.parquet", "a"):
        with pytest.raises(DataError, match="there is no data at"):
            open_pairs(name)


def test_tables_are_asked_for_the_columns_that_are_named(world, tmp_path):
    table = {
        "photo": [encoded(s.image) for s in world], "alt": [s.caption for s in world], "key": [f"k{n}" for n in range(COUNT)],
        "caption": ["wrong"] * COUNT,
    }  # fmt: skip
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(table), path)
    pairs = open_pairs(path, image_column="photo", caption_column="alt", id_column="key")
    assert require_world(pairs, world) == [f"k{n}" for n in range(COUNT)]
    for options, message in (
        ({}, r"a.parquet has no column of pictures \(image or img or .*\); it has photo, alt, key, caption.*--image-column"),
        ({"image_column": "photo", "id_column": "id"}, r"no column of ids \(id\).*--id-column"),
        ({"image_column": "photo", "caption_column": "text"}, r"no column of captions \(text\).*--caption-column"),
        ({"captions": "best"}, "captions is 'best'; choose first or all"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_pairs(path, **options)
    with pytest.raises(ConfigError, match="has no columns: --image-column"):
        open_pairs(write_dataset(world, tmp_path / "data"), image_column="photo")


def test_all_captions_of_a_picture(world, tmp_path):
    pairs = open_pairs(as_parquet_of_paths(world, tmp_path / "data"), captions="all")
    assert pairs.count is None
    assert [pair.id for pair in pairs][:3] == ["images/00000.png#0", "images/00000.png#1", "images/00001.png#0"]
    assert [pair.caption for pair in pairs][:3] == [world[0].caption, "No.", world[1].caption]
    lines = {"a.png": b"1", "a.json": json.dumps({"captions": ["One.", 2, "Three."]}).encode()}
    write_tar(tmp_path / "s.tar", lines)
    found = list(open_pairs(tmp_path / "s.tar", captions="all"))
    assert [own.id for own in found] == ["s/a#0", "s/a#1", "s/a#2"]
    assert found[1] == BadPair("s/a#1", "no caption; expected a text, found a int")


CAPTIONS = ["", " \n", "word " * 10_000, "🦓 und 🎻", "זברה ליד כינור", "一匹斑马", "a\u2028b\x00c"]


def test_captions_of_every_kind_pass_through(tmp_path):
    pq.write_table(pa.table({"image": [b"x"] * len(CAPTIONS), "text": CAPTIONS}), tmp_path / "a.parquet")
    assert [pair.caption for pair in open_pairs(tmp_path / "a.parquet")] == CAPTIONS
    write_tar(
        tmp_path / "a.tar",
        {f"{n}.{e}": c for n, t in enumerate(CAPTIONS) for e, c in (("jpg", b"x"), ("json", json.dumps({"text": t}).encode()))},
    )
    assert [pair.caption for pair in open_pairs(tmp_path / "a.tar")] == CAPTIONS
    lines = [json.dumps({"image": f"{n}.png", "caption": text}) for n, text in enumerate(CAPTIONS)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert [pair.caption for pair in open_pairs(tmp_path / "a.jsonl")] == CAPTIONS


def test_samples_of_a_tar_may_name_their_ids_and_captions(tmp_path):
    first, second, third = ({"key": 7, "alt": "A cat."}, {"key": "b", "alt": "A dog."}, {"alt": "No key."})
    members = {
        f"{n}.{e}": c for n, j in enumerate((first, second, third)) for e, c in (("jpg", b"x"), ("json", json.dumps(j).encode()))
    }
    write_tar(tmp_path / "s.tar", {"0.txt": b"Not this.", **members})
    found = list(open_pairs(tmp_path / "s.tar", id_column="key", caption_column="alt"))
    assert [(own.id, own.caption) for own in found[:2]] == [("7", "A cat."), ("b", "A dog.")]
    assert found[2] == BadPair("s/2", "no id under 'key' in its json; expected a text or a whole number")


def test_iterating_loads_no_picture(world, tmp_path):
    """The pictures of paths and tars may all be gone."""
    data = as_parquet_of_paths(world, tmp_path / "data")
    for file in (tmp_path / "data/images").iterdir():
        file.unlink()
    assert len(list(open_pairs(data))) == len(list(open_pairs(tmp_path / "data/captions.jsonl"))) == COUNT
    for pair in open_pairs(as_shards(world, tmp_path / "s")):
        assert isinstance(pair.image, StoredImage)


def in_upper_case(path):
    """Renames a file, or all in a folder but its pictures, and returns the new path."""
    if path.is_dir():
        for file in [file for file in path.rglob("*") if file.is_file() and file.suffix not in (".png", ".jpg")]:
            in_upper_case(file)
        return path
    return path.rename(path.with_suffix(path.suffix.upper()))


@pytest.mark.parametrize("place", ["path", "memory"])
@pytest.mark.parametrize("form", FORMS)
def test_endings_may_be_in_upper_case(world, tmp_path, memory, form, place):
    data = in_upper_case(FORMS[form](world, tmp_path / "data"))
    pattern = f"{data}/*.TAR" if form == "shards" else data
    if place == "memory":
        memory.put(str(tmp_path / "data"), "/data", recursive=True)
        data, pattern = (f"memory://data{str(path).removeprefix(str(tmp_path / 'data'))}" for path in (data, pattern))
    for given in (data, pattern):
        ids = require_world(open_pairs(given), world)
        if form in IDS:
            assert ids == [IDS[form].format(n) for n in range(COUNT)]
        elif form == "shards":
            assert ids == ["00000/00000", "00000/00001", "00001/00002", "00001/00003", "00001/00004"]
    if form not in ("shards", "parquet_of_datasets", "parquet_of_bytes", "parquet_of_paths") and place == "path":
        assert [pair.caption for pair in read_pairs(data)] == [scene.caption for scene in world]


def test_a_missing_or_compressed_file_is_told_in_upper_case_too(tmp_path):
    with pytest.raises(DataError, match=r"there is no data at a/B\.CSV"):
        open_pairs("a/B.CSV")
    (tmp_path / "A.TAR.GZ").touch()
    with pytest.raises(DataError, match="is compressed"):
        open_pairs(tmp_path / "A.TAR.GZ")
