"""Which words of a conversation are compared, where they stand in its text, and which maps are theirs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..data.conversations import PLACEHOLDER, Conversation, Message
from ..errors import TargetError
from ..types import Span, Word
from ..words import FUNCTION_WORDS, Caption, words_of
from .chat_template import ChatText, without_thinking
from .word_selection import WordSelector

if TYPE_CHECKING:
    from ..targets.store import Target

_ROLES = {"user": "question", "assistant": "answer"}
"""The roles of a message's words."""


@dataclass(frozen=True)
class AlignedWord:
    """A word of a sample: index w of a batch's word axis is the w-th that `Collator.aligned_words` returns.

    Attributes:
        turn: the number of its message in the conversation, from 0.
        role: one of `lavender.types.ROLES`.
        word: its letters, and its characters of the message's content.
        tokens: the texts of its tokens, as the tokenizer cuts the conversation; none if the chat template does not show the
            message to the letter.
    """

    turn: int
    role: str
    word: Word
    tokens: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class TurnWord:
    """A word of a message in the text of a conversation.

    Attributes:
        turn, role, word: see `AlignedWord`.
        said: what the message says; the word's characters of it are those of `word`, less `offset`.
        offset: where `said` begins in the message's content.
        spans: its characters in the conversation's text; none if the template does not show them.
    """

    turn: int
    role: str
    word: Word
    said: str
    offset: int
    spans: tuple[Span, ...]

    @property
    def in_said(self) -> Word:
        """The word with its characters of `said`."""
        return Word(self.word.text, self.word.start - self.offset, self.word.end - self.offset)


def content_words(text: str) -> tuple[Word, ...]:
    """The words of a text that may name something, in order: function words are left out."""
    return tuple(word for word in words_of(text) if word.text.casefold() not in FUNCTION_WORDS)


def aligned_turns(conversation: Conversation, roles: Collection[str]) -> list[int]:
    """The messages of some roles: of the user's all, of the assistant's those that are learned."""
    return [
        n
        for n, message in enumerate(conversation.messages)
        if _ROLES.get(message.role) in roles and (message.role == "user" or message.is_learned)
    ]


def turn_words(conversation: Conversation, chat: ChatText, roles: Collection[str]) -> Iterator[TurnWord]:
    """The words of the messages of some roles, in the order of the text."""
    for n in aligned_turns(conversation, roles):
        message = conversation.messages[n]
        said, offset = _said(message)
        for word in content_words(said):
            start, end = word.start + offset, word.end + offset
            spans = tuple(
                (passage.at + start - passage.start, passage.at + end - passage.start)
                for passage in chat.passages.get(n, ())
                if passage.start <= start and end <= passage.end
            )
            yield TurnWord(n, _ROLES[message.role], Word(word.text, start, end), said, offset, spans)


def _said(message: Message) -> tuple[str, int]:
    """What a message says without thinking and pictures, and where that begins in its content."""
    if message.role == "assistant":
        said = without_thinking(message.content)
        return said, message.content.rindex(said)
    return message.content.replace(PLACEHOLDER, " " * len(PLACEHOLDER)), 0


class CaptionMaps:
    """The maps of a stored caption's words that are not too sparse, and which of them a word of another text has."""

    def __init__(self, target: Target, selector: WordSelector) -> None:
        """Raises `TargetError` if the target has another number of maps than of words."""
        known = target.word_maps
        if len(known.maps) != len(known.words):
            raise TargetError(f"the targets {target.id!r} are damaged: {len(known.maps)} maps for {len(known.words)} words")
        self.caption = Caption.of(known.caption)
        self._selector = selector
        self._dense = [
            (word, values)
            for word, values, is_dense in zip(known.words, known.maps, selector.dense(known.maps), strict=True)
            if is_dense
        ]

    def of_text(self, text: str, words: Sequence[Word]) -> list[NDArray[np.float32] | None]:
        """Per word of a text the mean [y, x] over the caption's occurrences of the same word, which may be part of a run that has
        no spaces; None where there are none."""
        return [
            self.of_places([(word.start, word.end) for word in occurrences])
            for occurrences in self._selector.occurrences(self.caption, text, words)
        ]

    def of_places(self, spans: Sequence[Span]) -> NDArray[np.float32] | None:
        """The mean [y, x] over the words that hold one of these characters of the caption."""
        maps = [values for word, values in self._dense if any(word.start <= start and end <= word.end for start, end in spans)]
        return np.mean(maps, axis=0) if maps else None


def target_maps(words: Sequence[TurnWord], captions: Sequence[CaptionMaps]) -> dict[int, NDArray[np.float32]]:
    """The map [y, x] of every word that has one.

    In an answer that is a caption, a word's own; else the mean over the captions that have the word.
    """
    by_turn: dict[int, list[int]] = {}
    for w, word in enumerate(words):
        by_turn.setdefault(word.turn, []).append(w)
    result: dict[int, NDArray[np.float32]] = {}
    for indices in by_turn.values():
        said, places = words[indices[0]].said, [words[w].in_said for w in indices]
        same = [maps for maps in captions if maps.caption.text == said and words[indices[0]].role == "answer"]
        found = (
            [[maps.of_places([(place.start, place.end)]) for place in places] for maps in same[:1]]
            if same
            else [maps.of_text(said, places) for maps in captions]
        )
        for w, maps in zip(indices, zip(*found, strict=True), strict=False):
            known = [values for values in maps if values is not None]
            if known:
                result[w] = np.mean(known, axis=0)
    return result
