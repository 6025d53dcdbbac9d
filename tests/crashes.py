"""Processes that die at a chosen moment: before or after a step by which files become what they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

STEPS = ("replace", "rename", "fsync", "unlink", "rmdir")
"""Functions of `os` that all of lavender's writing goes through; pathlib and shutil call them too."""


def crash_at(point: int, work: Callable[[], Any]) -> bool:
    """Does the work in a forked process that dies, as by SIGKILL, at a point: 2n before step n, 2n + 1 after it.

    Returns whether it died there; False if the work ended before.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _count(point)
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9), f"point {point}: the work failed"
    return code == 9


def _count(point: int) -> None:
    passed = iter(range(point))

    def dying(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if next(passed, None) is None:
                os._exit(9)
            result = step(*arguments, **options)
            if next(passed, None) is None:
                os._exit(9)
            return result

        return run

    for name in STEPS:
        setattr(os, name, dying(getattr(os, name)))
