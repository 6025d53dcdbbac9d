"""The Trainer's arguments, which `TrainingConfig.arguments` has as JSON: refused before a run begins, and not at its first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch.distributed import is_initialized
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..errors import ConfigError, reading

REFUSAL = "refuses the training's arguments"
REMEDY = "see what transformers.TrainingArguments says of them"
_LEAST = {"gradient_accumulation_steps": 1, "dataloader_num_workers": 0, "neftune_noise_alpha": 0}
"""Of numbers that transformers does not look at before it counts by them."""


def make_arguments(values: Mapping[str, Any]) -> TrainingArguments:
    """`TrainingArguments(**values)`. transformers does not check the types: what is of another one is found out in the run.

    Raises `ConfigError` naming the first that is of another type, or saying what transformers says.
    """
    unknown = values.keys() - {field.name for field in fields(TrainingArguments) if field.init}
    problem = f"unexpected keyword argument {min(unknown)!r}" if unknown else misfit(TrainingArguments, values)
    for name, least in _LEAST.items():
        value = values.get(name)
        if not problem and value is not None and value < least:
            problem = f"{name} is {value}, expected {least} or more"
    if problem:
        raise ConfigError(f"transformers.TrainingArguments {REFUSAL} ({problem}); {REMEDY}")
    try:
        with reading(f"transformers.TrainingArguments {REFUSAL}", REMEDY, ConfigError):
            arguments = TrainingArguments(**values)
            DataLoader(
                [0],  # type: ignore[arg-type]  # a list is a data set
                num_workers=arguments.dataloader_num_workers,
                persistent_workers=arguments.dataloader_persistent_workers,
                prefetch_factor=arguments.dataloader_prefetch_factor,
            )
        if arguments.deepspeed and not is_initialized():
            raise ConfigError(
                "DeepSpeed trains in processes that a launcher has started, also in one; start the same by torchrun, deepspeed or "
                "accelerate launch (torchrun --no-python --nproc_per_node 1 lavender train ...)"
            )
    except ConfigError:
        unset_hf_deepspeed_config()  # half made, it would stand in the way of every model that is loaded
        raise
    return arguments


def misfit(cls: type, values: Mapping[str, Any]) -> str:
    """The first of a dataclass's values in JSON that is a number and should be none, or none and should be one, in words; empty if
    there is none. Other annotations of transformers say less than what it takes."""
    hints = get_type_hints(cls)
    for name, value in values.items():
        hint = hints.get(name, Any)
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if set(kinds) <= {bool, int, float, NoneType}:
            fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
        else:
            fits = not is_number or not {get_origin(kind) or kind for kind in kinds} <= {str, dict, list, NoneType}
        if not fits:
            return f"{name} is {value!r}, expected {' or '.join(getattr(kind, '__name__', str(kind)) for kind in kinds)}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name} is {value}, expected a finite number"
    return ""
