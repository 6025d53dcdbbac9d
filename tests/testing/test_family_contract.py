"""Every family of the zoo keeps the contract, and the contract notices what breaks it."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import wraps

import pytest
import torch

import lavender
from lavender.students.discovery import attention_modules, text_tower
from lavender.testing.family_contract import CHECKS, check_capture, check_cross_attention, check_family, check_peft, check_undo

from ..students.zoo import MODULES, NUM_SAMPLED, _by_rule, built, families, sample_of, sampled


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", sampled(families()))
def test_every_family_keeps_the_contract(name, check):
    check(built(name))


@pytest.mark.parametrize("name", sampled(["llava", "mllama"]))
def test_a_compiled_model_is_captured(name):
    student = built(name).copy()
    model, batch = student.model, student.batch(boxes=False)
    with torch.no_grad(), lavender.patch(model) as patch:
        plain = patch.capture(**batch)
        model.compile(backend="aot_eager")
        torch.testing.assert_close(patch.capture(**batch), plain, rtol=0, atol=1e-6)
        assert lavender.patch(torch.compile(model)) is patch


def test_checks_leave_the_students_model_as_it_was():
    model = built("llava").copy().model
    with torch.no_grad():
        model(**built("llava").inputs())  # transformers adds hooks of its own at the first forward
    hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    check_family(replace(built("llava"), model=model))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()] == hooks


def test_what_breaks_the_contract_is_named(monkeypatch):
    student = built("llava").copy()
    attention = attention_modules(text_tower(student.model))[0]
    original = type(attention).forward

    @wraps(original)
    def louder(self, hidden_states, **kwargs):
        output, weights = original(self, hidden_states, **kwargs)
        return output * (1 + ("lavender_request" in kwargs)), weights

    with monkeypatch.context() as context:
        context.setattr(type(attention), "forward", louder)
        with pytest.raises(AssertionError, match="capturing changes the model's outputs"):
            check_capture(student)
    with monkeypatch.context() as context:
        context.setattr(lavender.students.patch.StudentPatch, "unpatch", lambda self: None)
        with pytest.raises(AssertionError, match="a hook of the patch is left"):
            check_undo(student)
    with monkeypatch.context() as context:
        context.setattr("peft.get_peft_model", lambda model, config: model)
        with pytest.raises(AssertionError, match="does not change its maps"):
            check_peft(student)
    lavender.register_family("llava", replace(student.family, cross=True))
    try:
        with pytest.raises(AssertionError, match=r"Family\(cross=True\)"):
            check_cross_attention(student)
    finally:
        lavender.students.families.STUDENTS["llava"] = "square:CROPPED"


def test_a_commits_sample_has_every_grid_rule_and_another_commit_has_another():
    samples = [sample_of(commit) for commit in ("a", "a", "b", "c")]
    assert samples[0] == samples[1]
    assert len({*samples}) == 3
    for sample in samples:
        assert len(sample) == NUM_SAMPLED
        assert all(sample & builders.keys() for builders in _by_rule().values())
    assert len(_by_rule()) == len(MODULES)
