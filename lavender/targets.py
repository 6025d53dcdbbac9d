"""The target store: word maps as parquet shards with a manifest, written so that a kill loses at most the sample in hand.

    manifest.json            format, version, the teacher's config and its fingerprint, whether the store is complete
    data-00000.parquet ...   finished shards; `datasets.load_dataset("parquet", data_files="targets/*.parquet")` reads them
    pending/*.parquet        finished samples of the shard that is being filled
    failed.jsonl             what could not be used, with the reason

Columns of a shard: `id`, `image_sha256`, `caption`, `words` (list of `{text, start, end}`), `maps` (float16 [W][y][x], raw
attention; NaN rows for words without a map), `grid` ([y, x]) and `crop` ([top, left, bottom, right], fractions of the picture).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from .config import TeacherConfig, fingerprint, from_dict, to_dict
from .errors import TargetError
from .types import Word, WordMaps

FORMAT = "lavender-targets"
VERSION = 1
SHARD_SIZE = 256

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image_sha256", pa.string()),
        ("caption", pa.string()),
        ("words", pa.list_(pa.struct([("text", pa.string()), ("start", pa.int32()), ("end", pa.int32())]))),
        ("maps", pa.list_(pa.list_(pa.list_(pa.float16())))),
        ("grid", pa.list_(pa.int32())),
        ("crop", pa.list_(pa.float32())),
    ]
)


def image_sha256(image: Image.Image) -> str:
    """Fingerprint of a picture as it is seen (upright, RGB), whatever file or encoding it came from."""
    upright = ImageOps.exif_transpose(image).convert("RGB")
    digest = hashlib.sha256(f"{upright.width}x{upright.height}".encode())
    digest.update(upright.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Target:
    """One sample of a store: its word maps, and the picture that they belong to."""

    id: str
    image_sha256: str
    word_maps: WordMaps


def _write_atomically(path: Path, write: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def _to_table(targets: list[Target]) -> pa.Table:
    rows = [
        {
            "id": t.id,
            "image_sha256": t.image_sha256,
            "caption": t.word_maps.caption,
            "words": [{"text": w.text, "start": w.start, "end": w.end} for w in t.word_maps.words],
            "maps": [[list(line) for line in word] for word in t.word_maps.maps.astype(np.float16)],
            "grid": list(t.word_maps.maps.shape[1:]),
            "crop": list(t.word_maps.crop),
        }
        for t in targets
    ]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def _from_row(table: pa.Table) -> Target:
    """The target of a table's only row."""
    row = table.drop_columns("maps").to_pylist()[0]
    words = tuple(Word(w["text"], w["start"], w["end"]) for w in row["words"])
    # Not by Python's floats: they would cost a training step's collator most of its time.
    values = table["maps"].combine_chunks().flatten().flatten().flatten().to_numpy(zero_copy_only=False)
    maps = values.astype(np.float32).reshape(len(words), *row["grid"])
    return Target(row["id"], row["image_sha256"], WordMaps(row["caption"], words, maps, tuple(row["crop"])))


