"""Attention carried through a resampler, against the weights that its modules give when they are asked for them."""

from __future__ import annotations

import copy

import pytest
import torch

import lavender
from lavender.config import AlignmentConfig
from lavender.errors import CaptureError
from lavender.students.boxes import lattice_of, rasterize

from .test_contract import NAMES, built, encoded, family_of, student, with_keys, without_boxes

assert student  # a fixture
RESAMPLED = [name for name in NAMES if family_of(built(name)).resamplers]


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
@pytest.mark.parametrize("name", RESAMPLED)
def test_word_to_token_to_patch_is_composed(student, implementation):
    model, family = student.model, family_of(student)
    model.set_attn_implementation(implementation)
    inputs = encoded(student)
    batch = with_keys(student, inputs)
    shares = explicit_shares(model, family, inputs)
    torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:2]))
    with torch.no_grad(), lavender.patch(model) as patch:
        tokens = patch.capture(**without_boxes(batch))
        maps = patch.capture(**batch)
        plain = model(**inputs, use_cache=False).logits
        assert torch.equal(model(**batch, use_cache=False).logits, plain)
    expected = rasterize(tokens @ shares[:, None, None], batch["lavender_boxes"], lattice_of(batch["lavender_boxes"]))
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-6)
    assert maps[:, :, :, :2].std() > 1e-5


@pytest.mark.parametrize("name", RESAMPLED[:1])
def test_the_gradient_is_that_of_the_language_models_attention(student):
    model = student.model
    batch = with_keys(student, encoded(student))
    with lavender.patch(model) as patch:
        patch.capture(**batch).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.get_decoder().parameters())


@pytest.mark.parametrize("name", RESAMPLED[:1])
def test_batches_that_cannot_be_composed_are_refused(student):
    batch = with_keys(student, encoded(student))
    batch["lavender_columns"] = batch["lavender_columns"][:, :-1]
    with torch.no_grad(), lavender.patch(student.model) as patch, pytest.raises(CaptureError, match="one picture per sample"):
        patch.capture(**batch)


def test_inputs_in_one_mapping_are_captured_and_trained_alike(monkeypatch):
    """MiniCPM-V's own code takes `forward(data, **kwargs)`: lavender's keys lie in there, or beside it."""
    student = built("minicpmv")
    model = copy.deepcopy(student.model)
    batch = with_keys(student, encoded(student))
    training = batch | {"lavender_targets": torch.rand(*batch["lavender_present"].shape, 8, 8)}
    inputs = {key: value for key, value in batch.items() if not key.startswith("lavender_")}
    original = type(model).forward
    with lavender.patch(model, AlignmentConfig()) as patch, torch.no_grad():
        expected, loss = patch.capture(**batch), model(**training).loss
        monkeypatch.setattr(type(model), "forward", lambda self, data, **kwargs: original(self, **data, **kwargs))
        beside = {key: value for key, value in training.items() if key not in inputs}
        for given in ({"data": dict(training)}, {"data": inputs, **beside}):
            assert torch.equal(model(**given).loss, loss)
            assert torch.equal(patch.capture(**beside, data=inputs), expected)
            assert given["data"].keys() in (training.keys(), inputs.keys())
