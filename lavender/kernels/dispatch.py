"""Which implementation of an operation runs: the fastest able one by default, exactly the named one otherwise."""

from __future__ import annotations

import importlib.util
import logging
import operator
import os
from collections.abc import Callable, Mapping
from functools import cache

import torch

from ..errors import ConfigError
from .cuda import driver as cuda

logger = logging.getLogger(__name__)

WhyNot = Callable[[], list[str]]

HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose(op: str, impl: str, candidates: Mapping[str, WhyNot]) -> str:
    """Name of the implementation to run.

    Args:
        op: the operation's name, for messages.
        impl: `"auto"` or a candidate's name. A candidate asked for by name is never replaced by another.
        candidates: fastest first; each gives the reasons why it cannot run here, none if it can.

    Raises:
        ConfigError: `impl` is unknown, or cannot run here; the message gives every reason.
    """
    if impl == "auto":
        for name, why_not in candidates.items():
            if not why_not():
                if not torch.compiler.is_compiling():
                    _log_choice(op, name)
                return name
        raise ConfigError(f"no implementation of {op} can run here: { ({n: w() for n, w in candidates.items()}) }")
    if impl not in candidates:
        raise ConfigError(f"{op} has no implementation {impl!r}; choose auto or one of {', '.join(candidates)}")
    reasons = candidates[impl]()
    if reasons:
        raise ConfigError(f"impl={impl!r} cannot run {op} here: {'; '.join(reasons)}")
    return impl


@cache
def _log_choice(op: str, name: str) -> None:
    logger.info("%s runs by its %r implementation", op, name)


def able() -> list[str]:
    """The reasons of an implementation that runs everywhere: none."""
    return []


def triton_reasons(tensor: torch.Tensor, width: int, widest_float32: int, by_name: bool) -> list[str]:
    """Why no attention kernel in Triton can run on tensors like this one, with heads of this width.

    `widest_float32` is the operation's limit in float32, where registers run out early; it is 256 in half precision.

    On a CPU the kernels run in Triton's interpreter, which is a test and no implementation to choose: it counts only if it is
    asked for `by_name` and the environment has had `TRITON_INTERPRET=1` since before triton was imported.
    """
    reasons = []
    if not HAS_TRITON:
        reasons.append("triton is not installed (pip install triton)")
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"the dtype is {tensor.dtype}; its kernels take float16, bfloat16 and float32")
    widest = widest_float32 if tensor.dtype == torch.float32 else 256
    if width > widest:
        reasons.append(f"the head width is {width}; its kernels take up to {widest} in {tensor.dtype}")
    if tensor.device.type == "cuda":
        capability = torch.cuda.get_device_capability(tensor.device)
        if capability < (8, 0):
            reasons.append(f"compute capability {capability[0]}.{capability[1]} is below 8.0, where Triton has no tensor cores")
    elif not (by_name and tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        reasons.append(f"the tensors are on {tensor.device.type}, not on cuda")
    return reasons


def cuda_reasons(file: str, tensor: torch.Tensor, width: int, heads: int, by_name: bool) -> list[str]:
    """Why the CUDA C++ kernels of one file of csrc/ cannot run on tensors like this one, with `heads` B * H of this width.

    They are compiled and loaded to find out, the first time. What runs CPU tensors, in tests, counts only if asked for `by_name`.
    """
    reasons = []
    if tensor.dtype != torch.float16:
        reasons.append(f"the dtype is {tensor.dtype}; its kernels take float16")
    if width > cuda.WIDEST:
        reasons.append(f"the head width is {width}; its kernels take up to {cuda.WIDEST}")
    if heads > cuda.MOST_HEADS:
        reasons.append(f"the batch has {heads} heads; its kernels take up to {cuda.MOST_HEADS}")
    if tensor.device.type != "cuda" and not by_name:
        reasons.append(f"the tensors are on {tensor.device.type}, not on cuda")
    # `index`: in a graph for any width, this one is taken for a constant.
    return reasons or _runner_reasons(file, operator.index(width), str(tensor.device))


def _runner_reasons(file: str, width: int, device: str) -> list[str]:
    return cuda.runner.why_not(cuda.Program(file, width, width % 8 == 0), torch.device(device))


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes as long as torch itself.
_runner_reasons._dynamo_marked_constant = True  # type: ignore[attr-defined]
