"""Settings as texts: `--set weight=5`."""

from __future__ import annotations

import json
from collections.abc import Iterable

from ..config import ConfigT, from_dict, to_dict
from ..errors import ConfigError


def override(config: ConfigT, assignments: Iterable[str]) -> ConfigT:
    """A config with some settings changed by texts like `weight=5`, `layers=[1, 2]` or `arguments.bf16=true`.

    Values are parsed as JSON; anything that does not parse is kept as a string. Raises `ConfigError` on
    an unknown setting, or a text without `=`.
    """
    values = to_dict(config)
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name.count(".") > 1:
            raise ConfigError(f"{assignment!r} sets nothing; expected name=value")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        outer, _, inner = name.strip().partition(".")
        if not inner:
            values[outer] = value
        elif isinstance(values.get(outer), dict):
            values[outer] |= {inner: value}
        else:
            raise ConfigError(f"{type(config).__name__} has no settings below {outer!r}")
    return from_dict(type(config), values)
