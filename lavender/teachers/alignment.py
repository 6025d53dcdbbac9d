"""Where a prompt stands among the tokens that a text encoder received: proved by the tokens themselves, or not at all."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import groupby
from typing import Any

from ..types import Span, Word
from ..words import offsets_of_ids, tokens_of, words_of
from .prompts import Arguments, PlacedWords, cleaned, converted, known_parts, locate_words, plain, preprocessed

_MARKUP = re.compile(r"<[^<>]*>|[:)]\s*[-+]?\d+(?:\.\d+)?|\b(?:AND|BREAK)\b")
"""What pipelines with weighted prompts take out of them, punctuation apart: weights, names of adapters, operators."""

_TEMPLATE = re.compile(r"template|system|instruction|message", re.IGNORECASE)
"""Names of the texts that pipelines put around a prompt."""

_ROLES = "system user assistant"
"""Whose turn it is: chat templates get this from the messages."""

Place = Callable[[Sequence[Word]], list[Span | None]]
"""Where the words of a prompt stand in the text that it was made into."""


@dataclass(frozen=True, eq=False)
class Received:
    """The tokens of one text encoder, in order.

    Attributes:
        tokenizer: the one that made them.
        ids: the tokens.
        columns: per token the text columns that come from it.
        special: ids that stand for no text.
        is_full: whether the text may have been cut at its end.
    """

    tokenizer: Any
    ids: list[int]
    columns: list[list[int]]
    special: frozenset[int]
    is_full: bool

    @cached_property
    def plain(self) -> list[int]:
        """The indices of the tokens that are no special ones."""
        return [index for index, token in enumerate(self.ids) if token not in self.special]

    @cached_property
    def pieces(self) -> list[tuple[str, list[int]]]:
        """The letters that the tokens spell, and the indices of the tokens of each run of them."""
        text, offsets = offsets_of_ids(self.tokenizer.decode, [self.ids[index] for index in self.plain])
        pieces: list[tuple[str, list[int]]] = []
        owners: dict[int, int] = {}  # of each letter, its piece
        for piece, start, end in _pieces(text):
            owners |= dict.fromkeys(range(start, end), len(pieces))
            pieces.append((piece, []))
        for index, span in zip(self.plain, offsets, strict=True):
            for owner in sorted({owners[at] for at in range(*span) if at in owners}):
                pieces[owner][1].append(index)
        return pieces

    @cached_property
    def spelled(self) -> frozenset[str]:
        """What these pieces are."""
        return frozenset(piece for piece, _ in self.pieces)

    @property
    def is_exact(self) -> bool:
        """Whether there is no padding: a longer text is cut to these very tokens."""
        return len(self.ids) - len(self.plain) == len(self.tokenizer("").input_ids)

    def reaches(self, indices: Sequence[int]) -> bool:
        """Whether any of some tokens reaches the embedding."""
        return any(self.columns[index] for index in indices)


@dataclass(frozen=True, eq=False)
class Alignment:
    """A prompt among the tokens of one encoder.

    Attributes:
        received: those tokens.
        text: the text that the prompt was made into.
        spans: per token its characters in `text`; empty for those that are not of it.
        place: where the words of the prompt stand in `text`.
        is_run: whether the text stands there token by token, and not its words alone.
        is_whole: whether its end is there.
    """

    received: Received
    text: str
    spans: list[Span]
    place: Place
    is_run: bool
    is_whole: bool

    @property
    def tokens(self) -> list[int]:
        """The tokens that are of the text."""
        return [token for token, (start, end) in enumerate(self.spans) if end > start]

    @property
    def is_all(self) -> bool:
        """Whether there is no token that is not of the text."""
        return self.closeness == 2 and self.tokens == self.received.plain

    @property
    def closeness(self) -> int:
        """2 where the text stands there token by token, 1 where its words do, 0 where its end is not there."""
        return (2 if self.is_run else 1) if self.is_whole else 0

    def equals(self, other: Alignment) -> bool:
        """Whether another prompt stands in the same tokens as well as this one."""
        is_same = self.received is other.received and self.tokens == other.tokens
        is_cut = self.is_run and other.is_run and self.received.is_exact
        return is_same and (self.closeness == other.closeness or is_cut)

    def is_bordered(self, span: Span) -> bool:
        """Whether tokens begin and end where some characters of `text` do, white space at a token's ends not counted."""
        start, end = span
        for left, right in self.spans:
            token = self.text[left:right]
            left, right = right - len(token.lstrip()), left + len(token.rstrip())
            if max(left, start) < min(right, end) and not start <= left < right <= end:
                return False
        return True

    def columns_of(self, words: Sequence[Word]) -> list[list[int]]:
        """The text columns of every word."""
        columns = self.received.columns
        return [
            sorted({c for token in tokens_of(span, self.spans, self.text) for c in columns[token]}) if span else []
            for span in self.place(words)
        ]