class TargetWriter:
    """Fills a store, sample by sample, in the order given; a store that was begun before is continued.

    Raises `TargetError` when the folder holds something else, or targets of another teacher or config.
    """

    def __init__(self, folder: Path, config: TeacherConfig, teacher: Mapping[str, str], shard_size: int = SHARD_SIZE) -> None:
        self.folder = folder
        self.shard_size = shard_size
        self._pending = folder / "pending"
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "teacher": dict(teacher),
            "config": to_dict(config),
            "fingerprint": fingerprint([dict(teacher)["weights"], to_dict(config)]),
        }
        path = folder / "manifest.json"
        if folder.exists() and not folder.is_dir():
            raise TargetError(f"{folder} is a file; give --out a folder")
        self._shards = _shard_paths(folder)
        if path.exists():
            found = _read_manifest(folder)
            # A store that nothing was written to yet may be begun anew with other settings.
            begun = self._shards or any(self._pending.glob("*.parquet"))
            if begun and found["fingerprint"] != manifest["fingerprint"]:
                raise TargetError(
                    f"{folder} holds targets of another teacher or config ({_difference(found, manifest)}); "
                    "give --out a new folder, or the settings that the store was begun with"
                )
        elif folder.exists() and any(folder.iterdir()):
            raise TargetError(f"{folder} exists and is no target store; give --out a new or empty folder")
        self._pending.mkdir(parents=True, exist_ok=True)
        self._manifest = manifest | {"complete": False}
        self._write_manifest()
        self.done: dict[str, tuple[str, str]] = {}
        for shard in self._shards:
            self.done |= _identities(shard)
        self._waiting: list[Path] = []
        for file in sorted(self._pending.glob("*.parquet")):
            own = _identities(file)
            if own.keys() <= self.done.keys():  # killed between writing the shard and emptying the folder
                file.unlink()
            else:
                self.done |= own
                self._waiting.append(file)
        self._next = 1 + max((int(file.stem) for file in self._waiting), default=-1)

    def add(self, target: Target) -> None:
        """Stores one sample; it survives a kill from here on. Raises `TargetError` if its id is there already."""
        if target.id in self.done:
            raise TargetError(f"the store has a sample {target.id!r} already")
        path = self._pending / f"{self._next:06d}.parquet"
        _write_atomically(path, lambda p: pq.write_table(_to_table([target]), p))
        self._next += 1
        self.done[target.id] = (target.image_sha256, target.word_maps.caption)
        self._waiting.append(path)
        if len(self._waiting) >= self.shard_size:
            self._flush()

    def has(self, sample_id: str, image: Image.Image, caption: str) -> bool:
        """Whether a sample is stored already. Raises `TargetError` if it is, but for another picture or caption."""
        stored = self.done.get(sample_id)
        if stored is not None and stored != (image_sha256(image), caption):
            what = "caption" if stored[0] == image_sha256(image) else "picture"
            raise TargetError(
                f"{self.folder} holds maps of another {what} for sample {sample_id!r}; "
                "give the sample another id, or --out a new folder"
            )
        return stored is not None

    def fail(self, sample_id: str, reason: str) -> None:
        """Notes that a sample could not be used, and why."""
        with open(self.folder / "failed.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"id": sample_id, "reason": reason}) + "\n")

    def begin_run(self) -> None:
        """Forgets earlier failures: this run tries those samples again."""
        (self.folder / "failed.jsonl").unlink(missing_ok=True)

    def close(self) -> None:
        """Writes the last shard and leaves nothing pending."""
        self._flush()
        self._manifest["complete"] = True
        self._write_manifest()
        shutil.rmtree(self._pending, ignore_errors=True)

    def _write_manifest(self) -> None:
        text = json.dumps(self._manifest, indent=2) + "\n"
        _write_atomically(self.folder / "manifest.json", lambda p: p.write_text(text))

    def _flush(self) -> None:
        if not self._waiting:
            return
        table = pa.concat_tables([_read_shard(file) for file in self._waiting])
        path = self.folder / f"data-{len(self._shards):05d}.parquet"
        _write_atomically(path, lambda p: pq.write_table(table, p, compression="zstd"))
        self._shards.append(path)
        for file in self._waiting:
            file.unlink()
        self._waiting, self._next = [], 0


class TargetStore:
    """Read access to a store by sample id.

    Attributes:
        folder: where it lies.
        config: the teacher's config.
        fingerprint: changes with the teacher's weights and with every setting.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises `TargetError` when the folder is no finished store."""
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder)
        self.config = from_dict(TeacherConfig, manifest["config"])
        self.teacher: dict[str, str] = manifest["teacher"]
        self.fingerprint: str = manifest["fingerprint"]
        if not manifest["complete"]:
            raise TargetError(f"the extraction into {self.folder} has not finished; run it again to continue it")
        shards = _shard_paths(self.folder)
        if not shards:
            raise TargetError(f"{self.folder} holds no targets; was every picture refused? See {self.folder}/failed.jsonl")
        self._table = pa.concat_tables([_read_shard(shard) for shard in shards])
        self._row_of = {i: row for row, i in enumerate(self._table["id"].to_pylist())}

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._row_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._row_of)

    def __getitem__(self, sample_id: str) -> Target:
        """Raises `TargetError` naming the sample that is missing."""
        if sample_id not in self._row_of:
            raise TargetError(f"{self.folder} has no targets for sample {sample_id!r}; extract them, or drop the sample")
        return _from_row(self._table.slice(self._row_of[sample_id], 1))

    def contents(self) -> str:
        """Sixteen hexadecimal digits that change with the samples: their ids, pictures and captions."""
        return fingerprint([self._table[name].to_pylist() for name in ("id", "image_sha256", "caption")])

    def checked(self, sample_id: str, image: Image.Image) -> Target:
        """The targets of a sample after a look at its picture. Raises `TargetError` if they were made from another one."""
        target = self[sample_id]
        if target.image_sha256 != image_sha256(image):
            raise TargetError(
                f"the targets of sample {sample_id!r} in {self.folder} were made from another picture; "
                "extract them into a new folder"
            )
        return target


def _read_shard(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns, schema=_SCHEMA)
    except (pa.ArrowInvalid, OSError) as error:
        raise TargetError(f"{path} is damaged ({str(error).splitlines()[0]}); extract into a new folder") from None


def _identities(path: Path) -> dict[str, tuple[str, str]]:
    """Picture fingerprint and caption of every sample in a file, by id."""
    table = _read_shard(path, ["id", "image_sha256", "caption"])
    ids, images, captions = (table[name].to_pylist() for name in ("id", "image_sha256", "caption"))
    return dict(zip(ids, zip(images, captions, strict=True), strict=True))


def _shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("data-*.parquet"))


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.exists():
        raise TargetError(f"{folder} is no target store: it has no manifest.json. `lavender extract --out {folder}` makes one")
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise TargetError(f"{path} is damaged ({error}); extract into a new folder") from None
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise TargetError(
            f"{path} says {manifest.get('format')!r} version {manifest.get('version')!r}; expected {FORMAT!r} version {VERSION}"
        )
    missing = [key for key in ("teacher", "config", "fingerprint", "complete") if key not in manifest]
    if missing:
        raise TargetError(f"{path} is damaged: it lacks {', '.join(missing)}; extract into a new folder")
    return manifest


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    changed = [
        f"{key}: {found['config'].get(key)} there, {value} now"
        for key, value in wanted["config"].items()
        if found["config"].get(key) != value
    ]
    return "; ".join(changed) or "other weights"
