"""Every form of a data set gives the same pictures and captions, in order, again and again, and harms nobody."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile

import fsspec
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

COUNT = 5


@pytest.fixture
def world(scenes):
    return scenes[:COUNT]


@pytest.fixture
def memory():
    """An empty file system in memory."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    return system


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, members: dict[str, bytes | tarfile.TarInfo], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def shard(scenes, first: int = 0) -> dict[str, bytes]:
    """Pictures, captions in turns as text and as JSON, and what is to be left alone."""
    members: dict[str, bytes] = {}
    for n, scene in enumerate(scenes, start=first):
        members[f"{n:05d}.png"] = encoded(scene.image)
        if n % 2:
            members[f"{n:05d}.txt"] = scene.caption.encode() + b"\n"
        else:
            members[f"{n:05d}.json"] = json.dumps({"caption": scene.caption, "more": [1]}).encode()
        members[f"{n:05d}.seg.png"] = b"a mask"
    return members


def struct_of(images: list[bytes], paths: list[str | None]) -> pa.Array:
    own = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": image, "path": path} for image, path in zip(images, paths, strict=True)], own)


def as_jsonl(scenes, folder):
    return write_dataset(scenes, folder)


def as_karpathy(scenes, folder):
    write_dataset(scenes, folder)
    images = [
        {"filepath": "images", "filename": f"{n:05d}.png", "split": "train", "sentences": [{"raw": scene.caption}, {"raw": "No."}]}
        for n, scene in enumerate(scenes)
    ]
    (folder / "dataset.json").write_text(json.dumps({"images": images}))
    return folder / "dataset.json"


def as_imagefolder(scenes, folder):
    write_dataset(scenes, folder).unlink()
    lines = [json.dumps({"file_name": f"images/{n:05d}.png", "text": scene.caption}) for n, scene in enumerate(scenes)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def as_parquet_of_datasets(scenes, folder):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    folder.mkdir()
    rows = {"image": [scene.image for scene in scenes], "caption": [scene.caption for scene in scenes]}
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    for k, part in enumerate((slice(0, 2), slice(2, None))):
        own = {name: values[part] for name, values in rows.items()}
        Dataset.from_dict(own, features).to_parquet(folder / f"train-{k}.parquet")
    return folder


def as_parquet_of_bytes(scenes, folder):
    folder.mkdir()
    table = {"jpg": [encoded(s.image) for s in scenes], "text": [s.caption for s in scenes], "id": list(range(len(scenes)))}
    pq.write_table(pa.table(table), folder / "a.parquet", row_group_size=2)
    return folder / "a.parquet"


def as_parquet_of_paths(scenes, folder):
    write_dataset(scenes, folder)
    table = {"img": [f"images/{n:05d}.png" for n in range(len(scenes))], "captions": [[s.caption, "No."] for s in scenes]}
    pq.write_table(pa.table(table), folder / "a.parquet")
    return folder / "a.parquet"


def as_shards(scenes, folder):
    folder.mkdir()
    write_tar(folder / "00000.tar", shard(scenes[:2]))
    write_tar(folder / "00001.tar", shard(scenes[2:], 2))
    return folder


FORMS = {own.__name__.removeprefix("as_"): own for own in (
    as_jsonl, as_karpathy, as_imagefolder, as_parquet_of_datasets, as_parquet_of_bytes, as_parquet_of_paths, as_shards,
)}  # fmt: skip
IDS = {
    "jsonl": "images/{:05d}.png",
    "karpathy": "{:05d}.png",
    "imagefolder": "images/{:05d}.png",
    "parquet_of_bytes": "{}",
    "parquet_of_paths": "images/{:05d}.png",
}


def seen(pair: Pair | BadPair):
    assert isinstance(pair, Pair), pair
    image = pair.image
    return pair.id, pair.caption, image if not isinstance(image, Image.Image) else encoded(image)


def require_world(pairs, world) -> list[str]:
    found = list(pairs)
    assert [pair.caption for pair in found] == [scene.caption for scene in world]
    for pair, scene in zip(found, world, strict=True):
        np.testing.assert_array_equal(np.asarray(load_image(pair.image)), scene.pixels)
    return [pair.id for pair in found]


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


def test_samples_of_a_tar_may_name_their_ids_and_captions(tmp_path):
    first, second, third = ({"key": 7, "alt": "A cat."}, {"key": "b", "alt": "A dog."}, {"alt": "No key."})
    members = {
        f"{n}.{e}": c for n, j in enumerate((first, second, third)) for e, c in (("jpg", b"x"), ("json", json.dumps(j).encode()))
    }
    write_tar(tmp_path / "s.tar", {"0.txt": b"Not this.", **members})
    found = list(open_pairs(tmp_path / "s.tar", id_column="key", caption_column="alt"))
    assert [(own.id, own.caption) for own in found[:2]] == [("7", "A cat."), ("b", "A dog.")]
    assert found[2] == BadPair("s/2", "no id under 'key' in its json; expected a text or a whole number")


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


def test_iterating_loads_no_picture(world, tmp_path):
    """The pictures of paths and tars may all be gone."""
    data = as_parquet_of_paths(world, tmp_path / "data")
    for file in (tmp_path / "data/images").iterdir():
        file.unlink()
    assert len(list(open_pairs(data))) == len(list(open_pairs(tmp_path / "data/captions.jsonl"))) == COUNT
    for pair in open_pairs(as_shards(world, tmp_path / "s")):
        assert isinstance(pair.image, StoredImage)


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
