"""The Trainer's arguments, which `TrainingConfig.arguments` has as JSON: refused before a run begins, and not at its first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
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
    hints = get_type_hints(TrainingArguments)
    for name, value in values.items():
        kinds = _kinds_of(hints.get(name, Any))
        if kinds and not isinstance(value, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds if kind is not NoneType)
            raise ConfigError(f"transformers.TrainingArguments {REFUSAL} ({name} is {value!r}, expected {expected}); {REMEDY}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"transformers.TrainingArguments {REFUSAL} ({name} is {value}); give a finite number")
        if name in _LEAST and value < _LEAST[name]:
            raise ConfigError(f"transformers.TrainingArguments {REFUSAL} ({name} is {value}); it must be at least {_LEAST[name]}")
    with reading(f"transformers.TrainingArguments {REFUSAL}", REMEDY, ConfigError):
        return TrainingArguments(**values)


def _kinds_of(hint: Any) -> tuple[type, ...]:
    """The types of JSON's values that a field takes; empty where it takes any."""
    kinds: list[type] = []
    for option in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        kind = get_origin(option) or option
        if not isinstance(kind, type):
            return ()
        if issubclass(kind, Enum):  # by its value
            kind = str
        elif kind is float:
            kinds.append(int)
        if kind not in (bool, int, float, str, dict, list, NoneType):
            return ()
        kinds.append(kind)
    return tuple(kinds)
