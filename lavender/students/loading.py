"""Loading a student by its name: whole and sound, or not at all."""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.utils import find_adapter_config_file, is_accelerate_available

from ..config import Dtype
from ..errors import ModelError, importing
from ..pretrained.configs import read_config
from ..pretrained.headers import TRANSFORMERS, loading_report, read_shapes, without_report
from ..pretrained.names import find_file, loading, locate_model, pin
from ..pretrained.weights import require_complete, require_finite, require_floating_point, some

_ADAPTER = "adapter_config.json"
_CONFIGS = ("config.json", _ADAPTER)
MOST_TIMES = 20
"""How many times as many weights as its files a model may have: they may be packed, eight to a number, or shared."""


def load_student(model: str | Path, dtype: Dtype = "float32") -> tuple[PreTrainedModel, Any]:
    """Loads an image-text-to-text model and its processor, and makes sure that every weight came from the checkpoint and is finite.

    The look at the weights is one pass over them, some 0.07 s per GB on one CPU core. Weights of the checkpoint that the model has
    no place for are named in a warning; an aligner's, in checkpoints of patched models, are left out without one.

    Args:
        model: a folder that transformers saved, or a hub id, maybe as `NAME@REVISION`.
        dtype: of the weights.

    Raises:
        ModelError: there is no such model, it is an adapter, or it needs code of its own; weights are missing, have another shape
            than the config says, or hold NaN or infinity.
    """
    with _loading_student(model):
        name, revision = _locate_student(model)
        _require_config(model)
        _require_weights(model)
        processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
        with without_report():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                name,
                revision=revision,
                trust_remote_code=False,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported, with the others, instead of raised without their names
            )
    student, report = loaded
    require_complete(student, report, f"the student {str(model)!r}")
    require_finite(student, f"the student {str(model)!r} in {dtype}")
    return student, processor


def load_processor(model: str | Path) -> tuple[Any, Any]:
    """The processor and the config of what `load_student` loads, without its weights. Raises `ModelError`."""
    with _loading_student(model):
        name, revision = _locate_student(model)
        config = empty_student(model).config
        return AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False), config


def empty_student(model: str | Path) -> PreTrainedModel:
    """What `load_student` loads, from the config alone: its weights are on the meta device. Raises `ModelError`."""
    with _loading_student(model):
        name, revision = locate_model(model, *_CONFIGS)
        _require_config(model)
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        # Under ZeRO-3 transformers would make the weights, and share them among the processes.
        with torch.device("meta"), patch.object(deepspeed, "_hf_deepspeed_config_weak_ref", None):
            student: PreTrainedModel = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    return student


def read_checkpoint(model: str | Path) -> dict[str, torch.Tensor]:
    """The tensors that a student's files of weights have, by their headers, on the meta device; none where there are no files.

    Raises `ModelError` where a file is missing, cut off, or none of weights.
    """
    with _loading_student(model):
        config_file = find_file(model, "config.json")
        is_partial = locate_model(model, *_CONFIGS)[1] is not None  # of the hub, not all of it is downloaded
        what = f"the student {str(model)!r}"
        return {} if config_file is None else read_shapes(config_file.parent, TRANSFORMERS, what, is_partial)


def require_checkpoint(student: PreTrainedModel, model: str | Path) -> int | None:
    """How many tensors the checkpoint of an `empty_student` has; None where none are on this machine, or they are quantized.

    Raises `ModelError` where `load_student` would, but for NaN and infinity.
    """
    tensors = read_checkpoint(model)
    with _loading_student(model):
        if not tensors or not is_accelerate_available() or hasattr(student.config, "quantization_config"):
            return None
        report = loading_report(student, tensors)
    require_complete(student, report, f"the student {str(model)!r}")
    require_floating_point(student.state_dict(), tensors, f"the student {str(model)!r}")
    return len(tensors)


