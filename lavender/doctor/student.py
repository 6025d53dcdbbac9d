"""A vision-language model as a student: what lavender captures in it, and whether its weights are all there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoProcessor

from ..errors import LavenderError, ModelError, first_line
from ..pretrained.headers import TRANSFORMERS, find_weights
from ..pretrained.names import loading, locate_model, split_revision
from ..students.discovery import attention_modules, base_model_of, is_cross, layers_around, text_tower
from ..students.families import STUDENTS, Family, known_family
from ..students.image_tokens import image_token_of, model_type_of, require_pair
from ..students.loading import empty_student, read_checkpoint, require_checkpoint
from ..students.registry import require_supported
from .finding import Finding
from .machine import kernels


def examine_name(model: str) -> Iterator[Finding]:
    """A student by its folder or hub id. Loads no weights; compares their names and shapes where they are on this machine.

    Raises `ModelError` if there is none.
    """
    student = empty_student(model)
    yield from examine(student, _processor(model))
    code = getattr(student.config, "auto_map", None)
    if code:
        yield Finding("own code", f"not run; this is the {type(student).__name__} of transformers, and not that of its folder")
    yield _weights(student, model)


def _weights(student: Any, model: str) -> Finding:
    """Whether `load_student` would find every weight."""
    try:
        tensors = read_checkpoint(model)
    except ModelError as error:
        return Finding("weights", str(error), "copy the model again", is_damaged=True)
    try:
        count = require_checkpoint(student, model)
    except ModelError as error:
        return Finding("weights", str(error), "give a whole checkpoint, in transformers' own format")
    if count is not None:
        return Finding("weights", f"{count} tensors, of the names and shapes that the model has")
    if tensors:
        return Finding("weights", f"{len(tensors)} tensors, whole files; not compared with the model, which is quantized")
    folder = Path(split_revision(model)[0])
    if folder.is_dir() and find_weights(folder, TRANSFORMERS) is None:
        names = " and no ".join(TRANSFORMERS)
        return Finding("weights", f"not examined: there is no {names} in {folder}", "give a whole copy of the model")
    return Finding("weights", "not examined: no header of them can be read on this machine")


def _processor(model: str) -> Any:
    """The model's processor, or the error that loading it raised."""
    try:
        with loading("a processor", model, "give the folder of a model with its processor"):
            name, revision = locate_model(model, "config.json")
            processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
    except ModelError as error:
        return error.__cause__ if error.__cause__ is not None else error
    # transformers falls back to the tokenizer alone if a part of the processor cannot be loaded.
    return processor if hasattr(processor, "tokenizer") else ImportError(f"only a {type(processor).__name__} could be loaded")


