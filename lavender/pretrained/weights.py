"""What must be true of a model's weights after a library loaded them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import ModelError

logger = logging.getLogger("lavender")

NUM_NAMED = 3
"""Of many tensors, so many are named."""


def require_complete(model: nn.Module, report: Mapping[str, Any], what: str) -> None:
    """Raises `ModelError` if a library's loading info says that weights of a model are not those of its checkpoint.

    Weights of the checkpoint that the model has no place for are named in a warning, but for those of an aligner.

    Args:
        model: whose weights may be on the meta device.
        report: what `from_pretrained(..., output_loading_info=True)` of transformers and diffusers returns beside the model.
        what: the subject of the message.
    """
    tensors = model.state_dict()
    # Buffers of integers are positions and counts, which the model's code computes.
    missing = sorted(key for key in report["missing_keys"] if key not in tensors or tensors[key].is_floating_point())
    unexpected = sorted(key for key in report["unexpected_keys"] if "lavender." not in key)
    kind = type(model).__name__
    if missing:
        others = f", and has {len(unexpected)} that a {kind} does not know ({some(unexpected)})" if unexpected else ""
        raise ModelError(
            f"{what} lacks {len(missing)} of {len(tensors)} weights, which would be random ({some(missing)}){others}; give a whole "
            f"copy of a {kind}, as save_pretrained writes it"
        )
    mismatched = sorted((key, list(there), list(here)) for key, there, here in report["mismatched_keys"])
    if mismatched:
        shapes = [f"{key}: {there} in the file, {here} by the config" for key, there, here in mismatched]
        raise ModelError(
            f"{len(mismatched)} of {len(tensors)} weights of {what} have another shape than its config says "
            f"({some(shapes, '; ')}); give the config.json that belongs to them"
        )
    if unexpected:
        logger.warning("%s: a %s has no place for %d of its weights (%s)", what, kind, len(unexpected), some(unexpected))


def require_floating_point(expected: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Raises `ModelError` if files have integers where a model has floating point numbers: libraries convert them, whatever scale
    they had.

    Args:
        expected: the weights of a model that is not quantized.
        tensors: those of its files, as `read_shapes` gives them.
        what: the subject of the message.
    """
    # By the last part of their names: libraries load weights from other places than the model has them in.
    kinds = [
        {key.rpartition(".")[2] for key, tensor in expected.items() if tensor.is_floating_point() == is_real}
        for is_real in (True, False)
    ]
    bad = sorted(
        key for key, tensor in tensors.items() if not tensor.is_floating_point() and key.rpartition(".")[2] in kinds[0] - kinds[1]
    )
    if bad:
        raise ModelError(
            f"{len(bad)} of {len(tensors)} weights of {what} are integers in the file ({some(bad)}), and its config names no "
            "quantization; give the config.json that belongs to them, or weights in floating point"
        )


def require_finite(model: nn.Module, what: str) -> None:
    """Raises `ModelError` if weights of a model, persistent buffers among them, are NaN or infinite.

    Under ZeRO-3 each process looks at its own part, and all of them raise alike.
    """
    persistent = model.state_dict().keys()
    tensors = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n in persistent}}
    bad = non_finite(tensors.items())
    if any(hasattr(tensor, "ds_tensor") for tensor in tensors.values()):
        everywhere: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, bad)
        found = {name for names in everywhere for name in names}
        bad = [name for name in tensors if name in found]
    if bad:
        raise ModelError(
            f"{len(bad)} of {len(tensors)} weights of {what} hold NaN or infinity ({some(bad)}); give a sound copy, or, where they "
            "are too large for float16, load them in bfloat16 or float32"
        )


@torch.no_grad()
def non_finite(values: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Names of the tensors that hold NaN or infinity, of each the part that this process holds.

    Reads every value once, and waits for the device once. Quantized weights are integers, with scales of their own kind.
    """
    parts = [(name, local_part(value)) for name, value in values]
    checked = [
        (name, part.half() if part.element_size() == 1 else part)
        for name, part in parts
        if part.is_floating_point() and part.numel() and not part.is_meta and not is_traceable_wrapper_subclass(part)
    ]
    if not checked:
        return []
    # NaN is both the least and the greatest; nothing of a tensor's size is allocated.
    finite = [torch.stack(part.aminmax()).isfinite().all().to(checked[0][1].device) for _, part in checked]
    return [name for (name, _), is_finite in zip(checked, torch.stack(finite).tolist(), strict=True) if not is_finite]


def local_part(value: Any) -> torch.Tensor:
    """The part of a weight that this process holds, where FSDP2 or ZeRO-3 splits it."""
    if hasattr(value, "to_local"):
        value = value.to_local()
    elif hasattr(value, "ds_tensor"):  # the last process's is padded with whatever the memory held
        size = value.ds_tensor.ds_numel
        begin = size * torch.distributed.get_rank(value.ds_process_group)
        value = value.ds_tensor.flatten()[: max(0, min(size, value.ds_numel - begin))]
    part: torch.Tensor = value.detach()
    return part


def some(names: list[str], separator: str = ", ") -> str:
    """The first of many names."""
    return separator.join(names[:NUM_NAMED]) + (separator + "..." if len(names) > NUM_NAMED else "")
