"""How wrong an implementation may be: twice as wrong as plain PyTorch in the same dtype, and one rounding more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where kernels are tested: Triton's interpret CPU tensors where there is no GPU."""


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative L2 error."""
    found, exact = found.detach().double(), exact.detach().double()
    assert found.shape == exact.shape
    assert torch.isfinite(found).all()
    return float((found - exact).norm() / exact.norm().clamp_min(1e-30))


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
    found, right = run(ours, inputs, None), run(exact, inputs, torch.float64)
    if naive is None:
        for one, other in zip(found, right, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-5)
        return
    plain = run(naive, inputs, dtype)
    rounding = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps / 2 * log_sum_exp
    for place, (one, other, third) in enumerate(zip(found, right, plain, strict=True)):
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
