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
def load_tile(p, index, m, stride, WIDTH: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr):
    """Rows `index` of a matrix, columns START to START + SIZE; zeros beyond WIDTH and where the mask `m` is False."""
    column = START + tl.arange(0, SIZE)
    pointers = p + index[:, None] * stride + column[None, :]
    if START + SIZE <= WIDTH:
        return tl.load(pointers, mask=m[:, None], other=0.0)
    return tl.load(pointers, mask=m[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(p, index, m, stride, values, WIDTH: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr):
    """The counterpart of `load_tile`."""
    column = START + tl.arange(0, SIZE)
    pointers = p + index[:, None] * stride + column[None, :]
    tl.store(pointers, values.to(p.dtype.element_ty), mask=m[:, None] & (column < WIDTH)[None, :])


# A matrix as wide as a head is a pair of tiles, FIRST and SECOND wide. Where SECOND is zero nothing reads the second.


@triton.jit
def load_wide(p, index, m, stride, WIDTH: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Rows `index` of a matrix, as a pair."""
    first = load_tile(p, index, m, stride, WIDTH, 0, FIRST)
    second = first
    if SECOND > 0:
        second = load_tile(p, index, m, stride, WIDTH, FIRST, SECOND)
    return first, second


@triton.jit
def store_wide(p, index, m, stride, pair, factor, WIDTH: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Stores a pair, times a factor."""
    store_tile(p, index, m, stride, pair[0] * factor, WIDTH, 0, FIRST)
    if SECOND > 0:
        store_tile(p, index, m, stride, pair[1] * factor, WIDTH, FIRST, SECOND)


@triton.jit
def zeros_wide(ROWS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """A pair of float32 sums."""
    first = tl.zeros([ROWS, FIRST], tl.float32)
    second = first
    if SECOND > 0:
        second = tl.zeros([ROWS, SECOND], tl.float32)
    return first, second


@triton.jit
def dot_wide(left, right, SECOND: tl.constexpr):
    """left right^T of two pairs, summed over the width."""
    products = dot(left[0], tl.trans(right[0]))
    if SECOND > 0:
        products += dot(left[1], tl.trans(right[1]))
    return products


@triton.jit
def add_dot(sums, left, right, SECOND: tl.constexpr):
    """sums + left right: a pair, a tile, a pair."""
    first = sums[0] + dot(left, right[0])
    second = sums[1]
    if SECOND > 0:
        second += dot(left, right[1])
    return first, second


@triton.jit
def masked_scores(left, right, scale, p_bias, m, SECOND: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Scores of two pairs in base 2, with the bias at the tile of pointers `p_bias`; -inf where the mask `m` is False."""
    scores = dot_wide(left, right, SECOND) * (scale * LOG2E)
    if HAS_BIAS:
        scores += tl.load(p_bias, mask=m, other=0.0) * LOG2E
    return tl.where(m, scores, float("-inf"))


@triton.jit
def add_scores(row_max, total, scores):
    """A running softmax over rows of scores: their largest score so far, and the sum of exp2(score - row_max)."""
    higher = tl.maximum(row_max, tl.max(scores, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp2(row_max - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)


@triton.jit
def log_sum_exp(row_max, total):
    """Base-2 log-sum-exp of a running softmax, +inf where nothing was seen."""
    # Not `total > 0`: NaN stays NaN.
    return tl.where(total == 0, float("inf"), row_max + tl.log2(tl.where(total == 0, 1.0, total)))


@triton.jit
def split_bounds(split, num_splits, length, TILE: tl.constexpr):
    """Where a split of a loop over `length` in whole tiles begins and ends."""
    reach = tl.cdiv(tl.cdiv(length, TILE), num_splits) * TILE
    return split * reach, tl.minimum(length, (split + 1) * reach)
