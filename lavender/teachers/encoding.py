"""Which token every text column of a denoiser comes from: read off what the text encoders received and gave."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from ..errors import CaptureError
from ..handle import PerThread
from ..types import Word
from ..words import match_words, words_of
from .alignment import Alignment, Form, Received, align, forms_of, is_letter, template_parts
from .tracing import Call, Source, trace

_NONE: Mapping[str, Any] = {}

_TAIL = 2
"""Tokens that may follow a text that fills its window: the end, and one of a template."""

TokenName = str | int
"""What stands in a text and not in another word, as a concept `<*>` does, for its first place; a token's string, as
`convert_ids_to_tokens` gives it, for all columns that have it; or the index of a text column."""


@dataclass(frozen=True, eq=False)
class Carried:
    """The text that an embedding carries, column by column.

    Attributes:
        text: the candidate.
        index: which of the candidates.
        columns: N tokens as strings; None for columns that come from no token that an encoder received (zeros, pictures).
    """

    text: str
    index: int
    columns: tuple[str | None, ...]
    _ways: Mapping[str, tuple[int, tuple[Alignment, ...]]]

    @property
    def equals(self) -> tuple[str, ...]:
        """The candidates that these tokens fit equally well, `text` among them, in their order.

        They were made into the same tokens: they differ in case or spaces alone, or beyond the encoder's window.
        """
        return tuple(self._ways)

    def as_text(self, text: str) -> Carried:
        """The same columns as those of another of `equals`. Raises `KeyError` for any other text."""
        return replace(self, text=text, index=self._ways[text][0])

    def weights(self, words: Sequence[Word], tokens: Sequence[TokenName] = ()) -> tuple[torch.Tensor, list[Word | TokenName]]:
        """Each column's share of each word, then of each token.

        Args:
            words: W words of `text`.
            tokens: K tokens that are no words.

        Returns:
            float32 [max(1, W + K), N] on the CPU: a word's columns share 1 evenly over the stretches of columns that have it (SD
            3 has one of CLIP's and one of T5's), in each over the encoders that lie there side by side, and in each of
            them over its tokens; and the words and tokens that no column stands for, whose rows are zero.
        """
        asked: list[Word | TokenName] = [*words, *tokens]
        weights = torch.zeros(max(1, len(asked)), len(self.columns))
        for stretch in self._stretches():
            own = torch.zeros_like(weights)
            for alignment in stretch:
                for w, columns in enumerate(
                    [*alignment.columns_of(words), *(self._standing(token, alignment) for token in tokens)]
                ):
                    if columns:
                        own[w, columns] += 1 / len(columns)
            weights += own / own.sum(dim=1, keepdim=True).clamp_min(1)
        for w, token in enumerate(tokens, start=len(words)):
            columns = [] if weights[w].any() else [c for c, name in enumerate(self.columns) if token in (c, name)]
            if columns:
                weights[w, columns] += 1 / len(columns)
        missing = [each for w, each in enumerate(asked) if not weights[w].any()]
        return weights / weights.sum(dim=1, keepdim=True).clamp_min(1), missing

    def _stretches(self) -> list[list[Alignment]]:
        """The encoders' tokens, those that share columns together."""
        stretches: list[tuple[set[int], list[Alignment]]] = []
        for alignment in self._ways[self.text][1]:
            columns = {column for each in alignment.received.columns for column in each}
            beside = [stretch for stretch in stretches if columns & stretch[0]]
            stretches = [stretch for stretch in stretches if stretch not in beside]
            joined = [each for _, alignments in beside for each in alignments]
            stretches.append((columns.union(*(others for others, _ in beside)), [*joined, alignment]))
        return [alignments for _, alignments in stretches]

    def _standing(self, token: TokenName, alignment: Alignment) -> list[int]:
        """The columns of what stands in the text without being a word, if its letters are what was tokenized."""
        if not isinstance(token, str):
            return []
        [words] = match_words(self.text, [token])
        # A concept of several vectors is written out: <*> <*>_1 <*>_2.
        vectors = rf"{re.escape(token)}(\s*{re.escape(token)}_\d+)*"
        for match in re.finditer(rf"(?={re.escape(token)})", self.text):
            place = Word(token, match.start(), match.start() + len(token))
            if place not in words and _is_inside_another(place, self.text):
                continue
            texts = [*words_of(self.text), place]
            at = texts.index(place)
            span = alignment.place(texts)[at]
            is_literal = span is not None and re.fullmatch(vectors, alignment.text[span[0] : span[1]]) is not None
            if span is not None and is_literal and (place in words or alignment.is_bordered(span)):
                return alignment.columns_of(texts)[at]
        return []


