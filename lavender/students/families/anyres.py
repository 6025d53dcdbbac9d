"""Two views of every picture, LLaVA-NeXT and LLaVA-OneVision: squeezed onto one tile, then in its own shape on several tiles.

The second view stands in the middle of the tiles' frame. Rows or columns of tokens that show the padding around it are dropped,
and every row ends with a newline.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next.modeling_llava_next import unpad_image

from ..boxes import shown_boxes, square_boxes, unframed_boxes
from . import Family, ProcessedImages


def _llava_next(images: ProcessedImages) -> list[torch.Tensor]:
    processor, tile = images.processor, _tile(images)
    grid = (tile[0] // processor.patch_size, tile[1] // processor.patch_size)
    return [_two_views(processor, size, tile, grid) for size in images.sizes]


def _llava_onevision(images: ProcessedImages) -> list[torch.Tensor]:
    processor, tile = images.processor, _tile(images)
    side = isqrt(processor.num_image_tokens)
    # Pictures that share a text are not tiled.
    shared = [count > 1 for count in images.outputs["batch_num_images"].tolist() for _ in range(count)]
    return [
        _one_view(size, (side, side)) if several else _two_views(processor, size, tile, (side, side))
        for size, several in zip(images.sizes, shared, strict=True)
    ]


def _tile(images: ProcessedImages) -> tuple[int, int]:
    """Height and width of a tile in pixels."""
    height, width = images.outputs["pixel_values"][0][0].shape[-2:]
    return height, width


def _two_views(processor: Any, size: tuple[int, int], tile: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """The picture squeezed onto one tile, row by row, then its rows in the frame of tiles; `grid` is one tile's."""
    frame = select_best_resolution(size, processor.image_processor.image_grid_pinpoints)
    tiles = (frame[0] // tile[0], frame[1] // tile[1])
    whole = (grid[0] * tiles[0], grid[1] * tiles[1])
    # The model's own function says how many rows or columns it keeps, out of the middle.
    kept = unpad_image(torch.empty(1, *whole, device="meta"), size).shape[1:]
    # LLaVA-OneVision shrinks what it keeps to fewer tokens; LLaVA-NeXT does not.
    tokens, grid_height = processor._get_unpadded_features(*size, *grid, *tiles)
    newlines = torch.full((grid_height, 1, 4), torch.nan)
    if not tokens:  # A sliver, thinner than a token, keeps the newlines alone.
        return torch.cat([square_boxes(*grid), newlines.flatten(0, 1)])
    share = (torch.tensor(kept) / torch.tensor(whole)).repeat(2)
    view = (1 - share) / 2 + square_boxes(grid_height, tokens // grid_height) * share
    fitted = get_patch_output_size(torch.empty(1, *size, device="meta"), frame, ChannelDimension.FIRST)
    lines = _centered(view, frame, fitted).view(grid_height, -1, 4)
    return torch.cat([square_boxes(*grid), torch.cat([lines, newlines], dim=1).flatten(0, 1)])


def _one_view(size: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """The picture padded to a square, row by row, then one newline."""
    boxes = _centered(square_boxes(*grid), (max(size), max(size)), size)
    return torch.cat([boxes, torch.full((1, 4), torch.nan)])


def _centered(boxes: torch.Tensor, frame: tuple[int, int], shown: tuple[int, int]) -> torch.Tensor:
    """Boxes of a frame as boxes of the picture that stands in its middle, `shown` pixels large; padding alone has no place."""
    start = ((frame[0] - shown[0]) // 2, (frame[1] - shown[1]) // 2)
    return shown_boxes(unframed_boxes(boxes, frame, start, shown))


LLAVA_NEXT = Family(boxes=_llava_next)
LLAVA_ONEVISION = Family(boxes=_llava_onevision)
