"""The pipelines with a transformer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import transformers
from torch import nn

from ..pipeline_zoo import autoencoder, clip_encoder, clip_tokenizer, t5_encoder
from ..tokenizers import QWEN_CHAT, byte_level, mistral_processor, spaced, t5
from ..zoo import LATENTS, POOLED, WIDTH
from .parts import (
    HEIGHT,
    WIDTH_PIXELS,
    Parts,
    Walked,
    chroma_for_inpainting,
    decoder,
    denoiser,
    hunyuan_autoencoder,
    like,
    ltx_autoencoder,
    mask,
    mistral,
    picture,
    qwen_autoencoder,
    qwen_vl,
    sana_autoencoder,
    seeing_clip,
    wan_autoencoder,
)

WALK: dict[str, Walked] = {}

# Stable Diffusion 3

_SD3: Parts = {
    "vae": autoencoder,
    "transformer": partial(denoiser, "SD3Transformer2DModel"),
    "tokenizer": clip_tokenizer,
    "text_encoder": lambda: clip_encoder(clip_tokenizer(), 12, projection=POOLED // 2),
    "tokenizer_2": clip_tokenizer,
    "text_encoder_2": lambda: clip_encoder(clip_tokenizer(), 16, projection=POOLED // 2),
    "tokenizer_3": t5,
    "text_encoder_3": lambda: t5_encoder(t5()),
    "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "pag_applied_layers": lambda: ["blocks.1"],
    "controlnet": lambda: diffusers.SD3ControlNetModel.from_transformer(
        denoiser("SD3Transformer2DModel"), num_layers=1, num_extra_conditioning_channels=0
    ),
}
WALK |= {
    name: Walked(_SD3)
    for name in (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3PAGPipeline",
        "StableDiffusion3PAGImg2ImgPipeline",
        "StableDiffusion3ControlNetPipeline",
    )
}
WALK["StableDiffusion3Pipeline/skipped layers"] = Walked(_SD3).and_(
    skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0
)
# It takes pictures of 16 channels alone.
WALK["StableDiffusion3InpaintPipeline"] = Walked(_SD3).and_(
    {
        "vae": partial(autoencoder, latents=16),
        "transformer": partial(denoiser, "SD3Transformer2DModel", in_channels=16, out_channels=16),
    }
)
WALK["StableDiffusion3ControlNetInpaintingPipeline"] = Walked(_SD3).and_(
    {
        "controlnet": lambda: diffusers.SD3ControlNetModel.from_transformer(
            denoiser("SD3Transformer2DModel"), num_layers=1, num_extra_conditioning_channels=1
        )
    },
    control_mask=mask(),
)

# Flux

_FLUX: Parts = {
    "vae": autoencoder,
    "transformer": partial(denoiser, "FluxTransformer2DModel"),
    "tokenizer": clip_tokenizer,
    "text_encoder": lambda: clip_encoder(clip_tokenizer(), POOLED),
    "tokenizer_2": t5,
    "text_encoder_2": lambda: t5_encoder(t5()),
    "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "controlnet": lambda: diffusers.FluxControlNetModel.from_transformer(
        denoiser("FluxTransformer2DModel"), num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    ),
}
_FLUX_CONTROL: Parts = {
    **_FLUX,
    "transformer": partial(denoiser, "FluxTransformer2DModel", in_channels=8 * LATENTS, out_channels=4 * LATENTS),
}
WALK |= {
    name: Walked(_FLUX)
    for name in (
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
        "FluxKontextPipeline",
        "FluxKontextInpaintPipeline",
    )
}
for _name in ("FluxKontextPipeline", "FluxKontextInpaintPipeline"):
    WALK[_name] = Walked(_FLUX).and_(max_area=HEIGHT * WIDTH_PIXELS, _auto_resize=False)
WALK |= {
    name: Walked(_FLUX_CONTROL) for name in ("FluxControlPipeline", "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline")
}
WALK["FluxControlInpaintPipeline"] = Walked(_FLUX).and_(
    {"transformer": partial(denoiser, "FluxTransformer2DModel", in_channels=8 * LATENTS, out_channels=4 * LATENTS)}
)
WALK["FluxFillPipeline"] = Walked(_FLUX).and_(
    # The latents, those of the masked picture, and the mask: sixteen of its pixels (4 x 4) for each place of a latent.
    {"transformer": partial(denoiser, "FluxTransformer2DModel", in_channels=8 * LATENTS + 4 * 16, out_channels=4 * LATENTS)}
)
_CHROMA: Parts = {
    **_FLUX,
    "transformer": partial(denoiser, "ChromaTransformer2DModel"),
    "tokenizer": t5,
    "text_encoder": lambda: t5_encoder(t5()),
}
WALK |= {name: Walked(_CHROMA) for name in ("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline")}
WALK["ChromaInpaintPipeline"] = Walked(_CHROMA).and_({"transformer": chroma_for_inpainting})


_KLEIN: Parts = {
    "vae": lambda: diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=LATENTS,
        norm_num_groups=4,
    ).eval(),
    "transformer": partial(denoiser, "Flux2Transformer2DModel", joint_attention_dim=3 * WIDTH),
    "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "tokenizer": lambda: byte_level(chat_template=QWEN_CHAT),
    "text_encoder": lambda: decoder("Qwen3ForCausalLM", "Qwen3Config"),
}
WALK |= {
    name: Walked(_KLEIN).and_(text_encoder_out_layers=(1, 2, 3), max_sequence_length=120)
    for name in ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline")
}
WALK["Flux2KleinKVPipeline"] = WALK["Flux2KleinKVPipeline"].and_(image=picture(1, 64, 96))
WALK["Flux2KleinPipeline/with a picture"] = WALK["Flux2KleinPipeline"].and_(image=picture(1, 64, 96))
WALK["Flux2KleinPipeline"] = WALK["Flux2KleinPipeline"].and_(image=None)
WALK["Flux2Pipeline"] = Walked(_KLEIN).and_(
    {"tokenizer": mistral_processor, "text_encoder": mistral},
    text_encoder_out_layers=(1, 2, 3),
    max_sequence_length=400,
    image=None,
)

# Transformers whose text is attended to beside the picture, or apart

_FLOW: Parts = {
    "vae": autoencoder,
    "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "pag_applied_layers": lambda: ["blocks.1"],
}


def _one_text(key: str, tokenizer: Callable[[], Any], encoder: Callable[[], nn.Module]) -> Walked:
    return Walked({**_FLOW, "transformer": partial(denoiser, key), "tokenizer": tokenizer, "text_encoder": encoder})


_T5 = (t5, lambda: t5_encoder(t5()))
_GEMMA = (partial(spaced, "<s>", side="right"), partial(decoder, "Gemma2Model", "Gemma2Config"))
_PIXART = _one_text("PixArtTransformer2DModel", *_T5).and_({"scheduler": lambda: diffusers.DPMSolverMultistepScheduler()})
_SANA = _one_text("SanaTransformer2DModel", *_GEMMA).and_(
    {"vae": sana_autoencoder}, complex_human_instruction=None, height=2 * HEIGHT, width=2 * WIDTH_PIXELS
)


WALK |= {
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
    "PixArtSigmaPAGPipeline": _PIXART,
    "SanaPipeline": _SANA,
    "SanaPAGPipeline": _SANA,
    "AuraFlowPipeline": _one_text("AuraFlowTransformer2DModel", t5, lambda: t5_encoder(t5())),
    "Lumina2Pipeline": _one_text("Lumina2Transformer2DModel", *_GEMMA).and_(
        {"transformer": partial(denoiser, "Lumina2Transformer2DModel", axes_lens=(256, 16, 16))}, max_sequence_length=200
    ),
    "CogView4Pipeline": _one_text(
        "CogView4Transformer2DModel",
        partial(byte_level, "[gMASK]", "<sop>", side="left"),
        partial(decoder, "GlmModel", "GlmConfig"),
    ),
}

WALK["CogView4ControlPipeline"] = WALK["CogView4Pipeline"].and_(
    {"transformer": partial(denoiser, "CogView4Transformer2DModel", in_channels=2 * LATENTS)}
)
WALK["SanaPipeline/with an instruction"] = _SANA.and_(complex_human_instruction=["Tell of a cat.", "So: "], max_sequence_length=40)
WALK["SanaSprintPipeline"] = WALK["SanaSprintImg2ImgPipeline"] = _SANA.and_(
    {
        "transformer": partial(denoiser, "SanaTransformer2DModel", guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        "scheduler": lambda: diffusers.SCMScheduler(),
    },
    intermediate_timesteps=None,
    num_inference_steps=2,
    strength=1.0,
)
WALK["SanaControlNetPipeline"] = _SANA.and_(
    {"controlnet": partial(like, "SanaTransformer2DModel", "SanaControlNetModel", num_layers=1)}
)


# Qwen-Image


def _drop_template(pipe: Any) -> None:
    """34 tokens with Qwen's own vocabulary."""
    before = pipe.prompt_template_encode.partition("{}")[0]
    pipe.prompt_template_encode_start_idx = len(pipe.tokenizer(before).input_ids)


