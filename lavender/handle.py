"""The handle that `lavender.patch` returns: it undoes the patch at the end of a `with`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

from .errors import CaptureError

AnyHandle = TypeVar("AnyHandle", bound="Handle")


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
