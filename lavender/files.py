"""The border with files: reading regular files at a path or a URL, paths that a data set names, and writing a file whole or not at
all, through no link but the user's own; and the lock on a folder that one process writes."""

from __future__ import annotations

import errno
import json
import os
import posixpath
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path, PurePath
from typing import Any, BinaryIO
from urllib.parse import unquote
from urllib.request import urlopen

from .errors import ConfigError, DataError, LavenderError

TIMEOUT_S = 60
"""How long a server may be silent before it is given up."""


def write_atomically(path: Path, data: str | bytes | memoryview) -> None:
    """Writes a file that the user named, text as UTF-8. A kill or a power cut leaves a regular file as it was before, or whole.

    A link is the user's own: it stays, and what it leads to is replaced. Raises `OSError` where the file cannot be written; what
    was there before stays.
    """
    if path.exists() and not path.is_file():  # a device or a pipe, such as /dev/stdout, is written to and not replaced
        descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe that nobody reads is refused
        os.set_blocking(descriptor, True)
        with open(descriptor, "wb") as device:
            device.write(_encoded(data))
        return
    with replacing(Path(os.path.realpath(path)) if path.is_symlink() else path) as file:
        file.write(_encoded(data))


def write_within(folder: Path, name: str, data: str | bytes | memoryview) -> None:
    """`write_atomically` in a folder that lavender keeps, such as a store or a run, and whose content may come from elsewhere.

    Nothing in it is written through a link: one in the file's place is replaced, what it leads to stays.

    Raises:
        DataError: a folder on the way is a link.
        OSError: the file cannot be written.
    """
    own_path(folder, str(PurePath(name).parent))
    with replacing(folder / name) as file:
        file.write(_encoded(data))


def own_path(folder: Path, name: str) -> Path:
    """The path of what lavender keeps in a folder under a name, and may write or remove: no part of the name is a link.

    Where the folder itself lies is the user's own business. Raises `DataError` for a link.
    """
    path = folder
    for part in PurePath(name).parts:
        path = path / part
        if path.is_symlink():
            raise DataError(
                f"{path} is a link to {os.readlink(path)}; in a folder that lavender keeps nothing is written through a link: put "
                "what it leads to in its place, or remove it"
            )
    return path


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes a name when the block ends: until then, or if it raises, what was there stays as it is."""
    partial = path.with_name(path.name + ".partial")
    try:
        with suppress(FileNotFoundError):
            os.unlink(partial)  # left by a kill
        with open(partial, "xb") as file:  # which never follows a link
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    synchronize(path.parent)


def replace_folder(made: Path, folder: Path) -> None:
    """Gives a folder that was written aside, on the same disk, its name; what had that name is removed.

    A kill or a power cut leaves all of it under the name, or nothing of it. Raises `OSError` where that cannot be done.
    """
    synchronize_all(made)
    if folder.is_dir():
        shutil.rmtree(folder)
    else:  # where rmtree would wait for whoever writes to a pipe
        folder.unlink(missing_ok=True)
    os.replace(made, folder)
    synchronize(folder.parent)


def synchronize_all(path: Path) -> None:
    """Waits until a file, or a folder and all that is in it, is on the disk."""
    for place, _, names in os.walk(path, topdown=False):
        for name in names:
            synchronize(Path(place, name))
        synchronize(Path(place))
    if path.is_file():
        synchronize(path)


def synchronize(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on the disk."""
    if os.name == "nt":  # a folder cannot be synchronized there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def name_full_disk(folder: Path, error: type[LavenderError] = DataError) -> Iterator[None]:
    """Raises `error`, which says what to do, in place of the `OSError` of a disk that is full while `folder` is written to."""
    try:
        yield
    except OSError as fault:
        if fault.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise error(
            f"cannot write to {folder}: {fault.strerror}. What is stored there is safe; free some space and run the same command "
            "again to continue"
        ) from None


