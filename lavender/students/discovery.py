"""Finding a model's text tower and its attention, by what its classes' code asks for: no family is named here."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import ModelError

_CROSS = ("cross", "encoder_attn")
"""What the name of a cross-attention, or of its class, has in it."""


def base_model_of(model: Any) -> Any:
    """The transformers model below the wrappers of torch.compile and PEFT, or the model itself."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_tower(model: Any) -> Any:
    """The decoder that reads the text. Raises `ModelError` if the model has none."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model:
        raise ModelError(
            f"{type(model).__name__} has no text decoder that lavender can find; expected an image-text-to-text model of "
            "transformers, or a diffusers pipeline"
        )
    return decoder


def attention_modules(decoder: nn.Module) -> list[nn.Module]:
    """The attention modules of the text tower, in order: those whose forward asks the attention registry.

    Where some are cross-attentions, the picture comes in by them: the others are left out.
    """
    attentions = {name: module for name, module in decoder.named_modules() if is_attention(type(module))}
    if not attentions:
        likely = sorted({type(m).__name__ for m in decoder.modules() if "attention" in type(m).__name__.lower()})
        raise ModelError(
            f"no attention module of {type(decoder).__name__} goes through transformers' attention registry"
            + (f"; there are {', '.join(likely)}" if likely else "")
        )
    crossing = [module for name, module in attentions.items() if is_cross(name, module)]
    return crossing or list(attentions.values())


def is_attention(module_class: Any) -> bool:
    """Whether a module class's forward asks the attention registry for its attention function."""
    code = getattr(inspect.unwrap(module_class.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def is_cross(name: str, module: nn.Module) -> bool:
    """Whether an attention module, by its dotted name and its class, attends to something else than its own sequence."""
    return any(part in f"{name} {type(module).__name__}".lower() for part in _CROSS)


def layers_around(decoder: nn.Module, attentions: dict[nn.Module, int]) -> list[nn.Module]:
    """Where a request enters: the decoder layers that hold the attention modules, whose forward checkpointing wraps inside
    their hooks; an attention module itself where no such layer holds it.

    Raises `ModelError` naming a class that takes no further keyword arguments, through which a request could not travel.
    """
    layers: list[nn.Module] = []
    reached: set[nn.Module] = set()
    for module in decoder.modules():
        inside = [m for m in module.modules() if m in attentions and m not in reached]
        if inside and (isinstance(module, GradientCheckpointingLayer) or module in attentions):
            for link in {module, *inside}:
                _require_keywords(type(link))
            layers.append(module)
            reached.update(inside)
    return layers


def _require_keywords(module_class: Any) -> None:
    parameters = inspect.signature(inspect.unwrap(module_class.forward)).parameters.values()
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        raise ModelError(f"{module_class.__name__}.forward takes no **kwargs; lavender cannot reach its attention")
