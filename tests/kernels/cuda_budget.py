"""Compiles every CUDA C++ kernel by NVRTC for cards that need not be there, and reads what it takes."""

from __future__ import annotations

import re
import struct

from lavender.kernels.cuda.driver import HEADERS, LAYOUTS, Program, source
from lavender.kernels.cuda.nvrtc import find_nvrtc

WIDTHS = {70: (40, 64, 72, 80, 96, 104, 112, 128, 160, 256), 75: (40, 64, 80, 128, 160, 256), 80: (64, 128), 90: (64, 128)}
TENSOR_CORE_OPCODES = {70: 0x236, 75: 0x23C, 80: 0x23C, 90: 0x23C}
"""HMMA.884 of Volta, HMMA.1688 and HMMA.16816 since: the lowest twelve bits of an instruction of 128."""


def instructions(cubin: bytes) -> dict[str, list[int]]:
    """The lower half of each instruction of each kernel: what lies in the ELF file's sections .text.NAME."""
    start, size, count, names = struct.unpack_from("<40xQ10xHHH", cubin)[0], *struct.unpack_from("<58xHHH", cubin)
    sections = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]
    strings = sections[names][4]
    code = {}
    for name, _, _, _, offset, length in sections:
        text = cubin[strings + name : cubin.index(b"\0", strings + name)].decode()
        if text.startswith(".text."):
            code[text.removeprefix(".text.")] = [low for low, _ in struct.iter_unpack("<QQ", cubin[offset : offset + length])]
    return code


def usage(log: str) -> dict[str, dict[str, int]]:
    """Bytes of stack and spills of each kernel, as ptxas reports them."""
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    names = ("stack", "stores", "loads")
    return {kernel: dict(zip(names, map(int, numbers), strict=True)) for kernel, *numbers in re.findall(pattern, log, re.DOTALL)}


CASES = [
    (file, *rest)
    for file in LAYOUTS
    for rest in [*((a, width, True) for a, widths in WIDTHS.items() for width in widths), (70, 40, False), (70, 128, False)]
]
"""File, architecture, heads' width, and whether rows are aligned."""


def measure(file: str, architecture: int, width: int, vector: bool) -> dict[str, dict[str, int]]:
    """Bytes of stack and spills, and tensor-core instructions, of each kernel of a program."""
    program = Program(file, width, vector)
    options = [*(f"-D{name}={value}" for name, value in program.constants.items()), "--ptxas-options=-v"]
    headers = {name: source(name) for name in HEADERS}
    cubin, log = find_nvrtc(architecture).compile(source(f"{file}.cuh"), headers, options, architecture)
    code = instructions(cubin)
    return {
        f"sm_{architecture} {file}.{kernel} D={width} {'aligned' if vector else 'not aligned'}": {
            **numbers,
            "shared_bytes": program.shared_bytes,
            "tensor_core": sum(low & 0xFFF == TENSOR_CORE_OPCODES[architecture] for low in code[kernel]),
        }
        for kernel, numbers in usage(log).items()
    }
