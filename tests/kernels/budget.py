"""How wrong an implementation may be: twice as wrong as plain PyTorch in the same dtype, and one rounding more."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from lavender.kernels.column_maps import column_attention, column_maps
from lavender.kernels.row_maps import row_maps
from lavender.words import collate_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where kernels are tested: Triton's interpret CPU tensors where there is no GPU."""


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative L2 error."""
    ours, exact = ours.detach().double(), exact.detach().double()
    assert ours.shape == exact.shape
    assert torch.isfinite(ours).all()
    return float((ours - exact).norm() / exact.norm().clamp_min(1e-30))


Results = tuple[torch.Tensor, ...]


def run(function: Callable[..., Results], inputs: Sequence[torch.Tensor], dtype: torch.dtype | None) -> list[torch.Tensor]:
    """A function's results for inputs cast to a dtype, and the gradients of their fixed random projection."""
    cast = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    results = function(*cast)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.device) for r in results]
    total = sum((r.double() * w).sum() for r, w in zip(results, weights, strict=True))
    return [*results, *torch.autograd.grad(total, cast)]


def assert_within_budget(
    ours: Callable[..., Results],
    exact: Callable[..., Results],
    naive: Callable[..., Results] | None,
    inputs: Sequence[torch.Tensor],
    log_sum_exp: float = 0.0,
) -> None:
    """Compares results and every gradient with float64.

    Args:
        ours: the implementation; runs on the inputs as they are.
        exact: the specification; runs on the same numbers in float64.
        naive: the specification by plain operations; runs in the inputs' dtype, and so sets the budget. None for float32 inputs
            of order one that may be so few that a gradient vanishes or a rounding is luck: 2e-5 of values and one are allowed.
        log_sum_exp: about how large the log-sum-exp is that `ours` keeps between its passes, in float32, if it does: the rounding
            of that number is a relative error of every probability.
    """
    dtype = inputs[0].dtype
    results, right = run(ours, inputs, None), run(exact, inputs, torch.float64)
    if naive is None:
        for one, other in zip(results, right, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-5)
        return
    plain = run(naive, inputs, dtype)
    rounding = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps / 2 * log_sum_exp
    for place, (one, other, third) in enumerate(zip(results, right, plain, strict=True)):
        budget = 2 * relative_error(third, other) + rounding
        assert relative_error(one, other) <= budget, f"result or gradient {place}: {relative_error(one, other):.1e} > {budget:.1e}"


def poison_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes memory that an implementation takes without setting it hold NaN, so that whatever it leaves out shows."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapper(*args: object, **kwargs: object) -> torch.Tensor:
            fresh = make(*args, **kwargs)
            return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


WORDS = [[[1, 2], [4], [], [2]], [[0, 3, 8]]]
"""A split word, one row, no row, a row that two words share; padding in the second sample."""


def draw(seed, *shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


def naive_rows(query, key, rows, columns, visible=None, head_weights=None):
    """Word maps by plain operations in the inputs' dtype."""
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT * query.shape[-1] ** -0.5
    if visible is not None and visible.is_floating_point():
        visible, scores = visible > torch.finfo(visible.dtype).min, scores + visible.clamp_min(-1e4).to(scores.dtype)
    if visible is not None:
        scores = scores.masked_fill(~visible, -1e4)
    probabilities = scores.softmax(-1)
    if visible is not None:
        probabilities = probabilities.masked_fill(~visible.any(-1, keepdim=True), 0)
    index = rows.rows.clamp_min(0)[:, None, :, None].expand(-1, query.shape[1], -1, key.shape[2])
    chosen = probabilities.gather(2, index)
    index = columns.clamp_min(0)[:, None, None].expand(-1, *chosen.shape[1:3], -1)
    maps = rows.indicator(query.dtype)[:, None] @ chosen.gather(3, index) * (columns >= 0)[:, None, None].to(query.dtype)
    return maps if head_weights is None else (maps * head_weights[:, None, None]).sum(1, keepdim=True)


def collate(words):
    rows = collate_rows(words)
    return type(rows)(rows.rows.to(DEVICE), rows.words.to(DEVICE), rows.weights.to(DEVICE), rows.num_words)


def check_rows(
    impl,
    dtype,
    seed=0,
    heads=(4, 2),
    length=11,
    keys=77,
    width=40,
    words=WORDS,
    num_columns=50,
    weighted=False,
    budget=True,
    **options,
):
    batch = len(words)
    query, key, weights = draw(seed, (batch, length, heads[0], width), (batch, keys, heads[1], width), (heads[0],), dtype=dtype)
    query, key = query.transpose(1, 2), key.transpose(1, 2)  # a model's layout: not contiguous
    generator = torch.Generator().manual_seed(seed)
    columns = torch.stack([torch.randperm(keys, generator=generator)[:num_columns] for _ in range(batch)]).to(DEVICE)
    columns[-1, num_columns // 2 :] = -1
    rows, visible = collate(words), options.get("mask")
    if options.get("causal"):
        visible = torch.ones(length, keys, dtype=torch.bool, device=DEVICE).tril()
    inputs = [query, key, *([weights] if weighted else [])]

    def ours(q, k, a=None):
        return (row_maps(q, k, rows, columns, head_weights=a, impl=impl, **options),)

    def exact(q, k, a=None):
        return (row_maps(q, k, rows, columns, head_weights=a, impl="reference", **options),)

    def naive(q, k, a=None):
        return (naive_rows(q, k, rows, columns, visible, a),)

    assert_within_budget(ours, exact, naive if budget else None, inputs, math.log(keys) if impl == "triton" else 0.0)


def naive_columns(query, key, value, weights, visible=None, head_weights=None):
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if visible is not None and visible.is_floating_point():
        visible, scores = visible > torch.finfo(visible.dtype).min, scores + visible.clamp_min(-1e4).to(scores.dtype)
    if visible is not None:
        scores = scores.masked_fill(~visible, -1e4)
    probabilities = scores.softmax(-1)
    if visible is not None:
        probabilities = probabilities.masked_fill(~visible.any(-1, keepdim=True), 0)
    maps = weights.to(query.dtype)[:, None] @ probabilities.mT
    return probabilities @ value, maps if head_weights is None else (maps * head_weights[:, None, None]).sum(1, keepdim=True)


def check_columns(
    impl, dtype, seed=0, heads=2, queries=50, keys=77, width=40, words=5, weighted=False, has_value=True, mask=None, budget=True
):
    shapes = [(2, queries, heads, width), (2, keys, heads, width), (2, keys, heads, width), (heads,)]
    query, key, value, head_weights = draw(seed, *shapes, dtype=dtype)
    weights = torch.rand(2, words, keys, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    weights[:, -1] = 0  # a word without tokens
    inputs = [query.transpose(1, 2), key.transpose(1, 2), *([value.transpose(1, 2)] if has_value else [])]
    inputs += [head_weights] if weighted else []

    def ours(q, k, *rest, impl=impl):
        a = rest[-1] if weighted else None
        if has_value:
            return column_attention(q, k, rest[0], weights, head_weights=a, mask=mask, impl=impl)
        return (column_maps(q, k, weights, head_weights=a, mask=mask, impl=impl),)

    def naive(q, k, *rest):
        results = naive_columns(q, k, rest[0] if has_value else k, weights, mask, rest[-1] if weighted else None)
        return results if has_value else results[1:]

    keeps_lse = impl == "triton"
    assert_within_budget(
        ours,
        lambda *inputs: ours(*inputs, impl="reference"),
        naive if budget else None,
        inputs,
        math.log(keys) if keeps_lse else 0.0,
    )
