"""Samples as rows of parquet, and back.

Columns of a shard: `id`, `image_sha256` (of the picture as it is seen), `file_sha256` (of its encoded bytes; empty if it had
none), `caption`, `words` (list of `{text, start, end}`), `maps` ([W][y][x]; NaN for words without a map), `grid` ([y, x]) and
`crop` ([top, left, bottom, right], fractions of the picture). `maps` are float16, or by `TeacherConfig.storage` uint8: then the
column `ranges` ([W][2], float32) has each word's lowest and highest value, and value = low + maps / 255 * (high - low).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..config import Storage
from ..errors import DataError, LavenderError, TargetError
from ..files import open_regular
from ..types import Word, WordMaps
from .soundness import crop_problems, value_problems, word_problems

GROUP_SIZE = 8
"""Rows of a shard that are read together: a training step reads single samples, in any order."""
CACHED_GROUPS = 256
"""Groups that a process keeps decoded: all of a small store, at most 64 MB of maps with 32 x 32 places and 15 words."""
CLOCK_STEP_NS = 100_000_000
"""A file that was changed a shorter while ago may change again without another time: file systems count in steps."""

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
    """Samples as rows. Raises `DataError` if one is not what it has to be; see `lavender.targets.soundness`."""
    stored: list[NDArray[Any]] = []
    ranges: list[NDArray[np.float32]] = []
    for target in targets:
        maps = target.word_maps.maps
        _require_places(target)
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


def _require_places(target: Target) -> None:
    known = target.word_maps
    shape = known.maps.shape
    problem = next(chain(word_problems(known.caption, known.words), crop_problems(known.crop)), "")
    if len(shape) != 3 or shape[0] != len(known.words) or not all(shape[1:]):
        problem = f"its maps have the shape {list(shape)}; expected [{len(known.words)}, y, x] for its {len(known.words)} words"
    if problem:
        raise DataError(f"sample {target.id!r}: {problem}")


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


def _from_bytes(codes: NDArray[Any], ranges: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = ranges.astype(np.float64)[:, :, None, None].swapaxes(0, 1)
    # In this form the ends come out exactly.
    share = codes / 255
    return (low * (1 - share) + high * share).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Row:
    """A sample as a file has it.

    Attributes:
        id, caption: the sample's.
        problems: what is wrong with it, a line each.
        target: the sample, its maps as they are stored, float16 or uint8 [W, y, x]; None where they have no such form.
        ranges: of uint8 the values [W, 2] that 0 and 255 stand for.
    """

    id: str
    caption: str
    problems: tuple[str, ...]
    target: Target | None = None
    ranges: NDArray[np.float32] | None = None

    def decoded(self, path: Path) -> Target:
        """The sample, maps in float32. Raises `TargetError`, which names the file, if anything is wrong with it."""
        if self.target is None or self.problems:
            raise damaged(path, f"sample {self.id!r}: {self.problems[0]}")
        known = self.target.word_maps
        maps = known.maps.astype(np.float32) if self.ranges is None else _from_bytes(known.maps, self.ranges)
        return replace(self.target, word_maps=replace(known, maps=maps))


def rows_of(file: pq.ParquetFile, number: int) -> Iterator[Row]:
    """The rows of a group, whatever is wrong with them. Raises `ValueError` if it has empty cells."""
    table = file.read_row_group(number, use_threads=False)
    columns = {name: _whole(table[name]) for name in table.column_names}
    if any(map(_has_nulls, columns.values())):
        raise ValueError(f"its row group {number} has empty cells")
    texts = [columns[name].to_pylist() for name in ("id", "image_sha256", "file_sha256", "caption")]
    grids, crops = columns["grid"].to_pylist(), columns["crop"].to_pylist()
    all_words = list(map(Word, *(field.to_pylist() for field in columns["words"].values.flatten())))
    word_at = columns["words"].offsets.to_pylist()
    maps = columns["maps"]
    map_at, line_at, value_at = (np.from_dlpack(level.offsets) for level in (maps, maps.values, maps.values.values))
    heights, widths = np.diff(line_at), np.diff(value_at)
    values: NDArray[Any] = np.from_dlpack(maps.values.values.values)  # what pandas would have to be imported for otherwise
    all_ranges = columns["ranges"].to_pylist() if "ranges" in columns else None
    for n, (sample_id, image, image_file, caption) in enumerate(zip(*texts, strict=True)):
        words = tuple(all_words[word_at[n] : word_at[n + 1]])
        first, last = map_at[n], map_at[n + 1]
        lines = slice(line_at[first], line_at[last])
        grid, crop = grids[n], tuple(crops[n])
        ranges = None
        problem = ""
        if last - first != len(words):
            problem = f"it has {last - first} maps for {len(words)} words"
        elif not (len(grid) == 2 and min(grid) > 0 and (heights[first:last] == grid[0]).all() and (widths[lines] == grid[1]).all()):
            problem = f"its maps are not of its grid {grid}"
        elif all_ranges is not None:
            if [len(ends) for ends in all_ranges[n]] == [2] * len(words):
                ranges = np.array(all_ranges[n], np.float32).reshape(-1, 2)
            else:
                problem = f"its ranges are no [low, high] for each of {len(words)} words"
        if problem:
            yield Row(sample_id, caption, (*word_problems(caption, words), *crop_problems(crop), problem))
            continue
        stored = values[value_at[lines.start] : value_at[lines.stop]].reshape(len(words), *grid)
        problems = (*word_problems(caption, words), *crop_problems(crop), *value_problems(words, stored, ranges))
        yield Row(
            sample_id,
            caption,
            problems,
            Target(sample_id, image, WordMaps(caption, words, stored, crop), image_file),
            ranges,
        )


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _has_nulls(values: pa.Array) -> bool:
    if values.null_count:
        return True
    if pa.types.is_list(values.type):
        return _has_nulls(values.values)
    return pa.types.is_struct(values.type) and any(map(_has_nulls, values.flatten()))


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


@dataclass(frozen=True)
class Shard:
    """A finished shard as the manifest lists it.

    Attributes:
        path: where it lies.
        sha256: of its bytes.
        samples: how many it holds.
    """

    path: Path
    sha256: str
    samples: int


def damaged(path: Path, what: str) -> TargetError:
    return TargetError(f"{path} is damaged ({what}); restore it, or extract into a new folder")


@contextmanager
def opened(path: Path) -> Iterator[pq.ParquetFile]:
    """A parquet file to read from, whether its bytes are those of the manifest or not. Raises `TargetError` if it is damaged."""
    try:
        # Arrow opens it again by its name: its threads must not hold an object of Python's when the interpreter ends.
        open_regular(path).close()
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file
    except LavenderError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError of texts that are no UTF-8, and of empty cells
        raise damaged(path, str(error).splitlines()[0]) from None


def group_problem(file: pq.ParquetFile) -> str:
    """What is wrong with the sizes of a file's groups, by which a row is found; empty if nothing is."""
    last = file.num_row_groups - 1
    for number in range(file.num_row_groups):
        count = file.metadata.row_group(number).num_rows
        if count > GROUP_SIZE or (count < GROUP_SIZE and number < last):
            return f"its row group {number} has {count} rows, expected {GROUP_SIZE}"
    return ""


