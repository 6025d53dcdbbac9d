"""The operations as torch sees them: complete registrations, and graphs that `torch.compile` does not break."""

from __future__ import annotations

import pytest
import torch

from lavender.kernels import dispatch
from lavender.kernels.column_maps import column_attention
from lavender.kernels.map_loss import map_loss
from lavender.kernels.row_maps import row_maps
from lavender.words import collate_rows

from .budget import DEVICE

ROWS = collate_rows([[[1, 2], [4], []], [[0, 3, 8]]])
ROWS = type(ROWS)(ROWS.rows.to(DEVICE), ROWS.words.to(DEVICE), ROWS.weights.to(DEVICE), ROWS.num_words)
COLUMNS = torch.tensor([[2, 3, 7, 12], [0, 5, -1, -1]], device=DEVICE)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()

    return {"query": draw(2, 4, 9, 8), "key": draw(2, 2, 13, 8), "value": draw(2, 4, 13, 8), "heads": draw(4)}


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.full), True])
def test_the_triton_operations_are_registered_completely(tensors, masked):
    pytest.importorskip("triton")
    import lavender.kernels.column_maps.triton_kernels  # they register the operations
    import lavender.kernels.row_maps.triton_kernels  # noqa: F401

    query, key, value, heads = tensors.values()
    bias = torch.zeros(1, 1, 1, 13, device=DEVICE)
    lse = torch.full((2, 4, ROWS.rows.shape[1]), 3.0, device=DEVICE)
    words = (ROWS.rows, ROWS.words, ROWS.weights, COLUMNS, ROWS.num_words)
    options = (bias, False, 0.3, heads, lse) if masked else (None, True, 0.3, None, None)
    torch.library.opcheck(torch.ops.lavender.row_maps_triton.default, (query, key, *words, *options))
    weights = torch.rand(2, 3, 13, device=DEVICE)
    key = value.detach().flip(0).requires_grad_()
    options = (bias, 0.3, heads) if masked else (None, 0.3, None)
    torch.library.opcheck(torch.ops.lavender.column_maps_triton.default, (query, key, value, weights, *options))
    maps = (torch.rand(2, 3, 5, 4, device=DEVICE).requires_grad_(), torch.rand(2, 3, 5, 4, device=DEVICE))
    present = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    torch.library.opcheck(torch.ops.lavender.map_loss.default, (*maps, present, "zscore", "mse", "triton"))


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("impl", ["auto", "reference", "torch", "triton"])
def test_compiled_graphs_do_not_break(tensors, impl):
    if impl == "triton":
        pytest.importorskip("triton")

    def everything(query, key, value, heads):
        maps = row_maps(query, key, ROWS, COLUMNS, causal=True, head_weights=heads, impl=impl)
        keys = key.repeat_interleave(2, dim=1)
        weights = torch.ones(2, 3, 13, device=DEVICE) / 3
        output, columns = column_attention(query, keys, value, weights, impl=impl)
        target, present = torch.arange(24.0, device=DEVICE).reshape(2, 3, 2, 2), torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
        return output, columns, map_loss(maps[:, 0].unflatten(-1, (2, 2)), target, present, impl=impl)

    results = []
    for function in (everything, torch.compile(everything, fullgraph=True, backend="aot_eager")):
        output, columns, loss = function(*tensors.values())
        total = output.sin().sum() + columns.cos().sum() + loss
        results.append([output, columns, loss, *torch.autograd.grad(total, list(tensors.values()))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_the_mark_of_a_constant_result_is_torchs_own():
    """It is set without `torch.compiler.assume_constant_result`, whose import takes as long as torch's."""
    assert vars(dispatch._runner_reasons) == vars(torch.compiler.assume_constant_result(lambda: None))
