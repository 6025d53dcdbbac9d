"""Text, words and tokens: the only file that knows that a word may be several tokens."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .types import Span, Word, WordRows

# U+0300 stands for every combining mark here, see `_same_marks`. Inside a word there may be one apostrophe (׳ and ״ are Hebrew's)
# or hyphen (‐ and ‑ are Unicode's own), joiners (soft hyphen, zero-width non-joiner and joiner), and a point between digits.
_WORD = re.compile(
    r"[^\W_](?:[^\W_]|\u0300|['’׳״‐‑-](?=[^\W_])|[\u00ad\u200c\u200d]+(?=[^\W_]|\u0300)|(?<=\d)[.,\u066b\u066c](?=\d))*"
)
# Thai and Lao, Burmese, Khmer, kana, Han: scripts that put no spaces between words.
_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\uff66-\uff9f\U00020000-\U0003ffff]"
)


def words_of(text: str) -> tuple[Word, ...]:
    """Words of a text, in order: runs of letters and digits, with apostrophes and hyphens inside. A repeated word repeats.

    A letter keeps its combining marks (accents, vowel signs). Joiners of no width do not cut a word, nor decimal points and
    commas a number, for some vocabularies have tokens like "3.5"; underscores and dashes do. A run of a script without spaces
    (Chinese, Japanese, Thai) is one word; `match_words` finds parts of it.
    """
    return tuple(Word(text[m.start() : m.end()], *m.span()) for m in _WORD.finditer(_same_marks(text)))


@dataclass(frozen=True)
class Caption:
    """A text with its words, which are split once.

    Attributes:
        text: the text.
        words: see `words_of`.
    """

    text: str
    words: tuple[Word, ...]

    @classmethod
    def of(cls, text: str) -> Caption:
        """A text with the words of `words_of`."""
        return cls(text, words_of(text))


def _same_marks(text: str) -> str:
    """The text with U+0300 in place of each combining mark, which Python's patterns do not count among a word's letters."""
    return text if text.isascii() else "".join("\u0300" if unicodedata.category(c)[0] == "M" else c for c in text)


def tokens_of(span: Span, offsets: Sequence[Span], text: str) -> list[int]:
    """Indices of the tokens that share a character with `span`, white space at a token's ends not counted.

    A word that the window of a text encoder cuts has the tokens that are left of it; one beyond the window has none.

    Args:
        span: characters `[start, end)` of `text`.
        offsets: per token its characters in `text`, as a fast tokenizer's `offset_mapping` has them; empty for special tokens.
        text: the text that both index.
    """
    start, end = span
    tokens = []
    for index, (left, right) in enumerate(_split_bytes(offsets, text)):
        while left < right and text[left].isspace():
            left += 1
        while left < right and text[right - 1].isspace():
            right -= 1
        if max(left, start) < min(right, end):
            tokens.append(index)
    return tokens


def _split_bytes(offsets: Sequence[Span], text: str) -> list[Span]:
    """Offsets where each byte has its own character: a Unigram gives all bytes of a run of unknown characters the whole run."""
    parted = list(offsets)
    first = 0
    while first < len(parted):
        left, right = parted[first]
        last = first
        while last < len(parted) and parted[last] == (left, right):
            last += 1
        if right - left > 1 and last - first > 1:
            owners = [at for at in range(left, right) for _ in text[at].encode("utf-8", "surrogatepass")]
            if len(owners) == last - first:
                parted[first:last] = [(at, at + 1) for at in owners]
        first = last
    return parted


def offsets_of_ids(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text of sampled tokens and each token's characters in it, by decoding growing prefixes: nothing is tokenized again.

    Args:
        decode: a tokenizer's `decode`.
        ids: the tokens that a model generated.

    Returns:
        The decoded text, and per token its characters `[start, end)`, with the spaces before them; tokens that share a character
        of several bytes all have it, tokens that decode to nothing are empty.
    """
    text = decode(ids)
    silent = [not decode([token]) for token in ids]
    last = max((i for i, nothing in enumerate(silent) if not nothing), default=-1)
    offsets: list[Span] = []
    shown, reached = "", 0
    for i, nothing in enumerate(silent):
        prefix = decode(ids[: i + 1])
        if nothing and prefix == shown:
            offsets.append((reached, reached))
            continue
        shown, start = prefix, reached
        # A character whose bytes are still to come shows as replacement characters.
        settled = prefix if i >= last else prefix.rstrip("\ufffd")
        while len(settled) > reached and not text.startswith(settled):
            settled = settled[:-1]
        reached = max(reached, len(settled))
        begun = prefix != text[:reached]
        offsets.append((start, min(reached + begun, len(text))))
    return text, offsets


