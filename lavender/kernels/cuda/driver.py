"""Launches of the CUDA C++ kernels in csrc/: which of them can run here, compiled when they are first needed, by the driver's API.

A `Program` is one file of csrc/ with its constants. NVRTC compiles it for the device's architecture (`nvrtc`), the driver loads it,
and a kernel gets its arguments as one structure, by name: the structure is declared in the .cuh file and nowhere else. Neither a
compiler nor torch's headers are needed, at installation or later; see csrc/README.md.
"""

from __future__ import annotations

import ctypes
import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from ...errors import LavenderError
from .nvrtc import cached_cubin

logger = logging.getLogger(__name__)

HEADERS = ("device.cuh", "tiles.cuh")
OLDEST = 70
"""The oldest architecture with tensor cores: compute capability 7.0."""
WIDEST = 256
"""The widest heads."""
MOST_HEADS = 65535
"""B * H: the blocks that a grid can have in its second and third direction."""
MAX_SHARED, CARVEOUT = 8, 9
"""The driver's CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES and CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT."""
OUT_OF_MEMORY = 2
"""The driver's CUDA_ERROR_OUT_OF_MEMORY."""

Grid = tuple[int, int, int]


class DriverError(LavenderError):
    """The CUDA driver refused a call; `status` is its CUresult, None where there is no driver."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Layout:
    """What a block of one file keeps in shared memory: tiles of rows, one tile of keys, and scores."""

    keys: int
    """Columns of a tile of scores."""
    row_tiles: int
    """How many tiles of rows there are."""
    rows: Mapping[int, int]
    """Rows of a tile, by the widest heads that they serve: as many as fit into 64 KiB, the most that a block can have on a T4."""

    def rows_for(self, width: int) -> int:
        """Rows of a tile for heads of this width."""
        return next(rows for limit, rows in sorted(self.rows.items()) if width <= limit)


LAYOUTS = {
    "row_maps": Layout(64, 1, {128: 64, 256: 32}),
    # 80 keys hold the 77 of a CLIP text encoder.
    "column_maps": Layout(80, 2, {80: 64, 160: 32, 256: 16}),
}


@dataclass(frozen=True)
class Program:
    """One file of csrc/, compiled for heads of one width."""

    file: str
    """`"row_maps"` or `"column_maps"`."""
    width: int
    """D, the heads' width, at most `WIDEST`."""
    vector: bool
    """Whether pointers and strides let eight elements be loaded at once; see `vectors`."""

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a block takes; the .cuh file asserts that it is what it lays out."""
        layout, stride = LAYOUTS[self.file], -(-self.width // 16) * 16 + 8
        rows = layout.rows_for(self.width)
        return 2 * stride * (layout.row_tiles * rows + layout.keys) + 4 * rows * (layout.keys + 4)

    @property
    def constants(self) -> dict[str, int]:
        """What the source is compiled with."""
        return {
            "WIDTH": self.width,
            "ROWS": LAYOUTS[self.file].rows_for(self.width),
            "KEYS": LAYOUTS[self.file].keys,
            "VECTOR": int(self.vector),
            "SHARED_BYTES": self.shared_bytes,
        }

    def cubin(self, architecture: int) -> bytes:
        """The compiled program, from the disk cache where it is there. Raises `CompileError`."""
        options = [f"-D{name}={value}" for name, value in self.constants.items()]
        headers = {name: source(name) for name in HEADERS}
        return cached_cubin(self.file, source(f"{self.file}.cuh"), headers, options, architecture)


def sources() -> Path:
    """The folder of csrc/: inside an installed package, at the top of a checkout."""
    installed = Path(__file__).parents[2] / "csrc"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "csrc"


@cache
def source(name: str) -> str:
    """The text of a file of csrc/."""
    return (sources() / name).read_text()


@cache
def kernels(file: str) -> list[str]:
    """The names of a file's kernels."""
    return re.findall(r"^KERNEL\(.*?\) (\w+)\(", source(f"{file}.cuh"), re.MULTILINE)


_TYPES = {"int": ctypes.c_int, "float": ctypes.c_float, "index_t": ctypes.c_longlong}


@cache
def arguments_type(file: str) -> type[ctypes.Structure]:
    """The structure that a file's kernels take, read from its declaration: `struct Name {` and one `type name;` a line."""
    declaration = re.search(r"^struct (\w+) \{\n(.*?)^\};", source(f"{file}.cuh"), re.DOTALL | re.MULTILINE)
    assert declaration is not None
    fields = re.findall(r"^  ([\w\s*]+?)(\w+);", declaration[2], re.MULTILINE)
    types = [(name, ctypes.c_void_p if "*" in kind else _TYPES[kind.strip()]) for kind, name in fields]
    return type(declaration[1], (ctypes.Structure,), {"_fields_": types})


