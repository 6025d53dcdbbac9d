"""Few image tokens made of many patches by learned queries: the boxes are those of the patches, in the order of the keys."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ...errors import ConfigError
from ..boxes import square_boxes
from . import Family, ProcessedImages


def _modules(pattern: str) -> Callable[[nn.Module], list[nn.Module]]:
    """Finds the modules whose dotted name ends as the pattern says, in the model's order."""
    return partial(_named, pattern)


def _named(pattern: str, model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if re.search(rf"(^|\.){pattern}$", name)]


def _nowhere(count: int) -> torch.Tensor:
    return torch.full((count, 4), torch.nan)


def _perceiver(images: ProcessedImages) -> list[torch.Tensor]:
    """Idefics2: the patches of the largest picture of the batch, those beyond this picture left out, then the latents."""
    if images.processor.image_processor.do_image_splitting:
        raise ConfigError(
            "Idefics2 resamples each part of a split picture on its own, which lavender does not follow; set "
            "processor.image_processor.do_image_splitting = False"
        )
    patch = images.patch_size
    masks = torch.as_tensor(images.outputs["pixel_attention_mask"]).flatten(0, 1)
    boxes = []
    # Samples with fewer pictures are filled up with empty ones, which the model leaves out.
    for mask in masks[masks.any(dim=(1, 2))]:
        frame = torch.tensor(mask.shape)
        seen = torch.tensor([mask.any(dim=1).sum(), mask.any(dim=0).sum()])
        height, width = (frame // patch).tolist()
        grid = square_boxes(height, width) * (frame // patch * patch / seen).repeat(2)
        beyond = (grid > 1 + 1e-4).any(dim=1, keepdim=True)
        boxes.append(torch.cat([grid.masked_fill(beyond, torch.nan), _nowhere(images.processor.image_seq_len)]))
    return boxes


IDEFICS2 = Family(boxes=_perceiver, resamplers=_modules(r"perceiver_resampler\.layers\.\d+\.self_attn"), num_images=(1, 1))


def _class_first(images: ProcessedImages) -> list[torch.Tensor]:
    """BLIP-2: the class token, then the patches of the picture, which is stretched to a square."""
    size, patch = images.processor.image_processor.size, images.patch_size
    grid = torch.cat([_nowhere(1), square_boxes(size["height"] // patch, size["width"] // patch)])
    return [grid for _ in images.sizes]


BLIP2 = Family(
    boxes=_class_first, resamplers=_modules(r"qformer\.encoder\.layer\.\d+\.crossattention\.attention"), num_images=(1, 1)
)


def _own_sizes(images: ProcessedImages) -> list[torch.Tensor]:
    """MiniCPM-V up to 2.6: each picture's patches at its own shape, then padding up to the longest of the batch."""
    # A row per picture, or, in the model's own code, a tensor of rows per sample.
    shapes = torch.cat([torch.as_tensor(shapes).reshape(-1, 2) for shapes in images.outputs["tgt_sizes"]]).tolist()
    if len(shapes) != len(images.sizes):
        raise ConfigError(
            "MiniCPM-V resamples each slice of a picture on its own, which lavender does not follow; set "
            "processor.image_processor.slice_mode = False"
        )
    grids = [square_boxes(*shape) for shape in shapes]
    longest = max(map(len, grids))
    return [torch.cat([grid, _nowhere(longest - len(grid))]) for grid in grids]


MINICPMV = Family(boxes=_own_sizes, resamplers=_modules(r"resampler\.attn"), num_images=(1, 1))
