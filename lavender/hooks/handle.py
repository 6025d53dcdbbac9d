"""What every patch is to its user: a handle that undoes itself at the end of a `with`."""

from __future__ import annotations

from typing import TypeVar

AnyHandle = TypeVar("AnyHandle", bound="Handle")


class Handle:
    """A patched model's handle. A patch that is asked for again is lent: the borrower's `with` leaves it in place."""

    _borrowers = 0

    @property
    def is_patched(self) -> bool:
        """Whether the hooks are in place."""
        raise NotImplementedError

    def unpatch(self) -> None:
        """Undoes everything. A second call does nothing."""
        raise NotImplementedError

    def borrowed(self: AnyHandle) -> AnyHandle:
        """This handle for one more user, whose `with` must not take the patch from the first one."""
        self._borrowers += 1
        return self

    def __enter__(self: AnyHandle) -> AnyHandle:
        return self

    def __exit__(self, *_: object) -> None:
        if self._borrowers:
            self._borrowers -= 1
        else:
            self.unpatch()
