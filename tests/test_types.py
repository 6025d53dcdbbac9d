"""`WordBatch`: the keys by which a collator and a patched model know each other."""

from __future__ import annotations

import pytest
import torch

from lavender.errors import CaptureError
from lavender.types import WordBatch


@pytest.fixture
def words():
    tokens = torch.tensor([[3, 4, -1]])
    return WordBatch(tokens, tokens.clamp_max(0), tokens.float(), torch.arange(4)[None], torch.ones(1, 1, dtype=torch.bool))


def test_keys_are_those_that_batches_document(words):
    assert list(words.to_batch()) == [
        "lavender_tokens",
        "lavender_token_words",
        "lavender_token_weights",
        "lavender_columns",
        "lavender_present",
    ]
    assert {*WordBatch.KEYS.values()} - {*words.to_batch()} == {
        "lavender_boxes",
        "lavender_outcomes",
        "lavender_targets",
        "lavender_input_ids",
        "lavender_roles",
    }


def test_a_batch_is_split_into_inputs_and_words(words):
    inputs, again = WordBatch.split({"input_ids": 1, **words.to_batch(), "labels": None})
    assert inputs == {"input_ids": 1, "labels": None}
    assert vars(again) == vars(words)
    assert WordBatch.split({"input_ids": 1, "data": {"labels": 2}}) == ({"input_ids": 1, "data": {"labels": 2}}, None)


def test_keys_inside_a_mapping_are_taken_out_of_a_copy(words):
    data = {"input_ids": 1, **words.to_batch()}
    inputs, again = WordBatch.split({"data": data, "use_cache": False})
    assert inputs == {"data": {"input_ids": 1}, "use_cache": False}
    assert again.tokens is words.tokens
    assert "lavender_tokens" in data


def test_missing_keys_are_named(words):
    batch = words.to_batch()
    del batch["lavender_present"]
    with pytest.raises(CaptureError, match=r"lacks lavender_present; make it with lavender\.Collator"):
        WordBatch.split(batch)
    with pytest.raises(CaptureError, match="lacks lavender_boxes;"):  # the loss has to know the grid
        WordBatch.split({**words.to_batch(), "lavender_targets": torch.zeros(1, 1, 8, 8)})
