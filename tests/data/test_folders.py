"""Folders of pictures: those of `datasets` give what `datasets` reads, and texts beside pictures what training scripts read."""

from __future__ import annotations

import json
import os

import pytest
from PIL import Image

from lavender.data.samples import Pair, read_pairs
from lavender.data.sources import BadPair, open_pairs
from lavender.errors import ConfigError, DataError

METADATA = {
    "csv": lambda rows: "file_name,text\n" + "".join(f"{name},{text}\n" for name, text in rows),
    "jsonl": lambda rows: "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in rows),
}


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            Image.new("RGB", (4, 4), content).save(folder / name)
    return folder


def found(folder, **options):
    return {e.id: e.caption if isinstance(e, Pair) else f"! {e.reason}" for e in open_pairs(folder, **options)}


LAYOUTS = {
    "flat": {"": ["a.png", "b.png"]},
    "below": {"": ["x/a.png", "y/b.png"]},
    "each folder its own": {"x": ["a.png"], "y": ["z/b.png"]},
    "splits": {"train": ["a.png", "b.png"], "test": ["a.png", "c.png"]},
    "splits further down": {"data/train-1": ["a.png"], "data/val": ["b.png"], "data/other": ["c.png"]},
}


@pytest.mark.parametrize("kind", METADATA)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_folder_is_what_datasets_reads(tmp_path, monkeypatch, layout, kind):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    for below, names in LAYOUTS[layout].items():
        put(folder / below, dict.fromkeys(names, "red"))
        put(folder / below, {f"metadata.{kind}": METADATA[kind]([(name, f"{below}/{name} is red.") for name in names])})
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    for split, rows in theirs.items():
        rows = rows.cast_column("image", datasets.Image(decode=False))
        wanted = {os.path.relpath(row["image"]["path"], folder): row["text"] for row in rows}
        assert found(folder, split=split) == wanted
    with pytest.raises(DataError, match=r"no pictures of the split 'lost'; its splits are "):
        open_pairs(folder, split="lost")


def test_a_split_without_captions_costs_the_others_nothing(tmp_path):
    files = {"train/a.png": "red", "train/metadata.csv": "file_name,text\na.png,A cat.\n", "test/b.png": "red"}
    folder = put(tmp_path / "data", {**files, "test/metadata.csv": "file_name\nb.png\n"})
    assert found(folder) == {"train/a.png": "A cat."}
    with pytest.raises(ConfigError, match=r"test/metadata\.csv has no column of captions"):
        open_pairs(folder, split="test")


def test_splits_of_one_metadata_file_are_those_of_its_pictures(tmp_path):
    rows = [(f"{split}/a.png", split) for split in ("train", "test")]
    folder = put(tmp_path / "data", {"metadata.csv": METADATA["csv"](rows), "train/a.png": "red", "test/a.png": "red"})
    assert found(folder) == {"train/a.png": "train"}
    assert found(folder, split="test") == {"test/a.png": "test"}


def test_bad_rows_of_metadata_cost_themselves_alone(tmp_path):
    lines = [
        {"file_name": "a.png", "caption": "A cat."}, {"file_name": "gone.png", "caption": "A dog."}, {"file_name": "b.png"}, [1],
        {"file_name": "../up.png", "caption": "A cow."}, {"caption": "A hen."}, {"file_name": "./a.png", "caption": "Again."},
    ]  # fmt: skip
    folder = put(tmp_path / "data", {"a.png": "red", "metadata.jsonl": "\n".join(map(json.dumps, lines)) + "\n{"})
    entries = list(open_pairs(folder))
    assert [type(entry) for entry in entries] == [Pair, Pair, *[BadPair] * 6]
    assert [entry.id for entry in entries] == [
        "a.png", "gone.png", "b.png", "metadata.jsonl#3", "../up.png", "metadata.jsonl#5", "a.png", "metadata.jsonl#7"
    ]  # fmt: skip
    for entry, reason in zip(
        entries[2:], ("no caption", "line 4 is a list", "is not in", "no picture", "twice", "line 8"), strict=True
    ):
        assert reason in entry.reason
    with pytest.raises(DataError, match=r"b\.png: no caption"):
        read_pairs(folder)
    assert list(found(folder, captions="all"))[-2:] == ["a.png#1", "metadata.jsonl#7"]


def test_pictures_of_metadata_may_lie_elsewhere(tmp_path):
    put(tmp_path / "pictures", {"a.png": "red"})
    folder = put(tmp_path / "data", {"metadata.csv": "file_name,text\na.png,A cat.\n"})
    (pair,) = open_pairs(folder, images=tmp_path / "pictures")
    assert os.path.samefile(pair.image, tmp_path / "pictures/a.png")


