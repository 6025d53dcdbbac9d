"""Asking a vision-language model about a picture, and the batch that reads where the words of its answer look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..config import DEFAULT_QUESTION
from ..errors import CaptureError, ConfigError
from ..images import ImageSource, load_image
from ..types import Word, WordBatch
from ..words import collate_rows, offsets_of_ids, tokens_of, words_and
from .families import ProcessedImages, student_family
from .image_tokens import model_type_of, place_image_tokens


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer, its words, and one batch of prompt and answer whose capture gives the words' maps."""

    text: str
    words: tuple[Word, ...]
    batch: dict[str, Any]


@torch.no_grad()
def ask(
    model: Any,
    processor: Any,
    source: ImageSource,
    question: str | None,
    answer: str | None,
    prompt: str | None,
    more: Sequence[str],
    options: dict[str, Any],
) -> Answer:
    """Lets a model answer a question about a picture; see `StudentPatch.look` for the arguments and errors."""
    if processor is None:
        raise ConfigError("the patch has no processor; make it with lavender.patch(model, processor=processor)")
    family = student_family(model_type_of(processor, model.config))
    image = load_image(source)
    inputs = process_question(processor, image, question, prompt)
    boxes = family.boxes(ProcessedImages(processor, inputs, [(image.height, image.width)], model.config))
    inputs = {name: _moved(value, model) for name, value in inputs.items() if name != "labels"}
    if answer is None:
        ids = _generated_ids(model, inputs, options)
    else:
        ids = processor.tokenizer(answer, add_special_tokens=False).input_ids
    text, offsets = offsets_of_ids(_decoder_of(processor.tokenizer), ids)
    words = words_and(text, more)
    if not words:
        raise CaptureError(f"the answer {text!r} has no words")
    batch, first = append_answer(model, inputs, ids, family.answer_type)
    tokens = collate_rows([[[first + t for t in tokens_of((w.start, w.end), offsets, text)] for w in words]])
    positions, places = place_image_tokens(inputs["input_ids"], boxes, family, processor, model.config)
    present = torch.ones(1, len(words), dtype=torch.bool)
    read = batch["decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"]
    word_batch = WordBatch(tokens.rows, tokens.words, tokens.weights, positions, present, places, input_ids=read)
    return Answer(text, words, batch | {key: value.to(model.device) for key, value in word_batch.to_batch().items()})


def process_question(processor: Any, image: Image.Image, question: str | None, prompt: str | None) -> dict[str, Any]:
    """The model's inputs for a picture and a question, or for a whole prompt."""
    if prompt is not None:
        return dict(processor(images=[[image]], text=[prompt], return_tensors="pt"))
    if not getattr(processor, "chat_template", None):
        raise ConfigError("the processor has no chat template; give the whole prompt, with the picture's placeholder, as prompt=")
    text = ask_by_template(processor, question or DEFAULT_QUESTION)
    return dict(processor(images=[[image]], text=[text], add_special_tokens=False, return_tensors="pt"))


def ask_by_template(processor: Any, question: str) -> str:
    """The prompt that a processor's chat template makes of a picture and a question about it.

    A template that takes texts alone, and so leaves parts out or shows them as a list, gets the picture's placeholder in a text.

    Raises `ConfigError` if the template shows the question in neither form.
    """
    forms: list[Any] = [[{"type": "image"}, {"type": "text", "text": question}]]
    if getattr(processor, "image_token", None) is not None:
        forms.append(f"{processor.image_token}{question}")
    for content in forms:
        messages = [{"role": "user", "content": content}]
        try:
            text: str = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (TypeError, ValueError, LookupError):
            continue
        around = text.replace(question.strip(), "")
        if around != text and "'type'" not in around and '"type"' not in around:
            return text
    raise ConfigError("the processor's chat template shows no question of a user's; give the whole prompt as prompt=")


def _moved(value: Any, model: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)


def _generated_ids(model: Any, inputs: dict[str, Any], options: dict[str, Any]) -> list[int]:
    """The tokens of the model's answer, end tokens included."""
    output = model.generate(**{name: value for name, value in inputs.items() if name != "decoder_input_ids"}, **options)
    sequence: list[int] = getattr(output, "sequences", output)[0].tolist()
    if model.config.is_encoder_decoder:
        return sequence[1:]
    # A model given embeddings returns the new tokens alone.
    prompt = inputs["input_ids"][0].tolist()
    return sequence[len(prompt) :] if sequence[: len(prompt)] == prompt else sequence


def append_answer(model: Any, inputs: dict[str, Any], ids: Sequence[int], answer_type: int) -> tuple[dict[str, Any], int]:
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
