"""Models in a hub's cache that was made by hand: the libraries resolve them as they do what they downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path

FIRST, SECOND = "1" * 40, "2" * 40
"""Two commits."""


class Hub:
    """A hub that knows what `put` puts there, and cannot be reached.

    Attributes:
        cache: the folder of the cache.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def put(self, name: str, folder: Path, commit: str, *refs: str) -> Path:
        """A model at a commit, to which branches or tags lead; the folder of its snapshot."""
        home = self.cache / f"models--{name.replace('/', '--')}"
        snapshot = home / "snapshots" / commit
        shutil.copytree(folder, snapshot)
        (home / "refs").mkdir(exist_ok=True)
        for ref in refs:
            (home / "refs" / ref).write_text(commit)
        return snapshot
