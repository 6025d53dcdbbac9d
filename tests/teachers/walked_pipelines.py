"""Tiny pipelines of the classes that diffusers has, with random weights, and a call of each: what the walk over them draws."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn

from recipes.teacher import make_scheduler

from .pipeline_zoo import autoencoder, clip_encoder, clip_tokenizer, t5_encoder
from .tokenizers import QWEN_CHAT, byte_level, chat_glm, mistral_processor, spaced, t5
from .zoo import DENOISERS, LATENTS, POOLED, WIDTH

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


def frames(count: int = 5) -> list[Image.Image]:
    """A video."""
    return [picture(n) for n in range(count)]


@dataclass(frozen=True)
class Walked:
    """A class of the walk.

    Attributes:
        parts: builders of its components; those that its `__init__` does not take are left.
        options: arguments of its call, in place of the usual ones; None leaves an argument out.
        prepare: what is done to the pipeline when it is built.
        call: how it is called, with a generator and a prompt, where it takes more than one call.
    """

    parts: Parts
    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], None] | None = None
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


# Stable Diffusion

_SD: Parts = {
    "vae": autoencoder,
    "unet": partial(denoiser, "UNet2DConditionModel"),
    "tokenizer": clip_tokenizer,
    "text_encoder": lambda: clip_encoder(clip_tokenizer(), WIDTH),
    "scheduler": make_scheduler,
    "requires_safety_checker": lambda: False,
    "pag_applied_layers": lambda: ["mid"],
    "inverse_scheduler": lambda: diffusers.DDIMInverseScheduler(),
    "low_res_scheduler": lambda: diffusers.DDPMScheduler(),
    "controlnet": lambda: _controlnet("UNet2DConditionModel"),
    "adapter": lambda: diffusers.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=4),
}
_XL: Parts = {
    **_SD,
    "unet": partial(denoiser, "UNet2DConditionModel/sdxl"),
    "text_encoder": lambda: clip_encoder(clip_tokenizer(), WIDTH // 2),
    "tokenizer_2": clip_tokenizer,
    "text_encoder_2": lambda: clip_encoder(clip_tokenizer(), WIDTH // 2, projection=POOLED),
    "scheduler": lambda: diffusers.EulerDiscreteScheduler(steps_offset=1),
    "add_watermarker": lambda: False,
    "controlnet": lambda: _controlnet("UNet2DConditionModel/sdxl"),
    "adapter": lambda: diffusers.T2IAdapter(
        channels=[8, 16, 16, 16], num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter_xl"
    ),
}


def _controlnet(key: str, cls: str = "ControlNetModel") -> nn.Module:
    made = getattr(diffusers, cls).from_unet(denoiser(key), conditioning_embedding_out_channels=(8, 16, 16))
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.1)
    return made.eval()


def _union() -> nn.Module:
    config = {key: value for key, value in denoiser("UNet2DConditionModel/sdxl").config.items() if not key.startswith("_")}
    known = inspect.signature(diffusers.ControlNetUnionModel.__init__).parameters
    config = {key: value for key, value in config.items() if key in known}
    sizes = {"conditioning_embedding_out_channels": (8, 16, 16), "num_trans_channel": 8, "num_proj_channel": 8, "num_trans_head": 2}
    return diffusers.ControlNetUnionModel(**config, **sizes).eval()


def _lcm() -> Any:
    return diffusers.LCMScheduler.from_config(make_scheduler().config)


_LCM_UNET = partial(denoiser, "UNet2DConditionModel", time_cond_proj_dim=8)
_UNION: Parts = {"controlnet": lambda: _union()}

WALK: dict[str, Walked] = {
    name: Walked(_SD)
    for name in (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionControlNetPAGPipeline",
        "StableDiffusionControlNetPAGInpaintPipeline",
        "StableDiffusionPAGPipeline",
        "StableDiffusionPAGImg2ImgPipeline",
        "StableDiffusionPAGInpaintPipeline",
        "StableDiffusionSAGPipeline",
        "StableDiffusionPanoramaPipeline",
        "StableDiffusionAdapterPipeline",
        "StableDiffusionModelEditingPipeline",
        "SemanticStableDiffusionPipeline",
        "CycleDiffusionPipeline",
    )
}
WALK |= {
    name: Walked(_XL)
    for name in (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLControlNetPAGPipeline",
        "StableDiffusionXLControlNetPAGImg2ImgPipeline",
        "StableDiffusionXLPAGPipeline",
        "StableDiffusionXLPAGImg2ImgPipeline",
        "StableDiffusionXLPAGInpaintPipeline",
        "StableDiffusionXLAdapterPipeline",
    )
}
WALK |= {
    name: Walked(_XL).and_(_UNION, control_image=[picture(2)], control_mode=[0])
    for name in (
        "StableDiffusionXLControlNetUnionPipeline",
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        "StableDiffusionXLControlNetUnionInpaintPipeline",
    )
}
WALK |= {
    "LatentConsistencyModelPipeline": Walked(_SD).and_({"unet": _LCM_UNET, "scheduler": _lcm}),
    "LatentConsistencyModelImg2ImgPipeline": Walked(_SD).and_({"unet": _LCM_UNET, "scheduler": _lcm}),
    "StableDiffusionInstructPix2PixPipeline": Walked(_SD).and_(
        {"unet": partial(denoiser, "UNet2DConditionModel", in_channels=2 * LATENTS)}
    ),
    "StableDiffusionXLInstructPix2PixPipeline": Walked(_XL).and_(
        {"unet": partial(denoiser, "UNet2DConditionModel/sdxl", in_channels=2 * LATENTS)}
    ),
    "StableDiffusionAttendAndExcitePipeline": Walked(_SD).and_(
        token_indices=[2], attn_res=(8, 12), max_iter_to_alter=1, thresholds={}
    ),
    "StableDiffusionUpscalePipeline": Walked(_SD).and_(
        {"unet": partial(denoiser, "UNet2DConditionModel", in_channels=LATENTS + 3, num_class_embeds=1000)},
        image=picture(1, HEIGHT // 4, WIDTH_PIXELS // 4),
    ),
    "StableDiffusionGLIGENPipeline": Walked(_SD).and_(
        {"unet": partial(denoiser, "UNet2DConditionModel", attention_type="gated")},
        gligen_phrases=["red hat"],
        gligen_boxes=[[0.1, 0.1, 0.6, 0.6]],
    ),
    "StableDiffusionDiffEditPipeline": Walked(_SD).and_(
        mask_image=torch.ones(1, 1, 8, 12), image_latents=torch.zeros(1, LATENTS, 8, 12)
    ),
}
WALK |= {
    "StableDiffusionLDM3DPipeline": Walked(_SD).and_(output_type="np"),
    "StableDiffusionParadigmsPipeline": Walked(_SD).and_(
        {"scheduler": lambda: diffusers.DDIMParallelScheduler.from_config(make_scheduler().config)}
    ),
    "TextToVideoZeroPipeline": Walked(_SD).and_(t0=0, t1=1),
    "TextToVideoZeroSDXLPipeline": Walked(_XL).and_(t0=0, t1=1),
    "StableDiffusionPipeline/unguided": Walked(_SD).and_(guidance_scale=1.0),
    "StableDiffusionSAGPipeline/unguided": Walked(_SD).and_(guidance_scale=1.0),
    "StableDiffusionPAGPipeline/unguided": Walked(_SD).and_(guidance_scale=1.0),
    "StableDiffusionPanoramaPipeline/wide": Walked(_SD).and_(height=256, width=320),
}


def _unclip_image_encoder() -> nn.Module:
    return small(
        "CLIPVisionModelWithProjection", "CLIPVisionConfig",
        hidden_size=16, intermediate_size=16, projection_dim=POOLED, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip


def _k_unet() -> nn.Module:
    """The U-Net of the upscaler of latents."""
    return diffusers.UNet2DConditionModel(
        act_fn="gelu", attention_head_dim=8, norm_num_groups=None, block_out_channels=[64, 64], time_cond_proj_dim=160,
        conv_in_kernel=1, conv_out_kernel=1, cross_attention_dim=WIDTH, in_channels=2 * LATENTS, out_channels=LATENTS + 1,
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D"), up_block_types=("KCrossAttnUpBlock2D", "KUpBlock2D"),
        mid_block_type=None, resnet_time_scale_shift="scale_shift", time_embedding_type="fourier", timestep_post_act="gelu",
    ).eval()  # fmt: skip


def _edited(pipe: Any, options: dict[str, Any]) -> Any:
    """A call of LEdits++: its prompts say what is changed in a picture."""
    pipe.invert(image=picture(1, 64, 64), num_inversion_steps=4, skip=0.25, height=64, width=64, generator=options["generator"])
    return pipe(
        editing_prompt=[options["prompt"]],
        use_intersect_mask=False,
        generator=options["generator"],
        output_type="pt",
        return_dict=False,
    )


_DPM = {"scheduler": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=2)}
_EMBEDDINGS = torch.zeros(1, 16, WIDTH)

WALK |= {
    "StableUnCLIPImg2ImgPipeline": Walked(_SD).and_(
        {
            "unet": partial(
                denoiser, "UNet2DConditionModel", class_embed_type="projection", projection_class_embeddings_input_dim=2 * POOLED
            ),
            "image_encoder": _unclip_image_encoder,
            "feature_extractor": lambda: transformers.CLIPImageProcessor(crop_size=32, size=32),
            "image_normalizer": lambda: _image_normalizer(),
            "image_noising_scheduler": lambda: diffusers.DDPMScheduler(),
        }
    ),
    "StableDiffusionLatentUpscalePipeline": Walked(_SD).and_(
        {"unet": _k_unet, "scheduler": lambda: diffusers.EulerDiscreteScheduler(prediction_type="sample")},
        image=picture(1, 64, 64),
        height=64,
        width=64,
    ),
    "StableDiffusionPix2PixZeroPipeline": Walked(_SD).and_(source_embeds=_EMBEDDINGS, target_embeds=_EMBEDDINGS + 0.1),
    "LEditsPPPipelineStableDiffusion": replace(Walked(_SD).and_(_DPM), call=_edited),
    "LEditsPPPipelineStableDiffusionXL": replace(Walked(_XL).and_(_DPM), call=_edited),
}


def _image_normalizer() -> nn.Module:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    return StableUnCLIPImageNormalizer(embedding_dim=POOLED)


def _chat_glm_encoder() -> nn.Module:
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    sizes = {"padded_vocab_size": 400, "hidden_size": WIDTH, "ffn_hidden_size": 48, "kv_channels": 8, "num_attention_heads": 4}
    config = ChatGLMConfig(
        num_layers=2, original_rope=True, seq_length=256, multi_query_attention=True, multi_query_group_num=2, **sizes
    )
    model = ChatGLMModel(config)
    for parameter in model.parameters():  # which it leaves as the memory was
        parameter.data.normal_(0, 0.2)
    return model.eval()


_KOLORS = Walked(_XL).and_(
    {
        "unet": partial(denoiser, "UNet2DConditionModel/kolors", projection_class_embeddings_input_dim=WIDTH + 6 * 8),
        "tokenizer": chat_glm,
        "text_encoder": _chat_glm_encoder,
    },
    max_sequence_length=24,
)
WALK |= {"KolorsPipeline": _KOLORS, "KolorsImg2ImgPipeline": _KOLORS, "KolorsPAGPipeline": _KOLORS}

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
WALK["ChromaInpaintPipeline"] = Walked(_CHROMA).and_({"transformer": lambda: _chroma_for_inpainting()})


def _chroma_for_inpainting() -> nn.Module:
    """With a setting of Flux that this pipeline asks for and Chroma's class does not have."""
    model: Any = denoiser("ChromaTransformer2DModel")
    model.register_to_config(guidance_embeds=False)
    return model


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
    {"vae": lambda: _dc()}, complex_human_instruction=None, height=2 * HEIGHT, width=2 * WIDTH_PIXELS
)


