"""`torch.compile` in training: a patched and aligned student has the loss and every gradient of the one that is not compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments

import lavender
from lavender.config import AlignmentConfig
from lavender.errors import CaptureError

from ..conftest import with_targets, without_lavender
from .zoo import built

CONFIG = AlignmentConfig(weight=2.0, aligner="sim")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batch_of(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    batch = with_targets(built(name).batch(), 8)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -3:] = batch["input_ids"][:, -3:]
    return {**batch, "labels": labels}


def aligned(name: str) -> Any:
    """A student in training that is patched, and a twin of it with the same aligner."""
    models = []
    for _ in range(2):
        model = built(name).copy().model.train()
        torch.manual_seed(0)
        lavender.patch(model, CONFIG)
        models.append(model)
    return models


def step(run: Any, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = run(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0])
    assert expected[1].keys() <= found[1].keys()
    for name, gradient in found[1].items():
        exact = expected[1].get(name, torch.zeros_like(gradient))  # a compiled graph gives zeros where autograd gives nothing
        assert (gradient - exact).norm() <= 1e-4 * exact.norm() + 1e-5, name


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "order", "checkpointing"),
    [
        ("llava", "compiled, traced, patched", False),
        ("llava", "in place", False),
        ("llava", "patched, compiled", True),
        ("mllama", "patched, compiled", False),
    ],
)
def test_a_compiled_student_trains_as_the_other(name, order, checkpointing):
    batch = batch_of(name)
    plain, model = aligned(name)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = model.lavender.state_dict()
    if order.startswith("compiled"):
        lavender.patch(model).unpatch()
    if order == "in place":
        model.compile(backend="aot_eager")
        run = model
    else:
        run = torch.compile(model, backend="aot_eager")
    if "traced" in order or checkpointing:
        run(**without_lavender(batch)).loss.backward()
    handle: Any = lavender.patch(run, CONFIG)
    model.lavender.load_state_dict(weights)
    if "traced" in order:
        # What was compiled for a layer does not ask whether it has hooks by now.
        with pytest.raises(CaptureError, match=r"torch\.compiler\.reset\(\)"):
            run(**batch)
        torch.compiler.reset()
    require_same(step(run, model, batch), step(plain, plain, batch))
    assert handle.last.loss > 0
    # The plain model breaks its graph where it looks into tensors as well; a second step compiles nothing large again.
    assert sum(counters["graph_break"].values()) < 60, counters["graph_break"]
    other = {**batch, "lavender_targets": batch["lavender_targets"].flip(-1)}
    require_same(step(run, model, other), step(plain, plain, other))
    with torch.no_grad():
        torch.testing.assert_close(handle.capture(**batch), lavender.patch(plain).capture(**batch))
        handle.unpatch()
        torch.testing.assert_close(run(**without_lavender(batch)).logits, model(**without_lavender(batch)).logits)


@pytest.mark.full
def test_a_trainer_that_compiles_takes_the_steps_of_one_that_does_not(tmp_path):
    batch = batch_of("llava")
    models = aligned("llava")
    for model, compiles in zip(models, (False, True), strict=True):
        arguments = TrainingArguments(
            tmp_path / str(compiles), max_steps=2, per_device_train_batch_size=2, remove_unused_columns=False, report_to=[],
            disable_tqdm=True, save_strategy="no", learning_rate=1e-3, optim="sgd", use_cpu=True, torch_compile=compiles,
            torch_compile_backend="aot_eager" if compiles else None,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=[0, 1], data_collator=lambda samples: dict(batch)).train()
        assert model._lavender_patch.last.loss > 0
    assert counters["stats"]["unique_graphs"] > 0
    for (name, expected), found in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)
