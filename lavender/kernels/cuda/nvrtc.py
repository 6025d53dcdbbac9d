"""CUDA C++ compiled at run time by the NVRTC library that lies beside torch, and kept on disk: no nvcc, no headers, no GPU."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from uuid import uuid4

import torch

from ...errors import LavenderError

logger = logging.getLogger(__name__)

FIXED_OPTIONS = ("--std=c++17",)
"""What every compilation gets besides its architecture."""
FORMAT = 1
"""Of the entries in the disk cache; raise it when they change."""
LOG_LINES = 12
"""How much of the compiler's log an error repeats."""

_WINDOWS = os.name == "nt"
# Builtins, static libraries and the variants named .alt match neither.
_LIBRARY = re.compile(r"nvrtc64_(\d+)\d_\d+\.dll" if _WINDOWS else r"libnvrtc(?:-[0-9a-f]+)?\.so(?:\.(\d+)[\d.]*)?")
_BUILTINS = re.compile(r"nvrtc-builtins64_\d+\.dll" if _WINDOWS else r"libnvrtc-builtins(?:-[0-9a-f]+)?\.so(?:\.[\d.]+)?")
_BARE_NAMES = ("nvrtc64_120_0.dll", "nvrtc64_130_0.dll") if _WINDOWS else ("libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so")

_CHECKSUM_BYTES = 32
_warned = False


class CompileError(LavenderError):
    """There is no NVRTC for an architecture, or it refused a source."""


