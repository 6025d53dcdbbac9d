"""What differs between families of students: a file per grid rule gives the places of their image tokens.

A student without an entry here is captured all the same; only the places of its image tokens are then unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError, ModelError, warn_renamed


@dataclass(frozen=True, eq=False)
class ProcessedImages:
    """One call of a processor: all that the places of image tokens can follow from.

    Attributes:
        processor: the model's processor.
        outputs: what the processor returned for the pictures.
        sizes: (height, width) in pixels of every original picture, in order; a sample may have several, or none.
        config: the model's config; None where only a processor is at hand.
    """

    processor: Any
    outputs: Mapping[str, Any]
    sizes: Sequence[tuple[int, int]]
    config: Any = None

    @property
    def patch_size(self) -> int:
        """Side of the vision tower's patches in pixels. Raises `ConfigError` without the model's config."""
        if self.config is None:
            raise ConfigError(
                f"{type(self.processor).__name__} does not know into what patches the model cuts a picture; pass the model's config"
            )
        size: int = self.config.vision_config.patch_size
        return size


@dataclass(frozen=True)
class Family:
    """One family of vision-language models.

    Attributes:
        boxes: the place of every image token, one [tokens, 4] tensor per picture: (top, left, bottom, right) in fractions of the
            original picture, in the order of the tokens; NaN for tokens that have no place (newlines, class tokens). The tokens
            are those whose id is the model's image token, or, if `cross`, every key of the cross-attention.
        cross: whether the text reads the picture by cross-attention, whose keys are not in the text.
        answer_type: what `token_type_ids`, if the model has them, say of an answer's tokens and of all that follows the first one.
        collates: whether the answer follows the picture in one text, as `lavender.Collator` builds it.
        resamplers: the attention modules by which the model's few image tokens were made from many patches; the attention to an
            image token is then carried on to its patches, and `boxes` are those of the patches.
        num_images: the fewest and the most pictures that a sample may have. Through a resampler exactly one is followed.
    """

    boxes: Callable[[ProcessedImages], list[torch.Tensor]]
    cross: bool = False
    answer_type: int = 0
    collates: bool = True
    resamplers: Callable[[nn.Module], list[nn.Module]] | None = None
    num_images: tuple[int, float] = (0, math.inf)

    @property
    def pictures(self) -> tuple[int, float]:
        """Deprecated name of `num_images`."""
        warn_renamed("Family.pictures", "Family.num_images")
        return self.num_images


def _accept_pictures(initialize: Callable[..., None]) -> Callable[..., None]:
    @wraps(initialize)
    def accept(self: Family, *args: Any, **settings: Any) -> None:
        if "pictures" in settings:
            warn_renamed("Family(pictures=...)", "Family(num_images=...)")
            settings["num_images"] = settings.pop("pictures")
        initialize(self, *args, **settings)

    return accept


Family.__init__ = _accept_pictures(Family.__init__)  # type: ignore[method-assign]


STUDENTS: dict[str, str | Family] = {
    "aya_vision": "tiles:AYA",
    "blip-2": "resampler:BLIP2",
    "cohere2_vision": "tiles:COHERE",
    "deepseek_vl": "square:PADDED",
    "florence2": "cross:FLORENCE2",
    "gemma3": "square:WHOLE",
    "gemma4": "square:POOLED",
    "glm46v": "thw:MERGED",
    "glm4v": "thw:MERGED",
    "glm4v_moe": "thw:MERGED",
    "idefics": "cross:IDEFICS",
    "idefics2": "resampler:IDEFICS2",
    "idefics3": "tiles:IDEFICS3",
    "internvl": "tiles:INTERNVL",
    "janus": "square:PADDED",
    "lfm2_vl": "tiles:LFM2",
    "llama4": "tiles:LLAMA4",
    "llava": "square:CROPPED",
    "llava_next": "anyres:LLAVA_NEXT",
    "llava_next_video": "anyres:LLAVA_NEXT",
    "llava_onevision": "anyres:LLAVA_ONEVISION",
    "minicpmv": "resampler:MINICPMV",
    "minicpmv4_6": "tiles:MINICPMV",
    "mistral3": "sizes:RESIZED",
    "mllama": "cross:MLLAMA",
    "ovis2": "square:OVIS2",
    "paligemma": "square:PALIGEMMA",
    "pixtral": "sizes:RESIZED",
    "qwen2_5_vl": "thw:MERGED",
    "qwen2_vl": "thw:MERGED",
    "qwen3_5": "thw:MERGED",
    "qwen3_5_moe": "thw:MERGED",
    "qwen3_vl": "thw:MERGED",
    "qwen3_vl_moe": "thw:MERGED",
    "smolvlm": "tiles:IDEFICS3",
    "video_llama_3": "thw:MERGED",
    "vipllava": "square:CROPPED",
}
"""transformers' `config.model_type` -> `module:name` of its `Family` in this package, or a family that a user registered."""


def register_family(model_type: str, family: Family) -> None:
    """Adds a family of vision-language models, or replaces one: `model_type` is its `config.model_type`."""
    STUDENTS[model_type] = family


def known_family(model_type: str) -> Family | None:
    """The family of a vision-language model; None if it has none."""
    entry = STUDENTS.get(model_type)
    if entry is None or isinstance(entry, Family):
        return entry
    module, name = entry.split(":")
    family: Family = getattr(import_module(f"{__name__}.{module}"), name)
    return family


def student_family(model_type: str) -> Family:
    """The family of a vision-language model. Raises `ModelError` naming the known ones."""
    family = known_family(model_type)
    if family is None:
        raise ModelError(
            f"lavender knows no places of image tokens for model type {model_type!r}; it knows {sorted(STUDENTS)}. "
            "lavender.register_family adds one: see docs/add-a-family.md"
        )
    return family
