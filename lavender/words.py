"""Text, words and tokens: the only file that knows that a word may be several tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher

import torch

from .types import Span, Word, WordRows

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")


def words_of(text: str) -> tuple[Word, ...]:
    """Words of a text, in order: runs of letters and digits, with apostrophes and hyphens inside. A repeated word repeats."""
    return tuple(Word(match.group(), *match.span()) for match in _WORD.finditer(text))


def tokens_of(span: Span, offsets: Sequence[Span], text: str) -> list[int]:
    """Indices of the tokens that share a character with `span`, white space at a token's ends not counted.

    Args:
        span: characters `[start, end)` of `text`.
        offsets: per token its characters in `text`, as a fast tokenizer's `offset_mapping` has them; empty for special tokens.
        text: the text that both index.
    """
    start, end = span
    found = []
    for index, (left, right) in enumerate(offsets):
        while left < right and text[left].isspace():
            left += 1
        while left < right and text[right - 1].isspace():
            right -= 1
        if left < end and start < right:
            found.append(index)
    return found


def offsets_of_ids(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text of sampled tokens and each token's characters in it, by decoding growing prefixes: nothing is tokenized again.

    Args:
        decode: a tokenizer's `decode`.
        ids: the tokens that a model generated.

    Returns:
        The decoded text, and per token its characters `[start, end)`; tokens that share a character of several bytes all have it,
        tokens that decode to nothing are empty.
    """
    text = decode(ids)
    ends, reached = [], 0
    for count in range(1, len(ids) + 1):
        prefix = decode(ids[:count])
        # The last character may be unfinished, shown as a replacement character: its bytes are still to come.
        while prefix and not text.startswith(prefix):
            prefix = prefix[:-1]
        reached = max(reached, len(prefix))
        ends.append(reached)
    offsets: list[Span] = []
    waiting = 0  # tokens whose character is not finished yet
    start = 0
    for end in ends:
        if end == start:
            waiting += 1
            continue
        offsets.extend([(start, start + 1)] * waiting)
        offsets.append((start, end))
        waiting, start = 0, end
    return text, offsets + [(start, start)] * waiting


def align(tokens: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Where the tokens of a text stand in the sequence that a processor made of it: -1 for tokens that are not there.

    A processor expands a picture's placeholder to many tokens, with separators around them, and pads; the rest of the text keeps
    its tokens and their order.
    """
    places = [-1] * len(tokens)
    for block in SequenceMatcher(None, tokens, ids, autojunk=False).get_matching_blocks():
        for i in range(block.size):
            places[block.a + i] = block.b + i
    return places


def match_words(text: str, words: Iterable[str]) -> list[list[Word]]:
    """Where each of the given words stands in a text, whatever its case: one list of occurrences per word, maybe empty."""
    occurrences: dict[str, list[Word]] = {}
    for word in words_of(text):
        occurrences.setdefault(word.text.casefold(), []).append(word)
    return [occurrences.get(word.casefold(), []) for word in words]


def collate_rows(samples: Sequence[Sequence[Sequence[int]]]) -> WordRows:
    """Pads each sample's words, given as lists of query rows, to one batch; a word's map is the mean over its rows.

    `samples[b][w]` lists the rows of word w; an empty list is a word without rows, whose map is zero. R and W are at least one.
    """
    flat = [[(row, w, 1.0 / len(rows)) for w, rows in enumerate(words) for row in rows] for words in samples]
    width = max(1, max((len(entries) for entries in flat), default=0))
    num_words = max(1, max((len(words) for words in samples), default=0))
    padded = [entries + [(-1, -1, 0.0)] * (width - len(entries)) for entries in flat]
    rows, words, weights = (torch.tensor([[entry[i] for entry in entries] for entries in padded]) for i in range(3))
    return WordRows(rows.long(), words.long(), weights.float(), num_words)


_FUNCTION_WORDS = """
a an the and or but nor so yet of to in on at by for from with into onto over under as than that this these those there here
is are was were be been being am do does did has have had can could will would shall should may might must not no it its he
she they them his her their we us our you your i me my who whom whose which what when where why how if while also very
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""English words that name nothing in a picture; they are left out of the alignment."""
