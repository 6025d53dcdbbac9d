"""Batches for a patched student: the processor's tensors, labels, and which words and image tokens are compared."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..config import WordsConfig
from ..data.samples import Conversation, Sample, as_conversation
from ..errors import ConfigError, DataError, TargetError
from ..images import image_sha256, load_image
from ..students.boxes import boxes_within
from ..students.families import Pictures, student_family
from ..students.image_tokens import image_token_of, model_type_of, place_columns, require_pair
from ..types import WHOLE_PICTURE, Span, Word
from ..words import FUNCTION_WORDS, align, collate_rows, tokens_of, words_of
from .chat_template import Rendered, Turn, render
from .word_selection import WordSelector

if TYPE_CHECKING:
    from ..targets.store import Target, TargetStore


_TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")
"""What processors return with one entry per token, [B, T] or [B, T, ...]."""

logger = logging.getLogger("lavender")


@dataclass(frozen=True, eq=False)
class _Item:
    """One sample of a batch: what is said, what is seen, and what is compared.

    Attributes:
        id: the sample's.
        images: its pictures, in the order of their places in the text.
        rendered: its text.
        target: the teacher's maps; None where there are none.
        turn: the answer whose words are compared.
        picture: which picture they are looked for in; None without one.
        words: the answer's words.
    """

    id: str
    images: list[Image.Image]
    rendered: Rendered
    target: Target | None
    turn: Turn
    picture: int | None
    words: tuple[Word, ...]


class Collator:
    """Makes batches for a patched student: what the model needs, and lavender's keys.

    A sample is a `Sample`, a `Conversation`, or a mapping (see `lavender.data.as_conversation`). The processor's chat template
    renders it, pictures where `<image>` stands or else before the first user's text; the labels cover what the assistant says, and
    what the template closes it with. Beside the processor's tensors and `labels` (int64 [B, T], -100 where nothing is asked), a
    batch has

        lavender_tokens, lavender_token_words   int64 [B, R]  positions of the words' tokens, and the words; -1 is padding
        lavender_token_weights              float32 [B, R]  each token's share of its word
        lavender_columns                    int64 [B, M]   positions of the image tokens; -1 is padding
        lavender_boxes                      float32 [B, M, 4]  their places in fractions of the picture; NaN where none
        lavender_present                    bool [B, W]    which words are compared
        lavender_outcomes                   int64 [B]      what became of each sample, by `OUTCOMES`
        lavender_targets                    float32 [B, W, y, x]  the teacher's maps; only with `targets`

    W counts the words (`Collator.words`, without function words) of one answer: the first one that is the caption of the sample's
    target, else the last one. M counts the image tokens of one picture: the one that the target was made from, else the last one
    before that answer. Outcomes are

        0, matched           a word at least is compared
        1, no target         the targets have none for this sample, which trains the language model alone
        2, no word matched   the target has none of the answer's words, they were all left out, or there is no picture
        3, cut off           `max_length` cut the answer before its words

    Collators and all that they take can be pickled.
    """

    def __init__(
        self,
        processor: Any,
        targets: TargetStore | None = None,
        words: WordsConfig | None = None,
        *,
        model_config: Any = None,
        max_length: int | None = None,
    ) -> None:
        """`processor` is the student's; `targets` are needed for training only; `words` says which words are aligned.

        `model_config` is the student's `model.config`; families whose processor does not know the patch size (mllama) need it.
        Samples of more than `max_length` tokens, pictures included, are cut at their end; None cuts nothing.

        Raises `ConfigError` when the processor has no chat template or no fast tokenizer, or is another model's than
        `model_config`, and when `max_length` is below 1; `ModelError` when nobody knows where this family's image tokens lie.
        """
        if not getattr(processor, "chat_template", None):
            raise ConfigError("the processor has no chat template; set processor.chat_template to the model's")
        if not processor.tokenizer.is_fast:
            raise ConfigError("the processor's tokenizer gives no character offsets; load the fast one")
        if max_length is not None and max_length < 1:
            raise ConfigError(f"max_length is {max_length}; it must be at least 1, or None to cut nothing")
        if model_config is not None:
            require_pair(processor, model_config)
        self.processor = processor
        self.targets = targets
        self.words_config = words or WordsConfig()
        self.model_config = model_config
        self.max_length = max_length
        self._selector = WordSelector(self.words_config)
        self._warned: set[int] = set()
        self._family = student_family(model_type_of(processor, model_config))
        if not self._family.collates:
            raise ConfigError(
                f"lavender makes no batches for {type(processor).__name__}: its model reads picture and text in a form of its own. "
                "Capture works: model inputs with lavender's keys, which patch.capture names"
            )

    @staticmethod
    def words(answer: str) -> tuple[Word, ...]:
        """The words of an answer that can be aligned, in order: index w of a batch's word axis is the w-th of them."""
        return tuple(word for word in words_of(answer) if word.text.casefold() not in FUNCTION_WORDS)

    def __call__(self, given: Sequence[Sample | Conversation | Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Raises `ConfigError` (of the chat template), `DataError` or `TargetError` naming the sample at fault."""
        items = [self._item(as_conversation(sample)) for sample in given]
        texts = [item.rendered.text for item in items]
        batch = self._processed(items, texts)
        encoded = self.processor.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        offsets: list[list[Span]] = encoded.offset_mapping
        places = [
            self._places(tokens, ids, mask, item, own)
            for tokens, ids, mask, item, own in zip(
                encoded.input_ids, batch["input_ids"], batch["attention_mask"], items, offsets, strict=True
            )
        ]
        self._cut(batch, items, places)
        self._add_labels(batch, items, offsets, places)
        asked = [self._asked(item, own, at, batch, b) for b, (item, own, at) in enumerate(zip(items, offsets, places, strict=True))]
        spoken = collate_rows([tokens for tokens, _ in asked])
        batch["lavender_tokens"], batch["lavender_token_words"] = spoken.rows, spoken.words
        batch["lavender_token_weights"] = spoken.weights
        self._add_columns(batch, items)
        self._add_words(batch, items, asked, spoken.num_words)
        return batch

    def _item(self, conversation: Conversation) -> _Item:
        name = f"sample {conversation.id!r}"
        try:
            images = [load_image(image) for image in conversation.images]
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        fewest, most = self._family.pictures
        if not fewest <= len(images) <= most:
            expected = f"exactly {fewest}" if fewest == most else f"{fewest} or more"
            raise DataError(
                f"{name} has {len(images)} pictures; {type(self.processor).__name__}'s family takes {expected} in a sample"
            )
        rendered = render(self.processor, conversation)
        target, picture = self._target(conversation, images)
        caption = None if target is None else target.word_maps.caption
        turn = next((turn for turn in rendered.turns if turn.answer == caption), rendered.turns[-1])
        if target is None and turn.pictures:
            picture = turn.pictures - 1
        return _Item(conversation.id, images, rendered, target, turn, picture, self.words(turn.answer))

    def _target(self, conversation: Conversation, images: Sequence[Image.Image]) -> tuple[Target | None, int | None]:
        """The sample's target, and which of its pictures that was made from."""
        if self.targets is None or conversation.id not in self.targets:
            return None, None
        target = self.targets[conversation.id]
        for n, image in enumerate(images):
            if image_sha256(image) == target.image_sha256:
                return target, n
        raise TargetError(
            f"the targets of sample {conversation.id!r} in {self.targets.folder} were made from another picture than "
            f"{'its own' if len(images) == 1 else f'its {len(images)}'}; extract them into a new folder"
        )

    def _processed(self, items: Sequence[_Item], texts: list[str]) -> dict[str, torch.Tensor]:
        images = [item.images for item in items]
        if self.targets is not None and self._family.cross and not any(images):
            raise DataError(
                f"{_named(items)}: none of them has a picture, and a model that reads pictures by cross-attention then leaves that "
                "out; put a sample with a picture into every batch, or train without targets"
            )
        try:
            batch = self.processor(
                images=images if any(images) else None, text=texts, padding=True, add_special_tokens=False, return_tensors="pt"
            )
        except ValueError as error:
            raise DataError(f"{_named(items)}: {type(self.processor).__name__} does not take them ({error})") from error
        return dict(batch)

    def _places(
        self, tokens: Sequence[int], ids: torch.Tensor, attention_mask: torch.Tensor, item: _Item, offsets: Sequence[Span]
    ) -> list[int]:
        """Position in the padded and expanded row of every token of the unexpanded text; -1 for those that are not there."""
        plain = torch.nonzero(attention_mask.bool() & (ids != self._image_token)).flatten().tolist()
        places = [-1 if place < 0 else plain[place] for place in align(tokens, ids[plain].tolist())]
        if any(places[i] < 0 for turn in item.rendered.turns for i in _tokens_in(turn, offsets)):
            raise DataError(f"sample {item.id!r}: the processor's tokens differ from its tokenizer's; was the text cut off?")
        return places

    @property
    def _image_token(self) -> int:
        return image_token_of(self.processor, self.model_config)

    def _cut(self, batch: dict[str, torch.Tensor], items: Sequence[_Item], places: list[list[int]]) -> None:
        """Cuts every row to its first `max_length` tokens, padding where it was; `places` follow, -1 for what was cut off."""
        ids = batch["input_ids"]
        if self.max_length is None or ids.shape[1] <= self.max_length:
            return
        rows = []
        for b, (item, mask) in enumerate(zip(items, batch["attention_mask"].bool(), strict=True)):
            real, padding = torch.nonzero(mask).flatten(), torch.nonzero(~mask).flatten()
            pictures = torch.nonzero(ids[b, real] == self._image_token).flatten()
            if len(pictures) and pictures[-1] >= self.max_length:
                raise DataError(
                    f"sample {item.id!r} has {len(real)} tokens, its pictures reach to the {int(pictures[-1]) + 1}th, and "
                    f"max_length is {self.max_length}; raise it to more than that, or give fewer or smaller pictures"
                )
            real = real[: self.max_length]
            rows.append(torch.cat([real, padding[: self.max_length - len(real)]]).sort().values)
            kept = {place: n for n, place in enumerate(rows[-1].tolist())}
            places[b] = [kept.get(place, -1) for place in places[b]]
        chosen, samples = torch.stack(rows), torch.arange(len(rows))[:, None]
        for name in _TEXT_KEYS:
            if name in batch:
                batch[name] = batch[name][samples, chosen]

    def _add_labels(
        self,
        batch: dict[str, torch.Tensor],
        items: Sequence[_Item],
        offsets: Sequence[Sequence[Span]],
        places: Sequence[Sequence[int]],
    ) -> None:
        ids = batch["input_ids"]
        batch["labels"] = torch.full_like(ids, -100)
        for b, item in enumerate(items):
            answered = [places[b][i] for turn in item.rendered.turns for i in _tokens_in(turn, offsets[b])]
            at = [place for place in answered if place >= 0]
            batch["labels"][b, at] = ids[b, at]
            if at and "token_type_ids" in batch:
                # Questions and pictures that follow an answer are what it is: whoever sees them must not see it through them.
                later = batch["token_type_ids"][b, at[0] :]
                later[later == batch["token_type_ids"][b, at[0] - 1]] = self._family.answer_type

    def _asked(
        self, item: _Item, offsets: Sequence[Span], places: Sequence[int], batch: Mapping[str, torch.Tensor], b: int
    ) -> tuple[list[list[int]], list[bool]]:
        """The positions of each word's tokens, none if one was cut off, and which words are to be compared if they are there."""
        text, turn = item.rendered.text, item.turn
        if item.picture is None or item.picture >= turn.pictures:
            return [[] for _ in item.words], [False for _ in item.words]
        begin = text.find(turn.answer, turn.start, turn.end)
        if begin < 0:
            raise DataError(f"sample {item.id!r}: the chat template changes the answer {turn.answer!r}; strip its white space")
        near = [i for i, (left, right) in enumerate(offsets) if right > turn.start and left < turn.end]
        own = [offsets[i] for i in near]
        spans = [(begin + word.start, begin + word.end) for word in item.words]
        tokens = [[places[near[t]] for t in tokens_of(span, own, text)] for span in spans]
        selected = self._selector.selected(turn.answer, item.words)
        wanted = [chosen and bool(at) for chosen, at in zip(selected, tokens, strict=True)]
        tokens = [at if min(at, default=-1) >= 0 else [] for at in tokens]
        # Text that reads by cross-attention may see the latest picture alone: [B, T, pictures, tiles] of mllama.
        mask = batch.get("cross_attention_mask")
        if mask is not None:
            wanted = [
                chosen and (not at or bool(mask[b, at, item.picture].any())) for chosen, at in zip(wanted, tokens, strict=True)
            ]
        return tokens, wanted

    def _add_columns(self, batch: dict[str, torch.Tensor], items: Sequence[_Item]) -> None:
        sizes = [(image.height, image.width) for item in items for image in item.images]
        boxes = list(self._family.boxes(Pictures(self.processor, batch, sizes, self.model_config))) if sizes else []
        first = 0
        for item in items:
            crop = WHOLE_PICTURE if item.target is None else item.target.word_maps.crop
            if item.picture is not None and crop != WHOLE_PICTURE:
                # The student's maps show what the teacher's do.
                boxes[first + item.picture] = boxes_within(boxes[first + item.picture], crop)
            first += len(item.images)
        shown = [(len(item.images), item.picture) for item in items]
        try:
            placed = place_columns(batch["input_ids"], boxes, self._family, self.processor, self.model_config, shown=shown)
        except DataError as error:
            raise DataError(f"{_named(items)}: {error}") from None
        batch["lavender_columns"], batch["lavender_boxes"] = placed

    def _add_words(
        self,
        batch: dict[str, torch.Tensor],
        items: Sequence[_Item],
        asked: Sequence[tuple[list[list[int]], list[bool]]],
        num_words: int,
    ) -> None:
        """Which words are compared, with which of the teacher's maps, and what became of the samples."""
        present = torch.zeros(len(items), num_words, dtype=torch.bool)
        outcomes = torch.zeros(len(items), dtype=torch.long)
        size = 0 if self.targets is None else self.targets.config.map_size
        maps = torch.zeros(*present.shape, size, size)
        for b, (item, (tokens, wanted)) in enumerate(zip(items, asked, strict=True)):
            if self.targets is not None:
                found = _target_maps(item, self._selector)
                wanted = [chosen and w in found for w, chosen in enumerate(wanted)]
                for w, own in found.items():
                    maps[b, w] = own
            present[b, : len(wanted)] = torch.tensor([chosen and bool(own) for chosen, own in zip(wanted, tokens, strict=True)])
            outcomes[b] = self._outcome(item, compared=bool(present[b].any()), cut=any(wanted))
        batch["lavender_present"], batch["lavender_outcomes"] = present, outcomes
        if self.targets is not None:
            batch["lavender_targets"] = maps * present[..., None, None]

    def _outcome(self, item: _Item, compared: bool, cut: bool) -> int:
        """The sample's outcome; the first of each kind that is no match is told with its remedy."""
        if compared:
            return 0
        name = f"sample {item.id!r}"
        if self.targets is not None and item.target is None:
            outcome = 1
            message = f"{name} has no target in {self.targets.folder}, and trains the language model alone; extract targets for it"
        elif cut:
            outcome = 3
            message = f"max_length={self.max_length} cuts the answer of {name} off before its words; raise it"
        else:
            outcome = 2
            message = f"no word of {name} is compared: {self._lack(item)}"
        if outcome not in self._warned:
            self._warned.add(outcome)
            logger.warning("%s. (Told once; lavender_outcomes counts the others.)", message)
        return outcome

    def _lack(self, item: _Item) -> str:
        if item.picture is None or item.picture >= item.turn.pictures:
            return "no picture stands before its answer; put one into a message of the user's before it"
        if item.target is None:
            return f"its answer {item.turn.answer!r} has no words that name something, or {self.words_config} leaves them out"
        if item.turn.answer == item.target.word_maps.caption:
            return f"its words have no maps, do not see the target's picture, or are left out by {self.words_config}; loosen that"
        return (
            f"its answer is {item.turn.answer!r}, and its target was made from {item.target.word_maps.caption!r}; extract targets "
            f"from captions that share words with the answers, or loosen {self.words_config}"
        )


def _named(items: Sequence[_Item]) -> str:
    return f"samples {', '.join(repr(item.id) for item in items)}"


def _tokens_in(turn: Turn, offsets: Sequence[Span]) -> list[int]:
    """The tokens that lie within a turn: one that holds characters of what stands before or behind it belongs to that."""
    return [i for i, (left, right) in enumerate(offsets) if turn.start <= left < right <= turn.end]


def _target_maps(item: _Item, selector: WordSelector) -> dict[int, torch.Tensor]:
    """The teacher's map of every word of the answer that has one which is not too sparse.

    Where the answer is the caption, a word's own map; else the mean over the caption's occurrences of the same word, which may be
    part of a run that has no spaces.
    """
    if item.target is None:
        return {}
    known, answer = item.target.word_maps, item.turn.answer
    if len(known.maps) != len(known.words):
        raise TargetError(f"the targets of sample {item.id!r} are damaged: {len(known.maps)} maps for {len(known.words)} words")
    same = known.caption == answer
    places = [[word] for word in item.words] if same else selector.occurrences(known.caption, answer, item.words)
    usable = [(word, own) for word, own, dense in zip(known.words, known.maps, selector.dense(known.maps), strict=True) if dense]
    result = {}
    for w, found in enumerate(places):
        maps = [own for word, own in usable if any(word.start <= o.start and o.end <= word.end for o in found)]
        if maps:
            result[w] = torch.from_numpy(np.mean(maps, axis=0))
    return result
