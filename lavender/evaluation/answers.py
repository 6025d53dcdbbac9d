"""What a student answers, and how often that is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from transformers import GenerationConfig

from ..errors import ModelError, reading
from ..students.discovery import base_model_of
from ..students.look import ask_by_template

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""What of a student's generation config greedy answers need."""


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers, with its 95 % Wilson score interval `[low, high]`."""

    accuracy: float
    low: float
    high: float
    questions: int


def accuracy(hits: Sequence[bool]) -> Accuracy:
    """Share of hits with its 95 % Wilson score interval (Wilson 1927)."""
    n, z = len(hits), 1.959964
    share = sum(hits) / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Accuracy(round(share, 4), round(center - half, 4), round(center + half, 4), n)


@torch.no_grad()
def generate(model: Any, processor: Any, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy answers to one question per picture, whatever else a student's generation_config.json asks for.

    Raises `ModelError` where the student cannot generate any.
    """
    texts = [ask_by_template(processor, question) for question in questions]
    batch = processor(
        images=list(images), text=texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
    ).to(model.device)
    own = base_model_of(model)
    greedy = GenerationConfig(do_sample=False, **{name: getattr(own.generation_config, name) for name in _TOKENS})
    with (
        patch.object(own, "generation_config", greedy),  # what is given to `generate` would be completed by the student's
        reading("the student generates no answers", "give the generation_config.json that belongs to it", ModelError),
    ):
        written = model.generate(**batch, max_new_tokens=max_new_tokens)
    return processor.tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
