"""The picture cut into rows and columns of tiles, each a grid of image tokens, beside a small version of the whole picture."""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import isqrt
from typing import Any

import torch
from transformers.image_utils import SizeDict

from ...errors import ConfigError
from ..boxes import shown_boxes, square_boxes, tiled_boxes
from . import Family, ProcessedImages


def layout_function(image_processor: Any, name: str) -> Callable[..., Any]:
    """A function by which an image processor lays out its tiles: it is defined beside the processor's class."""
    for cls in type(image_processor).__mro__:
        function = getattr(sys.modules[cls.__module__], name, None)
        if function is not None:
            layout: Callable[..., Any] = function
            return layout
    raise ConfigError(f"{type(image_processor).__name__} has no {name}, which lays out its tiles; pass the model's own processor")


def _thumbnail_last(images: ProcessedImages, side: int) -> list[torch.Tensor]:
    """Tiles that the picture is stretched to fill, then the whole picture if there are two or more; `side`² tokens each."""
    processor, image_processor = images.processor, images.processor.image_processor
    canvas = layout_function(image_processor, "get_optimal_tiled_canvas")
    tile = (image_processor.size["height"], image_processor.size["width"])
    whole = square_boxes(side, side)
    # Whether pictures are cut at all is a default of the processor's class, which its image processor does not know.
    counts = processor._get_num_multimodal_tokens(image_sizes=list(images.sizes))["num_image_patches"]
    boxes = [whole] * len(counts)
    for i, (size, count) in enumerate(zip(images.sizes, counts, strict=True)):
        if count > 1:
            grid_width, grid_height = canvas(tuple(size), tile, image_processor.min_patches, image_processor.max_patches)
            boxes[i] = torch.cat([tiled_boxes(grid_height, grid_width, whole), whole])
    return boxes


def _internvl(images: ProcessedImages) -> list[torch.Tensor]:
    return _thumbnail_last(images, isqrt(images.processor.image_seq_length))


def _aya(images: ProcessedImages) -> list[torch.Tensor]:
    """The processor's patch_size is in pixels, after the vision tower's downsampling."""
    return _thumbnail_last(images, images.processor.img_size // images.processor.patch_size)


def _cohere(images: ProcessedImages) -> list[torch.Tensor]:
    """The processor's patch_size is in tokens, after the vision tower's downsampling."""
    return _thumbnail_last(images, images.processor.patch_size)


INTERNVL = Family(boxes=_internvl)
AYA = Family(boxes=_aya)
COHERE = Family(boxes=_cohere)


def _global_last(images: ProcessedImages) -> list[torch.Tensor]:
    """Tiles that the picture is stretched to fill, then the whole picture; only the latter (0 rows) if it is small."""
    side = isqrt(images.processor.image_seq_len)
    whole = square_boxes(side, side)
    boxes = []
    for size in images.sizes:
        _, grid_height, grid_width = images.processor.image_processor.get_number_of_image_patches(*size)
        boxes.append(torch.cat([tiled_boxes(grid_height, grid_width, whole), whole]) if grid_height else whole)
    return boxes


IDEFICS3 = Family(boxes=_global_last)


def _fitted(images: ProcessedImages) -> list[torch.Tensor]:
    """Llama 4: tiles that the picture is fitted into at the top left, then the whole picture, stretched, if there are two."""
    processor, image_processor = images.processor, images.processor.image_processor
    tile, largest = image_processor.size["height"], image_processor.resize_to_max_canvas
    canvases = layout_function(image_processor, "find_supported_resolutions")(
        max_num_chunks=image_processor.max_patches, patch_size=SizeDict(height=tile, width=tile)
    )
    side = isqrt((tile // processor.patch_size) ** 2 // processor.downsample_ratio)
    whole = square_boxes(side, side)
    boxes = []
    for size in images.sizes:
        canvas = layout_function(image_processor, "get_best_fit")(
            size, torch.tensor(canvases), resize_to_max_canvas=largest
        ).tolist()
        # A picture smaller than a tile grows to a tile at most.
        frame = canvas if largest else [min(max(a, tile), b) for a, b in zip(size, canvas, strict=True)]
        height, width = layout_function(image_processor, "get_max_res_without_distortion")(size, frame)
        grid_height, grid_width = canvas[0] // tile, canvas[1] // tile
        stretch = torch.tensor([canvas[0] / max(height, 1), canvas[1] / max(width, 1)]).repeat(2)
        tiles = shown_boxes(tiled_boxes(grid_height, grid_width, whole) * stretch)
        boxes.append(torch.cat([tiles, whole]) if grid_height * grid_width > 1 else tiles)
    return boxes


LLAMA4 = Family(boxes=_fitted)


def _source_first(images: ProcessedImages) -> list[torch.Tensor]:
    """MiniCPM-V 4.6: the whole picture, then its slices row by row; their patches are merged by 2 or 4 each way."""
    image_processor = images.processor.image_processor
    merge = 2 if image_processor.downsample_mode == "4x" else 4
    grids = [square_boxes(*shape) for shape in (torch.as_tensor(images.outputs["target_sizes"]) // merge).tolist()]
    boxes, start = [], 0
    for size in images.sizes:
        layout = None
        if image_processor.slice_mode:
            layout = image_processor.get_sliced_grid(size, image_processor.max_slice_nums, image_processor.scale_resolution)
        grid_height, grid_width = layout or (0, 0)
        slices = [tiled_boxes(grid_height, grid_width, grids[start + 1])] if layout else []  # all of one size
        boxes.append(torch.cat([grids[start], *slices]))
        start += 1 + grid_height * grid_width
    return boxes


MINICPMV = Family(boxes=_source_first)


def _own_sizes(images: ProcessedImages) -> list[torch.Tensor]:
    """LFM2-VL: a picture at nearly its own shape; a large one as tiles and then, if set so, the whole at that shape."""
    image_processor = images.processor.image_processor
    limits = {name: getattr(image_processor, name) for name in ("max_image_tokens", "encoder_patch_size", "downsample_factor")}
    pixels = image_processor.encoder_patch_size * image_processor.downsample_factor
    counts = {"min_tiles": image_processor.min_tiles, "max_tiles": image_processor.max_tiles}
    splits = image_processor.do_image_splitting and image_processor.max_tiles > 1
    tile = square_boxes(image_processor.tile_size // pixels, image_processor.tile_size // pixels)
    boxes = []
    for height, width in images.sizes:
        shown = image_processor.smart_resize(height, width, min_image_tokens=image_processor.min_image_tokens, **limits)
        image_boxes = [square_boxes(shown[1] // pixels, shown[0] // pixels)]
        tolerance = image_processor.max_pixels_tolerance
        if splits and image_processor._is_image_too_large(height, width, max_pixels_tolerance=tolerance, **limits):
            layout = image_processor._get_grid_layout(height, width, tile_size=image_processor.tile_size, **counts)
            grid_width, grid_height, *_ = layout
            image_boxes = [tiled_boxes(grid_height, grid_width, tile), *(image_boxes if image_processor.use_thumbnail else [])]
        boxes.append(torch.cat(image_boxes))
    return boxes


LFM2 = Family(boxes=_own_sizes)
