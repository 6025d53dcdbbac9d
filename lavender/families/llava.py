"""Llava and its like: one square lattice of image tokens, over the center crop of the processor's resized picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..boxes import square_boxes
from . import Family


def boxes(processor: Any, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Boxes of the patches, row by row. A center crop makes them cover the middle of the original picture only."""
    image_processor = processor.image_processor
    if image_processor.do_center_crop:
        height, width = image_processor.crop_size["height"], image_processor.crop_size["width"]
    else:
        height, width = image_processor.size["height"], image_processor.size["width"]
    lattice = square_boxes(height // processor.patch_size, width // processor.patch_size)
    return [_uncrop(lattice, size, image_processor) for size in sizes]


def _uncrop(lattice: torch.Tensor, size: tuple[int, int], image_processor: Any) -> torch.Tensor:
    shortest = image_processor.size.get("shortest_edge")
    if not image_processor.do_center_crop or shortest is None:
        return lattice
    scale = shortest / min(size)
    tall, wide = (round(side * scale) for side in size)
    crop = image_processor.crop_size
    # Share of the resized picture that the crop shows, and where it starts; both per axis.
    share = torch.tensor([crop["height"] / tall, crop["width"] / wide]).repeat(2)
    start = torch.tensor([(tall - crop["height"]) // 2 / tall, (wide - crop["width"]) // 2 / wide]).repeat(2)
    return lattice * share + start


FAMILY = Family(model_types=("llava",), boxes=boxes)