class FolderLock:
    """Keeps a second writer out of a folder, across processes; the system frees it when its holder dies.

    `.lock` in the folder is what is locked, and stays; `.lock.json` names the holder while it is held. Held from the beginning on,
    until `release` or the end of a `with` block.
    """

    def __init__(
        self,
        folder: Path,
        doing: str = "writing",
        remedy: str = "wait until it has finished, or give another folder",
        error: type[LavenderError] = DataError,
    ) -> None:
        """
        Args:
            folder: a folder that is there.
            doing: what the holder does with it, as a message says it of another process.
            remedy: what the message says to do.
            error: what is raised if another process holds the lock, or something else is in the place of the lock's file.
        """
        from filelock import FileLock, Timeout  # here, since reading alone can do without the package

        try:
            path = own_path(folder, ".lock")
        except DataError as fault:
            raise error(str(fault)) from None
        if path.exists() and not path.is_file():
            raise error(f"{path} is no file, as lavender keeps one under this name; remove it, or give another folder")
        # A folder may be written by another thread than the one that locked it.
        self._lock = FileLock(path, thread_local=False)
        self._holder = folder / ".lock.json"
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise error(f"another process{self._named()} is {doing} {folder}; {remedy}") from None
        with suppress(OSError):
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
            write_within(folder, self._holder.name, json.dumps(holder))

    def _named(self) -> str:
        try:
            holder = read_json(self._holder)
            return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
        except (OSError, ValueError, KeyError, TypeError):  # it has only just begun
            return ""

    def is_held(self) -> bool:
        return self._lock.is_locked

    def rename(self, folder: Path) -> None:
        """Gives the folder another name, under which it is still held. Nothing may be there but an empty folder."""
        self._holder.parent.rename(folder)
        self._holder = folder / self._holder.name
        synchronize(folder.parent)

    def release(self) -> None:
        if self._lock.is_locked:
            try:
                with suppress(OSError):  # it only names the holder, and may be a folder that somebody put there
                    self._holder.unlink()
            finally:
                self._lock.release()

    def withdraw(self) -> None:
        """Releases the lock, and removes the folder if there is nothing else in it."""
        folder = self._holder.parent
        with suppress(OSError):
            if {path.name for path in folder.iterdir()} <= {".lock", ".lock.json"}:
                (folder / ".lock").unlink()  # who has opened it already finds that it is gone
        self.release()
        with suppress(OSError):
            folder.rmdir()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def _encoded(data: str | bytes | memoryview) -> bytes | memoryview:
    return data.encode() if isinstance(data, str) else data


def open_regular(path: str | Path) -> BinaryIO:
    """A file to read. Raises `OSError` if it cannot be opened or is no regular file: a pipe may never begin, a device never end."""
    return open(path, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    # Not blocking: to open a pipe waits for whoever writes to it.
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # `open` itself refuses a folder
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, f"expected a regular file, and this is {'a pipe' if stat.S_ISFIFO(mode) else 'a device'}", path)


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
    """A regular file's bytes `[offset, offset + length)`, up to its end by default. Raises `OSError` where it cannot be read."""
    if str(location).lower().startswith(("http://", "https://")) and (offset, length) == (0, None):
        return _fetch(str(location))
    if is_url(location):
        from fsspec.implementations.local import LocalFileSystem

        system, path = filesystem_of(str(location))
        if not isinstance(system, LocalFileSystem):
            try:
                return bytes(system.cat_file(path, start=offset, end=None if length is None else offset + length))
            except (OSError, MemoryError):
                raise
            except Exception as error:  # each file system has errors of its own
                raise OSError(f"{type(error).__name__}: {error}") from None
        location = path
    with open_regular(location) as file:
        file.seek(offset)
        return file.read(-1 if length is None else length)


def read_json(path: Path) -> Any:
    """What a regular file says in JSON. Raises `OSError` where it cannot be read, `ValueError` as `parse_json` does."""
    return parse_json(read_file(path))


def parse_json(text: str | bytes) -> Any:
    """What a text says in JSON. Raises `ValueError` where it is no JSON, or one that no parser gets to the end of."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it has too many brackets within each other") from None


def _fetch(url: str) -> bytes:
    """A whole file by HTTP, for which fsspec needs packages that lavender does without."""
    try:
        with urlopen(url, timeout=TIMEOUT_S) as response:
            return bytes(response.read())
    except (OSError, HTTPException, ValueError) as error:
        raise OSError(f"{type(error).__name__}: {error}") from None


def path_within(
    root: str | Path, name: str, place: str, remedy: str = "give the folder that holds it (--images FOLDER)"
) -> str | Path:
    """The path or URL of a picture that a data set names, which must lie in the data set's root.

    Names come from whoever made the data set, so that without this rule any file could be read that the user may read. It is
    lexical: what a link inside the root leads to is the user's own business.

    Args:
        root: a folder, or the URL of one.
        name: relative to the root, or an absolute path or URL inside it.
        place: what the entry is called in errors.
        remedy: what they say to do.

    Raises:
        DataError: the name leads out of the root.
    """
    inside = _within_url(str(root), name) if is_url(root) else _within_folder(Path(root), name)
    if inside is None:
        raise DataError(f"{place}: the picture {name!r} is not in {root}, where the pictures of this data set are; {remedy}")
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
