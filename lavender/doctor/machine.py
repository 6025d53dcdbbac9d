"""A machine: what of lavender runs here, and by which kernels.

It is examined even if torch is not installed: functions import what needs torch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OPTIONAL_PACKAGES, OptionalPackage, first_line, install_command
from .finding import Finding

if TYPE_CHECKING:
    import torch

_NEEDED = {"numpy": "numpy", "PIL": "pillow", "safetensors": "safetensors", "transformers": "transformers", "tqdm": "tqdm"}
"""lavender's own dependencies by their names in imports, with what pip calls them; without typer there is no doctor."""
_COMMANDS = {"extract", "train", "report"}
"""The extras of the commands as they are by default: the other packages are for options, or for what a user has anyway."""
_WIDTH = 64
"""The head width for which a machine's kernels are reported."""


def examine() -> Iterator[Finding]:
    """The machine's parts, torch first. A missing part has a remedy only if lavender needs it."""
    yield Finding("lavender", f"{_version('lavender-attention', 'lavender') or 'not installed'} in {Path(__file__).parents[1]}")
    yield Finding("python", f"{platform.python_version()} ({sys.executable}) on {platform.system()} {platform.machine()}")
    try:
        import torch

        version = str(torch.__version__)
    except Exception as error:  # a half-removed or broken torch fails in many ways: report each
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            yield Finding("torch", "not installed: nothing of lavender runs without it", "pip install torch")
        else:
            yield Finding("torch", f"does not load ({first_line(error)})", "pip install --force-reinstall torch")
    else:
        yield Finding("torch", f"{version}, built for {_platform_of_torch()}")
        yield from _examine_device()
    for name, distribution in _NEEDED.items():
        known = _version(distribution, name)
        yield Finding(distribution, known or "not installed", "" if known else f"pip install {distribution}")
    for name, package in OPTIONAL_PACKAGES.items():
        if name != "triton":  # with the kernels
            yield _examine_package(name, package)


def _examine_package(name: str, package: OptionalPackage) -> Finding:
    """An optional package, and what needs it."""
    uses = "; ".join([*(f"lavender {command}" for command in package.commands), *package.uses])
    version = _version(package.distribution or name, name)
    if version:
        return Finding(name, f"{version}, for {uses}")
    if package.extra in _COMMANDS:
        return Finding(name, f"not installed; for {uses}", install_command(name))
    return Finding(name, f"not installed; for {uses}: {install_command(name)}")


def _platform_of_torch() -> str:
    import torch

    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"


def _examine_device() -> Iterator[Finding]:
    """The CUDA devices, and what can run on the current one."""
    import torch

    from ..kernels.cuda.driver import OLDEST
    from ..kernels.dispatch import HAS_TRITON, triton_reasons

    device, architecture = torch.device("cpu"), None
    if torch.cuda.is_available():
        device = torch.device("cuda")
        major, minor = torch.cuda.get_device_capability(device)
        architecture = 10 * major + minor
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            name = torch.cuda.get_device_name(index)
            card = f"{name}, compute capability {major}.{minor}, {memory:.1f} GiB"
            if _torch_knows(major, minor):
                yield Finding(f"cuda:{index}", card)
            else:
                card += f"; this torch has no kernels for it, but for {', '.join(torch.cuda.get_arch_list())}"
                remedy = "PyTorch's index for CUDA 12.6 (cu126), torch<2.15" if major == 7 else "another index of PyTorch's"
                yield Finding(f"cuda:{index}", card, f"install a torch that knows the card: {remedy}")
    else:
        yield Finding("CUDA device", "none: the kernels run by 'torch', on the CPU, without triton, NVRTC or a driver")
    half: Any = _Tensor(torch.float16, device)
    refusals = triton_reasons(half, _WIDTH, _WIDTH, by_name=False)
    if HAS_TRITON:
        runs = f"do not run here: {'; '.join(refusals)}" if refusals else "run on the device"
        yield Finding("triton", f"{_version('triton') or 'installed'}; its kernels {runs}")
    else:
        remedy = "pip install triton" if architecture is not None and architecture >= 80 and sys.platform == "linux" else ""
        yield Finding("triton", "not installed", remedy)
    compiles = architecture is not None and architecture >= OLDEST
    yield from _examine_cuda(architecture if compiles else None, needed=compiles and bool(refusals))
    if _version("numpy"):  # which the operations import
        for operation in ("row_maps", "column_maps"):
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                chosen, reasons = _choice(operation, _WIDTH, dtype, device)
                refused = compiles and dtype == torch.float16 and chosen == "torch"
                result = "; ".join([f"by {chosen!r}", *(reasons if device.type == "cuda" else ())])
                remedy = "the card could run its own kernels: mend what refuses them" if refused else ""
                yield Finding(f"{operation} {str(dtype).removeprefix('torch.')}", result, remedy)


