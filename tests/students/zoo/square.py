"""Tiny models whose image tokens are one square lattice."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPVisionConfig,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLProcessor,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4Processor,
    Gemma4TextConfig,
    Gemma4VisionConfig,
    GemmaConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Ovis2Processor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.ovis2.configuration_ovis2 import Ovis2VisionConfig
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.video_processing_utils import BaseVideoProcessor

from lavender.testing.student import Student, seeded

from . import tokenizer

SIDE = 48
PATCH = 8
FRAME = {"height": SIDE, "width": SIDE}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
"""A vision tower of 6 by 6 patches, in the words of most configs."""


def text_of(tok: PreTrainedTokenizerFast) -> dict[str, Any]:
    """A text tower with grouped keys, in the words of most configs."""
    return {
        "vocab_size": len(tok),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": tok.pad_token_id,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
    }


def _llava_processor(tok: PreTrainedTokenizerFast) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=FRAME),
        tokenizer=tok,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava() -> Student:
    tok = tokenizer(image_token="<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**text_of(tok)),
        image_token_index=tok.image_token_id,
        vision_feature_layer=-1,
    )
    return Student(seeded(lambda: LlavaForConditionalGeneration(config)), _llava_processor(tok), "<image>")


def vipllava() -> Student:
    tok = tokenizer(image_token="<image>")
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**text_of(tok)),
        image_token_index=tok.image_token_id,
        vision_feature_layer=[-1, -2],
    )
    return Student(seeded(lambda: VipLlavaForConditionalGeneration(config)), _llava_processor(tok), "<image>")


def _paligemma(text_config: type[GemmaConfig | Gemma2Config]) -> Student:
    tok = tokenizer(image_token="<image>")
    image_processor = SiglipImageProcessorPil(size=FRAME)
    image_processor.image_seq_length = (SIDE // PATCH) ** 2
    processor = PaliGemmaProcessor(image_processor=image_processor, tokenizer=tok)
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        # The processor has added the tokens of places and masks by now.
        text_config=text_config(**text_of(tok), head_dim=8),
        image_token_index=tok.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    return Student(seeded(lambda: PaliGemmaForConditionalGeneration(config)), processor, "<image>")


def paligemma() -> Student:
    return _paligemma(GemmaConfig)


def paligemma2() -> Student:
    """Its text tower caps attention scores, which only eager attention does."""
    return _paligemma(Gemma2Config)


def gemma3() -> Student:
    tok = tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    pooled = (SIDE // PATCH // 2) ** 2
    processor = Gemma3Processor(Gemma3ImageProcessorPil(size=FRAME), tok, image_seq_length=pooled)
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Gemma3TextConfig(
            **text_of(tok), head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        ),
        mm_tokens_per_image=pooled,
        image_token_index=tok.image_token_id,
        boi_token_index=tok.boi_token_id,
        eoi_token_index=tok.eoi_token_id,
    )
    return Student(seeded(lambda: Gemma3ForConditionalGeneration(config)), processor, "<start_of_image>")


class _Gemma4Processor(Gemma4Processor):
    """Without torchvision there are no video processors, nor the class that its arguments are checked against."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)


def gemma4() -> Student:
    """70 image tokens at most, the fewest that its processor takes, each of 2 by 2 patches."""
    tok = tokenizer(
        image_token="<|image|>",
        boi_token="<|image>",
        eoi_token="<image|>",
        audio_token="<|audio|>",
        boa_token="<|audio>",
        eoa_token="<audio|>",
    )
    processor = _Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2),
        tokenizer=tok,
        video_processor=BaseVideoProcessor(),
    )
    config = Gemma4Config(
        vision_config=Gemma4VisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            patch_size=4,
            pooling_kernel_size=2,
            position_embedding_size=160,
        ),
        text_config=Gemma4TextConfig(
            **{**text_of(tok), "num_hidden_layers": 4},
            num_kv_shared_layers=2,
            head_dim=8,
            global_head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
            vocab_size_per_layer_input=len(tok),
            hidden_size_per_layer_input=8,
            use_bidirectional_attention="vision",
        ),
        image_token_id=tok.image_token_id,
        boi_token_id=tok.boi_token_id,
        eoi_token_id=tok.eoi_token_id,
        video_token_id=processor.video_token_id,
        audio_token_id=tok.audio_token_id,
    )
    return Student(seeded(lambda: Gemma4ForConditionalGeneration(config)), processor, "<|image|>")


def janus() -> Student:
    tok = tokenizer(image_token="<image>", boi_token="<begin_of_image>", eoi_token="<end_of_image>")
    processor = JanusProcessor(JanusImageProcessorPil(size=FRAME), tok, num_image_tokens=(SIDE // PATCH) ** 2)
    config = JanusConfig(
        vision_config=JanusVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            mlp_ratio=1.5,
            projection_dim=32,
            num_image_tokens=(SIDE // PATCH) ** 2,
        ),
        vq_config=JanusVQVAEConfig(
            num_embeddings=4,
            latent_channels=4,
            base_channels=32,
            channel_multiplier=[1],
            num_res_blocks=0,
            projection_dim=32,
            image_token_embed_dim=32,
        ),
        text_config=LlamaConfig(**text_of(tok)),
        image_token_id=tok.image_token_id,
    )
    return Student(seeded(lambda: JanusForConditionalGeneration(config)), processor, "<image>")


def deepseek_vl() -> Student:
    tok = tokenizer(image_token="<image_placeholder>")
    processor = DeepseekVLProcessor(DeepseekVLImageProcessorPil(size=FRAME), tok, num_image_tokens=(SIDE // PATCH) ** 2)
    config = DeepseekVLConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=LlamaConfig(**text_of(tok)),
        image_token_id=tok.image_token_id,
    )
    return Student(seeded(lambda: DeepseekVLForConditionalGeneration(config)), processor, "<image_placeholder>")


def _ovis2(**tiling: Any) -> Student:
    indicators = {f"{name}_token": f"<IMG_{name.upper()}>" for name in ("start", "grid", "col", "row", "end")}
    tok = tokenizer(image_token="<image>", atom_token="<IMG_ATOM>", **indicators)
    processor = Ovis2Processor(Ovis2ImageProcessorPil(size=FRAME, **tiling), tok, image_seq_length=(SIDE // PATCH // 2) ** 2)
    config = Ovis2Config(
        vision_config=Ovis2VisionConfig(**TOWER, hidden_stride=2, vocab_size=64),
        text_config=Qwen2Config(**text_of(tok)),
        image_token_id=tok.atom_token_id,
        visual_indicator_token_ids=tok.convert_tokens_to_ids(list(indicators.values())),
        vocab_size=len(tok),
        hidden_size=32,
    )
    return Student(seeded(lambda: Ovis2ForConditionalGeneration(config)), processor, "<image>")


def ovis2() -> Student:
    return _ovis2()


def ovis2_tiled() -> Student:
    return _ovis2(crop_to_patches=True, max_patches=4)


STUDENTS = {
    "llava": llava,
    "vipllava": vipllava,
    "paligemma": paligemma,
    "paligemma/gemma2": paligemma2,
    "gemma3": gemma3,
    "gemma4": gemma4,
    "janus": janus,
    "deepseek_vl": deepseek_vl,
    "ovis2": ovis2,
    "ovis2/tiled": ovis2_tiled,
}
