from __future__ import annotations

import math

import pytest
import torch

from lavender.errors import ConfigError
from lavender.kernels.map_loss import map_loss, resample
from lavender.kernels.map_loss.normalization import EPSILON, NORMALIZATIONS

IMPLS = ["reference", "torch"]


def draw(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student = torch.rand(2, 3, 5, 4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.rand(2, 3, 5, 4, generator=generator, dtype=torch.float64).to(dtype)
    return student, target, torch.tensor([[True, False, True], [False, True, False]])


def by_hand(maps, normalization):
    """One map's normal form, place by place."""
    values = maps.detach().flatten().tolist()
    mean = sum(values) / len(values)
    shift, size = {
        "zscore": (mean, (sum((v - mean) ** 2 for v in values) / len(values) + EPSILON) ** 0.5),
        "sum": (0, sum(values) + EPSILON),
        "minmax": (min(values), max(values) - min(values) + EPSILON),
        "max": (0, max(values) + EPSILON),
        "none": (0, 1),
    }[normalization]
    return [(v - shift) / size for v in values]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_losses_equal_their_formulas(impl, normalization):
    student, target, present = draw()
    each = torch.zeros(2, 3, dtype=torch.float64)
    for b, w in present.nonzero().tolist():
        pairs = list(zip(by_hand(student[b, w], normalization), by_hand(target[b, w], normalization), strict=True))
        each[b, w] = sum((s - t) ** 2 for s, t in pairs) / len(pairs)
    for reduction, expected in (("none", each), ("sum", each.sum()), ("mean", each.sum() / 3)):
        loss = map_loss(student, target, present, normalization=normalization, reduction=reduction, impl=impl)
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_divergence_equals_its_formula(impl):
    student, target, present = draw()
    each = torch.zeros(2, 3, dtype=torch.float64)
    for b, w in present.nonzero().tolist():
        pairs = zip(by_hand(student[b, w], "sum"), by_hand(target[b, w], "sum"), strict=True)
        each[b, w] = sum(t * math.log(t / s) for s, t in pairs)
    loss = map_loss(student, target, present, normalization="sum", distance="kl", reduction="none", impl=impl)
    torch.testing.assert_close(loss, each, rtol=1e-4, atol=1e-6)  # epsilon floors the smallest places
    assert (loss[present] > 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("grid", [(9, 11), (3, 2)])
def test_students_are_resampled_to_their_targets(impl, grid):
    student, _, present = draw()
    target = torch.rand(2, 3, *grid, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = map_loss(student, target, present, impl=impl)
    torch.testing.assert_close(loss, map_loss(resample(student, grid), target, present, impl=impl))


@pytest.mark.parametrize("normalization", ["zscore", "minmax"])
def test_scale_and_offset_of_a_target_do_not_matter(normalization):
    student, target, present = draw()
    one = map_loss(student, target, present, normalization=normalization)
    other = map_loss(student, target * 7 + 3, present, normalization=normalization)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


def test_absent_words_do_not_count_even_when_they_are_nan():
    student, target, present = draw()
    plain = map_loss(student, target, present)
    poisoned_target = target.masked_fill(~present[..., None, None], torch.nan)
    poisoned = map_loss(student, poisoned_target, present)
    assert torch.equal(plain, poisoned)
    gradient = torch.autograd.grad(poisoned, student)[0]
    assert torch.isfinite(gradient).all()
    assert not gradient[~present].any()


def test_no_word_at_all_adds_exactly_zero():
    student, target, present = draw()
    loss = map_loss(student, target, torch.zeros_like(present))
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, student)[0].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("grid", [(5, 4), (7, 3)])
def test_gradcheck(impl, grid):
    student, _, present = draw()
    target = torch.rand(2, 3, *grid, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for normalization in NORMALIZATIONS:
        options = {"normalization": normalization, "impl": impl}
        assert torch.autograd.gradcheck(lambda s: map_loss(s, target, present, **options), (student,))  # noqa: B023
    assert torch.autograd.gradcheck(
        lambda s: map_loss(s, target, present, normalization="sum", distance="kl", impl=impl), (student,)
    )


def test_the_operation_is_registered_completely():
    student, target, present = draw(dtype=torch.float32)
    for grid in (target, torch.rand(2, 3, 7, 3)):
        torch.library.opcheck(torch.ops.lavender.map_loss.default, (student, grid, present, "zscore", "mse", "torch"))


def test_half_precision_is_summed_in_float32():
    student, target, present = draw(dtype=torch.float16)
    assert map_loss(student, target, present).dtype == torch.float32


def test_triton_says_which_grids_it_cannot_take():
    pytest.importorskip("triton")
    for grid, message in (((65, 4), "65 places long"), ((64, 64), r"resampling \(40, 40\) to \(64, 64\)")):
        student, target = torch.zeros(1, 1, 40, 40), torch.zeros(1, 1, *grid)
        with pytest.raises(ConfigError, match=message):
            map_loss(student, target, torch.ones(1, 1, dtype=torch.bool), impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(2, 2, 5, 4)}, "do not fit"),
        ({"target": torch.zeros(2, 3, 5, 4).int()}, "target is torch.int32; expected floating point"),
        ({"target": torch.zeros(2, 3, 0, 4)}, "target .* is empty"),
        ({"present": torch.ones(2, 3)}, "present is torch.float32; expected bool"),
        ({"normalization": "softmax"}, "choose one of zscore, sum, minmax, max, none"),
        ({"distance": "l1"}, "choose one of mse, kl"),
        ({"distance": "kl"}, "use normalization='sum'"),
        ({"reduction": "batch"}, "choose one of mean, sum, none"),
        ({"impl": "fastest"}, "auto or one of triton, torch, reference"),
    ],
)
def test_misuse_is_a_clear_error(change, message):
    student, target, present = draw()
    arguments = {"student": student, "target": target, "present": present} | change
    with pytest.raises(ConfigError, match=message):
        map_loss(**arguments)
