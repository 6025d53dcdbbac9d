"""Samples as rows of parquet, and back.

Columns of a shard: `id`, `image_sha256` (of the picture as it is seen), `file_sha256` (of its encoded bytes; empty if it had
none), `caption`, `words` (list of `{text, start, end}`), `maps` ([W][y][x]; NaN for words without a map), `grid` ([y, x]) and
`crop` ([top, left, bottom, right], fractions of the picture). `maps` are float16, or by `TeacherConfig.storage` uint8: then the
column `ranges` ([W][2], float32) has each word's lowest and highest value, and value = low + maps / 255 * (high - low).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..config import Storage
from ..errors import DataError, TargetError
from ..types import Word, WordMaps

GROUP_SIZE = 8
"""Rows of a shard that are read together: a training step reads single samples, in any order."""
CACHED_GROUPS = 256
"""Groups that a process keeps decoded: all of a small store, at most 64 MB of maps with 32 x 32 places and 15 words."""

_MAP_TYPES: dict[Storage, pa.DataType] = {"float16": pa.float16(), "uint8": pa.uint8()}


def schema(storage: Storage) -> pa.Schema:
    """The columns of a shard."""
    fields = [
        ("id", pa.string()),
        ("image_sha256", pa.string()),
        ("file_sha256", pa.string()),
        ("caption", pa.string()),
        ("words", pa.list_(pa.struct([("text", pa.string()), ("start", pa.int32()), ("end", pa.int32())]))),
        ("maps", pa.list_(pa.list_(pa.list_(_MAP_TYPES[storage])))),
        ("grid", pa.list_(pa.int32())),
        ("crop", pa.list_(pa.float32())),
    ]
    return pa.schema([*fields, ("ranges", pa.list_(pa.list_(pa.float32())))] if storage == "uint8" else fields)


@dataclass(frozen=True, eq=False)
class Target:
    """One sample of a store: its word maps, and the picture that they belong to.

    Attributes:
        id: the sample's.
        image_sha256: see `lavender.images.image_sha256`.
        word_maps: what the teacher says.
        file_sha256: see `lavender.images.file_sha256`.
    """

    id: str
    image_sha256: str
    word_maps: WordMaps
    file_sha256: str = ""


def to_table(targets: Sequence[Target], storage: Storage) -> pa.Table:
    """Samples as rows. Raises `DataError` if a word's values are neither finite nor all NaN."""
    stored: list[NDArray[Any]] = []
    ranges: list[NDArray[np.float32]] = []
    for target in targets:
        maps = target.word_maps.maps
        _require_finite(target, maps)
        if storage == "uint8":
            codes, own_ranges = _to_bytes(maps)
            stored.append(codes)
            ranges.append(own_ranges)
        else:
            with np.errstate(over="ignore"):
                stored.append(maps.astype(np.float16))
            _require_finite(target, stored[-1])
    shapes = [maps.shape for maps in stored]
    # Not by Python's lists of numbers: a big store has two thousand million of them.
    values = pa.array(np.concatenate([maps.ravel() for maps in stored]), _MAP_TYPES[storage])
    lines = _lists([x for w, y, x in shapes for _ in range(w * y)], values)
    words = _lists([y for w, y, _ in shapes for _ in range(w)], lines)
    columns = {
        "id": [t.id for t in targets],
        "image_sha256": [t.image_sha256 for t in targets],
        "file_sha256": [t.file_sha256 for t in targets],
        "caption": [t.word_maps.caption for t in targets],
        "words": [[{"text": w.text, "start": w.start, "end": w.end} for w in t.word_maps.words] for t in targets],
        "maps": _lists([w for w, _, _ in shapes], words),
        "grid": [[y, x] for _, y, x in shapes],
        "crop": [list(t.word_maps.crop) for t in targets],
    }
    if storage == "uint8":
        bounds = pa.array(np.concatenate(ranges).ravel(), pa.float32())
        columns["ranges"] = _lists([w for w, _, _ in shapes], _lists([2] * sum(w for w, _, _ in shapes), bounds))
    return pa.table(columns, schema=schema(storage))


