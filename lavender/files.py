"""The border with files: reading at a path or a URL, paths that a data set names, and writing a file whole or not at all."""

from __future__ import annotations

import os
import posixpath
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from urllib.request import urlopen

from .errors import ConfigError, DataError

TIMEOUT_S = 60
"""How long a server may be silent before it is given up."""


def write_atomically(path: Path, data: str | bytes | memoryview) -> None:
    """Writes a file, text as UTF-8. A kill or a power cut leaves a regular file as it was before, or whole.

    Raises `OSError` where the file cannot be written; what was there before stays.
    """
    content = data.encode() if isinstance(data, str) else data
    # A link, a device or a pipe, such as /dev/stdout, is written through and not replaced.
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(content)
        return
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    if os.name == "nt":  # a folder cannot be synchronized there
        return
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_url(location: object) -> bool:
    """Whether fsspec opens it. A `Path` never is one: it has lost a slash."""
    return isinstance(location, str) and "://" in location


def is_folder(location: str | Path) -> bool:
    if not is_url(location):
        return Path(location).is_dir()
    system, path = filesystem_of(str(location))
    return bool(system.isdir(path))


def filesystem_of(url: str) -> tuple[Any, str]:
    """The fsspec file system that serves a URL, and the path in it. Raises `ConfigError` where nothing installed serves it."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"cannot open {url}: {error}. Install what serves {url.split('://')[0]}://, or give a local path"
        ) from None
    return system, path


def read_file(location: str | Path, offset: int = 0, length: int | None = None) -> bytes:
    """A file's bytes `[offset, offset + length)`, up to its end by default. Raises `OSError` where it cannot be read."""
    if str(location).lower().startswith(("http://", "https://")) and (offset, length) == (0, None):
        return _fetch(str(location))
    if is_url(location):
        system, path = filesystem_of(str(location))
        try:
            return bytes(system.cat_file(path, start=offset, end=None if length is None else offset + length))
        except (OSError, MemoryError):
            raise
        except Exception as error:  # each file system has errors of its own
            raise OSError(f"{type(error).__name__}: {error}") from None
    with open(location, "rb") as file:
        file.seek(offset)
        return file.read(-1 if length is None else length)


def _fetch(url: str) -> bytes:
    """A whole file by HTTP, for which fsspec needs packages that lavender does without."""
    try:
        with urlopen(url, timeout=TIMEOUT_S) as response:
            return bytes(response.read())
    except (OSError, HTTPException, ValueError) as error:
        raise OSError(f"{type(error).__name__}: {error}") from None


def path_within(root: str | Path, name: str, place: str) -> str | Path:
    """The path or URL of a picture that a data set names, which must lie in the data set's root.

    Names come from whoever made the data set, so that without this rule any file could be read that the user may read. It is
    lexical: what a link inside the root leads to is the user's own business.

    Args:
        root: a folder, or the URL of one.
        name: relative to the root, or an absolute path or URL inside it.
        place: what the entry is called in errors.

    Raises:
        DataError: the name leads out of the root.
    """
    inside = _within_url(str(root), name) if is_url(root) else _within_folder(Path(root), name)
    if inside is None:
        raise DataError(
            f"{place}: the picture {name!r} is not in {root}, where the pictures of this data set are; give the folder that holds "
            "it (--images FOLDER)"
        )
    return inside


def _within_folder(root: Path, name: str) -> Path | None:
    if "\0" in name or is_url(name):
        return None
    top = os.path.abspath(root)
    full = os.path.normpath(os.path.join(top, name))
    if full == top:
        return root
    top = top.rstrip(os.sep) + os.sep
    return root / full[len(top) :] if full.startswith(top) else None


def _within_url(root: str, name: str) -> str | None:
    root = root.rstrip("/")
    if is_url(name):
        if not name.startswith(root + "/"):
            return None
        name = name[len(root) + 1 :]
    inside = posixpath.normpath(name)
    # A server may decode the path, and "::" would chain another file system.
    decoded = posixpath.normpath(unquote(inside).replace("\\", "/"))
    refused = _climbs(inside) or _climbs(decoded) or "::" in name or "\0" in decoded
    return None if refused else f"{root}/{inside}"


def _climbs(path: str) -> bool:
    return path == ".." or path.startswith(("../", "/"))
