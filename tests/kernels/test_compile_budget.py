"""What every Triton kernel takes on each architecture, with the shipped block sizes: compiled here, no GPU needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
"""The most shared memory that a block may take."""
WITHOUT_PRODUCTS = {"row_maps._add_rows_kernel", "row_maps._combine_lse_kernel"}
"""Kernels that only add."""


@pytest.fixture(scope="module")
def compilations():
    """One process for each architecture, all at once; in them nothing is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Spelled out, or Triton warns that a default is going to change.
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    processes = {
        capability: subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.compile_budget", str(capability)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for capability in SHARED_BYTES
    }
    yield processes
    for process in processes.values():
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_kernel_stays_within_its_budget(compilations, capability):
    output, _ = compilations[capability].communicate()
    assert compilations[capability].returncode == 0
    kernels = json.loads(output)
    names = {kernel["kernel"].split()[0] for kernel in kernels}
    assert names == {
        *(f"row_maps._{n}_kernel" for n in ("lse", "combine_lse", "maps", "delta", "bwd_dq", "add_rows", "bwd_dk")),
        *(f"column_maps._{n}_kernel" for n in ("one_pass", "two_passes", "bwd_dq", "bwd_dk_dv")),
        "map_loss._map_loss_kernel",
    }
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        assert kernel["stack_bytes"] == 0, kernel
        assert 0 < kernel["registers"] <= 255, kernel
        assert kernel["shared_bytes"] <= SHARED_BYTES[capability], kernel
        if kernel["kernel"].split()[0] not in WITHOUT_PRODUCTS and "not resampled" not in kernel["kernel"]:
            assert kernel["tensor_core"] > 0, kernel
