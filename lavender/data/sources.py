"""Every form of a data set that `lavender extract` reads, as a stream of pictures with captions.

Nothing here loads a picture: a stream says where each one lies, or holds its encoded bytes where a table has them. Nothing is
unpickled or written to disk, and no code of a data set is run.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast, get_args

from ..config import Captions
from ..errors import ConfigError, DataError
from ..files import filesystem_of, is_folder, is_url, open_regular, parse_json
from ..images import StoredImage
from .folders import LONGEST_TEXT, METADATA, ask_server, open_folder
from .pairs import BadPair, Listed, Pair, Pairs
from .samples import read_pairs
from .tables import (
    CAPTION_COLUMNS,
    TABLE_ENDINGS,
    Columns,
    captions_of,
    folder_of,
    kind_of,
    pairs_of,
    pairs_of_row,
    path_of,
    read_table,
)

ENDINGS = ("jpg", "jpeg", "png", "webp")
"""What the names of pictures in a tar end with."""
ROWS_AT_ONCE = 64
"""Rows of a table that are read together, encoded pictures and all."""

_Given = TypeVar("_Given")
_HUB_ID = re.compile(r"(?:hf://datasets/)?(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^/]+))?/?")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_FILE_ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".tar", *_COMPRESSED)
"""What shows that a missing `a/b` was meant as a file, not as a data set of the hub."""
_SAMPLE_FILE = re.compile(r"(?:\./)*(?P<key>(?:.*/)?[^./][^./]*)\.(?P<ending>[^/]+)", re.DOTALL)
"""`key.ending`, split at the first dot of the file's name, as WebDataset does."""


def open_pairs(
    data: str | Path,
    *,
    images: str | Path | None = None,
    split: str | None = "train",
    captions: Captions = "first",
    image_column: str | None = None,
    caption_column: str | None = None,
    id_column: str | None = None,
) -> Pairs:
    """Pictures with captions from a data set of any form; what it is shows in its name and content.

    Files are local or at a URL that fsspec knows (`s3://...`, `hf://...`), and may be given as a pattern (`shards/*.tar`).

    - A JSON file: see `lavender.data.read_pairs`. It is checked as a whole, and what is wrong with it is raised here.
    - Parquet files, or a folder with some in it. A picture is encoded bytes, the struct that `datasets` makes of it, or a path.
    - Tars in the WebDataset layout, or a folder with some in it: `key.jpg` (or jpeg, png, webp) beside `key.txt`, or beside
      `key.json` with the caption in it. The id is `<name of the tar>/<key>`, the column of the pictures is their ending.
    - CSV files (`.csv`, `.tsv`) whose first line names the columns; cells with commas in them are in quotes.
    - Any other folder: the `imagefolder` layout of `datasets`, with a `metadata.csv`, `metadata.jsonl` or `metadata.parquet` that
      has a `file_name` and a caption for each picture, and maybe with folders for splits; or `a.txt` (or `a.caption`) beside
      `a.jpg`. What has both is ambiguous. The id is the path of the picture in the folder.
    - A data set of the hub, `hf://datasets/owner/name` or `owner/name`, with `@revision` behind it if need be. It is streamed.

    Rows of tables are called by their `id`, else by the path of their picture, else `<file name>#<row>`. Columns are found by their
    usual names (pictures: image, img, jpg, picture, else file_name, image_file_name, filename, image_path; captions: caption, text,
    captions, sentence); where there are several of these, one is to be named.

    Args:
        data: path, URL, pattern or hub id.
        images: the folder that relative paths are relative to, and that no path leads out of; by default the one that the file
            with the paths is in. It may be a URL.
        split: of a hub data set, of Karpathy's JSON and of a folder with splits; None takes all of the latter two.
        captions: where a picture has several, the `"first"`, or `"all"`, with the ids `id#0`, `id#1`... In a CSV or metadata file
            they have a row each; the id of the first one is the path alone, and with `"first"` the others fail.
        image_column, caption_column, id_column: names of columns, where the usual ones are not there.

    Raises:
        ConfigError: an option is wrong, or columns are to be named.
        DataError: the data is missing, empty, or no data set of these forms; or none of a table's rows can be used.
    """
    if captions not in get_args(Captions):
        raise ConfigError(f"captions is {captions!r}; choose {' or '.join(get_args(Captions))}")
    if images is not None and not is_url(images) and not os.path.isdir(images):
        raise DataError(f"there is no folder {images}; give the one that the paths of pictures are relative to")
    location = str(data)
    columns = Columns(image_column, caption_column, id_column)
    hub = _HUB_ID.fullmatch(location)
    if hub and (is_url(location) or not (os.path.exists(location) or location.lower().endswith(_FILE_ENDINGS))):
        return _Hub.opened(hub["name"], hub["revision"], split, columns, images, captions)
    files = _files(location)
    if files and files[0].lower().endswith(".parquet"):
        return _Parquet.opened(files, columns, images, captions)
    if files and files[0].lower().endswith(TABLE_ENDINGS):
        tables = [read_table(file, images or folder_of(file), columns, captions) for file in files]
        return Listed(tuple(entry for entries in tables for entry in entries))
    if files:
        return _Shards.opened(files, columns, captions)
    if is_folder(location):
        return open_folder(location, split, columns, images, captions)
    if columns != Columns():
        raise ConfigError(f"{data} has no columns: --image-column, --caption-column and --id-column are for tables and tars")
    return Listed(tuple(read_pairs(data, split=split, images=images, captions=captions)))


