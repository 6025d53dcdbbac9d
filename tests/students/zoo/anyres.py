"""Tiny LLaVA-NeXT and LLaVA-OneVision models: tiles of 48 pixels."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from lavender.testing.student import Student, seeded

from . import tokenizer, with_video

TILE = {"height": 48, "width": 48}
FRAMES = [[48, 96], [96, 48], [96, 96], [144, 48], [48, 144]]
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
"""What text and vision towers share."""
TOWER = {**SIZES, "num_attention_heads": 2, "image_size": 48, "patch_size": 8}


def _text(tok: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {**SIZES, "vocab_size": len(tok), "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": tok.pad_token_id}


def _next_parts(tok: PreTrainedTokenizerFast) -> dict[str, Any]:
    """A processor's arguments."""
    return {
        "image_processor": LlavaNextImageProcessorPil(size={"shortest_edge": 48}, crop_size=TILE, image_grid_pinpoints=FRAMES),
        "tokenizer": tok,
        "patch_size": 8,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }


def _next_settings(tok: PreTrainedTokenizerFast) -> dict[str, Any]:
    """A config's arguments."""
    return {
        "vision_config": CLIPVisionConfig(**TOWER),
        "text_config": LlamaConfig(**_text(tok)),
        "image_token_index": tok.image_token_id,
        "image_grid_pinpoints": FRAMES,
        "vision_feature_layer": -1,
    }


def llava_next() -> Student:
    tok = tokenizer(image_token="<image>")
    config = LlavaNextConfig(**_next_settings(tok))
    processor = LlavaNextProcessor(**_next_parts(tok))
    return Student(seeded(lambda: LlavaNextForConditionalGeneration(config)), processor, "<image>")


def llava_next_video() -> Student:
    tok = tokenizer(image_token="<image>", video_token="<video>")
    config = LlavaNextVideoConfig(**_next_settings(tok), video_token_index=tok.video_token_id)
    processor = with_video(LlavaNextVideoProcessor, **_next_parts(tok))
    return Student(seeded(lambda: LlavaNextVideoForConditionalGeneration(config)), processor, "<image>")


def llava_onevision() -> Student:
    """At most two tiles' worth of tokens: larger frames are shrunk."""
    tok = tokenizer(image_token="<image>", video_token="<video>")
    processor = with_video(
        LlavaOnevisionProcessor,
        image_processor=LlavaOnevisionImageProcessorPil(size=TILE, image_grid_pinpoints=FRAMES),
        tokenizer=tok,
        num_image_tokens=36,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Qwen2Config(**_text(tok), bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id),
        image_token_index=tok.image_token_id,
        video_token_index=tok.video_token_id,
        image_grid_pinpoints=FRAMES,
        vision_aspect_ratio="anyres_max_2",
    )
    return Student(seeded(lambda: LlavaOnevisionForConditionalGeneration(config)), processor, "<image>")


STUDENTS = {"llava_next": llava_next, "llava_next_video": llava_next_video, "llava_onevision": llava_onevision}
