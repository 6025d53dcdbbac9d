from __future__ import annotations

import fsspec
import pytest

from .forms import COUNT


@pytest.fixture
def world(scenes):
    return scenes[:COUNT]


@pytest.fixture
def memory():
    """An empty file system in memory."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    return system