def examine(model: Any, processor: Any) -> Iterator[Finding]:
    """A loaded model, or one on the meta device; its processor, the error that loading it raised, or None."""
    model = base_model_of(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    yield Finding("model", f"{type(model).__name__} (model type {model_type}), a student")
    try:
        decoder = text_tower(model)
        modules = attention_modules(decoder)
        layers_around(decoder, {module: i for i, module in enumerate(modules)})
    except ModelError as error:
        yield Finding("attention", str(error), "lavender cannot capture this model; its attention must go through the registry")
        return
    yield Finding("text tower", f"{type(decoder).__name__}{_name_path(model, decoder)}")
    names = {module: name for name, module in decoder.named_modules()}
    kinds = Counter(type(module).__name__ for module in modules)
    has_cross = any(is_cross(names[module], module) for module in modules)
    yield Finding(
        "attention layers",
        f"{len(modules)} ({', '.join(f'{n} x {kind}' for kind, n in kinds.items())}), "
        + ("cross-attention to the picture" if has_cross else "the picture's tokens stand in the text"),
    )
    name = decoder.config._attn_implementation
    try:
        require_supported(name)
        yield Finding("base attention", f"{name}, kept as it is")
    except ModelError as error:
        yield Finding("base attention", name, str(error))
    if not hasattr(model.config, "vision_config") and known_family(str(model_type)) is None:
        yield Finding("picture", "the model's config has no vision_config", "give an image-text-to-text model")
    yield _grid(model, model_type, processor)
    yield from _examine_processor(model, processor)
    width = getattr(modules[0], "head_dim", None)
    yield kernels("row_maps", width, getattr(model, "dtype", torch.float32))


def _grid(model: Any, model_type: str | None, processor: Any) -> Finding:
    if processor is not None and not isinstance(processor, Exception):
        with suppress(LavenderError):
            model_type = model_type_of(processor, model.config)
    family = known_family(model_type or "")
    if family is None:
        return Finding(
            "grid rule",
            f"unknown for model type {model_type!r}: attention is captured per image token, without places",
            "write a Family with boxes, one per image token, and lavender.register_family it: see docs/add-a-family.md",
        )
    entry = STUDENTS[str(model_type)]
    rule = "registered by you" if isinstance(entry, Family) else entry.split(":")[0]
    resampled = ", carried through its resampler" if family.resamplers is not None else ""
    return Finding("grid rule", f"{rule}{resampled} (model type {model_type!r})")


def _examine_processor(model: Any, processor: Any) -> Iterator[Finding]:
    if isinstance(processor, Exception):
        remedy = "install what it asks for, or give the model's own files of it; boxes and training need it, capture does not"
        yield Finding("processor", f"does not load ({first_line(processor)})", remedy)
        processor = None
    if processor is None:
        image_token, rows = getattr(model.config, "image_token_id", None), num_embeddings(model)
        if image_token is not None and not (isinstance(image_token, int) and 0 <= image_token < rows):
            yield _outside(str(image_token), rows)
        return
    yield Finding("processor", type(processor).__name__)
    yield from _vocabulary(model, processor)
    if not getattr(processor, "chat_template", None):
        yield Finding("chat template", "none", "set processor.chat_template for training; look(prompt=...) works without")
    if not processor.tokenizer.is_fast:
        yield Finding("tokenizer", "gives no character offsets", "load the fast one for training")


def _vocabulary(model: Any, processor: Any) -> Iterator[Finding]:
    """Whether the processor's tokens are the model's, the picture's first."""
    rows = num_embeddings(model)
    try:
        image_token = image_token_of(processor, model.config)
        name = processor.tokenizer.convert_ids_to_tokens(image_token) if image_token >= 0 else None
        require_pair(processor, model.config)
    except (LavenderError, TypeError, ValueError, OverflowError) as error:  # of a number in a config that is none
        yield Finding("image token", "unknown", first_line(error))
        return
    if name is None:
        yield Finding("image token", f"{image_token}, which the tokenizer does not know", "set image_token_id in config.json")
    elif image_token >= rows:
        yield _outside(f"{image_token} ({name})", rows)
    else:
        yield Finding("image token", str(image_token))
    largest = max(processor.tokenizer.get_vocab().values(), default=-1)
    if largest < 0:
        yield Finding("vocabulary", "the tokenizer has no words", "give the model's own tokenizer files")
    elif largest >= rows:
        remedy = "give the model's own processor, or model.resize_token_embeddings(len(processor.tokenizer))"
        yield Finding("vocabulary", f"the tokenizer has ids up to {largest}, the model {rows} tokens", remedy)


def _outside(image_token: str, rows: int) -> Finding:
    remedy = "set image_token_id in config.json, or model.resize_token_embeddings(len(processor.tokenizer))"
    return Finding("image token", f"{image_token}, outside of the model's vocabulary of {rows} tokens", remedy)


def num_embeddings(model: Any) -> int:
    """How many tokens a model of transformers has vectors for."""
    table = model.get_input_embeddings()
    # Idefics keeps those of its own tokens in a second table.
    return int(table.weight.shape[0]) + int(getattr(table, "num_additional_embeddings", 0))


def _name_path(model: nn.Module, part: nn.Module) -> str:
    name = next((name for name, module in model.named_modules() if module is part), "")
    return f" at {name}" if name else ""
