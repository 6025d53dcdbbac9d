"""Attention carried through a resampler, against the weights that its modules give when they are asked for them."""

from __future__ import annotations

import copy

import pytest
import torch

import lavender
from lavender.config import AlignmentConfig
from lavender.errors import CaptureError
from lavender.students.boxes import grid_of, rasterize

from ..conftest import changed, with_targets, without_lavender, words_of_batch
from .zoo import built, families, sampled

RESAMPLED = families(lambda student: student.family.resamplers is not None)


def explicit_shares(model, family, inputs) -> torch.Tensor:
    """[P, Q, K], the mean over heads and layers of the resampler's eager attention."""
    eager, seen = copy.deepcopy(model), []
    eager.set_attn_implementation("eager")
    for module in family.resamplers(eager):

        def keep(module, args, output):
            weights = output[1].detach()
            seen.append(weights if weights.ndim == 3 else weights.mean(1))

        module.register_forward_hook(keep)
    with torch.no_grad():
        eager(**inputs, use_cache=False)
    return torch.stack(seen).mean(0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", sampled(RESAMPLED))
def test_word_to_token_to_patch_is_composed(name, implementation):
    student = built(name).copy()
    model, family = student.model, student.family
    model.set_attn_implementation(implementation)
    batch = student.batch()
    inputs = without_lavender(batch)
    shares = explicit_shares(model, family, inputs)
    torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:2]))
    with torch.no_grad(), lavender.patch(model) as patch:
        tokens = patch.capture(**changed(batch, boxes=None))
        maps = patch.capture(**batch)
        plain = model(**inputs, use_cache=False).logits
        assert torch.equal(model(**batch, use_cache=False).logits, plain)
    boxes = words_of_batch(batch).boxes
    expected = rasterize(tokens @ shares[:, None, None], boxes, grid_of(boxes))
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-6)
    assert maps[:, :, :, :2].std() > 1e-5


@pytest.mark.parametrize("name", RESAMPLED[:1])
def test_the_gradient_is_that_of_the_language_models_attention(name):
    student = built(name).copy()
    model, batch = student.model, student.batch()
    with lavender.patch(model) as patch:
        patch.capture(**batch).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.get_decoder().parameters())


@pytest.mark.parametrize("name", RESAMPLED[:1])
def test_batches_that_cannot_be_composed_are_refused(name):
    student = built(name)
    batch = student.batch()
    batch = changed(batch, image_positions=words_of_batch(batch).image_positions[:, :-1])
    with torch.no_grad(), lavender.patch(student.model) as patch, pytest.raises(CaptureError, match="one picture per sample"):
        patch.capture(**batch)


def test_inputs_in_one_mapping_are_captured_and_trained_alike(monkeypatch):
    """MiniCPM-V's own code takes `forward(data, **kwargs)`: lavender's keys lie in there, or beside it."""
    student = built("minicpmv").copy()
    model, batch = student.model, student.batch()
    training, inputs = with_targets(batch, 8), without_lavender(batch)
    original = type(model).forward
    with lavender.patch(model, AlignmentConfig(weight=10.0, aligner="sim")) as patch, torch.no_grad():
        expected, loss = patch.capture(**batch), model(**training).loss
        monkeypatch.setattr(type(model), "forward", lambda self, data, **kwargs: original(self, **data, **kwargs))
        beside = {key: value for key, value in training.items() if key not in inputs}
        for given in ({"data": dict(training)}, {"data": inputs, **beside}):
            assert torch.equal(model(**given).loss, loss)
            assert torch.equal(patch.capture(**beside, data=inputs), expected)
            assert given["data"].keys() in (training.keys(), inputs.keys())
