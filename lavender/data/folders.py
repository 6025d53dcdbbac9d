"""Folders of pictures: the `imagefolder` layout of `datasets`, with captions in metadata files, and captions beside pictures."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..errors import ConfigError, DataError
from ..files import filesystem_of, is_url, read_file
from .pairs import BadPair, Listed, Pair, Pairs
from .tables import Columns, decoded, read_table

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
TEXTS = (".txt", ".caption")
"""What the name of a caption beside its picture ends with."""
LONGEST_TEXT = 2**20
"""Bytes of a text in a file of its own; a caption is shorter."""

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""What `datasets` takes for the name of a split in the name of a folder."""
_SPLIT_IN_NAME = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(_SPLITS)})(?:[-._ 0-9]|$)")

_Answer = TypeVar("_Answer")


def open_folder(
    folder: str | Path, split: str | None, columns: Columns, images: str | Path | None = None, captions: str = "first"
) -> Pairs:
    """The pictures with captions of a folder, which are called by their paths in it; what it is shows in its files.

    - With a `metadata.csv`, `metadata.jsonl` or `metadata.parquet` in it, or in folders below: one row for each picture, with its
      path from there on under `file_name`. Folders that are named after splits are told apart as `datasets` does.
    - With texts beside its pictures, `a.txt` or `a.caption` beside `a.jpg`, in folders below too. Folders are splits if those
      directly below have their very names.

    Args:
        folder: path or URL.
        split: the one to take, if there are several; None takes all.
        columns: of metadata files.
        images: what the paths in metadata files are relative to, in place of the folder.
        captions: see `lavender.open_pairs`.

    Raises:
        ConfigError: an option does nothing here, or columns are to be named.
        DataError: there are no captions, or of several kinds; or the split is missing.
    """
    files = sorted(
        ask_server(folder, lambda: list(_list_url(folder)))
        if isinstance(folder, str) and is_url(folder)
        else _list_folder(str(folder))
    )
    groups = _group(files)
    beside = next((texts[0] for pictures, texts in groups if pictures and texts), None)
    metadata = [file for file in files if posixpath.basename(file).lower() in METADATA]
    if metadata and beside:
        raise DataError(
            f"{folder} has captions in {metadata[0]} and in texts beside pictures ({beside}); give the metadata file itself, or "
            "take one of the two away"
        )
    if metadata:
        return _of_metadata(str(folder), metadata, split, columns, images, captions)
    if beside is None:
        tables = [file for file in files if file.lower().endswith((".csv", ".tsv", ".jsonl", ".json"))]
        raise DataError(
            f"{folder} has no captions: expected a metadata.csv or metadata.jsonl with 'file_name' and 'caption', or a.txt beside "
            f"a.jpg" + (f". If they are in {tables[0]}, give this file itself" if tables else "")
        )
    if columns != Columns() or images is not None:
        raise ConfigError(
            f"{folder} has texts beside its pictures, for which --images and names of columns do nothing; leave them out"
        )
    return _Beside(str(folder), _of_split(str(folder), groups, split))


def _list_folder(folder: str) -> Iterator[str]:
    """The files in a folder and those below, by their paths from there on. Links are the user's own; hidden files are left out."""
    seen = set()
    for path, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(path) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(os.path.realpath(path))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        below = Path(os.path.relpath(path, folder)).as_posix()
        for name in names:
            if not name.startswith(".") and os.path.isfile(os.path.join(path, name)):
                yield posixpath.normpath(posixpath.join(below, name))


def _list_url(folder: str) -> Iterator[str]:
    system, path = filesystem_of(folder)
    for file in system.find(path):
        name = posixpath.relpath(file, path)
        if not any(part.startswith((".", "__")) for part in name.split("/")):
            yield name


def ask_server(url: str, question: Callable[[], _Answer]) -> _Answer:
    """What a file system at a URL answers. Raises `DataError` with the reason if it fails."""
    try:
        return question()
    except (ConfigError, DataError):
        raise
    except Exception as error:  # each file system has errors of its own
        raise DataError(f"cannot read {url}: {error or type(error).__name__}") from None


