"""What `transformers.TrainingArguments` does not refuse before a run is at work is refused when a run begins."""

from __future__ import annotations

from dataclasses import MISSING, fields

import pytest
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from lavender.errors import ConfigError
from lavender.training.arguments import make_arguments, misfit


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gradient_accumulation_steps", "x"),
        ("gradient_accumulation_steps", 0),
        ("gradient_accumulation_steps", 1.5),
        ("dataloader_num_workers", -1),
        ("weight_decay", "x"),
        ("weight_decay", float("nan")),
        ("max_grad_norm", "x"),
        ("adam_beta1", "x"),
        ("bf16", "x"),
        ("torch_compile", "x"),
        ("neftune_noise_alpha", "x"),
        ("save_total_limit", "x"),
        ("optim", "nonsense"),
        ("accelerator_config", 7),
        ("deepspeed", "nothing.json"),
        ("nonsense", 1),
    ],
)
def test_refused(name, value, tmp_path):
    with pytest.raises(ConfigError, match=r"^transformers.TrainingArguments refuses the training's arguments \(.+\)") as raised:
        make_arguments({"output_dir": str(tmp_path), name: value})
    assert name in str(raised.value) or raised.value.__cause__ is not None
    assert "\n" not in str(raised.value)


def test_what_transformers_takes_is_taken(tmp_path):
    defaults = {field.name: field.default for field in fields(TrainingArguments) if field.init and field.default is not MISSING}
    assert not misfit(TrainingArguments, defaults)
    values = {
        "output_dir": str(tmp_path),
        "bf16": False,
        "weight_decay": 0,
        "logging_steps": 0.5,
        "report_to": ["none"],
        "optim": "sgd",
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycles": 0.5},
        "accelerator_config": {"even_batches": True},
        "use_cpu": True,
    }
    arguments = make_arguments(values)
    assert arguments.logging_steps == 0.5
    assert arguments.lr_scheduler_type == "cosine"


def test_a_refused_engine_leaves_nothing(tmp_path):
    for value in ("nothing.json", 7):
        with pytest.raises(ConfigError):
            make_arguments({"output_dir": str(tmp_path), "deepspeed": value})
    assert not is_deepspeed_zero3_enabled()
