"""Options made from the fields of a dataclass: their choices from its types, their help from its
docstrings."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from ..config import Captions
from ..errors import ConfigError

_FLAGS = {"devices": "--device"}
"""Options whose name differs from their setting's."""


@dataclass(frozen=True)
class PairOptions:
    """Options of every command that reads pictures with captions; `open_pairs` has them as arguments."""

    images: str | None = None
    """Folder that image paths are relative to; the data's own by default."""
    split: str = "train"
    """Split of a hub data set, of a folder with splits or of Karpathy's JSON."""
    captions: Captions = "first"
    """Which captions of a picture to take, where it has several."""
    image_column: str | None = None
    """Column of the pictures, where its name is not a usual one."""
    caption_column: str | None = None
    """Column of the captions, where its name is not a usual one."""
    id_column: str | None = None
    """Column of the ids, if not `id`."""


PAIR_OPTIONS = (PairOptions, tuple(field.name for field in fields(PairOptions)))
"""All of them, as an argument of `with_options`."""


def with_options(**groups: tuple[type, tuple[str, ...]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command: replaces some of its parameters by options, one per field of a dataclass.

    Args:
        groups: per parameter of the command, a dataclass and the names of the fields to make options
            of. The command receives a dictionary, by field, of the options that the user gave: an
            option left out keeps the default of the dataclass, or of a preset.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.name in groups:
                cls, names = groups[parameter.name]
                parameters += [make_option(cls, name) for name in names]
            else:
                parameters.append(parameter)

        @functools.wraps(command)
        def run(**values: Any) -> None:
            for group, (cls, names) in groups.items():
                chosen = {name: values.pop(name) for name in names}
                hints = get_type_hints(cls)
                values[group] = {
                    name: parse_items(hints[name], value, flag_of(name)) if isinstance(value, str) else value
                    for name, value in chosen.items()
                    if value is not None
                }
            command(**values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def make_option(cls: type, name: str) -> inspect.Parameter:
    """The option for a field of a dataclass. Its own default is None, which no user can give."""
    hint, default = get_type_hints(cls)[name], getattr(cls, name)
    item = _item_of(hint)
    is_list = item is not None and isinstance(default, tuple)
    text = ",".join(map(str, default)) if is_list else "" if default is None else str(default).lower()
    option = typer.Option(
        *([_FLAGS[name]] if name in _FLAGS else ()),
        metavar=f"<{item.__name__},...>" if item is not None else None,
        help=help_of(cls)[name] + (f"  [default: {text}]" if text else ""),
        min=0 if name == "seed" else None,
    )
    kind = hint if item is None else str
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


@functools.cache
def help_of(cls: type) -> dict[str, str]:
    """The first sentence of each field's docstring."""
    definition = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for statement, following in pairwise(definition.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            docstring = " ".join(ast.literal_eval(following.value).split())
            texts[ast.unparse(statement.target)] = re.split(r"(?<=\.)\s", docstring)[0]
    return texts


def flag_of(name: str) -> str:
    """A setting's option as the user types it."""
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


def parse_items(hint: Any, value: str, shown: str) -> Any:
    """A text as a setting of this type: one with commas as a tuple where that is a list. Raises `ConfigError`, naming what is
    `shown`."""
    item, takes_text = _item_of(hint), get_origin(hint) is not tuple and str in get_args(hint)
    if item is None or (item is str and takes_text):  # one text may have commas: a regular expression
        return value
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if item not in (int, float):
        return tuple(parts)
    try:
        return tuple(item(part) for part in parts)
    except ValueError:
        if takes_text:  # a text in place of the list: the config knows which
            return value
        kind, example = ("integers", "51,151,301") if item is int else ("numbers", "0.5,1")
        raise ConfigError(f"{shown} is {value!r}; give {kind} separated by commas, as in {example}") from None


def _item_of(hint: Any) -> type | None:
    """What a field's list is of; None for a field that takes no list."""
    tuples = [option for option in (hint, *get_args(hint)) if get_origin(option) is tuple]
    return get_args(tuples[0])[0] if tuples else None
