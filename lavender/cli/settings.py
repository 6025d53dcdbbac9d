"""Settings as texts: `--set weight=5`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from ..config import ConfigT, from_dict, to_dict
from ..errors import ConfigError


def override(config: ConfigT, assignments: Iterable[str]) -> ConfigT:
    """A config with some settings changed by texts like `weight=5`, `layers=[1, 2]` or `arguments.bf16=true`.

    Values are parsed as JSON; a list may lack its brackets and quotes (`roles=question,answer`). Anything else that does not parse
    is kept as a string, and so is a number where a setting is a string (`heads=3.10`). Raises `ConfigError` on an unknown setting,
    or a text without `=`.
    """
    values = to_dict(config)
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name.count(".") > 1:
            raise ConfigError(f"{assignment!r} sets nothing; expected name=value")
        outer, _, inner = name.strip().partition(".")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text if inner else _listed(text, get_type_hints(type(config)).get(outer))
        if isinstance(value, int | float) and not inner and _is_text(type(config), outer):
            value = text.strip()
        if not inner:
            values[outer] = value
        elif isinstance(values.get(outer), dict):
            values[outer] |= {inner: value}
        else:
            raise ConfigError(f"{type(config).__name__} has no settings below {outer!r}")
    return from_dict(type(config), values)


def _listed(text: str, hint: Any) -> Any:
    """A text that is no JSON: as a list where the setting takes one, and the text is one but for brackets and quotes."""
    options = [hint] if get_origin(hint) is tuple else [*get_args(hint)]
    if not any(get_origin(option) is tuple for option in options):
        return text
    try:
        return json.loads(f"[{text}]")
    except json.JSONDecodeError:  # a setting that may be a string is one
        return text if str in options else [part.strip() for part in text.split(",") if part.strip()]


def _is_text(config: type, name: str) -> bool:
    """Whether a setting is a string."""
    hint = get_type_hints(config).get(name)
    return set(get_args(hint) or (hint,)) - {NoneType} == {str}
