"""The pipelines with a U-Net: Stable Diffusion 1, 2 and XL, and what came of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import torch
import transformers

from recipes.teacher import make_scheduler

from ..pipeline_zoo import autoencoder, clip_encoder, clip_tokenizer
from ..tokenizers import chat_glm
from ..zoo import LATENTS, POOLED, WIDTH
from .parts import (
    HEIGHT,
    WIDTH_PIXELS,
    Parts,
    Walked,
    chat_glm_encoder,
    controlnet,
    denoiser,
    image_normalizer,
    like,
    picture,
    seeing_clip,
    upscaling_unet,
)

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
    "controlnet": lambda: controlnet("UNet2DConditionModel"),
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
    "controlnet": lambda: controlnet("UNet2DConditionModel/sdxl"),
    "adapter": lambda: diffusers.T2IAdapter(
        channels=[8, 16, 16, 16], num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter_xl"
    ),
}


def _lcm() -> Any:
    return diffusers.LCMScheduler.from_config(make_scheduler().config)


_LCM_UNET = partial(denoiser, "UNet2DConditionModel", time_cond_proj_dim=8)
_UNION: Parts = {
    "controlnet": partial(
        like,
        "UNet2DConditionModel/sdxl",
        "ControlNetUnionModel",
        conditioning_embedding_out_channels=(8, 16, 16),
        num_trans_channel=8,
        num_proj_channel=8,
        num_trans_head=2,
    )
}

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
    "StableDiffusionPanoramaPipeline/two views": Walked(_SD).and_(
        {"vae": partial(autoencoder, blocks=4)}, height=512, width=576, output_type="latent"
    ),
}


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
            "image_encoder": seeing_clip,
            "feature_extractor": lambda: transformers.CLIPImageProcessor(crop_size=32, size=32),
            "image_normalizer": image_normalizer,
            "image_noising_scheduler": lambda: diffusers.DDPMScheduler(),
        }
    ),
    "StableDiffusionLatentUpscalePipeline": Walked(_SD).and_(
        {"unet": upscaling_unet, "scheduler": lambda: diffusers.EulerDiscreteScheduler(prediction_type="sample")},
        image=picture(1, 64, 64),
        height=64,
        width=64,
    ),
    "StableDiffusionPix2PixZeroPipeline": Walked(_SD).and_(source_embeds=_EMBEDDINGS, target_embeds=_EMBEDDINGS + 0.1),
    "LEditsPPPipelineStableDiffusion": replace(Walked(_SD).and_(_DPM), call=_edited),
    "LEditsPPPipelineStableDiffusionXL": replace(Walked(_XL).and_(_DPM), call=_edited),
}


_KOLORS = Walked(_XL).and_(
    {
        "unet": partial(denoiser, "UNet2DConditionModel/kolors", projection_class_embeddings_input_dim=WIDTH + 6 * 8),
        "tokenizer": chat_glm,
        "text_encoder": chat_glm_encoder,
    },
    max_sequence_length=24,
)
WALK |= {"KolorsPipeline": _KOLORS, "KolorsImg2ImgPipeline": _KOLORS, "KolorsPAGPipeline": _KOLORS}
