"""What the operations ask of their inputs, and what they say when it is not so."""

from __future__ import annotations

import torch

from ..errors import ConfigError
from ..types import WordRows


def require_tensors(**tensors: torch.Tensor | None) -> None:
    """Raises `ConfigError` unless all are tensors with elements on one device; None stands for an argument that was left out."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in present.items():
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError(f"{name} is a {type(tensor).__name__}; expected a tensor")
        if not tensor.numel():
            raise ConfigError(f"{name} {tuple(tensor.shape)} is empty; leave the call out where there is nothing to read")
    devices = {name: str(tensor.device) for name, tensor in present.items()}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ConfigError(f"the tensors are on different devices ({places}); move them to one")


def require_attention(query: torch.Tensor, key: torch.Tensor) -> None:
    """Raises `ConfigError` unless query [B, H, T, D] and key [B, G, N, D] fit and share a floating-point dtype."""
    if query.ndim != 4 or key.ndim != 4 or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ConfigError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} do not fit; expected [B, H, T, D] and [B, G, N, D]"
        )
    if query.dtype != key.dtype or query.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ConfigError(f"query is {query.dtype} and key {key.dtype}; cast both to one of float16, bfloat16, float32 and float64")


def require_head_weights(head_weights: torch.Tensor | None, heads: int) -> None:
    """Raises `ConfigError` unless the weights, if there are any, are floating point [H]."""
    if head_weights is not None and (head_weights.shape != (heads,) or not head_weights.is_floating_point()):
        raise ConfigError(
            f"head_weights is {head_weights.dtype} {tuple(head_weights.shape)}; expected [{heads}], one weight per query head"
        )


def require_mask(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> None:
    """Raises `ConfigError` unless the mask, if there is one, is boolean or floating point and broadcasts to [B, H, T, N]."""
    if mask is None:
        return
    full = (*query.shape[:3], key.shape[2])
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ConfigError(f"the mask is {mask.dtype}; expected bool (True may be seen) or an additive floating-point mask")
    sizes = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if mask.ndim > 4 or any(size not in (1, whole) for size, whole in zip(sizes, full, strict=True)):
        hint = "; for a padding mask [B, N] give mask[:, None, None]" if mask.shape == (full[0], full[3]) else ""
        raise ConfigError(f"the mask {tuple(mask.shape)} does not broadcast to [B, H, T, N], {full}{hint}")


def require_places(rows: WordRows, columns: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> None:
    """Raises `ConfigError` unless rows and columns are index tensors that fit and, on a CPU, lie in their ranges.

    On other devices ranges are not checked: that would wait for the device.
    """
    batch = query.shape[0]
    if not rows.rows.shape == rows.words.shape == rows.weights.shape or rows.rows.ndim != 2 or len(rows.rows) != batch:
        shapes = ", ".join(str(tuple(t.shape)) for t in (rows.rows, rows.words, rows.weights))
        raise ConfigError(f"rows, words and weights of the word rows are {shapes}; expected three times [{batch}, R]")
    if columns.ndim != 2 or len(columns) != batch:
        raise ConfigError(f"columns {tuple(columns.shape)} do not fit {batch} samples; expected [B, M]")
    if rows.num_words < 1:
        raise ConfigError(f"num_words of the word rows is {rows.num_words}; leave the call out where there is nothing to read")
    limits = (("rows", rows.rows, query.shape[2]), ("words", rows.words, rows.num_words), ("columns", columns, key.shape[2]))
    for name, index, limit in limits:
        if index.dtype != torch.int64:
            raise ConfigError(f"{name} are {index.dtype}; expected int64")
        if index.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(n) for n in index.aminmax())
            if low < -1 or high >= limit:
                raise ConfigError(f"{name} lie in [{low}, {high}]; expected indices in [0, {limit}), or -1 for padding")


def as_attended(tensor: torch.Tensor) -> torch.Tensor:
    """A query, key or value in the dtype that attention computes in: under autocast, what attention casts to.

    A model under autocast may hand float32 to its attention, as after rotary positions; maps are those of what it attends by.
    """
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def in_full_precision(tensor: torch.Tensor) -> torch.autocast:
    """A context without autocast, which would round the sums of matrix products."""
    return torch.autocast(tensor.device.type, enabled=False)
