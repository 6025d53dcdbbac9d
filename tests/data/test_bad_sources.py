"""Data sets that are damaged, hostile or incomplete: what is bad is reported entry by entry, and nothing else is touched."""

from __future__ import annotations

import json
import os
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lavender.data.samples import Pair, read_pairs, read_samples
from lavender.data.sources import BadPair, open_pairs
from lavender.errors import ConfigError, DataError
from lavender.images import StoredImage, load_image, read_bytes
from lavender.miniworld import write_dataset

from .forms import (
    as_parquet_of_datasets,
    as_shards,
    encoded,
    require_world,
    shard,
    write_tar,
)


def test_bad_rows_of_a_table_are_told_one_by_one(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff")])
    rows = [
        ("a", b"x", "fine"), ("b", b"x", None), ("a", b"x", "again"), ("c", None, "no picture"), ("d", b"x", ""),
        (None, b"x", "row"),
    ]  # fmt: skip
    names, pictures, texts = (list(column) for column in zip(*rows, strict=True))
    table = pa.table({"id": names, "image": pa.array(pictures, pa.binary()), "text": pa.array(texts, pa.string())})
    last = pa.table({"id": ["e"], "image": pa.array([b"x"], pa.binary()), "text": broken})
    pq.write_table(pa.concat_tables([table, last]), tmp_path / "t.parquet")
    pairs = open_pairs(tmp_path / "t.parquet")
    found = [(own.id, getattr(own, "reason", None)) for own in pairs]
    assert pairs.count == len(found) == 7
    assert found[:6] == [
        ("a", None),
        ("b", "no caption; expected a text or a list of texts, found none"),
        ("a", "the id occurs twice; name a column of ids that differ (--id-column)"),
        ("c", "no picture; expected encoded bytes or a path, found none"),
        ("d", None),
        ("t.parquet#5", None),
    ]
    assert found[6][0] == "e"
    assert "'utf-8' codec can't decode byte 0xff" in found[6][1]


def test_bad_samples_of_a_tar_are_told_one_by_one(tmp_path):
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard = tarfile.TarInfo("hard.jpg")
    hard.type, hard.linkname = tarfile.LNKTYPE, "fine.jpg"
    device = tarfile.TarInfo("device.jpg")
    device.type = tarfile.CHRTYPE
    text = b"A cat."
    members = {
        "fine.jpg": b"x", "fine.txt": text,
        "none.jpg": b"x",
        "alone.txt": text,
        "two.jpg": b"x", "two.png": b"x", "two.txt": text,
        "latin.jpg": b"x", "latin.txt": "Zebra für Ann".encode("latin-1"),
        "json.jpg": b"x", "json.json": b"{",
        "list.jpg": b"x", "list.json": b"[1]",
        "deep.jpg": b"x", "deep.json": b"[" * 100_000,
        "long.jpg": b"x", "long.txt": b"a" * (2**20 + 1),
        "half.jpg": b"x", "half.json": b'{"text": "a \\ud83d ring"}',
        "link.jpg": link, "link.txt": text, "hard.jpg": hard, "hard.txt": text, "device.jpg": device, "device.txt": text,
        "../../up.jpg": b"x", "../../up.txt": text,
        "/etc/abs.JPG": b"x", "/etc/abs.txt": text,
        "._mac.jpg": b"x", "readme": b"x",
    }  # fmt: skip
    write_tar(tmp_path / "s.tar", members)
    found = {own.id.removeprefix("s/"): getattr(own, "reason", "") for own in open_pairs(tmp_path / "s.tar")}
    pictures = "0 pictures; expected one whose name ends with jpg, jpeg, png, webp"
    assert found.pop("deep").startswith("its json cannot be read:")
    assert found == {
        "fine": "",
        "none": "no caption; expected a text or a list of texts, found none",
        "alone": pictures,
        "two": "2" + pictures[1:],
        "latin": "its txt cannot be read: 'utf-8' codec can't decode byte 0xfc in position 7: invalid start byte",
        "json": "its json cannot be read: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "list": "its json is a list; expected an object with a caption in it",
        "long": "long.txt has 1048577 bytes; a text has at most 1048576",
        "half": "the caption is no valid Unicode (surrogates not allowed, at character 2)",
        "link": pictures,
        "hard": pictures,
        "device": pictures,
        "../../up": "",
        "/etc/abs": "",
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "s.tar"]
    assert [pair.id for pair in open_pairs(tmp_path / "s.tar", image_column="png") if isinstance(pair, Pair)] == ["s/two"]


def test_a_damaged_file_costs_its_own_entries_alone(world, tmp_path):
    folder = as_shards(world, tmp_path / "data")
    whole = (folder / "00000.tar").read_bytes()
    last = list(open_pairs(folder / "00000.tar"))[1].image
    (folder / "00000.tar").write_bytes(whole[: last.offset + 10])
    (folder / "00000a.tar").write_bytes(b"no tar at all" * 100)
    (folder / "00000b.tar").write_bytes(whole[: last.offset - 512] + b"\xff" * 600)
    found = list(open_pairs(folder))
    assert [os.path.basename(own.id) for own in found if isinstance(own, BadPair)] == [
        "00001", "00000.tar", "00000a.tar", "00000b.tar"
    ]  # fmt: skip
    reasons = [own.reason for own in found if isinstance(own, BadPair)]
    assert reasons[0] == "00001.png is truncated: the tar ends before it"
    assert all(reason.startswith("the rest of this tar cannot be read: ") for reason in reasons[1:])
    assert "no file begins at byte" in reasons[3]
    require_world([own for own in found if own.id.startswith("00001/")], world[2:])
    tables = as_parquet_of_datasets(world, tmp_path / "tables")
    damaged = bytearray((tables / "train-0.parquet").read_bytes())
    damaged[4:2000] = bytes(1996)
    (tables / "train-0.parquet").write_bytes(damaged)
    found = list(open_pairs(tables))
    assert "the rest of this file cannot be read" in found[0].reason
    require_world(found[1:], world[2:])
    (tables / "train-0.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(DataError, match=r"train-0\.parquet is no sound parquet file"):
        open_pairs(tables)


def test_a_picture_in_a_tar_that_is_cut_off_is_told(world, tmp_path):
    write_tar(tmp_path / "s.tar", {"a.txt": b"A cat.", "a.png": encoded(world[0].image)})
    image = next(iter(open_pairs(tmp_path / "s.tar"))).image
    assert isinstance(image, StoredImage)
    os.truncate(tmp_path / "s.tar", image.offset + 100)
    cut, rest = open_pairs(tmp_path / "s.tar")
    assert cut == BadPair("s/a", "a.png is truncated: the tar ends before it")
    assert "the rest of this tar cannot be read" in rest.reason


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_damaged_in_a_tar_ends_and_is_told(tmp_path, data):
    path = tmp_path / "s.tar"
    members = {
        f"{n}.{ending}": content for n in range(3) for ending, content in (("jpg", b"x" * 600), ("json", b'{"text": "A cat."}'))
    }
    write_tar(path, members)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        header = 512 * data.draw(st.integers(0, len(whole) // 512 - 1))
        whole[header + data.draw(st.integers(0, 511))] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):  # a header that is sound but for what it says
            whole[header + 148 : header + 156] = b" " * 8
            whole[header + 148 : header + 156] = b"%06o\0 " % sum(whole[header : header + 512])
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    for own in open_pairs(path):
        if isinstance(own, Pair):
            assert own.caption
            assert len(read_bytes(own.image)) == own.image.length
        else:
            assert own.reason


def test_a_tar_that_leads_back_ends(tmp_path):
    member = tarfile.TarInfo("a.jpg")
    header = bytearray(member.tobuf())
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"  # -1024 in base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "s.tar").write_bytes(bytes(header) * 3)
    assert list(open_pairs(tmp_path / "s.tar")) == [
        BadPair(str(tmp_path / "s.tar"), "the rest of this tar cannot be read: a.jpg has a negative size")
    ]


def test_compressed_tars_and_tars_of_one_name_are_refused(world, tmp_path):
    for name, mode in (("a.tar.gz", "w:gz"), ("b.tgz", "w:gz"), ("c.tar.xz", "w:xz")):
        write_tar(tmp_path / name, shard(world), mode)
        with pytest.raises(DataError, match=f"{name} is compressed, .*; unpack it to a plain .tar"):
            open_pairs(tmp_path / name)
    for folder in "ab":
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", shard(world))
    with pytest.raises(DataError, match=r"several tars are called 0.tar"):
        open_pairs(tmp_path / "*/0.tar")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_is_unpickled(world, tmp_path):
    bomb, mark = pickle.dumps(Bomb(tmp_path / "exploded")), tmp_path / "exploded"
    pickle.loads(bomb)
    assert mark.exists(), "the bomb is live"
    mark.unlink()
    endings = ("pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "cls")
    data = tmp_path / "data"
    data.mkdir()
    write_tar(
        data / "s.tar",
        {"a.jpg": bomb, "a.txt": b"A cat.", **{f"a.{ending}": bomb for ending in endings}, "b.json": bomb, "b.jpg": bomb},
    )
    table = pa.table({"image": [bomb], "text": ["A cat."], "more": [bomb]})
    extension = pa.field(
        "text", pa.string(), metadata={"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": bomb}
    )
    schema = pa.schema([table.schema.field("image"), extension, table.schema.field("more")], metadata={"pandas": bomb})
    pq.write_table(table.cast(schema), tmp_path / "p.parquet")
    for path in (data / "s.tar", data, tmp_path / "p.parquet"):
        for own in open_pairs(path):
            if isinstance(own, Pair):
                with pytest.raises(DataError, match="no picture in a format"):
                    load_image(own.image)
    assert not mark.exists()


OUTSIDE = [
    "../secret.png",
    "a/../../secret.png",
    "/etc/passwd",
    "file:///etc/passwd",
    "https://evil/a.png",
    "a.png\0",
    "a/\ud83d.png",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_form_reads_a_picture_outside_of_its_root(tmp_path, memory, name):
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    message = "valid Unicode" if "\ud83d" in name else "is not in .*--images"
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    files = {
        "a.jsonl": {"image": name, "caption": "A cat."},
        "b.jsonl": {"id": "x", "image": name, "conversations": talk},
        "c.jsonl": {"id": "x", "image": ["a.png", name], "conversations": talk},
        "d.json": {"images": [{"filename": name, "split": "train", "sentences": [{"raw": "A cat."}]}]},
        "e.json": {"images": [{"filepath": name, "filename": "a.png", "split": "train", "sentences": [{"raw": "A cat."}]}]},
    }
    for file, value in files.items():
        (data / file).write_text(json.dumps(value))
        memory.pipe(f"/data/{file}", json.dumps(value).encode())
        for place in (data / file, f"memory://data/{file}"):
            for read in (read_samples, *(() if file in ("b.jsonl", "c.jsonl") else (read_pairs, open_pairs))):
                with pytest.raises(DataError, match=message) as caught:
                    read(place)
                assert str(place) in str(caught.value)
    memory.pipe("/folder/metadata.jsonl", json.dumps({"file_name": name, "caption": "A cat."}).encode())
    with pytest.raises(DataError, match=message):
        open_pairs("memory://folder")
    if "\ud83d" in name:
        return
    (data / "metadata.jsonl").write_text(json.dumps({"file_name": name, "caption": "A cat."}))
    with pytest.raises(DataError):
        read_pairs(data)
    own = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for column in (pa.array([name]), pa.array([{"bytes": None, "path": name}], own)):
        pq.write_table(pa.table({"image": column, "text": ["A cat."]}), data / "a.parquet")
        (bad,) = open_pairs(data / "a.parquet")
        assert bad.id == name
        assert "is not in" in bad.reason
        assert "--images" in bad.reason


def test_absolute_paths_inside_the_root_are_taken(world, tmp_path):
    path = write_dataset(world, tmp_path / "data")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps({**line, "image": str(tmp_path / "data" / line["image"])}) for line in lines))
    require_world(open_pairs(path), world)
    other = tmp_path / "elsewhere.jsonl"
    other.write_text(path.read_text())
    require_world(open_pairs(other), world)
    (tmp_path / "deep").mkdir()
    other = other.rename(tmp_path / "deep/a.jsonl")
    with pytest.raises(DataError, match="--images"):
        open_pairs(other)
    require_world(open_pairs(other, images=tmp_path / "data"), world)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"image": "a.png", "caption": ' + "1" * 5000 + "}", '{"a": ' * 100_000])
def test_json_that_python_gives_up_on_is_told(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json, line 1 cannot be read as JSON"):
        open_pairs(tmp_path / "a.json")


@pytest.mark.parametrize(
    "url", ["nowhere://a/b.jsonl", "memory://nothing/a.jsonl", "memory://nothing/a.parquet", "memory://nothing"]
)
def test_urls_that_lead_nowhere_are_told(memory, url):
    with pytest.raises((DataError, ConfigError), match=r"cannot open nowhere://|there is no data at memory://nothing"):
        open_pairs(url)
