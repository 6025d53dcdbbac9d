"""What the Triton kernels share: dot products that the interpreter gets right, tiles of any head width, and block sizes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .numerics import power_of_two

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
"""Kernels work in base 2: exp(x) = exp2(x * LOG2E)."""


SIZES = (
    "heads_per_part", "num_columns", "num_groups", "num_heads", "num_keys", "num_queries", "num_rows", "num_splits", "num_words",
    "size",
)  # fmt: skip
"""Arguments that Triton must not compile anew for: captions differ in length, and what was compiled in a test is what runs."""


@dataclass(frozen=True)
class Blocks:
    """Sizes of one kernel's tiles: rows and columns of the scores, warps, and stages of the loads' pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


Table = Mapping[int, Blocks]
"""Blocks by the largest padded head width that they serve."""


def blocks_for(table: Mapping[str, Table], device: torch.device, dtype: torch.dtype, width: int) -> Blocks:
    """The tuned blocks of a device's architecture (`sm80`, `sm90`), or the default ones; float32 has its own (`float32`)."""
    by_width = table["float32"] if dtype == torch.float32 else table.get(architecture(device), table["default"])
    return next(blocks for limit, blocks in sorted(by_width.items()) if width <= limit)


def architecture(device: torch.device) -> str:
    """`sm80`, `sm90`, ...; `cpu` under the interpreter."""
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def widths(width: int, dtype: torch.dtype) -> tuple[int, int]:
    """A width as one or two tiles, sizes that a dot product takes: 40 is 32 + 16, 80 is 64 + 16, 128 is 128 + 0.

    One tile, padded, in float32: there each product of tiles is three, and registers run out first.
    """
    first = power_of_two(width)
    if dtype == torch.float32 or first == width or width < 16:
        return first, 0
    return first // 2, power_of_two(width - first // 2)


@triton.jit
def dot(a, b):
    """Matrix product summed in float32; float32 operands as three tf32 products (about 1e-6)."""
    if INTERPRETED:  # its bfloat16 tiles are raw bits that only a cast understands
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def load_tile(base, index, valid, stride, WIDTH: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr):
    """Rows `index` of a matrix, columns START to START + SIZE; zeros beyond WIDTH and where a row is not valid."""
    column = START + tl.arange(0, SIZE)
    pointers = base + index[:, None] * stride + column[None, :]
    if START + SIZE <= WIDTH:
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    return tl.load(pointers, mask=valid[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(base, index, valid, stride, values, WIDTH: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr):
    """The counterpart of `load_tile`."""
    column = START + tl.arange(0, SIZE)
    pointers = base + index[:, None] * stride + column[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=valid[:, None] & (column < WIDTH)[None, :])
