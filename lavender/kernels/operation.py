"""Registering an implementation with torch: an operation, its gradient, and what a compiler may assume of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch.autograd.function import once_differentiable

from .checks import in_full_precision

Call = TypeVar("Call")
Results = TypeVar("Results", torch.Tensor, tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor])
Tensors = tuple[torch.Tensor, ...]

_SCHEMA_TYPES = {"torch.Tensor": "Tensor", "torch.Tensor | None": "Tensor?", "int": "int", "bool": "bool", "float": "float"}


def register(
    name: str,
    kind: type[Call],
    forward: Callable[[Call], Results],
    fake: Callable[[Call], Results],
    backward: Callable[..., Tensors],
    differentiable: tuple[str, ...],
    num_outputs: int,
    saves_last: bool = False,
) -> Callable[[Call], Results]:
    """Registers `lavender::{name}` and `lavender::{name}_backward`, whose arguments are the fields of a dataclass.

    Args:
        kind: the dataclass of one call's tensors and numbers; operations take its fields, flat, in their order.
        forward: the implementation, without autograd.
        fake: empty tensors of the outputs' shapes, strides and dtypes.
        backward: takes the call, the saved output (or None) and the outputs' contiguous gradients; gives one gradient per
            differentiable field, contiguous.
        differentiable: the call's fields that have a gradient. That of `head_weights` [H] has the dtype of the last output's
            gradient, and means nothing if the call has none.
        num_outputs: how many tensors `forward` gives: a tensor if it is one, else a tuple.
        saves_last: whether the last output is kept for the backward pass; it has no gradient then.

    Returns:
        The operation, which takes the dataclass.
    """
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    arguments = ", ".join(f"{_SCHEMA_TYPES[field.type]} {field.name}" for field in fields(kind))  # type: ignore[arg-type, index]

    operation = torch.library.custom_op(
        f"lavender::{name}",
        lambda *flat: forward(kind(*flat)),
        mutates_args=(),
        schema=f"({arguments}) -> {_tuple_of(num_outputs)}",
    )
    operation.register_fake(lambda *flat: fake(kind(*flat)))
    backward_operation = torch.library.custom_op(
        f"lavender::{name}_backward",
        lambda gradients, saved, *flat: backward(kind(*flat), saved, *gradients),
        mutates_args=(),
        schema=f"(Tensor[] gradients, Tensor? saved, {arguments}) -> {_tuple_of(len(differentiable))}",
    )

    @backward_operation.register_fake
    def _(gradients: list[torch.Tensor], saved: torch.Tensor | None, *flat: Any) -> Tensors:
        call = kind(*flat)
        inputs: list[torch.Tensor] = [getattr(call, field) for field in differentiable if field != "head_weights"]
        results = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in inputs]
        if "head_weights" in differentiable:
            results.append(gradients[-1].new_empty(inputs[0].shape[1]))
        return tuple(results)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.numbers = [None if isinstance(value, torch.Tensor) else value for value in inputs]
        tensors = [value if isinstance(value, torch.Tensor) else None for value in inputs]
        if saves_last:
            ctx.mark_non_differentiable(output[-1])
        ctx.save_for_backward(*tensors, output[-1] if saves_last else None)

    @once_differentiable
    def differentiate(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, saved = ctx.saved_tensors
        flat = [number if tensor is None else tensor for tensor, number in zip(tensors, ctx.numbers, strict=True)]
        dense = [gradient.contiguous() for gradient in (gradients[:-1] if saves_last else gradients)]
        with in_full_precision(dense[0]):
            results = dict(zip(differentiable, backward_operation(dense, saved, *flat), strict=True))
        return tuple(None if value is None else results.get(field) for field, value in zip(names, flat, strict=True))

    operation.register_autograd(differentiate, setup_context=setup_context)
    return lambda call: operation(*(getattr(call, field) for field in names))


def _tuple_of(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
