"""Which words of a conversation are compared, where they stand in its text, and which maps are theirs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..data.conversations import PLACEHOLDER, Conversation, Message, without_thinking
from ..data.regions import Region
from ..errors import TargetError
from ..types import WHOLE_PICTURE, Box, Span, Word
from ..words import FUNCTION_WORDS, Caption, tokens_of, words_of
from .chat_template import ChatText
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
        word: its letters, and its characters of the message's content. Of a region it is all of its span; a prompt's end has no
            letters.
        tokens: the texts of its tokens, as the tokenizer cuts the conversation; none if the chat template does not show the
            message once and to the letter. Of a prompt's end it is the one whose row predicts the answer's first.
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
        said: what the message says, without white space around it; the word's characters of it are those of `word`, less `offset`.
        offset: where `said` begins in the message's content.
        spans: its characters in the conversation's text; none if the template does not show them. Of a prompt's end they are
            those of what the answer says.
        num_images: the number of pictures before it.
        region: what says where it lies; None of a word whose map is found in the targets by its letters.
    """

    turn: int
    role: str
    word: Word
    said: str
    offset: int
    spans: tuple[Span, ...]
    num_images: int
    region: Region | None = None

    @property
    def in_said(self) -> Word:
        """The word with its characters of `said`."""
        return Word(self.word.text, self.word.start - self.offset, self.word.end - self.offset)

    def tokens(self, offsets: Sequence[Span], text: str) -> list[int]:
        """The indices of its tokens; of a prompt's end that of the answer's first."""
        tokens: list[int] = []
        for start, end in self.spans:
            near = [t for t, (left, right) in enumerate(offsets) if right > start and left < end]
            tokens += [near[t] for t in tokens_of((start, end), [offsets[t] for t in near], text)]
        return tokens[:1] if self.role == "prompt end" else tokens


def content_words(text: str) -> tuple[Word, ...]:
    """The words of a text that may name something, in order: function words are left out."""
    return tuple(word for word in words_of(text) if word.text.casefold() not in FUNCTION_WORDS)


def aligned_turns(conversation: Conversation, roles: Collection[str]) -> list[int]:
    """The messages that have words: those of some roles, of the assistant's if they are learned, and those of regions."""
    return [
        n
        for n, message in enumerate(conversation.messages)
        if (_ROLES.get(message.role) in roles and (message.role == "user" or message.is_learned))
        or any(region.turn == n for region in conversation.regions)
    ]


def turn_words(conversation: Conversation, chat: ChatText, roles: Collection[str]) -> tuple[TurnWord, ...]:
    """The words of the messages of some roles, and the regions' words, in the order of the text.

    Words that share characters with a region's give way to it.
    """
    found: list[TurnWord] = []
    before = [0, *accumulate(message.content.count(PLACEHOLDER) for message in conversation.messages)]
    for n in aligned_turns(conversation, roles):
        message, role = conversation.messages[n], _ROLES[conversation.messages[n].role]
        said, offset = _said(message)
        passages = chat.passages.get(n, ())
        regions = [region for region in conversation.regions if region.turn == n]
        spans = [_span_of(region, message, offset, said) for region in regions]
        words = []
        for region, (start, end) in zip(regions, spans, strict=True):
            num_images = before[n] + message.content.count(PLACEHOLDER, 0, start)
            if region.role == "prompt end":
                shown = tuple((passage.at, passage.at + passage.end - passage.start) for passage in passages)
                words.append(TurnWord(n, region.role, Word("", start, end), said, offset, shown, num_images, region))
            else:
                shown = tuple(
                    (passage.at + max(start, passage.start) - passage.start, passage.at + min(end, passage.end) - passage.start)
                    for passage in passages
                    if max(start, passage.start) < min(end, passage.end)
                )
                word = Word(message.content[start:end], start, end)
                words.append(TurnWord(n, role, word, said, offset, shown, num_images, region))
        is_aligned = role in roles and (role == "question" or message.is_learned)
        for word in content_words(said) if is_aligned else ():
            start, end = word.start + offset, word.end + offset
            if any(max(start, first) < min(end, last) for first, last in spans):
                continue
            shown = tuple(
                (passage.at + start - passage.start, passage.at + end - passage.start)
                for passage in passages
                if passage.start <= start and end <= passage.end
            )
            num_images = before[n] + message.content.count(PLACEHOLDER, 0, start)
            words.append(TurnWord(n, role, Word(word.text, start, end), said, offset, shown, num_images))
        found += sorted(words, key=lambda word: (word.role != "prompt end", word.word.start))
    return tuple(found)


