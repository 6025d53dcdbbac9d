"""Places of image tokens: one box per token in fractions of the picture, and word maps rasterized from them."""

from __future__ import annotations

from functools import cache

import torch

from ..types import Box


def square_boxes(height: int, width: int) -> torch.Tensor:
    """Boxes [height * width, 4] (top, left, bottom, right) of a grid over the whole picture, row by row; float32 on the CPU."""
    return _square_boxes(height, width).clone()


@cache
def _square_boxes(height: int, width: int) -> torch.Tensor:
    top = torch.arange(height, dtype=torch.float32, device="cpu").repeat_interleave(width) / height
    left = torch.arange(width, dtype=torch.float32, device="cpu").repeat(height) / width
    return torch.stack([top, left, top + 1 / height, left + 1 / width], dim=1)


def tiled_boxes(grid_height: int, grid_width: int, boxes: torch.Tensor) -> torch.Tensor:
    """Boxes [grid_height * grid_width * N, 4] of N boxes [N, 4] put into every tile of a grid, tile after tile, row by row."""
    corners = square_boxes(grid_height, grid_width)[:, :2].repeat(1, 2)
    return (corners[:, None] + boxes / torch.tensor([grid_height, grid_width]).repeat(2)).flatten(0, 1)


def shown_boxes(boxes: torch.Tensor) -> torch.Tensor:
    """Boxes cut at the picture's border; those that show only what is outside, padding, have no place."""
    inside = boxes.clamp(0, 1)
    empty = (inside[:, 2:] - inside[:, :2] < 1e-4).any(dim=1, keepdim=True)
    return inside.masked_fill(empty, torch.nan)


def unframed_boxes(boxes: torch.Tensor, frame: tuple[int, int], start: tuple[int, int], shown: tuple[int, int]) -> torch.Tensor:
    """Boxes of a frame as boxes of the picture in it.

    Args:
        boxes: [N, 4] in fractions of the frame.
        frame: height and width of the frame in pixels.
        start: top and left of the picture in it; negative where it is cropped.
        shown: height and width of the whole picture at the frame's scale.
    """
    sides, corner, inner = (torch.tensor(pair).repeat(2) for pair in (frame, start, shown))
    return (boxes * sides - corner) / inner


def boxes_within(boxes: torch.Tensor, crop: Box) -> torch.Tensor:
    """Boxes [N, 4] of a picture as boxes of a part of it; NaN where they are outside of that."""
    top, left, bottom, right = crop
    corner, sides = (torch.tensor(pair).repeat(2) for pair in ((top, left), (bottom - top, right - left)))
    return shown_boxes((boxes - corner) / sides)


def grid_of(boxes: torch.Tensor) -> tuple[int, int]:
    """Height and width of the grid that most boxes [..., M, 4] of an image stand on, the finest of a batch's images.

    Boxes of NaN have no place. Boxes at a padding's edge may be slivers, and a thumbnail's are large: neither decides.
    """
    images = boxes.reshape(-1, *boxes.shape[-2:])
    sizes = (images[..., 2:] - images[..., :2]).nanmedian(dim=1).values.nan_to_num(1.0).amin(dim=0)
    height, width = (1 / sizes).round().int().tolist()
    return height, width


def rasterize(maps: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Spreads each token's attention over the cells that its box covers, by shared area.

    Args:
        maps: [B, ..., M], attention per image token.
        boxes: [B, M, 4], fractions of the picture; boxes of NaN (padding, newline and class tokens) are left out.
        size: height y and width x of the grid.

    Returns:
        [B, ..., y, x], each token's attention divided among its cells: what lies inside the picture keeps its sum.
    """
    height, width = size
    boxes = boxes.to(maps.dtype)
    placed = ~boxes.isnan().any(dim=-1)
    top, left, bottom, right = boxes.nan_to_num(0.0).unbind(-1)
    tall, wide = (
        part / part.sum(dim=-1, keepdim=True).clamp_min(1e-6)
        for part in (_overlap(top, bottom, height) * placed[..., None], _overlap(left, right, width))
    )
    with torch.autocast(maps.device.type, enabled=False):
        flat = _Spread.apply(maps.flatten(1, -2), tall, wide)
    return flat.view(*maps.shape[:-1], height, width)


class _Spread(torch.autograd.Function):
    """Sum over m of A[b, k, m] tall[b, m, y] wide[b, m, x], as [B, K, y x]: the shares [M, y x] are made again for the gradient."""

    @staticmethod
    def forward(ctx, maps, tall, wide):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(tall, wide)
        return maps @ _shares(tall, wide)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient @ _shares(*ctx.saved_tensors).mT, None, None


def _shares(tall: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    return (tall[..., :, None] * wide[..., None, :]).flatten(2)


def _overlap(start: torch.Tensor, end: torch.Tensor, cells: int) -> torch.Tensor:
    """Length that [start, end) shares with each of `cells` equal parts of [0, 1], in cells: [..., cells]."""
    edges = torch.arange(cells, device=start.device, dtype=start.dtype)
    low = torch.maximum(start[..., None] * cells, edges)
    high = torch.minimum(end[..., None] * cells, edges + 1)
    overlap = (high - low).clamp_min(0)
    # Fractions like 1/3 are not exact: a sliver of rounding is not an overlap.
    return torch.where(overlap < 1e-4, 0, overlap)
