"""Which positions of a text stand for the picture, and which family a processor belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..errors import ConfigError, DataError
from .families import STUDENTS, Family, known_family


def place_image_tokens(
    input_ids: torch.Tensor,
    boxes: Sequence[torch.Tensor],
    family: Family,
    processor: Any,
    model_config: Any = None,
    *,
    shown: Sequence[tuple[int, int | None]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the image tokens, int64 [B, M], and the family's boxes [B, M, 4], padded with -1 and NaN. M is at least one.

    Positions are those of `input_ids` [B, T] that stand for the picture; of a family that reads it by cross-attention, the
    picture's keys. Boxes are those of the positions; of a family with a resampler, those of the patches behind them.

    Args:
        boxes: the family's, one tensor per picture of the batch.
        shown: per sample the number of its pictures, and the index of the one that is placed; None for none of them. By default
            every sample has one.

    Raises:
        ConfigError: the family gave boxes of another number of pictures.
        DataError: a sample has another number of image tokens than of boxes.
    """
    shown = [(1, 0)] * len(input_ids) if shown is None else shown
    total = sum(count for count, _ in shown)
    if len(boxes) != total:
        raise ConfigError(f"the family gives the places of {len(boxes)} pictures, the batch has {total}; give one tensor for each")
    image_token = -1 if family.cross else image_token_of(processor, model_config)
    positions, places, first = [torch.empty(0, dtype=torch.long)] * len(shown), [torch.empty(0, 4)] * len(shown), 0
    for b, (count, index) in enumerate(shown):
        sample_boxes = boxes[first : first + count]
        first += count
        lengths = [len(image_boxes) for image_boxes in sample_boxes]
        tokens = torch.arange(sum(lengths)) if family.cross else torch.nonzero(input_ids[b].cpu().eq(image_token)).flatten()
        if family.resamplers is not None:  # of one picture
            lengths = [len(tokens)]
        if len(tokens) != sum(lengths):
            raise DataError(
                f"{len(tokens)} image tokens but {sum(lengths)} places for them; do the processor's settings and the model's "
                "agree, and was the text not cut off?"
            )
        if index is not None:
            positions[b], places[b] = tokens.split(lengths)[index], sample_boxes[index]
    return _pad(positions, -1), _pad(places, torch.nan)


def _pad(sequences: Sequence[torch.Tensor], value: float) -> torch.Tensor:
    padded = pad_sequence(list(sequences), batch_first=True, padding_value=value)
    return padded if padded.shape[1] else padded.new_full((len(sequences), 1, *padded.shape[2:]), value)


def image_token_of(processor: Any, model_config: Any = None) -> int:
    """The id that stands for a picture's tokens. Raises `ConfigError` if neither processor nor config names it."""
    for owner in (model_config, processor, processor.tokenizer):
        image_token = getattr(owner, "image_token_id", None)
        if image_token is not None:
            return int(image_token)
    raise ConfigError(f"{type(processor).__name__} does not say which token stands for a picture; set its image_token_id")


def model_type_of(processor: Any, model_config: Any = None) -> str:
    """The model type whose family places a processor's image tokens: `LlavaProcessor` serves `llava`.

    A family that a user registered for the model's config comes first; then the processor's class, if transformers lists it (a
    llava that sees with Pixtral has Pixtral's processor); then the config. Raises `ConfigError` if neither tells.
    """
    named = getattr(model_config, "model_type", None)
    if isinstance(STUDENTS.get(str(named)), Family):  # registered by the user
        return str(named)
    listed = _listed_types(processor)
    if named in listed or (named is not None and not any(model_type in STUDENTS for model_type in listed)):
        return str(named)
    for model_type in listed:
        if model_type in STUDENTS:
            return model_type
    if listed:
        return listed[0]
    raise ConfigError(
        f"{type(processor).__name__} is no processor that transformers knows a model type for; pass the model's config"
    )


def _listed_types(processor: Any) -> list[str]:
    """The model types that transformers lists for a processor's class."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = type(processor).__name__
    return [model_type for model_type, class_name in PROCESSOR_MAPPING_NAMES.items() if class_name == name]


def require_pair(processor: Any, model_config: Any) -> None:
    """Raises `ConfigError` if a processor is certainly another model's.

    That is: transformers lists it for families whose image tokens lie elsewhere (a llava that sees with Pixtral has Pixtral's
    processor, though), or its tokenizer does not have the model's image token.
    """
    named, listed = str(getattr(model_config, "model_type", None)), _listed_types(processor)
    tower = getattr(getattr(model_config, "vision_config", None), "model_type", None)
    served = [known_family(model_type) for model_type in listed if model_type in STUDENTS]
    mismatch = f"{type(processor).__name__} is not the processor of a model of type {named!r}"
    remedy = "Load both from the same folder: AutoProcessor.from_pretrained(folder), and the model's config"
    if isinstance(STUDENTS.get(named), str) and served and not {named, tower} & {*listed} and known_family(named) not in served:
        raise ConfigError(f"{mismatch}: it serves {', '.join(listed)}. {remedy}")
    model_token, tokenizer = getattr(model_config, "image_token_id", None), processor.tokenizer
    ids = [token for owner in (processor, tokenizer) if (token := getattr(owner, "image_token_id", None)) is not None]
    # The placeholder in a text may be another token than those it is expanded to: then the tokenizer knows both.
    if model_token is not None and ids and model_token not in {*ids, *tokenizer.added_tokens_decoder}:
        raise ConfigError(
            f"{mismatch}: its image token has the id {ids[0]}, and the model's, {model_token}, is none of its special "
            f"tokens. {remedy}"
        )
