"""`row_maps` in CUDA C++ (csrc/row_maps.cuh), for float16. Every output has one writer and every sum a fixed order."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..cuda import driver
from ..cuda.driver import LAYOUTS, Argument, Grid, Launch, Program, vectors
from ..grids import gradient_strides, head_parts, splits_for
from .op import RowGradients, RowKernels, row_maps_operation

TILES = LAYOUTS["row_maps"]


class _CudaRows(RowKernels):
    """Launches of one call. Splits of the keys are added up by torch, in their order."""

    def _launch(self, kernel: str, grid: Grid, shares_memory: bool = True, **arguments: Argument) -> None:
        program = Program("row_maps", self.width, vectors(self.width, self.query, self.key))
        query_b, query_h, query_t, _ = self.query.stride()
        key_b, key_g, key_n, _ = self.key.stride()
        bias_b, bias_h, bias_r, bias_n = self.bias_strides
        arguments |= {
            "query": self.query, "query_b": query_b, "query_h": query_h, "query_t": query_t,
            "key": self.key, "key_b": key_b, "key_g": key_g, "key_n": key_n,
            "bias": self.bias, "bias_b": bias_b, "bias_h": bias_h, "bias_r": bias_r, "bias_n": bias_n,
            "rows": self.rows, "words": self.words, "weights": self.weights, "columns": self.columns,
            "num_heads": self.heads, "num_groups": self.groups, "num_queries": self.num_queries, "num_rows": self.num_rows,
            "num_keys": self.num_keys, "num_columns": self.num_columns, "num_words": self.num_words, "causal": self.causal,
            "head_weights": self.head_weights, "scale": self.scale,
        }  # fmt: skip
        driver.runner.launch(Launch(program, kernel, grid, arguments, self.device, shares_memory))

    def _walk(self, length: int) -> Grid:
        """Blocks of a kernel that walks stacked rows along `length` keys or columns: splits, row blocks, B * G."""
        row_blocks = math.ceil(self.heads // self.groups * self.num_rows / TILES.rows_for(self.width))
        blocks = row_blocks * self.batch * self.groups
        return splits_for(blocks, math.ceil(length / (4 * TILES.keys)), self.device), row_blocks, self.batch * self.groups

    def _partial(self, grid: Grid, *width: int) -> torch.Tensor:
        return self.weights.new_empty(grid[0], self.batch, self.heads, self.num_rows, *width)

    def lse(self) -> torch.Tensor:
        grid = self._walk(self.num_keys)
        partial = self._partial(grid)
        self._launch("row_lse", grid, partial=partial)
        lse = partial[0] if grid[0] == 1 else torch.logsumexp(partial * math.log(2), dim=0) / math.log(2)
        return lse.masked_fill(lse == -torch.inf, torch.inf)

    def maps(self, lse: torch.Tensor) -> torch.Tensor:
        tiles, weighted = math.ceil(self.num_columns / TILES.keys), self.head_weights is not None
        parts, heads_per_part = head_parts(self.heads, tiles * self.batch, weighted, self.device)
        maps = torch.zeros(self.batch, parts, self.num_words, self.num_columns, device=self.device)
        self._launch("row_word_maps", (tiles, parts, self.batch), lse=lse, maps=maps, heads_per_part=heads_per_part)
        return maps.sum(dim=1, keepdim=True) if weighted and parts > 1 else maps

    def delta(self, lse: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        grid = self._walk(self.num_columns)
        partial = self._partial(grid)
        self._launch("row_delta", grid, lse=lse, partial=partial, **self._gradient(gradient))
        return partial.sum(dim=0)

    def query_gradient(self, saved: RowGradients) -> torch.Tensor:
        grid = self._walk(self.num_keys)
        partial = self._partial(grid, self.width)
        self._launch("row_query_gradient", grid, partial=partial, **self._saved(saved))
        out = torch.zeros(self.query.shape, dtype=torch.float16, device=self.device)
        sums = (self.num_rows, self.batch * self.heads, 1)
        self._launch(
            "row_sum", sums, shares_memory=False, partial=partial, grad_scale=saved.grad_scale, out=out, num_splits=grid[0]
        )
        return out

    def key_gradient(self, saved: RowGradients) -> torch.Tensor:
        out = torch.empty(self.key.shape, dtype=torch.float16, device=self.device)
        grid = (math.ceil(self.num_keys / TILES.keys), self.batch * self.groups, 1)
        self._launch("row_key_gradient", grid, out=out, grad_scale=saved.grad_scale, **self._saved(saved))
        return out

    def _saved(self, saved: RowGradients) -> dict[str, Any]:
        return {"lse": saved.lse, "delta": saved.delta, **self._gradient(saved.full)}

    def _gradient(self, gradient: torch.Tensor) -> dict[str, Any]:
        gradient_b, gradient_h = gradient_strides(gradient, self.heads)
        return {"gradient": gradient, "gradient_b": gradient_b, "gradient_h": gradient_h}


row_maps_cuda = row_maps_operation("cuda", _CudaRows)
