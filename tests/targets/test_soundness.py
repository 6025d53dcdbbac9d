"""Which word of a sample is not what its store says, whatever the others are."""

from __future__ import annotations

import numpy as np
import pytest

from lavender.targets.soundness import store_problems
from lavender.types import WordMaps
from lavender.words import words_of

SIZE = 4
WORDS = words_of("one two six ten")


@pytest.mark.parametrize(
    ("normalization", "is_attention", "low", "high"),
    [
        ("none", True, 0.0, 1.0),
        ("none", False, 0.0, np.inf),
        ("minmax", False, 0.0, 1.0),
        ("zscore", True, -SIZE, SIZE),
    ],
)
def test_each_word_beyond_its_range_is_named_and_no_other(normalization, is_attention, low, high):
    rng = np.random.default_rng(0)
    seen = set()
    for number in range(200):
        maps = rng.uniform(low, min(high, 9.0), (4, SIZE, SIZE)).astype(np.float32)
        missing = rng.random(4) < 0.3
        maps[missing] = np.nan
        for beyond in (low - 0.01 - 0.01 * abs(low), high * 1.01):
            if number % 2 and np.isfinite(beyond) and not missing.all():
                maps[rng.choice(np.flatnonzero(~missing)), rng.integers(SIZE), rng.integers(SIZE)] = beyond
        expected = []
        for word, values in zip(WORDS, maps, strict=True):
            expected += [f"'{word.text}' has {'values below -4' if low else 'negative values'}"] * bool((values < low).any())
            expected += [f"'{word.text}' has values above {high:g}"] * bool((values > high).any())
        problems = list(store_problems(WordMaps("one two six ten", WORDS, maps), SIZE, normalization, is_attention))
        assert [problem.removeprefix("the map of ").partition(", though")[0] for problem in problems] == expected
        seen.add(len(expected))
    assert {0, 1} <= seen


def test_no_words_and_words_without_maps_are_sound():
    for words in ((), WORDS):
        maps = np.full((len(words), SIZE, SIZE), np.nan, np.float32)
        assert not list(store_problems(WordMaps("one two six ten", words, maps), SIZE, "none", True))
