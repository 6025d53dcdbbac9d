"""A pipeline as a teacher: what lavender reads in it, and whether it extracts word maps with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import diffusers
import torch

from ..config import Inversion, TeacherConfig
from ..errors import ConfigError, ModelError, first_line, reading
from ..files import read_json
from ..pretrained.names import loading, locate_model
from ..teachers.identity import encode_once
from ..teachers.loading import empty_pipeline, needed_parts, read_part, require_part
from ..teachers.model import require_teacher
from ..teachers.processors import hides_attention, remedy_of
from ..teachers.prompts import known_parts
from ..teachers.recording import DenoiserHooks
from .finding import Finding
from .machine import kernels


def examine_name(model: str, index_file: Path) -> Iterator[Finding]:
    """A pipeline by its folder or hub id, of whose model_index.json the path is given. Loads no weights. Raises `ModelError`."""
    try:
        index = read_json(index_file)
    except (OSError, ValueError) as error:
        raise ModelError(f"the model_index.json of {model!r} cannot be read ({first_line(error)})") from None
    try:
        part = next(name for name in ("unet", "transformer") if (index.get(name) or [None])[0])
        kind, denoiser_class = getattr(diffusers, index["_class_name"]), getattr(diffusers, index[part][1])
    except (StopIteration, AttributeError, KeyError, TypeError, IndexError):
        name = index.get("_class_name") if isinstance(index, dict) else None
        raise ModelError(
            f"{model!r} is a {name}; expected a text-to-image pipeline of diffusers with a unet or a transformer"
        ) from None
    with loading(f"the {part}", model, f"the {part} of {model!r} cannot be built from its config"):
        name, revision = locate_model(model, "model_index.json")
        config = denoiser_class.load_config(name, subfolder=part, revision=revision)
        with torch.device("meta"):
            denoiser = denoiser_class.from_config(config)
    try:
        pipe = empty_pipeline(model)
    except ModelError as error:
        yield from examine(object.__new__(kind), denoiser, str(error))
        yield from _files(model, {part: denoiser})
    else:
        modules = {name: module for name, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
        yield from examine(pipe, getattr(pipe, part))
        yield from _files(model, modules)


def _files(model: str, parts: Mapping[str, torch.nn.Module]) -> Iterator[Finding]:
    """What is wrong with the files of the parts' weights."""
    for part, module in parts.items():
        try:
            read_part(module, model, part)
        except ModelError as error:
            yield Finding("weights", str(error), "copy the model again", is_damaged=True)
            continue
        try:
            require_part(module, model, part)
        except ModelError as error:
            yield Finding("weights", str(error), "give a whole copy of the pipeline, as diffusers saves it")


def examine(pipe: Any, denoiser: Any, problem: str | None = None) -> Iterator[Finding]:
    """A pipeline whose weights may be on the meta device; `problem` says why it cannot be loaded, if so."""
    yield Finding("model", f"{type(pipe).__name__} with {type(denoiser).__name__}, a teacher")
    try:
        hooks = DenoiserHooks(denoiser)
        hooks.remove()
    except ModelError as error:
        yield Finding("layout", str(error), "add a Layout to lavender/teachers/denoisers.py: see docs/add-a-family.md")
        return
    order = {"cross": "cross-attention to text alone"}.get(
        hooks.layout.order, f"text and picture in one sequence, {hooks.layout.order}"
    )
    yield Finding("layout", order)
    yield Finding("attention layers", f"{len(hooks.modules)}, {next(iter(hooks.modules))} and so on")
    processors = sorted({type(getattr(module, "processor", None)).__name__ for module in hooks.modules.values()})
    hidden = [module for module in hooks.modules.values() if hides_attention(module)]
    yield Finding("attention processors", ", ".join(processors), remedy_of(hidden[0]) if hidden else "")
    parts = known_parts(pipe)
    yield Finding("words", " and ".join(part.tokenizer for part in parts) or "by the tokens that the text encoders receive")
    if problem is None and (lacking := sorted(needed_parts(type(pipe)) - _parts_of(pipe).keys())):
        problem = f"it has no {' and no '.join(lacking)}"
    if problem is None:
        yield Finding("parts", ", ".join(f"{name} {type(part).__name__}" for name, part in _parts_of(pipe).items()))
        yield from _vocabularies(pipe)
        yield _extraction(pipe)
    else:
        yield Finding("extraction", f"none: {problem}", "give a folder that diffusers loads")
    module = next(iter(hooks.modules.values()))
    width = getattr(module, "inner_dim", 0) // max(1, getattr(module, "heads", 1)) or None
    yield kernels("column_maps", width, getattr(denoiser, "dtype", torch.float32))


def _parts_of(pipe: Any) -> dict[str, Any]:
    return {name: part for name, part in pipe.components.items() if part is not None}


def _vocabularies(pipe: Any) -> Iterator[Finding]:
    """Tokenizers whose words the text encoders have no vectors for."""
    for name, tokenizer in _parts_of(pipe).items():
        encoder = getattr(pipe, name.replace("tokenizer", "text_encoder"), None)
        if not hasattr(tokenizer, "get_vocab") or encoder is None:
            continue
        try:
            rows = len(encoder.get_input_embeddings().weight)
        except (NotImplementedError, AttributeError):  # a text encoder of some other kind
            continue
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if not 0 <= largest < rows:
            problem = "it knows no words" if largest < 0 else f"it has ids up to {largest}, its text encoder {rows} tokens"
            yield Finding(name, problem, "give the tokenizer that belongs to the text encoder")


def _fitting(scheduler: Any) -> dict[str, Any]:
    """The defaults that count timesteps, as far as the scheduler has so many: others are a matter of the config."""
    count = int(getattr(scheduler, "config", {}).get("num_train_timesteps") or 1000)
    few = max(1, count // 2)
    return {
        "timesteps": tuple(number for number in TeacherConfig.timesteps if number < count) or (count - 1,),
        "inversion_steps": min(TeacherConfig.inversion_steps, few),
        "diffusion_steps": min(TeacherConfig.diffusion_steps, few),
    }


def _extraction(pipe: Any) -> Finding:
    """By which inversions `lavender.extract` takes the pipeline, and why by none: it is asked itself."""
    accepted, refusal = [], ""
    dtype: Any = str(getattr(pipe, "dtype", torch.float32)).removeprefix("torch.")
    for inversion in ("noise", *(name for name in get_args(Inversion) if name != "noise")):
        try:
            # null_text is there to make guidance exact, and has no default for it.
            guidance = 7.5 if inversion == "null_text" else TeacherConfig.guidance_scale
            family = require_teacher(
                pipe, TeacherConfig(inversion=inversion, dtype=dtype, guidance_scale=guidance, **_fitting(pipe.scheduler))
            )
            if pipe.vae.device.type == "meta":  # where nothing is computed but shapes
                with reading(
                    "the autoencoder takes no picture of the model's size", "give the configs that belong to it", ModelError
                ):
                    encode_once(family, torch.zeros(1, 3, family.side, family.side, device="meta"))
            accepted.append(inversion)
        except (ModelError, ConfigError) as error:
            refusal = refusal or str(error)
    return Finding("extraction", f"of target stores, by {' or '.join(accepted)}" if accepted else refusal)
