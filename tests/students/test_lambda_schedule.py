"""Lambda during training, by every schedule."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavender.config import AlignmentConfig, Schedule
from lavender.students.lambda_schedule import FACTORS, lambda_at

from ..test_config import alignment_configs


def test_every_schedule_has_a_formula():
    assert FACTORS.keys() == set(get_args(Schedule))


@given(alignment_configs, st.floats(0, 1), st.floats(0, 1))
def test_lambda_starts_at_the_weight_falls_and_is_never_negative(config, p, q):
    earlier, later = sorted((p, q))
    assert lambda_at(config, 0) == lambda_at(config, -0.1) == config.weight
    assert lambda_at(config, earlier) >= lambda_at(config, later) >= lambda_at(config, 1) == lambda_at(config, 1.1) >= 0


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("constant", [8, 8, 8]),
        ("linear", [8, 4, 0]),
        ("exponential", [8, 8 * math.exp(-1), 8 * math.exp(-2)]),
        ("inverse", [8, 4, 8 / 3]),
    ],
)
def test_lambda_by_schedule(schedule, values):
    config = AlignmentConfig(weight=8, schedule=schedule, decay=2)
    assert [lambda_at(config, p) for p in (0, 0.5, 1)] == pytest.approx(values)
