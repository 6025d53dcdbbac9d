"""How lambda, the weight of the alignment loss beside the language loss, falls during training."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..config import AlignmentConfig, Schedule

FACTORS: dict[Schedule, Callable[[float, float], float]] = {
    "constant": lambda progress, decay: 1.0,
    "linear": lambda progress, decay: 1 - progress,
    "exponential": lambda progress, decay: math.exp(-decay * progress),
    "inverse": lambda progress, decay: 1 / (1 + decay * progress),
}
"""Schedule -> lambda as a share of `AlignmentConfig.weight`, of the progress from 0 to 1 and `AlignmentConfig.decay`."""


def lambda_at(config: AlignmentConfig, progress: float) -> float:
    """Lambda at a training progress from 0 to 1 (values outside are clipped); it is never negative."""
    return config.weight * FACTORS[config.schedule](min(max(progress, 0.0), 1.0), config.decay)
