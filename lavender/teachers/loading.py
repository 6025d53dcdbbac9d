"""Loading a teacher by its name: a pipeline with all of its weights, or one without any."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ..config import TeacherConfig
from ..errors import ModelError
from ..pretrained.configs import read_config
from ..pretrained.headers import DIFFUSERS, TRANSFORMERS, find_weights, loading_report, read_shapes
from ..pretrained.names import find_file, loading, locate_model, pin, split_revision
from ..pretrained.weights import require_complete, require_floating_point
from .families import TEACHERS, teacher_family_of

_INDEX = "model_index.json"
# Stable Diffusion's checker would be loaded for pictures that nobody draws.
_UNUSED: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}


def load_pipeline(model: str | Path, config: TeacherConfig | None = None) -> Any:
    """Loads a text-to-image pipeline, in the config's `dtype`.

    Args:
        model: a folder that diffusers saved, or a hub id, maybe as `NAME@REVISION`.
        config: says the `dtype`.

    Raises:
        ModelError: there is no such pipeline, lavender cannot extract with it, it needs code of its own, or weights are missing or
            have another shape than its configs say.
    """
    import diffusers
    from diffusers import DiffusionPipeline

    dtype = getattr(torch, (config or TeacherConfig()).dtype)
    # Of None, diffusers makes float32, and transformers what was saved.
    asked = None if dtype == torch.float32 else dtype
    with _loading(model):
        name, revision = locate_model(model, _INDEX)
        index = _read_index(model, name, revision)
        teacher_family_of(getattr(diffusers, index["_class_name"]))
        # Parts that are given are not downloaded.
        folder = (
            name
            if revision is None
            else str(DiffusionPipeline.download(name, revision=revision, trust_remote_code=False, safety_checker=None))
        )
        parts: dict[str, Any] = {part: value for part, value in _UNUSED.items() if part in index}
        for part, kind in _parts_of(folder, index):
            if part not in parts and issubclass(kind, torch.nn.Module):
                parts[part], report = _load(kind, folder, part, asked)
                what = f"the {part} of {str(model)!r}"
                require_complete(parts[part], report, what)
                if not hasattr(parts[part].config, "quantization_config"):
                    require_floating_point(parts[part].state_dict(), read_part(parts[part], folder, part), what)
        pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=asked, trust_remote_code=False, **parts)
    # transformers may load a text encoder as it was saved.
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module) and component.dtype != dtype:
            component.to(dtype)
    return pipe


def empty_pipeline(model: str | Path) -> Any:
    """What `load_pipeline` loads, from the configs alone: the weights are on the meta device. Raises `ModelError`."""
    from diffusers import DiffusionPipeline

    with _loading(model):
        name, revision = locate_model(model, _INDEX)
        index = _read_index(model, name, revision)
        parts: dict[str, Any] = {part: value for part, value in _UNUSED.items() if part in index}
        parts |= {part: _empty(kind, name, part, revision) for part, kind in _parts_of(model, index) if part not in parts}
        return DiffusionPipeline.from_pretrained(name, revision=revision, trust_remote_code=False, **parts)


def pin_pipeline(model: str | Path) -> str:
    """The pipeline's name with the commit that it is loaded from. Raises `ModelError` if there is none."""
    with _loading(model):
        return pin(model, _INDEX)


def _loading(model: str | Path) -> AbstractContextManager[None]:
    return loading("a text-to-image pipeline", model, f"give a folder that diffusers saved ({', '.join(TEACHERS)}), or a hub id")


def _read_index(model: str | Path, name: str, revision: str | None) -> Mapping[str, Any]:
    """What a pipeline's index lists. Raises `ModelError` for one that names no pipeline of diffusers."""
    import diffusers

    path = find_file(model, _INDEX)
    if path is not None:
        read_config(path, f"{str(model)!r}")
    index: Mapping[str, Any] = diffusers.DiffusionPipeline.load_config(name, revision=revision)
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise ModelError(
            f"the {_INDEX} of {str(model)!r} says the class {index.get('_class_name')!r}, which is no pipeline of diffusers; give "
            f"a folder that diffusers saved ({', '.join(TEACHERS)}), or a hub id"
        )
    return index


