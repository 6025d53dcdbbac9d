"""What a student answers, and how often that is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..students.look import ask_by_template


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
    """Greedy answers to one question per picture."""
    texts = [ask_by_template(processor, question) for question in questions]
    batch = processor(
        images=list(images), text=texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
    ).to(model.device)
    written = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
