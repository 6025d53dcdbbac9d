"""What a user can get wrong. Every message says what was given, what was expected and what to do."""

from __future__ import annotations

import warnings


class LavenderError(Exception):
    """Base of every error that a user can cause and mend; the command line prints it as one line and exits with 2."""


class ConfigError(LavenderError, ValueError):
    """A setting is out of its range, or two settings contradict each other."""


class ModelError(LavenderError):
    """A model cannot be loaded, or cannot be captured as it is set up."""


class CaptureError(LavenderError, RuntimeError):
    """A captured forward did not record what it had to."""


class DataError(LavenderError):
    """A data file, a picture or a caption cannot be used."""


class TargetError(LavenderError):
    """A target store is missing, damaged, or belongs to other pictures or another teacher."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line: the first, and the second if the first announces it by a colon."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first


_warned: set[str] = set()


def warn_renamed(old: str, new: str) -> None:
    """Warns once per process, by a `FutureWarning`, that a public name is deprecated; `new` replaces it."""
    if old not in _warned:
        _warned.add(old)
        warnings.warn(f"{old} is deprecated; use {new}", FutureWarning, stacklevel=3)
