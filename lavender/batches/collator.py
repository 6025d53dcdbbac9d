"""Batches for a patched student: the processor's tensors, labels, and which words and image tokens are compared."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image

from ..config import WordsConfig
from ..data.conversations import without_thinking
from ..data.samples import Conversation, Message, Sample, as_conversation
from ..errors import ConfigError, DataError, LavenderError, TargetError, reading
from ..images import image_sha256, load_image
from ..students.boxes import boxes_within
from ..students.families import ProcessedImages, student_family
from ..students.image_tokens import image_token_of, model_type_of, place_image_tokens, require_pair
from ..types import ROLES, WHOLE_PICTURE, Box, Span, Word, WordBatch
from ..words import collate_rows, locate_tokens
from .aligned_words import AlignedWord, TurnWord, aligned_turns, content_words, target_maps, turn_words
from .chat_template import Turn, apply_chat_template
from .outcomes import Item, Outcomes, Unusable
from .word_selection import WordSelector

if TYPE_CHECKING:
    from ..targets.store import Target, TargetStore


_TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")
"""What processors return with one entry per token, [B, T] or [B, T, ...]."""
MOST_SKIPPED = 16
"""So many samples in a row are skipped before one's error is raised: then the fault is not theirs, but of all."""
_STAND_IN = Conversation(
    "lavender's stand-in", (Image.new("RGB", (64, 64), "gray"),), (Message("user", "<image>Look"), Message("assistant", "Yes"))
)

logger = logging.getLogger("lavender")


@dataclass(frozen=True, eq=False)
class _Tokens:
    """The words of a sample in the batch.

    Attributes:
        tokens: per word the positions of its tokens; none if one was cut off.
        selected: per word whether it is compared if its tokens are there.
    """

    tokens: list[list[int]]
    selected: list[bool]