_QWEN = Walked(
    {
        "vae": qwen_autoencoder,
        "transformer": partial(denoiser, "QwenImageTransformer2DModel"),
        "tokenizer": byte_level,
        "text_encoder": qwen_vl,
        "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "controlnet": partial(like, "QwenImageTransformer2DModel", "QwenImageControlNetModel"),
    },
    {"negative_prompt": "two birds"},
    _drop_template,
)
WALK |= dict.fromkeys(
    ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", "QwenImageControlNetPipeline"), _QWEN
)

# Videos

_WAN = Walked(
    {
        "transformer": partial(denoiser, "WanTransformer3DModel"),
        "tokenizer": t5,
        "text_encoder": lambda: t5_encoder(t5()),
        "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    },
    {"height": 64, "width": 96, "output_type": "latent"},
)


def _without_ftfy(pipe: Any) -> None:
    """This pipeline's module asks for ftfy even where it is not installed."""
    module: Any = sys.modules[type(pipe).__module__]
    if not hasattr(module, "ftfy"):
        module.ftfy = SimpleNamespace(fix_text=str)


def _hunyuan_template() -> dict[str, Any]:
    before = "<|start_header_id|>system<|end_header_id|>\n\nA cat in a hat:<|eot_id|>user\n\n"
    return {"template": before + "{}<|eot_id|>", "crop_start": len(byte_level("<|begin_of_text|>")(before).input_ids)}


WALK |= {
    "WanPipeline": _WAN,
    "WanPipeline/two transformers": _WAN.and_(
        {"transformer_2": partial(denoiser, "WanTransformer3DModel"), "boundary_ratio": lambda: 0.9}
    ),
    "WanVideoToVideoPipeline": replace(
        _WAN.and_({"vae": wan_autoencoder}, video=[picture(n, 64, 96) for n in range(5)]), prepare=_without_ftfy
    ),
    "LTXPipeline": _WAN.and_({"transformer": partial(denoiser, "LTXVideoTransformer3DModel")}, height=128, width=192, num_frames=9),
    "HunyuanVideoPipeline": _WAN.and_(
        {
            "transformer": partial(denoiser, "HunyuanVideoTransformer3DModel"),
            "tokenizer": partial(byte_level, "<|begin_of_text|>"),
            "text_encoder": partial(decoder, "LlamaModel", "LlamaConfig"),
            "tokenizer_2": partial(clip_tokenizer, length=77),
            "text_encoder_2": lambda: clip_encoder(clip_tokenizer(length=77), POOLED),
        },
        prompt_template=_hunyuan_template(),
        max_sequence_length=40,
    ),
}


def _seeing_wan() -> nn.Module:
    return denoiser("WanTransformer3DModel", in_channels=2 * LATENTS + 4, out_channels=LATENTS, image_dim=16, added_kv_proj_dim=32)


_LTX = WALK["LTXPipeline"].and_({"vae": ltx_autoencoder}, height=64, width=96, num_frames=5, image=picture(1, 64, 96))
WALK |= {
    "LTXImageToVideoPipeline": _LTX,
    "LTXConditionPipeline": _LTX,
    "WanImageToVideoPipeline": _WAN.and_(
        {
            "vae": wan_autoencoder,
            "transformer": partial(denoiser, "WanTransformer3DModel", in_channels=2 * LATENTS + 4, out_channels=LATENTS),
        },
        image=picture(1, 64, 96),
    ),
    "WanImageToVideoPipeline/with an image encoder": _WAN.and_(
        {
            "vae": wan_autoencoder,
            "transformer": _seeing_wan,
            "image_encoder": partial(seeing_clip, "CLIPVisionModel"),
            "image_processor": lambda: transformers.CLIPImageProcessor(crop_size=32, size=32),
        },
        image=picture(1, 64, 96),
    ),
    "LucyEditPipeline": _WAN.and_(
        {
            "vae": wan_autoencoder,
            "transformer": partial(denoiser, "WanTransformer3DModel", in_channels=2 * LATENTS, out_channels=LATENTS),
        },
        video=[picture(n, 64, 96) for n in range(5)],
    ),
    "HunyuanSkyreelsImageToVideoPipeline": WALK["HunyuanVideoPipeline"].and_(
        {
            "vae": hunyuan_autoencoder,
            "transformer": partial(denoiser, "HunyuanVideoTransformer3DModel", in_channels=2 * LATENTS, out_channels=LATENTS),
        },
        image=picture(1, 64, 96),
    ),
}
for _name in ("LucyEditPipeline", "WanImageToVideoPipeline", "WanImageToVideoPipeline/with an image encoder"):
    WALK[_name] = replace(WALK[_name], prepare=_without_ftfy)
WALK["LTXConditionPipeline"] = _LTX.and_(image=None, video=[picture(n, 64, 96) for n in range(5)], num_frames=9)
