"""Word maps of a teacher, computed again from its denoiser's own queries and keys, one thing after the other, in float64."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.overrides import TorchFunctionMode

from lavender.config import TeacherConfig
from lavender.words import words_of

from .pipeline_zoo import MORE_TEACHERS, PIPELINES

NAMES = {
    "sd": "StableDiffusionPipeline",
    "sd v": "StableDiffusionPipeline/v",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd3.5": "StableDiffusion3Pipeline/3.5",
    "flux": "FluxPipeline",
    "pixart": "PixArtAlphaPipeline",
}
"""Short names of the tiny pipelines that are teachers."""
CROSS = ("sd", "sd v", "sdxl", "pixart")
SIDE = 48
"""Of the pictures, in pixels: grids of 12, 6 and 3 places in the U-Nets, of 6 in the transformers."""


def built(name: str) -> Any:
    """A tiny pipeline."""
    return {**PIPELINES, **MORE_TEACHERS}[NAMES[name]]()


def picture(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    """A picture of colored squares."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@dataclass
class Forward:
    """One call of the denoiser."""

    args: tuple
    kwargs: dict[str, Any]
    inputs: dict[str, Any]

    @property
    def text(self) -> torch.Tensor:
        return self.inputs["encoder_hidden_states"]

    @property
    def latents(self) -> torch.Tensor:
        return self.inputs["sample" if "sample" in self.inputs else "hidden_states"]

    @property
    def timestep(self) -> float:
        """From 0 to 1000; Flux counts it from 0 to 1."""
        own = float(self.inputs["timestep"].flatten()[0])
        return own * 1000 if "img_ids" in self.inputs else own


@contextmanager
def forwards_of(denoiser: torch.nn.Module) -> Iterator[list[Forward]]:
    """Every call of a denoiser."""
    seen: list[Forward] = []
    signature = inspect.signature(type(denoiser).forward)

    def copied(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, torch.Tensor) else value

    def before(module, args, kwargs):
        args, kwargs = tuple(map(copied, args)), {name: copied(value) for name, value in kwargs.items()}
        seen.append(Forward(args, kwargs, dict(signature.bind(module, *args, **kwargs).arguments)))

    handle = denoiser.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


class _Attentions(TorchFunctionMode):
    """Arguments of every attention call, with the name of the module that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and self.running:
            named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
            self.calls.append((self.running[-1], named))
        return func(*args, **(kwargs or {}))


def probabilities_of(denoiser: torch.nn.Module, forward: Forward, name: str) -> dict[str, torch.Tensor]:
    """{layer: attention [B, H, y * x, text columns] of the picture's places to the text, float64}, by a call like `forward`."""
    pattern = re.compile(r"\.attn2$" if name in CROSS else r"\.attn$")
    modules = {own: module for own, module in denoiser.named_modules() if pattern.search(own)}
    mode, handles = _Attentions(), []
    for own, module in modules.items():
        handles.append(module.register_forward_pre_hook(lambda _m, _a, own=own: mode.running.append(own)))
        handles.append(module.register_forward_hook(lambda _m, _a, _o: mode.running.pop() and None))
    with torch.no_grad(), mode:
        denoiser(*forward.args, **forward.kwargs)
    for handle in handles:
        handle.remove()
    assert sorted(own for own, _ in mode.calls) == sorted(modules)
    found, columns = {}, forward.text.shape[1]
    for own, call in mode.calls:
        query, key = call["query"].double(), call["key"].double()
        scores = query @ key.mT * (call.get("scale") or query.shape[-1] ** -0.5)
        mask = call.get("attn_mask")
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
        attention = scores.softmax(-1)
        if name == "flux":  # text, picture
            attention = attention[:, :, columns:, :columns]
        elif name not in CROSS:  # picture, text
            attention = attention[:, :, :-columns, -columns:]
        found[own] = attention
    return found


def columns_of(pipe: Any, name: str, caption: str) -> list[list[list[int]]]:
    """Of every word of a caption, the text columns of its tokens: a list for each stretch of columns that has the word."""
    if name.startswith("sd3"):
        tokenizers = [(pipe.tokenizer, 0), (pipe.tokenizer_3, pipe.tokenizer.model_max_length)]
    else:
        tokenizers = [(pipe.tokenizer_2 if name == "flux" else pipe.tokenizer, 0)]
    parts = []
    for tokenizer, first in tokenizers:
        offsets = tokenizer(caption, return_offsets_mapping=True).offset_mapping
        parts.append(
            [
                [first + t for t, (start, end) in enumerate(offsets) if max(start, word.start) < min(end, word.end)]
                for word in words_of(caption)
            ]
        )
    return [list(own) for own in zip(*parts, strict=True)]


def read_forwards(forwards: Sequence[Forward], config: TeacherConfig) -> list[Forward]:
    """The calls whose maps are wanted."""
    if config.inversion == "noise":
        return list(forwards)
    back = forwards[config.diffusion_steps if config.inversion == "null_text" else config.inversion_steps :]
    if config.inversion == "null_text":  # the captions' call comes first at every timestep, then those of the fitting
        texts = forwards[0].text
        back = [own for n, own in enumerate(back) if n == 0 or own.timestep != back[n - 1].timestep]
        assert all(torch.equal(own.text, texts) for own in back)
    return [own for own in back if config.first_timestep <= own.timestep <= config.last_timestep]


def explicit_maps(
    pipe: Any, name: str, forwards: Sequence[Forward], config: TeacherConfig, captions: Sequence[str]
) -> list[torch.Tensor]:
    """Maps [W, map_size, map_size] of every caption, float64, from the denoiser's calls that a teacher made for square pictures."""
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    chosen = read_forwards(forwards, config)
    given = config.timestep_weights or [1.0] * len(chosen)
    assert len(given) == len(chosen) > 0
    sums, total = [torch.zeros(()) for _ in captions], 0.0
    for forward, timestep_weight in zip(chosen, given, strict=True):
        # The samples of the batch that carry the captions, wherever they stand.
        rows = [
            next(r for r in reversed(range(len(forward.text))) if torch.equal(forward.text[r], own)) for own in forwards[0].text
        ]
        for layer, attention in probabilities_of(denoiser, forward, name).items():
            fragments = [n for n, fragment in enumerate(config.layers) if fragment in layer]
            side = math.isqrt(attention.shape[2])
            if (config.layers and not fragments) or (config.resolutions and side not in config.resolutions):
                continue
            layer_weight = config.layer_weights[fragments[0]] if config.layer_weights else 1.0
            total += timestep_weight * layer_weight
            for c, caption in enumerate(captions):
                own = attention[rows[c]]
                own = own[list(config.heads)] if config.heads else own
                words = [
                    torch.stack([own[:, :, part].mean(-1) for part in parts]).mean(0) for parts in columns_of(pipe, name, caption)
                ]
                maps = torch.stack([*words, own.sum(-1)])  # the whole text last
                maps = maps.amax(1) if config.head_reduction == "max" else maps.mean(1)
                maps = maps[:-1] / maps[-1] if config.renormalize else maps[:-1]
                maps = maps.reshape(1, -1, side, side)
                size = (config.map_size, config.map_size)
                resized = F.interpolate(maps, size, mode="bilinear", antialias=True)[0]
                sums[c] = sums[c] + timestep_weight * layer_weight * resized
    return [own / total for own in sums]
