"""What third parties write beside a command's own output: deprecations, hints and bars, which a user can do nothing about."""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

_ENVIRONMENT = {
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""What the processes that a command starts are told, unless the user told them something else."""


@contextmanager
def without_notes() -> Iterator[None]:
    """Only lavender logs, and nobody warns; errors are raised as ever. Of progress bars see `lavender.pretrained.names.loading`."""
    own, before = logging.getLogger("lavender"), logging.root.manager.disable

    def is_enabled(level: int) -> bool:
        return level >= max(before + 1, own.getEffectiveLevel())

    with (
        warnings.catch_warnings(),
        patch.dict(os.environ, {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}),
        patch.object(own, "isEnabledFor", is_enabled),
    ):
        warnings.simplefilter("ignore")
        logging.disable(max(before, logging.ERROR))  # a library's errors are those that it raises
        try:
            yield
        finally:
            logging.disable(before)


_for_life = ExitStack()
"""What holds as long as the process lives."""


class AsHere:
    """A function for a process that is spawned, where third parties are as quiet as here, from the first import on: the process
    imports what the function needs when this is unpickled."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> None:
        self._function(*args)

    def __getstate__(self) -> tuple[bool, bytes]:
        return logging.root.manager.disable >= logging.ERROR, pickle.dumps(self._function)

    def __setstate__(self, state: tuple[bool, bytes]) -> None:
        is_quiet, function = state
        if is_quiet:
            _for_life.enter_context(without_notes())
        self._function = pickle.loads(function)  # what the parent has just written