def _is_inside_another(word: Word, text: str) -> bool:
    """Whether letters stand beside a word's own, as those of "cat" do in "scat"."""
    edges = (text[: word.start][-1:], word.text[:1]), (word.text[-1:], text[word.end :][:1])
    return any(is_letter(own) and is_letter(beside) for own, beside in edges if own and beside)


def _fit(alignments: Sequence[Alignment]) -> tuple[int, int]:
    """How well a candidate fits: how many tokens are of it, and how closely."""
    return sum(len(alignment.tokens) for alignment in alignments), sum(alignment.closeness for alignment in alignments)


def _are_equal(alignments: Sequence[Alignment], others: Sequence[Alignment]) -> bool:
    return len(alignments) == len(others) and all(a.equals(b) for a, b in zip(alignments, others, strict=True))


class Texts:
    """What a pipeline's text encoders received and gave inside one `TextReader.reading()`. Tensors are references."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._calls: list[Call] = []
        self._thread = threading.get_ident()
        self._depth = 0
        self._inside: list[Call] = []
        self._forms: dict[tuple[str, str], list[Form]] = {}
        self._formed_by: Mapping[str, Any] | None = None

    def identify(
        self, embedding: torch.Tensor, candidates: Sequence[str], arguments: Mapping[str, Any] | None = None
    ) -> Carried | None:
        """Which candidate an embedding [N, C] carries, and in which columns; None if it is none of them that were encoded here.

        Args:
            embedding: one sample's text, as the denoiser gets it.
            candidates: texts; equal ones count as the first.
            arguments: of the pipeline's call or of `encode_prompt`, with defaults: some templates stand there.

        Raises:
            CaptureError: the embedding's tokens and a candidate can be aligned in several ways.
        """
        arguments = _NONE if arguments is None else arguments
        received, columns = self._received(embedding.detach(), arguments.get("max_sequence_length"))
        received = dict(sorted(received.items()))
        around = {encoder: template_parts(self.pipe, tokens.tokenizer, arguments) for encoder, tokens in received.items()}
        indices = {text: index for index, text in reversed(list(enumerate(candidates)))}

        def ways_of(text: str, *kinds: bool) -> list[list[Alignment]]:
            forms = [(own, self._forms_of(name, own.tokenizer, text, arguments), around[name]) for name, own in received.items()]
            return [next((found for kind in kinds if (found := align(*each, kind))), []) for each in forms]

        runs = {text: ways_of(text, True) for text in dict.fromkeys(candidates)}
        # Where a candidate is all of the tokens, nothing fits as well but the same tokens.
        is_told = any(found and all(len(way) == 1 and way[0].is_all for way in found) for found in runs.values())
        ways: dict[str, tuple[int, tuple[Alignment, ...]]] = {}
        fits: dict[str, tuple[bool, int, int]] = {}
        unclear = None
        for text, run in runs.items():
            found = run if is_told else ways_of(text, True, False)
            if any(len(alignments) > 1 for alignments in found):
                unclear = text
            elif any(found):
                ways[text] = indices[text], tuple(alignment for alignments in found for alignment in alignments)
                fits[text] = bool(found[0]), *_fit(ways[text][1])
        if ways:
            # `prompt` goes to the first encoder; the others may have been given another one, which is a candidate too.
            best = max(ways, key=fits.__getitem__)
            same = {text: way for text, way in ways.items() if _are_equal(way[1], ways[best][1])}
            return Carried(best, ways[best][0], columns, same)
        if unclear is not None:
            raise CaptureError(
                f"the prompt {unclear[:200]!r} stands several times among the tokens that the text encoder of this "
                f"{type(self.pipe).__name__} received, in its template for one; lavender does not know which is meant. Word it "
                "otherwise, or record with patch.capture(word_weights)"
            )
        return None

    @property
    def received(self) -> list[str]:
        """What the text encoders received, as text, each once: for messages."""
        texts: dict[str, None] = {}
        for call in self._calls:
            tokenizer = tokenizer_of(self.pipe, call.encoder)
            if tokenizer is not None:
                for row in call.tokens:
                    texts[tokenizer.decode([token for token in row if token not in _special_ids(tokenizer)]).strip()] = None
        return list(texts)

    def _received(self, embedding: torch.Tensor, limit: int | None) -> tuple[dict[str, Received], tuple[str | None, ...]]:
        """Per encoder the tokens that the embedding comes from; and per column its token."""
        tokenizers = {call.encoder: tokenizer_of(self.pipe, call.encoder) for call in self._calls}
        special = {encoder: _special_ids(tokenizer) for encoder, tokenizer in tokenizers.items() if tokenizer is not None}
        calls = [call for call in self._calls if call.encoder in special]
        received: dict[str, Received] = {}
        columns: list[str | None] = [None] * len(embedding)
        for encoder, sources in trace(embedding, calls, special).items():
            tokenizer = tokenizers[encoder]
            ids = [source and calls[source[0]].id_at(*source[1:]) for source in sources]
            names = tokenizer.convert_ids_to_tokens([token or 0 for token in ids])
            for column, (token, name) in enumerate(zip(ids, names, strict=True)):
                if token is not None and columns[column] is None:
                    columns[column] = name
            received[encoder] = _tokens_of(tokenizer, calls, sources, special[encoder], limit)
        return received, tuple(columns)

    def _forms_of(self, encoder: str, tokenizer: Any, text: str, arguments: Mapping[str, Any]) -> list[Form]:
        """A candidate's forms, which are made once for all samples of a call."""
        if self._formed_by is not arguments:
            self._forms, self._formed_by = {}, arguments
        if (encoder, text) not in self._forms:
            self._forms[encoder, text] = forms_of(self.pipe, encoder, tokenizer, text, arguments)
        return self._forms[encoder, text]

    def _began(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of what takes token ids."""
        if self._is_read_here():
            self._depth += 1

    def _ended(self, encoder: str, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not self._is_read_here():
            return
        self._depth -= 1
        ids = kwargs.get("input_ids", next(iter(args), None))
        if isinstance(ids, torch.Tensor) and ids.ndim == 2 and not ids.is_floating_point() and output is not None:
            call = Call(encoder, ids)
            for state in _states_of(output):
                call.add(state)
            if call.states:
                self._inside.append(call)
        if self._depth == 0 and self._inside:
            # What a part of the encoder gave counts where the whole gave nothing, as a language model's logits alone.
            self._calls.append(self._inside[-1])
            self._inside.clear()

    def _normalized(self, encoder: str, args: tuple, output: Any) -> None:
        """Clip skip's pipelines call the encoder's last norm themselves."""
        latest = self._calls[-1] if self._calls else None
        if latest is not None and self._is_read_here() and self._depth == 0 and latest.encoder == encoder:
            for state in _states_of(output):
                latest.add(state)

    def _is_read_here(self) -> bool:
        return threading.get_ident() == self._thread and TextReader.innermost.get() is self


class TextReader:
    """Reads what a pipeline's text encoders do; see `reading`. It puts hooks on them only while it reads.

    Attributes:
        pipe: the pipeline.
    """

    innermost: PerThread[Texts] = PerThread()
    """What each thread's forwards are recorded by, of all readers."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @property
    def is_reading(self) -> bool:
        """Whether this thread's forwards are recorded for this pipeline now, by any reader."""
        innermost = self.innermost.get()
        return innermost is not None and innermost.pipe is self.pipe

    @contextmanager
    def reading(self) -> Iterator[Texts]:
        """Records this thread's forwards of the text encoders inside the `with` block.

        A block inside the block, of this reader or of another, has the forwards for itself: so a callback's are kept apart.
        """
        texts = Texts(self.pipe)
        outer = self.innermost.take()
        self.innermost.put(texts)
        with ExitStack() as hooks:
            try:
                for name, component in text_encoders_of(self.pipe).items():
                    _hook(component, name, texts, hooks)
                yield texts
            finally:
                self.innermost.take()
                if outer is not None:
                    self.innermost.put(outer)


def text_encoders_of(pipe: Any) -> dict[str, nn.Module]:
    """The components of a pipeline that take token ids, by attribute."""
    modules = {name: part for name, part in vars(pipe).items() if isinstance(part, nn.Module)}
    return {name: part for name, part in modules.items() if any(_takes_ids(type(module).forward) for module in part.modules())}


def tokenizer_of(pipe: Any, encoder: str) -> Any:
    """The tokenizer of a text encoder, by its attribute's name; the only one of a pipeline that has one. None if there is none."""
    tokenizers = {}
    for name, part in vars(pipe).items():
        for tokenizer in (part, getattr(part, "tokenizer", None)):  # a processor has one
            if name not in tokenizers and hasattr(tokenizer, "convert_ids_to_tokens"):
                tokenizers[name] = tokenizer
    only = next(iter(tokenizers.values())) if len(tokenizers) == 1 else None
    return tokenizers.get(encoder.replace("text_encoder", "tokenizer"), only)


@cache
def _takes_ids(forward: Callable[..., Any]) -> bool:
    return "input_ids" in inspect.signature(forward).parameters


def _hook(component: nn.Module, name: str, texts: Texts, hooks: ExitStack) -> None:
    def ended(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        texts._ended(name, args, kwargs, output)

    def normalized(module: nn.Module, args: tuple, output: Any) -> None:
        texts._normalized(name, args, output)

    if component._compiled_call_impl is not None:  # hooks would be traced, or passed by
        hooks.callback(setattr, component, "_compiled_call_impl", component._compiled_call_impl)
        component._compiled_call_impl = _watched(component._compiled_call_impl, texts, component, ended)
        return
    # Of what torch.compile wraps, the wrapper alone: hooks below it would be traced.
    modules = [("", component)] if hasattr(component, "_orig_mod") else component.named_modules()
    for path, module in modules:
        if path and not _takes_ids(type(module).forward):
            if "norm" in type(module).__name__.casefold() and not any(part.isdigit() for part in path.split(".")):
                hooks.callback(module.register_forward_hook(normalized).remove)
        else:
            hooks.callback(module.register_forward_pre_hook(texts._began, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(ended, with_kwargs=True, always_call=True).remove)


def _watched(call: Callable[..., Any], texts: Texts, module: nn.Module, ended: Callable[..., None]) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        texts._began(module, args, kwargs)
        output = None
        try:
            output = call(*args, **kwargs)
        finally:
            ended(module, args, kwargs, output)
        return output

    return watched


def _states_of(output: Any) -> Iterator[torch.Tensor]:
    """The hidden states [B, L, C] in a text encoder's output: a named one, a tuple, or a tensor."""
    if isinstance(output, torch.Tensor):
        if output.ndim == 3 and output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for name, value in output.items():
            if "hidden_state" in name:
                yield from _states_of(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _states_of(value)


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that stand for no text: the special ones, and those that the tokenizer puts around every text."""
    return frozenset(tokenizer.all_special_ids) | frozenset(tokenizer("").input_ids)


def _tokens_of(
    tokenizer: Any, calls: Sequence[Call], sources: Sequence[Source | None], special: frozenset[int], limit: int | None
) -> Received:
    """The tokens that some columns come from: all of a row's, or, where several rows were put together, those of the columns.

    `limit` is how many tokens the pipeline's call allows, if it says so.
    """
    known = [source for source in sources if source is not None]
    texts = {source for source in known if calls[source[0]].id_at(*source[1:]) not in special}
    rows = list(dict.fromkeys(source[:2] for source in known if not texts or source in texts))
    if len(rows) == 1:
        call, row = rows[0]
        ids = calls[call].tokens[row]
        columns: list[list[int]] = [[] for _ in ids]
        for column, source in enumerate(sources):
            if source is not None and source[:2] == rows[0]:
                columns[source[2]].append(column)
        last = max((position for position, token in enumerate(ids) if token not in special), default=0)
        num_padding = sum(token == tokenizer.pad_token_id for token in ids) if tokenizer.padding_side == "left" else 0
        is_full = len(ids) - 1 - last <= _TAIL and (num_padding == 0 or len(ids) - num_padding == limit)
        return Received(tokenizer, ids, columns, special, is_full)
    read = [(source, column) for column, source in enumerate(sources) if source in texts]
    ids = [calls[source[0]].id_at(*source[1:]) for source, _ in read]
    end = read[-1][0] if read else None
    is_full = end is not None and len(calls[end[0]].tokens[end[1]]) - 1 - end[2] <= _TAIL
    return Received(tokenizer, ids, [[column] for _, column in read], special, is_full)
