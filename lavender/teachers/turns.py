"""Turns: threads that draw with the same parts of pipelines do so one after another."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ..errors import CaptureError


class Turns:
    """Gives each object to one thread at a time; others wait. A thread that has an object may take it again.

    A pipeline of diffusers keeps the state of a drawing in itself and in its scheduler, so that two threads which call it at once
    draw neither picture.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # By the ids of the objects, which whoever holds them or waits for them keeps alive.
        self._holders: dict[int, tuple[int, int]] = {}
        self._awaited: dict[int, tuple[int, ...]] = {}

    @contextmanager
    def take(self, *objects: object) -> Iterator[None]:
        """Waits until no other thread has any of the objects, and has them until the end of the `with`.

        Raises `CaptureError` where that would be forever: a thread that has one of them waits for what this thread has.
        """
        me, names = threading.get_ident(), tuple({id(each) for each in objects})
        with self._changed:
            try:
                while owners := self._owners(names) - {me}:
                    self._require_end(owners, me)
                    self._awaited[me] = names
                    self._changed.wait()
            finally:
                self._awaited.pop(me, None)
            for name in names:
                self._holders[name] = (me, self._holders.get(name, (me, 0))[1] + 1)
        try:
            yield
        finally:
            with self._changed:
                for name in names:
                    _, depth = self._holders.pop(name)
                    if depth > 1:
                        self._holders[name] = (me, depth - 1)
                self._changed.notify_all()

    def _owners(self, names: tuple[int, ...]) -> set[int]:
        """The threads that have one of these objects."""
        return {self._holders[name][0] for name in names if name in self._holders}

    def _require_end(self, owners: set[int], me: int) -> None:
        known: set[int] = set()
        while owners:
            if me in owners:
                raise CaptureError(
                    "two threads would wait for each other: each draws with a pipeline, and from within its call with the other's; "
                    "call the second pipeline after the first has returned"
                )
            known |= owners
            owners = set().union(*(self._owners(self._awaited.get(owner, ())) for owner in owners)) - known


_TURNS = Turns()
"""Those of all pipelines of this process."""


def turn_of(pipe: Any) -> AbstractContextManager[None]:
    """The turn to draw with a pipeline: to change it, and its components, which other pipelines may share."""
    # torch.compile wraps a component.
    parts = (getattr(part, "_orig_mod", part) for part in [*vars(pipe).values()] if hasattr(part, "__dict__"))
    return _TURNS.take(pipe, *parts)
