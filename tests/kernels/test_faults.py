"""Faults planted in the CUDA C++ kernels are caught, and none of their barriers can be spared: recorded, and run again."""

from __future__ import annotations

import pytest

from .budget import DEVICE
from .faults import BARRIERS, FAULTS, PLANTED, outcome
from .record import recorded

ALWAYS = {*list(PLANTED)[:2], "a softmax without its maximum", *list(BARRIERS)[1::9]}
"""Faults that run in the fast tier too."""


def test_every_fault_was_caught():
    assert recorded("faults") == dict.fromkeys(FAULTS, "caught")


@pytest.mark.skipif(DEVICE != "cpu", reason="there is a card: faults are planted where the emulator runs the kernels")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name not in ALWAYS)) for name in FAULTS])
def test_a_fault_is_caught_again(name):
    assert outcome(name) == recorded("faults")[name] == "caught"
