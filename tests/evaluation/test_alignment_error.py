from __future__ import annotations

import numpy as np
import pytest

from lavender.config import AlignmentConfig
from lavender.evaluation.alignment_error import alignment_error, best_constant_error


def test_best_constant_is_the_mean_of_the_targets():
    targets = np.random.default_rng(0).random((50, 6, 6))
    normalized = (targets - targets.mean((1, 2), keepdims=True)) / targets.std((1, 2), keepdims=True)
    best = best_constant_error(targets, "zscore")
    assert best == pytest.approx(((normalized - normalized.mean(0)) ** 2).mean(), rel=1e-4)
    for constant in np.random.default_rng(1).random((20, 6, 6)):
        assert ((normalized - constant) ** 2).mean() > best


def test_alignment_error_of_the_targets_themselves_is_zero():
    maps = [{(0, 3): np.random.default_rng(0).random((16, 16), np.float32)}]
    config = AlignmentConfig(weight=10.0, aligner="sim")
    assert alignment_error(maps, maps, config) == pytest.approx(0, abs=1e-10)
    assert alignment_error([{(0, 3): np.zeros((8, 8), np.float32)}], maps, config) == pytest.approx(1, rel=1e-3)
