"""Which words of a conversation are compared: of the user and the assistant, in every turn, at their tokens, with their maps."""

from __future__ import annotations

import copy

import pytest

from lavender.batches.collator import Collator
from lavender.config import WordsConfig
from lavender.data.samples import Conversation, Sample
from lavender.types import ROLES
from lavender.words import FUNCTION_WORDS, words_of

from .test_chat_template import NO_PICTURES, TEMPLATES, talk, with_template
from .test_conversations import ANSWER, BLUE, QUESTION, RED, spoken

BOTH = WordsConfig(roles=("question", "answer"))
ASKED = talk(
    "<image>\nWhere is the zebra?", "Beside a violin.", " Is the violin red? \n", "No, a blue violin.", "Where?", "Here."
)  # fmt: skip


@pytest.fixture(scope="module")
def own_processor(processor):
    return copy.deepcopy(processor)


def content(text: str) -> list[str]:
    return [w.text for w in words_of(text.replace("<image>", "")) if w.text.casefold() not in FUNCTION_WORDS]


def tokens_by_offsets(processor, text: str, batch, b: int, words) -> list[list[int]]:
    """The positions of words by the tokenizer's own offsets of the text in which pictures are expanded.

    `words` are texts in their order; each is looked for behind the one before.
    """
    expanded = text.replace("<image>", "<image>" * 64)
    encoded = processor.tokenizer(expanded, add_special_tokens=False, return_offsets_mapping=True)
    ids, mask = batch["input_ids"][b], batch["attention_mask"][b].bool()
    assert ids[mask].tolist() == encoded.input_ids
    first, at, found = int(mask.int().argmax()), 0, []
    for word in words:
        start = expanded.index(word, at)
        at = start + len(word)
        found.append([first + t for t, (left, right) in enumerate(encoded.offset_mapping) if max(left, start) < min(right, at)])
    return found


def tokens_in(batch, b: int) -> dict[int, list[int]]:
    """The positions of each word's tokens in a batch."""
    tokens, words = batch["lavender_tokens"][b], batch["lavender_token_words"][b]
    return {w: tokens[words == w].tolist() for w in words.unique().tolist() if w >= 0}


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in NO_PICTURES])
def test_words_of_both_roles_stand_where_the_template_shows_them(own_processor, name):
    processor = with_template(own_processor, name)
    processor.tokenizer.padding_side = "left"
    samples = [Conversation("x", (RED,), ASKED), Sample("y", BLUE, QUESTION, ANSWER)]
    collator = Collator(processor, words=BOTH)
    batch = collator(samples)
    said = [[message.content for message in ASKED], [QUESTION, ANSWER]]
    for b, texts in enumerate(said):
        words = [word for text in texts for word in content(text)]
        aligned = collator.aligned_words(samples[b])
        assert [word.word.text for word in aligned] == words
        assert [word.turn for word in aligned] == [n for n, text in enumerate(texts) for _ in content(text)]
        assert [word.role for word in aligned] == [("question", "answer")[word.turn % 2] for word in aligned]
        for word in aligned[: len(words)] if b == 0 else ():
            assert texts[word.turn][word.word.start : word.word.end] == word.word.text
        rendered = collator._item(lavender_conversation(samples[b])).chat.text
        marks = tokens_by_offsets(processor, rendered, batch, b, words) if words_are_plain(rendered, words) else None
        found = tokens_in(batch, b)
        assert found.keys() == set(range(len(words)))
        if marks is not None:
            assert [found[w] for w in range(len(words))] == marks
        assert batch["lavender_roles"][b, : len(words)].tolist() == [ROLES.index(word.role) for word in aligned]
        assert batch["lavender_present"][b, : len(words)].all()
        assert {w: text.strip(" .,<?\n") for w, text in spoken(processor, batch, b).items()} == dict(enumerate(words))


def lavender_conversation(sample):
    from lavender.data.samples import as_conversation

    return as_conversation(sample)


def words_are_plain(text: str, words: list[str]) -> bool:
    """Whether the template itself writes none of the words."""
    return all(text.count(word) == sum(word in other for other in words) for word in words)
