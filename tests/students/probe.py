"""A grid probe that needs no weights: silence the vision tower's attention, repaint one cell of the picture, see which image
tokens move. It says where every image token looks without knowing any grid rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from lavender.students.discovery import attention_modules, is_attention, text_tower
from lavender.students.families import Family, Pictures
from lavender.students.image_tokens import image_token_of

from .zoo import Student


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture of gray noise, so that no place equals another."""
    values = np.random.default_rng(seed).integers(96, 160, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@contextmanager
def silenced(model: nn.Module) -> Iterator[None]:
    """The vision tower's attention gives zeros: what one patch holds reaches no other patch."""
    inside = {id(module) for module in text_tower(model).modules()}

    def nothing(module: nn.Module, args: tuple, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    handles = [
        module.register_forward_hook(nothing)
        for name, module in model.named_modules()
        if is_attention(type(module)) and (id(module) not in inside or "vision" in name)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def image_tokens(student: Student, family: Family, image: Image.Image) -> torch.Tensor:
    """What boxes are the places of, [tokens, C]: hidden states at image tokens, or keys of cross-attention or resampler."""
    model, seen = student.model, []
    batch = student.encode([image], ["what is this"])
    decoder = text_tower(model)

    def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach())

    def see_key(module: nn.Module, args: tuple) -> None:
        seen.append(args[1].transpose(0, 1).detach())

    reader = (family.resamplers(model) if family.resamplers else attention_modules(decoder))[0]
    if isinstance(reader, nn.MultiheadAttention):
        handle = reader.register_forward_pre_hook(see_key)
    elif family.cross or family.resamplers:
        keys = reader.k_proj if hasattr(reader, "k_proj") else reader.key
        handle = keys.register_forward_pre_hook(see, with_kwargs=True)
    else:
        # The first decoder layer's input: one token's state knows no other token yet.
        layer = next(m for m in decoder.modules() if isinstance(m, nn.ModuleList))[0]
        handle = layer.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with torch.no_grad(), silenced(model):
            model(**batch, use_cache=False)
    finally:
        handle.remove()
    if family.cross or family.resamplers:
        return seen[0].flatten(0, -2)
    return seen[0][0, batch["input_ids"][0] == image_token_of(student.processor, model.config)]


def measured_centers(
    student: Student, family: Family, size: tuple[int, int], cells: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centers (y, x) [tokens, 2] of what moves each token, how strongly it moves, and how many cells move it, [tokens]."""
    image = noise(*size)
    rows, columns = cells
    plain = image_tokens(student, family, image)
    moved, places = [], []
    for y in range(rows):
        for x in range(columns):
            painted = image.copy()
            box = [x * size[1] / columns, y * size[0] / rows, (x + 1) * size[1] / columns - 1, (y + 1) * size[0] / rows - 1]
            ImageDraw.Draw(painted).rectangle(box, fill=(255, 0, 0))
            moved.append((image_tokens(student, family, painted) - plain).norm(dim=1))
            places.append([(y + 0.5) / rows, (x + 0.5) / columns])
    change = torch.stack(moved)
    # Resizing blurs over a cell's border: what barely moves does not count.
    change = torch.where(change > 0.25 * change.amax(dim=0), change, 0) ** 2
    total = change.sum(dim=0)
    centers = (change.T @ torch.tensor(places)) / total[:, None].clamp_min(1e-12)
    return centers, total, (change > 0).sum(dim=0)


def disagreement(student: Student, family: Family, size: tuple[int, int], cells: tuple[int, int] = (6, 6)) -> float:
    """The largest distance, in fractions of the picture, between a token's predicted and measured center.

    Infinite where the number of boxes is not the number of tokens, where a token without a place moves, or one with a place
    inside the picture does not.
    """
    outputs = student.encode([noise(*size)], ["what is this"])
    (boxes,) = family.boxes(Pictures(student.processor, outputs, [size], student.model.config))
    centers, total, moving = measured_centers(student, family, size, cells)
    if len(boxes) != len(centers):
        return float("inf")
    placed = ~boxes.isnan().any(dim=1)
    # A token that every cell moves (the mean over all places) has no place either.
    somewhere = (total > 0) & (moving < cells[0] * cells[1])
    if somewhere[~placed].any() or not somewhere[placed].all():
        return float("inf")
    visible = boxes.clamp(0, 1)
    predicted = (visible[:, :2] + visible[:, 2:]) / 2
    return (predicted - centers)[placed].norm(dim=1).max().item()
