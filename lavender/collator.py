"""Batches for a patched student: the processor's tensors, labels, and which words and image tokens are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from .config import WordsConfig
from .data import Sample, require_unicode
from .errors import ConfigError, DataError, TargetError
from .families import Pictures, student_family
from .families.columns import image_token_of, model_type_of, place_columns
from .images import load_image
from .types import Word
from .words import FUNCTION_WORDS, align, collate_rows, match_words, tokens_of, words_of

if TYPE_CHECKING:
    from .targets import Target, TargetStore


class Collator:
    """Makes batches for a patched student: what the model needs, and lavender's keys.

    A sample is a `Sample` or a mapping with its fields. The processor's chat template renders question and answer; the labels
    cover the answer alone. Beside the processor's tensors and `labels` (int64 [B, T], -100 where nothing is asked), a batch has

        lavender_tokens, lavender_token_words   int64 [B, R]  positions of the words' tokens, and the words; -1 is padding
        lavender_token_weights              float32 [B, R]  each token's share of its word
        lavender_columns                    int64 [B, M]   positions of the image tokens; -1 is padding
        lavender_boxes                      float32 [B, M, 4]  their places in fractions of the picture; NaN where none
        lavender_present                    bool [B, W]    which words are compared
        lavender_targets                    float32 [B, W, y, x]  the teacher's maps; only with `targets`

    W counts the answer's words (`Collator.words`) without function words.
    """

    def __init__(
        self,
        processor: Any,
        targets: TargetStore | None = None,
        words: WordsConfig | None = None,
        *,
        model_config: Any = None,
    ) -> None:
        """`processor` is the student's; `targets` are needed for training only; `words` says which words are aligned.

        `model_config` is the student's `model.config`; families whose processor does not know the patch size (mllama) need it.

        Raises `ConfigError` when the processor has no chat template or no fast tokenizer, `ModelError` when nobody knows where
        this family's image tokens lie.
        """
        if not getattr(processor, "chat_template", None):
            raise ConfigError("the processor has no chat template; set processor.chat_template to the model's")
        if not processor.tokenizer.is_fast:
            raise ConfigError("the processor's tokenizer gives no character offsets; load the fast one")
        self.processor = processor
        self.targets = targets
        self.words_config = words or WordsConfig()
        self.model_config = model_config
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

    def __call__(self, given: Sequence[Sample | Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Raises `DataError` or `TargetError` naming the sample at fault."""
        samples = [_as_sample(sample) for sample in given]
        images = [load_image(sample.image) for sample in samples]
        prompts, texts = zip(*(self._render(sample) for sample in samples), strict=True)
        batch = dict(
            self.processor(
                images=[[image] for image in images], text=list(texts), padding=True, add_special_tokens=False, return_tensors="pt"
            )
        )
        ids = batch["input_ids"]
        labels, all_tokens, all_present, all_words = torch.full_like(ids, -100), [], [], []
        for b, sample in enumerate(samples):
            encoded = self.processor.tokenizer(texts[b], add_special_tokens=False, return_offsets_mapping=True)
            places = self._places(encoded.input_ids, ids[b], batch["attention_mask"][b], sample)
            start = len(prompts[b])
            answered = [i for i, (left, right) in enumerate(encoded.offset_mapping) if left >= start and right > left]
            if any(places[i] < 0 for i in answered):
                raise DataError(f"sample {sample.id!r}: the processor's tokens differ from its tokenizer's; was the text cut off?")
            at = [places[i] for i in answered]
            labels[b, at] = ids[b, at]
            if "token_type_ids" in batch:
                batch["token_type_ids"][b, at] = self._family.answer_type
            words = self.words(sample.answer)
            begin = texts[b].find(sample.answer, start)
            if begin < 0:
                raise DataError(
                    f"sample {sample.id!r}: the chat template changes the answer {sample.answer!r}; strip its white space"
                )
            all_words.append(words)
            tokens = [
                [places[t] for t in tokens_of((begin + w.start, begin + w.end), encoded.offset_mapping, texts[b])] for w in words
            ]
            all_tokens.append(tokens)
            all_present.append([bool(own) for own in tokens])
        batch["labels"] = labels
        spoken = collate_rows(all_tokens)
        batch["lavender_tokens"], batch["lavender_token_words"] = spoken.rows, spoken.words
        batch["lavender_token_weights"] = spoken.weights
        present = torch.zeros(len(samples), spoken.num_words, dtype=torch.bool)
        for b, flags in enumerate(all_present):
            present[b, : len(flags)] = torch.tensor(flags, dtype=torch.bool)
        batch["lavender_present"] = present
        self._add_columns(batch, images, samples)
        if self.targets is not None:
            self._add_targets(batch, samples, images, all_words)
        return batch

    def _render(self, sample: Sample) -> tuple[str, str]:
        """The text up to the answer, and the whole text, with the picture's placeholder not yet expanded."""
        if not sample.answer.strip():
            raise DataError(f"sample {sample.id!r} has an empty answer")
        for name, own in (("question", sample.question), ("answer", sample.answer)):
            require_unicode(own, f"sample {sample.id!r}: the {name}")
            placeholder = getattr(self.processor, "image_token", None)
            if placeholder is not None and str(placeholder) in own:
                raise DataError(
                    f"sample {sample.id!r}: the {name} holds {placeholder!r}, which stands for the picture; the collator adds it"
                )
        ask = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}
        reply = {"role": "assistant", "content": [{"type": "text", "text": sample.answer}]}
        prompt = self.processor.apply_chat_template([ask], add_generation_prompt=True, tokenize=False)
        text = self.processor.apply_chat_template([ask, reply], tokenize=False)
        if not text.startswith(prompt):
            raise ConfigError("the chat template changes the prompt when an answer follows; lavender cannot find the answer")
        return prompt, text

    def _places(self, tokens: Sequence[int], ids: torch.Tensor, attention_mask: torch.Tensor, sample: Sample) -> list[int]:
        """Position in the padded and expanded row of every token of the unexpanded text (-1 for the image's placeholder)."""
        plain = torch.nonzero(attention_mask.bool() & (ids != self._image_token)).flatten().tolist()
        places = align(tokens, ids[plain].tolist())
        return [-1 if place < 0 else plain[place] for place in places]

    @property
    def _image_token(self) -> int:
        return image_token_of(self.processor, self.model_config)

    def _add_columns(self, batch: dict[str, torch.Tensor], images: Sequence[Image.Image], samples: Sequence[Sample]) -> None:
        sizes = [(image.height, image.width) for image in images]
        boxes = self._family.boxes(Pictures(self.processor, batch, sizes, self.model_config))
        try:
            placed = place_columns(batch["input_ids"], boxes, self._family, self.processor, self.model_config)
        except DataError as error:
            raise DataError(f"samples {', '.join(repr(s.id) for s in samples)}: {error}") from None
        batch["lavender_columns"], batch["lavender_boxes"] = placed

    def _add_targets(
        self,
        batch: dict[str, torch.Tensor],
        samples: Sequence[Sample],
        images: Sequence[Image.Image],
        all_words: Sequence[Sequence[Word]],
    ) -> None:
        assert self.targets is not None
        size = self.targets.config.map_size
        present = batch["lavender_present"]
        maps = torch.zeros(*present.shape, size, size)
        for b, (sample, image, words) in enumerate(zip(samples, images, all_words, strict=True)):
            target = self.targets.checked(sample.id, image)
            for w, found in enumerate(_target_maps(target, sample, words)):
                if found is None:
                    present[b, w] = False
                else:
                    maps[b, w] = found
        batch["lavender_targets"] = maps


