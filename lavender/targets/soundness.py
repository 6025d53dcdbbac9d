"""What word maps must be, whoever wrote them and wherever they come from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import Normalization
from ..types import Word, WordMaps

ROUNDING = 2.0**-10
"""How far stored values may lie beyond their range: float16 has eleven bits, and eight-bit maps have ends in float32."""
_CROP_ROUNDING = 1e-6
"""Of the fractions of a crop, to float32."""
_FIRST_NON_FINITE = 0x7C00
"""Bits of float16's infinity: smaller are those of finite numbers that are not negative, above follow NaN and all negative ones."""


def word_problems(caption: str, words: Sequence[Word]) -> Iterator[str]:
    """Which words are not where they say that they are."""
    length = len(caption)
    for word in words:
        if not 0 <= word.start < word.end <= length or caption[word.start : word.end] != word.text:
            yield f"the word {word.text!r} is not at {word.start} to {word.end} of its caption"


def crop_problems(crop: Sequence[float]) -> Iterator[str]:
    low, high = -_CROP_ROUNDING, 1 + _CROP_ROUNDING
    if not (len(crop) == 4 and low <= crop[0] < crop[2] <= high and low <= crop[1] < crop[3] <= high):
        yield f"the crop {list(crop)} is no [top, left, bottom, right] in fractions of the picture"


def value_problems(words: Sequence[Word], values: NDArray[Any], ranges: NDArray[np.float32] | None = None) -> Iterator[str]:
    """Which words' values [W, y, x] are neither finite nor all NaN; of codes, which words' `ranges` [W, 2] are none of numbers."""
    if ranges is not None:
        usable = (np.isfinite(ranges).all(axis=1) & (ranges[:, 0] <= ranges[:, 1])) | np.isnan(ranges).all(axis=1)
    elif values.dtype == np.float16 and values.view(np.uint16).max(initial=0) < _FIRST_NON_FINITE:
        return  # one pass of integers, many times as fast as NumPy's on float16
    else:
        usable = np.isfinite(values).all(axis=(1, 2)) | np.isnan(values).all(axis=(1, 2))
    for word, is_usable in zip(words, usable, strict=True):
        if not is_usable:
            yield f"the map of {word.text!r} has values that are not finite"


def store_problems(word_maps: WordMaps, map_size: int, normalization: Normalization, is_attention: bool) -> Iterator[str]:
    """In what maps are other than their store says; see `lavender.kernels.map_loss` for the normalizations.

    `is_attention` says that a model's weights made them: they are shares then. What others write may have any scale.
    """
    height, width = word_maps.maps.shape[1:]
    if (height, width) != (map_size, map_size):
        yield f"its maps have {height}x{width} places, those of its store {map_size}x{map_size}"
    what = "raw attention" if normalization == "none" else f"normalized by {normalization!r}"
    low, high = 0.0, 1.0 if normalization != "none" or is_attention else math.inf
    if normalization == "zscore":  # the farthest that one value can be from the mean of all, in standard deviations
        high = math.sqrt(height * width)
        low = -high
    least, most = low * (1 + ROUNDING), high * (1 + ROUNDING)
    # Of all words at once: nearly every sample is sound. NaN of a word without a map is beyond nothing.
    if not (
        np.fmin.reduce(word_maps.maps, None, initial=np.nan) < least or np.fmax.reduce(word_maps.maps, None, initial=np.nan) > most
    ):
        return
    for word, values in zip(word_maps.words, word_maps.maps, strict=True):
        if values.min() < least:
            yield f"the map of {word.text!r} has {f'values below {low:.4g}' if low else 'negative values'}, though it is {what}"
        if values.max() > most:
            yield f"the map of {word.text!r} has values above {high:.4g}, though it is {what}"
