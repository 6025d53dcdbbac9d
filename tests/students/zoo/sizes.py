"""Tiny models with a Pixtral tower: Mistral 3, and Pixtral itself, which is a Llava."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from typing import Any
from unittest.mock import patch

from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from lavender.testing.student import Student, seeded

from . import tokenizer

PATCH = 8


@cache
def _processor_class() -> type:
    """The real one: its file takes a function from one that needs torchvision, and the file without torchvision has the same."""
    package = "transformers.models.pixtral"
    with patch.dict(sys.modules, {f"{package}.image_processing_pixtral": image_processing_pil_pixtral}):
        found: type = import_module(f"{package}.processing_pixtral").PixtralProcessor
    return found


def _processor(tok: PreTrainedTokenizerFast, merge: int) -> Any:
    images = PixtralImageProcessorPil(size={"longest_edge": 96}, patch_size={"height": PATCH, "width": PATCH})
    return _processor_class()(image_processor=images, tokenizer=tok, patch_size=PATCH, spatial_merge_size=merge)


def _tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer("[IMG_BREAK]", "[IMG_END]", image_token="[IMG]")


def _towers(tok: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vision_config": PixtralVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=96, patch_size=PATCH
        ),
        "text_config": MistralConfig(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=None,
            pad_token_id=tok.pad_token_id,
        ),
        "image_token_index": tok.image_token_id,
    }


def mistral3() -> Student:
    tok = _tokenizer()
    config = Mistral3Config(**_towers(tok), spatial_merge_size=2)
    return Student(seeded(lambda: Mistral3ForConditionalGeneration(config)), _processor(tok, merge=2), "[IMG]")


def pixtral() -> Student:
    tok = _tokenizer()
    config = LlavaConfig(**_towers(tok), vision_feature_select_strategy="full", vision_feature_layer=-1)
    return Student(seeded(lambda: LlavaForConditionalGeneration(config)), _processor(tok, merge=1), "[IMG]")


STUDENTS = {"mistral3": mistral3, "llava/pixtral": pixtral}
