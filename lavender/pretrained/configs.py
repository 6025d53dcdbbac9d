"""Configs of models as files, before a library takes them: of the right form, and of a model that can be built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError, first_line
from ..files import read_json

MOST_LAYERS = 10_000
"""Of a model that is built: each is a Python object, also where no weight is allocated."""


def read_config(path: Path, what: str) -> Mapping[str, Any]:
    """A config.json, adapter_config.json or model_index.json. `what` is the subject of errors.

    Raises `ModelError` if it cannot be read, is no JSON object, or is of a model that could not be built in a lifetime.
    """
    try:
        values = read_json(path)
    except OSError as error:
        raise ModelError(f"the {path.name} of {what} cannot be read ({error.strerror}); give a whole copy") from error
    except ValueError as error:
        raise ModelError(f"the {path.name} of {what} is damaged ({first_line(error)}); give a whole copy") from error
    if not isinstance(values, Mapping):
        raise ModelError(f"the {path.name} of {what} holds a {type(values).__name__}, expected a JSON object; give a whole copy")
    for name, count in _layers(values):
        if not 0 <= count <= MOST_LAYERS:
            raise ModelError(f"the {path.name} of {what} says {name} {count:.6g}; give the config that belongs to its weights")
    return values


def _layers(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _layers(value)
        elif isinstance(value, int) and (name.endswith(("layers", "blocks")) or name == "depth"):
            yield name, value
