"""Asking a patched vision-language model about a picture, and reading where the words of its answer look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ..config import DEFAULT_QUESTION
from ..errors import CaptureError, ConfigError
from ..images import ImageSource, load_image
from ..maps import LayerMaps, Maps
from ..words import collate_rows, offsets_of_ids, tokens_of, words_and
from .families import Pictures, student_family
from .image_tokens import model_type_of, place_columns

if TYPE_CHECKING:
    from .patch import StudentPatch


@torch.no_grad()
def look(
    patch: StudentPatch,
    source: ImageSource,
    question: str | None,
    answer: str | None,
    prompt: str | None,
    more: Sequence[str],
    options: dict[str, Any],
) -> Maps:
    """See `StudentPatch.look`."""
    processor, model = patch.processor, patch.model
    if processor is None:
        raise ConfigError("the patch has no processor; make it with lavender.patch(model, processor=processor)")
    family = student_family(model_type_of(processor, model.config))
    image = load_image(source)
    inputs = _inputs(processor, image, question, prompt)
    boxes = family.boxes(Pictures(processor, inputs, [(image.height, image.width)], model.config))
    inputs = {name: _moved(value, model) for name, value in inputs.items() if name != "labels"}
    ids = _answer_ids(patch, inputs, answer, options)
    text, offsets = offsets_of_ids(_decoder_of(processor.tokenizer), ids)
    words = words_and(text, more)
    if not words:
        raise CaptureError(f"the answer {text!r} has no words")
    batch, first = _with_answer(model, inputs, ids, family.answer_type)
    tokens = collate_rows([[[first + t for t in tokens_of((w.start, w.end), offsets, text)] for w in words]])
    batch["lavender_tokens"], batch["lavender_token_words"] = tokens.rows, tokens.words
    batch["lavender_token_weights"] = tokens.weights
    batch["lavender_present"] = torch.ones(1, len(words), dtype=torch.bool)
    columns, places = place_columns(inputs["input_ids"], boxes, family, processor, model.config)
    batch["lavender_columns"], batch["lavender_boxes"] = columns, places
    maps = patch.capture(**{k: v.to(model.device) if k.startswith("lavender_") else v for k, v in batch.items()})[0]
    if not maps.any():
        raise CaptureError("no word of the answer sees the picture; does the picture come before the text in the prompt?")
    entries = [LayerMaps(name, own) for name, own in zip(patch.layer_names(), maps, strict=True)]
    return Maps(text, words, entries)


def _inputs(processor: Any, image: Image.Image, question: str | None, prompt: str | None) -> dict[str, Any]:
    if prompt is not None:
        return dict(processor(images=[[image]], text=[prompt], return_tensors="pt"))
    if not getattr(processor, "chat_template", None):
        raise ConfigError("the processor has no chat template; give the whole prompt, with the picture's placeholder, as prompt=")
    content = [{"type": "image"}, {"type": "text", "text": question or DEFAULT_QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    return dict(processor(images=[[image]], text=[text], add_special_tokens=False, return_tensors="pt"))


def _moved(value: Any, model: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)


def _answer_ids(patch: StudentPatch, inputs: dict[str, Any], answer: str | None, options: dict[str, Any]) -> list[int]:
    """The tokens of the answer, end tokens included: the model's own, or those of a given text."""
    if answer is not None:
        ids: list[int] = patch.processor.tokenizer(answer, add_special_tokens=False).input_ids
        return ids
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    output = patch.model.generate(**given, **options)
    sequence: list[int] = getattr(output, "sequences", output)[0].tolist()
    if patch.model.config.is_encoder_decoder:
        return sequence[1:]
    # A model given embeddings returns the new tokens alone.
    prompt = inputs["input_ids"][0].tolist()
    return sequence[len(prompt) :] if sequence[: len(prompt)] == prompt else sequence


def _with_answer(model: Any, inputs: dict[str, Any], ids: Sequence[int], answer_type: int) -> tuple[dict[str, Any], int]:
    """The prompt's inputs continued by an answer, and the position of its first token.

    Whatever has one entry per token goes on as at the prompt's last token, as it does while the model generates.
    """
    new = torch.tensor([list(ids)], device=model.device)
    if model.config.is_encoder_decoder:
        start = torch.tensor([[model.generation_config.decoder_start_token_id]], device=model.device)
        return {**inputs, "decoder_input_ids": torch.cat([start, new], dim=1)}, 1
    length = inputs["input_ids"].shape[1]
    batch = dict(inputs)
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor) or value.is_floating_point() or value.shape[:2] != (1, length):
            continue
        if name == "input_ids":
            more = new
        elif name == "token_type_ids":
            more = torch.full_like(new, answer_type)
        else:
            more = value[:, -1:].expand(-1, len(ids), *value.shape[2:])
        batch[name] = torch.cat([value, more], dim=1)
    return batch, length


def _decoder_of(tokenizer: Any) -> Any:
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