def locate_tokens(tokens: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Where the tokens of a text stand in the sequence that a processor made of it: -1 for tokens that are not there.

    A processor expands a picture's placeholder to many tokens, with separators around them, and pads; the rest of the text keeps
    its tokens and their order. So as many tokens as possible are found, in order, and of all ways to do so one that has the
    fewest gaps between neighbours; a gap where a token is missing, as a placeholder is, costs nothing.

    Inserted tokens may equal the text's. If `ids` have neither padding nor the picture's own tokens, only an insertion that holds
    all of the text between two placeholders can be taken for it. The picture's own tokens hide where a gap belongs: then an
    insertion can be taken for the edge of the text beside it. With padding, an insertion that holds all of the text between it
    and the padding can be taken for that text; and so can padding that equals all of it.
    """
    front = _shared(tokens, ids)
    back = _shared(tokens[front:][::-1], ids[front:][::-1])
    inner = _search(tokens[front : len(tokens) - back], ids[front : len(ids) - back])
    return [*range(front), *(-1 if place < 0 else front + place for place in inner), *range(len(ids) - back, len(ids))]


def _shared(tokens: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens two sequences start with together; 0 if all are the same, for these might be padding."""
    count = next((i for i, (a, b) in enumerate(zip(tokens, ids, strict=False)) if a != b), min(len(tokens), len(ids)))
    return count if len(set(tokens[:count])) > 1 else 0


def _search(tokens: Sequence[int], ids: Sequence[int]) -> list[int]:
    """`locate_tokens` without a short way, in time and memory (8 bytes) by `len(tokens) * len(ids)`."""
    gain, never = 2 * len(tokens) + 2, np.iinfo(np.int32).min // 2
    sequence = np.asarray(ids, dtype=np.int64)
    # The best scores: `gain` per token found, -2 per gap, -1 for one before or behind all tokens, as padding makes. `found[j]` is
    # where the latest token is the last of `ids[:j]`, `lost[j]` where it is missing and the others lie in `ids[:j]`.
    found, lost = np.full((2, len(sequence) + 1), never, dtype=np.int32)
    found[0] = 0
    steps = []
    for i, token in enumerate(tokens):
        reached = np.maximum.accumulate(found)
        before = np.maximum(np.maximum(found, reached - (2 if i else 1)), lost)[:-1]
        lost = np.maximum(lost, reached)
        found = np.concatenate([[never], np.where(sequence == token, before + gain, never)], dtype=np.int32)
        steps.append((found, lost))
    places = [-1] * len(tokens)
    limit, gap = len(sequence), 1
    for i in reversed(range(len(tokens))):
        found, lost = steps[i]
        scores = found[: limit + 1] - np.int32(gap)
        scores[limit] = found[limit]
        end = limit - int(scores[::-1].argmax())
        gap = 0
        if scores[end] > lost[limit]:
            places[i] = limit = end - 1
            gap = 2
    return places


def match_words(text: str | Caption, words: Iterable[str]) -> list[list[Word]]:
    """Where each of some words stands in a text, whatever its case: one list of occurrences per word, maybe empty.

    Only whole words count ("on" is not in "moon"), but in a script without spaces (see `words_of`) a part of a run counts too.
    Composed and decomposed letters are the same. What is not one word by `words_of` is nowhere.
    """
    caption = text if isinstance(text, Caption) else Caption.of(text)
    known = [(word, _fold(word.text)) for word in caption.words]
    occurrences = []
    for sought in words:
        folded = _fold(sought) if [word.text for word in words_of(sought)] == [sought] else ""
        places: list[Word] = []
        for word, folded_word in known:
            if folded_word == folded:
                places.append(word)
            elif folded and folded in folded_word and _UNSPACED.search(word.text):
                places.extend(_parts_of(word, folded))
        occurrences.append(places)
    return occurrences


def words_and(text: str, more: Iterable[str]) -> tuple[Word, ...]:
    """The words of a text, then those of `more` that are parts of runs without spaces, each where it stands."""
    words = words_of(text)
    return words + tuple(word for places in match_words(text, more) for word in places if word not in words)


def _fold(text: str) -> str:
    """What is left of a text if neither case nor the composition of its letters matters; it may be longer."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", text).casefold())


def _parts_of(word: Word, folded: str) -> list[Word]:
    """Where a folded text stands in a word, its ends at the word's or beside characters of a script without spaces."""
    marks = _same_marks(word.text)
    starts = [i for i in range(len(marks)) if i == 0 or marks[i] != "\u0300"]
    ends: dict[int, int] = {}  # places in the folded word -> in the word, of all places where a part may begin or end
    folded_word = ""
    for start, end in zip(starts, [*starts[1:], len(marks)], strict=True):
        if start == 0 or _UNSPACED.search(word.text[start - 1 : start + 1]):
            ends[len(folded_word)] = start
        folded_word += _fold(word.text[start:end])
    ends[len(folded_word)] = len(marks)
    parts = []
    at = folded_word.find(folded)
    while at >= 0:
        after = at + len(folded)
        if at in ends and after in ends:
            start, end = ends[at], ends[after]
            parts.append(Word(word.text[start:end], word.start + start, word.start + end))
            at = folded_word.find(folded, after)
        else:
            at = folded_word.find(folded, at + 1)
    return parts


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
