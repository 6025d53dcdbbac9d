"""What a data set of pictures with captions gives: pairs, and what is no pair and why."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import DataError
from ..images import ImageSource
from .conversations import id_of, require_unicode


@dataclass(frozen=True, eq=False)
class Pair:
    """A picture and its caption, for `lavender.extract`.

    Raises `DataError` if the caption is no text, or the id neither a text nor a whole number.
    """

    id: str
    image: ImageSource
    caption: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", id_of(self.id, "a pair"))
        if not isinstance(self.caption, str):
            raise DataError(f"pair {self.id!r}: the caption is a {type(self.caption).__name__}; expected a text")


@dataclass(frozen=True)
class BadPair:
    """An entry of a data set that cannot be used: what it is called, and why."""

    id: str
    reason: str


class Pairs(ABC):
    """Pictures with captions, read anew and in the same order whenever they are iterated over. They can be pickled.

    Attributes:
        count: how many entries there are, bad ones too; None where only reading all of them would tell.
    """

    count: int | None = None

    def __iter__(self) -> Iterator[Pair | BadPair]:
        seen: set[str] = set()
        for entry in self._entries():
            if isinstance(entry, Pair):
                try:
                    require_unicode(entry.id, "the id")
                    require_unicode(entry.caption, "the caption")
                    if entry.id in seen:
                        raise DataError("the id occurs twice; name a column of ids that differ (--id-column)")
                except DataError as error:
                    entry = BadPair(entry.id, str(error))
                else:
                    seen.add(entry.id)
            if isinstance(entry, BadPair):
                entry = BadPair(_printable(entry.id), _printable(entry.reason))
            yield entry

    @abstractmethod
    def _entries(self) -> Iterator[Pair | BadPair]:
        """The entries as they are stored, each of which may still repeat an id."""


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Listed(Pairs):
    """Entries that were read as a whole."""

    entries: tuple[Pair | BadPair, ...]
    count: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", len(self.entries))

    def _entries(self) -> Iterator[Pair | BadPair]:
        return iter(self.entries)
