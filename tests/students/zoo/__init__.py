"""Tiny random vision-language models with their real processors, one per family: built from configs, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.video_processing_utils import BaseVideoProcessor

_WORDS = "a b c d e f g h red blue green cat dog hat tree house what is in the picture of and on . ? !"
WORDS = tuple(_WORDS.split())
"""What the zoo's tokenizers know, a token each, beside special tokens."""


@dataclass(frozen=True, eq=False)
class Student:
    """A tiny model in float32 and eval mode, attending by sdpa, and what turns pictures and texts into its inputs.

    Attributes:
        model: random weights, a few layers.
        processor: the family's own processor class, with its own image processor.
        placeholder: what stands for one picture in a text given to the processor.
    """

    model: PreTrainedModel
    processor: Any
    placeholder: str

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> dict[str, Any]:
        """Model inputs for one picture and one text each, padded to one length."""
        given = [f"{self.placeholder} {text}" for text in texts]
        batch = self.processor(images=[[image] for image in images], text=given, padding=True, return_tensors="pt")
        return dict(batch)


def tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer, padding on the left, that knows `WORDS` and the given special tokens.

    `named` special tokens become attributes as well: `image_token="<image>"` gives `tokenizer.image_token` and `image_token_id`.
    """
    tokens = list(dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *special, *named.values(), *WORDS]))
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    backend.add_special_tokens([*special, *named.values()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=dict(named),
    )


def with_video(processor: type, video: type[BaseVideoProcessor] = BaseVideoProcessor, **parts: Any) -> Any:
    """A processor of a class that wants a video processor as well.

    The families' own need torchvision, and so does the check of the parts' classes: it is left out where the processor is made, and
    the processor keeps its real class.
    """
    with patch.object(processor, "check_argument_for_proper_class"):
        return processor(**parts, video_processor=video())


def seeded(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A model whose random weights are the same every time, larger than the library's: attention is far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0, 0.2)
    return model.float().eval()


MODULES = ("square", "thw", "sizes", "anyres", "tiles", "cross", "resampler")


def students() -> dict[str, Callable[[], Student]]:
    """Every tiny model's builder by name: the model type, or `type/variant`."""
    found: dict[str, Callable[[], Student]] = {}
    for module in MODULES:
        found.update(import_module(f"{__name__}.{module}").STUDENTS)
    return found