def _lists(lengths: Sequence[int], values: pa.Array) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise TargetError(f"a shard would hold {offsets[-1]} values, above 2147483647; give the writer a smaller shard_size")
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _require_finite(target: Target, maps: NDArray[Any]) -> None:
    wrong = ~(np.isfinite(maps).all(axis=(1, 2)) | np.isnan(maps).all(axis=(1, 2)))
    if wrong.any():
        word = target.word_maps.words[int(wrong.argmax())].text
        raise DataError(
            f"sample {target.id!r}: the map of the word {word!r} has values that are not finite in {maps.dtype}; expected finite "
            "numbers, or NaN in all places for a word without a map"
        )


def _to_bytes(maps: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes [W, y, x], and the lowest and highest value [W, 2] that 0 and 255 stand for."""
    exact = maps.astype(np.float64)
    low, high = exact.min(axis=(1, 2)), exact.max(axis=(1, 2))
    span = np.where(high > low, high - low, 1.0)
    codes = np.rint((exact - low[:, None, None]) / span[:, None, None] * 255)
    return np.nan_to_num(codes).astype(np.uint8), np.stack([low, high], axis=1).astype(np.float32)


def _from_bytes(codes: NDArray[np.uint8], ranges: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = ranges.astype(np.float64)[:, :, None, None].swapaxes(0, 1)
    # In this form the ends come out exactly.
    share = codes / 255
    return (low * (1 - share) + high * share).astype(np.float32)


def targets_of(table: pa.Table) -> Iterator[Target]:
    """The samples of a table, maps in float32."""
    columns = table.drop_columns([name for name in ("maps", "ranges") if name in table.column_names])
    for n, row in enumerate(columns.to_pylist()):
        words = tuple(Word(w["text"], w["start"], w["end"]) for w in row["words"])
        cells = table.slice(n, 1)
        # Not by Python's floats: they would cost a training step's collator most of its time.
        maps = _flat(cells["maps"], 3).reshape(len(words), *row["grid"])
        maps = _from_bytes(maps, _flat(cells["ranges"], 2).reshape(-1, 2)) if maps.dtype == np.uint8 else maps.astype(np.float32)
        yield Target(row["id"], row["image_sha256"], WordMaps(row["caption"], words, maps, tuple(row["crop"])), row["file_sha256"])


def _flat(column: pa.ChunkedArray, depth: int) -> NDArray[Any]:
    values = column.combine_chunks()
    for _ in range(depth):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False)


def encoded(table: pa.Table, compression: str) -> memoryview:
    """A table as the bytes of a parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.combine_chunks(),  # so that the bytes follow from the rows alone
        sink,
        compression=compression,
        row_group_size=GROUP_SIZE,
        # Parquet has no integers of 8 bits: as numbers of a dictionary they take 8, else 32.
        use_dictionary=["maps.list.element.list.element.list.element"] if "ranges" in table.column_names else False,
        write_statistics=False,
    )
    return memoryview(sink.getvalue())


@contextmanager
def opened(path: Path) -> Iterator[pq.ParquetFile]:
    """A shard to read from. Raises `TargetError` if it is damaged."""
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise TargetError(f"{path} is damaged ({str(error).splitlines()[0]}); extract into a new folder") from None


def read(path: Path, columns: list[str]) -> pa.Table:
    with opened(path) as file:
        missing = set(columns) - set(file.schema_arrow.names)
        if missing:
            raise TargetError(f"{path} is damaged (it lacks the columns {', '.join(sorted(missing))}); extract into a new folder")
        return file.read(columns)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@lru_cache(maxsize=CACHED_GROUPS)
def group_of(path: Path, sha256: str, number: int) -> pa.Table:
    """A row group of a shard. `sha256` tells it from another store's that lay at the same place before."""
    with opened(path) as file:
        return file.read_row_group(number, use_threads=False)
