"""A student under test: a model, best a tiny random one, with its processor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from ..students.families import Family, ProcessedImages, student_family
from ..students.image_tokens import model_type_of, place_image_tokens
from ..types import WordBatch

IMAGE_SIZES = ((60, 90), (96, 48))
"""Height and width in pixels of the images that checks show: one wide and one high, so that swapped axes do not pass."""
TEXTS = ("what is this ? a red cat", "a dog")
"""Of different lengths, so that one is padded."""


@dataclass(frozen=True, eq=False)
class Student:
    """A model in eval mode, attending by sdpa, and its processor.

    Attributes:
        model: an image-text-to-text model; checks want float32 and a few layers.
        processor: the model's own.
        placeholder: what stands for one picture in a text given to the processor.
    """

    model: PreTrainedModel
    processor: Any
    placeholder: str

    @property
    def family(self) -> Family:
        """The family that places the model's image tokens. Raises `ModelError` if there is none."""
        return student_family(model_type_of(self.processor, self.model.config))

    def copy(self) -> Student:
        """The same with a copy of the model."""
        return replace(self, model=copy.deepcopy(self.model))

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> dict[str, Any]:
        """Model inputs for one picture and one text each, padded to one length."""
        prompts = [f"{self.placeholder} {text}" for text in texts]
        batch = self.processor(images=[[image] for image in images], text=prompts, padding=True, return_tensors="pt")
        return dict(batch)

    def inputs(self, count: int = 2) -> dict[str, Any]:
        """Model inputs for the first `count` of `IMAGE_SIZES` and `TEXTS`."""
        images = [noise_image(*size, seed=i) for i, size in enumerate(IMAGE_SIZES)]
        return self.encode(images[:count], TEXTS[:count])

    def batch(self, boxes: bool = True) -> dict[str, Any]:
        """`inputs()` with the keys of their words; without boxes, captured maps have no grid."""
        inputs = self.inputs()
        words = self.word_batch(inputs)
        return inputs | (words if boxes else replace(words, boxes=None)).to_batch()

    def word_batch(self, inputs: dict[str, Any]) -> WordBatch:
        """The words of `inputs()`: word 0 is the last token, word 1 the two before it, word 2 has none."""
        config, family = self.model.config, self.family
        boxes = family.boxes(ProcessedImages(self.processor, inputs, IMAGE_SIZES[: len(inputs["input_ids"])], config))
        text = inputs.get("decoder_input_ids", inputs["input_ids"])
        lengths = torch.full((len(text),), text.shape[1])
        if "decoder_input_ids" not in inputs and inputs["attention_mask"][:, 0].all():  # padded on the right
            lengths = inputs["attention_mask"].sum(dim=1)
        tokens = lengths[:, None] - torch.tensor([0, 1, 2])  # the rows that predict them are the last three
        image_positions, places = place_image_tokens(inputs["input_ids"], boxes, family, self.processor, config)
        return WordBatch(
            tokens,
            torch.tensor([0, 1, 1]).expand_as(tokens).clone(),
            torch.tensor([1.0, 0.5, 0.5]).expand_as(tokens).clone(),
            image_positions,
            torch.tensor([True, True, False]).expand_as(tokens).clone(),
            places,
        )


def seeded(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A model whose random weights are the same every time, larger than transformers' own: attention is far from uniform.

    `build` makes it from a config. It is in float32 and eval mode.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0, 0.2)
    return model.float().eval()


def noise_image(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture of gray noise, so that no place equals another."""
    values = np.random.default_rng(seed).integers(96, 160, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)