def as_pairs(pairs: _Given | str | Path) -> _Given | Pairs:
    """What `open_pairs` makes of a path, a URL, a pattern or a hub id; other pairs as they are."""
    return open_pairs(pairs) if isinstance(pairs, str | Path) else pairs


def _files(data: str) -> tuple[str, ...]:
    """The parquet files, tars or CSV files that are meant, in the order of their names; none if `data` is something else."""
    paths = ask_server(data, lambda: _list_files_at(data)) if is_url(data) else _list_files(data)
    is_pattern = paths is None
    if paths is None:
        paths = ask_server(data, lambda: _list_matching(data)) if is_url(data) else glob.glob(data, recursive=True)
    if paths != [data]:  # a folder's metadata belongs to its pictures
        paths = [path for path in paths if os.path.basename(path).lower() not in METADATA]
    tables = TABLE_ENDINGS if is_pattern or paths == [data] else ()
    wanted = (".parquet", ".tar", *_COMPRESSED, *tables)
    kinds = {kind: tuple(sorted(file for file in paths if file.lower().endswith(kind))) for kind in wanted}
    files = next(filter(None, kinds.values()), ())
    if is_pattern and len(files) < max(1, len(paths)):
        other = next((file for file in sorted(paths) if file not in files), "nothing")
        raise DataError(
            f"{data} stands for {other}; expected a pattern of parquet files alone, or of tars alone, or of CSV files alone"
        )
    if files and files[0].lower().endswith(_COMPRESSED):
        raise DataError(f"{files[0]} is compressed, so that no picture in it can be read by itself; unpack it to a plain .tar")
    return files


def _list_files(path: str) -> list[str] | None:
    """The file, or those in the folder, at a path; None if it is a pattern."""
    if os.path.isdir(path):
        return [os.path.join(path, name) for name in os.listdir(path)]
    if os.path.exists(path):
        return [path]
    if glob.has_magic(path):
        return None
    raise DataError(f"there is no data at {path}; expected a file, a folder, or a pattern of files")


def _list_files_at(url: str) -> list[str] | None:
    """`_found` for a URL."""
    system, path = filesystem_of(url)
    if system.isdir(path):
        return [f"{url.rstrip('/')}/{os.path.basename(name.rstrip('/'))}" for name in system.ls(path, detail=False)]
    if system.exists(path):
        return [url]
    if glob.has_magic(url):
        return None
    raise DataError(f"there is no data at {url}; expected a file, a folder, or a pattern of files")


def _list_matching(pattern: str) -> list[str]:
    system, path = filesystem_of(pattern)
    return [system.unstrip_protocol(name) for name in system.glob(path)]


def _open(file: str) -> BinaryIO:
    if not is_url(file):
        return open_regular(file)
    from fsspec.implementations.local import LocalFileSystem

    system, path = filesystem_of(file)
    if isinstance(system, LocalFileSystem):
        return open_regular(path)
    return ask_server(file, lambda: cast(BinaryIO, system.open(path, "rb")))