def require_columns(path: Path, file: pq.ParquetFile, columns: pa.Schema) -> None:
    """Raises `TargetError` if a file has other columns, or other groups."""
    if not file.schema_arrow.equals(columns):
        raise damaged(path, f"it has other columns or types than the manifest's storage: {', '.join(columns.names)}")
    if problem := group_problem(file):
        raise damaged(path, problem)


def ids_of(shard: Shard, storage: Storage) -> list[str]:
    """The ids of a shard's samples, before anybody has compared its bytes. Raises `TargetError` if it is none of such a store."""
    with opened(shard.path) as file:
        require_columns(shard.path, file, schema(storage))
        if file.metadata.num_rows != shard.samples:
            raise damaged(shard.path, f"it has {file.metadata.num_rows} samples, the manifest says {shard.samples}")
    return read(shard.path, ["id"])["id"]


def require_rows(path: Path, columns: pa.Schema) -> None:
    """Raises `TargetError` for what is wrong with a file that no manifest vouches for."""
    with opened(path) as file:
        require_columns(path, file, columns)
        for number in range(file.num_row_groups):
            for row in rows_of(file, number):
                row.decoded(path)


def read(path: Path, columns: list[str]) -> dict[str, list[Any]]:
    """Columns of a parquet file as Python's values. Raises `TargetError` if it is damaged, lacks one, or has empty cells."""
    with opened(path) as file:
        missing = set(columns) - set(file.schema_arrow.names)
        if missing:
            raise damaged(path, f"it lacks the columns {', '.join(sorted(missing))}")
        table = file.read(columns)
        if any(column.null_count for column in table.columns):
            raise damaged(path, "it has empty cells")
        return {name: table[name].to_pylist() for name in columns}


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


_hashed: dict[Path, tuple[tuple[int, ...], str]] = {}
"""Of files that this process has read, their sha256, and the state that they were in."""


def require_sha256(shard: Shard) -> None:
    """Raises `TargetError` if a shard's bytes are not those of the manifest; reads them once for each state of the file."""
    now = time.time_ns()
    try:
        stat = os.stat(shard.path)
        state = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        known_state, sha256 = _hashed.get(shard.path, ((), ""))
        if state != known_state:
            sha256 = sha256_of(shard.path)
            if abs(now - max(state[-2:])) > CLOCK_STEP_NS:
                _hashed[shard.path] = (state, sha256)
    except OSError as error:
        raise TargetError(f"cannot read {shard.path} ({error.strerror}); put it back, or extract into a new folder") from None
    if sha256 != shard.sha256:
        raise TargetError(
            f"{shard.path} is damaged, its sha256 is not that of the manifest; restore it, or extract into a new folder"
        )


@lru_cache(maxsize=CACHED_GROUPS)
def group_of(path: Path, sha256: str, number: int) -> tuple[Row, ...]:
    """The rows of a group. Who asks has compared the shard's bytes with `sha256`: by that, a group is the same for good."""
    with opened(path) as file:
        return tuple(rows_of(file, number))
