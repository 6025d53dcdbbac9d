"""Which words of an answer are aligned, and with which words of a caption: by letters, by case, by spaCy's lemmas and tags."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..config import PartOfSpeech, WordsConfig
from ..errors import ConfigError, install_command
from ..types import Word
from ..words import Caption, match_words

CACHED_TEXTS = 4096
"""Texts whose tags are kept; the least recently used are forgotten."""

_PARTS: dict[str, PartOfSpeech] = {"NOUN": "noun", "PROPN": "noun", "ADJ": "adjective", "VERB": "verb"}
# Dependency labels of English pipelines (ClearNLP), of most others (Universal Dependencies; what follows a colon is cut off) and of
# German ones (TIGER).
_SUBJECTS = {"nsubj", "nsubjpass", "csubj", "csubjpass", "sb", "sbp"}
_OBJECTS = {"dobj", "obj", "iobj", "dative", "pobj", "oa", "oa2", "da", "og"}
_ATTRIBUTES: dict[str, str] = {"noun": "pos", "adjective": "pos", "verb": "pos", "subject": "dep", "object": "dep"}


class _Token(NamedTuple):
    """One token of spaCy's: its characters `[start, end)`, its lemma whatever its case, and what it is in its sentence."""

    start: int
    end: int
    lemma: str
    parts: frozenset[PartOfSpeech]


