"""The handle that `lavender.patch` returns: it undoes the patch at the end of a `with`."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch

from .errors import CaptureError

AnyHandle = TypeVar("AnyHandle", bound="Handle")
T = TypeVar("T")


class Handle(ABC):
    """A patched model's handle. Where a model is patched again, its handle is lent, and the borrower's `with` leaves it in place.

    Threads may borrow it too: the patch is undone when the first user has left its `with`, and every borrower the own one.
    """

    _lock = threading.RLock()
    """Of all handles, for a moment each: who uses one changes as a whole."""

    _is_owned = False
    _users: tuple[int, ...] = ()
    """The threads that are inside a `with`, once for each."""
    _borrowers: frozenset[int] = frozenset()
    """Threads that were lent the handle and have not begun their `with`."""

    @property
    def is_used_elsewhere(self) -> bool:
        """Whether another thread is inside a `with` of the handle."""
        return any(user != threading.get_ident() for user in self._users)

    @property
    @abstractmethod
    def is_patched(self) -> bool:
        """Whether the hooks are in place."""

    @abstractmethod
    def unpatch(self) -> None:
        """Undoes everything. A second call does nothing."""

    def borrowed(self: AnyHandle) -> AnyHandle:
        """This handle for one more user, whose `with`, which comes next, must not take the patch from the first one."""
        with self._lock:
            self._borrowers |= {threading.get_ident()}
        return self

    def __enter__(self: AnyHandle) -> AnyHandle:
        with self._lock:
            if not self.is_patched:
                raise CaptureError("the patch was undone; call lavender.patch again")
            self._is_owned |= threading.get_ident() not in self._borrowers
            self._borrowers -= {threading.get_ident()}
            self._users += (threading.get_ident(),)
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            users = list(self._users)
            users.remove(threading.get_ident() if threading.get_ident() in users else users[-1])
            self._users = tuple(users)
            self._borrowers -= {threading.get_ident()}
            waiting = self._borrowers & {each.ident for each in threading.enumerate()}
            is_last = self._is_owned and not users and not waiting
        if is_last:
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
        """The calling thread's value; None if it has none.

        torch.compile cannot trace what asks for the thread: where one alone is at work, it is the calling one.
        """
        if not torch.compiler.is_compiling() or len(self._values) > 1:
            return self.get()
        return next(iter(self._values.values()), None)
