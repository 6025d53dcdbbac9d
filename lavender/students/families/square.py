"""One square lattice of image tokens per picture, row by row."""

from __future__ import annotations

from math import inf, isqrt

import torch

from ..boxes import shown_boxes, square_boxes, tiled_boxes, unframed_boxes
from . import Family, Pictures
from .tiles import layout_function


def _cropped(pictures: Pictures) -> list[torch.Tensor]:
    """CLIP's processors resize the shortest edge and keep the middle: the lattice covers the center crop only."""
    image_processor = pictures.processor.image_processor
    frame = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    patch = pictures.processor.patch_size
    lattice = square_boxes(frame["height"] // patch, frame["width"] // patch)
    shortest = image_processor.size.get("shortest_edge")
    if not image_processor.do_center_crop or shortest is None:
        return [lattice for _ in pictures.sizes]
    return [_uncrop(lattice, size, shortest, (frame["height"], frame["width"])) for size in pictures.sizes]


def _uncrop(lattice: torch.Tensor, size: tuple[int, int], shortest: int, crop: tuple[int, int]) -> torch.Tensor:
    """Boxes of a center crop as boxes of the picture that was resized to have the given shortest edge."""
    height, width = (round(side * shortest / min(size)) for side in size)
    return unframed_boxes(lattice, crop, (-((height - crop[0]) // 2), -((width - crop[1]) // 2)), (height, width))


CROPPED = Family(boxes=_cropped)


def _whole(pictures: Pictures) -> list[torch.Tensor]:
    """The picture is stretched to the tower's square; patches may be pooled, as many rows as columns."""
    side = isqrt(pictures.processor.image_seq_length)
    return [square_boxes(side, side)] * len(pictures.sizes)


WHOLE = Family(boxes=_whole)
# Tokens of type 0 see each other in both directions: an answer's must not. The processor looks for a picture in every text.
PALIGEMMA = Family(boxes=_whole, answer_type=1, pictures=(1, inf))


def _padded(pictures: Pictures) -> list[torch.Tensor]:
    """Janus and DeepSeek-VL: the longest edge becomes the frame's, and padding on both sides makes up for the other."""
    image_processor = pictures.processor.image_processor
    side = isqrt(pictures.processor.num_image_tokens)
    boxes = []
    for size in pictures.sizes:
        scale = image_processor.size["height"] / max(size)
        height, width = (max(round(edge * scale), image_processor.min_size) for edge in size)
        frame = max(height, width)
        start = ((frame - height) // 2, (frame - width) // 2)
        boxes.append(shown_boxes(unframed_boxes(square_boxes(side, side), (frame, frame), start, (height, width))))
    return boxes


PADDED = Family(boxes=_padded)


def _ovis2(pictures: Pictures) -> list[torch.Tensor]:
    """The stretched picture, then, if it is cropped to two or more tiles, those; the marks between them have their own ids."""
    image_processor = pictures.processor.image_processor
    tile = (image_processor.size["height"], image_processor.size["width"])
    whole = _whole(pictures)
    if not image_processor.crop_to_patches:
        return whole
    boxes = []
    for lattice, size in zip(whole, pictures.sizes, strict=True):
        if image_processor.use_covering_area_grid:
            grid = layout_function(image_processor, "get_min_tile_covering_grid")(size, tile[0], image_processor.max_patches)
        else:
            limits = (image_processor.min_patches, image_processor.max_patches)
            grid = layout_function(image_processor, "get_optimal_tiled_canvas")(size, tile, *limits)
        columns, rows = grid
        boxes.append(torch.cat([lattice, tiled_boxes(rows, columns, lattice)]) if rows * columns > 1 else lattice)
    return boxes


OVIS2 = Family(boxes=_ovis2)


def _pooled(pictures: Pictures) -> list[torch.Tensor]:
    """Gemma 4: the picture is stretched to nearly its own shape in patches, which are pooled in squares."""
    pool = pictures.processor.image_processor.pooling_kernel_size
    # Places (x, y) of all patches; padding is at (-1, -1).
    patches = torch.as_tensor(pictures.outputs["image_position_ids"]).amax(dim=1) + 1
    return [square_boxes(rows // pool, columns // pool) for columns, rows in patches.tolist()]


POOLED = Family(boxes=_pooled)
