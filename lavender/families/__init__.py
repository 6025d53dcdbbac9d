"""What differs between model families: one small file each, found by name when a model is patched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from ..errors import ModelError

STUDENTS = {
    "llava": "lavender.families.llava",
}
"""transformers' `config.model_type` -> module that defines `FAMILY`."""

TEACHERS = {
    "UNet2DConditionModel": "lavender.families.unet",
}
"""Class name of a pipeline's denoiser -> module that defines `FAMILY`."""


@dataclass(frozen=True)
class Family:
    """One family of vision-language models.

    Attributes:
        model_types: the `config.model_type`s that it serves.
        boxes: `(processor, sizes) -> one [tokens, 4] tensor per picture`: the place of every image token as (top, left,
            bottom, right) in fractions of the original picture, in the order of the tokens; `sizes` are (height, width) of the
            original pictures in pixels.
    """

    model_types: tuple[str, ...]
    boxes: Callable[[Any, Sequence[tuple[int, int]]], list[torch.Tensor]]


def student_family(model_type: str) -> Family:
    """The family of a vision-language model. Raises `ModelError` naming the known ones."""
    if model_type not in STUDENTS:
        raise ModelError(f"lavender knows no places of image tokens for model type {model_type!r}; it knows {sorted(STUDENTS)}")
    return import_module(STUDENTS[model_type]).FAMILY


def teacher_family(denoiser: object) -> Any:
    """The family module's `FAMILY` for a diffusion model's denoiser. Raises `ModelError` naming the known ones."""
    name = type(denoiser).__name__
    if name not in TEACHERS:
        raise ModelError(f"lavender cannot read word maps from a {name}; it reads {sorted(TEACHERS)}")
    return import_module(TEACHERS[name]).FAMILY