@dataclass(frozen=True, eq=False)
class Form:
    """A text that a prompt may have been made into, for one tokenizer.

    Attributes:
        text: the text.
        tokens: its tokens, without those that are put around it.
        offsets: their characters.
        tokenized: the text that these are counted in.
        place: where the words of the prompt stand in `text`.
        place_tokenized: where they stand in `tokenized`.
    """

    text: str
    tokens: list[int]
    offsets: list[Span]
    tokenized: str
    place: Place
    place_tokenized: Place

    @cached_property
    def pieces(self) -> list[tuple[str, int, int]]:
        """See `_pieces`."""
        return list(_pieces(self.text))

    @cached_property
    def optional(self) -> list[bool]:
        """Of each piece, whether it is markup."""
        markup = [match.span() for match in _MARKUP.finditer(self.text)]
        return [any(left <= start and end <= right for left, right in markup) for _, start, end in self.pieces]

    @cached_property
    def needed(self) -> frozenset[str]:
        """The pieces that are no markup."""
        return frozenset(piece for (piece, _, _), optional in zip(self.pieces, self.optional, strict=True) if not optional)


def align(received: Received, forms: Sequence[Form], around: frozenset[str], is_run: bool) -> list[Alignment]:
    """The ways in which a prompt stands among an encoder's tokens: none, one, or several, of which none is proved.

    Args:
        received: the tokens.
        forms: the prompt as the pipeline is known to clean it and to put it into a template, and as it is; see `forms_of`.
        around: what may stand around it; see `template_parts`.
        is_run: whether its tokens must stand there as one run. Else its words must: all of them but weights and other markup, in
            order and without anything between them.
    """
    find = _as_run if is_run else _as_words
    return next((alignments for form in forms if (alignments := find(received, form, around))), [])


def forms_of(pipe: Any, encoder: str, tokenizer: Any, prompt: str, arguments: Arguments) -> list[Form]:
    """The texts that a prompt may have been made into."""
    # The tables say what a class's own encode_prompt does; a modular pipeline has none.
    parts = known_parts(pipe) if hasattr(pipe, "encode_prompt") else ()
    makers = [part.text for part in parts if part.encoder == encoder]
    forms: dict[str, Form] = {}
    for make in (*makers, preprocessed, cleaned, converted, plain):
        text = make(pipe, tokenizer, prompt, (), arguments)[0]
        if text not in forms:
            place = partial(_place, partial(make, pipe, tokenizer, prompt), arguments)
            ids, offsets, tokenized, place_tokenized = _tokenize(tokenizer, text, place)
            forms[text] = Form(text, ids, offsets, tokenized, place, place_tokenized)
    return list(forms.values())


def _place(make: Callable[..., PlacedWords], arguments: Arguments, words: Sequence[Word]) -> list[Span | None]:
    return make(words, arguments)[1]


def template_parts(pipe: Any, tokenizer: Any, arguments: Arguments) -> frozenset[str]:
    """What stands in the templates that a pipeline has: in its package and itself, its call's arguments and its tokenizer."""
    chat = getattr(tokenizer, "chat_template", None)
    mro = type(pipe).__mro__
    packages = {f"{base.__module__.rpartition('.')[0]}." for base in mro if "." in base.__module__}
    # Those alone that hold no other: diffusers as a whole has everybody's templates.
    packages = {each for each in packages if not any(other != each and other.startswith(each) for other in packages)}
    named = [(name, value) for space in (*map(vars, mro), vars(pipe), arguments) for name, value in space.items()]
    texts = [value for name, value in named if _TEMPLATE.search(name)]
    return _parts_within([*texts, chat, _ROLES if chat else ""]) | _parts_of_packages(tuple(sorted(packages)))


