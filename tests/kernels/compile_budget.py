"""Compiles every Triton kernel, as its launchers specialize it, for GPUs that need not be there; prints what it takes as JSON.

    python -m tests.kernels.compile_budget 90 [row_maps ...] [--first]

`--first` compiles the first case of each operation alone. The launchers run unchanged on CPU tensors; a driver without
a device makes Triton compile for the given compute capability and launch nothing. Kernels must not be interpreted in
that process: `TRITON_INTERPRET` must be unset, as `compile_apart` does.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lavender.kernels import grids, tiles
from lavender.words import collate_rows

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
"""The most shared memory that a block may take, by compute capability."""


def ptxas_version() -> list[str]:
    """What the assemblers that triton came with say of themselves."""
    tools = sorted(TOOLS.glob("ptxas*"))
    return [subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout for tool in tools]


def compile_apart(capability: int, *arguments: str) -> dict[str, dict[str, int]]:
    """What this module prints when a process of its own runs it; in that process nothing is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Spelled out, or Triton warns that a default is going to change.
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    command = [sys.executable, "-m", "tests.kernels.compile_budget", str(capability), *arguments]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True).stdout)


class _NoDevice:
    """A driver that knows its target and has no device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiled:
    """The kernels that launches asked for, each once; under a label that says for which case first."""

    def __init__(self, monkey: type[JITFunction], capability: int) -> None:
        self.kernels: dict[int, tuple[str, object]] = {}
        self.label = ""
        run = monkey.run

        def compile_only(function, *args, **options):  # type: ignore[no-untyped-def]
            options["warmup"] = True
            kernel = run(function, *args, **options)
            name = f"sm_{capability} {function.fn.__module__.split('.')[-2]}.{function.fn.__name__} {self.label}"
            self.kernels.setdefault(id(kernel), (name, kernel))
            return kernel

        monkey.run = compile_only


def row_maps_cases(compiled: _Compiled) -> Iterator[None]:
    from lavender.kernels.row_maps.call import RowCall
    from lavender.kernels.row_maps.triton_kernels import row_maps_triton

    for dtype, width, weighted, masked, causal in [
        (torch.bfloat16, 128, True, False, False),
        (torch.bfloat16, 128, False, True, False),
        (torch.float16, 64, False, True, False),
        (torch.bfloat16, 72, True, False, True),
        (torch.bfloat16, 80, True, True, False),
        (torch.bfloat16, 96, False, False, True),
        (torch.bfloat16, 256, True, True, False),
        (torch.float16, 40, True, False, False),
        (torch.bfloat16, 160, False, False, False),
        (torch.float32, 32, True, True, False),
        (torch.float32, 128, True, False, False),
    ]:
        compiled.label = f"{str(dtype)[6:]} D={width} weighted={weighted} masked={masked} causal={causal}"
        heads, length = 8, 256
        query = torch.zeros(1, length, heads, width, dtype=dtype).transpose(1, 2).requires_grad_()
        key = torch.zeros(1, length, 2, width, dtype=dtype).transpose(1, 2).requires_grad_()
        rows = collate_rows([[[3 * w, 3 * w + 1, 3 * w + 2] for w in range(20)]])
        bias = torch.zeros(1, 1, 1, length) if masked else None
        head_weights = torch.ones(heads) if weighted else None
        columns = torch.arange(length)[None]
        words = (rows.rows, rows.words, rows.weights, columns, rows.num_words)
        maps = row_maps_triton(RowCall(query, key, *words, bias, causal, 0.1, head_weights, None))
        torch.autograd.grad(maps.sum(), (query, key))
        yield


def column_maps_cases(compiled: _Compiled) -> Iterator[None]:
    from lavender.kernels.column_maps.call import ColumnCall
    from lavender.kernels.column_maps.triton_kernels import column_maps_triton

    for dtype, width, keys, weighted, masked, has_value in [
        (torch.float16, 40, 77, True, False, True),
        (torch.bfloat16, 64, 77, True, False, True),
        (torch.bfloat16, 64, 77, False, True, True),
        (torch.float16, 80, 77, True, True, True),
        (torch.float16, 160, 77, True, False, True),
        (torch.bfloat16, 64, 333, False, True, False),
        (torch.bfloat16, 128, 333, True, False, False),
        (torch.bfloat16, 256, 128, True, True, True),
        (torch.float32, 40, 77, True, False, True),
        (torch.float32, 64, 128, False, True, True),
        (torch.float32, 64, 333, True, False, False),
    ]:
        compiled.label = f"{str(dtype)[6:]} D={width} N={keys} weighted={weighted} masked={masked} value={has_value}"
        heads, places = 8, 256
        query = torch.zeros(1, places, heads, width, dtype=dtype).transpose(1, 2).requires_grad_()
        key, value = (torch.zeros(1, keys, heads, width, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(2))
        value = value if has_value else key.detach()[..., :0]
        bias = torch.zeros(1, 1, 1, keys) if masked else None
        head_weights = torch.ones(heads) if weighted else None
        output, maps = column_maps_triton(ColumnCall(query, key, value, torch.ones(1, 16, keys), bias, 0.1, head_weights))
        torch.autograd.grad(output.sum() + maps.sum(), (query, key))
        yield


def map_loss_cases(compiled: _Compiled) -> Iterator[None]:
    from lavender.kernels.map_loss.call import LossCall
    from lavender.kernels.map_loss.triton_kernels import map_loss_triton

    for normalization, distance, grid, target_grid in [
        ("zscore", "mse", (24, 24), (32, 32)),
        ("zscore", "mse", (64, 64), (64, 64)),
        ("zscore", "mse", (16, 16), (32, 64)),
        ("minmax", "mse", (24, 24), (32, 32)),
        ("minmax", "mse", (64, 64), (64, 64)),
        ("minmax", "mse", (64, 16), (16, 32)),
        ("sum", "kl", (64, 64), (64, 64)),
        ("sum", "kl", (32, 32), (16, 16)),
        ("max", "mse", (24, 24), (32, 32)),
        ("none", "mse", (32, 64), (16, 16)),
    ]:
        resampled = grid != target_grid
        compiled.label = f"{normalization} {distance} {grid} to {target_grid}, {'' if resampled else 'not '}resampled"
        maps, target = torch.zeros(1, 2, *grid), torch.zeros(1, 2, *target_grid)
        map_loss_triton(LossCall(maps, target, torch.ones(1, 2, dtype=torch.bool), normalization, distance))
        yield


def usage(kernel: object) -> dict[str, int]:
    """Registers, bytes of spill loads and stores' stack, shared memory and tensor-core instructions of one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        listing = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    taken = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", resources)}
    return {
        "registers": taken["REG"],
        "stack_bytes": taken["STACK"] + taken["LOCAL"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", listing)),
        "shared_bytes": kernel.metadata.shared,
        "tensor_core": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCMMA)\b", listing)),
    }


CASES = {name.removesuffix("_cases"): case for name, case in list(globals().items()) if name.endswith("_cases")}


def main() -> None:
    capability, names = int(sys.argv[1]), [name for name in sys.argv[2:] if name != "--first"]
    driver.set_active(_NoDevice(capability))
    tiles.architecture = lambda device: f"sm{capability}"
    grids.num_processors = lambda device: 132  # so that loops are split, as on the cards themselves
    compiled = _Compiled(JITFunction, capability)
    for name in names or CASES:
        cases = CASES[name](compiled)
        for _ in islice(cases, 1) if "--first" in sys.argv else cases:
            pass
    labels, kernels = zip(*compiled.kernels.values(), strict=True)
    with ThreadPoolExecutor(2) as pool:
        print(json.dumps(dict(zip(labels, pool.map(usage, kernels), strict=True))))


if __name__ == "__main__":
    main()
