"""The alignment loss as a measure: of an aligner's maps, and of the best map that does not depend on the word."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..config import AlignmentConfig
from ..kernels.map_loss import map_loss, normalize
from .localization import SpanMaps


def best_constant_error(targets: np.ndarray, normalization: str) -> float:
    """Alignment loss of the best single map for all words: what an aligner must beat to have learned anything.

    `targets` is [K, y, x]. The error's minimizer over one map that stays as it is (no second normalization) is the mean of the
    normalized targets; its error is a lower bound for every constant map.
    """
    normalized = normalize(torch.from_numpy(targets).double(), normalization)
    return float((normalized - normalized.mean(dim=0)).square().mean())


def alignment_error(aligned: Sequence[SpanMaps], targets: Sequence[SpanMaps], config: AlignmentConfig) -> float:
    """Alignment loss of an aligner's maps against targets, per caption: mean over the words that both have."""
    errors = []
    present = torch.ones(1, 1, dtype=torch.bool)
    for student_maps, target_maps in zip(aligned, targets, strict=True):
        for span in student_maps.keys() & target_maps.keys():
            student, target = (torch.from_numpy(maps[span]).float()[None, None] for maps in (student_maps, target_maps))
            errors.append(float(map_loss(student, target, present, normalization=config.normalization)))
    return float(np.mean(errors))