def _torch_knows(major: int, minor: int) -> bool:
    """Whether torch's own kernels run on a card: torch was built for its capability, for an older one of
    the same major version, or with PTX."""
    import torch

    known = [(kind, int(number.rstrip("af"))) for kind, _, number in (arch.partition("_") for arch in torch.cuda.get_arch_list())]
    card = 10 * major + minor
    return not known or any(
        number <= card and (kind == "compute" or number // 10 == major) for kind, number in known if kind in ("sm", "compute")
    )


def _examine_cuda(architecture: int | None, needed: bool) -> Iterator[Finding]:
    """What the CUDA C++ kernels are compiled and loaded with. Missing parts have remedies if `needed`."""
    from ..kernels.cuda import driver as cuda
    from ..kernels.cuda import nvrtc

    try:
        library = nvrtc.find_nvrtc(architecture)
        capabilities = ", ".join(f"{number // 10}.{number % 10}" for number in library.architectures)
        yield Finding("NVRTC", f"{library.version[0]}.{library.version[1]} ({library.path}), for compute capability {capabilities}")
    except nvrtc.CompileError as error:
        yield Finding("NVRTC", str(error), "pip install --upgrade nvidia-cuda-nvrtc-cu12" if needed else "")
    version = ctypes.c_int()
    try:
        cuda.call_driver("cuDriverGetVersion", ctypes.byref(version))
        yield Finding("CUDA driver", f"for CUDA up to {version.value // 1000}.{version.value % 1000 // 10}")
    except cuda.DriverError as error:
        yield Finding("CUDA driver", str(error), "install the card's driver" if needed else "")
    remedy = "set LAVENDER_CACHE to a folder that can be written" if needed else ""
    try:
        folder = nvrtc.cache_folder()
    except FileNotFoundError as error:
        yield Finding("kernel cache", f"{error.filename}: {error.strerror}", remedy)
        return
    if _can_be_written(folder):
        yield Finding("kernel cache", f"{folder}, can be written")
    else:
        yield Finding("kernel cache", f"{folder}, cannot be written: every process compiles anew", remedy)


def _can_be_written(folder: Path) -> bool:
    """Tries to write a file into a folder, which it makes if there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _version(distribution: str, name: str | None = None) -> str | None:
    """The version of an installed package, which Python must find by its name in imports; None without it."""
    try:
        if importlib.util.find_spec(name or distribution) is None:
            return None
        return metadata.version(distribution)
    except (ModuleNotFoundError, ValueError):  # PackageNotFoundError is one of the former
        return None


def kernels(operation: str, width: int | None, dtype: torch.dtype) -> Finding:
    """The implementation of an operation that runs on this machine, and why no faster one does."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, refusals = _choice(operation, width or _WIDTH, dtype, device)
    heads = f"heads of {width or f'unknown width, taken for {_WIDTH}'} in {str(dtype).removeprefix('torch.')}"
    return Finding("kernels", "; ".join([f"{operation} by {name!r} ({heads})", *refusals]))


@dataclass(frozen=True)
class _Tensor:
    """The part of a tensor that decides the implementation; nothing is allocated on the device."""

    dtype: torch.dtype
    device: torch.device


def _choice(operation: str, width: int, dtype: torch.dtype, device: torch.device) -> tuple[str, list[str]]:
    """The implementation that `impl="auto"` takes for heads of this width, and why no faster one."""
    from ..kernels.column_maps import api as column_maps
    from ..kernels.dispatch import cuda_reasons, triton_reasons
    from ..kernels.row_maps import api as row_maps

    tensor: Any = _Tensor(dtype, device)
    widest_float32 = {"row_maps": row_maps, "column_maps": column_maps}[operation].WIDEST_FLOAT32
    candidates = {
        "triton": lambda: triton_reasons(tensor, width, widest_float32, by_name=False),
        "cuda": lambda: cuda_reasons(operation, tensor, width, 1, by_name=False),
    }
    refusals: list[str] = []
    for name, why_not in candidates.items():
        reasons = why_not()
        if not reasons:
            return name, refusals
        refusals.append(f"not by {name!r}: {'; '.join(reasons)}")
    return "torch", refusals
