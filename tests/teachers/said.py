"""What lavender says while a picture is drawn."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def says(pattern: str) -> Iterator[None]:
    """Asserts that a warning of lavender's log matches inside the block."""
    logger, kept = logging.getLogger("lavender"), _Kept()
    logger.addHandler(kept)
    try:
        yield
    finally:
        logger.removeHandler(kept)
    assert any(re.search(pattern, line) for line in kept.lines), kept.lines