def _parts_of(model: str | Path, index: Mapping[str, Any]) -> Iterator[tuple[str, type]]:
    """The parts that a pipeline's index lists, with their classes. Raises `ModelError` for one that no library has, or that is not
    there: of some, transformers would make an empty one."""
    import diffusers
    import transformers

    listed = {part: entry for part, entry in index.items() if isinstance(entry, list | tuple) and len(entry) == 2 and entry[0]}
    pipeline: Any = getattr(diffusers, index["_class_name"])
    if lacking := sorted(needed_parts(pipeline) - listed.keys()):
        raise ModelError(
            f"the {_INDEX} of {str(model)!r} lists no {' and no '.join(lacking)}, of which a {pipeline.__name__} is made"
        )
    for part, (library, name) in listed.items():
        known: Any = {"diffusers": diffusers, "transformers": transformers}
        kind = getattr(known.get(str(library), getattr(diffusers.pipelines, str(library), None)), str(name), None)
        if not (isinstance(kind, type) and hasattr(kind, "from_pretrained")):
            raise ModelError(
                f"its {part} is a {name} of {library}, which neither diffusers nor transformers has: it needs code of its own, "
                "which lavender does not run"
            )
        if part not in _UNUSED and (missing := _missing_files(model, part, kind)):
            raise ModelError(f"its {part}, a {name}, has no {missing} in {model}; give a whole copy")
        yield part, kind


def needed_parts(pipeline: Any) -> set[str]:
    """The parts that a class of pipelines cannot be without."""
    return set(pipeline._get_signature_keys(pipeline)[0]) - {*pipeline._optional_components, *_UNUSED}


def _missing_files(model: str | Path, part: str, kind: Any) -> str:
    """The files that a part cannot be without and that are not there, in words; empty if none, or if its library looks itself."""
    if issubclass(kind, torch.nn.Module):
        return "" if find_file(model, f"{part}/config.json") else "config.json"
    vocabulary = dict(getattr(kind, "vocab_files_names", {}))
    if not vocabulary:
        return ""
    whole = vocabulary.pop("tokenizer_file", "tokenizer.json")
    pieces = list(vocabulary.values()) or ["tokenizer.model"]
    if find_file(model, f"{part}/{whole}") or all(find_file(model, f"{part}/{name}") for name in pieces):
        return ""
    return f"{whole} (or {' and '.join(pieces)})"


def require_part(module: torch.nn.Module, model: str | Path, part: str) -> None:
    """Compares the files of an empty pipeline's part with its config, by their headers.

    Raises `ModelError` where `load_pipeline` would, but for NaN and infinity.
    """
    tensors, what = read_part(module, model, part), f"the {part} of {str(model)!r}"
    folder = Path(split_revision(model)[0]) / part
    if folder.is_dir() and find_weights(folder, _files_of(module)) is None:
        raise ModelError(f"{what} has no {' and no '.join(_files_of(module))} in {folder}; give a whole copy")
    if tensors and not hasattr(module.config, "quantization_config"):
        require_complete(module, loading_report(module, tensors), what)
        require_floating_point(module.state_dict(), tensors, what)


def read_part(module: torch.nn.Module, model: str | Path, part: str) -> dict[str, torch.Tensor]:
    """The tensors that the files of a part have, by their headers, on the meta device; none where none are on this machine.

    Raises `ModelError` where a file is missing, cut off, or none of weights.
    """
    with _loading(model):
        config_file = find_file(model, f"{part}/config.json")
        if config_file is None:
            return {}
        is_partial = not Path(split_revision(model)[0]).exists()  # of the hub, not all of it is downloaded
        return read_shapes(config_file.parent, _files_of(module), f"the {part} of {str(model)!r}", is_partial)


def _files_of(module: torch.nn.Module) -> tuple[str, ...]:
    import diffusers

    return DIFFUSERS if isinstance(module, diffusers.ModelMixin) else TRANSFORMERS


def _load(kind: Any, folder: str, part: str, dtype: torch.dtype | None) -> tuple[torch.nn.Module, Mapping[str, Any]]:
    """A part with its weights, and the report of what was missing. diffusers, asked for a whole pipeline, only logs that."""
    import diffusers

    inside = os.path.join(folder, part)  # as diffusers writes it: it stands in the part's config, and so in the weights' digits
    loaded: tuple[torch.nn.Module, Mapping[str, Any]] = kind.from_pretrained(
        inside if os.path.isdir(inside) else folder,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported
        **{"torch_dtype" if issubclass(kind, diffusers.ModelMixin) else "dtype": dtype},
    )
    return loaded


def _empty(kind: Any, name: str, part: str, revision: str | None) -> Any:
    """A part on the meta device, from its config; a tokenizer or a scheduler as it is."""
    import diffusers

    if not issubclass(kind, torch.nn.Module):
        return kind.from_pretrained(name, subfolder=part, revision=revision)
    if issubclass(kind, diffusers.ModelMixin):
        config = kind.load_config(name, subfolder=part, revision=revision)
        with torch.device("meta"):
            return kind.from_config(config)
    config = kind.config_class.from_pretrained(name, subfolder=part, revision=revision)
    with torch.device("meta"):
        return kind(config)