def _of_metadata(
    folder: str, files: list[str], split: str | None, columns: Columns, images: str | Path | None, captions: str
) -> Pairs:
    kinds = sorted({posixpath.basename(file).lower() for file in files})
    if len(kinds) > 1:
        raise DataError(f"{folder} has captions in {' and in '.join(kinds)}; give one of these files itself, or take one away")
    splits = [_split_of(file) for file in files]
    if any(splits):  # what others hold, which may have no captions, is not looked at
        wanted = _wanted(folder, set(splits), split)
        files = [file for file, own in zip(files, splits, strict=True) if wanted is None or own == wanted]
    entries: list[Pair | BadPair] = []
    for file in files:
        below = posixpath.dirname(file)
        entries += read_table(posixpath.join(folder, file), images or folder, columns, captions, below)
    if not any(splits):
        splits = [_split_of(entry.id) for entry in entries]
        wanted = _wanted(folder, set(splits), split)
        entries = [entry for entry, own in zip(entries, splits, strict=True) if wanted is None or own == wanted]
    return Listed(tuple(entries))


def _split_of(path: str) -> str | None:
    matches = filter(None, map(_SPLIT_IN_NAME.search, path.split("/")[:-1]))
    return next((_SPLITS[match[1]] for match in matches), None)


def _wanted(folder: str, splits: Iterable[str | None], split: str | None) -> str | None:
    """The split to take, or None for everything. Raises `DataError` if it is missing."""
    known = sorted(filter(None, splits))
    wanted = None if split is None else _SPLITS.get(split, split)
    if wanted is None or (not known and wanted == "train"):
        return None
    if wanted not in known:
        raise DataError(f"{folder} has no pictures of the split {split!r}; its splits are {', '.join(known) or 'none'} (--split)")
    return wanted


_Group = tuple[tuple[str, ...], tuple[str, ...]]
"""Pictures of one name, and texts of this name."""


def _group(files: list[str]) -> list[_Group]:
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for file in files:
        stem, ending = posixpath.splitext(file)
        for place, endings in enumerate((PICTURES, TEXTS)):
            if ending.lower() in endings:
                groups.setdefault(stem, ([], []))[place].append(file)
    return [(tuple(pictures), tuple(texts)) for _, (pictures, texts) in sorted(groups.items())]


def _of_split(folder: str, groups: list[_Group], split: str | None) -> tuple[_Group, ...]:
    """The groups of a split, if the folders directly below are splits."""
    tops = [(pictures or texts)[0].partition("/")[0] for pictures, texts in groups]
    splits = [_SPLITS.get(top) for top in tops]
    wanted = _wanted(folder, set(splits), split)
    others = sorted({top for top, own in zip(tops, splits, strict=True) if own is None})
    if wanted is not None and others:
        raise DataError(
            f"{folder} has a folder of the split {wanted!r} beside what belongs to none ({others[0]}); give the folder to take"
        )
    return tuple(group for group, own in zip(groups, splits, strict=True) if wanted is None or own == wanted)


@dataclass(frozen=True)
class _Beside(Pairs):
    folder: str
    groups: tuple[_Group, ...]

    @property
    def count(self) -> int:  # type: ignore[override]
        return len(self.groups)

    def _entries(self) -> Iterator[Pair | BadPair]:
        for pictures, texts in self.groups:
            name = (pictures or texts)[0]
            try:
                if len(pictures) != 1:
                    raise DataError(f"{len(pictures)} pictures beside it ({', '.join(pictures) or 'none'}); expected one")
                if len(texts) != 1:
                    expected = posixpath.splitext(name)[0] + TEXTS[0]
                    raise DataError(f"{len(texts)} captions beside it ({', '.join(texts) or 'none'}); expected one, {expected}")
                caption = self._read(texts[0])
            except DataError as error:
                yield BadPair(name, str(error))
            else:
                picture = posixpath.join(self.folder, name)
                yield Pair(name, picture if is_url(picture) else Path(picture), caption)

    def _read(self, text: str) -> str:
        try:
            encoded = read_file(posixpath.join(self.folder, text), 0, LONGEST_TEXT + 1)
            if len(encoded) > LONGEST_TEXT:
                raise DataError(f"{text} has more than {LONGEST_TEXT} bytes; a caption is shorter")
            return decoded(encoded).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{text} cannot be read: {error}") from None
