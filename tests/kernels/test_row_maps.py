"""`row_maps` against an fp64 specification written out here, for every implementation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lavender.errors import ConfigError
from lavender.kernels.row_maps import chunked, row_maps
from lavender.types import WordRows
from lavender.words import collate_rows

IMPLS = ["reference", "torch"]


def by_hand(query, key, words, columns, visible=None, bias=None, renormalize=False):
    """Loops over everything, in float64: the definition of a word map. `words[b][w]` lists rows; masks are [B, H, T, N]."""
    query, key = query.double(), key.double()
    batch, heads = query.shape[:2]
    maps = torch.zeros(batch, heads, max(1, *map(len, words)), columns.shape[1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for w, rows in enumerate(words[b]):
                for row in rows:
                    scores = query[b, h, row] @ key[b, h * key.shape[1] // heads].T * query.shape[-1] ** -0.5
                    if bias is not None:
                        scores = scores + bias[b, h, row]
                    if visible is not None:
                        scores = scores.masked_fill(~visible[b, h, row], -torch.inf)
                    if renormalize:
                        kept = columns[b][columns[b] >= 0]
                        inside = torch.full_like(scores, -torch.inf)
                        inside[kept] = scores[kept]
                        scores = inside
                    probabilities = torch.softmax(scores, 0).nan_to_num(0.0)
                    for m, column in enumerate(columns[b].tolist()):
                        if column >= 0:
                            maps[b, h, w, m] = maps[b, h, w, m] + probabilities[column] / len(rows)
    return maps


def draw(seed, batch=2, heads=4, groups=2, rows=9, keys=13, width=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, rows, width, generator=generator, dtype=torch.float64).to(dtype)
    key = torch.randn(batch, groups, keys, width, generator=generator, dtype=torch.float64).to(dtype)
    return query.requires_grad_(), key.requires_grad_(), generator


WORDS = [[[1, 2], [4], []], [[0, 3, 8]]]
COLUMNS = torch.tensor([[2, 3, 7, 12], [0, 5, -1, -1]])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("renormalize", [False, True])
def test_maps_and_gradients_equal_the_definition(impl, renormalize):
    query, key, generator = draw(0)
    rows = collate_rows(WORDS)
    expected = by_hand(query, key, WORDS, COLUMNS, renormalize=renormalize)
    maps = row_maps(query, key, rows, COLUMNS, renormalize=renormalize, impl=impl)
    # Shares of a word are float32: a third is exact to 3e-8.
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-7)
    weight = torch.randn(maps.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weight).sum(), (query, key))
    gradients = torch.autograd.grad((maps * weight).sum(), (query, key))
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["boolean", "additive", "per-head", "key-padding", "causal"])
def test_masks(impl, kind):
    query, key, generator = draw(1, rows=13)
    batch, heads, rows, keys = 2, 4, 13, 13
    full = torch.rand(batch, heads, rows, keys, generator=generator) < 0.7
    full[0, :, 4] = False  # a row that may see nothing
    arguments, visible, bias = {}, None, None
    if kind == "causal":
        arguments, visible = {"causal": True}, torch.ones(rows, keys, dtype=torch.bool).tril().expand(batch, heads, -1, -1)
    elif kind == "key-padding":
        visible = full[:, :1, :1].expand(-1, heads, rows, -1)
        arguments = {"mask": full[:, :1, :1]}
    elif kind == "per-head":
        arguments, visible = {"mask": full}, full
    elif kind == "boolean":
        arguments, visible = {"mask": full[:, :1]}, full[:, :1].expand(-1, heads, -1, -1)
    else:
        bias = torch.randn(batch, 1, rows, keys, generator=generator, dtype=torch.float64).expand(-1, heads, -1, -1)
        arguments = {"mask": bias[:, :1]}
    expected = by_hand(query, key, WORDS, COLUMNS, visible, bias)
    maps = row_maps(query, key, collate_rows(WORDS), COLUMNS, impl=impl, **arguments)
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-7)
    for ours, theirs in zip(
        torch.autograd.grad(maps.square().sum(), (query, key)),
        torch.autograd.grad(expected.square().sum(), (query, key)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_all_columns_together_carry_each_words_whole_attention(impl):
    query, key, _ = draw(2)
    columns = torch.arange(13).expand(2, -1)
    maps = row_maps(query, key, collate_rows(WORDS), columns, impl=impl)
    has_rows = torch.tensor([[1.0, 1, 0], [1, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(maps.sum(-1), has_rows[:, None].expand(-1, 4, -1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_stays_within_twice_the_references_error(impl, dtype):
    query, key, generator = draw(3, width=64, keys=77, dtype=dtype)
    words, columns = WORDS, torch.arange(77)[None].expand(2, -1)
    exact_query, exact_key = (t.detach().double().requires_grad_() for t in (query, key))
    rows = collate_rows(words)
    exact = row_maps(exact_query, exact_key, rows, columns, impl="reference")
    ours = row_maps(query, key, rows, columns, impl=impl)
    assert ours.dtype == torch.float32
    weight = torch.randn(ours.shape, generator=generator)
    exact_gradients = torch.autograd.grad((exact * weight).sum(), (exact_query, exact_key))
    gradients = torch.autograd.grad((ours * weight).sum(), (query, key))
    # Sums run in float32 whatever the inputs: maps carry float32's error, gradients one rounding to the inputs' dtype.
    assert (ours - exact).norm() / exact.norm() < 2e-6
    for gradient, wanted in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == dtype
        assert (gradient.double() - wanted).norm() / wanted.norm() < 2e-6 + torch.finfo(dtype).eps


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2)]),
    rows=st.integers(1, 12),
    keys=st.integers(1, 17),
    width=st.sampled_from([1, 5, 8]),
    data=st.data(),
)
def test_torch_equals_reference_on_any_shape(seed, heads, rows, keys, width, data):
    query, key, generator = draw(seed, 2, *heads, rows, keys, width)
    words = data.draw(
        st.lists(st.lists(st.lists(st.integers(0, rows - 1), max_size=3), max_size=3), min_size=2, max_size=2), label="words"
    )
    columns = torch.randint(-1, keys, (2, data.draw(st.integers(1, keys))), generator=generator)
    mask = torch.rand(2, 1, rows, keys, generator=generator) < 0.6 if data.draw(st.booleans()) else None
    results = []
    for impl in IMPLS:
        maps = row_maps(query, key, collate_rows(words), columns, mask=mask, impl=impl)
        results.append((maps, *torch.autograd.grad(maps.sin().sum(), (query, key))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_chunks_change_nothing(monkeypatch):
    query, key, _ = draw(4, heads=8, groups=4)
    whole = row_maps(query, key, collate_rows(WORDS), COLUMNS, impl="torch")
    monkeypatch.setattr(chunked, "BYTE_BUDGET", 1)
    in_chunks = row_maps(query, key, collate_rows(WORDS), COLUMNS, impl="torch")
    torch.testing.assert_close(in_chunks, whole, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(m.square().sum(), (query, key)) for m in (whole, in_chunks)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_non_contiguous_inputs():
    query, key, _ = draw(5)
    turned = query.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    plain = row_maps(query, key, collate_rows(WORDS), COLUMNS)
    assert torch.equal(row_maps(turned, key, collate_rows(WORDS), COLUMNS), plain)


def test_gradcheck():
    query, key, _ = draw(6, batch=1, heads=2, groups=1, rows=4, keys=5, width=3)
    rows, columns = collate_rows([[[0, 2], [3]]]), torch.tensor([[1, 4, -1]])
    weights = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    for impl in IMPLS:
        assert torch.autograd.gradcheck(lambda q, k: row_maps(q, k, rows, columns, impl=impl), (query, key))  # noqa: B023
        assert torch.autograd.gradcheck(
            lambda q, k, a: row_maps(q, k, rows, columns, head_weights=a, impl=impl),  # noqa: B023
            (query, key, weights),
        )


def test_the_operation_is_registered_completely():
    query, key, _ = draw(7, dtype=torch.float32)
    rows = collate_rows(WORDS)
    bias = torch.zeros(1, 1, 1, 13)
    weights = torch.rand(4, requires_grad=True)
    lse = torch.rand(2, 4, rows.rows.shape[1])
    for options in ((None, True, 0.3, None, None), (bias, False, 0.3, weights, None), (None, False, 0.3, weights, lse)):
        arguments = (query, key, rows.rows, rows.words, rows.weights, COLUMNS, rows.num_words, *options)
        torch.library.opcheck(torch.ops.lavender.row_maps_torch.default, arguments)


def test_memory_is_that_of_the_word_rows():
    """With few word rows nothing of the size of the whole attention is allocated (T = 256 would take 50 MB here)."""
    query, key, _ = draw(8, batch=1, heads=8, groups=2, rows=256, keys=6404, width=16, dtype=torch.float32)
    rows = collate_rows([[[i] for i in range(4)]])
    columns = torch.arange(6404)[None]
    with torch.profiler.profile(profile_memory=True) as profile:
        row_maps(query, key, rows, columns, impl="torch").square().sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    attention = 8 * 256 * 6404 * 4
    assert 0 < largest < attention / 8


def broken(rows=None, words=None, weights=None, num_words=3):
    """The usual word rows with one part replaced."""
    whole = collate_rows(WORDS)
    return {"rows": WordRows(*(old if new is None else new for old, new in (
        (whole.rows, rows), (whole.words, words), (whole.weights, weights))), num_words)}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 3, 13, 8)}, "cannot share"),
        ({"key": torch.zeros(2, 2, 13, 9)}, "do not fit"),
        ({"key": torch.zeros(2, 2, 13, 8).half()}, "cast both"),
        ({"query": torch.zeros(2, 4, 9, 8).int(), "key": torch.zeros(2, 2, 13, 8).int()}, "cast both"),
        ({"query": torch.zeros(2, 4, 0, 8)}, "query .* is empty"),
        ({"query": [1.0]}, "query is a list; expected a tensor"),
        ({"key": torch.zeros(2, 2, 13, 8, device="meta")}, "different devices"),
        ({"columns": torch.zeros(3, 2).long()}, "do not fit 2 samples"),
        ({"columns": COLUMNS.float()}, "columns are torch.float32; expected int64"),
        ({"columns": COLUMNS + 1}, r"columns lie in \[0, 13\]; expected indices in \[0, 13\)"),
        (broken(rows=torch.full((2, 3), 9)), r"rows lie in \[9, 9\]"),
        (broken(num_words=1), r"words lie in \[0, 1\]"),
        (broken(num_words=0), "num_words .* is 0"),
        (broken(weights=torch.ones(2, 2)), "expected three times"),
        ({"mask": torch.ones(9, 13).bool(), "causal": True}, "causal"),
        ({"mask": torch.ones(14, 13).bool()}, "does not broadcast"),
        ({"mask": torch.ones(2, 13).bool()}, r"give mask\[:, None, None\]"),
        ({"mask": torch.ones(1, 2, 1, 9, 13).bool()}, "does not broadcast"),
        ({"mask": torch.ones(9, 13).long()}, "the mask is torch.int64"),
        ({"head_weights": torch.ones(2)}, "one weight per query head"),
        ({"lse": torch.zeros(2, 4, 8)}, r"lse is .*expected \[B, H, T\]"),
        ({"lse": torch.zeros(2, 4, 9), "renormalize": True}, "renormalize"),
        ({"impl": "fastest"}, "auto or one of triton, cuda, torch, reference"),
    ],
)
def test_misuse_is_a_clear_error(change, message):
    arguments = {"query": torch.zeros(2, 4, 9, 8), "key": torch.zeros(2, 2, 13, 8), "columns": COLUMNS} | change
    arguments.setdefault("rows", collate_rows(WORDS))
    with pytest.raises(ConfigError, match=message):
        row_maps(**arguments)


@pytest.mark.parametrize("impl", [*IMPLS, "triton"])
def test_padding_speaks_for_no_word_whatever_its_weight(impl):
    if impl == "triton":
        pytest.importorskip("triton")
    query, key, _ = draw(10, dtype=torch.float32)
    rows = collate_rows(WORDS)
    rows.weights[rows.rows < 0] = 1.0
    rows.words[rows.rows < 0] = 0
    maps = row_maps(query, key, rows, COLUMNS, impl=impl)
    torch.testing.assert_close(maps, row_maps(query, key, collate_rows(WORDS), COLUMNS, impl=impl), rtol=0, atol=0)
    torch.autograd.grad(maps.sum(), query)


@pytest.mark.parametrize("impl", IMPLS)
def test_masks_get_no_gradient(impl):
    query, key, _ = draw(11)
    mask = torch.zeros(9, 13, dtype=torch.float64, requires_grad=True)
    maps = row_maps(query.detach(), key.detach(), collate_rows(WORDS), COLUMNS, mask=mask, impl=impl)
    assert not maps.requires_grad


def test_agrees_with_the_attention_that_sdpa_computes():
    """The word rows' attention, applied to the values, is what SDPA returns for those rows."""
    query, key, generator = draw(9, heads=4, groups=4)
    value = torch.randn(2, 4, 13, 8, generator=generator, dtype=torch.float64)
    output = F.scaled_dot_product_attention(query, key, value)
    rows = collate_rows([[[i] for i in range(9)]] * 2)
    maps = row_maps(query, key, rows, torch.arange(13).expand(2, -1))
    torch.testing.assert_close(maps @ value, output, rtol=0, atol=1e-12)