class Nvrtc:
    """One loaded NVRTC library.

    Attributes:
        path: of the library; a bare name if the system's loader found it.
        version: major and minor.
        architectures: what it compiles for, ascending: 70 for compute capability 7.0, and so on.
    """

    path: str
    version: tuple[int, int]
    architectures: tuple[int, ...]

    def __init__(self, path: str) -> None:
        """Loads the library.

        Raises:
            OSError: it, or the builtins beside it, cannot be loaded.
            AttributeError: it is no NVRTC, or one before CUDA 11.2.
        """
        self.path = path
        if os.path.isabs(path):
            # NVRTC opens its builtins by their bare name, which the loader finds only if they are loaded already.
            for builtins in _matching(Path(path).parent, _BUILTINS):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        architectures = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", architectures)
        self.architectures = tuple(sorted(architectures))

    def compile(self, source: str, headers: Mapping[str, str], options: Sequence[str], architecture: int) -> tuple[bytes, str]:
        """Compiles CUDA C++ (C++17) to machine code.

        Args:
            source: the text; messages call it `kernel.cu`.
            headers: text of each file that the source may `#include`, by the name that it is included by.
            options: more of NVRTC's options. With `--ptxas-options=-v` the log tells registers, spills and shared memory.
            architecture: 70 for compute capability 7.0, and so on.

        Returns:
            The cubin, and the compiler's log.

        Raises:
            CompileError: NVRTC refused; the message has the log from its first error on.
        """
        program = ctypes.c_void_p()
        names, texts = _strings([*headers]), _strings([*headers.values()])
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernel.cu", len(headers), texts, names)
        try:
            flags = [f"--gpu-architecture=sm_{architecture}", *FIXED_OPTIONS, *options]
            result = self._library.nvrtcCompileProgram(program, len(flags), _strings(flags))
            log = self._output("nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace")
            if result:
                lines = [line for line in log.splitlines() if line.strip()]
                first = next((n for n, line in enumerate(lines) if "error" in line), 0)
                why = f"{self} cannot compile for sm_{architecture}: {self._reason(result)}"
                raise CompileError("\n".join([why, *lines[first : first + LOG_LINES]]))
            return self._output("nvrtcGetCUBIN", program), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def __str__(self) -> str:
        return f"NVRTC {self.version[0]}.{self.version[1]} ({self.path})"

    def _output(self, function: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{function}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(function, program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: object) -> None:
        result = getattr(self._library, function)(*arguments)
        if result:
            raise CompileError(f"{function} of {self.path} failed: {self._reason(result)}")

    def _reason(self, result: int) -> str:
        return self._library.nvrtcGetErrorString(result).decode()


def _strings(texts: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*[text.encode() for text in texts])


@cache
def find_nvrtc(architecture: int | None = None) -> Nvrtc:
    """The first library that loads and knows an architecture.

    Looked through are the packages `nvidia-cuda-nvrtc*`, torch's own libraries, `CUDA_HOME`, `CUDA_PATH`, and what the system's
    loader finds; of the CUDA version that torch was built for first.

    Args:
        architecture: 70 for compute capability 7.0, and so on; None for any.

    Raises:
        CompileError: there is none; the message lists what was found, why each will not do, and what to do.
    """
    reasons = []
    loaded: list[Nvrtc] = []
    for path in _candidates():
        try:
            nvrtc = _opened(path)
        except (OSError, AttributeError, CompileError) as error:
            reasons.append(f"{path} cannot be loaded ({error})")
            continue
        if architecture is None or architecture in nvrtc.architectures:
            return nvrtc
        if not os.path.isabs(path) and any(nvrtc.version == other.version for other in loaded):
            continue  # the system's loader gives by its bare name what is loaded already
        loaded.append(nvrtc)
        reasons.append(f"{nvrtc} compiles for {', '.join(f'sm_{a}' for a in nvrtc.architectures)}")
    if not loaded:
        remedy = "pip install nvidia-cuda-nvrtc-cu12"
    elif architecture in (70, 72):
        remedy = (
            "NVRTC 13 has no Volta (sm_70, sm_72): pip install nvidia-cuda-nvrtc-cu12, or install a torch built for CUDA 12.6, "
            "which brings the right one"
        )
    else:
        remedy = "for a newer GPU: pip install --upgrade nvidia-cuda-nvrtc-cu12"
    wanted = "" if architecture is None else f" that compiles for sm_{architecture}"
    raise CompileError(f"there is no NVRTC{wanted}; found: {'; '.join(reasons) or 'nothing'}; {remedy}")


@cache
def _opened(path: str) -> Nvrtc:
    return Nvrtc(path)


def _candidates() -> list[str]:
    """Libraries that may be NVRTC, each once, best first."""
    paths: dict[str, str] = {}
    for folder in _folders():
        for path in _matching(folder, _LIBRARY):
            # By the file that links lead to: libnvrtc.so, libnvrtc.so.12 and libnvrtc.so.12.6.85 are often one.
            paths.setdefault(os.path.realpath(path), os.path.abspath(path))
    wanted = (torch.version.cuda or "").partition(".")[0]
    files = sorted(paths, key=lambda file: _major(file) != wanted)
    return [*(paths[file] for file in files), *sorted(_BARE_NAMES, key=lambda name: _major(name) != wanted)]


def _major(path: str) -> str:
    match = _LIBRARY.fullmatch(os.path.basename(path))
    return (match and match[1]) or "unknown"


def _folders() -> Iterator[Path]:
    torch_folder = Path(torch.__file__).parent
    for root in (*sys.path, str(torch_folder.parent)):
        for pattern in ("*/bin", "*/bin/*") if _WINDOWS else ("*/lib",):
            yield from sorted(Path(root, "nvidia").glob(pattern))
    yield torch_folder / "lib"
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home:
            yield Path(home, "bin" if _WINDOWS else "lib64")


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    except OSError:  # there is no such folder, or it may not be read
        return []


def cached_cubin(name: str, source: str, headers: Mapping[str, str], options: Sequence[str], architecture: int) -> bytes:
    """A cubin from the disk cache, or compiled and put there.

    A cache that cannot be read or written costs a warning, once per process, and the compilation; nothing else. Processes may
    share a cache.

    Args:
        name: the first part of the entry's file name.
        source: see `Nvrtc.compile`, as for the other arguments.

    Raises:
        CompileError: no NVRTC compiles for this architecture, or it refused the source.
    """
    nvrtc = find_nvrtc(architecture)
    parts = [FORMAT, source, sorted(headers.items()), [*FIXED_OPTIONS, *options], architecture, nvrtc.version]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = None
    try:
        path = cache_folder() / f"{name}-sm{architecture}-{key[:32]}.cubin"
        cubin = _stored(path)
        if cubin is not None:
            return cubin
    except OSError as error:
        _warn_once(path.parent if path else error.filename, error)
        path = None
    cubin, _ = nvrtc.compile(source, headers, options, architecture)
    if path:
        try:
            _store(path, cubin)
        except OSError as error:
            _warn_once(path.parent, error)
    return cubin


def cache_folder() -> Path:
    """Where compiled kernels are kept: `cubins` in `$LAVENDER_CACHE`, `$XDG_CACHE_HOME/lavender` or `~/.cache/lavender`.

    Raises:
        FileNotFoundError: neither is set, and the user has no home folder.
    """
    folder, shared = os.environ.get("LAVENDER_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if folder:
        return Path(folder).expanduser().absolute() / "cubins"
    if shared:
        return Path(shared, "lavender", "cubins")
    try:
        return Path.home() / ".cache/lavender/cubins"
    except RuntimeError:  # as in a container whose user has no name
        raise FileNotFoundError(errno.ENOENT, "there is no home folder", "~/.cache/lavender/cubins") from None


def _stored(path: Path) -> bytes | None:
    """An entry's cubin; None if there is none, or a damaged one."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    checksum, cubin = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
    if cubin and hashlib.sha256(cubin).digest() == checksum:
        return cubin
    logger.warning("%s is damaged: it is compiled anew and replaced", path)
    return None


def _store(path: Path, cubin: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by tempfile: its files are for their owner alone, and a cache may be shared.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(hashlib.sha256(cubin).digest() + cubin)
        # In one step: another process sees the whole entry or none.
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _warn_once(folder: Path | str, error: OSError) -> None:
    global _warned
    if not _warned:
        _warned = True
        logger.warning(
            "%s cannot keep compiled kernels (%s): every process compiles them anew; set LAVENDER_CACHE to a folder that can be "
            "written",
            folder,
            error.strerror or error,
        )
