"""Which pictures of a store were looked at, so that a run that continues it need not read them all again."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..files import is_url, open_regular, parse_json, write_within
from ..images import ImageSource, StoredImage
from ..targets.store import Identity

FILE = ".pictures.jsonl"
"""Beside the shards: a line for each sample, its id and a hash. A store without it is the same store; its pictures are read."""


def stamp_of(image: ImageSource) -> str | None:
    """Which local file a picture is, or is in, by its path and by its number on its disk, which a link that leads elsewhere now
    does not keep, with its size and the time of its last change; None if it is in none."""
    path = image.file if isinstance(image, StoredImage) else image
    if not isinstance(path, str | Path) or is_url(path):
        return None
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    place = f"{os.path.abspath(path)}\0{image.offset if isinstance(image, StoredImage) else 0}"
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return "\0".join([place, *map(str, state)]) if stat.S_ISREG(status.st_mode) else None


class SeenPictures:
    """What was noted of a store's pictures. A picture is known again if it is the file at the place, of the size and the time that
    it was when the stored maps were found to be its own: one that was written over and has all of them again is not noticed.
    """

    def __init__(self, folder: Path, rehash: bool = False) -> None:
        """`folder` is the store's, whose lock is held; with `rehash` what was noted before is forgotten."""
        self._notes: dict[str, str] = {} if rehash else _read(folder / FILE)
        self._path: Path | None = None
        with suppress(OSError):  # a run can do without
            write_within(folder, FILE, "".join(map(_line, self._notes.items())))
            self._path = folder / FILE

    def knows(self, sample_id: str, stamp: str | None, stored: Identity) -> bool:
        """Whether a picture with this stamp was found to be the stored sample's."""
        return stamp is not None and self._notes.get(sample_id) == _note(stamp, stored)

    def add(self, samples: Iterable[tuple[str, str | None, Identity]]) -> None:
        """Notes pictures, with the stamps that they had before they were read; a kill from here on forgets none of them."""
        notes = {sample_id: _note(stamp, stored) for sample_id, stamp, stored in samples if stamp is not None}
        self._notes |= notes
        if self._path is not None:
            with suppress(OSError), open(self._path, "a") as file:
                file.writelines(map(_line, notes.items()))


def _note(stamp: str, stored: Identity) -> str:
    return hashlib.sha256(f"{stamp}\0{stored.image_sha256}\0{stored.file_sha256}".encode(errors="surrogateescape")).hexdigest()[:32]


def _line(note: tuple[str, str]) -> str:
    return json.dumps(note) + "\n"


def _read(path: Path) -> dict[str, str]:
    try:
        with open_regular(path) as file:
            lines = file.read().decode().splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    notes = {}
    for line in lines:
        with suppress(ValueError):  # a kill may have cut the last one off
            value = parse_json(line)
            if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
                notes[value[0]] = value[1]
    return notes
