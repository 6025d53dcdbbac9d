"""How lambda, the weight of the alignment loss beside the language loss, falls during training, and when it ends."""

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
    """Lambda at a training progress from 0 to 1 (values outside are clipped); it is never negative, and zero after the end."""
    if has_ended(config, progress):
        return 0.0
    return config.weight * FACTORS[config.schedule](min(max(progress / config.until, 0.0), 1.0), config.decay)


def has_ended(config: AlignmentConfig, progress: float | None) -> bool:
    """Whether `AlignmentConfig.until` lies behind: what is left of the training is the student's own."""
    return config.until < 1 and progress is not None and progress >= config.until


def needs_progress(config: AlignmentConfig) -> bool:
    """Whether lambda changes during the training."""
    return config.schedule != "constant" or config.until < 1
