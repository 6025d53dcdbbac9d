from __future__ import annotations

import pytest
import torch

from lavender.errors import ConfigError
from lavender.kernels.map_loss import EPSILON, map_loss, normalize


def draw(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student = torch.rand(2, 3, 5, 4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.rand(2, 3, 5, 4, generator=generator, dtype=torch.float64).to(dtype)
    return student, target, torch.tensor([[True, False, True], [False, True, False]])


def test_zscore_and_minmax_by_hand():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]], dtype=torch.float64)
    torch.testing.assert_close(normalize(maps, "minmax")[0, 1], torch.tensor([0.4, 1.0]).double(), rtol=0, atol=1e-6)
    z = normalize(maps, "zscore")
    torch.testing.assert_close(z[0, 0, 0], ((1 - 3) / torch.tensor(3.5 + EPSILON).sqrt()).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("normalization", ["zscore", "minmax"])
def test_loss_equals_the_formula(normalization):
    student, target, present = draw()
    each = [
        (normalize(student[b, w], normalization) - normalize(target[b, w], normalization)).square().mean()
        for b, w in present.nonzero().tolist()
    ]
    loss = map_loss(student, target, present, normalization=normalization)
    torch.testing.assert_close(loss, torch.stack(each).mean())


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


def test_gradcheck():
    student, target, present = draw()
    assert torch.autograd.gradcheck(lambda s: map_loss(s, target, present), (student,))


def test_half_precision_is_summed_in_float32():
    student, target, present = draw(dtype=torch.float16)
    assert map_loss(student, target, present).dtype == torch.float32


def test_misuse_is_a_clear_error():
    student, target, present = draw()
    with pytest.raises(ConfigError, match="do not fit"):
        map_loss(student, target[..., :2], present)
    with pytest.raises(ConfigError, match="zscore or minmax"):
        map_loss(student, target, present, normalization="sum")
