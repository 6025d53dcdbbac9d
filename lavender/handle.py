"""The handle that `lavender.patch` returns: it undoes the patch at the end of a `with`."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from .errors import CaptureError

AnyHandle = TypeVar("AnyHandle", bound="Handle")
T = TypeVar("T")


class Handle(ABC):
    """A patched model's handle. Where a model is patched again, its handle is lent: the borrower's `with` leaves it in place."""

    _lent = False
    _entered: tuple[bool, ...] = ()

    @property
    @abstractmethod
    def is_patched(self) -> bool:
        """Whether the hooks are in place."""

    @abstractmethod
    def unpatch(self) -> None:
        """Undoes everything. A second call does nothing."""

    def borrowed(self: AnyHandle) -> AnyHandle:
        """This handle for one more user, whose `with`, which comes next, must not take the patch from the first one."""
        self._lent = True
        return self

    def __enter__(self: AnyHandle) -> AnyHandle:
        if not self.is_patched:
            raise CaptureError("the patch was undone; call lavender.patch again")
        self._entered, self._lent = (*self._entered, self._lent), False
        return self

    def __exit__(self, *_: object) -> None:
        *outer, lent = self._entered
        self._entered = tuple(outer)
        if not lent:
            self.unpatch()


class PerThread(Generic[T]):
    """One value for every thread that is at work. A copy, or a pickle, begins without any.

    It is no `threading.local`, which torch.compile traces as if it were empty, without a word.
    """

    def __init__(self) -> None:
        self._values: dict[int, T] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def put(self, value: T) -> None:
        """Sets the calling thread's value."""
        self._values[threading.get_ident()] = value

    def take(self) -> T | None:
        """Removes and returns the calling thread's value; None if it has none."""
        return self._values.pop(threading.get_ident(), None)

    def get(self) -> T | None:
        """The calling thread's value; None if it has none."""
        return self._values.get(threading.get_ident())

    def get_at_work(self) -> T | None:
        """The value of the calling thread, which must have one unless no thread has.

        torch.compile cannot trace what asks for the thread: where one alone is at work, it is the calling one.
        """
        if len(self._values) > 1:
            return self.get()
        return next(iter(self._values.values()), None)