class WordSelector:
    """Which words of an answer are aligned, and with which words of a caption: `WordsConfig` at work.

    Texts are tagged as a whole, once, and the last `CACHED_TEXTS` of them are kept. A pickled selector names its pipeline and
    loads it again where it is first used, so that a worker process receives no weights.
    """

    def __init__(self, config: WordsConfig) -> None:
        """Raises `ConfigError` if spaCy or the pipeline is missing, or if the pipeline lacks a component that the config needs."""
        self.config = config
        self._excluded = frozenset(_fold_case(word) for word in config.exclude)
        self._tokens = self._load() if config.tagger else None

    def selected(self, answer: str, words: Sequence[Word]) -> list[bool]:
        """Per word of an answer whether it is aligned: not excluded, and one of `parts_of_speech` if there are any.

        A word of several tokens ("red-haired", "don't") is what any of them is. Auxiliaries ("is", "has") are no verbs, and
        "a cat and a dog" are both what the first is. Function words are not dropped here.
        """
        wanted = set(self.config.parts_of_speech)
        return [
            _fold_case(word.text) not in self._excluded
            and (not wanted or any(wanted & token.parts for token in self._tokens_of(answer, word)))
            for word in words
        ]

    def occurrences(self, caption: Caption, answer: str, words: Sequence[Word]) -> list[list[Word]]:
        """Where each of the given words of an answer stands in a caption by `match`: W lists, in the order of the caption.

        Composed and decomposed letters are the same, and in a script without spaces a part of a run is a word too, as
        `lavender.words.match_words` has it. `root` compares the lemmas of all of a word's tokens.
        """
        occurrences = match_words(caption, [word.text for word in words])
        if self.config.match == "exact":
            return [
                [other for other in same if unicodedata.normalize("NFC", other.text) == unicodedata.normalize("NFC", word.text)]
                for word, same in zip(words, occurrences, strict=True)
            ]
        if self.config.match == "root":
            known = [(other, self._lemmas(caption.text, other)) for other in caption.words]
            for word, same in zip(words, occurrences, strict=True):
                lemmas = self._lemmas(answer, word)
                same += [other for other, other_lemmas in known if lemmas and other_lemmas == lemmas and other not in same]
                same.sort(key=lambda other: other.start)
        return occurrences

    def dense(self, maps: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Which of K maps [K, y, x] are dense, bool [K]: at least `min_coverage` of the places reach (min + max) / 2.

        A map with NaN in it is not dense.
        """
        values = np.asarray(maps, dtype=np.float64)
        middle = (values.min(axis=(1, 2), keepdims=True) + values.max(axis=(1, 2), keepdims=True)) / 2
        coverage = (values >= middle).mean(axis=(1, 2))
        return (coverage >= self.config.min_coverage) & ~np.isnan(values).any(axis=(1, 2))

    def _tokens_of(self, text: str, word: Word) -> list[_Token]:
        if self._tokens is None:
            self._tokens = self._load()
        return [token for token in self._tokens(text) if max(token.start, word.start) < min(token.end, word.end)]

    def _lemmas(self, text: str, word: Word) -> list[str]:
        """The lemmas of a word's tokens; none if a token reaches beyond it, for its lemma is not the word's then."""
        tokens = self._tokens_of(text, word)
        inside = all(word.start <= token.start and token.end <= word.end for token in tokens)
        return [token.lemma for token in tokens] if inside else []

    def _load(self) -> Callable[[str], tuple[_Token, ...]]:
        nlp = _load_pipeline(self.config)

        @lru_cache(maxsize=CACHED_TEXTS)
        def tokens(text: str) -> tuple[_Token, ...]:
            return tuple(_Token(t.idx, t.idx + len(t), _fold_case(t.lemma_ or t.text), _parts_of(t)) for t in nlp(text))

        return tokens

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokens": None}


def _fold_case(text: str) -> str:
    """The text by which words are compared where neither case nor the composition of letters matters."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())


def _parts_of(token: Any) -> frozenset[PartOfSpeech]:
    parts: set[PartOfSpeech] = {_PARTS[token.pos_]} if token.pos_ in _PARTS else set()
    while token.dep_ == "conj" and token.head.i != token.i:
        token = token.head
    label = token.dep_.split(":")[0]
    if label in _SUBJECTS:
        parts.add("subject")
    # Universal Dependencies have no label for the object of a preposition: its noun depends on the verb or another noun, and the
    # preposition on it. A possessive ("nmod:poss") has a "case" too, but no preposition.
    governed = label == "obl" or token.dep_ == "nmod"
    if label in _OBJECTS or (governed and any(child.dep_ == "case" for child in token.children)):
        parts.add("object")
    return frozenset(parts)


def _load_pipeline(config: WordsConfig) -> Any:
    try:
        import spacy
    except ImportError as error:
        raise ConfigError(
            f"tagger={config.tagger!r} needs spaCy, which cannot be imported ({error}); {install_command('spacy')}"
        ) from None
    try:
        nlp = spacy.load(config.tagger)
    except (OSError, ValueError, ImportError) as error:
        remedy = (
            "give a folder that nlp.to_disk wrote"
            if Path(config.tagger).exists() or Path(config.tagger).name != config.tagger
            else f"install it with `python -m spacy download {config.tagger}`, or give the folder of a pipeline"
        )
        raise ConfigError(
            f"cannot load the spaCy pipeline {config.tagger!r} ({str(error).strip().splitlines()[0]}); {remedy}"
        ) from None
    needs = {f"parts_of_speech={part!r}": _ATTRIBUTES[part] for part in config.parts_of_speech}
    if config.match == "root":
        needs["match='root'"] = "lemma"
    assigned = _attributes_of(nlp)
    for setting, attribute in needs.items():
        if attribute not in assigned:
            raise ConfigError(
                f"{setting} needs a spaCy pipeline that sets token.{attribute}; the components of {config.tagger!r} "
                f"({', '.join(nlp.pipe_names) or 'none'}) do not say that they do. Take another pipeline, or add "
                f'assigns=["token.{attribute}"] to the decorator of a component of your own'
            )
    return nlp


def _attributes_of(nlp: Any) -> set[str]:
    """Which of pos, lemma and dep the active components of a pipeline set, as they declare."""
    assigned: set[str] = set()
    for name, component in nlp.pipeline:
        assigned.update(attribute.removeprefix("token.") for attribute in nlp.get_pipe_meta(name).assigns)
        # An attribute ruler declares nothing: what it sets is in its patterns.
        if nlp.get_pipe_meta(name).factory == "attribute_ruler":
            assigned.update(str(key).lower() for pattern in component.patterns for key in pattern["attrs"])
    return assigned
