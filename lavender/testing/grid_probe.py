"""A grid probe that needs no trained weights: silence the vision tower's attention, repaint one cell of the image, and see which
image tokens move. It measures where every image token looks without knowing any grid rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import nn

from ..students.discovery import attention_modules, is_attention, text_tower
from ..students.families import Family, ProcessedImages
from ..students.image_tokens import image_token_of
from .student import Student, noise_image

TOLERANCE = 0.125
"""A cell of the probe is 1/6 wide, so a center is known to half of that; a coarse token's own width adds to it."""
PROBE_SIZES = ((60, 90), (96, 48), (24, 96))
"""Height and width in pixels of the images that the probe repaints: wide, high and very wide."""


def check_grid(student: Student, family: Family | None = None, tolerance: float = TOLERANCE) -> None:
    """Raises `AssertionError` unless the family's boxes are where the image tokens look, for images of three shapes.

    `family` is the student's by default; `tolerance` is a distance between centers, in fractions of the image.
    """
    for size in PROBE_SIZES:
        distance = disagreement(student, family or student.family, size)
        assert distance < tolerance, (
            f"boxes disagree with the probe for an image of {size[0]} x {size[1]} pixels: centers are {distance:.3f} of the image "
            f"apart, and {tolerance} is allowed (infinite: another number of boxes than of tokens, a token moves whose box is NaN, "
            "or one with a box does not move)"
        )


def disagreement(student: Student, family: Family, size: tuple[int, int], cells: tuple[int, int] = (6, 6)) -> float:
    """The largest distance, in fractions of the image, between a token's predicted and measured center.

    Infinite where the number of boxes is not the number of tokens, where a token without a place moves, or one with a place
    inside the image does not.
    """
    outputs = student.encode([noise_image(*size)], ["what is this"])
    (boxes,) = family.boxes(ProcessedImages(student.processor, outputs, [size], student.model.config))
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


def measured_centers(
    student: Student, family: Family, size: tuple[int, int], cells: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centers (y, x) [tokens, 2] of what moves each token, how strongly it moves, and how many cells move it, [tokens]."""
    image = noise_image(*size)
    height, width = cells
    plain = image_tokens(student, family, image)
    moved, places = [], []
    for y in range(height):
        for x in range(width):
            painted = image.copy()
            box = [x * size[1] / width, y * size[0] / height, (x + 1) * size[1] / width - 1, (y + 1) * size[0] / height - 1]
            ImageDraw.Draw(painted).rectangle(box, fill=(255, 0, 0))
            moved.append((image_tokens(student, family, painted) - plain).norm(dim=1))
            places.append([(y + 0.5) / height, (x + 0.5) / width])
    change = torch.stack(moved)
    # Resizing blurs over a cell's border: what barely moves does not count.
    change = torch.where(change > 0.25 * change.amax(dim=0), change, 0) ** 2
    total = change.sum(dim=0)
    centers = (change.T @ torch.tensor(places)) / total[:, None].clamp_min(1e-12)
    return centers, total, (change > 0).sum(dim=0)


def image_tokens(student: Student, family: Family, image: Image.Image) -> torch.Tensor:
    """What boxes are the places of, [tokens, C]: hidden states at image tokens, or keys of cross-attention or resampler."""
    model = student.model
    states: list[torch.Tensor] = []
    batch = student.encode([image], ["what is this"])
    decoder = text_tower(model)

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states.append((args[0] if args else kwargs["hidden_states"]).detach())

    def keep_key(module: nn.Module, args: tuple) -> None:
        states.append(args[1].transpose(0, 1).detach())

    reader: Any = (family.resamplers(model) if family.resamplers else attention_modules(decoder))[0]
    if isinstance(reader, nn.MultiheadAttention):
        handle = reader.register_forward_pre_hook(keep_key)
    elif family.cross or family.resamplers:
        keys = reader.k_proj if hasattr(reader, "k_proj") else reader.key
        handle = keys.register_forward_pre_hook(keep, with_kwargs=True)
    else:
        # The first decoder layer's input: one token's state knows no other token yet.
        layer = next(m for m in decoder.modules() if isinstance(m, nn.ModuleList))[0]
        handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad(), silenced(model):
            model(**batch, use_cache=False)
    finally:
        handle.remove()
    if family.cross or family.resamplers:
        return states[0].flatten(0, -2)
    return states[0][0, batch["input_ids"][0] == image_token_of(student.processor, model.config)]


@contextmanager
def silenced(model: nn.Module) -> Iterator[None]:
    """The vision tower's attention gives zeros: what one patch holds reaches no other patch."""
    inside = {id(module) for module in text_tower(model).modules()}

    def zeros(module: nn.Module, args: tuple, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    handles = [
        module.register_forward_hook(zeros)
        for name, module in model.named_modules()
        if is_attention(type(module)) and (id(module) not in inside or "vision" in name)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
