"""Text that reads the picture by cross-attention, whose keys begin with a class token; and Florence-2's encoder-decoder."""

from __future__ import annotations

from math import isqrt

import torch

from ...errors import ModelError
from ..boxes import shown_boxes, square_boxes, tiled_boxes
from . import Family, ProcessedImages
from .tiles import layout_function


def _mllama(images: ProcessedImages) -> list[torch.Tensor]:
    """The picture is fitted into tiles at the top left; every tile is a class token and a grid, and empty ones follow."""
    image_processor = images.processor.image_processor
    tile, most = image_processor.size["height"], image_processor.max_image_tiles
    side = tile // images.patch_size
    boxes = []
    for size in images.sizes:
        canvas = layout_function(image_processor, "get_optimal_tiled_canvas")(*size, most, tile)
        fitted = layout_function(image_processor, "get_image_size_fit_to_canvas")(*size, *canvas, tile)
        grid_height, grid_width = (int(edge) // tile for edge in canvas)
        stretch = torch.tensor([int(a) / int(b) for a, b in zip(canvas, fitted, strict=True)]).repeat(2)
        keys = torch.full((most, 1 + side * side, 4), torch.nan)
        shown = shown_boxes(tiled_boxes(grid_height, grid_width, square_boxes(side, side)) * stretch)
        keys[: grid_height * grid_width, 1:] = shown.view(grid_height * grid_width, -1, 4)
        boxes.append(keys.flatten(0, 1))
    return boxes


MLLAMA = Family(boxes=_mllama, cross=True)


def _idefics(images: ProcessedImages) -> list[torch.Tensor]:
    """The picture is stretched to the tower's square; a class token stands before its grid."""
    side = images.processor.image_processor.image_size // images.patch_size
    if images.config.use_resampler:
        raise ModelError("Idefics' resampler mixes all patches, and lavender cannot read its attention: there are no places")
    return [torch.cat([torch.full((1, 4), torch.nan), square_boxes(side, side)])] * len(images.sizes)


IDEFICS = Family(boxes=_idefics, cross=True, collates=False)


def _florence2(images: ProcessedImages) -> list[torch.Tensor]:
    """The picture is stretched to the tower's square; the mean of all places stands before its grid.

    The tower's strided convolutions look about half a token further up and left than their boxes, which is left as it is.
    """
    side = isqrt(images.processor.num_image_tokens - 1)
    return [torch.cat([torch.full((1, 4), torch.nan), square_boxes(side, side)])] * len(images.sizes)


FLORENCE2 = Family(boxes=_florence2, collates=False)
