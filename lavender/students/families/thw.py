"""One lattice of merged patches per picture, whose rows and columns the processor reports: Qwen-VL, GLM-V and VideoLLaMA 3."""

from __future__ import annotations

import torch

from ..boxes import square_boxes
from . import Family, Pictures


def _merged(pictures: Pictures) -> list[torch.Tensor]:
    """The picture is stretched to whole merged patches, nothing is cut off or padded; towers that attend in windows of patches
    restore the order of rows."""
    grids = pictures.outputs["image_grid_thw"].tolist()
    # VideoLLaMA 3 merges pictures and videos differently and says so with every picture.
    merges = pictures.outputs.get("image_merge_sizes", [pictures.processor.image_processor.merge_size] * len(grids))
    return [
        square_boxes(rows // int(merge), columns // int(merge)) for (_, rows, columns), merge in zip(grids, merges, strict=True)
    ]


MERGED = Family(boxes=_merged)
