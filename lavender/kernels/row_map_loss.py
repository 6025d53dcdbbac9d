r"""From queries and keys to the alignment loss in one call, for maps that no aligner stands behind.

    A[b,w] = M * sum over heads of a[h] * word map of head h (`row_maps`),    loss = `map_loss`(A on its grid, targets)

Composed of those two operations. Between forward and backward they keep the inputs, the word rows' log-sum-exp and the
gradient by A, [B, W, M], which `map_loss` has written in the forward pass: nothing of size [B, H, T, N], and no map per head.
"""

from __future__ import annotations

import torch

from ..errors import ConfigError
from ..types import WordRows
from .checks import require_attention, require_tensors
from .map_loss import map_loss
from .numerics import accumulator
from .row_maps import row_maps


def row_map_loss(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: WordRows,
    columns: torch.Tensor,
    grid: tuple[int, int],
    target: torch.Tensor,
    present: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    renormalize: bool = False,
    head_weights: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    normalization: str = "zscore",
    distance: str = "mse",
    reduction: str = "mean",
    impl: str = "auto",
) -> torch.Tensor:
    """The loss between word maps, read straight from queries and keys, and their targets; differentiable in both.

    Args:
        columns: int64 [B, M] with M = y * x, the picture's keys in reading order on `grid`.
        grid: (y, x).
        target: [B, W, y', x'] with W = `rows.num_words`; maps are resampled to its grid.
        present: bool [B, W].
        head_weights: floating point [H]; None is the mean over heads.
        impl: as in `row_maps`; `map_loss` runs by the same one, and in Triton takes maps of up to 64 x 64. There is none in CUDA
            C++: with `"cuda"` it chooses for itself.

    See `row_maps` and `map_loss` for the others and for the result. Maps are multiplied by M first: attention sums to at most one
    over the picture, and so no epsilon of a normalization dominates them.

    Raises:
        ConfigError: `grid` has not M places, or as the two operations do.
    """
    require_tensors(query=query, columns=columns)
    if len(grid) != 2 or min(grid) < 1 or columns.ndim != 2:
        raise ConfigError(f"grid is {grid} and columns {tuple(columns.shape)}; expected (y, x) and [B, y * x]")
    if target.shape[:2] != (len(columns), rows.num_words):
        raise ConfigError(f"target {tuple(target.shape)} does not fit; expected [{len(columns)}, {rows.num_words}, y', x']")
    if grid[0] * grid[1] != columns.shape[1]:
        raise ConfigError(f"grid {grid[0]} x {grid[1]} has not the {columns.shape[1]} places of columns {tuple(columns.shape)}")
    require_attention(query, key)
    if head_weights is None:
        head_weights = query.new_full((query.shape[1],), 1 / query.shape[1], dtype=accumulator(query))
    maps = row_maps(
        query,
        key,
        rows,
        columns,
        mask=mask,
        causal=causal,
        scale=scale,
        renormalize=renormalize,
        head_weights=head_weights,
        lse=lse,
        impl=impl,
    )
    maps = (maps[:, 0] * columns.shape[1]).unflatten(-1, grid)
    impl = "auto" if impl == "cuda" else impl
    return map_loss(maps, target, present, normalization=normalization, distance=distance, reduction=reduction, impl=impl)
