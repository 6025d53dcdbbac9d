"""Tables of pictures with captions: which columns are meant, rows as pairs, and whole tables from CSV, JSON lines and parquet."""

from __future__ import annotations

import codecs
import csv
import io
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..files import is_url, parse_json, path_within, read_file
from ..images import ImageSource
from .conversations import require_unicode, source_of, written_path
from .pairs import BadPair, Pair

IMAGE_COLUMNS = ("image", "img", "jpg", "picture")
PATH_COLUMNS = ("file_name", "image_file_name", "filename", "image_path")
"""Where no column of `IMAGE_COLUMNS` is: a table that has its pictures in one often has their names beside them."""
CAPTION_COLUMNS = ("caption", "text", "captions", "sentence")
TABLE_ENDINGS = (".csv", ".tsv", "metadata.jsonl")
"""Of files that are read as a whole, row by row; other JSON lines are those of `lavender.data.read_pairs`."""
_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|"}
"""What stands between the columns; spreadsheets write semicolons where the comma is decimal."""


@dataclass(frozen=True)
class TableColumns:
    """The columns of a table that are read."""

    image: str
    caption: str
    id: str | None

    def __iter__(self) -> Iterator[str]:
        return iter([self.image, self.caption] + ([] if self.id is None else [self.id]))


@dataclass(frozen=True)
class Columns:
    """The columns that hold pictures, captions and ids, as the user names them; None stands for the usual ones."""

    image: str | None = None
    caption: str | None = None
    id: str | None = None

    def among(self, names: Sequence[str], place: str) -> TableColumns:
        """Those of a table, which may do without an `id`. Raises `ConfigError` if they cannot be told."""

        def chosen(own: str | None, usual: Sequence[str], what: str, option: str) -> str:
            wanted = usual if own is None else [own]
            found = [name for name in names if name in wanted]
            if not found:
                raise ConfigError(
                    f"{place} has no column of {what} ({' or '.join(wanted)}); it has {', '.join(names) or 'none'}. "
                    f"Name the column ({option})"
                )
            if len(found) > 1:
                remedy = f"name the one to take ({option})" if len(set(found)) > 1 else "give each column a name of its own"
                raise ConfigError(f"{place} has {len(found)} columns of {what} ({', '.join(found)}); {remedy}")
            return found[0]

        usual = IMAGE_COLUMNS if any(name in names for name in IMAGE_COLUMNS) else (*IMAGE_COLUMNS, *PATH_COLUMNS)
        return TableColumns(
            chosen(self.image, usual, "pictures", "--image-column"),
            chosen(self.caption, CAPTION_COLUMNS, "captions", "--caption-column"),
            None if self.id is None and "id" not in names else chosen(self.id, ("id",), "ids", "--id-column"),
        )


def pairs_of_row(
    row: Mapping[str, Any], columns: TableColumns, name: str, root: str | Path, captions: str
) -> Iterator[Pair | BadPair]:
    """The pairs of a row, whose cells are values of Python or of arrow; `name` is the id where the row has none."""
    sample_id = name
    try:
        picture = _value(row.get(columns.image))
        cell = None if columns.id is None else _value(row.get(columns.id))
        if isinstance(cell, bool) or not isinstance(cell, str | int | None):
            raise DataError(f"the id is a {type(cell).__name__}; expected a text or a whole number")
        sample_id = str(cell) if cell is not None else written_path(picture) or name
        image = _picture_of(picture, root, f"{name} ({sample_id})")
        texts = captions_of(_value(row.get(columns.caption)), captions)
    except (DataError, UnicodeDecodeError) as error:
        yield BadPair(sample_id, str(error))
        return
    yield from pairs_of(sample_id, image, texts)


def _value(cell: Any) -> Any:
    return cell.as_py() if hasattr(cell, "as_py") else cell


def path_of(picture: Any) -> str | None:
    path = picture.get("path") if isinstance(picture, Mapping) else picture
    return path if isinstance(path, str) and path else None


def _picture_of(picture: Any, root: str | Path, place: str) -> ImageSource:
    encoded = picture.get("bytes") if isinstance(picture, Mapping) else picture
    if isinstance(encoded, bytes):
        return encoded
    path = path_of(picture)
    if path is None:
        raise DataError(f"no picture; expected encoded bytes or a path, found {kind_of(encoded)}")
    require_unicode(path, "the path of the picture")
    source: ImageSource = source_of(path, lambda written: path_within(root, written, place))
    return source


def captions_of(value: Any, captions: str) -> list[tuple[str, Any]]:
    """What is put behind the id, and the text, of each caption that is wanted."""
    if isinstance(value, str):
        return [("", value)]
    if not isinstance(value, list) or not value:
        raise DataError(f"no caption; expected a text or a list of texts, found {kind_of(value)}")
    return [("", value[0])] if captions == "first" else [(f"#{k}", text) for k, text in enumerate(value)]


def kind_of(value: Any) -> str:
    return "none" if value is None else "an empty list" if value == [] else f"a {type(value).__name__}"


def pairs_of(sample_id: str, image: ImageSource, texts: Sequence[tuple[str, Any]]) -> Iterator[Pair | BadPair]:
    for number, text in texts:
        if isinstance(text, str):
            yield Pair(sample_id + number, image, text)
        else:
            yield BadPair(sample_id + number, f"no caption; expected a text, found {kind_of(text)}")


