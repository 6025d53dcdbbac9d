"""The files of a model's weights by their headers: all there, whole, and with the tensors that they should have.

No weights are read. What a `.bin` says, torch's unpickler for weights alone reads, which runs nothing.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.serialization import MAGIC_NUMBER

from ..errors import ModelError, first_line
from ..files import open_regular, read_json
from .weights import some

TRANSFORMERS = ("model.safetensors", "pytorch_model.bin")
DIFFUSERS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
PEFT = ("adapter_model.safetensors", "adapter_model.bin")
"""The files that each library looks for, in this order; in the place of each, an index of shards may lie."""
_OLD = pickle.dumps(MAGIC_NUMBER, protocol=2)
"""How a file of torch before 1.6 begins. It has no directory: all of it would have to be read."""


def read_shapes(folder: Path, names: Sequence[str], what: str, is_partial: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a folder's weights, on the meta device, in float32 or int64; none if there are no such files, or no header
    tells.

    Args:
        folder: of one model, or of one part of a pipeline.
        names: the files to look for; the first that there is, or its index, is read.
        what: the subject of errors.
        is_partial: whether files may be missing, as in the hub's cache. Then there are no tensors either.

    Raises:
        ModelError: a file is missing, cut off, or none of weights; or it lacks tensors that the index says it has.
    """
    file = find_weights(folder, names)
    if file is None:
        return {}
    return _read_shards(file, what, is_partial) if file.suffix == ".json" else _read_header(file, what)


def find_weights(folder: Path, names: Sequence[str]) -> Path | None:
    """A folder's file of weights, or the index of its shards; None if there is none."""
    files = (folder / file for name in names for file in (name, f"{name}.index.json"))
    return next((file for file in files if os.path.lexists(file)), None)


def _read_shards(index: Path, what: str, is_partial: bool) -> dict[str, torch.Tensor]:
    try:
        places = read_json(index)["weight_map"]
        shards = sorted(set(places.values()))
        outside = [shard for shard in shards if PurePath(shard).is_absolute() or ".." in PurePath(shard).parts]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, what, f"it cannot be read, {first_line(error)}") from None
    if not shards:
        raise _damaged(index, what, "it lists no files")
    if outside:
        raise _damaged(index, what, f"it lists {outside[0]!r}, which is not in its folder")
    missing = [shard for shard in shards if not (index.parent / shard).exists()]
    if missing and is_partial:
        return {}
    if missing:
        raise ModelError(
            f"of {what}, {len(missing)} of {len(shards)} files of weights are missing in {index.parent} ({some(missing)}); give a "
            "whole copy"
        )
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        header = _read_header(index.parent / shard, what)
        lacking = [key for key, place in places.items() if place == shard and key not in header]
        if lacking and header:
            raise _damaged(index.parent / shard, what, f"it lacks {len(lacking)} tensors that its index lists, {some(lacking)}")
        tensors |= header
    return tensors


def _read_header(path: Path, what: str) -> dict[str, torch.Tensor]:
    try:
        with open_regular(path) as file:
            is_old = file.read(len(_OLD)) == _OLD
        if is_old and path.suffix == ".bin":
            return {}
        if path.suffix == ".bin":
            return _read_zip(path)
        # Which refuses a file that is shorter or longer than its header says.
        with safe_open(path, framework="pt") as file:
            keys: list[str] = list(file.keys())
            if not keys:
                raise ValueError("it holds no tensors")
            slices = {key: file.get_slice(key) for key in keys}
            return {key: _empty(part.get_shape(), part.get_dtype().startswith(("F", "BF"))) for key, part in slices.items()}
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, ValueError) as error:
        raise _damaged(path, what, _reason(error)) from None


def _read_zip(path: Path) -> dict[str, torch.Tensor]:
    if not is_zipfile(path):
        raise ValueError("it is cut off, or no file of torch's")
    # Mapped, and not read, but for the names.
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, expected tensors by their names")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError("it holds no tensors by their names")
    return {key: _empty(value.shape, value.is_floating_point()) for key, value in tensors.items()}


def _empty(shape: Sequence[int], is_floating_point: bool) -> torch.Tensor:
    return torch.empty(tuple(shape), device="meta", dtype=torch.float32 if is_floating_point else torch.int64)


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        refused = re.search("(?:Unsupported|Trying to|Can only|GLOBAL) [^\n]*", str(error))  # amid a page of advice
        why = f": {refused[0].rstrip('.')}" if refused else ""
        return f"it holds more than weights, and is not unpickled{why}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


def _damaged(path: Path, what: str, reason: str) -> ModelError:
    return ModelError(f"{path.name} of {what} is damaged ({reason}; in {path.parent}); give a whole copy")


def loading_report(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
    """What a library would report if it loaded tensors into a model, as `require_complete` takes it.

    Args:
        model: of transformers (with accelerate installed) or diffusers, on the meta device.
        tensors: as `read_shapes` gives them.
    """
    kind: Any = type(model)
    state = {key: value.float() for key, value in tensors.items()}
    if hasattr(kind, "_fix_state_dict_keys_on_load"):  # a ModelMixin of diffusers, which loads from files alone
        kind._fix_state_dict_keys_on_load(model, state)
        expected = model.state_dict()
        mismatched = [(key, state[key].shape, expected[key].shape) for key in expected.keys() & state.keys()]
        return {
            "missing_keys": expected.keys() - state.keys(),
            "unexpected_keys": state.keys() - expected.keys(),
            "mismatched_keys": [entry for entry in mismatched if entry[1] != entry[2]],
        }
    with without_report():
        report: Mapping[str, Any] = kind.from_pretrained(
            None,
            config=model.config,
            state_dict=state,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )[1]
    return report


@contextmanager
def without_report() -> Iterator[None]:
    """Without transformers' table of keys, of which `require_complete` says what matters."""
    library = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    library.addFilter(is_other)
    try:
        yield
    finally:
        library.removeFilter(is_other)
