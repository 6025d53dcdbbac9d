"""Tiny models whose image tokens are learned queries, and two that stand for code outside transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2Processor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Idefics2ForConditionalGeneration,
    Idefics2Processor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    Qwen2ForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from lavender.students.boxes import square_boxes
from lavender.students.families import Family, ProcessedImages, register_family
from lavender.testing.student import Student, seeded

from . import tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
QUERIES = 4


def text_sizes(tok: PreTrainedTokenizerFast) -> dict[str, Any]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {**SIZES, **heads, "vocab_size": len(tok), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def idefics2() -> Student:
    tok = tokenizer(image_token="<image>", image_boundary_token="<fake_token_around_image>")
    processor = Idefics2Processor(
        image_processor=Idefics2ImageProcessorPil(size={"shortest_edge": 24, "longest_edge": 48}),
        tokenizer=tok,
        image_seq_len=QUERIES,
    )
    config = Idefics2ForConditionalGeneration.config_class(
        text_config={"model_type": "mistral", **text_sizes(tok)},
        vision_config={**SIZES, "num_attention_heads": 2, "image_size": 48, "patch_size": 8},
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": QUERIES,
            "resampler_depth": 3,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        image_token_id=tok.image_token_id,
    )
    return Student(seeded(lambda: Idefics2ForConditionalGeneration(config)), processor, "<image>")


def blip_2() -> Student:
    tok = tokenizer()
    # The processor adds its image token to the tokenizer, and puts the queries before the text itself.
    processor = Blip2Processor(BlipImageProcessorPil(size={"height": 48, "width": 48}), tok, num_query_tokens=QUERIES)
    config = Blip2ForConditionalGeneration.config_class(
        text_config={
            "model_type": "opt",
            "vocab_size": len(tok),
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={**SIZES, "num_attention_heads": 2, "image_size": 48, "patch_size": 8},
        # Every second layer of the Q-Former attends to the patches.
        qformer_config={**SIZES, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 8, "max_position_embeddings": 8},
        num_query_tokens=QUERIES,
        image_text_hidden_size=8,
        image_token_index=tok.convert_tokens_to_ids("<image>"),
    )
    return Student(seeded(lambda: Blip2ForConditionalGeneration(config)), processor, "")


class MiniCPMVConfig(PreTrainedConfig):
    model_type = "minicpmv"
    sub_configs_defaults = {"text_config": Qwen2Config, "vision_config": Siglip2VisionConfig}  # noqa: RUF012

    text_config: Any = None
    vision_config: Any = None
    query_num: int = 64
    image_token_id: int = 0


class Resampler(nn.Module):
    """As in MiniCPM-V 2.5 and 2.6: one cross-attention of learned queries to patches that know their row and column."""

    def __init__(self, queries: int, width: int, heads: int, kv_width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(queries, width))
        self.kv_proj = nn.Linear(kv_width, width, bias=False)
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_q, self.ln_kv, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, width))

    def forward(self, x: torch.Tensor, tgt_sizes: torch.Tensor) -> torch.Tensor:
        places = [torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(x) for rows, columns in tgt_sizes.tolist()]
        rates = 0.5 ** torch.arange(x.shape[-1] // 4).to(x)
        angles = pad_sequence([(place[..., None] * rates).flatten(1) for place in places])
        padding = torch.arange(x.shape[1], device=x.device) >= tgt_sizes.prod(dim=-1)[:, None]
        x = self.ln_kv(self.kv_proj(x)).permute(1, 0, 2)
        query = self.ln_q(self.query)[:, None].repeat(1, x.shape[1], 1)
        key = x + torch.cat([angles.sin(), angles.cos()], dim=-1)
        out = self.attn(query, key, x, key_padding_mask=padding)[0]
        return self.ln_post(out.permute(1, 0, 2)) @ self.proj


class MiniCPMV(PreTrainedModel):
    """The shape of MiniCPM-V's remote code: `llm`, `vpm` and `resampler`."""

    config: MiniCPMVConfig
    config_class = MiniCPMVConfig
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: MiniCPMVConfig) -> None:
        super().__init__(config)
        self.llm = Qwen2ForCausalLM(config.text_config)
        self.vpm = Siglip2VisionModel(config.vision_config)
        self.resampler = Resampler(config.query_num, config.text_config.hidden_size, 4, config.vision_config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.llm.get_decoder()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        tgt_sizes: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            counts = tgt_sizes.prod(dim=-1)
            side = self.config.vision_config.patch_size
            # All patches stand side by side: [1, C, side, patches * side].
            patches = pixel_values[0].unflatten(-1, (-1, side)).permute(2, 0, 1, 3).flatten(1)
            padded = pad_sequence(list(patches.split(counts.tolist())), batch_first=True)
            mask = torch.arange(padded.shape[1], device=counts.device) < counts[:, None]
            seen = self.vpm(pixel_values=padded, pixel_attention_mask=mask, spatial_shapes=tgt_sizes).last_hidden_state
            queries = self.resampler(seen, tgt_sizes).to(embeds.dtype)
            embeds = embeds.masked_scatter((input_ids == self.config.image_token_id)[..., None], queries)
        return self.llm(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels, **kwargs)


class MiniCPMVProcessor(ProcessorMixin):
    def __init__(self, image_processor: Any, tokenizer: Any, query_num: int = 64) -> None:
        super().__init__(image_processor, tokenizer)
        self.query_num = query_num
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = super().__call__(*args, **kwargs)
        batch["tgt_sizes"] = batch.pop("target_sizes")
        return batch

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        return self.image_token * self.query_num

    @property
    def unused_input_names(self) -> list[str]:
        return ["grids", "num_patches_per_image"]


def minicpmv() -> Student:
    tok = tokenizer(image_token="<unk_image>")
    images = MiniCPMV4_6ImageProcessorPil(scale_resolution=64, patch_size=4, slice_mode=False)
    config = MiniCPMVConfig(
        text_config=Qwen2Config(**text_sizes(tok)),
        vision_config=Siglip2VisionConfig(**SIZES, num_attention_heads=2, patch_size=4, num_patches=36),
        query_num=QUERIES,
        image_token_id=tok.image_token_id,
    )
    return Student(seeded(lambda: MiniCPMV(config)), MiniCPMVProcessor(images, tok, query_num=QUERIES), "<unk_image>")


class FlamingoConfig(PreTrainedConfig):
    model_type = "flamingo"
    sub_configs_defaults = {"text_config": LlamaConfig, "vision_config": CLIPVisionConfig}  # noqa: RUF012

    text_config: Any = None
    vision_config: Any = None
    image_token_id: int = 0


class FlamingoCrossAttention(nn.Module):
    def __init__(self, config: LlamaConfig, vision_width: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = 0.0
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(vision_width, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(vision_width, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, vision: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        query, key, value = heads(self.q_proj(hidden_states)), heads(self.k_proj(vision)), heads(self.v_proj(vision))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(self, query, key, value, None, scaling=self.scaling, is_causal=False, **kwargs)
        return self.o_proj(out.flatten(2)), weights


class FlamingoLayer(GradientCheckpointingLayer):
    """A decoder layer, preceded by a gated cross-attention to the picture."""

    def __init__(self, decoder_layer: nn.Module, config: LlamaConfig, vision_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.cross_attn = FlamingoCrossAttention(config, vision_width)
        self.gate = nn.Parameter(torch.ones(1))
        self.decoder_layer = decoder_layer

    def forward(
        self,
        hidden_states: torch.Tensor,
        vision: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if vision is not None:
            seen, _ = self.cross_attn(self.norm(hidden_states), vision, **kwargs)
            hidden_states = hidden_states + self.gate.tanh() * seen
        return self.decoder_layer(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )


class Flamingo(PreTrainedModel):
    """The shape of OpenFlamingo's, with neither its perceiver nor its mask: every word may look at the picture."""

    config: FlamingoConfig
    config_class = FlamingoConfig
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__(config)
        width = config.vision_config.hidden_size
        self.vision_encoder = CLIPVisionModel(config.vision_config)
        self.lang_encoder = LlamaForCausalLM(config.text_config)
        decoder = self.get_decoder()
        decoder.layers = nn.ModuleList(FlamingoLayer(layer, decoder.config, width) for layer in decoder.layers)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.lang_encoder.get_input_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.lang_encoder.get_decoder()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        vision = None if pixel_values is None else self.vision_encoder(pixel_values).last_hidden_state[:, 1:]
        return self.lang_encoder(input_ids, attention_mask=attention_mask, labels=labels, vision=vision, **kwargs)


class FlamingoProcessor(ProcessorMixin):
    """Leaves one image token in the text where the picture is."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        super().__init__(image_processor, tokenizer)
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        return self.image_token


def _stretched(pictures: ProcessedImages) -> list[torch.Tensor]:
    size, patch = pictures.processor.image_processor.size, pictures.config.vision_config.patch_size
    return [square_boxes(size["height"] // patch, size["width"] // patch) for _ in pictures.sizes]


# As a user adds a model that lavender does not know.
register_family("flamingo", Family(boxes=_stretched, cross=True))


def flamingo() -> Student:
    tok = tokenizer(image_token="<image>")
    images = CLIPImageProcessorPil(size={"height": 48, "width": 48}, do_center_crop=False)
    config = FlamingoConfig(
        text_config=LlamaConfig(**text_sizes(tok)),
        vision_config=CLIPVisionConfig(**SIZES, num_attention_heads=2, image_size=48, patch_size=8),
        image_token_id=tok.image_token_id,
    )
    return Student(seeded(lambda: Flamingo(config)), FlamingoProcessor(images, tok), "<image>")


STUDENTS: dict[str, Callable[[], Student]] = {
    "idefics2": idefics2,
    "blip-2": blip_2,
    "minicpmv": minicpmv,
    "flamingo": flamingo,
}
