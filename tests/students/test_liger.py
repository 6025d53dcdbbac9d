"""Liger-Kernel's patches beside lavender's: the loss without logits, its norms, rotary positions and feed-forward networks."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel

import lavender
from lavender.config import AlignmentConfig

from ..conftest import with_targets
from .zoo import built

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs no interpreter where it has a GPU")


@pytest.fixture
def liger(monkeypatch):
    """Applies Liger-Kernel to a llava, as `TrainingArguments(use_liger_kernel=True)` does, in Triton's interpreter.

    That knows neither the libraries of devices nor the methods of numbers that a kernel gets as Python's. Liger's classes stay in
    transformers' modules for models that are made later: they are taken out again.
    """
    import liger_kernel.ops.layer_norm
    import liger_kernel.ops.rms_norm
    import numpy as np
    import triton.language as tl
    from transformers.models.llama import modeling_llama
    from triton.runtime import interpreter

    converted = interpreter._implicit_cvt

    def convert(argument):
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return converted(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)
    for module in (liger_kernel.ops.layer_norm, liger_kernel.ops.rms_norm):
        monkeypatch.setattr(module, "rsqrt", lambda x: tl.rsqrt(x))
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    return lambda model: apply_liger_kernel(model, None)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    inputs = with_targets({name: value[:1] for name, value in built("llava").batch().items()}, 8)
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    return {**inputs, "labels": labels}


def step(model, batch):
    """Output, maps and gradients of a training step."""
    output = model(**batch)
    output.loss.backward()
    with torch.no_grad():
        maps = model._lavender_patch.capture(**batch)
    return output, maps, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("patched", "aggregation", "checkpointing"),
    [
        ("before", "project_mean", False),
        pytest.param("after", "project_mean", True, marks=pytest.mark.full),
        # Liger's norms write gradients where those of their outputs were: hidden states that others read as well must not suffer.
        pytest.param("before", "parallel", False, marks=pytest.mark.full),
    ],
)
def test_loss_maps_and_gradients_are_those_without_liger(liger, batch, patched, aggregation, checkpointing):
    plain = built("llava").copy().model.train()
    config = AlignmentConfig(weight=2.0, aggregation=aggregation, parallel_heads=2, aligner="sim")
    torch.manual_seed(0)
    lavender.patch(plain, config)
    batch = {**batch, "num_items_in_batch": torch.tensor(12)}
    expected, maps, gradients = step(plain, batch)

    model = built("llava").copy().model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if patched == "after":
        liger(model)
    lavender.patch(model, config)
    model.lavender.load_state_dict(plain.lavender.state_dict())
    if patched == "before":
        liger(model)
    output, found_maps, found = step(model, batch)
    assert type(output).__name__ == "LigerLlavaCausalLMOutputWithPast"
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(found_maps, maps, rtol=1e-5, atol=1e-7)
    assert found.keys() == gradients.keys()
    for name, gradient in found.items():
        # Softmax and normalization leave some parameters no gradient but rounding.
        assert (gradient - gradients[name]).norm() <= 1e-5 * gradients[name].norm() + 2e-6, name


@pytest.mark.full
def test_a_trainer_with_liger_takes_the_steps_of_one_without(liger, batch, tmp_path):
    plain = built("llava").copy().model
    torch.manual_seed(0)
    lavender.patch(plain, AlignmentConfig(weight=2.0, aligner="sim"))
    models = [plain, copy.deepcopy(plain)]
    for model, use_liger in zip(models, (False, True), strict=True):
        arguments = TrainingArguments(
            tmp_path / str(use_liger), max_steps=2, per_device_train_batch_size=2, remove_unused_columns=False, report_to=[],
            disable_tqdm=True, save_strategy="no", learning_rate=1e-3, use_liger_kernel=use_liger, optim="sgd", use_cpu=True,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=[0, 1], data_collator=lambda samples: dict(batch)).train()
        assert model._lavender_patch.last.loss > 0
    assert "liger_kernel" in models[1].forward.__module__
    for (name, expected), found in zip(plain.named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)
    untrained, trained = (model.model.language_model.layers[0].self_attn.q_proj.weight for model in (built("llava").model, plain))
    assert not torch.equal(untrained, trained)
