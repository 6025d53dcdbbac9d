"""The Trainer's arguments, which `TrainingConfig.arguments` has as JSON: refused before a run begins, and not at its first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from ..errors import ConfigError, reading

REFUSAL = "refuses the training's arguments"
REMEDY = "see what transformers.TrainingArguments says of them"
_LEAST = {"gradient_accumulation_steps": 1, "dataloader_num_workers": 0}
"""Of numbers that transformers does not look at before it counts by them."""


def make_arguments(values: Mapping[str, Any]) -> TrainingArguments:
    """`TrainingArguments(**values)`. transformers does not check the types: what is of another one is found out in the run.

    Raises `ConfigError` naming the first that is of another type, or saying what transformers says.
    """
    problem = misfit(TrainingArguments, values)
    for name, least in _LEAST.items():
        if not problem and values.get(name, least) < least:
            problem = f"{name} is {values[name]}, expected {least} or more"
    if problem:
        raise ConfigError(f"transformers.TrainingArguments {REFUSAL} ({problem}); {REMEDY}")
    with reading(f"transformers.TrainingArguments {REFUSAL}", REMEDY, ConfigError):
        return TrainingArguments(**values)


def misfit(cls: type, values: Mapping[str, Any]) -> str:
    """The first of a dataclass's values in JSON that is no number where its field is one, in words; empty if there is none."""
    hints = get_type_hints(cls)
    for name, value in values.items():
        kinds = _kinds_of(hints.get(name, Any))
        if kinds and not isinstance(value, kinds):
            return f"{name} is {value!r}, expected {' or '.join(dict.fromkeys(kind.__name__ for kind in kinds))}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name} is {value}, expected a finite number"
    return ""


def _kinds_of(hint: Any) -> tuple[type, ...]:
    """The types that a field of numbers takes; empty for others, whose annotations say less than what they take."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if not set(options) <= {bool, int, float, NoneType}:
        return ()
    return (*options, int) if float in options else options