def _dc() -> nn.Module:
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
WALK["SanaControlNetPipeline"] = _SANA.and_({"controlnet": lambda: _sana_controlnet()})


def _sana_controlnet() -> nn.Module:
    config = {key: value for key, value in denoiser("SanaTransformer2DModel").config.items() if not key.startswith("_")}
    known = inspect.signature(diffusers.SanaControlNetModel.__init__).parameters
    return diffusers.SanaControlNetModel(**{key: value for key, value in config.items() if key in known} | {"num_layers": 1}).eval()


# Qwen-Image


def _qwen_autoencoder() -> nn.Module:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=LATENTS, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * LATENTS, latents_std=[1.0] * LATENTS,
    ).eval()  # fmt: skip


def _qwen_controlnet() -> nn.Module:
    config = {key: value for key, value in denoiser("QwenImageTransformer2DModel").config.items() if not key.startswith("_")}
    known = inspect.signature(diffusers.QwenImageControlNetModel.__init__).parameters
    return diffusers.QwenImageControlNetModel(**{key: value for key, value in config.items() if key in known}).eval()


def _drop_template(pipe: Any) -> None:
    """34 tokens with Qwen's own vocabulary."""
    before = pipe.prompt_template_encode.partition("{}")[0]
    pipe.prompt_template_encode_start_idx = len(pipe.tokenizer(before).input_ids)


