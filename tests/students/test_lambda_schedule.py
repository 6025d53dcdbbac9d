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
    config = AlignmentConfig(weight=8, schedule=schedule, decay=2, aligner="sim")
    assert [lambda_at(config, p) for p in (0, 0.5, 1)] == pytest.approx(values)


@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize("until", [0.25, 0.7])
def test_a_schedule_that_ends_is_the_same_one_in_less_time(schedule, until):
    whole, short = (AlignmentConfig(weight=8, schedule=schedule, decay=2, until=end, aligner="sim") for end in (1.0, until))
    for part in (0.0, 0.3, 0.99):
        assert lambda_at(short, part * until) == pytest.approx(lambda_at(whole, part))
    assert [lambda_at(short, progress) for progress in (until, 0.9, 1.0, 1.1)] == [0.0] * 4


@pytest.mark.parametrize("steps", [7, 10, 200])
def test_a_share_of_the_steps_is_aligned(steps):
    config = AlignmentConfig(until=0.3, weight=10.0, aligner="sim")
    assert sum(lambda_at(config, step / steps) > 0 for step in range(steps)) == math.ceil(0.3 * steps)
