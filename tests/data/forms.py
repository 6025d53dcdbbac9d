"""The same few pictures as a data set of every form that lavender reads."""

from __future__ import annotations

import csv
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lavender.data.samples import Pair
from lavender.data.sources import BadPair
from lavender.images import load_image
from lavender.miniworld import write_dataset

COUNT = 5


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


def as_csv(scenes, folder, delimiter=",", name="captions.csv", encoding="utf-8"):
    write_dataset(scenes, folder).unlink()
    with open(folder / name, "w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["split", "file_name", "text"])
        writer.writerows(["a", f"images/{n:05d}.png", scene.caption] for n, scene in enumerate(scenes))
    return folder / name


def as_tsv_of_a_spreadsheet(scenes, folder):
    return as_csv(scenes, folder, "\t", "captions.tsv", "utf-16")


def as_texts_beside(scenes, folder):
    write_dataset(scenes, folder).unlink()
    for n, scene in enumerate(scenes):
        (folder / f"images/{n:05d}.{'caption' if n % 2 else 'txt'}").write_text(f"{scene.caption}\n", "utf-8-sig")
    (folder / "images/.hidden.png").write_bytes(b"")
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
    as_jsonl, as_karpathy, as_imagefolder, as_csv, as_tsv_of_a_spreadsheet, as_texts_beside, as_parquet_of_datasets, 
    as_parquet_of_bytes, as_parquet_of_paths, as_shards,
)}  # fmt: skip


IDS = {
    "jsonl": "images/{:05d}.png",
    "karpathy": "{:05d}.png",
    "imagefolder": "images/{:05d}.png",
    "csv": "images/{:05d}.png",
    "tsv_of_a_spreadsheet": "images/{:05d}.png",
    "texts_beside": "images/{:05d}.png",
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
