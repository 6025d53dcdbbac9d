"""What every CUDA C++ kernel takes on each architecture, by NVRTC: recorded, and compiled again. No GPU is needed."""

from __future__ import annotations

import pytest

from lavender.kernels.cuda.driver import Program

from .cuda_budget import CASES, WIDTHS, instructions, measure
from .record import recorded

SHARED_BYTES = {70: 96 * 1024, 75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024}
"""The most shared memory that a block may opt in to."""
KERNELS = {
    "row_maps": {"row_lse", "row_word_maps", "row_delta", "row_query_gradient", "row_sum", "row_key_gradient"},
    "column_maps": {"column_maps", "column_query_gradient", "column_key_gradient"},
}
WITHOUT_PRODUCTS = {"row_sum"}
"""Kernels that only add."""


@pytest.mark.parametrize("architecture", WIDTHS)
def test_every_kernel_stays_within_its_budget(architecture):
    entries = {name: numbers for name, numbers in recorded("cuda").items() if name.startswith(f"sm_{architecture} ")}
    cases = [(file, width, vector) for file, number, width, vector in CASES if number == architecture]
    assert set(entries) == {
        f"sm_{architecture} {file}.{kernel} D={width} {'aligned' if vector else 'not aligned'}"
        for file, width, vector in cases
        for kernel in KERNELS[file]
    }
    for name, numbers in entries.items():
        assert numbers["stack"] == numbers["stores"] == numbers["loads"] == 0, name
        assert numbers["shared_bytes"] <= SHARED_BYTES[architecture], name
        assert (numbers["tensor_core"] > 0) == (name.split()[1].split(".")[1] not in WITHOUT_PRODUCTS), name


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.full] * (case != CASES[0]), id="-".join(map(str, case))) for case in CASES]
)
def test_a_compilation_gives_what_is_recorded(case):
    compiled = measure(*case)
    assert len(compiled) == len(KERNELS[case[0]])
    assert compiled.items() <= recorded("cuda").items()


@pytest.mark.parametrize("file", KERNELS)
def test_rows_that_are_not_aligned_have_kernels_too(file):
    program = Program(file, 5, False)
    assert set(instructions(program.cubin(70))) == KERNELS[file]
