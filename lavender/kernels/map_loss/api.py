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

from functools import partial

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...errors import ConfigError
from ..checks import in_full_precision, require_tensors
from ..dispatch import able, choose, triton_reasons
from ..numerics import accumulator, power_of_two

EPSILON = 1e-6
NORMALIZATIONS = ("zscore", "sum", "minmax", "max", "none")
DISTANCES = ("mse", "kl")
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
    _validate(student, target, present, normalization, distance, reduction)
    triton = partial(_triton_reasons, student, target, impl)
    chosen = choose("map_loss", impl, {"triton": triton, "torch": able, "reference": able})
    with in_full_precision(student):
        if chosen == "reference":
            per_word = map_loss_reference(student, target.detach(), present, normalization, distance)
        else:
            per_word = _map_loss(student, target, present, normalization, distance, chosen)[0]
    if reduction == "none":
        return per_word
    total = per_word.sum()
    return total if reduction == "sum" else total / present.sum().clamp_min(1)


def map_loss_reference(
    student: torch.Tensor, target: torch.Tensor, present: torch.Tensor, normalization: str, distance: str
) -> torch.Tensor:
    """The specification of `map_loss` without its reduction, by plain differentiable operations: [B, W]."""
    dtype = accumulator(student)
    # Absent words become zeros before any arithmetic: a product with zero would let NaN through, into the gradient too.
    absent = ~present[..., None, None]
    ours = normalize(resample(student.to(dtype).masked_fill(absent, 0), target.shape[-2:]), normalization)
    theirs = normalize(target.to(dtype).masked_fill(absent, 0), normalization)
    if distance == "mse":
        per_word = (ours - theirs).square().mean(dim=(-2, -1))
    else:
        per_word = (theirs * (theirs.clamp_min(EPSILON) / ours.clamp_min(EPSILON)).log()).sum(dim=(-2, -1))
    return per_word.masked_fill(~present, 0)


def resample(maps: torch.Tensor, size: tuple[int, int] | torch.Size) -> torch.Tensor:
    """Bilinear, antialiased resampling of [B, W, y, x] to another height and width."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)


def normalize(maps: torch.Tensor, normalization: str) -> torch.Tensor:
    """Normalizes each map [..., y, x]; see this module's formulas."""
    places = (-2, -1)
    if normalization == "zscore":
        centered = maps - maps.mean(dim=places, keepdim=True)
        return centered * (centered.square().mean(dim=places, keepdim=True) + EPSILON).rsqrt()
    if normalization == "sum":
        return maps / (maps.sum(dim=places, keepdim=True) + EPSILON)
    if normalization == "minmax":
        low, high = maps.amin(dim=places, keepdim=True), maps.amax(dim=places, keepdim=True)
        return (maps - low) / (high - low + EPSILON)
    if normalization == "max":
        return maps / (maps.amax(dim=places, keepdim=True) + EPSILON)
    if normalization == "none":
        return maps
    raise ConfigError(f"normalization is {normalization!r}; choose one of {', '.join(NORMALIZATIONS)}")


def _validate(
    student: torch.Tensor, target: torch.Tensor, present: torch.Tensor, normalization: str, distance: str, reduction: str
) -> None:
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
    for name, given, known in (
        ("normalization", normalization, NORMALIZATIONS),
        ("distance", distance, DISTANCES),
        ("reduction", reduction, REDUCTIONS),
    ):
        if given not in known:
            raise ConfigError(f"{name} is {given!r}; choose one of {', '.join(known)}")
    if distance == "kl" and normalization != "sum":
        raise ConfigError(f"distance='kl' compares distributions: use normalization='sum', not {normalization!r}")


def _triton_reasons(student: torch.Tensor, target: torch.Tensor, impl: str) -> list[str]:
    reasons = triton_reasons(student, 0, 0, impl == "triton")
    longest = max(*student.shape[2:], *target.shape[2:])
    if longest > LONGEST_SIDE:
        reasons.append(f"a map is {longest} places long, more than {LONGEST_SIDE}")
    (y, x), (target_y, target_x) = (map(power_of_two, maps.shape[2:]) for maps in (student, target))
    if student.shape != target.shape and y * target_x * max(x, target_y) > LARGEST_PRODUCT:
        reasons.append(f"resampling {tuple(student.shape[2:])} to {tuple(target.shape[2:])} needs more registers than there are")
    return reasons


