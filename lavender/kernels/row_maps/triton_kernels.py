"""`row_maps` in Triton. Every output has one writer and every sum a fixed order: results are bitwise deterministic.

Word rows are read through their indices; nothing is gathered first. Where a kernel walks along the keys, the rows of all heads
that share a key head are stacked into one tile (stacked row s is row s % R of the group's head s // R), so that each key is
loaded once for them; the keys are split over programs, and a second, small kernel adds the parts up.
"""

# Triton's kernels take long lists of sizes and strides.
# fmt: off

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from ..grids import splits_for
from ..numerics import power_of_two
from ..tiles import LOG2E, SIZES, Blocks, Table, blocks_for, dot, load_tile, store_tile, widths
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
    "float32": {128: Blocks(16, 32, 8, 1)},
}
QUERY_GRADIENT_BLOCKS = {
    "default": {64: Blocks(64, 64, 8, 2), 96: Blocks(64, 32, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(32, 32, 4, 1)},
    "sm100": {64: Blocks(64, 64, 4, 2), 96: Blocks(64, 32, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(32, 32, 4, 1)},
    "float32": {128: Blocks(16, 32, 8, 1)},
}
KEY_GRADIENT_BLOCKS = {
    "default": {128: Blocks(32, 64, 4, 2), 256: Blocks(32, 32, 8, 2)},
    "float32": {128: Blocks(16, 16, 8, 1)},
}
WORD_BLOCK = 64
"""Most words of one program's map."""


@triton.jit
def _stacked_rows(rows, b, g, block, num_rows, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of a key head's stacked rows: heads, numbers among the R, query rows (padding: 0), and which exist."""
    stacked = block * BLOCK + tl.arange(0, BLOCK)
    valid = stacked < GROUP * num_rows
    h, r = g * GROUP + stacked // num_rows, stacked % num_rows
    row = tl.load(rows + b * num_rows + r, mask=valid, other=0).to(tl.int32)
    return h, r, tl.maximum(row, 0), valid


@triton.jit
def _products(q_first, q_second, k_first, k_second, scale, SECOND: tl.constexpr):
    """Scores [rows, keys] in base 2; each operand is one or two tiles of the head width."""
    products = dot(q_first, tl.trans(k_first))
    if SECOND > 0:
        products += dot(q_second, tl.trans(k_second))
    return products * (scale * LOG2E)


@triton.jit
def _masked(scores, row, key, seen, bias, bias_row, bias_n, CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Scores with the mask's bias, -inf where a row does not see a key; `bias_row` is where a row's bias begins."""
    if HAS_BIAS:
        scores += tl.load(bias + (bias_row + key * bias_n), mask=seen, other=0.0) * LOG2E
    if CAUSAL:
        seen = seen & (key <= row)
    return tl.where(seen, scores, float("-inf"))


@triton.jit(do_not_specialize=SIZES)
def _lse(
    q, k, rows, bias, partial,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_kn, bias_b, bias_h, bias_r, bias_n,
    num_groups, num_rows, num_keys, scale,
    UNIT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """Base-2 log-sum-exp of rows over one split of the keys, partial[split, b, h, r]; +inf where nothing is seen."""
    split = tl.program_id(0)
    b, g = (tl.program_id(2) // num_groups).to(tl.int64), tl.program_id(2) % num_groups
    h, r, row, valid = _stacked_rows(rows, b, g, tl.program_id(1), num_rows, GROUP, ROWS)
    place = (h * stride_qh + row * stride_qt) * UNIT
    q_first = load_tile(q + b * stride_qb * UNIT, place, valid, 1, D, 0, FIRST)
    q_second = q_first
    if SECOND > 0:
        q_second = load_tile(q + b * stride_qb * UNIT, place, valid, 1, D, FIRST, SECOND)
    bias += b * bias_b
    k += (b * stride_kb + g * stride_kg) * UNIT
    bias_row = h * bias_h + r * bias_r

    reach = tl.cdiv(tl.cdiv(num_keys, KEYS), tl.num_programs(0)) * KEYS
    stop = tl.minimum(num_keys, (split + 1) * reach)
    if CAUSAL:
        stop = tl.minimum(stop, tl.max(row) + 1)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(split * reach, stop, KEYS):
        key = start + tl.arange(0, KEYS)
        exists = key < num_keys
        k_first = load_tile(k, key, exists, stride_kn * UNIT, D, 0, FIRST)
        k_second = k_first
        if SECOND > 0:
            k_second = load_tile(k, key, exists, stride_kn * UNIT, D, FIRST, SECOND)
        scores = _products(q_first, q_second, k_first, k_second, scale, SECOND)
        seen = valid[:, None] & exists[None, :]
        scores = _masked(scores, row[:, None], key[None, :], seen, bias, bias_row[:, None], bias_n, CAUSAL, HAS_BIAS)
        risen = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(risen == float("-inf"), 0.0, risen)
        total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
        peak = risen
    # Not `total > 0`: what is no number stays so.
    lse = tl.where(total == 0, float("inf"), peak + tl.log2(tl.where(total == 0, 1.0, total)))
    num_samples = tl.num_programs(2) // num_groups
    out = partial + ((split * num_samples + b) * num_groups * GROUP + h) * num_rows + r
    tl.store(out, lse, mask=valid)


@triton.jit(do_not_specialize=SIZES)
def _combine_lse(partial, lse, num_splits, size, BLOCK: tl.constexpr):
    """Log-sum-exp over the splits, +inf where no split saw anything."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = place < size
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    for split in range(num_splits):
        value = tl.load(partial + split * size + place, mask=valid, other=float("inf"))
        peak = tl.maximum(peak, tl.where(value == float("inf"), float("-inf"), value))
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):
        value = tl.load(partial + split * size + place, mask=valid, other=float("inf"))
        total += tl.where(value == float("inf"), 0.0, tl.exp2(value - peak))
    tl.store(lse + place, tl.where(total == 0, float("inf"), peak + tl.log2(total)), mask=valid)


@triton.jit(do_not_specialize=SIZES)
def _maps(
    q, k, rows, words, weights, columns, bias, lse, head_weights, out,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_kn, bias_b, bias_h, bias_r, bias_n,
    num_heads, num_rows, num_words, num_columns, heads_per_part, scale,
    UNIT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    WORDS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """out[b, part, w, m]: the sum over a part's heads and a word's rows, for one tile of columns."""
    blocks = tl.cdiv(num_columns, KEYS)
    part, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    m = (tl.program_id(0) % blocks) * KEYS + tl.arange(0, KEYS)
    w = (tl.program_id(0) // blocks) * WORDS + tl.arange(0, WORDS)
    key = tl.load(columns + b * num_columns + m, mask=m < num_columns, other=-1).to(tl.int32)
    exists = key >= 0
    key = tl.maximum(key, 0)
    maps = tl.zeros([WORDS, KEYS], tl.float32)
    bias += b * bias_b
    for first_row in range(0, num_rows, ROWS):
        r = first_row + tl.arange(0, ROWS)
        valid = r < num_rows
        row = tl.maximum(tl.load(rows + b * num_rows + r, mask=valid, other=0).to(tl.int32), 0)
        shares = tl.zeros([ROWS, KEYS], tl.float32)
        for h in range(part * heads_per_part, tl.minimum((part + 1) * heads_per_part, num_heads)):
            q_head = q + (b * stride_qb + h * stride_qh) * UNIT
            k_head = k + (b * stride_kb + (h // GROUP) * stride_kg) * UNIT
            q_first = load_tile(q_head, row, valid, stride_qt * UNIT, D, 0, FIRST)
            k_first = load_tile(k_head, key, exists, stride_kn * UNIT, D, 0, FIRST)
            q_second = q_first
            k_second = k_first
            if SECOND > 0:
                q_second = load_tile(q_head, row, valid, stride_qt * UNIT, D, FIRST, SECOND)
                k_second = load_tile(k_head, key, exists, stride_kn * UNIT, D, FIRST, SECOND)
            scores = _products(q_first, q_second, k_first, k_second, scale, SECOND)
            seen = valid[:, None] & exists[None, :]
            bias_row = h * bias_h + r * bias_r
            scores = _masked(scores, row[:, None], key[None, :], seen, bias, bias_row[:, None], bias_n, CAUSAL, HAS_BIAS)
            normalizer = tl.load(lse + (b * num_heads + h) * num_rows + r, mask=valid, other=float("inf"))
            probabilities = tl.exp2(scores - normalizer[:, None])
            if WEIGHTED:
                probabilities *= tl.load(head_weights + h)
            shares += probabilities
        word = tl.load(words + b * num_rows + r, mask=valid, other=-1).to(tl.int32)
        weight = tl.load(weights + b * num_rows + r, mask=valid, other=0.0)
        belongs = (w[:, None] == word[None, :]).to(tl.float32)
        maps += dot(belongs, shares * weight[:, None])
    place = ((b * tl.num_programs(1) + part) * num_words + w[:, None]) * num_columns + m[None, :]
    tl.store(out + place, maps, mask=(w < num_words)[:, None] & (m < num_columns)[None, :])


@triton.jit(do_not_specialize=SIZES)
def _delta(
    q, k, rows, words, weights, columns, bias, lse, gradient, partial,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_kn, bias_b, bias_h, bias_r, bias_n, gradient_b, gradient_h,
    num_groups, num_rows, num_columns, scale,
    UNIT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """partial[split, b, h, r]: the sum over one split of the columns of P Ghat, the head's weight left out."""
    split = tl.program_id(0)
    b, g = (tl.program_id(2) // num_groups).to(tl.int64), tl.program_id(2) % num_groups
    h, r, row, valid = _stacked_rows(rows, b, g, tl.program_id(1), num_rows, GROUP, ROWS)
    place = (h * stride_qh + row * stride_qt) * UNIT
    q_first = load_tile(q + b * stride_qb * UNIT, place, valid, 1, D, 0, FIRST)
    q_second = q_first
    if SECOND > 0:
        q_second = load_tile(q + b * stride_qb * UNIT, place, valid, 1, D, FIRST, SECOND)
    bias += b * bias_b
    k += (b * stride_kb + g * stride_kg) * UNIT
    bias_row = h * bias_h + r * bias_r
    word = tl.load(words + b * num_rows + r, mask=valid, other=-1).to(tl.int32)
    weight = tl.load(weights + b * num_rows + r, mask=valid, other=0.0)
    gradient += b * gradient_b
    wanted_row = h * gradient_h + word * num_columns
    normalizer = tl.load(lse + (b * num_groups * GROUP + h) * num_rows + r, mask=valid, other=float("inf"))

    reach = tl.cdiv(tl.cdiv(num_columns, KEYS), tl.num_programs(0)) * KEYS
    delta = tl.zeros([ROWS], tl.float32)
    for start in range(split * reach, tl.minimum(num_columns, (split + 1) * reach), KEYS):
        m = start + tl.arange(0, KEYS)
        key = tl.load(columns + b * num_columns + m, mask=m < num_columns, other=-1).to(tl.int32)
        exists = key >= 0
        key = tl.maximum(key, 0)
        k_first = load_tile(k, key, exists, stride_kn * UNIT, D, 0, FIRST)
        k_second = k_first
        if SECOND > 0:
            k_second = load_tile(k, key, exists, stride_kn * UNIT, D, FIRST, SECOND)
        scores = _products(q_first, q_second, k_first, k_second, scale, SECOND)
        seen = valid[:, None] & exists[None, :]
        scores = _masked(scores, row[:, None], key[None, :], seen, bias, bias_row[:, None], bias_n, CAUSAL, HAS_BIAS)
        wanted = tl.load(gradient + (wanted_row[:, None] + m[None, :]), mask=seen & (word >= 0)[:, None], other=0.0)
        delta += tl.sum(tl.exp2(scores - normalizer[:, None]) * wanted, 1)
    num_samples = tl.num_programs(2) // num_groups
    out = partial + ((split * num_samples + b) * num_groups * GROUP + h) * num_rows + r
    tl.store(out, delta * weight, mask=valid)


@triton.jit(do_not_specialize=SIZES)
def _query_gradient(
    q, k, rows, words, weights, bias, lse, delta, head_weights, full, partial,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_kn, bias_b, bias_h, bias_r, bias_n, full_b, full_h,
    num_groups, num_rows, num_keys, scale,
    UNIT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """partial[split, b, h, r, :]: the sum over one split of the keys of dS k, the softmax scale left out."""
    split = tl.program_id(0)
    b, g = (tl.program_id(2) // num_groups).to(tl.int64), tl.program_id(2) % num_groups
    h, r, row, valid = _stacked_rows(rows, b, g, tl.program_id(1), num_rows, GROUP, ROWS)
    place = (h * stride_qh + row * stride_qt) * UNIT
    q_first = load_tile(q + b * stride_qb * UNIT, place, valid, 1, D, 0, FIRST)
    q_second = q_first
    if SECOND > 0:
        q_second = load_tile(q + b * stride_qb * UNIT, place, valid, 1, D, FIRST, SECOND)
    bias += b * bias_b
    k += (b * stride_kb + g * stride_kg) * UNIT
    bias_row = h * bias_h + r * bias_r
    word = tl.load(words + b * num_rows + r, mask=valid, other=-1).to(tl.int32)
    weight = tl.load(weights + b * num_rows + r, mask=valid, other=0.0)
    full += b * full_b
    wanted_row = h * full_h + word * num_keys
    index = (b * num_groups * GROUP + h) * num_rows + r
    normalizer = tl.load(lse + index, mask=valid, other=float("inf"))
    shift = tl.load(delta + index, mask=valid, other=0.0)

    reach = tl.cdiv(tl.cdiv(num_keys, KEYS), tl.num_programs(0)) * KEYS
    stop = tl.minimum(num_keys, (split + 1) * reach)
    if CAUSAL:
        stop = tl.minimum(stop, tl.max(row) + 1)
    sum_first = tl.zeros([ROWS, FIRST], tl.float32)
    sum_second = sum_first
    if SECOND > 0:
        sum_second = tl.zeros([ROWS, SECOND], tl.float32)
    for start in range(split * reach, stop, KEYS):
        key = start + tl.arange(0, KEYS)
        exists = key < num_keys
        k_first = load_tile(k, key, exists, stride_kn * UNIT, D, 0, FIRST)
        k_second = k_first
        if SECOND > 0:
            k_second = load_tile(k, key, exists, stride_kn * UNIT, D, FIRST, SECOND)
        scores = _products(q_first, q_second, k_first, k_second, scale, SECOND)
        seen = valid[:, None] & exists[None, :]
        scores = _masked(scores, row[:, None], key[None, :], seen, bias, bias_row[:, None], bias_n, CAUSAL, HAS_BIAS)
        wanted = tl.load(full + (wanted_row[:, None] + key[None, :]), mask=seen & (word >= 0)[:, None], other=0.0)
        scores_gradient = tl.exp2(scores - normalizer[:, None]) * (wanted * weight[:, None] - shift[:, None])
        scores_gradient = scores_gradient.to(k_first.dtype)
        sum_first += dot(scores_gradient, k_first)
        if SECOND > 0:
            sum_second += dot(scores_gradient, k_second)
    if WEIGHTED:
        head_weight = tl.load(head_weights + h, mask=valid, other=0.0)[:, None]
        sum_first *= head_weight
        if SECOND > 0:
            sum_second *= head_weight
    num_samples = tl.num_programs(2) // num_groups
    out = (split * num_samples * num_groups * GROUP * num_rows + index) * D
    store_tile(partial, out, valid, 1, sum_first, D, 0, FIRST)
    if SECOND > 0:
        store_tile(partial, out, valid, 1, sum_second, D, FIRST, SECOND)


@triton.jit(do_not_specialize=SIZES)
def _add_rows(
    partial, rows, peak, out,
    out_b, out_h, out_row, num_heads, num_rows, num_splits, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, RESCALED: tl.constexpr, BLOCK: tl.constexpr,
):
    """out[b, h, rows[r]]: the parts of every entry that names this row, added up; such entries all write the same value."""
    b, h = (tl.program_id(1) // num_heads).to(tl.int64), tl.program_id(1) % num_heads
    row = tl.load(rows + b * num_rows + tl.program_id(0))
    d = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    num_samples = tl.num_programs(1) // num_heads
    for first in range(0, num_rows, BLOCK):
        r = first + tl.arange(0, BLOCK)
        same = tl.load(rows + b * num_rows + r, mask=r < num_rows, other=-1) == row
        for split in range(num_splits):
            place = (((split * num_samples + b) * num_heads + h) * num_rows + r) * D
            seen = (same & (r < num_rows))[:, None] & (d < D)[None, :]
            total += tl.sum(tl.load(partial + place[:, None] + d[None, :], mask=seen, other=0.0), 0)
    total *= scale
    if RESCALED:
        total *= tl.load(peak)
    if row >= 0:
        tl.store(out + b * out_b + h * out_h + row * out_row + d, total.to(out.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=SIZES)
def _key_gradient(
    q, k, rows, words, weights, bias, lse, delta, head_weights, full, peak, out,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_kn, bias_b, bias_h, bias_r, bias_n, full_b, full_h,
    num_groups, num_rows, num_keys, scale,
    UNIT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, RESCALED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """out[b, g, n, :], contiguous: scale dS^T q over the group's heads. Scores are [keys, rows] here: dS is a left operand."""
    b, g = (tl.program_id(1) // num_groups).to(tl.int64), tl.program_id(1) % num_groups
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    exists = key < num_keys
    bias += b * bias_b
    full += b * full_b
    k += (b * stride_kb + g * stride_kg) * UNIT
    k_first = load_tile(k, key, exists, stride_kn * UNIT, D, 0, FIRST)
    k_second = k_first
    if SECOND > 0:
        k_second = load_tile(k, key, exists, stride_kn * UNIT, D, FIRST, SECOND)
    sum_first = tl.zeros([KEYS, FIRST], tl.float32)
    sum_second = sum_first
    if SECOND > 0:
        sum_second = tl.zeros([KEYS, SECOND], tl.float32)
    for block in range(tl.cdiv(GROUP * num_rows, ROWS)):
        h, r, row, valid = _stacked_rows(rows, b, g, block, num_rows, GROUP, ROWS)
        place = (h * stride_qh + row * stride_qt) * UNIT
        q_first = load_tile(q + b * stride_qb * UNIT, place, valid, 1, D, 0, FIRST)
        q_second = q_first
        if SECOND > 0:
            q_second = load_tile(q + b * stride_qb * UNIT, place, valid, 1, D, FIRST, SECOND)
        scores = _products(k_first, k_second, q_first, q_second, scale, SECOND)
        seen = exists[:, None] & valid[None, :]
        bias_row = h * bias_h + r * bias_r
        scores = _masked(scores, row[None, :], key[:, None], seen, bias, bias_row[None, :], bias_n, CAUSAL, HAS_BIAS)
        index = (b * num_groups * GROUP + h) * num_rows + r
        normalizer = tl.load(lse + index, mask=valid, other=float("inf"))
        shift = tl.load(delta + index, mask=valid, other=0.0)
        word = tl.load(words + b * num_rows + r, mask=valid, other=-1).to(tl.int32)
        weight = tl.load(weights + b * num_rows + r, mask=valid, other=0.0)
        wanted_row = h * full_h + word * num_keys
        wanted = tl.load(full + (wanted_row[None, :] + key[:, None]), mask=seen & (word >= 0)[None, :], other=0.0)
        scores_gradient = tl.exp2(scores - normalizer[None, :]) * (wanted * weight[None, :] - shift[None, :])
        if WEIGHTED:
            scores_gradient *= tl.load(head_weights + h, mask=valid, other=0.0)[None, :]
        scores_gradient = scores_gradient.to(k_first.dtype)
        sum_first += dot(scores_gradient, q_first)
        if SECOND > 0:
            sum_second += dot(scores_gradient, q_second)
    factor = scale
    if RESCALED:
        factor *= tl.load(peak)
    place = ((b * num_groups + g) * num_keys + key) * D
    store_tile(out, place, exists, 1, sum_first * factor, D, 0, FIRST)
    if SECOND > 0:
        store_tile(out, place, exists, 1, sum_second * factor, D, FIRST, SECOND)


# fmt: on


class TritonRows(RowKernels):
    """The launches in Triton."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        # A kernel that reads no bias, head weights or peak gets some other tensor in its place.
        self.bias_or_other = self.query if self.bias is None else self.bias
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
        found = blocks_for(table, self.device, self.query.dtype, self.width)
        found = Blocks(min(found.rows, power_of_two(num_rows)), found.columns, found.warps, found.stages)
        return found, {"ROWS": found.rows, "KEYS": found.columns, "num_warps": found.warps, "num_stages": found.stages}

    def walk(self, table: Mapping[str, Table], length: int) -> tuple[tuple[int, int, int], dict[str, int]]:
        """Grid (splits, row blocks, B * G) and options of a kernel that walks stacked rows along `length` keys or columns."""
        stacked = self.heads // self.groups * self.num_rows
        found, options = self.blocks(table, stacked)
        row_blocks = triton.cdiv(stacked, found.rows)
        splits = splits_for(row_blocks * self.batch * self.groups, triton.cdiv(length, 4 * found.columns), self.device)
        return (splits, row_blocks, self.batch * self.groups), options

    def lse(self) -> torch.Tensor:
        grid, options = self.walk(LSE_BLOCKS, self.num_keys)
        partial = self.rows.new_empty(grid[0], self.batch, self.heads, self.num_rows, dtype=torch.float32)
        _lse[grid](
            self.query, self.key, self.rows, self.bias_or_other, partial,
            *self.strides, self.groups, self.num_rows, self.num_keys, self.scale, **self.constants, **options,
        )  # fmt: skip
        if grid[0] == 1:
            return partial[0]
        lse = torch.empty_like(partial[0])
        _combine_lse[(triton.cdiv(lse.numel(), 128),)](partial, lse, grid[0], lse.numel(), BLOCK=128)
        return lse

    def maps(self, lse: torch.Tensor, num_words: int, head_weights: torch.Tensor | None) -> torch.Tensor:
        found, options = self.blocks(MAPS_BLOCKS, self.num_rows)
        word_block = min(WORD_BLOCK, power_of_two(num_words))
        tiles = triton.cdiv(self.num_columns, found.columns) * triton.cdiv(num_words, word_block)
        parts = self.heads if head_weights is None else splits_for(tiles * self.batch, self.heads, self.device)
        heads_per_part = triton.cdiv(self.heads, parts)
        parts = triton.cdiv(self.heads, heads_per_part)
        maps = lse.new_empty(self.batch, parts, num_words, self.num_columns)
        _maps[(tiles, parts, self.batch)](
            self.query, self.key, self.rows, self.words, self.weights, self.columns, self.bias_or_other, lse,
            self.weights if head_weights is None else head_weights, maps,
            *self.strides, self.heads, self.num_rows, num_words, self.num_columns, heads_per_part, self.scale,
            **self.constants, WEIGHTED=head_weights is not None, WORDS=word_block, **options,
        )  # fmt: skip
        return maps if head_weights is None or parts == 1 else maps.sum(dim=1, keepdim=True)

    def delta(self, lse: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        grid, options = self.walk(DELTA_BLOCKS, self.num_columns)
        partial = lse.new_empty(grid[0], *lse.shape)
        _delta[grid](
            self.query, self.key, self.rows, self.words, self.weights, self.columns, self.bias_or_other, lse, gradient, partial,
            *self.strides, *self.wanted_strides(gradient), self.groups, self.num_rows, self.num_columns, self.scale,
            **self.constants, **options,
        )  # fmt: skip
        return partial.sum(dim=0)

    def query_gradient(self, flow: RowGradients) -> torch.Tensor:
        grid, options = self.walk(QUERY_GRADIENT_BLOCKS, self.num_keys)
        partial = flow.lse.new_empty(grid[0], *flow.lse.shape, self.width)
        _query_gradient[grid](
            *self.gradient_inputs(flow), partial, *self.gradient_sizes(flow.full),
            **self.constants, WEIGHTED=flow.head_weights is not None, **options,
        )  # fmt: skip
        gradient = torch.zeros(self.query.shape, dtype=self.query.dtype, device=self.device)
        _add_rows[(self.num_rows, self.batch * self.heads)](
            partial, self.rows, flow.full if flow.peak is None else flow.peak, gradient,
            *gradient.stride()[:3], self.heads, self.num_rows, grid[0], self.scale,
            D=self.width, WIDTH=power_of_two(self.width), RESCALED=flow.peak is not None, BLOCK=16,
        )  # fmt: skip
        return gradient

    def key_gradient(self, flow: RowGradients) -> torch.Tensor:
        gradient = torch.empty(self.key.shape, dtype=self.key.dtype, device=self.device)
        found, options = self.blocks(KEY_GRADIENT_BLOCKS, self.heads // self.groups * self.num_rows)
        _key_gradient[(triton.cdiv(self.num_keys, found.columns), self.batch * self.groups)](
            *self.gradient_inputs(flow), flow.full if flow.peak is None else flow.peak, gradient,
            *self.gradient_sizes(flow.full), **self.constants, WEIGHTED=flow.head_weights is not None,
            RESCALED=flow.peak is not None, **options,
        )  # fmt: skip
        return gradient

    def wanted_strides(self, gradient: torch.Tensor) -> tuple[int, ...]:
        """Strides of samples and heads of a gradient [B, C, W, M or N]: zero from head to head where heads were summed."""
        return gradient.expand(-1, self.heads, -1, -1).stride()[:2]

    def gradient_inputs(self, flow: RowGradients) -> tuple[torch.Tensor, ...]:
        """The first arguments of both gradients' kernels."""
        indices = (self.rows, self.words, self.weights)
        weights = self.weights if flow.head_weights is None else flow.head_weights
        return self.query, self.key, *indices, self.bias_or_other, flow.lse, flow.delta, weights, flow.full

    def gradient_sizes(self, full: torch.Tensor) -> tuple[float, ...]:
        """Strides and sizes of both gradients' kernels."""
        return *self.strides, *self.wanted_strides(full), self.groups, self.num_rows, self.num_keys, self.scale


row_maps_triton = row_maps_operation("triton", TritonRows)
