"""The recipe for V100 and T4, as far as a CPU can follow it: float16, loss scaling, the CUDA C++ kernels by an emulator."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lavender
from lavender.config import TrainingConfig
from lavender.kernels.cuda import driver as cuda
from lavender.kernels.row_maps import api as rows_module
from lavender.training.train import _with_lora, load_student

from ..kernels.budget import relative_error
from ..kernels.emulator import Emulator


class _NoBfloat16(TorchDispatchMode):
    """Fails where an operation gives bfloat16."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.bfloat16, function
        return result


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_step_with_loss_scaling(student_folder, training_batch, lora, monkeypatch):
    """Gradients equal those of `torch`; every layer's word rows went through the kernels; nothing was bfloat16."""
    monkeypatch.setattr(cuda, "runner", Emulator())
    gradients = {}
    for impl in ("torch", "cuda"):
        if impl == "cuda":  # the tap asks for "auto", which passes by what runs CPU tensors
            monkeypatch.setattr(rows_module, "cuda_reasons", lambda *arguments: [])
        # As the presets load them: a LoRA's frozen weights in half precision, those of a full fine-tuning in float32.
        model, _ = load_student(student_folder, "float16" if lora else "float32")
        layers = model.config.text_config.num_hidden_layers
        torch.manual_seed(0)  # the aligner's and the adapter's first weights
        lavender.patch(model, lavender.AlignmentConfig(weight=1, aligner="sim"))
        trained = _with_lora(model, TrainingConfig(lora_rank=4, lora_dropout=0.0), None, aligned=True) if lora else model
        parameters = {name: p for name, p in trained.named_parameters() if p.requires_grad}
        assert {p.dtype for p in parameters.values()} == {torch.float32}  # else a GradScaler refuses them
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD(parameters.values(), lr=1e-3)
        with _NoBfloat16():
            with torch.autocast("cpu", dtype=torch.float16):
                loss = trained.train()(**training_batch).loss
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients[impl] = torch.cat([p.grad.flatten() for name, p in parameters.items() if "language_model" in name])
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**10  # nothing overflowed: the step was taken
    assert cuda.runner.launched.count("row_word_maps") == cuda.runner.launched.count("row_key_gradient") == layers
    assert relative_error(gradients["cuda"], gradients["torch"]) < 2e-3
