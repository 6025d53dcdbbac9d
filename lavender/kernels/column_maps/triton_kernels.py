"""`column_maps` and `column_attention` in Triton. One writer per output and sums in a fixed order: bitwise deterministic.

Up to 128 keys `_one_pass_kernel` holds a query block's whole softmax in one or two tiles of keys: output, map and log-sum-exp come
out together, and heads are summed in registers. `_two_passes_kernel` gives the maps of any number of keys. The backward pass,
`_bwd_dq_kernel` and `_bwd_dk_dv_kernel`, walks along tiles of keys and serves both.
"""

# Triton's kernels take long lists of sizes and strides.
# fmt: off

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from ..grids import gradient_strides, head_parts, splits_for
from ..numerics import power_of_two

from ..tiles import (  # isort: skip
    SIZES, Blocks, Table, add_dot, add_scores, blocks_for, dot, dot_wide, load_wide, log_sum_exp, masked_scores, split_bounds,
    store_wide, widths, zeros_wide,
)
from .call import ONE_PASS_KEYS, ColumnCall
from .op import ColumnGradients, ColumnKernels, column_maps_operation

# Chosen by compiling for sm_80, sm_90 and sm_100 without spills (tests/kernels/test_compile_budget.py); not timed yet.
# In `_one_pass_kernel` the tiles of keys follow from their number: `columns` has no meaning there.
ONE_PASS_BLOCKS = {
    "default": {64: Blocks(64, 0, 8, 1), 128: Blocks(32, 0, 8, 1), 256: Blocks(16, 0, 8, 1)},
    "sm100": {128: Blocks(32, 0, 8, 1), 256: Blocks(16, 0, 8, 1)},
    "float32": {64: Blocks(16, 0, 8, 1)},
}
TWO_PASSES_BLOCKS = {
    "default": {128: Blocks(64, 64, 8, 2), 256: Blocks(32, 32, 8, 1)},
    "float32": {64: Blocks(16, 32, 8, 1)},
}
BWD_DQ_BLOCKS = {
    "default": {128: Blocks(64, 32, 8, 1), 160: Blocks(32, 16, 8, 1), 256: Blocks(16, 16, 8, 1)},
    "float32": {64: Blocks(16, 16, 8, 1)},
}
BWD_DK_DV_BLOCKS = {
    "default": {64: Blocks(32, 32, 8, 1), 128: Blocks(16, 32, 8, 1), 256: Blocks(32, 16, 8, 1)},
    "float32": {64: Blocks(16, 16, 4, 1)},
}


@triton.jit
def _load_scores(
    b_q, i, m_i, p_k, p_bias, n, num_keys, stride_kn, bias_i, bias_n, scale,
    UNIT: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, HAS_BIAS: tl.constexpr,
):
    """The keys `n` of one head, and their scores [queries, keys]; -inf where there is no query or key, or the mask has it."""
    b_k = load_wide(p_k, n, n < num_keys, stride_kn * UNIT, D, FIRST, SECOND)
    m_seen = m_i[:, None] & (n < num_keys)[None, :]
    p_bias += i[:, None] * bias_i + n[None, :] * bias_n
    return b_k, masked_scores(b_q, b_k, scale, p_bias, m_seen, SECOND, HAS_BIAS)


