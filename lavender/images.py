"""Pictures as every part of lavender reads them: upright, RGB, eight bits, wherever they are stored."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.request import url2pathname

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import DataError
from .files import read_file


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
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_SHORTEST_BASE64 = 40
"""Characters; a GIF of one pixel has 48 and more."""
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


def picture_in(text: str) -> bytes | None:
    """The encoded picture that a text is itself: a data URI, or base64 of a picture; None where it is a path or a URL.

    Raises `DataError` for a data URI that is not one of a picture in base64.
    """
    if text[:5].lower() == "data:":
        head, _, body = text.partition(",")
        encoded = _from_base64(body) if head.lower().endswith(";base64") else None
        if not encoded:
            raise DataError(f"the data URI {text[:40]!r}... holds no base64; expected data:image/png;base64,...")
        return encoded
    # No path is as long as the smallest picture and base64 of one.
    encoded = _from_base64(text) if len(text) >= _SHORTEST_BASE64 and _BASE64.fullmatch(text) else None
    return encoded if encoded is not None and _is_picture(encoded) else None


def _from_base64(text: str) -> bytes | None:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        return None


def _is_picture(encoded: bytes) -> bool:
    try:
        with _without_warnings(), Image.open(io.BytesIO(encoded)):
            return True
    except Exception:  # PIL's readers raise whatever their parsers meet
        return False


def with_file_paths(location: str) -> str:
    """A `file://` URI as the path that it stands for; any other path or URL as it is. Raises `DataError` if it names a host."""
    if not location.lower().startswith("file://"):
        return location
    path = location[len("file://") :].removeprefix("localhost")
    if not path.startswith("/"):
        raise DataError(f"{location} names a file of the computer {path.partition('/')[0]!r}; expected file:///path")
    return url2pathname(path)


def image_sha256(image: Image.Image) -> str:
    """Fingerprint of a picture as it is seen (upright, RGB), whatever file or encoding it came from."""
    upright = ImageOps.exif_transpose(image).convert("RGB")
    digest = hashlib.sha256(f"{upright.width}x{upright.height}".encode())
    digest.update(upright.tobytes())
    return digest.hexdigest()


def file_sha256(image: ImageSource) -> str:
    """Fingerprint of a picture's encoded bytes; empty for a PIL image. Raises `DataError` if they cannot be read."""
    return _digest(read_bytes(image))


def _digest(encoded: bytes | None) -> str:
    return "" if encoded is None else hashlib.sha256(encoded).hexdigest()


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that was read and decoded once, for all who need its pixels or its fingerprints.

    Attributes:
        image: upright, RGB, eight bits.
        file_sha256: see `file_sha256`.
    """

    image: Image.Image
    file_sha256: str

    @classmethod
    def open(cls, source: ImageSource) -> Picture:
        """Reads a picture. Raises `DataError` as `load_image`."""
        encoded = read_bytes(source)
        return cls(_decode(source, encoded), _digest(encoded))

    @cached_property
    def sha256(self) -> str:
        """See `image_sha256`."""
        return image_sha256(self.image)


def load_image(source: ImageSource) -> Image.Image:
    """An upright RGB picture of eight bits: of an animation the first frame, and over white where it is transparent.

    Raises:
        DataError: it is missing, empty, damaged, no picture, or has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    return _decode(source, read_bytes(source))


def _decode(source: ImageSource, encoded: bytes | None) -> Image.Image:
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