def _span_of(region: Region, message: Message, offset: int, said: str) -> Span:
    """A region's characters of its message's content; none of a prompt's end."""
    if region.role == "prompt end":
        return offset, offset
    if region.start is None or region.end is None:
        return offset, offset + len(said)
    return region.start, region.end


def _said(message: Message) -> tuple[str, int]:
    """What a message says without thinking, pictures and white space around it, and where that begins in its content."""
    if message.role == "assistant":
        said = without_thinking(message.content).strip()
        return said, message.content.rindex(said)
    blank = message.content.replace(PLACEHOLDER, " " * len(PLACEHOLDER))
    return blank.strip(), len(blank) - len(blank.lstrip())


class CaptionMaps:
    """The maps of a stored caption's words that are not too sparse, and which of them a word of another text has."""

    def __init__(self, target: Target, selector: WordSelector) -> None:
        """Raises `TargetError` if the target has another number of maps than of words."""
        known = target.word_maps
        if len(known.maps) != len(known.words):
            raise TargetError(f"the targets {target.id!r} are damaged: {len(known.maps)} maps for {len(known.words)} words")
        self.caption = Caption.of(known.caption)
        self.said = known.caption.strip()
        self._offset = known.caption.index(self.said)
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

    def of_said(self, words: Sequence[Word]) -> list[NDArray[np.float32] | None]:
        """Per word of what the caption says its own map."""
        return [self.of_places([(word.start + self._offset, word.end + self._offset)]) for word in words]

    def of_places(self, spans: Sequence[Span]) -> NDArray[np.float32] | None:
        """The mean [y, x] over the words that hold one of these characters of the caption."""
        maps = [values for word, values in self._dense if any(word.start <= start and end <= word.end for start, end in spans)]
        return np.mean(maps, axis=0) if maps else None

    def of_region(self, word: str | Span) -> NDArray[np.float32] | None:
        """The map [y, x] of a word of the caption, or of the words that share characters with a span of it, function words left
        out if there are others."""
        if isinstance(word, str):
            return self.of_text(word, [Word(word, 0, len(word))])[0]
        start, end = word
        places = [w for w in self.caption.words if max(w.start, start) < min(w.end, end)]
        named = [w for w in places if w.text.casefold() not in FUNCTION_WORDS]
        return self.of_places([(w.start, w.end) for w in named or places])


def target_maps(
    words: Sequence[TurnWord], targets: Sequence[Target], size: int, selector: WordSelector, shown: Box = WHOLE_PICTURE
) -> dict[int, NDArray[np.float32]]:
    """The map [size, size] of every word that has one.

    Of a region its own, cut to what the targets show, if it says something in the part of the picture that is `shown`. In an answer
    that is a caption, a word's own; else the mean over the captions that have the word.
    """
    captions = [CaptionMaps(target, selector) for target in targets]
    crop = targets[0].word_maps.crop if targets else WHOLE_PICTURE
    found: dict[int, list[NDArray[np.float32] | None]] = {}
    by_turn: dict[int, list[int]] = {}
    for w, word in enumerate(words):
        if word.region is None:
            by_turn.setdefault(word.turn, []).append(w)
        elif word.region.is_place:
            found[w] = [word.region.target(size, crop, shown)]
        elif isinstance(word.region.word, str) or len(captions) == 1:  # characters of several captions say nothing
            found[w] = [maps.of_region(word.region.word) for maps in captions]
    for indices in by_turn.values():
        first, places = words[indices[0]], [words[w].in_said for w in indices]
        own = next((maps for maps in captions if first.role == "answer" and maps.said == first.said), None)
        if own is not None:
            found |= {w: [values] for w, values in zip(indices, own.of_said(places), strict=True)}
        else:
            of_captions = [maps.of_text(first.said, places) for maps in captions]
            found |= {w: [maps[k] for maps in of_captions] for k, w in enumerate(indices)}
    known = {w: [values for values in maps if values is not None] for w, maps in found.items()}
    return {w: np.mean(maps, axis=0) for w, maps in known.items() if maps}