class Collator:
    """Makes batches for a patched student: the model's inputs, and lavender's keys.

    A sample is a `Sample`, a `Conversation`, or a mapping (see `lavender.data.as_conversation`). The processor's chat template
    makes its text, with pictures where `<image>` stands or else before the first user's text. Beside the processor's tensors, a
    batch has `labels` (int64 [B, T]: what the assistant says, and what the template closes it with; -100 elsewhere), and the keys
    of `lavender.types.WordBatch`; `lavender_targets` only with `targets` or `map_size`.

    W counts the words (without function words) of the messages of `WordsConfig.roles`, in the order of the text: by default those
    of every answer that is learned, which in a sample of one answer are `Collator.words`. `aligned_words` lists them, and
    `lavender_roles` says whose each is. M counts the image tokens of one picture: the one that the targets were made from, else
    the last one before the last answer. Words that do not stand behind it are never compared.

    A sample's regions (`lavender.data.Region`) are words too, in the place of those that they share characters with and whatever
    the roles. They name the picture that is compared, and need no targets. Their maps have a maximum of one; a region that lies
    outside of what student and targets show of the picture, or is the same all over that, is not compared.

    A sample's target is that of its id; without one, those that were made from its picture, whatever their ids: ten questions
    about one picture share its maps. An answer that is the caption of a target takes each word's own map. Every other word has
    the mean map of the caption's words that are the same, averaged over the captions that have it if the picture has several.
    Where targets are found by one of several pictures (the one whose caption is an answer, else the first that has any), a word
    is compared only if this picture is the last one before it, its answer is the caption, or its region names the picture.

    `lavender_outcomes` are

        0, matched           a word at least is compared
        1, no target         the targets have none for this sample, which trains the language model alone
        2, no word matched   the targets have none of the words, they were all left out, or no picture stands before them
        3, cut off           `max_length` cut the text before them
        4, skipped           it raised a `LavenderError`, and a stand-in takes its place: a gray picture and a word, no labels, no
                             words. So every process of a training has as many samples as before, and the same keys in its batch

    What a message says in its thinking (`<think>...</think>`) is labelled as the chat template renders it, and has no words.

    Attributes:
        skipped: per id of a skipped sample its error. Each is logged once. A collator in a `DataLoader`'s worker has a `skipped` of
            its own, which stays there: count the batches' outcomes instead.

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
        map_size: int | None = None,
        on_error: Literal["skip", "raise"] | None = None,
    ) -> None:
        """
        Args:
            processor: the student's.
            targets: the teacher's maps, for training.
            words: which words are aligned.
            model_config: the student's `model.config`; families whose processor does not know the patch size (mllama) need it.
            max_length: samples of more tokens, those of pictures included, are cut at their end; None cuts nothing.
            map_size: side of the maps that samples' regions are drawn on where there are no `targets`, which have a size of their
                own: samples are then aligned by their regions alone.
            on_error: whether a sample that cannot be used is skipped, or its error raised; by default it is skipped with `targets`
                or `map_size`, where a training must go on, and raised without, where a stand-in's maps would be taken for the
                sample's.

        Raises:
            ConfigError: an argument is of another type; the processor has no chat template or no fast tokenizer, or is another
                model's than `model_config`; or `max_length` is below 1, or `map_size` below 2 or another than that of `targets`.
            ModelError: the family, and so the places of its image tokens, is unknown.
        """
        _require_types(processor, targets, words, model_config, max_length, map_size, on_error)
        if not getattr(processor, "chat_template", None):
            raise ConfigError("the processor has no chat template; set processor.chat_template to the model's")
        if not processor.tokenizer.is_fast:
            raise ConfigError("the processor's tokenizer gives no character offsets; load the fast one")
        if max_length is not None and max_length < 1:
            raise ConfigError(f"max_length is {max_length}; it must be at least 1, or None to cut nothing")
        if map_size is not None and (map_size < 2 or (targets is not None and map_size != targets.config.map_size)):
            raise ConfigError(
                f"map_size is {map_size}; it must be at least 2, and with targets theirs, which it need not be given with"
            )
        if model_config is not None:
            require_pair(processor, model_config)
        self.processor = processor
        self.targets = targets
        self.words_config = words or WordsConfig()
        self.model_config = model_config
        self.max_length = max_length
        self.on_error = on_error or ("raise" if targets is None and map_size is None else "skip")
        self.skipped: dict[str, str] = {}
        self._skipped_in_a_row = 0
        self._selector = WordSelector(self.words_config)
        self._map_size: int = map_size or 0 if targets is None else targets.config.map_size
        self._outcomes = Outcomes(self.words_config, targets, max_length, trains=bool(self._map_size))
        self._family = student_family(model_type_of(processor, model_config))
        if not self._family.collates:
            raise ConfigError(
                f"lavender makes no batches for {type(processor).__name__}: its model reads picture and text in a form of its own. "
                "Capture works: model inputs with lavender's keys, which patch.capture names"
            )

    @staticmethod
    def words(answer: str) -> tuple[Word, ...]:
        """The words of an answer that can be aligned, in order: of a sample of one answer, index w of a batch's word axis is the
        w-th of them, if only answers are aligned.

        Those of thinking are none; the others' places are in the answer without it.
        """
        return content_words(without_thinking(answer))

    def aligned_words(self, sample: Sample | Conversation | Mapping[str, Any]) -> tuple[AlignedWord, ...]:
        """A sample's words in the order of a batch's word axis. Raises `LavenderError` if the sample cannot be used."""
        item = self._item(as_conversation(sample))
        text = item.chat.text
        encoded = self.processor.tokenizer([text], add_special_tokens=False, return_offsets_mapping=True)
        offsets: list[Span] = encoded.offset_mapping[0]
        return tuple(
            AlignedWord(
                word.turn,
                word.role,
                word.word,
                tuple(text[slice(*offsets[t - (word.role == "prompt end")])] for t in word.tokens(offsets, text)),
            )
            for word in item.words
        )

    def __call__(self, samples: Sequence[Sample | Conversation | Mapping[str, Any] | Unusable]) -> dict[str, torch.Tensor]:
        """Raises `DataError` or `TargetError` naming the sample at fault, unless it is skipped; then the last of 16 in a row."""
        items: list[Item] = []
        errors: dict[int, LavenderError] = {}
        for b, sample in enumerate(samples):
            if isinstance(sample, Unusable):
                items.append(self._stand_in_for(sample.id, DataError(sample.reason)))
                continue
            sample_id = _id_of(sample)
            try:
                conversation = as_conversation(sample)
                sample_id = conversation.id
                items.append(self._item(conversation))
            except LavenderError as error:
                if self.on_error == "raise":
                    raise
                errors[b] = error
                items.append(self._stand_in_for(sample_id, error))
        while True:
            try:
                batch = self._collate(items)
                break
            except LavenderError as error:
                faults = self._find_faults(items, error)
            for b, fault in faults.items():
                items[b] = self._stand_in_for(items[b].id, fault)
            errors |= faults
        self._note_skipped(items, errors)
        return batch

    def require_usable(self, samples: Sequence[Sample | Conversation | Mapping[str, Any]]) -> None:
        """Raises the error of the last of up to `MOST_SKIPPED` samples from all over `samples` if none of them can be used.

        So that a run whose samples are all at fault ends before it starts.
        """
        error: LavenderError | None = None
        for sample in samples[:: max(1, -(-len(samples) // MOST_SKIPPED))]:
            error = self.fault_of(sample)
            if error is None:
                return
        if error is not None:
            raise error

    def fault_of(self, sample: Sample | Conversation | Mapping[str, Any]) -> LavenderError | None:
        """Why a sample cannot be used; None if it can."""
        try:
            item = self._item(as_conversation(sample))
            try:
                self._collate([item])
            except LavenderError:
                self._try(item)
        except LavenderError as error:
            return error
        return None

    def _collate(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        texts = [item.chat.text for item in items]
        batch = self._process(items, texts)
        encoded = self.processor.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        offsets: list[list[Span]] = encoded.offset_mapping
        places = [
            self._locate(tokens, ids, mask, item, spans)
            for tokens, ids, mask, item, spans in zip(
                encoded.input_ids, batch["input_ids"], batch["attention_mask"], items, offsets, strict=True
            )
        ]
        self._cut(batch, items, places)
        self._add_labels(batch, items, offsets, places)
        image_positions, boxes = self._place_images(batch, items)
        found = [
            self._find_words(item, spans, at, positions, batch, b)
            for b, (item, spans, at, positions) in enumerate(zip(items, offsets, places, image_positions, strict=True))
        ]
        rows = collate_rows([words.tokens for words in found])
        present, outcomes, targets = self._compare(items, found, rows.num_words, boxes)
        roles = torch.full_like(present, ROLES.index("answer"), dtype=torch.long)
        for b, item in enumerate(items):
            roles[b, : len(item.words)] = torch.tensor([ROLES.index(word.role) for word in item.words])
        words = WordBatch(
            rows.rows, rows.words, rows.weights, image_positions, present, boxes, outcomes, targets, batch["input_ids"], roles
        )
        return batch | words.to_batch()

    def _find_faults(self, items: Sequence[Item], error: LavenderError) -> dict[int, LavenderError]:
        """The items that a batch failed for with `error`, each with its own: those that fail beside the stand-in.

        None may, where they do not go together. Then the last one is it, until the others do.
        """
        sound = [b for b, item in enumerate(items) if not item.skipped]
        if not sound or (self.on_error == "raise" and len(items) == 1):
            raise error
        faults: dict[int, LavenderError] = {}
        for b in sound:
            try:
                self._try(items[b])
            except LavenderError as fault:
                faults[b] = fault
        if self.on_error == "raise":
            raise next(iter(faults.values())) if 0 < len(faults) < len(items) else error
        return faults or {sound[-1]: error}

    def _try(self, item: Item) -> None:
        """Raises the error of a batch of an item and the stand-in, which has a picture; of the item alone where there is none."""
        try:
            items = [item, self._stand_in]
        except LavenderError:
            items = [item]
        self._collate(items)

    def _stand_in_for(self, sample_id: str, error: LavenderError) -> Item:
        """What takes the place of a sample that has an error, which is raised if nothing can."""
        try:
            return replace(self._stand_in, id=sample_id)
        except LavenderError:
            raise error from None

    @cached_property
    def _stand_in(self) -> Item:
        """An item that fits into every batch, and teaches nothing. Raises `LavenderError` if there is none."""
        item = self._item(_STAND_IN)
        item = replace(item, chat=replace(item.chat, turns=()), targets=(), words=(), skipped=True)
        self._collate([item])
        return item

    def _note_skipped(self, items: Sequence[Item], errors: Mapping[int, LavenderError]) -> None:
        """Logs each skipped sample once. Raises the error of the last of `MOST_SKIPPED` in a row, `Unusable` ones not counted."""
        for b, item in enumerate(items):
            if not item.skipped:
                self._skipped_in_a_row = 0
            if b not in errors:
                continue
            self._skipped_in_a_row += 1
            error = errors[b]
            if item.id not in self.skipped:
                self.skipped[item.id] = str(error)
                logger.warning("skipped: %s", error if repr(item.id) in str(error) else f"sample {item.id!r}: {error}")
            if self._skipped_in_a_row >= MOST_SKIPPED:
                raise type(error)(f"{error}. It is the last of {MOST_SKIPPED} samples in a row that had to be skipped") from error

    def _item(self, conversation: Conversation) -> Item:
        name = f"sample {conversation.id!r}"
        try:
            images = [load_image(image) for image in conversation.images]
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        fewest, most = self._family.num_images
        if not fewest <= len(images) <= most:
            expected = f"exactly {fewest}" if fewest == most else f"{fewest} or more"
            raise DataError(
                f"{name} has {len(images)} pictures; {type(self.processor).__name__}'s family takes {expected} in a sample"
            )
        roles = self.words_config.roles
        chat = apply_chat_template(self.processor, conversation, aligned_turns(conversation, {*roles} - {"answer"}))
        named = {region.image or 0 for region in conversation.regions if region.is_place or region.image is not None}
        if len(named) > 1:
            raise DataError(
                f"{name} has regions in {len(named)} of its pictures; a sample compares words with one picture, make one of each"
            )
        targets, image = self._targets(conversation, images, next(iter(named), None))
        if image is None and chat.turns[-1].num_images:
            image = chat.turns[-1].num_images - 1
        by_picture = self.targets is not None and len(images) > 1 and conversation.id not in self.targets
        item = Item(conversation.id, images, chat, targets, image, turn_words(conversation, chat, roles), by_picture)
        item.require_shown()
        return item

    def _targets(
        self, conversation: Conversation, images: Sequence[Image.Image], named: int | None
    ) -> tuple[tuple[Target, ...], int | None]:
        """The sample's targets, and the index of the picture that they were made from: the one that regions name, if they do."""
        if self.targets is None:
            return (), named
        digests = [image_sha256(image) for image in images]
        known = digests if named is None else [digests[named]]
        if conversation.id in self.targets:
            targets = [self.targets[conversation.id]]
        else:
            answers = [without_thinking(message.content) for message in conversation.messages if message.role == "assistant"]
            found = self.targets.of_pictures(known, answers)
            if found is None:
                self._require_no_word(conversation, digests, named)
                return (), named
            targets = self.targets.beside(found)
        from ..targets.soundness import store_problems  # here, since pyarrow comes with it, which a batch without targets can lack

        config, is_attention = self.targets.config, "weights" in self.targets.source
        for target in targets:
            if problem := next(store_problems(target.word_maps, config.map_size, config.normalization, is_attention), ""):
                raise TargetError(
                    f"the targets of sample {conversation.id!r} in {self.targets.folder} cannot be trained on: {problem}. Extract "
                    "them anew, or write their store with the StoreConfig that they have"
                )
        if targets[0].image_sha256 in known:
            return tuple(targets), digests.index(targets[0].image_sha256) if named is None else named
        if targets[0].image_sha256 in digests:
            raise DataError(
                f"sample {conversation.id!r} has regions in its picture {named}, and targets of picture "
                f"{digests.index(targets[0].image_sha256)}; a sample compares its words with one picture, make a sample of each"
            )
        raise TargetError(
            f"the targets of sample {conversation.id!r} in {self.targets.folder} were made from another picture than "
            f"{'its own' if len(images) == 1 else f'its {len(images)}'}; extract them into a new folder"
        )

    def _require_no_word(self, conversation: Conversation, digests: Sequence[str], named: int | None) -> None:
        """Raises `DataError` if regions name one picture, and the word of one of them is of another picture's targets."""
        words = [region.word for region in conversation.regions if not region.is_place]
        other = self.targets.of_pictures(digests, ()) if words and self.targets is not None else None
        if other is not None:
            raise DataError(
                f"sample {conversation.id!r} has regions in its picture {named}, and the targets with a map for the region's word "
                f"{words[0]!r} are of picture {digests.index(other.image_sha256)}; give that as its image, or make a sample of each"
            )

    def _process(self, items: Sequence[Item], texts: list[str]) -> dict[str, torch.Tensor]:
        images = [item.images for item in items]
        if self._map_size and self._family.cross and not any(images):
            raise DataError(
                f"{_named(items)}: none of them has a picture, and a model that reads pictures by cross-attention then leaves that "
                "out; put a sample with a picture into every batch, or train without targets"
            )
        with reading(f"{_named(items)}: {type(self.processor).__name__} does not take them", "mend them or the processor"):
            return dict(
                self.processor(
                    images=images if any(images) else None, text=texts, padding=True, add_special_tokens=False, return_tensors="pt"
                )
            )

    def _locate(
        self, tokens: Sequence[int], ids: torch.Tensor, attention_mask: torch.Tensor, item: Item, offsets: Sequence[Span]
    ) -> list[int]:
        """Position in the padded and expanded row of every token of the unexpanded text; -1 for those that are not there."""
        plain = torch.nonzero(attention_mask.bool() & (ids != self._image_token)).flatten().tolist()
        places = [-1 if place < 0 else plain[place] for place in locate_tokens(tokens, ids[plain].tolist())]
        if any(places[i] < 0 for turn in item.chat.turns for i in _tokens_in(turn, offsets)):
            raise DataError(f"sample {item.id!r}: the processor's tokens differ from its tokenizer's; was the text cut off?")
        return places

    @property
    def _image_token(self) -> int:
        return image_token_of(self.processor, self.model_config)

    def _cut(self, batch: dict[str, torch.Tensor], items: Sequence[Item], places: list[list[int]]) -> None:
        """Cuts every row to its first `max_length` tokens, padding where it was; `places` follow, -1 for what was cut off."""
        ids = batch["input_ids"]
        if self.max_length is None or ids.shape[1] <= self.max_length:
            return
        rows = []
        for b, (item, mask) in enumerate(zip(items, batch["attention_mask"].bool(), strict=True)):
            real, padding = torch.nonzero(mask).flatten(), torch.nonzero(~mask).flatten()
            image_tokens = torch.nonzero(ids[b, real] == self._image_token).flatten()
            if len(image_tokens) and image_tokens[-1] >= self.max_length:
                raise DataError(
                    f"sample {item.id!r} has {len(real)} tokens, its pictures reach to the {int(image_tokens[-1]) + 1}th, and "
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
        items: Sequence[Item],
        offsets: Sequence[Sequence[Span]],
        places: Sequence[Sequence[int]],
    ) -> None:
        ids = batch["input_ids"]
        batch["labels"] = torch.full_like(ids, -100)
        for b, item in enumerate(items):
            answered = [places[b][i] for turn in item.chat.turns for i in _tokens_in(turn, offsets[b])]
            at = [place for place in answered if place >= 0]
            batch["labels"][b, at] = ids[b, at]
            if at and "token_type_ids" in batch:
                # Questions and pictures that follow an answer get its type: no token may see the answer through them.
                later = batch["token_type_ids"][b, at[0] :]
                later[later == batch["token_type_ids"][b, at[0] - 1]] = self._family.answer_type

    def _find_words(
        self,
        item: Item,
        offsets: Sequence[Span],
        places: Sequence[int],
        image_positions: torch.Tensor,
        batch: Mapping[str, torch.Tensor],
        b: int,
    ) -> _Tokens:
        """The words of sample `b`: their tokens, and whether they are selected and see the picture."""
        if item.image is None:
            return _Tokens([[] for _ in item.words], [False for _ in item.words])
        self._outcomes.note_hidden(item)
        mask = batch.get("cross_attention_mask")
        last = -1 if self._family.cross else int(image_positions.max())
        tokens, selected = [], []
        for word, is_wanted in zip(item.words, self._selected(item.words), strict=True):
            at = [places[t] for t in word.tokens(offsets, item.chat.text)]
            sees, is_there = bool(at), min(at, default=-1) >= 0
            if word.role == "prompt end" and is_there:
                at = [at[0] - 1]
            if is_there:  # what was cut off stands behind all pictures
                # Text that reads by cross-attention may see the latest picture alone: [B, T, pictures, tiles] of mllama.
                sees = min(at) >= last if mask is None else bool(mask[b, at, item.image].any(dim=-1).all())
            tokens.append(at if is_there else [])
            selected.append(is_wanted and sees and item.shows(word))
            if not item.shows(word):
                self._outcomes.note_other_picture(item, word)
            elif not (is_there and sees):
                self._outcomes.note_region(item, word, sees=False)
        return _Tokens(tokens, selected)

    def _selected(self, words: Sequence[TurnWord]) -> list[bool]:
        """Per word whether the config keeps it, as it keeps every region's."""
        selected: list[bool] = []
        for said, group in groupby(words, key=lambda word: word.said):
            of_message = [*group]
            kept = self._selector.selected(said, [word.in_said for word in of_message])
            selected += [is_kept or word.region is not None for word, is_kept in zip(of_message, kept, strict=True)]
        return selected

    def _place_images(self, batch: dict[str, torch.Tensor], items: Sequence[Item]) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [B, M] and boxes [B, M, 4] of the image tokens of each sample's picture."""
        sizes = [(image.height, image.width) for item in items for image in item.images]
        boxes = list(self._family.boxes(ProcessedImages(self.processor, batch, sizes, self.model_config))) if sizes else []
        first = 0
        for item in items:
            if item.image is not None and item.crop != WHOLE_PICTURE:
                # The student's maps show what the teacher's do.
                boxes[first + item.image] = boxes_within(boxes[first + item.image], item.crop)
            first += len(item.images)
        shown = [(len(item.images), item.image) for item in items]
        try:
            return place_image_tokens(batch["input_ids"], boxes, self._family, self.processor, self.model_config, shown=shown)
        except DataError as error:
            raise DataError(f"{_named(items)}: {error}") from None

    def _compare(
        self, items: Sequence[Item], found: Sequence[_Tokens], num_words: int, boxes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The words that are compared, bool [B, W], the samples' outcomes [B], and with targets the teacher's maps [B, W, y, x]."""
        present = torch.zeros(len(items), num_words, dtype=torch.bool)
        outcomes = torch.zeros(len(items), dtype=torch.long)
        size = self._map_size
        targets = torch.zeros(*present.shape, size, size)
        for b, (item, words) in enumerate(zip(items, found, strict=True)):
            selected = words.selected
            if size:
                maps = target_maps(item.words, item.targets, size, self._selector, _shown(boxes[b], item.crop))
                for w, word_map in maps.items():
                    targets[b, w] = torch.from_numpy(word_map)
                for w, (word, wanted) in enumerate(zip(item.words, selected, strict=True)):
                    if wanted and w not in maps:
                        self._outcomes.note_region(item, word, sees=True)
                selected = [wanted and w in maps for w, wanted in enumerate(selected)]
            present[b, : len(selected)] = torch.tensor(
                [wanted and bool(at) for wanted, at in zip(selected, words.tokens, strict=True)]
            )
            outcomes[b] = self._outcomes.of(item, compared=bool(present[b].any()), cut=any(selected))
        return present, outcomes, targets * present[..., None, None] if size else None


def _require_types(
    processor: Any, targets: Any, words: Any, model_config: Any, max_length: Any, map_size: Any, on_error: Any
) -> None:
    """Raises `ConfigError` naming the first argument of a collator that is of another type than it takes."""
    if not hasattr(processor, "tokenizer"):
        raise ConfigError(
            f"the processor is a {type(processor).__name__}; expected one of pictures and texts: AutoProcessor.from_pretrained(...)"
        )
    if targets is not None and not all(hasattr(targets, name) for name in ("__contains__", "__getitem__", "config", "folder")):
        raise ConfigError(f"targets is a {type(targets).__name__}; expected a store: lavender.TargetStore(folder)")
    if words is not None and not isinstance(words, WordsConfig):
        raise ConfigError(f"words is a {type(words).__name__}; expected a lavender.WordsConfig")
    if model_config is not None and not isinstance(getattr(model_config, "model_type", None), str):
        raise ConfigError(f"model_config is a {type(model_config).__name__}; expected the student's model.config")
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int)):
        raise ConfigError(f"max_length is {max_length!r}; expected a whole number of tokens, or None to cut nothing")
    if map_size is not None and (isinstance(map_size, bool) or not isinstance(map_size, int)):
        raise ConfigError(f"map_size is {map_size!r}; expected a whole number, or None without targets for regions")
    if on_error not in (None, "skip", "raise"):
        raise ConfigError(f"on_error is {on_error!r}; expected 'skip', 'raise' or None")


def _id_of(sample: Any) -> str:
    """The id of whatever was given as a sample; its type where it has none."""
    sample_id = sample.get("id") if isinstance(sample, Mapping) else getattr(sample, "id", None)
    return f"a {type(sample).__name__} without an id" if sample_id is None else str(sample_id)


def _named(items: Sequence[Item]) -> str:
    ids = [repr(item.id) for item in items if not item.skipped] or [repr(item.id) for item in items]
    return f"sample{'s' * (len(ids) > 1)} {', '.join(ids)}"


def _shown(boxes: torch.Tensor, crop: Box) -> Box:
    """The part of a picture that its image tokens show, by their boxes [M, 4] of a crop: a processor may cut its edges off."""
    placed = boxes[~boxes.isnan().any(dim=1)]
    if not len(placed):
        return crop
    edges = torch.cat([placed[:, :2].amin(dim=0), placed[:, 2:].amax(dim=0)]).tolist()
    top, left, bottom, right = (crop[i % 2] + round(edge, 5) * (crop[i % 2 + 2] - crop[i % 2]) for i, edge in enumerate(edges))
    return top, left, bottom, right


def _tokens_in(turn: Turn, offsets: Sequence[Span]) -> list[int]:
    """The tokens that lie within a turn: one that holds characters of what stands before or behind it belongs to that."""
    return [i for i, (left, right) in enumerate(offsets) if turn.start <= left < right <= turn.end]
