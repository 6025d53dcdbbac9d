"""Settings as texts: `--set weight=5`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from types import NoneType
from typing import get_args, get_type_hints

from ..config import ConfigT, from_dict, to_dict
from ..errors import ConfigError
from .options import parse_items


def override(config: ConfigT, assignments: Iterable[str]) -> ConfigT:
    """A config with some settings changed by texts like `weight=5`, `layers=[1, 2]` or `arguments.bf16=true`.

    Values are parsed as JSON; anything that does not parse is kept as a string, or as the items of a list (`layers=1,2`), and a
    number is a string where a setting is one (`heads=3.10`). Raises `ConfigError` on an unknown setting, or a text without `=`.
    """
    values = to_dict(config)
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name.count(".") > 1:
            raise ConfigError(f"{assignment!r} sets nothing; expected name=value")
        try:
            value = json.loads(text)
        except RecursionError:
            raise ConfigError(f"{name.strip()} has too many brackets within each other") from None
        except ValueError:  # also for a number of thousands of digits
            hint = None if "." in name else get_type_hints(type(config)).get(name.strip())
            value = parse_items(hint, text.strip(), name.strip()) if "," in text else text
        outer, _, inner = name.strip().partition(".")
        if isinstance(value, int | float) and not inner and _is_text(type(config), outer):
            value = text.strip()
        if not inner:
            values[outer] = value
        elif isinstance(values.get(outer), dict):
            values[outer] |= {inner: value}
        else:
            raise ConfigError(f"{type(config).__name__} has no settings below {outer!r}")
    return from_dict(type(config), values)


def _is_text(config: type, name: str) -> bool:
    """Whether a setting is a string."""
    hint = get_type_hints(config).get(name)
    return set(get_args(hint) or (hint,)) - {NoneType} == {str}
