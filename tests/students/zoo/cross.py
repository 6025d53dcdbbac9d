"""Tiny models whose text reads the picture by cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import (
    BartConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsProcessor,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PreTrainedModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig
from transformers.models.idefics.configuration_idefics import IdeficsVisionConfig
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from lavender.testing.student import Student, seeded

from . import tokenizer

TILE = {"height": 32, "width": 32}


def _opened(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose gates, closed at the start of training, let cross-attention into the text."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name.split(".")[-1] or "alpha" in name:
                nn.init.constant_(parameter, 0.5)
    return model


def mllama() -> Student:
    tok = tokenizer(image_token="<|image|>")
    processor = MllamaProcessor(MllamaImageProcessorPil(size=TILE, max_image_tiles=4), tok)
    config = MllamaConfig(
        vision_config=MllamaVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=2,
            image_size=32,
            patch_size=8,
            intermediate_layers_indices=[0],
            vision_output_dim=64,
        ),
        text_config=MllamaTextConfig(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            cross_attention_layers=[1],
            pad_token_id=tok.pad_token_id,
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
        ),
        image_token_index=tok.image_token_id,
    )
    return Student(_opened(seeded(lambda: MllamaForConditionalGeneration(config))), processor, "<|image|>")


def idefics() -> Student:
    tok = tokenizer(image_token="<image>", fake_token="<fake_token_around_image>")
    processor = IdeficsProcessor(IdeficsImageProcessorPil(image_size=32), tok)
    config = IdeficsConfig(
        vocab_size=len(tok),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        cross_layer_interval=2,
        pad_token_id=tok.pad_token_id,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        vision_config=IdeficsVisionConfig(
            embed_dim=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
        ),
    )
    return _IdeficsStudent(_opened(seeded(lambda: IdeficsForVisionText2Text(config))), processor, "")


class _IdeficsStudent(Student):
    """Its processor takes pictures among the texts; those that are given apart it puts behind their text."""

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> dict[str, Any]:
        prompts = [[image, text] for image, text in zip(images, texts, strict=True)]
        return dict(self.processor(text=prompts))


def florence2() -> Student:
    tok = tokenizer(image_token="<image>")
    image_processor = CLIPImageProcessorPil(size={"height": 48, "width": 48}, do_center_crop=False)
    # The mean of all places stands before the 6 by 6 places.
    image_processor.image_seq_length = 1 + 6 * 6
    processor = Florence2Processor(image_processor, tok)
    config = Florence2Config(
        vision_config=Florence2VisionConfig(
            depths=[1, 1],
            patch_size=[7, 3],
            patch_stride=[4, 2],
            patch_padding=[3, 1],
            patch_prenorm=[False, True],
            embed_dim=[16, 32],
            num_heads=[2, 2],
            num_groups=[2, 2],
            window_size=6,
            projection_dim=32,
            max_position_embeddings=8,
        ),
        text_config=BartConfig(
            vocab_size=len(tok),
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            pad_token_id=tok.pad_token_id,
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            decoder_start_token_id=tok.eos_token_id,
        ),
        image_token_id=tok.image_token_id,
    )
    return _Florence2Student(seeded(lambda: Florence2ForConditionalGeneration(config)), processor, "")


class _Florence2Student(Student):
    """An encoder that reads picture and question, and a decoder; here both get the text."""

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> dict[str, Any]:
        batch = dict(self.processor(images=list(images), text=list(texts), padding=True, return_tensors="pt"))
        answer = self.processor.tokenizer(list(texts), padding=True, return_tensors="pt")
        return {**batch, "decoder_input_ids": answer.input_ids, "decoder_attention_mask": answer.attention_mask}


STUDENTS = {"mllama": mllama, "idefics": idefics, "florence2": florence2}
