"""Pictures as every part of lavender reads them: upright, RGB, eight bits."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import DataError

ImageSource = str | Path | bytes | Image.Image


def load_image(source: ImageSource) -> Image.Image:
    """An upright RGB picture. Raises `DataError` when it is missing, empty or damaged."""
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the image")
    if not isinstance(source, str | Path | bytes):
        raise DataError(f"an image is a {type(source).__name__}; expected a path, encoded bytes or a PIL image")
    name = "the image bytes" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            return _to_rgb(file, name)
    except FileNotFoundError:
        raise DataError(f"there is no image at {name}") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {name}: {error}") from None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # PIL would cut 16 bits off at 255, which is white
        upright = Image.fromarray((np.asarray(upright).astype(np.float32) / 257).round().astype(np.uint8))
    elif upright.mode in ("I", "F"):
        raise DataError(f"{name} has pixels of 32 bits (mode {upright.mode}) in an unknown range; save it with 8 or 16 bits")
    return upright.convert("RGB")
