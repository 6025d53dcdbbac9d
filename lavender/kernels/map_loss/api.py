r"""Comparing a student's word maps with their targets: resample, normalize both per map, compare, reduce.

    loss[b,w] = distance(norm(resampled student[b,w]), norm(target[b,w])), zero where the word is not present
    mse: mean over places of (S - T)^2          kl: sum over places of T log(T / S), with `sum` alone

    zscore: (A - mean) / sqrt(variance + eps)   sum: A / (sum + eps)   minmax: (A - min) / (max - min + eps)
    max: A / (max + eps)                        none: A

`zscore` leaves the scale of A open, so that nothing pulls a linear aligner toward a constant; `minmax` is the published choice.
Bilinear resampling is separable: R_y A R_x^T. The gradient is written in the forward pass, one tensor of the student's maps'
size, and nothing else is saved. Implementations: `reference`; `torch`; `triton`, one program a word, sides up to 64. Sums run in
float32, or in float64 for float64 inputs.
"""

from __future__ import annotations

import torch

from ...errors import ConfigError
from ..checks import in_full_precision, require_tensors
from ..dispatch import able, choose, triton_reasons
from ..numerics import power_of_two
from .call import LossCall
from .normalization import DISTANCES, NORMALIZATIONS
from .op import map_loss_operation
from .reference import map_loss_reference

REDUCTIONS = ("mean", "sum", "none")
LONGEST_SIDE = 64
"""The largest height or width of `triton`'s maps, either side of the resampling."""
LARGEST_PRODUCT = 32 * 32 * 32
"""Multiplications in `triton`'s largest matrix product of the resampling, sizes padded: with more, registers spill."""


def map_loss(
    student: torch.Tensor,
    target: torch.Tensor,
    present: torch.Tensor,
    *,
    normalization: str = "zscore",
    distance: str = "mse",
    reduction: str = "mean",
    impl: str = "auto",
) -> torch.Tensor:
    """Distance of a student's word maps from their targets, differentiable in `student`.

    Args:
        student: [B, W, y, x], floating point; resampled (bilinear, antialiased) to the target's grid if that is another one. Its
            values should be of order one, or the normalizations' epsilon of 1e-6 counts: multiply attention by the number of
            places that it runs over.
        target: [B, W, y', x'], floating point; whatever stands where `present` is False, NaN included, is ignored. It gets no
            gradient.
        present: bool [B, W], whether a word has both a student's map and a target.
        normalization: `"zscore"`, `"sum"`, `"minmax"`, `"max"` or `"none"`, of both sides, per map. `sum` and `max` are meant for
            maps that are not negative.
        distance: `"mse"`, or `"kl"` of the target from the student, for `normalization="sum"`.
        reduction: `"mean"` over present words (zero if there is none), `"sum"`, or `"none"` for [B, W].
        impl: `"auto"`, `"triton"`, `"torch"` or `"reference"`.

    Returns:
        A scalar, or [B, W]; float32 (float64 for float64 inputs).

    Raises:
        ConfigError: shapes, dtypes or devices do not fit, something is empty, or a choice is unknown or cannot run here.
    """
    call = LossCall(student, target, present, normalization, distance)
    _validate(call, reduction)
    chosen = choose("map_loss", impl, {"triton": lambda: _triton_reasons(call, impl), "torch": able, "reference": able})
    with in_full_precision(student):
        if chosen == "reference":
            per_word = map_loss_reference(call)
        else:
            per_word = map_loss_operation(student, target, present, normalization, distance, chosen)[0]
    if reduction == "none":
        return per_word
    total = per_word.sum()
    return total if reduction == "sum" else total / present.sum().clamp_min(1)


def _validate(call: LossCall, reduction: str) -> None:
    student, target, present = call.student, call.target, call.present
    require_tensors(student=student, target=target, present=present)
    for name, maps in (("student", student), ("target", target)):
        if not maps.is_floating_point():
            raise ConfigError(f"{name} is {maps.dtype}; expected floating point")
    if present.dtype != torch.bool:
        raise ConfigError(f"present is {present.dtype}; expected bool, whether a word is compared")
    if student.ndim != 4 or target.ndim != 4 or not student.shape[:2] == target.shape[:2] == present.shape:
        raise ConfigError(
            f"student {tuple(student.shape)}, target {tuple(target.shape)} and present {tuple(present.shape)} do not fit; "
            "expected [B, W, y, x] twice and [B, W]"
        )
    for name, choice, known in (
        ("normalization", call.normalization, NORMALIZATIONS),
        ("distance", call.distance, DISTANCES),
        ("reduction", reduction, REDUCTIONS),
    ):
        if choice not in known:
            raise ConfigError(f"{name} is {choice!r}; choose one of {', '.join(known)}")
    if call.distance == "kl" and call.normalization != "sum":
        raise ConfigError(f"distance='kl' compares distributions: use normalization='sum', not {call.normalization!r}")


def _triton_reasons(call: LossCall, impl: str) -> list[str]:
    student, target = call.student, call.target
    reasons = triton_reasons(student, 0, 0, impl == "triton")
    longest = max(*student.shape[2:], *target.shape[2:])
    if longest > LONGEST_SIDE:
        reasons.append(f"a map is {longest} places long, more than {LONGEST_SIDE}")
    (y, x), (target_y, target_x) = (map(power_of_two, maps.shape[2:]) for maps in (student, target))
    if student.shape != target.shape and y * target_x * max(x, target_y) > LARGEST_PRODUCT:
        reasons.append(f"resampling {tuple(student.shape[2:])} to {tuple(target.shape[2:])} needs more registers than there are")
    return reasons
