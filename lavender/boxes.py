"""Places of image tokens: one box per token in fractions of the picture, and word maps rasterized from them."""

from __future__ import annotations

from functools import cache

import torch


@cache
def square_boxes(height: int, width: int) -> torch.Tensor:
    """Boxes [height * width, 4] (top, left, bottom, right) of a lattice over the whole picture, row by row."""
    top = torch.arange(height).repeat_interleave(width) / height
    left = torch.arange(width).repeat(height) / width
    return torch.stack([top, left, top + 1 / height, left + 1 / width], dim=1)


def lattice_of(boxes: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the finest lattice that the boxes [..., 4] of a batch stand on; rows of NaN have no place."""
    known = boxes.reshape(-1, 4)
    known = known[~known.isnan().any(dim=1)]
    if not len(known):
        return 1, 1
    size = (known[:, 2:] - known[:, :2]).amin(dim=0)
    rows, columns = (1 / size).round().int().tolist()
    return rows, columns


def rasterize(maps: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Spreads each token's attention over the cells that its box covers, by shared area.

    Args:
        maps: [B, ..., M], attention per image token.
        boxes: [B, M, 4], fractions of the picture; rows of NaN (padding, newline and class tokens) are left out.
        size: rows y and columns x of the grid.

    Returns:
        [B, ..., y, x], each token's attention divided among its cells: what lies inside the picture keeps its sum.
    """
    rows, columns = size
    boxes = boxes.to(maps.dtype)
    placed = ~boxes.isnan().any(dim=-1)
    top, left, bottom, right = boxes.nan_to_num(0.0).unbind(-1)
    tall = _overlap(top, bottom, rows)
    wide = _overlap(left, right, columns)
    share = tall[..., :, None] * wide[..., None, :]
    share = share / share.sum(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    share = (share * placed[..., None, None]).flatten(2)
    flat = maps.flatten(1, -2) @ share
    return flat.view(*maps.shape[:-1], rows, columns)


def _overlap(start: torch.Tensor, end: torch.Tensor, cells: int) -> torch.Tensor:
    """Length that [start, end) shares with each of `cells` equal parts of [0, 1], in cells: [..., cells]."""
    edges = torch.arange(cells, device=start.device, dtype=start.dtype)
    low = torch.maximum(start[..., None] * cells, edges)
    high = torch.minimum(end[..., None] * cells, edges + 1)
    overlap = (high - low).clamp_min(0)
    # Fractions like 1/3 are not exact: a sliver of rounding is not an overlap.
    return torch.where(overlap < 1e-4, 0, overlap)