@dataclass(frozen=True)
class _Parquet(Pairs):
    files: tuple[str, ...]
    columns: Columns
    images: str | Path | None
    captions: str
    count: int | None

    @classmethod
    def opened(cls, files: tuple[str, ...], columns: Columns, images: str | Path | None, captions: str) -> _Parquet:
        """Reads every file's footer: columns that are not there are reported before anything runs."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        count, one_each = 0, True
        for file in files:
            try:
                with _open(file) as raw:
                    table = pq.ParquetFile(raw)
                    schema, names, rows = table.schema_arrow, table.schema_arrow.names, table.metadata.num_rows
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise DataError(f"{file} is no sound parquet file: {error}") from None
            caption = columns.among(names, file).caption
            one_each &= captions == "first" or not isinstance(schema.field(caption).type, pa.ListType | pa.LargeListType)
            count += rows
        if not count:
            raise DataError(f"{', '.join(files[:3])} has no rows; expected one for each picture")
        return cls(files, columns, images, captions, count if one_each else None)

    def _entries(self) -> Iterator[Pair | BadPair]:
        import pyarrow as pa

        for file in self.files:
            try:
                yield from self._entries_of(file)
            except (pa.ArrowException, OSError, UnicodeDecodeError, DataError) as error:
                yield BadPair(file, f"the rest of this file cannot be read: {error}")

    def _entries_of(self, file: str) -> Iterator[Pair | BadPair]:
        import pyarrow.parquet as pq

        folder = folder_of(file)
        row = 0
        with _open(file) as raw:
            table = pq.ParquetFile(raw)
            columns = self.columns.among(table.schema_arrow.names, file)
            # Without threads of its own, a process that reads it may be forked.
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=list(columns), use_threads=False):
                for cells in zip(*(batch.column(name) for name in columns), strict=True):
                    name = f"{os.path.basename(file)}#{row}"
                    yield from pairs_of_row(
                        dict(zip(columns, cells, strict=True)), columns, name, self.images or folder, self.captions
                    )
                    row += 1


@dataclass(frozen=True)
class _Hub(Pairs):
    name: str
    revision: str | None
    split: str
    columns: Columns
    images: str | Path | None
    captions: str
    count: int | None = None

    @classmethod
    def opened(
        cls, name: str, revision: str | None, split: str | None, columns: Columns, images: str | Path | None, captions: str
    ) -> _Hub:
        if split is None:
            raise ConfigError(f"a data set of the hub is read by split; name one of those that {name} has (--split)")
        opened = cls(name, revision, split, columns, images, captions)
        dataset = opened._dataset()
        names = dataset.column_names
        if names is None:  # some files do not say before their first row
            names = next((list(row) for row in opened._rows(dataset)), [])
        columns.among(names, opened._place)
        return opened

    @property
    def _place(self) -> str:
        return f"hf://datasets/{self.name}" + (f"@{self.revision}" if self.revision else "")

    def _dataset(self) -> Any:
        from datasets import load_dataset

        try:
            return load_dataset(self.name, split=self.split, revision=self.revision, streaming=True)
        except Exception as error:  # of datasets, of the hub's client and of the network
            raise DataError(
                f"there is no file or folder {self.name} here, and the data set {self._place} with the split {self.split!r} cannot "
                f"be opened: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            ) from None

    def _rows(self, dataset: Any) -> Iterator[Mapping[str, Any]]:
        try:
            yield from dataset
        except Exception as error:  # of datasets, of the hub's client and of the network
            raise DataError(
                f"reading {self._place} broke off: {type(error).__name__}: {error}; run the same again to go on"
            ) from None

    def _entries(self) -> Iterator[Pair | BadPair]:
        from datasets import Image

        dataset = self._dataset()
        columns = None
        if dataset.column_names is not None:
            columns = self.columns.among(dataset.column_names, self._place)
            dataset = dataset.select_columns(list(columns))
            if isinstance((dataset.features or {}).get(columns.image), Image):
                dataset = dataset.cast_column(columns.image, Image(decode=False))
        for n, row in enumerate(self._rows(dataset)):
            columns = columns or self.columns.among(list(row), self._place)
            root = self.images or self._root(row.get(columns.image))
            yield from pairs_of_row(row, columns, f"{self.split}#{n}", root, self.captions)

    def _root(self, image: Any) -> str:
        """Where the pictures are. `datasets` puts the commit that it reads into the paths that it makes."""
        path = path_of(image) or ""
        return "/".join(path.split("/")[:5]) if path.startswith(f"hf://datasets/{self.name}@") else self._place


@dataclass
class _Sample:
    """What a tar has under one key."""

    pictures: list[StoredImage] = field(default_factory=list)
    txt: Any = None
    json: Any = None
    id: Any = None
    fault: str | None = None


@dataclass(frozen=True)
class _Shards(Pairs):
    files: tuple[str, ...]
    columns: Columns
    captions: str
    count: int | None = None

    @classmethod
    def opened(cls, files: tuple[str, ...], columns: Columns, captions: str) -> _Shards:
        stems = [_stem(file) for file in files]
        twice = next((stem for stem in stems if stems.count(stem) > 1), None)
        if twice is not None:
            raise DataError(f"several tars are called {twice}.tar, and ids begin with that name; give them different names")
        return cls(files, columns, captions)

    def _entries(self) -> Iterator[Pair | BadPair]:
        for file in self.files:
            samples: dict[str, _Sample] = {}
            fault = None
            try:
                with _open(file) as raw:
                    fault = self._index(file, raw, samples)
            except (tarfile.TarError, OSError, ValueError, OverflowError, DataError) as error:
                fault = str(error)
            for key, sample in samples.items():
                yield from self._pairs_of_sample(f"{_stem(file)}/{key}", sample)
            if fault is not None:
                yield BadPair(file, f"the rest of this tar cannot be read: {fault}")

    def _index(self, file: str, raw: BinaryIO, samples: dict[str, _Sample]) -> str | None:
        """Finds what a tar has under each key, in its order. Returns why it cannot be read to its end, if so."""
        endings = ENDINGS if self.columns.image is None else (self.columns.image,)
        end = raw.seek(0, os.SEEK_END)
        raw.seek(0)
        with tarfile.open(fileobj=raw, mode="r:") as tar:
            for member in tar:
                if member.size < 0:  # it would lead back, and round and round
                    return f"{member.name} has a negative size"
                match = _SAMPLE_FILE.fullmatch(member.name) if member.isreg() and not member.issparse() else None
                ending = match["ending"].lower() if match else ""
                if not match or ending not in (*endings, "txt", "json"):
                    continue
                sample = samples.setdefault(match["key"], _Sample())
                if member.offset_data + member.size > end:
                    sample.fault = f"{member.name} is truncated: the tar ends before it"
                elif ending in endings:
                    sample.pictures.append(StoredImage(file, member.offset_data, member.size))
                elif member.size > LONGEST_TEXT:
                    sample.fault = f"{member.name} has {member.size} bytes; a text has at most {LONGEST_TEXT}"
                else:
                    self._read_text(sample, ending, cast(BinaryIO, tar.extractfile(member)).read())
            raw.seek(tar.offset)  # tarfile takes a damaged header for the end
            return f"no file begins at byte {tar.offset}" if raw.read(tarfile.BLOCKSIZE).strip(b"\0") else None

    def _read_text(self, sample: _Sample, ending: str, encoded: bytes) -> None:
        try:
            text = encoded.decode("utf-8-sig")
            if ending == "txt":
                sample.txt = text.strip()
                return
            value = parse_json(text)
        except ValueError as error:
            sample.fault = f"its {ending} cannot be read: {error}"
            return
        if not isinstance(value, dict):
            sample.fault = f"its json is {kind_of(value)}; expected an object with a caption in it"
            return
        usual = CAPTION_COLUMNS if self.columns.caption is None else (self.columns.caption,)
        sample.json = next((value[name] for name in usual if value.get(name) is not None), None)
        sample.id = value.get(self.columns.id) if self.columns.id else None

    def _pairs_of_sample(self, name: str, sample: _Sample) -> Iterator[Pair | BadPair]:
        sample_id = name if sample.id is None else str(sample.id)
        caption = sample.txt if sample.txt is not None and self.columns.caption is None else sample.json
        try:
            if sample.fault is not None:
                raise DataError(sample.fault)
            if self.columns.id is not None and (isinstance(sample.id, bool) or not isinstance(sample.id, str | int)):
                raise DataError(f"no id under {self.columns.id!r} in its json; expected a text or a whole number")
            if len(sample.pictures) != 1:
                raise DataError(
                    f"{len(sample.pictures)} pictures; expected one whose name ends with {self.columns.image or ', '.join(ENDINGS)}"
                )
            texts = captions_of(caption, self.captions)
        except DataError as error:
            yield BadPair(sample_id, str(error))
            return
        yield from pairs_of(sample_id, sample.pictures[0], texts)


def _stem(file: str) -> str:
    name = os.path.basename(file)
    return name[: -len(".tar")] if name.lower().endswith(".tar") else name