def _matrices(student: torch.Tensor, target: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """R_y [y', y] and R_x [x', x] of the resampling, by resampling unit vectors."""
    y_matrix, x_matrix = (
        resample(torch.eye(old, dtype=dtype, device=student.device)[None, None], (new, old))[0, 0]
        for old, new in zip(student.shape[2:], target.shape[2:], strict=True)
    )
    return y_matrix, x_matrix


@torch.library.custom_op("lavender::map_loss", mutates_args=())
def _map_loss(
    student: torch.Tensor, target: torch.Tensor, present: torch.Tensor, normalization: str, distance: str, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances [B, W] and their gradients by the student's maps, [B, W, y, x]."""
    dtype = accumulator(student)
    matrices = _matrices(student, target, dtype) if student.shape != target.shape else None
    if impl == "triton":
        from .triton_kernels import map_loss_triton

        return map_loss_triton(student, target, present, normalization, distance, matrices)
    absent = ~present[..., None, None]
    ours = student.to(dtype).masked_fill(absent, 0)
    if matrices is not None:
        ours = matrices[0] @ ours @ matrices[1].mT
    normalized = normalize(ours, normalization)
    theirs = normalize(target.to(dtype).masked_fill(absent, 0), normalization)
    places = (-2, -1)
    if distance == "mse":
        difference = normalized - theirs
        per_word = difference.square().mean(dim=places)
        pull = difference * (2 / (theirs.shape[2] * theirs.shape[3]))
    else:
        per_word = (theirs * (theirs.clamp_min(EPSILON) / normalized.clamp_min(EPSILON)).log()).sum(dim=places)
        pull = torch.where(normalized >= EPSILON, -theirs / normalized.clamp_min(EPSILON), 0)
    gradient = _normalize_backward(pull, ours, normalized, normalization)
    if matrices is not None:
        gradient = matrices[0].mT @ gradient @ matrices[1]
    return per_word.masked_fill(~present, 0), gradient.masked_fill(absent, 0)


def _normalize_backward(pull: torch.Tensor, maps: torch.Tensor, normalized: torch.Tensor, normalization: str) -> torch.Tensor:
    """The gradient by `maps`, given the one by `normalized`; ties of an extreme share its gradient evenly, as in torch.amax."""
    places = (-2, -1)
    along = (pull * normalized).sum(dim=places, keepdim=True)

    def share_of(extreme: torch.Tensor) -> torch.Tensor:
        ties = maps == extreme
        return ties / ties.sum(dim=places, keepdim=True)

    if normalization == "zscore":
        size = maps.shape[-2] * maps.shape[-1]
        variance = (maps - maps.mean(dim=places, keepdim=True)).square().mean(dim=places, keepdim=True)
        return (pull - pull.mean(dim=places, keepdim=True) - normalized * (along / size)) * (variance + EPSILON).rsqrt()
    if normalization == "sum":
        return (pull - along) / (maps.sum(dim=places, keepdim=True) + EPSILON)
    if normalization == "none":
        return pull
    high = maps.amax(dim=places, keepdim=True)
    if normalization == "max":
        return (pull - share_of(high) * along) / (high + EPSILON)
    low = maps.amin(dim=places, keepdim=True)
    total = pull.sum(dim=places, keepdim=True)
    return (pull - share_of(high) * along + share_of(low) * (along - total)) / (high - low + EPSILON)


@_map_loss.register_fake
def _(student, target, present, normalization, distance, impl):  # type: ignore[no-untyped-def]
    dtype = accumulator(student)
    return student.new_empty(student.shape[:2], dtype=dtype), torch.empty(student.shape, dtype=dtype, device=student.device)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(output[1])
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


@once_differentiable
def _backward(ctx, per_word, _):  # type: ignore[no-untyped-def]
    (gradient,) = ctx.saved_tensors
    return (gradient * per_word[..., None, None]).to(ctx.dtype), None, None, None, None, None


_map_loss.register_autograd(_backward, setup_context=_setup_context)
