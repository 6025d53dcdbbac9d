"""What becomes of the samples of a batch: counted, and the first of each kind logged with its remedy."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from ..config import WordsConfig
from ..errors import DataError
from ..types import OUTCOMES, WHOLE_PICTURE, Box, WordBatch
from .aligned_words import TurnWord
from .chat_template import ChatText, Turn

if TYPE_CHECKING:
    from ..targets.store import Target, TargetStore

logger = logging.getLogger("lavender")


@dataclass(frozen=True)
class Unusable:
    """In the place of a sample of which it is known, and was said, that it cannot be used, and why: a stand-in takes its place."""

    id: str
    reason: str


@dataclass(frozen=True, eq=False)
class Item:
    """One sample of a batch: its text, its pictures, and what is compared.

    Attributes:
        id: the sample's.
        images: its pictures, in the order of their places in the text.
        chat: its text.
        targets: the teacher's maps of one picture, per caption.
        image: index of the picture that words are looked for in; None without one.
        words: the words that may be compared.
        by_picture: whether the targets were found by one of several pictures, and not by the sample's id.
        skipped: whether it stands for a sample that was skipped.
    """

    id: str
    images: list[Image.Image]
    chat: ChatText
    targets: tuple[Target, ...]
    image: int | None
    words: tuple[TurnWord, ...]
    by_picture: bool = False
    skipped: bool = False

    @property
    def answers(self) -> list[Turn]:
        """The answers that the picture stands before."""
        return [turn for turn in self.chat.turns if self.image is not None and self.image < turn.num_images]

    @property
    def crop(self) -> Box:
        """The part of the picture that the targets show."""
        return self.targets[0].word_maps.crop if self.targets else WHOLE_PICTURE

    def shows(self, word: TurnWord) -> bool:
        """Whether a word is of the compared picture and not of another, as far as the sample tells."""
        if not self.by_picture or (word.region is not None and (word.region.is_place or word.region.image is not None)):
            return True
        is_caption = word.role != "question" and any(word.said == target.word_maps.caption.strip() for target in self.targets)
        return is_caption or word.num_images - 1 == self.image

    @property
    def has_maps(self) -> bool:
        """Whether there is anything to compare its words with."""
        return bool(self.targets) or any(word.region is not None and word.region.is_place for word in self.words)

    def require_shown(self) -> None:
        """Raises `DataError` if words of answers are to be compared, and the template shows none of these answers to the letter."""
        behind = {turn.message: turn for turn in self.answers}
        compared = {word.turn for word in self.words if word.turn in behind and word.role == "answer"}
        if compared and not compared & self.chat.passages.keys():
            turn = behind[max(compared)]
            raise DataError(
                f"sample {self.id!r}: the chat template changes the answer {turn.answer!r} to "
                f"{self.chat.text[turn.start : turn.answer_end]!r}, in which its words cannot be found; give it as the template "
                "writes it"
            )


class Outcomes:
    """Says what becomes of samples, as an index into `OUTCOMES`, and logs the first of each kind.

    Attributes:
        words: which words are compared.
        targets: the store; None where there is none.
        max_length: by which samples are cut.
        trains: whether words have maps to be compared with, from a store or from regions.
    """

    def __init__(self, words: WordsConfig, targets: TargetStore | None, max_length: int | None, *, trains: bool) -> None:
        self.words = words
        self.targets = targets
        self.max_length = max_length
        self.trains = trains
        self._warned: set[str] = set()

    def of(self, item: Item, compared: bool, cut: bool) -> int:
        """The outcome of a sample of which a word at least is compared, or would be if it were not cut off."""
        if item.skipped:
            return OUTCOMES.index("skipped")
        if compared:
            return OUTCOMES.index("matched")
        name = f"sample {item.id!r}"
        if self.trains and not item.has_maps:
            outcome = "no target"
            lack = "region" if self.targets is None else f"target in {self.targets.folder}"
            remedy = "give it regions" if self.targets is None else "extract targets for it"
            message = f"{name} has no {lack}, and trains the language model alone; {remedy}"
        elif cut:
            outcome = "cut off"
            message = f"max_length={self.max_length} cuts the answer of {name} off before its words; raise it"
        else:
            outcome = "no word matched"
            message = f"no word of {name} is compared: {self._lack(item)}"
        self._warn(outcome, f"{message}. (Logged once; {WordBatch.KEYS['outcomes']} counts the others.)")
        return OUTCOMES.index(outcome)

    def note_hidden(self, item: Item) -> None:
        """Logs a message whose words are not compared since the template changes them."""
        hidden = sorted({word.turn for word in item.words if not word.spans})
        if hidden and not item.skipped:
            self._warn(
                "hidden",
                f"sample {item.id!r}: the chat template does not show message {hidden[0] + 1} once and to the letter; its words "
                "cannot be found in the text, and are not compared. Give it as the template writes it. (Logged once.)",
            )

    def note_region(self, item: Item, word: TurnWord, sees: bool) -> None:
        """Logs a region that is not compared."""
        region = word.region
        if region is None:
            return
        where = f"the region of {_place_of(word)} of sample {item.id!r}"
        if not sees:
            lack = "its picture does not stand before it, max_length cuts it off, or the template does not show it to the letter"
        elif region.is_place:
            lack = "it lies outside of the part of the picture that student and targets show, or is the same all over that part"
        elif not item.targets:
            lack = f"the sample has no targets, which would have a map for its word {region.word!r}"
        elif not isinstance(region.word, str) and len(item.targets) > 1:
            lack = f"the picture's targets have {len(item.targets)} captions; give a word itself, and not its characters"
        else:
            lack = f"the targets' caption {item.targets[0].word_maps.caption!r} has no map for its word {region.word!r}"
        self._warn("region", f"{where} is not compared: {lack}. (Logged once.)")

    def note_other_picture(self, item: Item, word: TurnWord) -> None:
        """Logs a word that is not compared since it may be of another picture."""
        self._warn(
            "other picture",
            f"sample {item.id!r} has {len(item.images)} pictures, and targets that were found by picture {(item.image or 0) + 1}; "
            f"another stands before {_place_of(word)}, and words behind others are not compared. "
            "Make a sample of each picture, or give regions their image. (Logged once.)",
        )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s", message)

    def _lack(self, item: Item) -> str:
        if not item.answers:
            return "no picture stands before its answer; put one into a message of the user's before it"
        answer, captions = item.answers[-1].answer, [target.word_maps.caption for target in item.targets]
        if any(word.region is not None for word in item.words):
            return "its regions cannot be compared, or have no maps (the first of such is named by a line of its own)"
        if not all(map(item.shows, item.words)):
            return f"they may be of other pictures than picture {(item.image or 0) + 1}, which has targets; make a sample of each"
        if not captions:
            return f"its answer {answer!r} has no words that name something, or {self.words} leaves them out"
        if any(turn.answer.strip() in {caption.strip() for caption in captions} for turn in item.answers):
            return f"its words have no maps, do not see the target's picture, or are left out by {self.words}; loosen that"
        return (
            f"its answer is {answer!r}, and its target was made from {captions[0]!r}; extract targets "
            f"from captions that share words with the answers, or loosen {self.words}"
        )


def _place_of(word: TurnWord) -> str:
    return (
        f"{word.word.text!r} in message {word.turn + 1}" if word.word.text else f"the prompt's end before message {word.turn + 1}"
    )
