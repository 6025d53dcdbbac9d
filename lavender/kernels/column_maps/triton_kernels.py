"""`column_maps` and `column_attention` in Triton. One writer per output and sums in a fixed order: bitwise deterministic.

Up to 128 keys `_one_pass` holds a query block's whole softmax in one or two tiles of keys: output, map and log-sum-exp come out
together, and heads are summed in registers. `_two_passes` gives the maps of any number of keys. The backward pass,
`_query_gradient` and `_key_gradient`, walks along tiles of keys and serves both.
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
from .api import ONE_PASS_KEYS
from .op import ColumnGradients, ColumnKernels, column_maps_operation

# Chosen by compiling for sm_80, sm_90 and sm_100 without spills (tests/kernels/test_compile_budget.py); not timed yet.
# In `_one_pass` the tiles of keys follow from their number: `columns` has no meaning there.
ONE_PASS_BLOCKS = {
    "default": {64: Blocks(64, 0, 8, 1), 128: Blocks(32, 0, 8, 1), 256: Blocks(16, 0, 8, 1)},
    "sm100": {128: Blocks(32, 0, 8, 1), 256: Blocks(16, 0, 8, 1)},
    "float32": {64: Blocks(16, 0, 8, 1)},
}
TWO_PASSES_BLOCKS = {
    "default": {128: Blocks(64, 64, 8, 2), 256: Blocks(32, 32, 8, 1)},
    "float32": {64: Blocks(16, 32, 8, 1)},
}
QUERY_GRADIENT_BLOCKS = {
    "default": {128: Blocks(64, 32, 8, 1), 160: Blocks(32, 16, 8, 1), 256: Blocks(16, 16, 8, 1)},
    "float32": {64: Blocks(16, 16, 8, 1)},
}
KEY_GRADIENT_BLOCKS = {
    "default": {64: Blocks(32, 32, 8, 1), 128: Blocks(16, 32, 8, 1), 256: Blocks(32, 16, 8, 1)},
    "float32": {64: Blocks(16, 16, 4, 1)},
}


@triton.jit
def _masked_scores(
    q_first, q_second, k_first, k_second, bias, bias_i, bias_n, i, n, seen, scale,
    SECOND: tl.constexpr, HAS_BIAS: tl.constexpr,
):
    """Scores in base 2, -inf where nothing is seen; rows are queries `i` or, all arguments exchanged, keys."""
    scores = dot(q_first, tl.trans(k_first))
    if SECOND > 0:
        scores += dot(q_second, tl.trans(k_second))
    scores *= scale * LOG2E
    if HAS_BIAS:
        scores += tl.load(bias + (i * bias_i + n * bias_n), mask=seen, other=0.0) * LOG2E
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _load_wide(base, index, valid, stride, WIDTH: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """One or two tiles of a matrix's rows; the second is the first again where there is none."""
    first = load_tile(base, index, valid, stride, WIDTH, 0, FIRST)
    second = first
    if SECOND > 0:
        second = load_tile(base, index, valid, stride, WIDTH, FIRST, SECOND)
    return first, second


