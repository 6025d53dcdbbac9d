from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavender.words import FUNCTION_WORDS, collate_rows, match_words, tokens_of, words_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A cat's hat.", ["A", "cat's", "hat"]),
        ("well-known, isn’t it?", ["well-known", "isn’t", "it"]),
        ("on mo-on upon 'on'", ["on", "mo-on", "upon", "on"]),
        ("naïve 猫 кот 3 cats_and", ["naïve", "猫", "кот", "3", "cats", "and"]),
        ("...", []),
        ("", []),
    ],
)
def test_words_of(text, expected):
    assert [w.text for w in words_of(text)] == expected


@given(st.text(max_size=60))
def test_words_are_the_characters_they_claim(text):
    words = words_of(text)
    assert all(text[w.start : w.end] == w.text and w.text for w in words)
    assert all(a.end <= b.start for a, b in pairwise(words))
    # Nothing that could belong to a word is left out.
    inside = {i for w in words for i in range(w.start, w.end)}
    assert all(i in inside for i, c in enumerate(text) if c.isalnum())


def test_tokens_of_ignores_white_space_at_a_tokens_ends():
    text = "a red circle"
    offsets = [(0, 0), (0, 1), (1, 5), (5, 8), (8, 12), (0, 0)]  # a leading space belongs to its token; the word is split
    assert tokens_of((0, 1), offsets, text) == [1]
    assert tokens_of((2, 5), offsets, text) == [2]
    assert tokens_of((6, 12), offsets, text) == [3, 4]


def test_a_word_beyond_the_window_has_no_tokens():
    assert tokens_of((6, 12), [(0, 1), (1, 5)], "a red circle") == []


def test_match_words_takes_whole_words_only_whatever_their_case():
    text = "On the moon an astronaut stands on it"
    on, moon, nau = match_words(text, ["on", "Moon", "naut"])
    assert [(w.start, w.text) for w in on] == [(0, "On"), (32, "on")]
    assert [w.text for w in moon] == ["moon"]
    assert nau == []


def test_every_real_tokenizer_covers_every_word(processor, scenes):
    tokenizer = processor.tokenizer
    for text in [s.caption for s in scenes[:10]] + ["A zebra's Ünïcödé 猫-toy, twice: zebra's"]:
        offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False).offset_mapping
        owners: dict[int, str] = {}
        for word in words_of(text):
            tokens = tokens_of((word.start, word.end), offsets, text)
            assert tokens, word
            assert not owners.keys() & set(tokens), "no token speaks for two words"
            owners |= dict.fromkeys(tokens, word.text)


rows = st.lists(st.lists(st.lists(st.integers(0, 50), max_size=4), max_size=5), min_size=1, max_size=4)


@given(rows)
def test_collated_rows_average_each_word(samples):
    collated = collate_rows(samples)
    indicator = collated.indicator(torch.float64)
    assert indicator.shape == (len(samples), collated.num_words, collated.rows.shape[1])
    for b, words in enumerate(samples):
        for w, own in enumerate(words):
            dense = torch.zeros(51, dtype=torch.float64)
            dense.index_add_(0, collated.rows[b].clamp_min(0), indicator[b, w])
            expected = torch.zeros(51, dtype=torch.float64)
            for row in own:
                expected[row] += 1 / len(own)
            assert torch.allclose(dense, expected, atol=1e-7)
        assert not indicator[b, len(words) :].any()


def test_function_words_name_nothing():
    assert {"a", "the", "of", "to"} <= FUNCTION_WORDS
    assert not {"red", "circle", "large", "left"} & FUNCTION_WORDS
