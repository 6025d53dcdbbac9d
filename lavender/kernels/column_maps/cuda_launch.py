"""`column_maps` in CUDA C++ (csrc/column_maps.cuh), for float16. Every output has one writer and every sum a fixed order."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..cuda import driver
from ..cuda.driver import LAYOUTS, Argument, Grid, Launch, Program, vectors
from ..grids import gradient_strides, head_parts, splits_for
from .op import ColumnGradients, ColumnKernels, column_maps_operation

TILES = LAYOUTS["column_maps"]


class _CudaColumns(ColumnKernels):
    """Launches of one call. Splits of the queries are added up by torch, in their order."""

    def _launch(self, kernel: str, grid: Grid, **arguments: Argument) -> None:
        program = Program("column_maps", self.width, vectors(self.width, self.query, self.key, self.value))
        query_b, query_h, query_i, _ = self.query.stride()
        key_b, key_h, key_n, _ = self.key.stride()
        value_b, value_h, value_n, _ = self.value.stride()
        bias_b, bias_h, bias_i, bias_n = self.bias_strides
        arguments |= {
            "query": self.query, "query_b": query_b, "query_h": query_h, "query_i": query_i,
            "key": self.key, "key_b": key_b, "key_h": key_h, "key_n": key_n,
            "value": self.value if self.value_width else None, "value_b": value_b, "value_h": value_h, "value_n": value_n,
            "bias": self.bias, "bias_b": bias_b, "bias_h": bias_h, "bias_i": bias_i, "bias_n": bias_n,
            "word_weights": self.word_weights, "head_weights": self.head_weights, "num_heads": self.heads,
            "num_queries": self.num_queries, "num_keys": self.num_keys, "num_words": self.num_words, "scale": self.scale,
        }  # fmt: skip
        driver.runner.launch(Launch(program, kernel, grid, arguments, self.device))

    @property
    def _row_blocks(self) -> int:
        return math.ceil(self.num_queries / TILES.rows_for(self.width))

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weighted = self.head_weights is not None
        parts, heads_per_part = head_parts(self.heads, self._row_blocks * self.batch, weighted, self.device)
        output = self._empty(self.batch, self.heads, self.num_queries, self.value_width, dtype=torch.float16)
        maps = torch.zeros(self.batch, parts, self.num_words, self.num_queries, device=self.device)
        lse = self._empty(self.batch, self.heads, self.num_queries)
        grid = (self._row_blocks, parts, self.batch)
        self._launch("column_maps", grid, output=output, maps=maps, lse=lse, heads_per_part=heads_per_part)
        return output, maps.sum(dim=1, keepdim=True) if weighted and parts > 1 else maps, lse

    def query_gradient(self, saved: ColumnGradients) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out = self._empty(self.batch, self.heads, self.num_queries, self.width, dtype=torch.float16)
        delta, head_delta = torch.empty_like(saved.lse), torch.empty_like(saved.lse)
        self._launch(
            "column_query_gradient", (self._row_blocks, self.batch * self.heads, 1), query_gradient=out, new_delta=delta,
            head_delta=head_delta, **self._saved(saved),
        )  # fmt: skip
        return out, delta, head_delta

    def key_gradient(self, saved: ColumnGradients, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key_blocks = math.ceil(self.num_keys / TILES.keys)
        splits = splits_for(key_blocks * self.batch * self.heads, math.ceil(self._row_blocks / 4), self.device)
        keys = self._empty(splits, self.batch, self.heads, self.num_keys, self.width)
        values = self._empty(splits, self.batch, self.heads, self.num_keys, self.value_width)
        self._launch(
            "column_key_gradient", (key_blocks, splits, self.batch * self.heads), delta=delta, key_partial=keys,
            value_partial=values, **self._saved(saved),
        )  # fmt: skip
        return keys.sum(dim=0).half(), values.sum(dim=0).half()

    def _saved(self, saved: ColumnGradients) -> dict[str, Any]:
        gradient_b, gradient_h = gradient_strides(saved.maps, self.heads)
        return {
            "lse": saved.lse, "gradient": saved.maps, "output_gradient": saved.output, "grad_scale": saved.grad_scale,
            "output_scale": saved.output_scale, "gradient_b": gradient_b, "gradient_h": gradient_h,
        }  # fmt: skip


column_maps_cuda = column_maps_operation("cuda", _CudaColumns)
