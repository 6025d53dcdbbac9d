"""Every implementation against float64, forward and every gradient, in float32 and half precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavender.kernels.column_maps import chunked as chunked_columns
from lavender.kernels.column_maps import column_attention, column_maps
from lavender.kernels.dispatch import HAS_TRITON
from lavender.kernels.map_loss import map_loss
from lavender.kernels.map_loss.normalization import NORMALIZATIONS
from lavender.kernels.row_map_loss import row_map_loss
from lavender.kernels.row_maps import row_maps

from .budget import (
    DEVICE,
    WORDS,
    assert_within_budget,
    check_columns,
    check_rows,
    collate,
    draw,
    naive_rows,
    poison_fresh_memory,
)

IMPLS = ["torch", *(["triton"] if HAS_TRITON else [])]
DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():  # the interpreter rounds bfloat16 in its own way
    DTYPES.append(torch.bfloat16)
FULL = pytest.mark.full


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_rows(impl, dtype, weighted, monkeypatch):
    poison_fresh_memory(monkeypatch)
    check_rows(impl, dtype, weighted=weighted)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [64, pytest.param(72, marks=FULL), 80, pytest.param(96, marks=FULL), 128])
def test_rows_of_every_head_width(impl, width):
    check_rows(impl, torch.float32, heads=(2, 1), width=width, keys=33, num_columns=20)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [160, 256])
def test_rows_of_wide_heads_in_half_precision(impl, width):
    check_rows(impl, torch.float16, heads=(2, 1), width=width, keys=33, num_columns=20, weighted=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_rows(impl, dtype):
    check_rows(impl, dtype, length=77, weighted=True, causal=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("shape", "additive"),
    [
        pytest.param(shape, additive, id=f"{shape}-{additive}", marks=[FULL] * (additive != (index % 2 == 1)))
        for index, shape in enumerate([(2, 4, 11, 77), (2, 1, 1, 77), (1, 1, 11, 77), (11, 77), (1, 1, 11, 1)])
        for additive in (False, True)
    ],
)
def test_rows_under_masks(impl, shape, additive):
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(shape, generator=generator) < 0.6
    if shape[-2] > 1:
        mask[..., 4, :] = False  # a row that may see nothing
    if additive:
        mask = torch.randn(shape, generator=generator).masked_fill(~mask, torch.finfo(torch.float32).min)
    check_rows(impl, torch.float32, mask=mask.to(DEVICE))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("keys", "num_columns"), [(577, 576), pytest.param(1601, 1600, marks=FULL)])
def test_rows_over_many_keys(impl, keys, num_columns):
    options = {"width": 16, "words": [[[3, 4], [7]]], "weighted": True}
    check_rows(impl, torch.float32, heads=(2, 1), keys=keys, num_columns=num_columns, **options)


def test_rows_over_the_keys_of_four_tiles():
    check_rows("torch", torch.float32, heads=(8, 2), keys=6404, num_columns=6404, width=64, length=16, weighted=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_more_words_than_one_block_and_more_rows_than_one_tile(impl):
    words = [[[w, w + 1] for w in range(70)]]
    check_rows(impl, torch.float32, heads=(1, 1), length=71, keys=20, num_columns=20, width=16, words=words)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("examples", [4, pytest.param(12, marks=FULL)])
def test_rows_of_any_shape(impl, examples):
    @settings(max_examples=examples, deadline=None)
    @given(seed=st.integers(0, 10**6), data=st.data())
    def check(seed, data):
        length, keys = data.draw(st.integers(1, 9), label="T"), data.draw(st.integers(1, 40), label="N")
        rows = st.lists(st.lists(st.integers(0, length - 1), max_size=3), max_size=3)
        words = data.draw(st.lists(rows, min_size=1, max_size=2), label="words")
        mask = None
        if data.draw(st.booleans(), label="masked"):
            mask = torch.rand(len(words), 1, length, keys, generator=torch.Generator().manual_seed(seed)) < 0.5
            mask = mask.to(DEVICE)
        heads = data.draw(st.sampled_from([(1, 1), (4, 2), (6, 2)]), label="heads")
        width, num_columns = data.draw(st.sampled_from([1, 5, 8, 24]), label="D"), data.draw(st.integers(1, keys), label="M")
        options = {"budget": False} if mask is None else {"budget": False, "mask": mask}
        check_rows(impl, torch.float32, seed, heads, length, keys, width, words, num_columns, data.draw(st.booleans()), **options)

    check()


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("masked", [False, True])
def test_a_known_normalizer_changes_nothing(impl, masked):
    query, key = draw(3, (2, 4, 9, 16), (2, 2, 21, 16))
    columns = torch.arange(20, device=DEVICE).expand(2, -1)
    mask = torch.rand(2, 1, 9, 21, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.5 if masked else None
    scores = query.double() @ key.double().repeat_interleave(2, dim=1).mT / 4
    lse = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).logsumexp(-1)
    results = []
    for known_lse in (None, lse):
        q, k = query.detach().requires_grad_(), key.detach().requires_grad_()
        maps = row_maps(q, k, collate(WORDS), columns, mask=mask, lse=known_lse, impl=impl)
        results.append([maps, *torch.autograd.grad(maps.sin().sum(), (q, k))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_of_any_strides(impl):
    """A last axis that is not dense, a broadcast one, a model's [B, T, H, D], every other head weight: gradients too."""
    query, key, value, weights = draw(9, (1, 2, 16, 9), (1, 1, 16, 13), (1, 9, 2, 16), (4,))
    rows, columns = collate([[[1, 2], [4]]]), torch.arange(6, device=DEVICE)[None]
    word_weights = torch.rand(1, 3, 13, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def rows_of(q, k, v, a, impl=impl):
        return (row_maps(q.mT, k.mT.expand(1, 2, 13, 16), rows, columns, head_weights=a[::2], impl=impl),)

    def columns_of(q, k, v, a, impl=impl):
        key = k.mT.expand(1, 2, 13, 16)
        return column_attention(q.mT, key, key, word_weights, head_weights=a[::2], impl=impl)

    def rows_of_a_model(q, k, v, a, impl=impl):
        q = v.transpose(1, 2)
        return (row_maps(q, q[:, :1], rows, columns, head_weights=a[::2], impl=impl),)

    for function in (rows_of, columns_of, rows_of_a_model):
        used = [t.detach().requires_grad_() for t in (query, key, value, weights)]
        exact = [t.detach().double().requires_grad_() for t in used]
        results = []
        for inputs, by in ((used, impl), (exact, "reference")):
            total = sum(r.sin().sum() for r in function(*inputs, impl=by))
            results.append(torch.autograd.grad(total, inputs, allow_unused=True))
        assert sum(g is not None for g in results[0]) >= 2
        for one, other in zip(*results, strict=True):
            if one is not None:
                torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_autocast_rounds_nothing(impl):
    query, key, value, heads = draw(10, (1, 2, 9, 16), (1, 2, 140, 16), (1, 2, 20, 16), (2,))
    target = torch.rand(1, 2, 9, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    word_weights = torch.rand(1, 3, 140, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    rows, columns = collate([[[1, 2], [4]]]), torch.arange(20, device=DEVICE)[None]
    results = []
    for enabled in (False, True):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled):
            q, k, v, a = (t.detach().requires_grad_() for t in (query, key, value, heads))
            maps = row_maps(q, k, rows, columns, head_weights=a, impl=impl)
            loss = map_loss(
                maps[:, 0].unflatten(-1, (4, 5)) * 20, target, torch.ones(1, 2, dtype=torch.bool, device=DEVICE), impl=impl
            )
            many = column_maps(q, k, word_weights, head_weights=a, impl=impl)
            output, few = column_attention(q, v, v, word_weights[..., :20], impl=impl)
            total = loss + many.sin().sum() + few.sin().sum() + output.sin().sum()
        # Backward passes do not belong under autocast: the reference's plain operations would be rounded there.
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled and impl != "reference"):
            results.append([maps, loss, many, few, output, *torch.autograd.grad(total, (q, k, v, a))])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_derivative_is_refused(impl):
    query, key = draw(11, (1, 2, 9, 16), (1, 2, 20, 16))
    query.requires_grad_()
    maps = row_maps(query, key, collate([[[1], [2]]]), torch.arange(20, device=DEVICE)[None], impl=impl)
    present = torch.ones(1, 2, dtype=torch.bool, device=DEVICE)
    student = maps[:, 0].detach().unflatten(-1, (4, 5)).requires_grad_()
    for result, by in (
        (maps.square().sum(), query),
        (column_maps(query, key, torch.ones(1, 1, 20, device=DEVICE).cumsum(-1), impl=impl).square().sum(), query),
        (map_loss(student, torch.rand(1, 2, 4, 5).to(DEVICE), present, impl=impl).square(), student),
    ):
        (gradient,) = torch.autograd.grad(result, by, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_outside_the_picture(impl):
    """The softmax ties every key to the map: keys outside the columns get the delta term, and only that."""
    query, key = draw(4, (1, 2, 5, 16), (1, 1, 30, 16), dtype=torch.float32)
    columns = torch.arange(10, 20, device=DEVICE)[None]
    rows = collate([[[1], [3]]])
    key.requires_grad_()
    maps = row_maps(query, key, rows, columns, head_weights=torch.ones(2, device=DEVICE), impl=impl)
    (ours,) = torch.autograd.grad(maps.sum(), key)
    probabilities = (query[:, :, [1, 3]].double() @ key.double().mT / 4).softmax(-1)
    inside = torch.zeros(30, dtype=torch.float64, device=DEVICE)
    inside[10:20] = 1
    scores_gradient = probabilities * (inside - (probabilities * inside).sum(-1, keepdim=True))
    expected = (scores_gradient.mT @ query[:, :, [1, 3]].double() / 4).sum(1, keepdim=True)
    assert expected[:, :, :10].norm() > 0.1 * expected.norm()
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_scores(impl):
    """A softmax that does not subtract the maximum overflows here."""
    query, key = draw(5, (1, 1, 4, 16), (1, 1, 30, 16))
    maps = row_maps(query * 300, key, collate([[[1], [2]]]), torch.arange(30, device=DEVICE)[None], impl=impl)
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps.sum(-1)))
    weights = torch.eye(30, device=DEVICE)[None]
    total = column_maps(query * 300, key, weights, impl=impl).sum(2)
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1e-9, 1e4])
def test_gradients_of_any_size_survive_half_precision(impl, size):
    query, key = draw(6, (1, 2, 8, 16), (1, 2, 40, 16), dtype=torch.float16)
    columns, rows = torch.arange(40, device=DEVICE)[None], collate([[[1], [2, 3]]])
    weights = torch.rand(1, 3, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for function in (
        lambda q, k, impl: row_maps(q, k, rows, columns, impl=impl),
        lambda q, k, impl: column_maps(q, k, weights, impl=impl),
    ):
        q, exact = query.detach().requires_grad_(), query.double().requires_grad_()
        wanted = torch.autograd.grad((function(exact, key.double(), "reference") ** 2).sum(), exact)[0]
        maps = function(q, key, impl)
        # What a gradient scaler does: the loss is scaled before, the gradient after; in between it must fit float16.
        scale = 1.0 if size > 1 else 2.0**24
        ours = torch.autograd.grad((maps**2).sum() * size * scale, q)[0]
        assert torch.isfinite(ours).all()
        assert ((ours.double() / (size * scale)) - wanted).norm() / wanted.norm() < 0.02


@pytest.mark.parametrize("impl", IMPLS)
def test_results_are_the_same_bits_every_time(impl):
    query, key, value = draw(7, (2, 4, 20, 16), (2, 4, 40, 16), (2, 4, 40, 16))
    columns, weights = torch.arange(40, device=DEVICE).expand(2, -1), torch.ones(2, 3, 40, device=DEVICE)
    heads = torch.rand(4, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def results():
        q, k, v, a = (t.detach().requires_grad_() for t in (query, key, value, heads))
        maps = row_maps(q, k, collate(WORDS), columns, head_weights=a, impl=impl)
        output, other = column_attention(q, k, v, weights, head_weights=a, impl=impl)
        return [maps, output, other, *torch.autograd.grad(maps.sin().sum() + output.sum() + other.sin().sum(), (q, k, v, a))]

    first = results()
    for _ in range(1000 if DEVICE == "cuda" else 1):
        assert all(torch.equal(one, other) for one, other in zip(first, results(), strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("weighted", "has_value"),
    [(False, True), (True, False), pytest.param(False, False, marks=FULL), pytest.param(True, True, marks=FULL)],
)
def test_columns(impl, dtype, weighted, has_value, monkeypatch):
    poison_fresh_memory(monkeypatch)
    check_columns(impl, dtype, weighted=weighted, has_value=has_value)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("width", "keys"), [(64, 77), (80, 16), (160, 77), (256, 128)])
def test_columns_of_every_head_width(impl, width, keys):
    check_columns(impl, torch.float16, heads=1, queries=20, width=width, keys=keys)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("per_query", [True, pytest.param(False, marks=FULL)])
def test_columns_under_a_mask(impl, per_query):
    mask = torch.rand(2, 1, 50, 77, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[:, :, 7] = False  # a query that may see nothing
    mask = (mask if per_query else mask[:, :, :1]).to(DEVICE)
    check_columns(impl, torch.float32, weighted=per_query, mask=mask)


@pytest.mark.parametrize(
    ("impl", "weighted"),
    [pytest.param(i, weighted, marks=[FULL] * (weighted and i == "triton")) for i in IMPLS for weighted in (False, True)],
)
def test_columns_of_joint_attention(impl, weighted):
    """More keys than one pass takes, most of them of no word."""
    heads = 2 if impl == "triton" else 8  # the gradient of two head weights alone is as wrong as its roundings happen to be
    check_columns(impl, torch.float32, heads=heads, keys=200, queries=40, width=16, has_value=False, weighted=weighted)


@pytest.mark.parametrize("impl", IMPLS)
def test_more_words_than_one_block(impl):
    check_columns(impl, torch.float32, heads=1, queries=20, keys=20, width=16, words=70)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("examples", [3, pytest.param(10, marks=FULL)])
def test_columns_of_any_shape(impl, examples):
    @settings(max_examples=examples, deadline=None)
    @given(seed=st.integers(0, 10**6), data=st.data())
    def check(seed, data):
        queries, keys = data.draw(st.integers(1, 40), label="Q"), data.draw(st.integers(1, 40), label="N")
        mask = None
        if data.draw(st.booleans(), label="masked"):
            mask = (torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(seed)) < 0.5).to(DEVICE)
        width, words = data.draw(st.sampled_from([1, 8, 24]), label="D"), data.draw(st.integers(1, 4), label="W")
        flags = data.draw(st.tuples(st.booleans(), st.booleans()), label="weighted, value")
        check_columns(impl, torch.float32, seed, 2, queries, keys, width, words, *flags, mask, budget=False)

    check()


def test_one_heads_queries_in_several_chunks(monkeypatch):
    monkeypatch.setattr(chunked_columns, "BYTE_BUDGET", 2**12)
    mask = torch.rand(2, 2, 50, 77, generator=torch.Generator().manual_seed(2)) < 0.5
    check_columns("torch", torch.float32, mask=mask.to(DEVICE))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("normalization", "distance"), [*((name, "mse") for name in NORMALIZATIONS), ("sum", "kl")], ids=lambda name: name
)
@pytest.mark.parametrize("grids", [((5, 7), (5, 7)), ((8, 8), (32, 32)), ((24, 20), (9, 16))], ids=str)
def test_losses(impl, normalization, distance, grids, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    student, target = (torch.rand(2, 12, *grid, generator=generator).to(DEVICE) for grid in grids)
    present = torch.rand(2, 12, generator=generator).to(DEVICE) < 0.7
    options = {"normalization": normalization, "distance": distance, "reduction": "none"}

    def loss(student, impl):
        return (map_loss(student, target.to(student.dtype), present, impl=impl, **options),)

    poison_fresh_memory(monkeypatch)
    assert_within_budget(lambda s: loss(s, impl), lambda s: loss(s, "reference"), lambda s: loss(s, "reference"), [student])


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_share_a_gradient_as_in_torch(impl):
    student = torch.tensor([[[[1.0, 3.0], [3.0, 1.0]]]], device=DEVICE)
    target, present = torch.tensor([[[[0.2, 1.0], [0.4, 0.1]]]], device=DEVICE), torch.ones(1, 1, dtype=torch.bool, device=DEVICE)
    for normalization in ("minmax", "max"):
        gradients = []
        for one in ("reference", impl):
            leaf = student.detach().requires_grad_()
            loss = map_loss(leaf, target, present, normalization=normalization, impl=one)
            gradients.append(torch.autograd.grad(loss, leaf)[0])
        torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_queries_to_the_loss(impl, dtype):
    query, key = draw(8, (2, 4, 11, 16), (2, 2, 40, 16), dtype=dtype)
    columns = torch.arange(4, 40, device=DEVICE).expand(2, -1)
    target = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    present = torch.tensor([[True, True, False, True], [True, False, False, False]], device=DEVICE)
    rows = collate(WORDS)

    def loss(query, key, impl):
        return (row_map_loss(query, key, rows, columns, (6, 6), target.to(query.dtype), present, impl=impl),)

    def naive(query, key):
        maps = naive_rows(query, key, rows, columns).mean(1) * 36
        return (map_loss(maps.unflatten(-1, (6, 6)), target.to(maps.dtype), present, impl="reference"),)

    assert_within_budget(lambda q, k: loss(q, k, impl), lambda q, k: loss(q, k, "reference"), naive, [query, key])