@triton.jit(do_not_specialize=SIZES)
def _one_pass(
    q, k, v, word_weights, bias, head_weights, output, maps, lse,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    bias_b, bias_h, bias_i, bias_n, num_heads, num_queries, num_keys, num_words, heads_per_part, scale,
    UNIT: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    E: tl.constexpr, E_FIRST: tl.constexpr, E_SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    KEYS: tl.constexpr, MORE_KEYS: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr,
):
    """output[b, h, i, :], maps[b, part, w, i] and the base-2 lse[b, h, i] of one block of queries and one part of the heads."""
    part, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = i < num_queries
    n, more = tl.arange(0, KEYS), KEYS + tl.arange(0, 16 if MORE_KEYS == 0 else MORE_KEYS)
    bias += b * bias_b
    shares = tl.zeros([ROWS, KEYS], tl.float32)
    more_shares = shares
    if MORE_KEYS > 0:
        more_shares = tl.zeros([ROWS, MORE_KEYS], tl.float32)
    for h in range(part * heads_per_part, tl.minimum((part + 1) * heads_per_part, num_heads)):
        q_head = q + (b * stride_qb + h * stride_qh) * UNIT
        k_head = k + (b * stride_kb + h * stride_kh) * UNIT
        v_head = v + (b * stride_vb + h * stride_vh) * UNIT
        q_first, q_second = _load_wide(q_head, i, exists, stride_qi * UNIT, D, FIRST, SECOND)
        k_first, k_second = _load_wide(k_head, n, n < num_keys, stride_kn * UNIT, D, FIRST, SECOND)
        seen = exists[:, None] & (n < num_keys)[None, :]
        scores = _masked_scores(
            q_first, q_second, k_first, k_second, bias + h * bias_h, bias_i, bias_n, i[:, None], n[None, :], seen, scale,
            SECOND, HAS_BIAS,
        )
        peak = tl.max(scores, 1)
        more_scores = scores
        if MORE_KEYS > 0:
            k_first, k_second = _load_wide(k_head, more, more < num_keys, stride_kn * UNIT, D, FIRST, SECOND)
            seen = exists[:, None] & (more < num_keys)[None, :]
            more_scores = _masked_scores(
                q_first, q_second, k_first, k_second, bias + h * bias_h, bias_i, bias_n, i[:, None], more[None, :], seen, scale,
                SECOND, HAS_BIAS,
            )
            peak = tl.maximum(peak, tl.max(more_scores, 1))
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        scores = tl.exp2(scores - peak[:, None])
        total = tl.sum(scores, 1)
        if MORE_KEYS > 0:
            more_scores = tl.exp2(more_scores - peak[:, None])
            total += tl.sum(more_scores, 1)
        safe = tl.where(total == 0, 1.0, total)  # not `total > 0`: what is no number stays so
        tl.store(
            lse + (b * num_heads + h) * num_queries + i, tl.where(total == 0, float("inf"), peak + tl.log2(safe)), mask=exists
        )
        probabilities = scores / safe[:, None]
        more_probabilities = more_scores / safe[:, None]
        if E > 0:
            target = output + (b * num_heads + h) * num_queries * E
            v_first, v_second = _load_wide(v_head, n, n < num_keys, stride_vn * UNIT, E, E_FIRST, E_SECOND)
            result = dot(probabilities.to(v_first.dtype), v_first)
            second_result = result
            if E_SECOND > 0:
                second_result = dot(probabilities.to(v_first.dtype), v_second)
            if MORE_KEYS > 0:
                v_first, v_second = _load_wide(v_head, more, more < num_keys, stride_vn * UNIT, E, E_FIRST, E_SECOND)
                result += dot(more_probabilities.to(v_first.dtype), v_first)
                if E_SECOND > 0:
                    second_result += dot(more_probabilities.to(v_first.dtype), v_second)
            store_tile(target, i, exists, E, result, E, 0, E_FIRST)
            if E_SECOND > 0:
                store_tile(target, i, exists, E, second_result, E, E_FIRST, E_SECOND)
        weight = 1.0
        if WEIGHTED:
            weight = tl.load(head_weights + h)
        shares += probabilities * weight
        if MORE_KEYS > 0:
            more_shares += more_probabilities * weight
    w = tl.arange(0, WORDS)
    words = word_weights + b * num_words * num_keys
    target = maps + (b * tl.num_programs(1) + part) * num_words * num_queries
    for first_word in range(0, num_words, WORDS):
        word = first_word + w
        valid = (word < num_words)[None, :]
        share = tl.load(words + word[None, :] * num_keys + n[:, None], mask=valid & (n < num_keys)[:, None], other=0.0)
        result = dot(shares, share)
        if MORE_KEYS > 0:
            share = tl.load(words + word[None, :] * num_keys + more[:, None], mask=valid & (more < num_keys)[:, None], other=0.0)
            result += dot(more_shares, share)
        tl.store(target + word[None, :] * num_queries + i[:, None], result, mask=valid & exists[:, None])


