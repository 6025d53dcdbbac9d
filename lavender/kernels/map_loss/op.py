"""`map_loss` as an operation whose forward pass writes the gradient, whichever implementation runs it."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..numerics import accumulator
from .call import LossCall
from .chunked import map_loss_chunked


@torch.library.custom_op("lavender::map_loss", mutates_args=())
def map_loss_operation(
    student: torch.Tensor, target: torch.Tensor, present: torch.Tensor, normalization: str, distance: str, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances [B, W] and their gradients by the student's maps, [B, W, y, x], by `"triton"` or `"torch"`."""
    call = LossCall(student, target, present, normalization, distance)
    if impl == "triton":
        from .triton_kernels import map_loss_triton

        return map_loss_triton(call)
    return map_loss_chunked(call)


@map_loss_operation.register_fake
def _(student: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = accumulator(student)
    return student.new_empty(student.shape[:2], dtype=dtype), torch.empty(student.shape, dtype=dtype, device=student.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


@once_differentiable
def _backward(ctx: Any, per_word: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (saved,) = ctx.saved_tensors
    return (saved * per_word[..., None, None]).to(ctx.dtype), None, None, None, None, None


map_loss_operation.register_autograd(_backward, setup_context=_setup_context)
