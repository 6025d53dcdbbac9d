"""An adapter of PEFT: what it is of, what is in it, and its base model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import ModelError, first_line
from ..files import read_file
from . import student
from .finding import Finding


def examine_name(model: str, config_file: Path) -> Iterator[Finding]:
    """An adapter by its folder or hub id, of whose adapter_config.json the path is given, and its base where that can be had."""
    try:
        config = json.loads(read_file(config_file))
        yield Finding("model", f"an adapter of PEFT ({config['peft_type']}), for a student")
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the adapter_config.json of {model!r} cannot be read ({first_line(error)}); give a whole copy") from None
    if config.get("r"):
        yield Finding("rank", f"{config['r']}, alpha {config.get('lora_alpha')}")
    yield Finding("modules", _names(config.get("target_modules")))
    yield _aligner(config, config_file.parent)
    base = config.get("base_model_name_or_path")
    if not base:
        yield Finding("base model", "unknown", "write its name into adapter_config.json")
        return
    base = f"{base}@{config['revision']}" if config.get("revision") and not Path(base).exists() else base
    try:
        findings = list(student.examine_name(base))
    except ModelError as error:
        yield Finding("base model", f"{base}: {error}", "get it, or write its place into adapter_config.json")
        return
    yield Finding("base model", f"{base}, as follows")
    yield from findings


def _names(modules: Any) -> str:
    return ", ".join(sorted(modules)) if isinstance(modules, list) else str(modules)


def _aligner(config: dict[str, Any], folder: Path) -> Finding:
    """Whether an aligner is saved with the adapter, or beside it by `fine_tune`."""
    path = folder / "adapter_model.safetensors"
    names: list[str] = []
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except SafetensorError as error:
            return Finding("weights", f"adapter_model.safetensors cannot be read ({first_line(error)})", "give a whole copy")
    elif not (folder / "adapter_model.bin").is_file():
        return Finding("weights", "none beside adapter_config.json on this machine", "give a whole copy")
    inside = sum("lavender." in name for name in names)
    beside = folder.parent / "aligner.safetensors"
    if inside:
        return Finding("aligner", f"in it, {inside} tensors beside {len(names) - inside} of the adapter")
    if "lavender" in (config.get("modules_to_save") or []):
        return Finding("aligner", "not in it, though its modules_to_save lists lavender", "save the model with PEFT again")
    return Finding("aligner", f"beside it, {beside}" if beside.is_file() else "not in it")
