"""One grid of merged patches per picture, whose height and width the processor reports: Qwen-VL, GLM-V and VideoLLaMA 3."""

from __future__ import annotations

import torch

from ..boxes import square_boxes
from . import Family, ProcessedImages


def _merged(images: ProcessedImages) -> list[torch.Tensor]:
    """The picture is stretched to whole merged patches, nothing is cut off or padded; towers that attend in windows of patches
    restore the order of rows."""
    grids = images.outputs["image_grid_thw"].tolist()
    # VideoLLaMA 3 merges pictures and videos differently and says so with every picture.
    merges = images.outputs.get("image_merge_sizes", [images.processor.image_processor.merge_size] * len(grids))
    return [
        square_boxes(height // int(merge), width // int(merge)) for (_, height, width), merge in zip(grids, merges, strict=True)
    ]


MERGED = Family(boxes=_merged)
