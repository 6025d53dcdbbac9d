"""One checked call of `map_loss`: the value that every implementation takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..numerics import accumulator
from .normalization import resample


@dataclass(frozen=True, eq=False)
class LossCall:
    """The tensors and choices of one call.

    Attributes:
        student: [B, W, y, x].
        target: [B, W, y', x']; anything, NaN included, where `present` is False.
        present: bool [B, W].
        normalization: one of `NORMALIZATIONS`.
        distance: one of `DISTANCES`.
    """

    student: torch.Tensor
    target: torch.Tensor
    present: torch.Tensor
    normalization: str
    distance: str

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """R_y [y', y] and R_x [x', x] of the resampling, by resampling unit vectors; None for equal grids."""
        if self.student.shape == self.target.shape:
            return None
        dtype, device = accumulator(self.student), self.student.device
        y_matrix, x_matrix = (
            resample(torch.eye(old, dtype=dtype, device=device)[None, None], (new, old))[0, 0]
            for old, new in zip(self.student.shape[2:], self.target.shape[2:], strict=True)
        )
        return y_matrix, x_matrix
