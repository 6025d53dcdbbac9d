"""`map_loss` in Triton: one program a word resamples, normalizes, compares and writes the gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..numerics import power_of_two
from ..tiles import dot
from .call import LossCall
from .normalization import DISTANCES, EPSILON, NORMALIZATIONS

TINY = tl.constexpr(EPSILON)
ZSCORE, SUM, MINMAX, MAX = (tl.constexpr(NORMALIZATIONS.index(name)) for name in ("zscore", "sum", "minmax", "max"))
MSE = tl.constexpr(DISTANCES.index("mse"))


@triton.jit
def _total(values):
    return tl.sum(tl.sum(values, 1), 0)


@triton.jit
def _normalize(maps, m, count, KIND: tl.constexpr):
    """A map's normal form, zero outside it, and the factor between them: the formulas of `map_loss`."""
    high = tl.max(tl.max(tl.where(m, maps, float("-inf")), 1), 0)
    low = tl.min(tl.min(tl.where(m, maps, float("inf")), 1), 0)
    factor = high * 0.0 + 1.0
    shifted = maps
    if KIND == ZSCORE:
        shifted = maps - _total(maps) / count
        shifted = tl.where(m, shifted, 0.0)
        factor = 1.0 / tl.sqrt(_total(shifted * shifted) / count + TINY)
    if KIND == SUM:
        factor = 1.0 / (_total(maps) + TINY)
    if KIND == MINMAX:
        shifted = maps - low
        factor = 1.0 / (high - low + TINY)
    if KIND == MAX:
        factor = 1.0 / (high + TINY)
    return tl.where(m, shifted * factor, 0.0), factor, high, low


@triton.jit(do_not_specialize=["y", "x", "target_y", "target_x"])
def _map_loss_kernel(
    p_student, p_target, p_present, p_y_matrix, p_x_matrix, p_loss, p_gradient, y, x, target_y, target_x,
    KIND: tl.constexpr, DISTANCE: tl.constexpr, RESAMPLED: tl.constexpr,
    Y: tl.constexpr, X: tl.constexpr, TARGET_Y: tl.constexpr, TARGET_X: tl.constexpr,
):  # fmt: skip
    """loss[word], and gradient[word, y, x]: its derivative by the student's map."""
    word = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, Y), tl.arange(0, X)
    m_student = (i < y)[:, None] & (j < x)[None, :]
    place = word * y * x + i[:, None] * x + j[None, :]
    flag = tl.load(p_present + word).to(tl.int32)  # an absent word's maps are not read: they may hold NaN
    maps = tl.load(p_student + place, mask=m_student & (i < y * flag)[:, None], other=0.0).to(tl.float32)
    target_i, target_j = tl.arange(0, TARGET_Y), tl.arange(0, TARGET_X)
    m_target = (target_i < target_y)[:, None] & (target_j < target_x)[None, :]
    y_place, m_y = target_i[:, None] * y + i[None, :], (target_i < target_y)[:, None] & (i < y)
    x_place, m_x = target_j[:, None] * x + j[None, :], (target_j < target_x)[:, None] & (j < x)
    if RESAMPLED:
        maps = dot(maps, tl.trans(tl.load(p_x_matrix + x_place, mask=m_x, other=0.0)))
        maps = dot(tl.load(p_y_matrix + y_place, mask=m_y, other=0.0), maps)
    target_place = word * target_y * target_x + target_i[:, None] * target_x + target_j[None, :]
    theirs = tl.load(p_target + target_place, mask=m_target & (target_i < target_y * flag)[:, None], other=0.0).to(tl.float32)

    count = target_y * target_x
    ours, factor, high, low = _normalize(maps, m_target, count, KIND)
    theirs, _, _, _ = _normalize(theirs, m_target, count, KIND)
    if DISTANCE == MSE:
        value = _total((ours - theirs) * (ours - theirs)) / count
        pull = (ours - theirs) * (2.0 / count)
    else:
        floored = tl.maximum(ours, TINY)
        value = _total(theirs * tl.log(tl.maximum(theirs, TINY) / floored))
        pull = tl.where(ours >= TINY, -theirs / floored, 0.0)
    along = _total(pull * ours)
    if KIND == ZSCORE:
        pull = pull - _total(pull) / count - ours * (along / count)
    if KIND == SUM:
        pull -= along
    if (KIND == MINMAX) | (KIND == MAX):
        highest = tl.where(m_target & (maps == high), 1.0, 0.0)
        lowest = tl.where(m_target & (maps == low), 1.0, 0.0)
        total = _total(pull)
        pull -= highest * (along / _total(highest))
        if KIND == MINMAX:
            pull += lowest * ((along - total) / _total(lowest))
    pull = tl.where(m_target, pull * factor * flag, 0.0)
    tl.store(p_loss + word, value * flag)
    if RESAMPLED:  # the matrices are read again: they do not fit into the registers meanwhile
        pull = dot(tl.trans(tl.load(p_y_matrix + y_place, mask=m_y, other=0.0)), pull)
        pull = dot(pull, tl.load(p_x_matrix + x_place, mask=m_x, other=0.0))
    tl.store(p_gradient + place, pull, mask=m_student)


def map_loss_triton(call: LossCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances [B, W] and their gradients [B, W, y, x]."""
    student, target, matrices = call.student.contiguous(), call.target.contiguous(), call.matrices()
    loss = torch.empty(student.shape[:2], dtype=torch.float32, device=student.device)
    gradient = torch.empty(student.shape, dtype=torch.float32, device=student.device)
    y, x = student.shape[2:]
    target_y, target_x = target.shape[2:]
    y_matrix, x_matrix = (loss, loss) if matrices is None else (m.contiguous() for m in matrices)
    _map_loss_kernel[(loss.numel(),)](
        student, target, call.present.to(torch.uint8).contiguous(), y_matrix, x_matrix, loss, gradient,
        y, x, target_y, target_x,
        KIND=NORMALIZATIONS.index(call.normalization), DISTANCE=DISTANCES.index(call.distance), RESAMPLED=matrices is not None,
        Y=power_of_two(y), X=power_of_two(x), TARGET_Y=power_of_two(target_y), TARGET_X=power_of_two(target_x), num_warps=8,
    )  # fmt: skip
    return loss, gradient
