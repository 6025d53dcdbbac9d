"""How launches are cut to the device, and the tensors that kernels can read: what does not depend on the kernels' language."""

from __future__ import annotations

import torch


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors; one under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def splits_for(programs: int, most: int, device: torch.device) -> int:
    """Into how many parts a loop is cut so that the device has about two programs a processor; from shapes alone."""
    return max(1, min(most, 2 * num_processors(device) // max(1, programs)))


def head_parts(heads: int, programs: int, summed: bool, device: torch.device) -> tuple[int, int]:
    """Into how many parts heads are cut, and the heads of a part: each its own, or, summed, as `splits_for` has it."""
    heads_per_part = -(-heads // (splits_for(programs, heads, device) if summed else heads))
    return -(-heads // heads_per_part), heads_per_part


def gradient_strides(gradient: torch.Tensor, heads: int) -> tuple[int, int]:
    """Strides of samples and heads of the maps' gradient [B, C, W, ..]: zero from head to head where heads were summed."""
    batch_stride, head_stride, *_ = gradient.expand(-1, heads, -1, -1).stride()
    return batch_stride, head_stride


def last_axis_dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy if its last axis is strided."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()