@triton.jit(do_not_specialize=SIZES)
def _two_passes(
    q, k, word_weights, bias, maps, lse,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_kn, bias_b, bias_h, bias_i, bias_n,
    num_heads, num_queries, num_keys, num_words, scale,
    UNIT: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, HAS_BIAS: tl.constexpr,
    WORDS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """maps[b, h, w, i] and the base-2 lse[b, h, i] of one block of queries, one head and one block of words, for any keys."""
    b, h = (tl.program_id(2) // num_heads).to(tl.int64), tl.program_id(2) % num_heads
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = i < num_queries
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    bias += b * bias_b + h * bias_h
    k += (b * stride_kb + h * stride_kh) * UNIT
    q_head = q + (b * stride_qb + h * stride_qh) * UNIT
    q_first, q_second = _load_wide(q_head, i, exists, stride_qi * UNIT, D, FIRST, SECOND)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, num_keys, KEYS):
        n = start + tl.arange(0, KEYS)
        k_first, k_second = _load_wide(k, n, n < num_keys, stride_kn * UNIT, D, FIRST, SECOND)
        seen = exists[:, None] & (n < num_keys)[None, :]
        scores = _masked_scores(
            q_first, q_second, k_first, k_second, bias, bias_i, bias_n, i[:, None], n[None, :], seen, scale, SECOND, HAS_BIAS
        )
        risen = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(risen == float("-inf"), 0.0, risen)
        total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
        peak = risen
    normalizer = tl.where(total == 0, float("inf"), peak + tl.log2(tl.where(total == 0, 1.0, total)))
    tl.store(lse + (b * num_heads + h) * num_queries + i, normalizer, mask=exists)
    result = tl.zeros([ROWS, WORDS], tl.float32)
    for start in range(0, num_keys, KEYS):
        n = start + tl.arange(0, KEYS)
        share = tl.load(
            word_weights + b * num_words * num_keys + word[None, :] * num_keys + n[:, None],
            mask=(word < num_words)[None, :] & (n < num_keys)[:, None], other=0.0,
        )
        if tl.max(tl.max(tl.abs(share), 1), 0) > 0:  # most tiles of a joint attention's keys belong to no word
            k_first, k_second = _load_wide(k, n, n < num_keys, stride_kn * UNIT, D, FIRST, SECOND)
            seen = exists[:, None] & (n < num_keys)[None, :]
            scores = _masked_scores(
                q_first, q_second, k_first, k_second, bias, bias_i, bias_n, i[:, None], n[None, :], seen, scale, SECOND, HAS_BIAS
            )
            result += dot(tl.exp2(scores - normalizer[:, None]), share)
    target = maps + ((b * num_heads + h) * num_words + word[None, :]) * num_queries + i[:, None]
    tl.store(target, result, mask=(word < num_words)[None, :] & exists[:, None])


@triton.jit
def _wanted_by_words(gradient, word_weights, i, n, exists, num_queries, num_keys, num_words, WORDS: tl.constexpr):
    """Ghat [queries, keys] without the head's weight: the words' shares of the maps' gradient."""
    w = tl.arange(0, WORDS)
    wanted = tl.zeros([i.shape[0], n.shape[0]], tl.float32)
    for first_word in range(0, num_words, WORDS):
        word = first_word + w
        valid = word < num_words
        pull = tl.load(gradient + word[None, :] * num_queries + i[:, None], mask=valid[None, :] & exists[:, None], other=0.0)
        share = tl.load(
            word_weights + word[:, None] * num_keys + n[None, :], mask=valid[:, None] & (n < num_keys)[None, :], other=0.0
        )
        wanted += dot(pull, share)
    return wanted


@triton.jit(do_not_specialize=SIZES)
def _query_gradient(
    q, k, v, word_weights, bias, head_weights, lse, gradient, output_gradient, peak, output_peak, out, delta, head_delta,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    bias_b, bias_h, bias_i, bias_n, gradient_b, gradient_h, num_heads, num_queries, num_keys, num_words, scale,
    UNIT: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    E: tl.constexpr, E_FIRST: tl.constexpr, E_SECOND: tl.constexpr,
    HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, RESCALED: tl.constexpr,
    WORDS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """out[b, h, i, :] = dq; also delta[b, h, i] for `_key_gradient`, and head_delta, its part by the maps per unit of weight."""
    b, h = (tl.program_id(1) // num_heads).to(tl.int64), tl.program_id(1) % num_heads
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = i < num_queries
    bias += b * bias_b + h * bias_h
    gradient += b * gradient_b + h * gradient_h
    word_weights += b * num_words * num_keys
    k += (b * stride_kb + h * stride_kh) * UNIT
    v += (b * stride_vb + h * stride_vh) * UNIT
    q_head = q + (b * stride_qb + h * stride_qh) * UNIT
    q_first, q_second = _load_wide(q_head, i, exists, stride_qi * UNIT, D, FIRST, SECOND)
    place = (b * num_heads + h) * num_queries + i
    normalizer = tl.load(lse + place, mask=exists, other=float("inf"))
    pull_first = q_first
    pull_second = q_first
    if E > 0:
        pull = output_gradient + (b * num_heads + h) * num_queries * E
        pull_first, pull_second = _load_wide(pull, i, exists, E, E, E_FIRST, E_SECOND)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(head_weights + h)

    total = tl.zeros([ROWS], tl.float32)
    total_by_words = tl.zeros([ROWS], tl.float32)
    sum_first = tl.zeros([ROWS, FIRST], tl.float32)
    sum_second = sum_first
    if SECOND > 0:
        sum_second = tl.zeros([ROWS, SECOND], tl.float32)
    tiles = tl.cdiv(num_keys, KEYS)
    # The first round over the keys gives delta, the second one dq.
    for step in range(0, 2 * tiles):
        n = (step % tiles) * KEYS + tl.arange(0, KEYS)
        k_first, k_second = _load_wide(k, n, n < num_keys, stride_kn * UNIT, D, FIRST, SECOND)
        seen = exists[:, None] & (n < num_keys)[None, :]
        scores = _masked_scores(
            q_first, q_second, k_first, k_second, bias, bias_i, bias_n, i[:, None], n[None, :], seen, scale, SECOND, HAS_BIAS
        )
        probabilities = tl.exp2(scores - normalizer[:, None])
        by_words = _wanted_by_words(gradient, word_weights, i, n, exists, num_queries, num_keys, num_words, WORDS)
        wanted = by_words * weight
        if E > 0:
            v_first, v_second = _load_wide(v, n, n < num_keys, stride_vn * UNIT, E, E_FIRST, E_SECOND)
            by_output = dot(pull_first, tl.trans(v_first))
            if E_SECOND > 0:
                by_output += dot(pull_second, tl.trans(v_second))
            if RESCALED:
                by_output *= tl.load(output_peak) / tl.load(peak)
            wanted += by_output
        if step < tiles:
            total += tl.sum(probabilities * wanted, 1)
            total_by_words += tl.sum(probabilities * by_words, 1)
        else:
            scores_gradient = (probabilities * (wanted - total[:, None])).to(k_first.dtype)
            sum_first += dot(scores_gradient, k_first)
            if SECOND > 0:
                sum_second += dot(scores_gradient, k_second)
    factor = scale
    if RESCALED:
        factor *= tl.load(peak)
    tl.store(delta + place, total, mask=exists)
    tl.store(head_delta + place, total_by_words, mask=exists)
    target = out + (b * num_heads + h) * num_queries * D
    store_tile(target, i, exists, D, sum_first * factor, D, 0, FIRST)
    if SECOND > 0:
        store_tile(target, i, exists, D, sum_second * factor, D, FIRST, SECOND)


@triton.jit(do_not_specialize=SIZES)
def _key_gradient(
    q, k, v, word_weights, bias, head_weights, lse, delta, gradient, output_gradient, peak, output_peak, key_out, value_out,
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
    exists = n < num_keys
    bias += b * bias_b + h * bias_h
    gradient += b * gradient_b + h * gradient_h
    word_weights += b * num_words * num_keys
    q += (b * stride_qb + h * stride_qh) * UNIT
    k_head = k + (b * stride_kb + h * stride_kh) * UNIT
    k_first, k_second = _load_wide(k_head, n, exists, stride_kn * UNIT, D, FIRST, SECOND)
    v_first = k_first
    v_second = k_first
    if E > 0:
        v_head = v + (b * stride_vb + h * stride_vh) * UNIT
        v_first, v_second = _load_wide(v_head, n, exists, stride_vn * UNIT, E, E_FIRST, E_SECOND)
    output_gradient += (b * num_heads + h) * num_queries * E
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(head_weights + h)
    key_first = tl.zeros([KEYS, FIRST], tl.float32)
    key_second = key_first
    if SECOND > 0:
        key_second = tl.zeros([KEYS, SECOND], tl.float32)
    value_first = key_first
    value_second = key_first
    if E > 0:
        value_first = tl.zeros([KEYS, E_FIRST], tl.float32)
    if E_SECOND > 0:
        value_second = tl.zeros([KEYS, E_SECOND], tl.float32)
    reach = tl.cdiv(tl.cdiv(num_queries, ROWS), tl.num_programs(1)) * ROWS
    for start in range(split * reach, tl.minimum(num_queries, (split + 1) * reach), ROWS):
        i = start + tl.arange(0, ROWS)
        valid = i < num_queries
        q_first, q_second = _load_wide(q, i, valid, stride_qi * UNIT, D, FIRST, SECOND)
        seen = exists[:, None] & valid[None, :]
        scores = _masked_scores(
            k_first, k_second, q_first, q_second, bias, bias_i, bias_n, i[None, :], n[:, None], seen, scale, SECOND, HAS_BIAS
        )
        place = (b * num_heads + h) * num_queries + i
        normalizer = tl.load(lse + place, mask=valid, other=float("inf"))
        shift = tl.load(delta + place, mask=valid, other=0.0)
        probabilities = tl.exp2(scores - normalizer[None, :])
        wanted = tl.trans(_wanted_by_words(gradient, word_weights, i, n, valid, num_queries, num_keys, num_words, WORDS)) * weight
        if E > 0:
            pull_first, pull_second = _load_wide(output_gradient, i, valid, E, E, E_FIRST, E_SECOND)
            by_output = dot(v_first, tl.trans(pull_first))
            if E_SECOND > 0:
                by_output += dot(v_second, tl.trans(pull_second))
            if RESCALED:
                by_output *= tl.load(output_peak) / tl.load(peak)
            wanted += by_output
            value_first += dot(probabilities.to(v_first.dtype), pull_first)
            if E_SECOND > 0:
                value_second += dot(probabilities.to(v_first.dtype), pull_second)
        scores_gradient = (probabilities * (wanted - shift[None, :])).to(k_first.dtype)
        key_first += dot(scores_gradient, q_first)
        if SECOND > 0:
            key_second += dot(scores_gradient, q_second)
    factor = 1.0
    output_factor = 1.0
    if RESCALED:
        factor = tl.load(peak)
        if E > 0:
            output_factor = tl.load(output_peak)
    num_samples = tl.num_programs(2) // num_heads
    place = ((split * num_samples + b) * num_heads + h) * num_keys
    store_tile(key_out + place * D, n, exists, D, key_first * (factor * scale), D, 0, FIRST)
    if SECOND > 0:
        store_tile(key_out + place * D, n, exists, D, key_second * (factor * scale), D, FIRST, SECOND)
    if E > 0:
        store_tile(value_out + place * E, n, exists, E, value_first * output_factor, E, 0, E_FIRST)
    if E_SECOND > 0:
        store_tile(value_out + place * E, n, exists, E, value_second * output_factor, E, E_FIRST, E_SECOND)


# fmt: on


def _tiles(width: int, dtype: torch.dtype) -> tuple[int, int]:
    """`widths`, but one tile from 64 to 128: a second, narrow one costs these kernels more registers than the padding."""
    return (128, 0) if 64 < width < 128 else widths(width, dtype)


class TritonColumns(ColumnKernels):
    """The launches in Triton."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        # A kernel that reads no bias, head weights or peak gets some other tensor in its place.
        self.bias_or_other = self.query if self.bias is None else self.bias
        self.head_weights_or_other = self.word_weights if self.head_weights is None else self.head_weights
        strides = [t.stride()[:3] for t in (self.query, self.key, self.value)]
        if not self.value_width:
            strides[2] = (0, 0, 0)
        flat = [stride for three in strides for stride in three]
        # In units of eight elements, where they divide: so the compiler knows that whole vectors can be loaded.
        unit = next(n for n in (8, 4, 2, 1) if not any(stride % n for stride in flat))
        self.strides = [stride // unit for stride in flat]
        first, second = _tiles(self.width, self.query.dtype)
        self.constants = {"UNIT": unit, "D": self.width, "FIRST": first, "SECOND": second, "HAS_BIAS": self.bias is not None}
        value_first, value_second = _tiles(self.value_width, self.query.dtype)
        self.value_constants = {"E": self.value_width, "E_FIRST": value_first, "E_SECOND": value_second}

    def blocks(self, table: Mapping[str, Table]) -> Blocks:
        return blocks_for(table, self.device, self.query.dtype, max(self.width, self.value_width))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        output = self.query.new_empty(*self.query.shape[:3], self.value_width)
        lse = self.word_weights.new_empty(self.query.shape[:3])
        words = min(64, power_of_two(self.num_words))
        if self.num_keys > ONE_PASS_KEYS:
            return output, self.two_passes(lse, words), lse
        return output, self.one_pass(output, lse, words), lse

    def one_pass(self, output: torch.Tensor, lse: torch.Tensor, words: int) -> torch.Tensor:
        """The maps, by tiles of `words`; fills the output and the log-sum-exp."""
        found = self.blocks(ONE_PASS_BLOCKS)
        row_blocks = triton.cdiv(self.num_queries, found.rows)
        parts = self.heads
        if self.head_weights is not None:
            parts = splits_for(row_blocks * self.batch, self.heads, self.device)
        heads_per_part = triton.cdiv(self.heads, parts)
        parts = triton.cdiv(self.heads, heads_per_part)
        maps = lse.new_empty(self.batch, parts, self.num_words, self.num_queries)
        keys, more_keys = widths(self.num_keys, torch.float16)
        _one_pass[(row_blocks, parts, self.batch)](
            self.query, self.key, self.value, self.word_weights, self.bias_or_other, self.head_weights_or_other,
            output, maps, lse, *self.strides, *self.bias_strides,
            self.heads, self.num_queries, self.num_keys, self.num_words, heads_per_part, self.scale,
            **self.constants, **self.value_constants, WEIGHTED=self.head_weights is not None,
            KEYS=keys, MORE_KEYS=more_keys, WORDS=words, ROWS=found.rows, num_warps=found.warps, num_stages=found.stages,
        )  # fmt: skip
        return maps if self.head_weights is None or parts == 1 else maps.sum(dim=1, keepdim=True)

    def two_passes(self, lse: torch.Tensor, words: int) -> torch.Tensor:
        """The maps, by tiles of `words`; fills the log-sum-exp."""
        found = self.blocks(TWO_PASSES_BLOCKS)
        maps = lse.new_empty(self.batch, self.heads, self.num_words, self.num_queries)
        grid = (triton.cdiv(self.num_queries, found.rows), triton.cdiv(self.num_words, words), self.batch * self.heads)
        _two_passes[grid](
            self.query, self.key, self.word_weights, self.bias_or_other, maps, lse, *self.strides[:6], *self.bias_strides,
            self.heads, self.num_queries, self.num_keys, self.num_words, self.scale,
            **self.constants, WORDS=words, ROWS=found.rows, KEYS=found.columns, num_warps=found.warps, num_stages=found.stages,
        )  # fmt: skip
        return maps if self.head_weights is None else torch.einsum("h,bhwq->bwq", self.head_weights, maps)[:, None]

    def query_gradient(self, flow: ColumnGradients) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = self.blocks(QUERY_GRADIENT_BLOCKS)
        query_gradient = torch.empty(self.query.shape, dtype=self.query.dtype, device=self.device)
        delta, head_delta = torch.empty_like(flow.lse), torch.empty_like(flow.lse)
        _query_gradient[(triton.cdiv(self.num_queries, found.rows), self.batch * self.heads)](
            *self.gradient_inputs(), flow.lse, flow.maps, flow.output, *self.peaks(flow),
            query_gradient, delta, head_delta, *self.gradient_sizes(flow.maps), **self.gradient_options(found, flow.peak),
        )  # fmt: skip
        return query_gradient, delta, head_delta

    def key_gradient(self, flow: ColumnGradients, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.blocks(KEY_GRADIENT_BLOCKS)
        key_blocks = triton.cdiv(self.num_keys, found.columns)
        most = triton.cdiv(self.num_queries, 4 * found.rows)
        splits = splits_for(key_blocks * self.batch * self.heads, most, self.device)
        key_parts, value_parts = (delta.new_empty(splits, *t.shape) for t in (self.key, self.value))
        _key_gradient[(key_blocks, splits, self.batch * self.heads)](
            *self.gradient_inputs(), flow.lse, delta, flow.maps, flow.output, *self.peaks(flow),
            key_parts, value_parts, *self.gradient_sizes(flow.maps), **self.gradient_options(found, flow.peak),
        )  # fmt: skip
        return key_parts.sum(dim=0).to(self.key.dtype), value_parts.sum(dim=0).to(self.value.dtype)

    def peaks(self, flow: ColumnGradients) -> tuple[torch.Tensor, torch.Tensor]:
        """Both peaks; some tensor in place of those that there are not."""
        return tuple(flow.maps if peak is None else peak for peak in (flow.peak, flow.output_peak))  # type: ignore[return-value]

    def gradient_inputs(self) -> tuple[torch.Tensor, ...]:
        """The first arguments of both gradients' kernels."""
        return self.query, self.key, self.value, self.word_weights, self.bias_or_other, self.head_weights_or_other

    def gradient_sizes(self, gradient: torch.Tensor) -> tuple[float, ...]:
        """Strides and sizes of both gradients' kernels; no stride from head to head where heads were summed."""
        strides = (*self.strides, *self.bias_strides, *gradient.expand(-1, self.heads, -1, -1).stride()[:2])
        return *strides, self.heads, self.num_queries, self.num_keys, self.num_words, self.scale

    def gradient_options(self, found: Blocks, peak: torch.Tensor | None) -> dict[str, int]:
        """Constants and launch options of both gradients' kernels."""
        return {
            **self.constants,
            **self.value_constants,
            "WEIGHTED": self.head_weights is not None,
            "RESCALED": peak is not None,
            "WORDS": min(32, power_of_two(self.num_words)),
            "ROWS": found.rows,
            "KEYS": found.columns,
            "num_warps": found.warps,
            "num_stages": found.stages,
        }


column_maps_triton = column_maps_operation("triton", TritonColumns)
