"""Which positions of a text stand for the picture, and which family a processor belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..errors import ConfigError, DataError
from . import STUDENTS, Family


def place_columns(
    input_ids: torch.Tensor, boxes: Sequence[torch.Tensor], family: Family, processor: Any, model_config: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the image tokens, int64 [B, M], and the family's boxes [B, M, 4], padded with -1 and NaN.

    Columns are the tokens of `input_ids` [B, T] that stand for the picture; of a family that reads it by cross-attention, the
    picture's keys. Boxes are those of the columns; of a family with a resampler, those of the patches behind them.

    Raises:
        DataError: a sample has another number of image tokens than of boxes.
    """
    if family.cross:
        positions = [torch.arange(len(own)) for own in boxes]
    else:
        is_image = (input_ids == image_token_of(processor, model_config)).cpu()
        positions = [torch.nonzero(row).flatten() for row in is_image]
    for found, own in zip(positions, boxes, strict=True):
        if len(found) != len(own) and family.resamplers is None:
            raise DataError(
                f"{len(found)} image tokens but {len(own)} places for them; do the processor's settings and the model's agree, "
                "and was the text not cut off?"
            )
    columns = pad_sequence(positions, batch_first=True, padding_value=-1)
    return columns, pad_sequence(list(boxes), batch_first=True, padding_value=torch.nan)


def image_token_of(processor: Any, model_config: Any = None) -> int:
    """The id that stands for a picture's tokens. Raises `ConfigError` if neither processor nor config names it."""
    for owner in (model_config, processor, processor.tokenizer):
        found = getattr(owner, "image_token_id", None)
        if found is not None:
            return int(found)
    raise ConfigError(f"{type(processor).__name__} does not say which token stands for a picture; set its image_token_id")


def model_type_of(processor: Any, model_config: Any = None) -> str:
    """The model type whose family places a processor's image tokens: `LlavaProcessor` serves `llava`.

    A family that a user registered for the model's config comes first; then the processor's class, if transformers lists it (a
    llava that sees with Pixtral has Pixtral's processor); then the config. Raises `ConfigError` if neither tells.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = type(processor).__name__
    own = getattr(model_config, "model_type", None)
    if isinstance(STUDENTS.get(str(own)), Family):  # a user's own
        return str(own)
    listed = [model_type for model_type, class_name in PROCESSOR_MAPPING_NAMES.items() if class_name == name]
    if own in listed or (own is not None and not any(model_type in STUDENTS for model_type in listed)):
        return str(own)
    for model_type in listed:
        if model_type in STUDENTS:
            return model_type
    if listed:
        return listed[0]
    raise ConfigError(f"{name} is no processor that transformers knows a model type for; pass the model's config")