_QWEN = Walked(
    {
        "vae": _qwen_autoencoder,
        "transformer": partial(denoiser, "QwenImageTransformer2DModel"),
        "tokenizer": byte_level,
        "text_encoder": qwen_vl,
        "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "controlnet": lambda: _qwen_controlnet(),
    },
    {"negative_prompt": "two birds"},
    _drop_template,
)
WALK |= {
    name: _QWEN
    for name in (
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageControlNetPipeline",
    )
}

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


def _wan_autoencoder() -> nn.Module:
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=LATENTS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENTS, latents_std=[1.0] * LATENTS,
    ).eval()  # fmt: skip


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
        _WAN.and_({"vae": _wan_autoencoder}, video=[picture(n, 64, 96) for n in range(5)]), prepare=_without_ftfy
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


def _ltx_autoencoder() -> nn.Module:
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=LATENTS, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    ).eval()  # fmt: skip


def _hunyuan_autoencoder() -> nn.Module:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=LATENTS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    ).eval()  # fmt: skip


def _seeing_wan() -> nn.Module:
    return denoiser("WanTransformer3DModel", in_channels=2 * LATENTS + 4, out_channels=LATENTS, image_dim=16, added_kv_proj_dim=32)


_LTX = WALK["LTXPipeline"].and_({"vae": _ltx_autoencoder}, height=64, width=96, num_frames=5, image=picture(1, 64, 96))
WALK |= {
    "LTXImageToVideoPipeline": _LTX,
    "LTXConditionPipeline": _LTX,
    "WanImageToVideoPipeline": _WAN.and_(
        {
            "vae": _wan_autoencoder,
            "transformer": partial(denoiser, "WanTransformer3DModel", in_channels=2 * LATENTS + 4, out_channels=LATENTS),
        },
        image=picture(1, 64, 96),
    ),
    "WanImageToVideoPipeline/with an image encoder": _WAN.and_(
        {
            "vae": _wan_autoencoder,
            "transformer": _seeing_wan,
            "image_encoder": lambda: small(
                "CLIPVisionModel",
                "CLIPVisionConfig",
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=32,
                patch_size=16,
            ),  # fmt: skip
            "image_processor": lambda: transformers.CLIPImageProcessor(crop_size=32, size=32),
        },
        image=picture(1, 64, 96),
    ),
    "LucyEditPipeline": _WAN.and_(
        {
            "vae": _wan_autoencoder,
            "transformer": partial(denoiser, "WanTransformer3DModel", in_channels=2 * LATENTS, out_channels=LATENTS),
        },
        video=[picture(n, 64, 96) for n in range(5)],
    ),
    "HunyuanSkyreelsImageToVideoPipeline": WALK["HunyuanVideoPipeline"].and_(
        {
            "vae": _hunyuan_autoencoder,
            "transformer": partial(denoiser, "HunyuanVideoTransformer3DModel", in_channels=2 * LATENTS, out_channels=LATENTS),
        },
        image=picture(1, 64, 96),
    ),
}
for _name in ("LucyEditPipeline", "WanImageToVideoPipeline", "WanImageToVideoPipeline/with an image encoder"):
    WALK[_name] = replace(WALK[_name], prepare=_without_ftfy)
WALK["LTXConditionPipeline"] = _LTX.and_(image=None, video=[picture(n, 64, 96) for n in range(5)], num_frames=9)