@triton.jit(do_not_specialize=SIZES)
def _one_pass_kernel(
    p_q, p_k, p_v, p_word_weights, p_bias, p_head_weights, p_output, p_maps, p_lse,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    bias_b, bias_h, bias_i, bias_n, num_heads, num_queries, num_keys, num_words, heads_per_part, scale,
    UNIT: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    E: tl.constexpr, E_FIRST: tl.constexpr, E_SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    KEYS: tl.constexpr, MORE_KEYS: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr,
):
    """output[b, h, i, :], maps[b, part, w, i] and the base-2 lse[b, h, i] of one block of queries and one part of the heads."""
    part, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_i = i < num_queries
    n, more = tl.arange(0, KEYS), KEYS + tl.arange(0, 16 if MORE_KEYS == 0 else MORE_KEYS)
    p_bias += b * bias_b
    shares = tl.zeros([ROWS, KEYS], tl.float32)
    more_shares = shares
    if MORE_KEYS > 0:
        more_shares = tl.zeros([ROWS, MORE_KEYS], tl.float32)
    for h in range(part * heads_per_part, tl.minimum((part + 1) * heads_per_part, num_heads)):
        p_q_head = p_q + (b * stride_qb + h * stride_qh) * UNIT
        p_k_head = p_k + (b * stride_kb + h * stride_kh) * UNIT
        p_v_head = p_v + (b * stride_vb + h * stride_vh) * UNIT
        b_q = load_wide(p_q_head, i, m_i, stride_qi * UNIT, D, FIRST, SECOND)
        _, scores = _load_scores(
            b_q, i, m_i, p_k_head, p_bias + h * bias_h, n, num_keys, stride_kn, bias_i, bias_n, scale,
            UNIT, D, FIRST, SECOND, HAS_BIAS,
        )
        row_max = tl.max(scores, 1)
        more_scores = scores
        if MORE_KEYS > 0:
            _, more_scores = _load_scores(
                b_q, i, m_i, p_k_head, p_bias + h * bias_h, more, num_keys, stride_kn, bias_i, bias_n, scale,
                UNIT, D, FIRST, SECOND, HAS_BIAS,
            )
            row_max = tl.maximum(row_max, tl.max(more_scores, 1))
        row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
        scores = tl.exp2(scores - row_max[:, None])
        total = tl.sum(scores, 1)
        if MORE_KEYS > 0:
            more_scores = tl.exp2(more_scores - row_max[:, None])
            total += tl.sum(more_scores, 1)
        tl.store(p_lse + (b * num_heads + h) * num_queries + i, log_sum_exp(row_max, total), mask=m_i)
        safe = tl.where(total == 0, 1.0, total)  # not `total > 0`: NaN stays NaN
        probabilities = scores / safe[:, None]
        more_probabilities = more_scores / safe[:, None]
        if E > 0:
            b_v = load_wide(p_v_head, n, n < num_keys, stride_vn * UNIT, E, E_FIRST, E_SECOND)
            result = dot(probabilities.to(b_v[0].dtype), b_v[0])
            second_result = result
            if E_SECOND > 0:
                second_result = dot(probabilities.to(b_v[0].dtype), b_v[1])
            result = (result, second_result)
            if MORE_KEYS > 0:
                b_v = load_wide(p_v_head, more, more < num_keys, stride_vn * UNIT, E, E_FIRST, E_SECOND)
                result = add_dot(result, more_probabilities.to(b_v[0].dtype), b_v, E_SECOND)
            p_head = p_output + (b * num_heads + h) * num_queries * E
            store_wide(p_head, i, m_i, E, result, 1.0, E, E_FIRST, E_SECOND)
        weight = 1.0
        if WEIGHTED:
            weight = tl.load(p_head_weights + h)
        shares += probabilities * weight
        if MORE_KEYS > 0:
            more_shares += more_probabilities * weight
    p_words = p_word_weights + b * num_words * num_keys
    p_out = p_maps + (b * tl.num_programs(1) + part) * num_words * num_queries
    for first_word in range(0, num_words, WORDS):
        w = first_word + tl.arange(0, WORDS)
        m_w = (w < num_words)[None, :]
        share = tl.load(p_words + w[None, :] * num_keys + n[:, None], mask=m_w & (n < num_keys)[:, None], other=0.0)
        result = dot(shares, share)
        if MORE_KEYS > 0:
            share = tl.load(p_words + w[None, :] * num_keys + more[:, None], mask=m_w & (more < num_keys)[:, None], other=0.0)
            result += dot(more_shares, share)
        tl.store(p_out + w[None, :] * num_queries + i[:, None], result, mask=m_w & m_i[:, None])


