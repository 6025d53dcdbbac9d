"""Small shapes under pytest-benchmark: `pytest bench --benchmark-enable`. Within `make test` each provider runs once, untimed."""

from __future__ import annotations

import pytest
import torch
from attn_fusion import PASSES, failures
from providers import CPU_SHAPES, Case

SHAPES = [shape for shape in CPU_SHAPES if shape.name in ("small-student", "small-teacher", "sd15-16")]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def case(request):
    return Case(request.param, "cpu", torch.float32, compiled=False)


@pytest.mark.parametrize("label", PASSES)
@pytest.mark.parametrize("name", ["sdpa", "eager", "opponent", "torch"])
def test_attention_with_maps(benchmark, case, name, label):
    if name == "opponent":
        name = "sdpa + rows again" if case.shape.orientation == "rows" else "sdpa + extra values"
    assert not failures(case, [name])
    benchmark.group = f"{case.shape.name}, {label}"
    benchmark(case.run, case.providers()[name], PASSES[label])