def _as_sample(sample: Sample | Mapping[str, Any]) -> Sample:
    if isinstance(sample, Sample):
        return sample
    missing = [name for name in Sample.__dataclass_fields__ if name not in sample]
    if missing:
        raise DataError(f"a sample lacks {', '.join(missing)}; it has {', '.join(sample)}")
    return Sample(**{name: sample[name] for name in Sample.__dataclass_fields__})


def _target_maps(target: Target, sample: Sample, words: Sequence[Word]) -> list[torch.Tensor | None]:
    """The teacher's map of every word of the answer, None where it has none.

    Where the answer is the caption, a word's own map; else the mean over the caption's occurrences of the same word, which may be
    part of a run that has no spaces.
    """
    known = target.word_maps
    if len(known.maps) != len(known.words):
        raise TargetError(f"the targets of sample {sample.id!r} are damaged: {len(known.maps)} maps for {len(known.words)} words")
    maps = torch.from_numpy(known.maps)
    found = [[w] for w in words] if known.caption == sample.answer else match_words(known.caption, [w.text for w in words])
    occurrences = [
        [i for i, k in enumerate(known.words) if any(k.start <= o.start and o.end <= k.end for o in same)] for same in found
    ]
    result: list[torch.Tensor | None] = []
    for indices in occurrences:
        usable = [maps[i] for i in indices if not maps[i].isnan().any()]
        result.append(torch.stack(usable).mean(dim=0) if usable else None)
    return result
