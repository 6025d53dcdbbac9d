"""One grid of patches per picture, whose size in pixels the processor reports: Pixtral and Mistral 3."""

from __future__ import annotations

import torch

from ..boxes import square_boxes
from . import Family, ProcessedImages


def _resized(images: ProcessedImages) -> list[torch.Tensor]:
    """The picture is stretched to whole patches. The tokens that end a row have an id of their own: they are no image tokens."""
    patch = images.processor.patch_size * images.processor.spatial_merge_size
    return [square_boxes(height // patch, width // patch) for height, width in images.outputs["image_sizes"].tolist()]


RESIZED = Family(boxes=_resized)
