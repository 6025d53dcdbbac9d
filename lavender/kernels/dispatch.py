"""Which implementation of an operation runs: the fastest able one by default, exactly the named one otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache

from ..errors import ConfigError

logger = logging.getLogger(__name__)

WhyNot = Callable[[], list[str]]


def choose(op: str, impl: str, candidates: Mapping[str, WhyNot]) -> str:
    """Name of the implementation to run.

    Args:
        op: the operation's name, for messages.
        impl: `"auto"` or a candidate's name. A candidate asked for by name is never replaced by another.
        candidates: fastest first; each gives the reasons why it cannot run here, none if it can.

    Raises:
        ConfigError: `impl` is unknown, or cannot run here; the message gives every reason.
    """
    if impl == "auto":
        for name, why_not in candidates.items():
            if not why_not():
                _log_choice(op, name)
                return name
        raise ConfigError(f"no implementation of {op} can run here: { ({n: w() for n, w in candidates.items()}) }")
    if impl not in candidates:
        raise ConfigError(f"{op} has no implementation {impl!r}; choose auto or one of {', '.join(candidates)}")
    reasons = candidates[impl]()
    if reasons:
        raise ConfigError(f"impl={impl!r} cannot run {op} here: {'; '.join(reasons)}")
    return impl


@cache
def _log_choice(op: str, name: str) -> None:
    logger.info("%s runs by its %r implementation", op, name)


def able() -> list[str]:
    """The reasons of an implementation that runs everywhere: none."""
    return []
