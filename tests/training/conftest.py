from __future__ import annotations

import pytest

from lavender.training.callback import LavenderCallback


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing maps takes longer than a step of a small student."""
    monkeypatch.setattr(LavenderCallback, "_draw", lambda *_: None)