Argument = torch.Tensor | int | float | None


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel of a program, and what it runs on.

    Attributes:
        kernel: its name in the .cuh file.
        grid: blocks in x, y and z.
        arguments: members of the file's structure, by name; what is left out is zero.
        device: where the tensors are; the kernel runs behind what was launched there before.
        shares_memory: whether the kernel uses shared memory; one that does not should not get any, which others could use.
    """

    program: Program
    kernel: str
    grid: Grid
    arguments: Mapping[str, Argument]
    device: torch.device
    shares_memory: bool = True

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.program.shared_bytes if self.shares_memory else 0


class Runner(Protocol):
    """What runs kernels: the driver, or in tests an emulator."""

    def why_not(self, program: Program, device: torch.device) -> list[str]:
        """The reasons why this program cannot run on this device, none if it can."""

    def launch(self, launch: Launch) -> None:
        """Runs a kernel. Raises `CompileError` or `DriverError` if it cannot be compiled, loaded or launched."""


class Driver:
    """Runs kernels on torch's current stream of a CUDA device."""

    def __init__(self) -> None:
        self._functions: dict[tuple[Program, str, int], ctypes.c_void_p] = {}
        self._modules: dict[tuple[Program, int], ctypes.c_void_p] = {}
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._ready: set[tuple[Program, int]] = set()
        self._refused: dict[tuple[str, int], str] = {}

    def why_not(self, program: Program, device: torch.device) -> list[str]:
        if device.type != "cuda":
            return [f"the tensors are on {device.type}, not on cuda"]
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor < OLDEST:
            return [f"compute capability {major}.{minor} is below 7.0, where there are no tensor cores"]
        index = torch.cuda.current_device() if device.index is None else device.index
        if (program, index) in self._ready:  # every call asks
            return []
        # What one program was refused for holds for the file's others: it is tried once.
        refused = self._refused.get((program.file, index))
        if refused is None:
            try:
                with torch.cuda.device(index):
                    for kernel in kernels(program.file):
                        self._function(program, kernel, index)
                self._ready.add((program, index))
                return []
            except LavenderError as error:
                refused = str(error)
                if getattr(error, "status", None) != OUT_OF_MEMORY:  # which passes
                    self._refused[program.file, index] = refused
                logger.warning(
                    "the CUDA C++ kernels of %s cannot run on cuda:%d, and impl='auto' goes on without: %s",
                    program.file, index, refused,
                )  # fmt: skip
        return [refused]

    def launch(self, launch: Launch) -> None:
        structure = packed(launch.program.file, launch.arguments)
        with torch.cuda.device(launch.device):
            index = torch.cuda.current_device()
            function = self._function(launch.program, launch.kernel, index)
            self._enter(index)
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            pointers = (ctypes.c_void_p * 1)(ctypes.addressof(structure))
            call_driver("cuLaunchKernel", function, *launch.grid, 256, 1, 1, launch.shared_bytes, stream, pointers, None)

    def _enter(self, index: int) -> None:
        """Makes a device's primary context, which is torch's too, this thread's current one: torch does so only when it must."""
        context = self._contexts.get(index)
        if context is None:
            torch.cuda.init()
            context = ctypes.c_void_p()
            call_driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), index)
            self._contexts[index] = context
        call_driver("cuCtxSetCurrent", context)

    def _module(self, program: Program, index: int) -> ctypes.c_void_p:
        module = self._modules.get((program, index))
        if module is None:
            major, minor = torch.cuda.get_device_capability(index)
            cubin = program.cubin(10 * major + minor)
            module = ctypes.c_void_p()
            with torch.cuda.device(index):
                self._enter(index)
                call_driver("cuModuleLoadData", ctypes.byref(module), cubin)
            self._modules[program, index] = module
        return module

    def _function(self, program: Program, kernel: str, index: int) -> ctypes.c_void_p:
        function = self._functions.get((program, kernel, index))
        if function is None:
            function = ctypes.c_void_p()
            call_driver("cuModuleGetFunction", ctypes.byref(function), self._module(program, index), kernel.encode())
            call_driver("cuFuncSetAttribute", function, MAX_SHARED, program.shared_bytes)
            call_driver("cuFuncSetAttribute", function, CARVEOUT, 100)  # percent: so that two blocks may fit
            self._functions[program, kernel, index] = function
        return function


def packed(file: str, arguments: Mapping[str, Argument]) -> ctypes.Structure:
    """The arguments as the structure that a file's kernels take: tensors by their pointers, zero for what is left out."""
    kind = arguments_type(file)
    unknown = set(arguments) - {name for name, _ in kind._fields_}  # type: ignore[misc]
    if unknown:
        raise TypeError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
    values: dict[str, Any] = {}
    for name, value in arguments.items():
        values[name] = value.data_ptr() if isinstance(value, torch.Tensor) else value
    return kind(**{name: value for name, value in values.items() if value is not None})


def call_driver(name: str, *arguments: Any) -> None:
    """Calls the driver. Raises `DriverError` with the driver's own words."""
    driver = _driver()
    try:
        function = getattr(driver, name)
    except AttributeError:
        raise DriverError(f"the CUDA driver has no {name}; install a newer one") from None
    status = function(*arguments)
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise DriverError(f"the CUDA driver refused {name}: {(text.value or b'unknown error').decode()} (status {status})", status)


@cache
def _driver() -> ctypes.CDLL:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise DriverError(f"{name}, the CUDA driver's library, does not load ({error}); install the card's driver") from None


runner: Runner = Driver()
"""What launches go to."""


def vectors(width: int, *tensors: torch.Tensor) -> bool:
    """Whether eight neighbors of every row of the tensors [.., .., .., width] of half precision lie in one aligned piece."""
    return width % 8 == 0 and all(
        not tensor.data_ptr() % 16 and not any(stride % 8 for stride in tensor.stride()[:-1])
        for tensor in tensors
        if tensor.numel()
    )
