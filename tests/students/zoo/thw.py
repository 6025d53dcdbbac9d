"""Tiny models of the Qwen-VL, GLM-V and VideoLLaMA 3 families."""

from __future__ import annotations

from typing import Any

from transformers import (
    Glm4vForConditionalGeneration,
    Glm4vProcessor,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    VideoLlama3ForConditionalGeneration,
    VideoLlama3Processor,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

from lavender.testing.student import Student, seeded

from . import tokenizer, with_video

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
"""Heads of 8: four frequencies, two for the order in the text and one each for rows and columns."""


def student(model: type[PreTrainedModel], processor: type, images: type, vision: dict[str, Any], **text: Any) -> Student:
    """`vision` and `text` are what the family's configs have beside the sizes that all share."""
    tok = tokenizer("<|vision_start|>", "<|vision_end|>", image_token="<|image_pad|>", video_token="<|video_pad|>")
    config = model.config_class(
        text_config={
            "vocab_size": len(tok),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": tok.bos_token_id,
            "eos_token_id": tok.eos_token_id,
            "pad_token_id": tok.pad_token_id,
            "rope_parameters": ROPE,
            **text,
        },
        vision_config={"patch_size": 8, "hidden_size": 32, "intermediate_size": 48, **vision},
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
    )
    image_processor = images(patch_size=8, size={"shortest_edge": 32 * 32, "longest_edge": 96 * 96})
    whole = with_video(processor, image_processor=image_processor, tokenizer=tok)
    return Student(seeded(lambda: model(config)), whole, "<|vision_start|><|image_pad|><|vision_end|>")


def qwen2_vl() -> Student:
    # `hidden_size` is what comes out of this tower, `embed_dim` is its width.
    vision = {"depth": 2, "num_heads": 2, "embed_dim": 32, "mlp_ratio": 2}
    return student(Qwen2VLForConditionalGeneration, Qwen2VLProcessor, Qwen2VLImageProcessorPil, vision)


def qwen2_5_vl() -> Student:
    # Windows of 2 x 2 merged patches in the first layer: the tower reorders the patches.
    vision = {"depth": 2, "num_heads": 2, "out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1]}
    return student(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil, vision)


def qwen3_vl() -> Student:
    vision = {
        "depth": 2,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0],
    }
    return student(Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen2VLImageProcessorPil, vision, head_dim=8)


def qwen3_5() -> Student:
    """Three layers of linear attention, then one of softmax attention."""
    return student(
        Qwen3_5ForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen2VLImageProcessorPil,
        {"depth": 2, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 36},
        num_hidden_layers=4,
        head_dim=8,
        rope_parameters={**ROPE, "partial_rotary_factor": 1.0},
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )


def glm4v() -> Student:
    vision = {"depth": 2, "num_heads": 2, "out_hidden_size": 32, "image_size": 48}
    return student(Glm4vForConditionalGeneration, Glm4vProcessor, Glm4vImageProcessorPil, vision)


def video_llama_3() -> Student:
    vision = {"num_hidden_layers": 2, "num_attention_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return student(
        VideoLlama3ForConditionalGeneration,
        VideoLlama3Processor,
        VideoLlama3ImageProcessorPil,
        vision,
        model_type="qwen2",
        rope_parameters=rope,
    )


STUDENTS = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_5,
    "glm4v": glm4v,
    "video_llama_3": video_llama_3,
}
