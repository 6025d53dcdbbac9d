"""One captured forward: what it asks of the attention layers, what they recorded, and the maps made of that."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..config import AlignmentConfig
from ..errors import CaptureError
from ..types import WordBatch
from .aligner import HiddenStates
from .boxes import grid_of, rasterize
from .channels import Channels
from .reading import Reading
from .registry import Request
from .resamplers import Resamplers

_PICTURES = ("pixel_values", "cross_attention_states")
"""Inputs of which a model with cross-attention needs one."""


@dataclass(eq=False)
class Forward:
    """One captured forward: the request made of the batch's words, and what becomes of its recordings.

    With `aggregation="parallel"`, a forward that is aligned records the layers' inputs instead of their attention.

    Attributes:
        words: the batch's words and image tokens.
        reading: the rows that speak for these; None where lambda has ended: nothing is recorded.
        inputs: the model's inputs, without these.
        config: what is captured.
        layers: the captured attention modules -> their numbers.
        crosses: whether these attend to the picture's keys instead of the text.
        channels: what the aligner takes of each layer; None where the maps go to the caller as they are.
        length: T, the length of the text.
        resamplers: what made the image tokens of many patches, if the model has it and the batch has boxes.
        before: the number of virtual tokens before the text, by which its positions are shifted.
        device: where the layers' recordings are brought together; None for that of the first one.
        request: what the attention layers answer, if they do.
        hidden: layer number -> what the parallel attention reads of its input.
        tower_output: what the text tower returned, if it carries a gradient.
        shares: what the resamplers recorded.
    """

    words: WordBatch
    reading: Reading | None
    inputs: dict[str, Any]
    config: AlignmentConfig
    layers: dict[nn.Module, int]
    crosses: bool
    channels: Channels | None
    length: int
    resamplers: Resamplers | None
    before: int = 0
    device: torch.device | None = None
    request: Request | None = field(init=False, default=None)
    hidden: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(init=False, default_factory=dict)
    tower_output: torch.Tensor | None = field(init=False, default=None)
    shares: dict[int, torch.Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.reading is None:
            return
        words, rows, channels = self.words, self.reading.rows, self.channels
        # The keys of a cross-attention are the picture's own.
        shift = 0 if self.crosses else self.before
        self.image_positions = (words.image_positions + shift).where(words.image_positions >= 0, -1)
        self.rows = replace(rows, rows=(rows.rows + self.before).where(rows.rows >= 0, -1))
        if channels is None or self.config.aggregation != "parallel":
            self.request = Request(
                self.rows,
                self.image_positions,
                self.layers,
                cross=self.crosses,
                renormalize=self.config.renormalize,
                length=self.length,
                weights=None if channels is None else channels.weights,
                heads=None if channels is None else channels.heads,
            )

    def record_hidden(self, layer: int, hidden: torch.Tensor) -> None:
        """Keeps what the parallel attention reads of a layer's input [B, T, D]."""
        samples = torch.arange(len(hidden), device=hidden.device)[:, None]
        places = (at.to(hidden.device).clamp_min(0) for at in (self.rows.rows, self.image_positions))
        queries, keys = (hidden[samples, at] for at in places)
        self.hidden.setdefault(layer, (queries, keys))

    def attention(self) -> torch.Tensor:
        """The recorded attention [B, L, H, W, M]; L is 1 where `Channels` joins the layers."""
        assert self.request is not None
        recorded = self._in_order(self.request.recorded)
        device = recorded[0].device if self.device is None else self.device
        maps = [each.to(device) for each in recorded]
        if self.channels is None or not self.channels.joins:
            return torch.stack(maps, dim=1)
        joined = torch.cat(maps, dim=1) if self.channels.weights is None else torch.stack(maps).sum(dim=0)
        return joined[:, None]

    def source(self) -> torch.Tensor | HiddenStates:
        """What the aligner takes: the recorded attention, or hidden states."""
        if self.request is not None:
            return self.attention()
        pairs = self._in_order(self.hidden)
        device = pairs[0][0].device if self.device is None else self.device
        queries, keys = (torch.stack([state.to(device) for state in states], dim=1) for states in zip(*pairs, strict=True))
        rows, columns = (
            torch.arange(at.shape[1], device=device).where(at.to(device) >= 0, -1) for at in (self.rows.rows, self.image_positions)
        )
        return HiddenStates(queries, keys, replace(self.rows.to(device), rows=rows), columns)

    def _in_order(self, recorded: dict[int, Any]) -> list[Any]:
        num_layers = len(self.layers)
        missing = [layer for layer in range(num_layers) if layer not in recorded]
        if missing and self.crosses and all(self.inputs.get(name) is None for name in _PICTURES):
            raise CaptureError(
                "the batch has no picture, without which the model leaves its cross-attention out; give it "
                f"{' or '.join(_PICTURES)} (the processor makes them of images=)"
            )
        if missing:
            raise CaptureError(
                f"{len(missing)} of {num_layers} attention layers recorded nothing (numbers {missing}). Was the attention "
                "implementation changed after lavender.patch? Then unpatch, set it, patch again. Did the model run compiled before "
                "lavender.patch? Then call torch.compiler.reset(). Or does the layer around "
                f"{type(next(iter(self.layers))).__name__} keep its keyword arguments to itself? Then lavender cannot reach it"
            )
        return [recorded[layer] for layer in range(num_layers)]

    def place(self, maps: torch.Tensor) -> torch.Tensor:
        """Attention by image token, [B, L, H, W, M], on the grid, [B, L, H, W, y, x], if the batch has boxes."""
        boxes = self.words.boxes
        if boxes is None:
            return maps
        if self.resamplers is not None:
            maps = self.resamplers.compose(maps, self.shares)
        boxes = boxes.to(maps.device)
        height, width = grid_of(boxes)
        if self.channels is not None:
            height, width = min(height, self.config.max_grid), min(width, self.config.max_grid)
        return rasterize(maps, boxes, (height, width))
