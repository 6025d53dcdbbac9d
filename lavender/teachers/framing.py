"""Pictures of any shape in the square that a teacher sees, and maps of that square back on the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..config import Fit
from ..types import WHOLE_PICTURE, Box

_GRAY = (127, 127, 127)
"""What lies beside a padded picture: next to nothing for an autoencoder, whose pixels reach from -1 to 1."""


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture as a teacher sees it.

    Attributes:
        pixels: float32 [3, side, side] in [-1, 1].
        inside: the part of the square that the picture fills, in fractions of the square.
        crop: the part of the picture that is in the square, in fractions of the picture.
    """

    pixels: torch.Tensor
    inside: Box
    crop: Box


def frame(image: Image.Image, side: int, fit: Fit) -> Frame:
    """A square of `side` pixels with an upright RGB picture in it; what `fit` means is said in `TeacherConfig`."""
    width, height = image.size
    inside = crop = WHOLE_PICTURE
    if fit == "pad":
        scale = side / max(width, height)
        fitted = (max(1, round(width * scale)), max(1, round(height * scale)))
        left, top = (side - fitted[0]) // 2, (side - fitted[1]) // 2
        square = Image.new("RGB", (side, side), _GRAY)
        square.paste(image.resize(fitted, Image.Resampling.BICUBIC), (left, top))
        inside = (top / side, left / side, (top + fitted[1]) / side, (left + fitted[0]) / side)
    elif fit == "crop":
        short = min(width, height)
        x, y = (width - short) / 2, (height - short) / 2
        square = image.resize((side, side), Image.Resampling.BICUBIC, box=(x, y, x + short, y + short))
        crop = (y / height, x / width, (y + short) / height, (x + short) / width)
    else:
        square = image.resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)
    return Frame(pixels.float() / 127.5 - 1, inside, crop)


def on_picture(maps: torch.Tensor, inside: Sequence[Box], size: int) -> torch.Tensor:
    """Maps of squares, resampled to what the pictures fill of them: bilinear, antialiased.

    Args:
        maps: [B, W, y, x].
        inside: of each of the B squares, the part that its picture fills.
        size: height and width of the result.

    Returns:
        [B, W, size, size]. Where the picture fills its square, this is `lavender.kernels.map_loss.resample`.
    """
    down = torch.stack([_weights(maps.shape[2], size, box[0], box[2]) for box in inside]).to(maps)
    across = torch.stack([_weights(maps.shape[3], size, box[1], box[3]) for box in inside]).to(maps)
    return down[:, None] @ maps @ across[:, None].mT


def _weights(count: int, size: int, start: float, end: float) -> torch.Tensor:
    """Weights [size, count] that resample the stretch from `start` to `end` (fractions) of `count` places: triangles as wide as a
    place of the coarser side."""
    scale = (end - start) * count / size
    centers = start * count + (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * scale
    distance = (torch.arange(count, dtype=torch.float64) + 0.5 - centers).abs()
    weights = (1 - distance / max(scale, 1.0)).clamp_min(0)
    return weights / weights.sum(dim=1, keepdim=True)
