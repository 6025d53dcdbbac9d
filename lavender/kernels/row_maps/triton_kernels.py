"""`row_maps` in Triton. Every output has one writer and every sum a fixed order: results are bitwise deterministic.

Word rows are read through their indices; nothing is gathered first. Where a kernel walks along the keys, the rows of all heads
that share a key head are stacked into one tile (stacked row s is row s % R of the group's head s // R), so that each key is
loaded once for them; the keys are split over programs, and a second, small kernel adds the parts up.
"""

# Triton's kernels take long lists of sizes and strides.
# fmt: off

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..grids import gradient_strides, head_parts, splits_for
from ..numerics import power_of_two

from ..tiles import (  # isort: skip
    SIZES, Blocks, Table, add_dot, add_scores, blocks_for, dot, load_wide, log_sum_exp, masked_scores, split_bounds, store_wide,
    widths, zeros_wide,
)
from .call import RowCall
from .op import RowGradients, RowKernels, row_maps_operation

# Chosen by compiling for sm_80, sm_90 and sm_100 without spills (tests/kernels/test_compile_budget.py); not timed yet.
LSE_BLOCKS = {
    "default": {128: Blocks(64, 64, 4, 2), 256: Blocks(64, 32, 4, 2)},
    "float32": {128: Blocks(16, 32, 8, 1)},
}
MAPS_BLOCKS = {
    "default": {64: Blocks(64, 64, 8, 2), 96: Blocks(32, 32, 4, 2), 128: Blocks(32, 64, 8, 2), 256: Blocks(32, 32, 4, 2)},
    "sm100": {64: Blocks(64, 64, 8, 2), 96: Blocks(32, 32, 4, 2), 128: Blocks(32, 64, 8, 2), 256: Blocks(32, 32, 4, 1)},
    "float32": {128: Blocks(16, 32, 4, 1)},
}
DELTA_BLOCKS = {
    "default": {64: Blocks(64, 64, 4, 2), 128: Blocks(32, 64, 4, 2), 256: Blocks(32, 32, 8, 2)},
    "sm100": {64: Blocks(64, 64, 8, 2), 128: Blocks(32, 64, 4, 2), 256: Blocks(32, 32, 8, 2)},
    "float32": {128: Blocks(16, 32, 8, 1)},
}
BWD_DQ_BLOCKS = {
    "default": {64: Blocks(64, 64, 8, 2), 96: Blocks(64, 32, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(32, 32, 4, 1)},
    "sm100": {64: Blocks(64, 64, 4, 2), 96: Blocks(64, 32, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(32, 32, 4, 1)},
    "float32": {128: Blocks(16, 32, 8, 1)},
}
BWD_DK_BLOCKS = {
    "default": {128: Blocks(32, 64, 4, 2), 256: Blocks(32, 32, 8, 2)},
    "float32": {128: Blocks(16, 16, 8, 1)},
}
WORD_BLOCK = 64
"""Most words of one program's map."""


@triton.jit
def _load_stacked(
    p_q, p_rows, b, g, block, stride_qb, stride_qh, stride_qt, num_rows,
    UNIT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr,
):
    """One tile of a key head's stacked rows: queries, heads, numbers among the R, query rows (padding: 0), and which exist."""
    stacked = block * ROWS + tl.arange(0, ROWS)
    m_rows = stacked < GROUP * num_rows
    h, r = g * GROUP + stacked // num_rows, stacked % num_rows
    row = tl.maximum(tl.load(p_rows + b * num_rows + r, mask=m_rows, other=0).to(tl.int32), 0)
    b_q = load_wide(p_q + b * stride_qb * UNIT, (h * stride_qh + row * stride_qt) * UNIT, m_rows, 1, D, FIRST, SECOND)
    return b_q, h, r, row, m_rows


@triton.jit
def _load_scores(
    b_q, row, m_rows, p_k, p_bias, bias_row, key, m_keys, stride_kn, bias_n, scale,
    UNIT: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr,
):
    """One tile of keys, its scores [rows, keys], and where rows see keys; `bias_row` is where a row's bias begins."""
    b_k = load_wide(p_k, key, m_keys, stride_kn * UNIT, D, FIRST, SECOND)
    m_seen = m_rows[:, None] & m_keys[None, :]
    if CAUSAL:
        m_seen = m_seen & (key[None, :] <= row[:, None])
    p_bias += bias_row[:, None] + key[None, :] * bias_n
    return b_k, masked_scores(b_q, b_k, scale, p_bias, m_seen, SECOND, HAS_BIAS), m_seen


@triton.jit
def _load_columns(p_columns, b, start, num_columns, KEYS: tl.constexpr):
    """One tile of columns: their numbers, keys (padding: 0), and which exist."""
    m = start + tl.arange(0, KEYS)
    key = tl.load(p_columns + b * num_columns + m, mask=m < num_columns, other=-1).to(tl.int32)
    return m, tl.maximum(key, 0), key >= 0


@triton.jit(do_not_specialize=SIZES)
def _lse_kernel(
    p_q, p_k, p_rows, p_bias, p_partial,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_kn, bias_b, bias_h, bias_r, bias_n,
    num_groups, num_rows, num_keys, scale,
    UNIT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """Base-2 log-sum-exp of rows over one split of the keys, partial[split, b, h, r]; +inf where nothing is seen."""
    split = tl.program_id(0)
    b, g = (tl.program_id(2) // num_groups).to(tl.int64), tl.program_id(2) % num_groups
    b_q, h, r, row, m_rows = _load_stacked(
        p_q, p_rows, b, g, tl.program_id(1), stride_qb, stride_qh, stride_qt, num_rows, UNIT, GROUP, D, FIRST, SECOND, ROWS
    )
    p_bias += b * bias_b
    p_k += (b * stride_kb + g * stride_kg) * UNIT
    bias_row = h * bias_h + r * bias_r

    first, stop = split_bounds(split, tl.num_programs(0), num_keys, KEYS)
    if CAUSAL:
        stop = tl.minimum(stop, tl.max(row) + 1)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(first, stop, KEYS):
        key = start + tl.arange(0, KEYS)
        _, scores, _ = _load_scores(
            b_q, row, m_rows, p_k, p_bias, bias_row, key, key < num_keys, stride_kn, bias_n, scale,
            UNIT, D, FIRST, SECOND, CAUSAL, HAS_BIAS,
        )
        row_max, total = add_scores(row_max, total, scores)
    num_samples = tl.num_programs(2) // num_groups
    p_out = p_partial + ((split * num_samples + b) * num_groups * GROUP + h) * num_rows + r
    tl.store(p_out, log_sum_exp(row_max, total), mask=m_rows)


@triton.jit(do_not_specialize=SIZES)
def _combine_lse_kernel(p_partial, p_lse, num_splits, size, BLOCK: tl.constexpr):
    """Log-sum-exp over the splits, +inf where no split saw anything."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_place = place < size
    row_max = tl.full([BLOCK], float("-inf"), tl.float32)
    for split in range(num_splits):
        value = tl.load(p_partial + split * size + place, mask=m_place, other=float("inf"))
        row_max = tl.maximum(row_max, tl.where(value == float("inf"), float("-inf"), value))
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):
        value = tl.load(p_partial + split * size + place, mask=m_place, other=float("inf"))
        total += tl.where(value == float("inf"), 0.0, tl.exp2(value - row_max))
    tl.store(p_lse + place, tl.where(total == 0, float("inf"), row_max + tl.log2(total)), mask=m_place)


@triton.jit(do_not_specialize=SIZES)
def _maps_kernel(
    p_q, p_k, p_rows, p_words, p_weights, p_columns, p_bias, p_lse, p_head_weights, p_out,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_kn, bias_b, bias_h, bias_r, bias_n,
    num_heads, num_rows, num_words, num_columns, heads_per_part, scale,
    UNIT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    WORDS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """out[b, part, w, m]: the sum over a part's heads and a word's rows, for one tile of columns."""
    blocks = tl.cdiv(num_columns, KEYS)
    part, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    m, key, m_keys = _load_columns(p_columns, b, (tl.program_id(0) % blocks) * KEYS, num_columns, KEYS)
    w = (tl.program_id(0) // blocks) * WORDS + tl.arange(0, WORDS)
    maps = tl.zeros([WORDS, KEYS], tl.float32)
    p_bias += b * bias_b
    for first_row in range(0, num_rows, ROWS):
        r = first_row + tl.arange(0, ROWS)
        m_rows = r < num_rows
        row = tl.maximum(tl.load(p_rows + b * num_rows + r, mask=m_rows, other=0).to(tl.int32), 0)
        shares = tl.zeros([ROWS, KEYS], tl.float32)
        for h in range(part * heads_per_part, tl.minimum((part + 1) * heads_per_part, num_heads)):
            p_q_head = p_q + (b * stride_qb + h * stride_qh) * UNIT
            p_k_head = p_k + (b * stride_kb + (h // GROUP) * stride_kg) * UNIT
            b_q = load_wide(p_q_head, row, m_rows, stride_qt * UNIT, D, FIRST, SECOND)
            _, scores, _ = _load_scores(
                b_q, row, m_rows, p_k_head, p_bias, h * bias_h + r * bias_r, key, m_keys, stride_kn, bias_n, scale,
                UNIT, D, FIRST, SECOND, CAUSAL, HAS_BIAS,
            )
            lse = tl.load(p_lse + (b * num_heads + h) * num_rows + r, mask=m_rows, other=float("inf"))
            probabilities = tl.exp2(scores - lse[:, None])
            if WEIGHTED:
                probabilities *= tl.load(p_head_weights + h)
            shares += probabilities
        word = tl.load(p_words + b * num_rows + r, mask=m_rows, other=-1).to(tl.int32)
        weight = tl.load(p_weights + b * num_rows + r, mask=m_rows, other=0.0)
        belongs = (w[:, None] == word[None, :]).to(tl.float32)
        maps += dot(belongs, shares * weight[:, None])
    place = ((b * tl.num_programs(1) + part) * num_words + w[:, None]) * num_columns + m[None, :]
    tl.store(p_out + place, maps, mask=(w < num_words)[:, None] & (m < num_columns)[None, :])


@triton.jit(do_not_specialize=SIZES)
def _delta_kernel(
    p_q, p_k, p_rows, p_words, p_weights, p_columns, p_bias, p_lse, p_gradient, p_partial,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_kn, bias_b, bias_h, bias_r, bias_n, gradient_b, gradient_h,
    num_groups, num_rows, num_columns, scale,
    UNIT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """partial[split, b, h, r]: the sum over one split of the columns of P Ghat, the head's weight left out."""
    split = tl.program_id(0)
    b, g = (tl.program_id(2) // num_groups).to(tl.int64), tl.program_id(2) % num_groups
    b_q, h, r, row, m_rows = _load_stacked(
        p_q, p_rows, b, g, tl.program_id(1), stride_qb, stride_qh, stride_qt, num_rows, UNIT, GROUP, D, FIRST, SECOND, ROWS
    )
    p_bias += b * bias_b
    p_k += (b * stride_kb + g * stride_kg) * UNIT
    bias_row = h * bias_h + r * bias_r
    word = tl.load(p_words + b * num_rows + r, mask=m_rows, other=-1).to(tl.int32)
    weight = tl.load(p_weights + b * num_rows + r, mask=m_rows, other=0.0)
    p_gradient += b * gradient_b
    gradient_row = h * gradient_h + word * num_columns
    lse = tl.load(p_lse + (b * num_groups * GROUP + h) * num_rows + r, mask=m_rows, other=float("inf"))

    first, stop = split_bounds(split, tl.num_programs(0), num_columns, KEYS)
    delta = tl.zeros([ROWS], tl.float32)
    for start in range(first, stop, KEYS):
        m, key, m_keys = _load_columns(p_columns, b, start, num_columns, KEYS)
        _, scores, m_seen = _load_scores(
            b_q, row, m_rows, p_k, p_bias, bias_row, key, m_keys, stride_kn, bias_n, scale,
            UNIT, D, FIRST, SECOND, CAUSAL, HAS_BIAS,
        )
        m_word = m_seen & (word >= 0)[:, None]
        wanted = tl.load(p_gradient + (gradient_row[:, None] + m[None, :]), mask=m_word, other=0.0)
        delta += tl.sum(tl.exp2(scores - lse[:, None]) * wanted, 1)
    num_samples = tl.num_programs(2) // num_groups
    p_out = p_partial + ((split * num_samples + b) * num_groups * GROUP + h) * num_rows + r
    tl.store(p_out, delta * weight, mask=m_rows)


@triton.jit(do_not_specialize=SIZES)
def _bwd_dq_kernel(
    p_q, p_k, p_rows, p_words, p_weights, p_bias, p_lse, p_delta, p_head_weights, p_full, p_partial,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_kn, bias_b, bias_h, bias_r, bias_n, full_b, full_h,
    num_groups, num_rows, num_keys, scale,
    UNIT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """partial[split, b, h, r, :]: the sum over one split of the keys of dS k, the softmax scale left out."""
    split = tl.program_id(0)
    b, g = (tl.program_id(2) // num_groups).to(tl.int64), tl.program_id(2) % num_groups
    b_q, h, r, row, m_rows = _load_stacked(
        p_q, p_rows, b, g, tl.program_id(1), stride_qb, stride_qh, stride_qt, num_rows, UNIT, GROUP, D, FIRST, SECOND, ROWS
    )
    p_bias += b * bias_b
    p_k += (b * stride_kb + g * stride_kg) * UNIT
    bias_row = h * bias_h + r * bias_r
    word = tl.load(p_words + b * num_rows + r, mask=m_rows, other=-1).to(tl.int32)
    weight = tl.load(p_weights + b * num_rows + r, mask=m_rows, other=0.0)
    p_full += b * full_b
    full_row = h * full_h + word * num_keys
    index = (b * num_groups * GROUP + h) * num_rows + r
    lse = tl.load(p_lse + index, mask=m_rows, other=float("inf"))
    delta = tl.load(p_delta + index, mask=m_rows, other=0.0)

    first, stop = split_bounds(split, tl.num_programs(0), num_keys, KEYS)
    if CAUSAL:
        stop = tl.minimum(stop, tl.max(row) + 1)
    sums = zeros_wide(ROWS, FIRST, SECOND)
    for start in range(first, stop, KEYS):
        key = start + tl.arange(0, KEYS)
        b_k, scores, m_seen = _load_scores(
            b_q, row, m_rows, p_k, p_bias, bias_row, key, key < num_keys, stride_kn, bias_n, scale,
            UNIT, D, FIRST, SECOND, CAUSAL, HAS_BIAS,
        )
        m_word = m_seen & (word >= 0)[:, None]
        wanted = tl.load(p_full + (full_row[:, None] + key[None, :]), mask=m_word, other=0.0)
        dscores = tl.exp2(scores - lse[:, None]) * (wanted * weight[:, None] - delta[:, None])
        sums = add_dot(sums, dscores.to(b_k[0].dtype), b_k, SECOND)
    num_samples = tl.num_programs(2) // num_groups
    place = (split * num_samples * num_groups * GROUP * num_rows + index) * D
    factor = 1.0
    if WEIGHTED:
        factor = tl.load(p_head_weights + h, mask=m_rows, other=0.0)[:, None]
    store_wide(p_partial, place, m_rows, 1, sums, factor, D, FIRST, SECOND)


@triton.jit(do_not_specialize=SIZES)
def _add_rows_kernel(
    p_partial, p_rows, p_grad_scale, p_out,
    out_b, out_h, out_row, num_heads, num_rows, num_splits, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, RESCALED: tl.constexpr, BLOCK: tl.constexpr,
):
    """out[b, h, rows[r]]: the parts of every entry that names this row, added up; such entries all write the same value."""
    b, h = (tl.program_id(1) // num_heads).to(tl.int64), tl.program_id(1) % num_heads
    row = tl.load(p_rows + b * num_rows + tl.program_id(0))
    d = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    num_samples = tl.num_programs(1) // num_heads
    for first in range(0, num_rows, BLOCK):
        r = first + tl.arange(0, BLOCK)
        same = tl.load(p_rows + b * num_rows + r, mask=r < num_rows, other=-1) == row
        for split in range(num_splits):
            place = (((split * num_samples + b) * num_heads + h) * num_rows + r) * D
            m_same = (same & (r < num_rows))[:, None] & (d < D)[None, :]
            total += tl.sum(tl.load(p_partial + place[:, None] + d[None, :], mask=m_same, other=0.0), 0)
    total *= scale
    if RESCALED:
        total *= tl.load(p_grad_scale)
    if row >= 0:
        tl.store(p_out + b * out_b + h * out_h + row * out_row + d, total.to(p_out.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=SIZES)
def _bwd_dk_kernel(
    p_q, p_k, p_rows, p_words, p_weights, p_bias, p_lse, p_delta, p_head_weights, p_full, p_grad_scale, p_out,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_kn, bias_b, bias_h, bias_r, bias_n, full_b, full_h,
    num_groups, num_rows, num_keys, scale,
    UNIT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, RESCALED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """out[b, g, n, :], contiguous: scale dS^T q over the group's heads. Scores are [keys, rows] here: dS is a left operand."""
    b, g = (tl.program_id(1) // num_groups).to(tl.int64), tl.program_id(1) % num_groups
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    m_keys = key < num_keys
    p_bias += b * bias_b
    p_full += b * full_b
    p_k += (b * stride_kb + g * stride_kg) * UNIT
    b_k = load_wide(p_k, key, m_keys, stride_kn * UNIT, D, FIRST, SECOND)
    sums = zeros_wide(KEYS, FIRST, SECOND)
    for block in range(tl.cdiv(GROUP * num_rows, ROWS)):
        b_q, h, r, row, m_rows = _load_stacked(
            p_q, p_rows, b, g, block, stride_qb, stride_qh, stride_qt, num_rows, UNIT, GROUP, D, FIRST, SECOND, ROWS
        )
        m_seen = m_keys[:, None] & m_rows[None, :]
        if CAUSAL:
            m_seen = m_seen & (key[:, None] <= row[None, :])
        bias_row = h * bias_h + r * bias_r
        scores = masked_scores(
            b_k, b_q, scale, p_bias + (bias_row[None, :] + key[:, None] * bias_n), m_seen, SECOND, HAS_BIAS
        )
        index = (b * num_groups * GROUP + h) * num_rows + r
        lse = tl.load(p_lse + index, mask=m_rows, other=float("inf"))
        delta = tl.load(p_delta + index, mask=m_rows, other=0.0)
        word = tl.load(p_words + b * num_rows + r, mask=m_rows, other=-1).to(tl.int32)
        weight = tl.load(p_weights + b * num_rows + r, mask=m_rows, other=0.0)
        full_row = h * full_h + word * num_keys
        wanted = tl.load(p_full + (full_row[None, :] + key[:, None]), mask=m_seen & (word >= 0)[None, :], other=0.0)
        dscores = tl.exp2(scores - lse[None, :]) * (wanted * weight[None, :] - delta[None, :])
        if WEIGHTED:
            dscores *= tl.load(p_head_weights + h, mask=m_rows, other=0.0)[None, :]
        sums = add_dot(sums, dscores.to(b_k[0].dtype), b_q, SECOND)
    factor = scale
    if RESCALED:
        factor *= tl.load(p_grad_scale)
    place = ((b * num_groups + g) * num_keys + key) * D
    store_wide(p_out, place, m_keys, 1, sums, factor, D, FIRST, SECOND)


# fmt: on


class _TritonRows(RowKernels):
    """The launches in Triton. A kernel that reads no bias, head weights or scale gets some other tensor in its place."""

    def __init__(self, call: RowCall) -> None:
        super().__init__(call)
        self.bias_or_other = self.query if self.bias is None else self.bias
        self.head_weights_or_other = self.weights if self.head_weights is None else self.head_weights
        strides = (*self.query.stride()[:3], *self.key.stride()[:3])
        # In units of eight elements, where they divide: so the compiler knows that whole vectors can be loaded.
        unit = next(n for n in (8, 4, 2, 1) if not any(stride % n for stride in strides))
        self.strides = (*(stride // unit for stride in strides), *self.bias_strides)
        first, second = widths(self.width, self.query.dtype)
        self.constants = {
            "UNIT": unit,
            "GROUP": self.heads // self.groups,
            "D": self.width,
            "FIRST": first,
            "SECOND": second,
            "CAUSAL": self.causal,
            "HAS_BIAS": self.bias is not None,
        }

    def blocks(self, table: Mapping[str, Table], num_rows: int) -> tuple[Blocks, dict[str, int]]:
        """A kernel's blocks, and the launch options they mean; tiles are no taller than the rows there are."""
        blocks = blocks_for(table, self.device, self.query.dtype, self.width)
        blocks = replace(blocks, rows=min(blocks.rows, power_of_two(num_rows)))
        return blocks, {"ROWS": blocks.rows, "KEYS": blocks.columns, "num_warps": blocks.warps, "num_stages": blocks.stages}

    def walk(self, table: Mapping[str, Table], length: int) -> tuple[tuple[int, int, int], dict[str, int]]:
        """Grid (splits, row blocks, B * G) and options of a kernel that walks stacked rows along `length` keys or columns."""
        stacked = self.heads // self.groups * self.num_rows
        blocks, options = self.blocks(table, stacked)
        row_blocks = triton.cdiv(stacked, blocks.rows)
        splits = splits_for(row_blocks * self.batch * self.groups, triton.cdiv(length, 4 * blocks.columns), self.device)
        return (splits, row_blocks, self.batch * self.groups), options

    def lse(self) -> torch.Tensor:
        grid, options = self.walk(LSE_BLOCKS, self.num_keys)
        partial = self.rows.new_empty(grid[0], self.batch, self.heads, self.num_rows, dtype=torch.float32)
        _lse_kernel[grid](
            self.query, self.key, self.rows, self.bias_or_other, partial,
            *self.strides, self.groups, self.num_rows, self.num_keys, self.scale, **self.constants, **options,
        )  # fmt: skip
        if grid[0] == 1:
            return partial[0]
        lse = torch.empty_like(partial[0])
        _combine_lse_kernel[(triton.cdiv(lse.numel(), 128),)](partial, lse, grid[0], lse.numel(), BLOCK=128)
        return lse

    def maps(self, lse: torch.Tensor) -> torch.Tensor:
        blocks, options = self.blocks(MAPS_BLOCKS, self.num_rows)
        word_block, weighted = min(WORD_BLOCK, power_of_two(self.num_words)), self.head_weights is not None
        tiles = triton.cdiv(self.num_columns, blocks.columns) * triton.cdiv(self.num_words, word_block)
        parts, heads_per_part = head_parts(self.heads, tiles * self.batch, weighted, self.device)
        maps = lse.new_empty(self.batch, parts, self.num_words, self.num_columns)
        _maps_kernel[(tiles, parts, self.batch)](
            self.query, self.key, self.rows, self.words, self.weights, self.columns, self.bias_or_other, lse,
            self.head_weights_or_other, maps,
            *self.strides, self.heads, self.num_rows, self.num_words, self.num_columns, heads_per_part, self.scale,
            **self.constants, WEIGHTED=weighted, WORDS=word_block, **options,
        )  # fmt: skip
        return maps.sum(dim=1, keepdim=True) if weighted and parts > 1 else maps

    def delta(self, lse: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        grid, options = self.walk(DELTA_BLOCKS, self.num_columns)
        partial = lse.new_empty(grid[0], *lse.shape)
        _delta_kernel[grid](
            self.query, self.key, self.rows, self.words, self.weights, self.columns, self.bias_or_other, lse, gradient, partial,
            *self.strides, *gradient_strides(gradient, self.heads), self.groups, self.num_rows, self.num_columns, self.scale,
            **self.constants, **options,
        )  # fmt: skip
        return partial.sum(dim=0)

    def query_gradient(self, saved: RowGradients) -> torch.Tensor:
        grid, options = self.walk(BWD_DQ_BLOCKS, self.num_keys)
        partial = saved.lse.new_empty(grid[0], *saved.lse.shape, self.width)
        _bwd_dq_kernel[grid](
            *self.gradient_inputs(saved), partial, *self.gradient_sizes(saved),
            **self.constants, WEIGHTED=self.head_weights is not None, **options,
        )  # fmt: skip
        gradient = torch.zeros(self.query.shape, dtype=self.query.dtype, device=self.device)
        _add_rows_kernel[(self.num_rows, self.batch * self.heads)](
            partial, self.rows, saved.full if saved.grad_scale is None else saved.grad_scale, gradient,
            *gradient.stride()[:3], self.heads, self.num_rows, grid[0], self.scale,
            D=self.width, WIDTH=power_of_two(self.width), RESCALED=saved.grad_scale is not None, BLOCK=16,
        )  # fmt: skip
        return gradient

    def key_gradient(self, saved: RowGradients) -> torch.Tensor:
        gradient = torch.empty(self.key.shape, dtype=self.key.dtype, device=self.device)
        blocks, options = self.blocks(BWD_DK_BLOCKS, self.heads // self.groups * self.num_rows)
        _bwd_dk_kernel[(triton.cdiv(self.num_keys, blocks.columns), self.batch * self.groups)](
            *self.gradient_inputs(saved), saved.full if saved.grad_scale is None else saved.grad_scale, gradient,
            *self.gradient_sizes(saved), **self.constants, WEIGHTED=self.head_weights is not None,
            RESCALED=saved.grad_scale is not None, **options,
        )  # fmt: skip
        return gradient

    def gradient_inputs(self, saved: RowGradients) -> tuple[torch.Tensor, ...]:
        """The first arguments of both gradients' kernels."""
        indices = (self.rows, self.words, self.weights)
        return self.query, self.key, *indices, self.bias_or_other, saved.lse, saved.delta, self.head_weights_or_other, saved.full

    def gradient_sizes(self, saved: RowGradients) -> tuple[float, ...]:
        """Strides and sizes of both gradients' kernels."""
        return *self.strides, *gradient_strides(saved.full, self.heads), self.groups, self.num_rows, self.num_keys, self.scale


row_maps_triton = row_maps_operation("triton", _TritonRows)