@cache
def _parts_of_packages(packages: tuple[str, ...]) -> frozenset[str]:
    """What stands in the templates of the modules of some packages."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(packages)]
    named = [each for module in modules for each in vars(module).items()]
    return _parts_within([value for name, value in named if _TEMPLATE.search(name)])


def _parts_within(texts: Sequence[Any]) -> frozenset[str]:
    """What stands in texts, and in lists and tables of them."""
    pending, parts = list(texts), set()
    while pending:
        text = pending.pop()
        if isinstance(text, str):
            parts |= _parts(text)
        elif isinstance(text, Mapping):
            pending.extend(text.values())
        elif isinstance(text, list | tuple):
            pending.extend(text)
    return frozenset(parts)


def _as_run(received: Received, form: Form, around: frozenset[str]) -> list[Alignment]:
    text, place = form.tokenized, form.place_tokenized
    if not form.tokens:
        return [_aligned(received, text, place, {}, True, True)] if _is_template(received, (), around) else []
    ids, tokens = received.ids, form.tokens
    whole, cut = [], []
    for start in (start for start, token in enumerate(ids) if token == tokens[0]):
        count = next((n for n, (a, b) in enumerate(zip(tokens, ids[start:], strict=False)) if a != b), None)
        if count is None and len(ids) - start >= len(tokens):
            whole.append(range(start, start + len(tokens)))
        elif received.is_full:
            end = len(ids) if count is None else start + count
            if end == len(ids) or ids[end] in received.special:
                cut.append(range(start, end))
    runs = [run for run in whole or cut if received.reaches(run) and _is_template(received, run, around)]
    return [_aligned(received, text, place, dict(zip(run, form.offsets, strict=False)), True, bool(whole)) for run in runs]


def _as_words(received: Received, form: Form, around: frozenset[str]) -> list[Alignment]:
    pieces = form.pieces
    if not received.is_full and not form.needed <= received.spelled:
        return []
    marks = frozenset(character for character in form.text if not character.isalnum())
    alignments = []
    for found in _walks([piece for piece, _, _ in pieces], form.optional, received):
        indices = sorted({token for at in found.values() for token in received.pieces[at][1]})
        if received.reaches(indices) and _is_template(received, indices, around | marks):
            spans: dict[int, Span] = {}
            for piece, at in found.items():
                for token in received.pieces[at][1]:
                    start, end = spans.get(token, pieces[piece][1:])
                    spans[token] = min(start, pieces[piece][1]), max(end, pieces[piece][2])
            alignments.append(_aligned(received, form.text, form.place, spans, False, max(found) == len(pieces) - 1))
    return alignments


def _walks(pieces: Sequence[str], optional: Sequence[bool], received: Received) -> Iterator[dict[int, int]]:
    """The ways to find all pieces but optional ones, side by side, in what was received: piece -> its index there."""
    spelled = [piece for piece, _ in received.pieces]
    if all(optional):
        return
    for start in range(len(spelled)):
        open_walks: list[tuple[int, int, dict[int, int]]] = [(0, start, {})]
        while open_walks:
            piece, at, found = open_walks.pop()
            if piece == len(pieces) or (at == len(spelled) and received.is_full):
                if any(not optional[each] for each in found):
                    yield found
                continue
            if optional[piece]:
                open_walks.append((piece + 1, at, found))
            if at < len(spelled) and spelled[at] == pieces[piece]:
                open_walks.append((piece + 1, at + 1, {**found, piece: at}))


def _is_template(received: Received, but: Sequence[int], around: frozenset[str]) -> bool:
    """Whether all tokens but some are special ones or of a template."""
    inside = set(but)
    rest = [received.ids[index] for index in received.plain if index not in inside]
    return around.issuperset(_parts(received.tokenizer.decode(rest)))


def _aligned(received: Received, text: str, place: Place, spans: Mapping[int, Span], is_run: bool, is_whole: bool) -> Alignment:
    placed = [spans.get(index, (0, 0)) for index in range(len(received.ids))]
    return Alignment(received, text, placed, place, is_run, is_whole)


def _pieces(text: str) -> Iterator[tuple[str, int, int]]:
    """The runs of letters and digits of a text, in one composition and case, and their characters.

    They are what is left of a word wherever a vocabulary or a decoder puts spaces.
    """
    for is_piece, run in groupby(enumerate(text), lambda each: is_letter(each[1])):
        if is_piece:
            places = [at for at, _ in run]
            start, end = places[0], places[-1] + 1
            yield unicodedata.normalize("NFKC", text[start:end]).casefold(), start, end


def _parts(text: str) -> set[str]:
    """The pieces of a text, and every other character but white space."""
    return {piece for piece, _, _ in _pieces(text)} | {c for c in text if not (is_letter(c) or c.isspace())}


def is_letter(character: str) -> bool:
    """Whether a character is a letter or a digit, or a mark on one."""
    return character.isalnum() or unicodedata.category(character)[0] == "M"


def _tokenize(tokenizer: Any, text: str, place: Place) -> tuple[list[int], list[Span], str, Place]:
    """A text's tokens without those that are put around it, their characters, and the text that these are counted in."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded.input_ids, encoded.offset_mapping, text, place
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    decoded, spans = offsets_of_ids(tokenizer.decode, ids)
    if decoded == text:
        return ids, spans, text, place
    texts = words_of(text)
    moved = {word.start: span for word, span in zip(texts, locate_words(texts, decoded), strict=True)}
    return ids, spans, decoded, lambda words: [span and moved.get(span[0]) for span in place(words)]
