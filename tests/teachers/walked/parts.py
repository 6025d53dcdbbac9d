"""What the pipelines of the walk are made of: small models with random weights, pictures and masks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import numpy as np
import transformers
from PIL import Image
from torch import nn

from ..zoo import DENOISERS, LATENTS, POOLED, WIDTH

Parts = Mapping[str, Callable[[], Any]]
"""Names of a pipeline's components -> their builders."""

PROMPT = "a cat in a red hat"
HEIGHT, WIDTH_PIXELS = 32, 48


def picture(seed: int = 0, height: int = HEIGHT, width: int = WIDTH_PIXELS) -> Image.Image:
    """A picture of random squares."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height))


def mask() -> Image.Image:
    """A mask of the picture's left half."""
    values = np.zeros((HEIGHT, WIDTH_PIXELS), np.uint8)
    values[:, : WIDTH_PIXELS // 2] = 255
    return Image.fromarray(values)


@dataclass(frozen=True)
class Walked:
    """A class of the walk.

    Attributes:
        parts: builders of its components; those that its `__init__` does not take are left.
        options: arguments of its call, in place of the usual ones; None leaves an argument out.
        prepare: what is done to the pipeline when it is built.
        build: what builds it, in place of its class and parts.
        call: how it is called, with a generator and a prompt, where it takes more than one call.
    """

    parts: Parts
    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], None] | None = None
    build: Callable[[], Any] | None = None
    call: Callable[[Any, dict[str, Any]], Any] | None = None

    def and_(self, parts: Parts | None = None, **options: Any) -> Walked:
        """The same with other parts and options."""
        return replace(self, parts={**self.parts, **(parts or {})}, options={**self.options, **options})


def denoiser(key: str, **config: Any) -> nn.Module:
    """A denoiser of the zoo, with some of its config changed."""
    model = DENOISERS[key]().model
    whole = {key: value for key, value in model.config.items() if key != "_use_default_values"}
    return type(model).from_config({**whole, **config}).eval() if config else model


def small(cls: str, config: str, **settings: Any) -> nn.Module:
    """A small model of transformers."""
    return getattr(transformers, cls)(getattr(transformers, config)(**settings)).eval()


_DECODER = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VOCABULARY = 700


def decoder(cls: str, config: str, **settings: Any) -> nn.Module:
    """A small language model."""
    return small(cls, config, vocab_size=_VOCABULARY, **{**_DECODER, **settings})


def qwen_vl() -> nn.Module:
    """A small Qwen 2.5 VL."""
    text = {key: value for key, value in _DECODER.items() if key != "head_dim"}
    rotary = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, "vocab_size": _VOCABULARY, "rope_scaling": rotary},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH},
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def mistral() -> nn.Module:
    """A small Mistral 3."""
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", "vocab_size": _VOCABULARY, **_DECODER},
        vision_config={"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14},
    )  # fmt: skip
    return transformers.Mistral3ForConditionalGeneration(config).eval()


def controlnet(key: str) -> nn.Module:
    """A ControlNet of a U-Net of the zoo, which does something."""
    made = diffusers.ControlNetModel.from_unet(denoiser(key), conditioning_embedding_out_channels=(8, 16, 16))
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.1)
    return made.eval()


def like(key: str, cls: str, **settings: Any) -> nn.Module:
    """A model of diffusers with the sizes of a denoiser of the zoo, as far as it has such."""
    kind = getattr(diffusers, cls)
    known = inspect.signature(kind.__init__).parameters
    sizes = {name: value for name, value in denoiser(key).config.items() if name in known}
    return kind(**{**sizes, **settings}).eval()


def seeing_clip(cls: str = "CLIPVisionModelWithProjection") -> nn.Module:
    """CLIP's encoder of pictures."""
    return small(
        cls, "CLIPVisionConfig",
        hidden_size=16, intermediate_size=16, projection_dim=POOLED, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip


def upscaling_unet() -> nn.Module:
    """The U-Net of the upscaler of latents."""
    return diffusers.UNet2DConditionModel(
        act_fn="gelu", attention_head_dim=8, norm_num_groups=None, block_out_channels=[32, 32, 64, 64], time_cond_proj_dim=160,
        conv_in_kernel=1, conv_out_kernel=1, cross_attention_dim=WIDTH, in_channels=2 * LATENTS, out_channels=LATENTS + 1,
        down_block_types=("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 3),
        up_block_types=(*["KCrossAttnUpBlock2D"] * 3, "KUpBlock2D"), only_cross_attention=False, mid_block_type=None,
        resnet_time_scale_shift="scale_shift", time_embedding_type="fourier", timestep_post_act="gelu",
    ).eval()  # fmt: skip


def image_normalizer() -> nn.Module:
    """What StableUnCLIP scales embeddings of pictures with."""
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    return StableUnCLIPImageNormalizer(embedding_dim=POOLED)


def chat_glm_encoder() -> nn.Module:
    """The text encoder of Kolors."""
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    sizes = {"padded_vocab_size": 400, "hidden_size": WIDTH, "ffn_hidden_size": 48, "kv_channels": 8, "num_attention_heads": 4}
    config = ChatGLMConfig(
        num_layers=2, original_rope=True, seq_length=256, multi_query_attention=True, multi_query_group_num=2, **sizes
    )
    model = ChatGLMModel(config)
    for parameter in model.parameters():  # which it leaves as the memory was
        parameter.data.normal_(0, 0.2)
    return model.eval()


def chroma_for_inpainting() -> nn.Module:
    """With a setting of Flux that this pipeline asks for and Chroma's class does not have."""
    model: Any = denoiser("ChromaTransformer2DModel")
    model.register_to_config(guidance_embeds=False)
    return model


def sana_autoencoder() -> nn.Module:
    """Sana's autoencoder: latents of an eighth of the picture's height and width."""
    return diffusers.AutoencoderDC(
        latent_channels=LATENTS,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        encoder_qkv_multiscales=((), (), (5,), ()),
        decoder_qkv_multiscales=((), (), (5,), ()),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    ).eval()


def qwen_autoencoder() -> nn.Module:
    """Of Qwen-Image: latents of a quarter of the picture's height and width."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=LATENTS, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * LATENTS, latents_std=[1.0] * LATENTS,
    ).eval()  # fmt: skip


def wan_autoencoder() -> nn.Module:
    """Of Wan: an eighth of the height and width, a quarter of the frames."""
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=LATENTS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENTS, latents_std=[1.0] * LATENTS,
    ).eval()  # fmt: skip


def ltx_autoencoder() -> nn.Module:
    """Of LTX: a quarter of the height and width, and of the frames."""
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=LATENTS, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    ).eval()  # fmt: skip


def hunyuan_autoencoder() -> nn.Module:
    """Of HunyuanVideo: an eighth of the height and width, a quarter of the frames."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=LATENTS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    ).eval()  # fmt: skip