@triton.jit(do_not_specialize=SIZES)
def _two_passes_kernel(
    p_q, p_k, p_word_weights, p_bias, p_maps, p_lse,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_kn, bias_b, bias_h, bias_i, bias_n,
    num_heads, num_queries, num_keys, num_words, scale,
    UNIT: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, HAS_BIAS: tl.constexpr,
    WORDS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """maps[b, h, w, i] and the base-2 lse[b, h, i] of one block of queries, one head and one block of words, for any keys."""
    b, h = (tl.program_id(2) // num_heads).to(tl.int64), tl.program_id(2) % num_heads
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_i = i < num_queries
    w = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    m_w = (w < num_words)[None, :]
    p_bias += b * bias_b + h * bias_h
    p_k += (b * stride_kb + h * stride_kh) * UNIT
    b_q = load_wide(p_q + (b * stride_qb + h * stride_qh) * UNIT, i, m_i, stride_qi * UNIT, D, FIRST, SECOND)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, num_keys, KEYS):
        n = start + tl.arange(0, KEYS)
        _, scores = _load_scores(
            b_q, i, m_i, p_k, p_bias, n, num_keys, stride_kn, bias_i, bias_n, scale, UNIT, D, FIRST, SECOND, HAS_BIAS
        )
        row_max, total = add_scores(row_max, total, scores)
    lse = log_sum_exp(row_max, total)
    tl.store(p_lse + (b * num_heads + h) * num_queries + i, lse, mask=m_i)
    result = tl.zeros([ROWS, WORDS], tl.float32)
    for start in range(0, num_keys, KEYS):
        n = start + tl.arange(0, KEYS)
        p_share = p_word_weights + b * num_words * num_keys + w[None, :] * num_keys + n[:, None]
        share = tl.load(p_share, mask=m_w & (n < num_keys)[:, None], other=0.0)
        if tl.max(tl.max(tl.abs(share), 1), 0) > 0:  # most tiles of a joint attention's keys belong to no word
            _, scores = _load_scores(
                b_q, i, m_i, p_k, p_bias, n, num_keys, stride_kn, bias_i, bias_n, scale, UNIT, D, FIRST, SECOND, HAS_BIAS
            )
            result += dot(tl.exp2(scores - lse[:, None]), share)
    p_out = p_maps + ((b * num_heads + h) * num_words + w[None, :]) * num_queries + i[:, None]
    tl.store(p_out, result, mask=m_w & m_i[:, None])


@triton.jit
def _wanted_by_words(p_gradient, p_word_weights, i, n, m_i, num_queries, num_keys, num_words, WORDS: tl.constexpr):
    """Ghat [queries, keys] without the head's weight: the words' shares of the maps' gradient."""
    wanted = tl.zeros([i.shape[0], n.shape[0]], tl.float32)
    for first_word in range(0, num_words, WORDS):
        w = first_word + tl.arange(0, WORDS)
        m_w = w < num_words
        b_g = tl.load(p_gradient + w[None, :] * num_queries + i[:, None], mask=m_w[None, :] & m_i[:, None], other=0.0)
        p_share = p_word_weights + w[:, None] * num_keys + n[None, :]
        share = tl.load(p_share, mask=m_w[:, None] & (n < num_keys)[None, :], other=0.0)
        wanted += dot(b_g, share)
    return wanted


@triton.jit(do_not_specialize=SIZES)
def _bwd_dq_kernel(
    p_q, p_k, p_v, p_word_weights, p_bias, p_head_weights, p_lse, p_gradient, p_output_gradient, p_grad_scale, p_output_scale,
    p_out, p_delta, p_head_delta,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    bias_b, bias_h, bias_i, bias_n, gradient_b, gradient_h, num_heads, num_queries, num_keys, num_words, scale,
    UNIT: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    E: tl.constexpr, E_FIRST: tl.constexpr, E_SECOND: tl.constexpr,
    HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, RESCALED: tl.constexpr,
    WORDS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """out[b, h, i, :] = dq; also delta[b, h, i] for `_bwd_dk_dv_kernel`, and head_delta, its part by the maps per head weight."""
    b, h = (tl.program_id(1) // num_heads).to(tl.int64), tl.program_id(1) % num_heads
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_i = i < num_queries
    p_bias += b * bias_b + h * bias_h
    p_gradient += b * gradient_b + h * gradient_h
    p_word_weights += b * num_words * num_keys
    p_k += (b * stride_kb + h * stride_kh) * UNIT
    p_v += (b * stride_vb + h * stride_vh) * UNIT
    b_q = load_wide(p_q + (b * stride_qb + h * stride_qh) * UNIT, i, m_i, stride_qi * UNIT, D, FIRST, SECOND)
    place = (b * num_heads + h) * num_queries + i
    lse = tl.load(p_lse + place, mask=m_i, other=float("inf"))
    b_do = b_q
    if E > 0:
        b_do = load_wide(p_output_gradient + (b * num_heads + h) * num_queries * E, i, m_i, E, E, E_FIRST, E_SECOND)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(p_head_weights + h)

    delta = tl.zeros([ROWS], tl.float32)
    head_delta = tl.zeros([ROWS], tl.float32)
    sums = zeros_wide(ROWS, FIRST, SECOND)
    tiles = tl.cdiv(num_keys, KEYS)
    # The first round over the keys gives delta, the second one dq.
    for step in range(0, 2 * tiles):
        n = (step % tiles) * KEYS + tl.arange(0, KEYS)
        b_k, scores = _load_scores(
            b_q, i, m_i, p_k, p_bias, n, num_keys, stride_kn, bias_i, bias_n, scale, UNIT, D, FIRST, SECOND, HAS_BIAS
        )
        probabilities = tl.exp2(scores - lse[:, None])
        by_words = _wanted_by_words(p_gradient, p_word_weights, i, n, m_i, num_queries, num_keys, num_words, WORDS)
        wanted = by_words * weight
        if E > 0:
            b_v = load_wide(p_v, n, n < num_keys, stride_vn * UNIT, E, E_FIRST, E_SECOND)
            by_output = dot_wide(b_do, b_v, E_SECOND)
            if RESCALED:
                by_output *= tl.load(p_output_scale) / tl.load(p_grad_scale)
            wanted += by_output
        if step < tiles:
            delta += tl.sum(probabilities * wanted, 1)
            head_delta += tl.sum(probabilities * by_words, 1)
        else:
            dscores = probabilities * (wanted - delta[:, None])
            sums = add_dot(sums, dscores.to(b_k[0].dtype), b_k, SECOND)
    factor = scale
    if RESCALED:
        factor *= tl.load(p_grad_scale)
    tl.store(p_delta + place, delta, mask=m_i)
    tl.store(p_head_delta + place, head_delta, mask=m_i)
    store_wide(p_out + (b * num_heads + h) * num_queries * D, i, m_i, D, sums, factor, D, FIRST, SECOND)


@triton.jit(do_not_specialize=SIZES)
def _bwd_dk_dv_kernel(
    p_q, p_k, p_v, p_word_weights, p_bias, p_head_weights, p_lse, p_gradient, p_output_gradient, p_grad_scale, p_output_scale,
    p_delta, p_key_out, p_value_out,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    bias_b, bias_h, bias_i, bias_n, gradient_b, gradient_h, num_heads, num_queries, num_keys, num_words, scale,
    UNIT: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    E: tl.constexpr, E_FIRST: tl.constexpr, E_SECOND: tl.constexpr,
    HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, RESCALED: tl.constexpr,
    WORDS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """Partial key_out, value_out[split, b, h, n, :]: dk and dv over one split of the queries. Scores are [keys, queries]."""
    split = tl.program_id(1)
    b, h = (tl.program_id(2) // num_heads).to(tl.int64), tl.program_id(2) % num_heads
    n = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    m_n = n < num_keys
    p_bias += b * bias_b + h * bias_h
    p_gradient += b * gradient_b + h * gradient_h
    p_word_weights += b * num_words * num_keys
    p_q += (b * stride_qb + h * stride_qh) * UNIT
    b_k = load_wide(p_k + (b * stride_kb + h * stride_kh) * UNIT, n, m_n, stride_kn * UNIT, D, FIRST, SECOND)
    b_v = b_k
    if E > 0:
        b_v = load_wide(p_v + (b * stride_vb + h * stride_vh) * UNIT, n, m_n, stride_vn * UNIT, E, E_FIRST, E_SECOND)
    p_output_gradient += (b * num_heads + h) * num_queries * E
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(p_head_weights + h)
    dk = zeros_wide(KEYS, FIRST, SECOND)
    dv = dk
    if E > 0:
        dv = zeros_wide(KEYS, E_FIRST, E_SECOND)
    first, stop = split_bounds(split, tl.num_programs(1), num_queries, ROWS)
    for start in range(first, stop, ROWS):
        i = start + tl.arange(0, ROWS)
        m_i = i < num_queries
        b_q = load_wide(p_q, i, m_i, stride_qi * UNIT, D, FIRST, SECOND)
        p_tile_bias = p_bias + (i[None, :] * bias_i + n[:, None] * bias_n)
        scores = masked_scores(b_k, b_q, scale, p_tile_bias, m_n[:, None] & m_i[None, :], SECOND, HAS_BIAS)
        place = (b * num_heads + h) * num_queries + i
        lse = tl.load(p_lse + place, mask=m_i, other=float("inf"))
        delta = tl.load(p_delta + place, mask=m_i, other=0.0)
        probabilities = tl.exp2(scores - lse[None, :])
        by_words = _wanted_by_words(p_gradient, p_word_weights, i, n, m_i, num_queries, num_keys, num_words, WORDS)
        wanted = tl.trans(by_words) * weight
        if E > 0:
            b_do = load_wide(p_output_gradient, i, m_i, E, E, E_FIRST, E_SECOND)
            by_output = dot_wide(b_v, b_do, E_SECOND)
            if RESCALED:
                by_output *= tl.load(p_output_scale) / tl.load(p_grad_scale)
            wanted += by_output
            dv = add_dot(dv, probabilities.to(b_v[0].dtype), b_do, E_SECOND)
        dscores = probabilities * (wanted - delta[None, :])
        dk = add_dot(dk, dscores.to(b_k[0].dtype), b_q, SECOND)
    factor = scale
    output_factor = 1.0
    if RESCALED:
        factor *= tl.load(p_grad_scale)
        if E > 0:
            output_factor = tl.load(p_output_scale)
    num_samples = tl.num_programs(2) // num_heads
    place = ((split * num_samples + b) * num_heads + h) * num_keys
    store_wide(p_key_out + place * D, n, m_n, D, dk, factor, D, FIRST, SECOND)
    if E > 0:
        store_wide(p_value_out + place * E, n, m_n, E, dv, output_factor, E, E_FIRST, E_SECOND)


# fmt: on


def _tiles(width: int, dtype: torch.dtype) -> tuple[int, int]:
    """`widths`, but one tile from 64 to 128: a second, narrow one costs these kernels more registers than the padding."""
    return (128, 0) if 64 < width < 128 else widths(width, dtype)


class _TritonColumns(ColumnKernels):
    """The launches in Triton. A kernel that reads no bias, head weights or scale gets some other tensor in its place."""

    def __init__(self, call: ColumnCall) -> None:
        super().__init__(call)
        self.inputs = (
            self.query,
            self.key,
            self.value,
            self.word_weights,
            self.query if self.bias is None else self.bias,
            self.word_weights if self.head_weights is None else self.head_weights,
        )
        no_strides = (0, 0, 0)
        strides = (*self.query.stride()[:3], *self.key.stride()[:3], *(self.value.stride()[:3] if self.value_width else no_strides))
        # In units of eight elements, where they divide: so the compiler knows that whole vectors can be loaded.
        unit = next(n for n in (8, 4, 2, 1) if not any(stride % n for stride in strides))
        self.strides = (*(stride // unit for stride in strides), *self.bias_strides)
        first, second = _tiles(self.width, self.query.dtype)
        self.constants = {"UNIT": unit, "D": self.width, "FIRST": first, "SECOND": second, "HAS_BIAS": self.bias is not None}
        value_first, value_second = _tiles(self.value_width, self.query.dtype)
        self.value_constants = {
            "E": self.value_width,
            "E_FIRST": value_first,
            "E_SECOND": value_second,
            "WEIGHTED": self.head_weights is not None,
        }

    def blocks(self, table: Mapping[str, Table]) -> tuple[Blocks, dict[str, int]]:
        """A kernel's blocks, and the launch options they mean."""
        blocks = blocks_for(table, self.device, self.query.dtype, max(self.width, self.value_width))
        return blocks, {"ROWS": blocks.rows, "num_warps": blocks.warps, "num_stages": blocks.stages}

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        output = self.query.new_empty(*self.query.shape[:3], self.value_width)
        lse = self.word_weights.new_empty(self.query.shape[:3])
        words = min(64, power_of_two(self.num_words))
        if self.num_keys > ONE_PASS_KEYS:
            return output, self.two_passes(lse, words), lse
        return output, self.one_pass(output, lse, words), lse

    def one_pass(self, output: torch.Tensor, lse: torch.Tensor, words: int) -> torch.Tensor:
        """The maps, by tiles of `words`; fills the output and the log-sum-exp."""
        blocks, options = self.blocks(ONE_PASS_BLOCKS)
        row_blocks, weighted = triton.cdiv(self.num_queries, blocks.rows), self.head_weights is not None
        parts, heads_per_part = head_parts(self.heads, row_blocks * self.batch, weighted, self.device)
        maps = lse.new_empty(self.batch, parts, self.num_words, self.num_queries)
        keys, more_keys = widths(self.num_keys, torch.float16)
        _one_pass_kernel[(row_blocks, parts, self.batch)](
            *self.inputs, output, maps, lse, *self.strides,
            self.heads, self.num_queries, self.num_keys, self.num_words, heads_per_part, self.scale,
            **self.constants, **self.value_constants, KEYS=keys, MORE_KEYS=more_keys, WORDS=words, **options,
        )  # fmt: skip
        return maps.sum(dim=1, keepdim=True) if weighted and parts > 1 else maps

    def two_passes(self, lse: torch.Tensor, words: int) -> torch.Tensor:
        """The maps, by tiles of `words`; fills the log-sum-exp."""
        blocks, options = self.blocks(TWO_PASSES_BLOCKS)
        maps = lse.new_empty(self.batch, self.heads, self.num_words, self.num_queries)
        grid = (triton.cdiv(self.num_queries, blocks.rows), triton.cdiv(self.num_words, words), self.batch * self.heads)
        query, key, _, word_weights, bias_or_other, _ = self.inputs
        _two_passes_kernel[grid](
            query, key, word_weights, bias_or_other, maps, lse, *self.strides[:6], *self.bias_strides,
            self.heads, self.num_queries, self.num_keys, self.num_words, self.scale,
            **self.constants, WORDS=words, KEYS=blocks.columns, **options,
        )  # fmt: skip
        return maps if self.head_weights is None else torch.einsum("h,bhwq->bwq", self.head_weights, maps)[:, None]

    def query_gradient(self, saved: ColumnGradients) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        blocks, options = self.blocks(BWD_DQ_BLOCKS)
        gradient = torch.empty(self.query.shape, dtype=self.query.dtype, device=self.device)
        delta, head_delta = torch.empty_like(saved.lse), torch.empty_like(saved.lse)
        _bwd_dq_kernel[(triton.cdiv(self.num_queries, blocks.rows), self.batch * self.heads)](
            *self.gradient_inputs(saved), gradient, delta, head_delta, *self.gradient_sizes(saved),
            **self.gradient_constants(saved), KEYS=blocks.columns, **options,
        )  # fmt: skip
        return gradient, delta, head_delta

    def key_gradient(self, saved: ColumnGradients, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks, options = self.blocks(BWD_DK_DV_BLOCKS)
        key_blocks = triton.cdiv(self.num_keys, blocks.columns)
        most = triton.cdiv(self.num_queries, 4 * blocks.rows)
        splits = splits_for(key_blocks * self.batch * self.heads, most, self.device)
        key_parts, value_parts = (delta.new_empty(splits, *t.shape) for t in (self.key, self.value))
        _bwd_dk_dv_kernel[(key_blocks, splits, self.batch * self.heads)](
            *self.gradient_inputs(saved), delta, key_parts, value_parts, *self.gradient_sizes(saved),
            **self.gradient_constants(saved), KEYS=blocks.columns, **options,
        )  # fmt: skip
        return key_parts.sum(dim=0).to(self.key.dtype), value_parts.sum(dim=0).to(self.value.dtype)

    def gradient_inputs(self, saved: ColumnGradients) -> tuple[torch.Tensor, ...]:
        """The first arguments of both gradients' kernels."""
        scales = (saved.maps if scale is None else scale for scale in (saved.grad_scale, saved.output_scale))
        return *self.inputs, saved.lse, saved.maps, saved.output, *scales

    def gradient_sizes(self, saved: ColumnGradients) -> tuple[float, ...]:
        """Strides and sizes of both gradients' kernels."""
        sizes = (self.heads, self.num_queries, self.num_keys, self.num_words, self.scale)
        return *self.strides, *gradient_strides(saved.maps, self.heads), *sizes

    def gradient_constants(self, saved: ColumnGradients) -> dict[str, int]:
        """Constants of both gradients' kernels."""
        words = min(32, power_of_two(self.num_words))
        return {**self.constants, **self.value_constants, "RESCALED": saved.grad_scale is not None, "WORDS": words}


column_maps_triton = column_maps_operation("triton", _TritonColumns)
