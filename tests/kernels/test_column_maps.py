from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavender.errors import ConfigError
from lavender.kernels.column_maps import chunked, column_attention, column_maps

IMPLS = ["reference", "torch"]


def draw(seed, batch=2, heads=3, queries=20, keys=7, width=8, words=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, queries, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    key = torch.randn(batch, heads, keys, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weights = torch.rand(batch, words, keys, generator=generator, dtype=torch.float64)
    weights[:, -1] = 0  # a word without tokens
    return query, key, weights, generator


def by_hand(query, key, weights, visible=None):
    scores = query.double() @ key.double().mT * query.shape[-1] ** -0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return torch.einsum("bhqn,bwn->bhwq", torch.softmax(scores, -1).nan_to_num(0.0), weights.double())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
def test_maps_and_gradients_equal_the_definition(impl, mask):
    query, key, weights, generator = draw(0)
    visible = torch.rand(2, 1, 20, 7, generator=generator) < 0.7
    visible[..., 0] = True
    if mask == "none":
        expected, mask_argument = by_hand(query, key, weights), None
    else:
        expected = by_hand(query, key, weights, visible)
        mask_argument = visible if mask == "boolean" else torch.where(visible, 0.0, -1e9)
    maps = column_maps(query, key, weights, mask=mask_argument, impl=impl)
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(maps.square().sum(), (query, key)),
        torch.autograd.grad(expected.square().sum(), (query, key)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_words_that_cover_every_token_sum_to_one(impl):
    query, key, _, _ = draw(1)
    weights = torch.eye(7, dtype=torch.float64).expand(2, -1, -1)
    total = column_maps(query, key, weights, impl=impl).sum(dim=2)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_queries_that_see_nothing_give_zeros(impl):
    query, key, weights, _ = draw(2)
    visible = torch.ones(1, 1, 20, 7, dtype=torch.bool)
    visible[:, :, 4] = False
    maps = column_maps(query, key, weights, mask=visible, impl=impl)
    assert not maps[..., 4].any()
    assert torch.isfinite(torch.autograd.grad(maps.sum(), query)[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_carries_float32s_error(dtype):
    query, key, weights, _ = draw(3, queries=64, keys=77, width=40, dtype=dtype)
    exact_query, exact_key = (t.detach().double().requires_grad_() for t in (query, key))
    exact, ours = by_hand(exact_query, exact_key, weights), column_maps(query, key, weights, impl="torch")
    assert (ours - exact).norm() / exact.norm() < 2e-6
    wanted = torch.autograd.grad(exact.square().sum(), (exact_query, exact_key))
    gradients = torch.autograd.grad(ours.square().sum(), (query, key))
    for one, other in zip(gradients, wanted, strict=True):
        assert (one.double() - other).norm() / other.norm() < 3e-6 + torch.finfo(dtype).eps


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 9), st.integers(1, 4))
def test_torch_equals_reference_on_any_shape(seed, queries, keys, words):
    query, key, weights, _ = draw(seed, queries=queries, keys=keys, words=words)
    results = []
    for impl in IMPLS:
        maps = column_maps(query, key, weights, impl=impl)
        results.append((maps, *torch.autograd.grad(maps.sin().sum(), (query, key))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_chunks_change_nothing(monkeypatch):
    query, key, weights, _ = draw(4, queries=50)
    whole = column_maps(query, key, weights, impl="torch")
    gradients = torch.autograd.grad(whole.square().sum(), (query, key))
    monkeypatch.setattr(chunked, "BYTE_BUDGET", 1)
    in_chunks = column_maps(query, key, weights, impl="torch")
    torch.testing.assert_close(in_chunks, whole, rtol=1e-12, atol=1e-14)
    for one, other in zip(torch.autograd.grad(in_chunks.square().sum(), (query, key)), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_the_operation_is_registered_completely():
    query, key, weights, _ = draw(5, dtype=torch.float32)
    value = torch.rand(2, 3, 7, 4, requires_grad=True)
    for mask in (None, torch.zeros(1, 1, 1, 7)):
        torch.library.opcheck(torch.ops.lavender.column_maps_torch.default, (query, key, value, weights.float(), mask, 0.3, None))


def test_gradcheck():
    query, key, weights, generator = draw(8, batch=1, heads=2, queries=4, keys=3, width=2, words=2)
    value = torch.randn(1, 2, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    heads = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    for impl in IMPLS:
        assert torch.autograd.gradcheck(
            lambda q, k, v, a: column_attention(q, k, v, weights, head_weights=a, impl=impl),  # noqa: B023
            (query, key, value, heads),
        )


def test_the_output_is_that_of_sdpa():
    query, key, weights, generator = draw(7)
    value = torch.randn(2, 3, 7, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 1, 20, 7, generator=generator) < 0.7
    mask[..., 0] = True
    output, _ = column_attention(query, key, value, weights, mask=mask)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 1, 7, 8)}, "repeat_interleave"),
        ({"key": torch.zeros(2, 3, 7, 9)}, "do not fit"),
        ({"key": torch.zeros(2, 3, 7, 8).half()}, "cast both"),
        ({"query": torch.zeros(2, 3, 0, 8)}, "query .* is empty"),
        ({"word_weights": torch.zeros(2, 3, 5)}, "word_weights"),
        ({"word_weights": torch.zeros(2, 0, 7)}, "word_weights .* is empty"),
        ({"word_weights": torch.zeros(2, 3, 7, device="meta")}, "different devices"),
        ({"head_weights": torch.ones(2)}, "head_weights"),
        ({"mask": torch.ones(20, 8).bool()}, "does not broadcast"),
        ({"mask": torch.ones(25, 7).bool()}, "does not broadcast"),
        ({"mask": torch.ones(2, 7).bool()}, r"give mask\[:, None, None\]"),
    ],
)
def test_misuse_is_a_clear_error(change, message):
    arguments = {"query": torch.zeros(2, 3, 20, 8), "key": torch.zeros(2, 3, 7, 8), "word_weights": torch.zeros(2, 3, 7)} | change
    with pytest.raises(ConfigError, match=message):
        column_maps(**arguments)


def test_values_must_fit_their_keys():
    query, key, weights, _ = draw(6)
    with pytest.raises(ConfigError, match=r"value .* does not fit"):
        column_attention(query, key, key[:, :, :3], weights)