def load_adapter(student: PreTrainedModel, adapter: str | Path) -> nn.Module:
    """A student with a PEFT adapter, to be used and not trained: `PeftModel.from_pretrained`, which alone only warns of what the
    adapter lacks.

    Args:
        student: as `load_student` loads it.
        adapter: a folder that PEFT saved, or a hub id, maybe as `NAME@REVISION`.

    Raises:
        ModelError: there is no such adapter, it does not fit the student, or its weights are missing, NaN or infinite.
    """
    with importing():
        from peft import PeftModel, get_peft_model_state_dict
        from peft.utils.save_and_load import load_peft_weights

    with _loading_adapter(adapter):
        name, revision = locate_model(adapter, _ADAPTER)
        require_adapter(adapter)
        model = PeftModel.from_pretrained(student, name, revision=revision)
        loaded = load_peft_weights(name, device="cpu", revision=revision)
        expected = get_peft_model_state_dict(model)
        lacking = sorted(expected.keys() - loaded.keys())
    if lacking:
        raise ModelError(
            f"the adapter {str(adapter)!r} lacks {len(lacking)} weights ({some(lacking)}); give a whole copy, or the base model "
            "that it was trained on"
        )
    require_floating_point(expected, loaded, f"the adapter {str(adapter)!r}")
    require_finite(model, f"the student with the adapter {str(adapter)!r}")
    return model


def require_adapter(adapter: str | Path) -> None:
    """Raises `ModelError` if the config of a PEFT adapter is damaged, or has what lavender reads in it of another type."""
    path = find_file(adapter, _ADAPTER)
    config = {} if path is None else read_config(path, f"the adapter {str(adapter)!r}")
    for name in ("modules_to_save", "target_modules"):
        value = config.get(name)
        is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if value is not None and not is_list and not (name == "target_modules" and isinstance(value, str)):
            raise ModelError(f"the {_ADAPTER} of {str(adapter)!r} says {name} {value!r}, expected names; give a whole copy")
    for name in ("base_model_name_or_path", "revision"):
        value = config.get(name)
        if value is not None and not isinstance(value, str):
            raise ModelError(f"the {_ADAPTER} of {str(adapter)!r} says {name} {value!r}, expected a name; give a whole copy")


def _require_weights(model: str | Path) -> None:
    """Raises `ModelError` where the headers of a student's files say that they are another model's than the config's: integers, or
    far fewer weights, of which there may not be the memory for as many as the config says."""
    tensors: dict[str, torch.Tensor] = {}
    with suppress(ModelError):  # of damaged files, which the library names when it loads them
        tensors = read_checkpoint(model)
    if not tensors:
        return
    student = empty_student(model)
    expected = student.state_dict()
    most, weights = (sum(tensor.numel() for tensor in each.values()) for each in (expected, tensors))
    if most > MOST_TIMES * weights:
        raise ModelError(
            f"the config.json of {str(model)!r} is of a model with {most:,} weights, and its files have {weights:,}; give the "
            "config.json that belongs to them"
        )
    if not hasattr(student.config, "quantization_config"):
        require_floating_point(expected, tensors, f"the student {str(model)!r}")


def _require_config(model: str | Path) -> None:
    path = find_file(model, "config.json")
    if path is not None:
        read_config(path, f"{str(model)!r}")


def pin_student(model: str | Path) -> str:
    """A student's name with the commit that it is loaded from, `NAME@COMMIT`; of a folder its path. Raises `ModelError`."""
    with _loading_student(model):
        return pin(model, *_CONFIGS)


def pin_adapter(adapter: str | Path) -> str:
    """The same of an adapter."""
    with _loading_adapter(adapter):
        return pin(adapter, _ADAPTER)


def _locate_student(model: str | Path) -> tuple[str, str | None]:
    """Where a student is loaded from. Raises `ModelError` for an adapter: transformers would load the base model, put the adapter
    into it, and report on the adapter's weights alone."""
    name, revision = locate_model(model, *_CONFIGS)
    adapter = find_adapter_config_file(name, revision=revision)
    if adapter is not None:
        base = read_config(Path(adapter), f"{str(model)!r}").get("base_model_name_or_path")
        raise ModelError(f"{str(model)!r} is an adapter of {base!r}; give that as the model, and {str(model)!r} as the adapter")
    return name, revision


def _loading_adapter(adapter: str | Path) -> AbstractContextManager[None]:
    expected = "there is no LoRA adapter without an adapter_config.json; give a folder that PEFT saved, or a hub id"
    return loading("a LoRA adapter", adapter, expected)


def _loading_student(model: str | Path) -> AbstractContextManager[None]:
    return loading("an image-text-to-text model", model, "give a folder that transformers saved, or a hub id")
