"""An adapter of PEFT: what it is of, what is in it, and its base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, first_line, install_command
from ..files import read_json
from ..pretrained.headers import PEFT, find_weights, read_shapes
from ..pretrained.names import loading, locate_model
from ..pretrained.weights import some
from ..students.loading import empty_student, require_adapter
from . import student
from .finding import Finding


def examine_name(model: str, config_file: Path) -> Iterator[Finding]:
    """An adapter by its folder or hub id, of whose adapter_config.json the path is given, and its base where that can be had."""
    try:
        config = read_json(config_file)
        yield Finding("model", f"an adapter of PEFT ({config['peft_type']}), for a student")
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the adapter_config.json of {model!r} cannot be read ({first_line(error)}); give a whole copy") from None
    require_adapter(model)
    if config.get("r"):
        yield Finding("rank", f"{config['r']}, alpha {config.get('lora_alpha')}")
    yield Finding("modules", _names(config.get("target_modules")))
    folder = config_file.parent
    try:
        tensors = read_shapes(folder, PEFT, f"the adapter {model!r}")
    except ModelError as error:
        yield Finding("weights", str(error), "copy the adapter again", is_damaged=True)
        tensors = {}
    else:
        if find_weights(folder, PEFT) is None:
            yield Finding("weights", "none beside adapter_config.json on this machine", "give a whole copy")
        else:
            yield _aligner(config, tensors, folder)
    base = config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        yield Finding("base model", "unknown", "write its name into adapter_config.json")
        return
    try:
        base = f"{base}@{config['revision']}" if config.get("revision") and not Path(base).exists() else base
        findings = list(student.examine_name(base))
    except (ModelError, ValueError) as error:  # ValueError of a path with a NUL
        yield Finding("base model", f"{base}: {error}", "get it, or write its place into adapter_config.json")
        return
    yield from _fit(model, base, tensors)
    yield Finding("base model", f"{base}, as follows")
    yield from findings


def _names(modules: Any) -> str:
    return ", ".join(sorted(map(str, modules))) if isinstance(modules, list) else str(modules)


def _aligner(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], folder: Path) -> Finding:
    """Whether an aligner is saved with the adapter, or beside it by `fine_tune`."""
    beside = folder.parent / "aligner.safetensors"
    inside = sum("lavender." in name for name in tensors)
    if inside:
        return Finding("aligner", f"in it, {inside} tensors beside {len(tensors) - inside} of the adapter")
    if "lavender" in (config.get("modules_to_save") or []):
        return Finding("aligner", "not in it, though its modules_to_save lists lavender", "save the model with PEFT again")
    return Finding("aligner", f"beside it, {beside}" if beside.is_file() else "not in it")


def _fit(model: str, base: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[Finding]:
    """Where PEFT does not find the adapter's place in its base model, or not all of the adapter."""
    try:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    except ModuleNotFoundError:
        yield Finding("peft", "not installed: whether the adapter fits its base model is not known", install_command("peft"))
        return
    try:
        with loading("a LoRA adapter", model, f"give the base model that it was trained on in place of {base!r}"):
            name, revision = locate_model(model, "adapter_config.json")
            config = PeftConfig.from_pretrained(name, revision=revision)
            whole = PeftModel(empty_student(base), config, low_cpu_mem_usage=True)  # on the meta device
            expected: dict[str, torch.Tensor] = get_peft_model_state_dict(whole)
    except ModelError as error:
        yield Finding("fit", str(error), "give the base model that it was trained on")
        return
    lacking = sorted(expected.keys() - tensors.keys())
    others = sorted(key for key in tensors.keys() - expected.keys() if "lavender." not in key)
    shapes = [(key, list(tensors[key].shape), list(expected[key].shape)) for key in sorted(expected.keys() & tensors.keys())]
    wrong = [f"{key}: {there} in the file, {here} by the base model" for key, there, here in shapes if there != here]
    if tensors and (lacking or others):
        missing = f"it lacks {len(lacking)} of {len(expected)} tensors ({some(lacking)})" if lacking else ""
        unknown = f"{len(others)} tensors have no place in the base model ({some(others)})" if others else ""
        yield Finding("fit", ", and ".join(filter(None, [missing, unknown])), "give a whole copy, and the base model of it")
    if wrong:
        yield Finding("fit", f"{len(wrong)} tensors have other shapes ({some(wrong, '; ')})", "give the base model of it")
