"""The class that a patched pipeline has: it reports to the patch what is drawn, and callbacks say that they run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, Protocol

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from .drawing import Drawing
from .turns import turn_of

_CALLBACKS = ("callback_on_step_end", "callback")


class Watcher(Protocol):
    """Who hears of what a pipeline does."""

    pipe: Any

    @property
    def is_patched(self) -> bool:
        """Whether it still wants to."""

    def running(self, arguments: dict[str, Any]) -> AbstractContextManager[Drawing]:
        """Around a call of the pipeline."""

    def begun(self) -> AbstractContextManager[Any]:
        """Around `encode_prompt`."""

    def finished(self, arguments: dict[str, Any], texts: Any, output: Any) -> None:
        """After `encode_prompt`, with what `begun` gave."""


def watched_class(original: type, patch: Watcher) -> type:
    """A pipeline's class that reports to the patch what is drawn: the same in everything else, its name included.

    The class is swapped because Python looks `__call__` up on the type. `encode_prompt` goes the same way: bound to the pipeline
    it would lie in its `__dict__`, and every copy of the pipeline would encode with the original's text encoders. A copy or a
    pickle is of the original class, and draws as if nothing were there.
    """

    def bound(function: Callable[..., Any], self: Any, args: tuple, kwargs: dict[str, Any]) -> inspect.BoundArguments | None:
        if self is not patch.pipe or not patch.is_patched:
            return None
        try:
            return inspect.signature(function).bind(self, *args, **kwargs)
        except TypeError:  # the pipeline will say so itself
            return None

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not patch.pipe:
            return original.__call__(self, *args, **kwargs)
        with turn_of(self):
            arguments = bound(original.__call__, self, args, kwargs)
            if arguments is None:
                return original.__call__(self, *args, **kwargs)
            with patch.running(_with_defaults(arguments)) as drawing:
                _suspend_in_callbacks(arguments, drawing)
                return original.__call__(*arguments.args, **arguments.kwargs)

    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = bound(original.encode_prompt, self, args, kwargs)  # type: ignore[attr-defined]
        if arguments is None:
            return original.encode_prompt(self, *args, **kwargs)  # type: ignore[attr-defined]
        given = _with_defaults(arguments)
        with patch.begun() as texts:
            output = original.encode_prompt(self, *args, **kwargs)  # type: ignore[attr-defined]
            patch.finished(given, texts, output)
        return output

    def reduce(self: Any, protocol: Any) -> Any:
        plain: Any = object.__new__(original)
        vars(plain).update(vars(self))
        return plain.__reduce_ex__(1)  # later ones' way of making the object wants it to be of the class that it has

    attributes: dict[str, Any] = {
        "_lavender_patch": patch,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduce,
    }
    for name, function in (("__call__", call), ("encode_prompt", encode_prompt)):
        if hasattr(original, name):
            attributes[name] = wraps(getattr(original, name))(function)
    watched = type(original.__name__, (original,), attributes)
    watched.__qualname__ = original.__qualname__
    return watched


def _with_defaults(arguments: inspect.BoundArguments) -> dict[str, Any]:
    """A call's arguments by name, those that it takes as `**kwargs` among them."""
    every = inspect.BoundArguments(arguments.signature, arguments.arguments.copy())
    every.apply_defaults()
    named = dict(every.arguments)
    for name, parameter in arguments.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(name)
    return named


def _suspend_in_callbacks(arguments: inspect.BoundArguments, drawing: Drawing) -> None:
    """Makes a call's callbacks say that they run: what they ask the denoiser is not part of the call."""
    more = [name for name, each in arguments.signature.parameters.items() if each.kind is inspect.Parameter.VAR_KEYWORD]
    for given in (arguments.arguments, *(arguments.arguments.get(name, {}) for name in more)):
        for name in _CALLBACKS:
            if callable(given.get(name)):
                given[name] = _suspending(given[name], drawing)


def _suspending(callback: Any, drawing: Drawing) -> Any:
    """A callback that suspends a drawing while it runs, of the same class: pipelines ask for diffusers' own."""

    def run(*args: Any, **kwargs: Any) -> Any:
        before, drawing.is_suspended = drawing.is_suspended, True
        try:
            return callback(*args, **kwargs)
        finally:
            drawing.is_suspended = before

    if not isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        return run
    kind = type(callback)
    twin: Any = object.__new__(type(kind.__name__, (kind,), {"__call__": lambda self, *args, **kwargs: run(*args, **kwargs)}))
    twin.__dict__ = vars(callback)
    return twin
