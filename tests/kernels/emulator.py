"""Runs the CUDA C++ kernels of csrc/ on CPU tensors: their own source, compiled by g++ with emulator.h in place of the card."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from lavender.kernels.cuda.driver import Launch, Program, arguments_type, kernels, packed, source, sources

HERE = Path(__file__).parent


def whole(file: str) -> str:
    """The text of a .cuh file of kernels, what it includes put in."""
    return source(f"{file}.cuh").replace('#include "tiles.cuh"', source("tiles.cuh").replace("#pragma once\n", ""))


class EmulatorError(AssertionError):
    """A launch did what the card would not let pass, or not survive."""


class Emulator:
    """A `Runner` for CPU tensors.

    Every tensor is copied to where an access behind its end, or far before its beginning, ends the launch. `fault` changes a
    file's text before it is compiled, for tests that plant one. `seed` chooses the order in which threads run; 0 is their own.
    """

    def __init__(self, fault: Callable[[str], str] | None = None, seed: int = 0) -> None:
        self.fault, self.seed = fault, seed
        self.launched: list[str] = []
        self._libraries: dict[Program, ctypes.CDLL] = {}

    def why_not(self, program: Program, device: torch.device) -> list[str]:
        return [] if device.type == "cpu" else [f"the emulator takes CPU tensors, not {device.type}"]

    def launch(self, launch: Launch) -> None:
        self.launched.append(launch.kernel)
        library = self._libraries.get(launch.program)
        if library is None:
            library = self._libraries[launch.program] = ctypes.CDLL(str(self._build(launch.program)))
            library.guard.restype = ctypes.c_void_p
        structure = packed(launch.program.file, launch.arguments)
        copies: list[tuple[int, int, int]] = []
        for name, value in launch.arguments.items():
            if isinstance(value, torch.Tensor) and value.numel():
                extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
                size = extent * value.element_size()
                copy = library.guard(ctypes.c_void_p(value.data_ptr()), ctypes.c_size_t(size))
                copies.append((copy, value.data_ptr(), size))
                setattr(structure, name, copy)
        run = getattr(library, f"run_{launch.kernel}")
        run.restype = ctypes.c_char_p
        reason = run(ctypes.byref(structure), *launch.grid, ctypes.c_size_t(launch.shared_bytes), self.seed)
        for copy, target, size in copies:
            library.unguard(ctypes.c_void_p(copy), ctypes.c_void_p(target), ctypes.c_size_t(size))
        if reason:
            raise EmulatorError(f"{launch.kernel}: {reason.decode()}")

    def _build(self, program: Program) -> Path:
        """A shared library of the program's kernels; one that was built before is taken again."""
        text = self.fault(whole(program.file)) if self.fault else whole(program.file)
        structure = arguments_type(program.file).__name__
        runs = [
            f'extern "C" const char* run_{kernel}(const {structure}* call, int x, int y, int z, size_t bytes, unsigned seed) '
            f"{{ return emulator::launch({{x, y, z}}, bytes, seed, [=] {{ {kernel}(*call); }}); }}"
            for kernel in kernels(program.file)
        ]
        unit = "\n".join(['#include "emulator.h"', text, *runs])
        header = (HERE / "emulator.h").read_text()
        command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", f"-I{HERE}"]
        command += [f"-I{sources()}", *(f"-D{name}={value}" for name, value in program.constants.items())]
        key = hashlib.sha256("\0".join([unit, header, *command]).encode()).hexdigest()[:24]
        folder = Path(tempfile.gettempdir()) / f"lavender-emulator-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to another user, who could have put libraries there")
        library = folder / f"{program.file}-{key}.so"
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as made:
                source, built = Path(made) / "unit.cpp", Path(made) / "unit.so"
                source.write_text(unit)
                result = subprocess.run([*command, str(source), "-o", str(built)], capture_output=True, text=True)
                if result.returncode:
                    raise RuntimeError(f"g++ refuses {program.file}.cuh:\n{result.stderr[:4000]}")
                os.replace(built, library)
        return library
