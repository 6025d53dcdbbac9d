"""Pictures as every part of lavender reads them: upright, RGB, eight bits, wherever they are stored."""

from __future__ import annotations

import io
import os
import posixpath
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import ConfigError, DataError


@dataclass(frozen=True)
class StoredImage:
    """An encoded picture inside another file, such as a tar: it is read when it is needed, by whoever needs it.

    Attributes:
        file: path or URL of the other file.
        offset: where the picture begins, in bytes.
        length: how long it is, in bytes.
    """

    file: str
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.file} (bytes {self.offset} to {self.offset + self.length})"


ImageSource = str | Path | bytes | Image.Image | StoredImage
"""A path, a URL that fsspec knows (`s3://...`), encoded bytes, a PIL image, or a picture inside another file."""

_SCALED_TO_16_BITS = ("PNG", "PPM")
"""Formats whose pictures PIL may give as mode I although their range is known."""
_WARNINGS_LOCK = threading.Lock()


def read_bytes(source: ImageSource) -> bytes | None:
    """A picture as it is stored, still encoded; None for a PIL image. Raises `DataError` when it is missing or cut off."""
    if isinstance(source, Image.Image):
        return None
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str | Path | StoredImage):
        raise DataError(
            f"an image is a {type(source).__name__}; expected a path, a URL, encoded bytes, a PIL image or a StoredImage"
        )
    try:
        if not isinstance(source, StoredImage):
            return read_file(source)
        stored = read_file(source.file, source.offset, source.length)
    except FileNotFoundError:
        raise DataError(f"there is no image at {source}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the image {source}: {error}") from None
    if len(stored) < source.length:
        raise DataError(f"the image {source} is truncated: the file ends after {len(stored)} of its {source.length} bytes")
    return stored


def load_image(source: ImageSource) -> Image.Image:
    """An upright RGB picture of eight bits: of an animation the first frame, and over white where it is transparent.

    Raises:
        DataError: it is missing, empty, damaged, no picture, or has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    encoded = read_bytes(source)
    name = "the image" if encoded is None else "the image bytes" if isinstance(source, bytes) else str(source)
    try:
        if encoded is None:
            assert isinstance(source, Image.Image)
            _require_size(source, name)
            source.load()
            with _without_warnings():
                return _to_rgb(source, name)
        if not encoded:
            raise DataError(f"the image {name} is empty (0 bytes)")
        with _without_warnings():
            file = Image.open(io.BytesIO(encoded))
        with file:
            _require_size(file, name)
            if file.format == "EPS":
                raise DataError(f"{name} is a PostScript program, which lavender does not run; save it as PNG or JPEG")
            file.load()  # out of the lock that _without_warnings holds: it is what takes time
            with _without_warnings():
                return _to_rgb(file, name)
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DataError(f"cannot read the image {name}: it is no picture in a format that PIL knows") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"cannot read the image {name}: {error} {_REMEDY}") from None
    except Exception as error:  # PIL's readers raise whatever their parsers meet in a damaged file
        raise DataError(f"cannot read the image {name}: {error or type(error).__name__}") from None


_REMEDY = "If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS before, or give a smaller picture"


def _require_size(image: Image.Image, name: str) -> None:
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if not pixels:
        raise DataError(f"{name} has no pixels: it is {image.width} wide and {image.height} high")
    if limit is not None and pixels > limit:
        raise DataError(f"{name} has {pixels} pixels ({image.width} x {image.height}), the limit is {limit}. {_REMEDY}")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format in _SCALED_TO_16_BITS):
        # PIL would cut 16 bits off at 255, which is white
        upright = Image.fromarray((np.asarray(upright).astype(np.float32) / 257).round().astype(np.uint8))
    elif upright.mode in ("I", "F"):
        raise DataError(f"{name} has pixels of 32 bits (mode {upright.mode}) in an unknown range; save it with 8 or 16 bits")
    if upright.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in upright.info:
        # PIL would uncover the colors that the picture hides
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
    return upright.convert("RGB")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """PIL warns of harmless faults, such as damaged EXIF. The filters are the process's own: one thread changes them at a time."""
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