def folder_of(file: str) -> str:
    """The folder that a file is in, or its URL."""
    return file.rpartition("/")[0] if is_url(file) else os.path.dirname(file) or "."


def read_table(file: str, root: str | Path, columns: Columns, captions: str, below: str | None = None) -> list[Pair | BadPair]:
    """The rows of a CSV, TSV, or file of JSON lines or parquet without pictures in it; those that cannot be used, too.

    Args:
        file: path or URL.
        root: the folder that the paths of pictures are relative to, and that none leads out of.
        columns: those that the user named.
        captions: what becomes of a picture that has an earlier row, where rows have no ids: it fails (`"first"`), or its id is
            the path with `#1`, `#2`... (`"all"`).
        below: of a metadata file of the `imagefolder` layout, its folder below the root: paths begin there, and are the ids.

    Raises:
        ConfigError: the columns cannot be told.
        DataError: the file cannot be read, or none of its rows can be used.
    """
    try:
        content = read_file(file)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error}") from None
    read: Callable[[str, bytes], _Rows]
    read = {".jsonl": _json_rows, ".parquet": _parquet_rows}.get(os.path.splitext(file)[1].lower(), _csv_rows)
    names, rows = read(file, content)
    if not rows:
        raise DataError(f"{file} has no rows; expected one for each picture")
    if below is not None and columns.id is None:
        names = [name for name in names if name != "id"]
    chosen = columns.among(names, file)
    entries: list[Pair | BadPair] = []
    times: Counter[str] = Counter()
    for number, row in enumerate(rows):
        name = posixpath.join(below or "", f"{posixpath.basename(file)}#{number}")
        if isinstance(row, str):
            entries.append(BadPair(name, row))
            continue
        if read is _csv_rows:  # blanks around a caption are its own, as those in quotes
            row = {name: cell.strip() if name in (chosen.image, chosen.id) else cell for name, cell in row.items()}
        path = row.get(chosen.image)
        if below is not None and isinstance(path, str) and path and not is_url(path):
            row = {**row, chosen.image: posixpath.normpath(posixpath.join(below, path))}
        for entry in pairs_of_row(row, chosen, name, root, captions):
            earlier = times[entry.id]
            if isinstance(entry, Pair) and chosen.id is None:
                times[entry.id] += 1
                if earlier and captions == "all":
                    entry = replace(entry, id=f"{entry.id}#{earlier}")
                elif earlier:
                    entry = BadPair(entry.id, _AGAIN)
            entries.append(entry)
    if not any(isinstance(entry, Pair) for entry in entries):
        first = next(entry for entry in entries if isinstance(entry, BadPair))
        raise DataError(f"none of the {len(entries)} rows of {file} can be used; the first, {first.id}: {first.reason}")
    return entries


_AGAIN = "the picture occurs twice; take all of its captions (--captions all), or name a column of ids that differ (--id-column)"
_Rows = tuple[list[str], list[dict[str, Any] | str]]
"""The names of a table's columns, and its rows: cells by name, or what is wrong with the row."""


def decoded(content: bytes) -> str:
    """A text in UTF-8, or in UTF-16 with the mark that spreadsheets begin it with. Raises `UnicodeDecodeError`."""
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_wide else "utf-8-sig")


def _csv_rows(file: str, content: bytes) -> _Rows:
    is_damaged = False
    try:
        text = decoded(content)
    except UnicodeDecodeError:  # only the rows with these bytes are lost
        is_damaged = True
        text = content.decode("utf-8-sig", "surrogateescape")
    delimiters = _DELIMITERS[os.path.splitext(file)[1].lower()]
    headers, errors = [], []
    for delimiter in delimiters:
        # Strictly: a quote that never closes would make the rest of the file a part of one caption.
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            headers.append((reader, [name.strip() for name in next(reader, [])]))
        except csv.Error as error:
            errors.append(error)
    if not headers:
        raise DataError(f"{file}, line 1 is no row of a table: {errors[0]}")
    reader, names = next((header for header in headers if len(header[1]) > 1), headers[0])
    if "\0" in "".join(names):
        raise DataError(f"{file} is no text in UTF-8 (its first line has the character NUL)")
    rows: list[dict[str, Any] | str] = []
    try:
        for cells in reader:
            if len(cells) > len(names):
                rows.append(
                    f"line {reader.line_num} has {len(cells)} cells, expected {len(names)}; put a caption with {delimiters[0]!r} "
                    "in it in quotes"
                )
            elif is_damaged and any("\ud800" <= character <= "\udfff" for character in "".join(cells)):
                rows.append(f"line {reader.line_num} is no text in UTF-8; save the file as UTF-8")
            elif cells:
                rows.append(dict(zip(names, cells, strict=False)))
    except csv.Error as error:
        rows.append(f"the rest of the file cannot be read, from line {reader.line_num} on: {error}")
    return names, rows


def _json_rows(file: str, content: bytes) -> _Rows:
    try:
        lines = decoded(content).split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no text in UTF-8 ({error.reason} at byte {error.start})") from None
    rows: list[dict[str, Any] | str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            row = f"line {number} cannot be read as JSON: {error}"
        rows.append(row if isinstance(row, dict | str) else f"line {number} is {kind_of(row)}; expected a JSON object")
    return list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)), rows


def _parquet_rows(file: str, content: bytes) -> _Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(io.BytesIO(content)).read(use_threads=False)
        return table.schema.names, table.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is no sound parquet file: {error}") from None
