"""Modular pipelines, made of the parts of the others, with the guidance that is plugged into them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers

from . import dits, unets
from .parts import HEIGHT, WIDTH_PIXELS, Walked

WALK: dict[str, Walked] = {}
SWITCHED: dict[str, Walked] = {}


def _called(more: dict[str, Any], pipe: Any, options: dict[str, Any]) -> Any:
    size = {"height": HEIGHT, "width": WIDTH_PIXELS, "num_inference_steps": 2, "output_type": "pt"}
    state = pipe(prompt=options["prompt"], generator=options["generator"], **{**size, **more})
    return (state.get("images"),)


def _assembled(blocks: str, parts: Callable[[], Any], guider: Callable[[], Any] | None = None) -> Any:
    pipe = getattr(diffusers, blocks)().init_pipeline()
    known = pipe._component_specs
    pipe.update_components(**{name: part for name, part in parts().items() if name in known and part is not None})
    if guider is not None:
        pipe.update_components(guider=guider())
    return pipe


def _modular(blocks: str, whole: str, guider: Callable[[], Any] | None = None, **more: Any) -> Walked:
    walked = {**unets.WALK, **dits.WALK}[whole]

    def parts() -> dict[str, Any]:
        return {name: build() for name, build in walked.parts.items() if name != "controlnet"}

    return Walked({}, {}, build=partial(_assembled, blocks, parts, guider), call=partial(_called, more))


WALK |= {
    "StableDiffusionXLModularPipeline": _modular("StableDiffusionXLAutoBlocks", "StableDiffusionXLPipeline"),
    "StableDiffusion3ModularPipeline": _modular("StableDiffusion3AutoBlocks", "StableDiffusion3Pipeline", max_sequence_length=24),
    "FluxModularPipeline": _modular("FluxAutoBlocks", "FluxPipeline", max_sequence_length=24),
    "QwenImageModularPipeline": _modular("QwenImageAutoBlocks", "QwenImagePipeline", max_sequence_length=300),
}


def _layers(**settings: Any) -> Any:
    return diffusers.LayerSkipConfig(indices=[0], fqn="mid_block.attentions.0.transformer_blocks", **settings)


GUIDERS: dict[str, Callable[[], Any]] = {
    "no guidance": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=1.0),
    "CFG-Zero*": lambda: diffusers.ClassifierFreeZeroStarGuidance(guidance_scale=4.0, zero_init_steps=0),
    "adaptive projected guidance": lambda: diffusers.AdaptiveProjectedGuidance(guidance_scale=4.0),
    "perturbed attention": lambda: diffusers.PerturbedAttentionGuidance(
        guidance_scale=4.0,
        perturbed_guidance_start=0.0,
        perturbed_guidance_config=_layers(skip_attention_scores=True, skip_ff=False),
    ),
    "skipped layers": lambda: diffusers.SkipLayerGuidance(
        guidance_scale=4.0, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0, skip_layer_config=_layers()
    ),
    "auto guidance": lambda: diffusers.AutoGuidance(guidance_scale=4.0, auto_guidance_config=_layers(dropout=1.0)),
}
SWITCHED |= {
    f"StableDiffusionXLModularPipeline/{what}": _modular("StableDiffusionXLAutoBlocks", "StableDiffusionXLPipeline", guider)
    for what, guider in GUIDERS.items()
}
