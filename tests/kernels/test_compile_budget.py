"""What every Triton kernel takes on each architecture, with the shipped block sizes: recorded, and compiled again.

No GPU is needed.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from .compile_budget import SHARED_BYTES, compile_apart
from .record import recorded

KERNELS = {
    *(f"row_maps._{n}_kernel" for n in ("lse", "combine_lse", "maps", "delta", "bwd_dq", "add_rows", "bwd_dk")),
    *(f"column_maps._{n}_kernel" for n in ("one_pass", "two_passes", "bwd_dq", "bwd_dk_dv")),
    "map_loss._map_loss_kernel",
}
WITHOUT_PRODUCTS = {"row_maps._add_rows_kernel", "row_maps._combine_lse_kernel"}
"""Kernels that only add."""


def entries(capability: int) -> dict[str, dict[str, int]]:
    return {name: numbers for name, numbers in recorded("triton").items() if name.startswith(f"sm_{capability} ")}


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_kernel_stays_within_its_budget(capability):
    assert {name.split()[1] for name in entries(capability)} == KERNELS
    for name, numbers in entries(capability).items():
        assert numbers["spills"] == 0, name
        assert numbers["stack_bytes"] == 0, name
        assert 0 < numbers["registers"] <= 255, name
        assert numbers["shared_bytes"] <= SHARED_BYTES[capability], name
        if name.split()[1] not in WITHOUT_PRODUCTS and "not resampled" not in name:
            assert numbers["tensor_core"] > 0, name


def test_one_compilation_gives_what_is_recorded():
    compiled = compile_apart(90, "map_loss", "--first")
    assert compiled
    assert compiled.items() <= entries(90).items()


@pytest.mark.full
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_compilation_gives_what_is_recorded(capability):
    assert compile_apart(capability) == entries(capability)