def test_texts_beside_pictures(tmp_path):
    folder = put(
        tmp_path / "data",
        {
            "a.JPG": "red", "a.txt": " A cat.\n", "10_dog/b.c.png": "red", "10_dog/b.c.caption": "\ufeffA dog.",
            "lone.png": "red", "read me.txt": "Hello.", "both.png": "red", "both.jpg": "red", "both.txt": "Two.",
            "twice.png": "red", "twice.txt": "One.", "twice.caption": "Another.", "empty.png": "red", "empty.txt": "",
            ".git/x.png": "red", ".git/x.txt": "No.", "train/d.png": "red", "train/d.txt": "A train.",
        },
    )  # fmt: skip
    (folder / "latin.png").write_bytes((folder / "lone.png").read_bytes())
    (folder / "latin.txt").write_bytes("Ein Zebra für Ann".encode("latin-1"))
    (folder / "long.png").write_bytes((folder / "lone.png").read_bytes())
    (folder / "long.txt").write_text("a" * (2**20 + 1))
    os.mkfifo(folder / "pipe.txt")
    (folder / "pipe.png").write_bytes((folder / "lone.png").read_bytes())
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "round").symlink_to(folder)
    with pytest.raises(DataError, match=r"a folder of the split 'train' beside what belongs to none \(10_dog\)"):
        open_pairs(folder)
    entries = found(folder, split=None)
    good = {name: text for name, text in entries.items() if not text.startswith("!")}
    assert good == {"10_dog/b.c.png": "A dog.", "a.JPG": "A cat.", "empty.png": "", "train/d.png": "A train."}
    assert {name: text[2:] for name, text in entries.items() if name not in good} == {
        "both.jpg": "2 pictures beside it (both.jpg, both.png); expected one",
        "latin.png": "latin.txt cannot be read: 'utf-8' codec can't decode byte 0xfc in position 11: invalid start byte",
        "lone.png": "0 captions beside it (none); expected one, lone.txt",
        "long.png": "long.txt has more than 1048576 bytes; a caption is shorter",
        "pipe.png": "0 captions beside it (none); expected one, pipe.txt",
        "read me.txt": "0 pictures beside it (none); expected one",
        "twice.png": "2 captions beside it (twice.caption, twice.txt); expected one, twice.txt",
    }
    assert open_pairs(folder, split=None).count == len(entries)


def test_splits_of_texts_beside_pictures(tmp_path):
    folder = put(
        tmp_path / "data", {f"{top}/a.{e}": "red" if e == "png" else top for top in ("train", "val") for e in ("png", "txt")}
    )
    assert found(folder) == {"train/a.png": "train"}
    assert found(folder, split="validation") == found(folder, split="val") == {"val/a.png": "val"}
    assert len(found(folder, split=None)) == 2


PICTURE = {"a.png": "red"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"has no captions: expected a metadata\.csv or metadata\.jsonl .* or a\.txt beside a\.jpg"),
        (PICTURE, "has no captions"),
        ({**PICTURE, "captions.csv": "image,text\na.png,A."}, r"no captions.*If they are in captions\.csv, give this file itself"),
        ({**PICTURE, "a.txt": "A.", "metadata.csv": "file_name,text\na.png,A."}, r"in metadata\.csv and in texts .*a\.txt"),
        ({**PICTURE, "metadata.jsonl": "", "metadata.csv": ""}, r"captions in metadata\.csv and in metadata\.jsonl"),
        ({**PICTURE, "metadata.csv": "file_name,text\n"}, r"metadata\.csv has no rows"),
        ({**PICTURE, "metadata.csv": "file_name,text,caption\na.png,b,c\n"}, r"2 columns of captions \(text, caption\)"),
        ({**PICTURE, "metadata.csv": "text\nb\n"}, "no column of pictures"),
    ],
)  # fmt: skip
def test_folders_without_captions_or_with_too_many(tmp_path, memory, files, message):
    folder = put(tmp_path / "data", {"x/readme.md": "", **files})
    memory.put(str(folder), "/data", recursive=True)
    for place in (folder, f"file://{folder}", "memory://data"):
        with pytest.raises((DataError, ConfigError), match=message) as caught:
            open_pairs(place)
        assert "\n" not in str(caught.value)


def test_options_that_do_nothing_for_texts_are_refused(tmp_path):
    folder = put(tmp_path / "data", {**PICTURE, "a.txt": "A cat."})
    for options in ({"images": tmp_path}, {"caption_column": "text"}):
        with pytest.raises(ConfigError, match=r"texts beside its pictures, for which --images and names of columns do nothing"):
            open_pairs(folder, **options)


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.csv", "a.jsonl"])
def test_a_pipe_or_device_as_data_never_hangs(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="expected a regular file, and this is a pipe"):
        list(map(_require_pair, open_pairs(tmp_path / name)))


def _require_pair(entry):
    if isinstance(entry, BadPair):
        raise DataError(entry.reason)
