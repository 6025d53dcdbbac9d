"""The CUDA C++ kernels: their own source against float64, on a GPU if there is one, else run by an emulator; and planted faults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lavender.errors import ConfigError
from lavender.kernels import grids
from lavender.kernels.column_maps import column_attention, column_maps
from lavender.kernels.cuda import driver as cuda
from lavender.kernels.dispatch import HAS_TRITON, cuda_reasons
from lavender.kernels.row_map_loss import row_map_loss
from lavender.kernels.row_maps import row_maps

from .budget import DEVICE, WORDS, check_columns, check_rows, collate, draw, poison_fresh_memory, relative_error
from .emulator import Emulator, EmulatorError
from .faults import large_logits_probe, replaced, rows_probe

HALF = torch.float16


@pytest.fixture(autouse=True)
def runner(monkeypatch):
    """The driver where there is a card for it, else the emulator."""
    if DEVICE == "cpu":
        monkeypatch.setattr(cuda, "runner", Emulator())
    return cuda.runner


@pytest.fixture
def emulate(monkeypatch):
    """Runs kernels on the emulator, with a fault or another order of threads."""
    if DEVICE != "cpu":
        pytest.skip("there is a card: it runs the kernels, and faults are planted where there is none")

    def use(**options):
        emulator = Emulator(**options)
        monkeypatch.setattr(cuda, "runner", emulator)
        return emulator

    return use


@pytest.mark.parametrize("weighted", [False, True])
def test_rows(weighted, monkeypatch):
    """77 keys; a split word, an empty one, a row of two words, padding; half of the columns of the second sample are padding."""
    poison_fresh_memory(monkeypatch)
    check_rows("cuda", HALF, weighted=weighted)


@pytest.mark.parametrize(
    ("heads", "keys", "width", "weighted"),
    [((4, 4), 577, 80, False), ((8, 2), 577, 64, True), ((8, 1), 1601, 128, True), ((2, 1), 33, 256, True), ((4, 2), 33, 5, False)],
)
def test_rows_of_every_kind_of_head(heads, keys, width, weighted):
    check_rows("cuda", HALF, heads=heads, keys=keys, width=width, num_columns=keys - 1, weighted=weighted)


def test_causal_rows():
    check_rows("cuda", HALF, length=77, weighted=True, causal=True)


@pytest.mark.parametrize("shape", [(2, 4, 11, 77), (2, 1, 1, 77), (11, 77)], ids=str)
@pytest.mark.parametrize("additive", [False, True])
def test_rows_under_masks(shape, additive):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.6
    if shape[-2] > 1:
        mask[..., 4, :] = False  # a row that may see nothing
    if additive:
        mask = torch.randn(shape, generator=torch.Generator().manual_seed(6)).masked_fill(~mask, torch.finfo(torch.float32).min)
    check_rows("cuda", HALF, mask=mask.to(DEVICE))


def test_more_words_than_a_tile_has_rows():
    words = [[[w, w + 1] for w in range(70)]]
    check_rows("cuda", HALF, heads=(2, 1), length=71, keys=20, num_columns=20, words=words)


def test_a_known_normalizer_saves_its_pass(runner):
    query, key = draw(3, (2, 4, 11, 40), (2, 2, 77, 40), dtype=HALF)
    columns = torch.arange(70, device=DEVICE).expand(2, -1)
    lse = (query.double() @ key.double().repeat_interleave(2, dim=1).mT * 40**-0.5).logsumexp(-1)
    maps = [row_maps(query, key, collate(WORDS), columns, lse=known, impl="cuda") for known in (None, lse)]
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-5, atol=1e-7)
    if DEVICE == "cpu":
        assert runner.launched == ["row_lse", "row_word_maps", "row_word_maps"]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("has_value", [False, True])
def test_columns(weighted, has_value, monkeypatch):
    poison_fresh_memory(monkeypatch)
    check_columns("cuda", HALF, weighted=weighted, has_value=has_value)


@pytest.mark.parametrize(("keys", "width"), [(77, 64), (77, 80), (577, 128), (77, 160), (100, 256), (16, 5)])
def test_columns_of_every_kind_of_head(keys, width):
    check_columns("cuda", HALF, keys=keys, width=width, queries=33, weighted=True)


@pytest.mark.parametrize("weighted", [False, True])
def test_columns_of_more_keys_than_a_tile(weighted):
    check_columns("cuda", HALF, keys=200, queries=70, weighted=weighted)
    check_columns("cuda", HALF, keys=200, queries=70, weighted=weighted, has_value=False)


@pytest.mark.parametrize("additive", [False, True])
def test_columns_under_masks(additive):
    mask = torch.rand(2, 2, 50, 77, generator=torch.Generator().manual_seed(5)) < 0.6
    mask[..., 4, :] = False  # a query that may see nothing
    if additive:
        mask = torch.randn(mask.shape, generator=torch.Generator().manual_seed(6)).masked_fill(
            ~mask, torch.finfo(torch.float32).min
        )
    check_columns("cuda", HALF, mask=mask.to(DEVICE))


def test_large_logits():
    large_logits_probe()


def test_gradients_do_not_vanish_where_probabilities_are_small():
    """The largest gradient of a Kullback-Leibler divergence lies where the map is smallest, so dS is far below it."""
    query, key = draw(2, (1, 2, 8, 64), (1, 2, 576, 64), dtype=HALF)
    rows, columns = collate([[[1, 2], [4]]]), torch.arange(576, device=DEVICE)[None]
    target = torch.rand(1, 2, 24, 24, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    present, results = torch.ones(1, 2, dtype=torch.bool, device=DEVICE), {}
    for impl, dtype in (("cuda", HALF), ("reference", torch.float64)):
        inputs = [(3 * query).to(dtype).requires_grad_(), key.to(dtype).requires_grad_()]
        options = {"normalization": "sum", "distance": "kl", "impl": impl}
        loss = row_map_loss(
            *inputs, rows, columns, (24, 24), target.to(dtype if impl == "reference" else torch.float32), present, **options
        )
        results[impl] = torch.autograd.grad(loss * 1024, inputs)
    for one, other in zip(*results.values(), strict=True):
        assert relative_error(one, other) < 1e-3


def test_a_small_gradient_of_the_output_beside_a_large_one_of_the_maps():
    query, key, value = draw(2, (1, 2, 33, 40), (1, 2, 77, 40), (1, 2, 77, 40), dtype=HALF)
    weights, results = torch.rand(1, 3, 77, generator=torch.Generator().manual_seed(0)).to(DEVICE), {}
    pull = draw(3, (1, 2, 33, 40))[0]
    for impl, dtype in (("cuda", HALF), ("reference", torch.float64)):
        inputs = [t.to(dtype).requires_grad_() for t in (query, key, value)]
        output, maps = column_attention(*inputs, weights, impl=impl)
        total = (output * pull.to(dtype)).sum() * 2.0**-10 + maps.sin().sum() * 1000
        results[impl] = torch.autograd.grad(total, inputs)
    for one, other in zip(*results.values(), strict=True):
        assert relative_error(one, other) < 2e-3


@pytest.mark.parametrize("impl", ["reference", "torch", *(["triton"] if HAS_TRITON else []), "cuda"])
def test_nan_stays_nan(impl):
    query, key = draw(2, (1, 2, 8, 40), (1, 2, 77, 40), dtype=HALF)
    key[0, :, 70] = torch.nan  # no column of the rows' maps
    rows, columns, weights = collate([[[1, 2], [4]]]), torch.arange(60, device=DEVICE)[None], torch.ones(1, 3, 77, device=DEVICE)
    assert row_maps(query, key, rows, columns, impl=impl).isnan().all()
    assert column_maps(query, key, weights, impl=impl).isnan().all()


def test_inputs_of_any_strides():
    """Rows not aligned to eight elements, a last axis that is not dense, a broadcast one; head weights that are a column."""
    query, key = draw(9, (1, 2, 40, 11), (1, 1, 13, 43), dtype=HALF)
    query, key = query.mT, key[..., 3:].expand(1, 2, 13, 40)
    weights = torch.rand(1, 3, 13, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    heads = torch.tensor([[0.3, 9.0], [0.7, 9.0]], device=DEVICE)[:, 0]
    results = column_attention(query, key, key, weights, head_weights=heads, impl="cuda")
    exact = column_attention(query.double(), key.double(), key.double(), weights, head_weights=heads, impl="reference")
    rows, columns = collate([[[1, 2], [4]]]), torch.arange(6, device=DEVICE)[None]
    results += (row_maps(query, key, rows, columns, head_weights=heads, impl="cuda"),)
    exact += (row_maps(query.double(), key.double(), rows, columns, head_weights=heads, impl="reference"),)
    for one, other in zip(results, exact, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=2e-3, atol=2e-3)


def everything():
    """Results and gradients of calls that take every branch, as numbers."""
    query, key, value = draw(4, (2, 4, 40, 40), (2, 2, 150, 40), (2, 4, 150, 40), dtype=HALF)
    words = collate([[[w, w + 1] for w in range(35)], [[3], [], [4, 5, 6]]])
    columns = torch.arange(140, device=DEVICE).expand(2, -1)
    inputs = [t.requires_grad_() for t in (query, key, value)]
    heads = torch.linspace(0.2, 1, 4, device=DEVICE)
    weights = torch.rand(2, 3, 150, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    maps = row_maps(query, key, words, columns, causal=True, head_weights=heads, impl="cuda")
    output, more = column_attention(query, value.flip(3), value, weights, impl="cuda")
    few = column_maps(query, value.flip(3)[:, :, :70], weights[..., :70], head_weights=heads, impl="cuda")
    total = maps.sin().sum() + output.float().sin().sum() + more.sin().sum() + few.sin().sum()
    return [maps, output, more, few, *torch.autograd.grad(total, inputs)]


def test_results_are_the_same_bits_every_time():
    for one, other in zip(everything(), everything(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_of_threads_changes_nothing(emulate, seed):
    right = everything()
    emulate(seed=seed)
    for one, other in zip(everything(), right, strict=True):
        assert torch.equal(one, other)


def test_keys_and_queries_split_over_many_blocks(monkeypatch):
    """As on a card with many processors; the last split of the keys is empty."""
    monkeypatch.setattr(grids, "num_processors", lambda device: 12)
    check_rows("cuda", HALF, heads=(8, 2), keys=1590, num_columns=1590, width=16, weighted=True)
    check_columns("cuda", HALF, queries=600, keys=20, width=16, weighted=True)


def test_a_barrier_that_some_threads_pass_by_is_caught(emulate):
    emulate(fault=replaced("__syncthreads();", "if (threadIdx.x < 128) __syncthreads();"))
    with pytest.raises(EmulatorError, match=r"row_lse: a thread waits for others"):
        rows_probe()


def test_what_has_no_kernel_says_so(runner):
    tensor = torch.zeros(1, 1, 1, 8)
    assert cuda_reasons("row_maps", tensor, 8, 1, by_name=True) == ["the dtype is torch.float32; its kernels take float16"]
    assert cuda_reasons("row_maps", tensor.half(), 264, 1, True) == ["the head width is 264; its kernels take up to 256"]
    assert cuda_reasons("row_maps", tensor.half(), 8, 1, by_name=False) == ["the tensors are on cpu, not on cuda"]
    assert cuda_reasons("row_maps", tensor.half(), 8, 65536, True) == ["the batch has 65536 heads; its kernels take up to 65535"]
    query, weights = torch.zeros(1, 1, 1, 8, device=DEVICE), torch.ones(1, 1, 1, device=DEVICE)
    with pytest.raises(ConfigError, match=r"impl='cuda' cannot run column_maps here: the dtype is torch.float32"):
        column_maps(query, query, weights, impl="cuda")
    with pytest.raises(ConfigError, match="values are 16 wide and queries 8"):
        column_attention(query.half(), query.half(), torch.zeros(1, 1, 1, 16, dtype=HALF, device=DEVICE), weights, impl="cuda")


def test_the_operations_are_registered_completely():
    import lavender.kernels.column_maps.cuda_launch  # they register the operations
    import lavender.kernels.row_maps.cuda_launch  # noqa: F401

    query, key, value, heads = draw(0, (2, 4, 9, 8), (2, 2, 13, 8), (2, 4, 13, 8), (4,), dtype=HALF)
    query, key, value, heads = (t.requires_grad_() for t in (query, key, value, heads.float()))
    rows, columns = collate(WORDS), torch.tensor([[2, 3, 7, 12], [0, 5, -1, -1]], device=DEVICE)
    words = (rows.rows, rows.words, rows.weights, columns, rows.num_words)
    for options in ((None, True, 0.3, None, None), (torch.zeros(1, 1, 1, 13, device=DEVICE), False, 0.3, heads, None)):
        torch.library.opcheck(torch.ops.lavender.row_maps_cuda.default, (query, key, *words, *options))
    weights = torch.rand(2, 3, 13, device=DEVICE)
    for options in ((None, 0.3, None), (torch.zeros(1, 1, 1, 13, device=DEVICE), 0.3, heads)):
        key = value.detach().flip(0).requires_grad_()
        torch.library.opcheck(torch.ops.lavender.column_maps_cuda.default, (query, key, value, weights, *options))


def test_compiled_graphs_do_not_break():
    query, key = draw(0, (2, 4, 11, 8), (2, 2, 13, 8), dtype=HALF)
    rows, columns, weights = collate(WORDS), torch.tensor([[2, 3], [0, -1]], device=DEVICE), torch.ones(2, 3, 13, device=DEVICE) / 3

    def both(query, key):
        maps = row_maps(query, key, rows, columns, impl="cuda")
        return maps, column_maps(query, key.repeat_interleave(2, dim=1), weights, impl="cuda")

    results = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        inputs = query.detach().requires_grad_(), key.detach().requires_grad_()
        maps = function(*inputs)
        results.append([*maps, *torch.autograd.grad(sum(t.sin().sum() for t in maps), inputs)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_compiled_function_sees_heads_of_two_widths():
    """As in a U-Net: the second width makes the first one's graph one for any width."""
    weights = torch.ones(1, 2, 13, device=DEVICE) / 3
    function = torch.compile(lambda q, k: column_maps(q, k, weights, impl="cuda"), fullgraph=True, backend="aot_eager")
    for width in (40, 16, 24):
        query, key = draw(width, (1, 2, 9, width), (1, 2, 13, width), dtype=HALF)
        assert torch.equal(function(query, key), column_maps(query, key, weights, impl="cuda"))


def test_arguments_go_by_name():
    results = cuda.packed("row_maps", {"query_b": 2**40, "num_heads": 3, "scale": 0.5, "bias": None, "causal": True})
    assert (results.query_b, results.num_heads, results.scale, results.bias, results.causal) == (2**40, 3, 0.5, None, 1)
    with pytest.raises(TypeError, match="RowMaps has no nonsense"):
        cuda.packed("row_maps", {"nonsense": 1})


def test_no_kernel_needs_a_header():
    """Neither CUDA's headers nor torch's lie beside NVRTC on a user's machine."""
    for file in Path(cuda.sources()).glob("*.cuh"):
        assert set(re.findall(r"#include (\S+)", file.read_text())) <= {'"device.cuh"', '"tiles.cuh"'}
