"""One square grid of image tokens per picture, row by row."""

from __future__ import annotations

from math import inf, isqrt

import torch

from ..boxes import shown_boxes, square_boxes, tiled_boxes, unframed_boxes
from . import Family, ProcessedImages
from .tiles import layout_function


def _cropped(images: ProcessedImages) -> list[torch.Tensor]:
    """CLIP's processors resize the shortest edge and keep the middle: the grid covers the center crop only."""
    image_processor = images.processor.image_processor
    frame = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    patch = images.processor.patch_size
    patches = square_boxes(frame["height"] // patch, frame["width"] // patch)
    shortest = image_processor.size.get("shortest_edge")
    if not image_processor.do_center_crop or shortest is None:
        return [patches for _ in images.sizes]
    return [_uncrop(patches, size, shortest, (frame["height"], frame["width"])) for size in images.sizes]


def _uncrop(patches: torch.Tensor, size: tuple[int, int], shortest: int, crop: tuple[int, int]) -> torch.Tensor:
    """Boxes of a center crop as boxes of the picture that was resized to have the given shortest edge."""
    height, width = (round(side * shortest / min(size)) for side in size)
    return unframed_boxes(patches, crop, (-((height - crop[0]) // 2), -((width - crop[1]) // 2)), (height, width))


CROPPED = Family(boxes=_cropped)


def _whole(images: ProcessedImages) -> list[torch.Tensor]:
    """The picture is stretched to the tower's square; patches may be pooled, as high as wide."""
    side = isqrt(images.processor.image_seq_length)
    return [square_boxes(side, side)] * len(images.sizes)


WHOLE = Family(boxes=_whole)
# Tokens of type 0 see each other in both directions: an answer's must not. The processor looks for a picture in every text.
PALIGEMMA = Family(boxes=_whole, answer_type=1, num_images=(1, inf))


def _padded(images: ProcessedImages) -> list[torch.Tensor]:
    """Janus and DeepSeek-VL: the longest edge becomes the frame's, and padding on both sides makes up for the other."""
    image_processor = images.processor.image_processor
    side = isqrt(images.processor.num_image_tokens)
    boxes = []
    for size in images.sizes:
        scale = image_processor.size["height"] / max(size)
        height, width = (max(round(edge * scale), image_processor.min_size) for edge in size)
        frame = max(height, width)
        start = ((frame - height) // 2, (frame - width) // 2)
        boxes.append(shown_boxes(unframed_boxes(square_boxes(side, side), (frame, frame), start, (height, width))))
    return boxes


PADDED = Family(boxes=_padded)


def _ovis2(images: ProcessedImages) -> list[torch.Tensor]:
    """The stretched picture, then, if it is cropped to two or more tiles, those; the marks between them have their own ids."""
    image_processor = images.processor.image_processor
    tile = (image_processor.size["height"], image_processor.size["width"])
    whole = _whole(images)
    if not image_processor.crop_to_patches:
        return whole
    boxes = []
    for patches, size in zip(whole, images.sizes, strict=True):
        if image_processor.use_covering_area_grid:
            tiles = layout_function(image_processor, "get_min_tile_covering_grid")(size, tile[0], image_processor.max_patches)
        else:
            limits = (image_processor.min_patches, image_processor.max_patches)
            tiles = layout_function(image_processor, "get_optimal_tiled_canvas")(size, tile, *limits)
        grid_width, grid_height = tiles
        boxes.append(
            torch.cat([patches, tiled_boxes(grid_height, grid_width, patches)]) if grid_height * grid_width > 1 else patches
        )
    return boxes


OVIS2 = Family(boxes=_ovis2)


def _pooled(images: ProcessedImages) -> list[torch.Tensor]:
    """Gemma 4: the picture is stretched to nearly its own shape in patches, which are pooled in squares."""
    pool = images.processor.image_processor.pooling_kernel_size
    # Places (x, y) of all patches; padding is at (-1, -1).
    patches = torch.as_tensor(images.outputs["image_position_ids"]).amax(dim=1) + 1
    return [square_boxes(height // pool, width // pool) for width, height in patches.tolist()]


POOLED = Family(boxes=_pooled)
