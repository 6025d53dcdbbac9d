"""What every CUDA C++ kernel takes of a card, as NVRTC compiles it for each architecture; no GPU needed."""

from __future__ import annotations

import re
import struct

import pytest

from lavender.kernels.cuda.driver import HEADERS, Program, source
from lavender.kernels.cuda.nvrtc import find_nvrtc

SHARED_BYTES = {70: 96 * 1024, 75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024}
"""The most shared memory that a block may opt in to."""
WIDTHS = {70: (40, 64, 72, 80, 96, 104, 112, 128, 160, 256), 75: (40, 64, 80, 128, 160, 256), 80: (64, 128), 90: (64, 128)}
KERNELS = {
    "row_maps": {"row_lse", "row_word_maps", "row_delta", "row_query_gradient", "row_sum", "row_key_gradient"},
    "column_maps": {"column_maps", "column_query_gradient", "column_key_gradient"},
}
WITHOUT_PRODUCTS = {"row_sum"}
"""Kernels that only add."""
TENSOR_CORE_OPCODES = {70: 0x236, 75: 0x23C, 80: 0x23C, 90: 0x23C}
"""HMMA.884 of Volta, HMMA.1688 and HMMA.16816 since: the lowest twelve bits of an instruction of 128."""


def instructions(cubin: bytes) -> dict[str, list[int]]:
    """The lower half of each instruction of each kernel: what lies in the ELF file's sections .text.NAME."""
    start, size, count, names = struct.unpack_from("<40xQ10xHHH", cubin)[0], *struct.unpack_from("<58xHHH", cubin)
    sections = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]
    strings = sections[names][4]
    found = {}
    for name, _, _, _, offset, length in sections:
        text = cubin[strings + name : cubin.index(b"\0", strings + name)].decode()
        if text.startswith(".text."):
            found[text.removeprefix(".text.")] = [low for low, _ in struct.iter_unpack("<QQ", cubin[offset : offset + length])]
    return found


def usage(log: str) -> dict[str, dict[str, int]]:
    """Bytes of stack and spills of each kernel, as ptxas reports them."""
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    names = ("stack", "stores", "loads")
    return {kernel: dict(zip(names, map(int, numbers), strict=True)) for kernel, *numbers in re.findall(pattern, log, re.DOTALL)}


@pytest.mark.slow
@pytest.mark.parametrize("file", KERNELS)
@pytest.mark.parametrize(
    ("architecture", "width", "vector"),
    [*((a, width, True) for a, widths in WIDTHS.items() for width in widths), (70, 40, False), (70, 128, False)],
)
def test_every_kernel_stays_within_its_budget(file, architecture, width, vector):
    program = Program(file, width, vector)
    assert program.shared_bytes <= SHARED_BYTES[architecture]
    options = [*(f"-D{name}={value}" for name, value in program.constants.items()), "--ptxas-options=-v"]
    headers = {name: source(name) for name in HEADERS}
    cubin, log = find_nvrtc(architecture).compile(source(f"{file}.cuh"), headers, options, architecture)
    taken = usage(log)
    code = instructions(cubin)
    assert set(taken) == set(code) == KERNELS[file]
    for kernel, numbers in taken.items():
        assert numbers["stack"] == numbers["stores"] == numbers["loads"] == 0, (kernel, numbers)
        products = sum(low & 0xFFF == TENSOR_CORE_OPCODES[architecture] for low in code[kernel])
        assert (products > 0) == (kernel not in WITHOUT_PRODUCTS), (kernel, products)


@pytest.mark.parametrize("file", KERNELS)
def test_rows_that_are_not_aligned_have_kernels_too(file):
    program = Program(file, 5, False)
    assert set(instructions(program.cubin(70))) == KERNELS[file]
