"""One step of the walk over diffusers' pipelines: a class's picture with and without the patch, and its maps against an independent
computation of words' columns and of the attention to them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import lavender
from lavender.errors import LavenderError
from lavender.words import words_of

from .walked_pipelines import HEIGHT, PROMPT, WALK, WIDTH_PIXELS, Walked, mask, picture
from .zoo import DENOISERS

EXCHANGED = {"cat": "two", "red": "the", "hat": "two"}
"""Words that are one token in every tokenizer of the tests -> others of that kind."""

USUAL: dict[str, Any] = {
    "prompt": PROMPT,
    "height": HEIGHT,
    "width": WIDTH_PIXELS,
    "num_inference_steps": 3,
    "strength": 0.7,
    "guidance_scale": 4.0,
    "output_type": "pt",
    "max_sequence_length": 24,
    "use_resolution_binning": False,
    "return_dict": False,
    "image": picture(),
    "control_image": picture(2),
    "mask_image": mask(),
    "num_frames": 5,
    "source_prompt": "a bird",
    "video_length": 2,
}
"""Arguments of a pipeline's call, where it takes them."""


def built(name: str) -> Any:
    """A pipeline of the walk."""
    cls, walked = getattr(diffusers, name.partition("/")[0]), WALK[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        made = {p.name: walked.parts[p.name]() for p in parameters if p.name in walked.parts}
    required = {p.name: None for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    pipe = cls(**{**required, **made})
    pipe.set_progress_bar_config(disable=True)
    if walked.prepare is not None:
        walked.prepare(pipe)
    return pipe


def drawn(pipe: Any, walked: Walked, prompt: str = PROMPT, **more: Any) -> list[torch.Tensor]:
    """What a pipeline draws."""
    known = inspect.signature(type(pipe).__call__).parameters
    options = {key: value for key, value in {**USUAL, **walked.options}.items() if key in known and value is not None}
    if "generator" in known:
        options["generator"] = torch.Generator().manual_seed(0)
    if "num_inference_steps" in known and "strength" not in known:
        options["num_inference_steps"] = 2
    torch.manual_seed(1)
    output = pipe(**{**options, "prompt": prompt, **more})
    return [torch.as_tensor(np.asarray(each)) for each in _arrays(output[0])]


def _arrays(output: Any) -> Iterator[Any]:
    if isinstance(output, list | tuple):
        for each in output:
            yield from _arrays(each)
    elif output is not None:
        yield output


# The forwards of the denoiser


@dataclass
class Forward:
    """One call of a denoiser.

    Attributes:
        text: its text embeddings, [B, N, C].
        text_mask: of them, or None.
        timestep: of the call.
        calls: (layer, query, key, mask, scale) of every attention call in it.
    """

    text: torch.Tensor
    text_mask: torch.Tensor | None
    timestep: float
    calls: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None, float | None]] = field(default_factory=list)


def denoiser_of(pipe: Any) -> nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


class _Enough(Exception):
    """Raised where the forwards after the first timestep are not wanted."""


def _leave(running: list[str]) -> Callable[..., None]:
    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        running.pop()

    return leave


@contextmanager
def forwards_of(pipe: Any, whole: bool) -> Iterator[list[Forward]]:
    """The denoiser's calls: all with their attention, or those of the first timestep without it."""
    denoiser, seen, running = denoiser_of(pipe), [], []
    signature = inspect.signature(type(denoiser).forward)
    original = F.scaled_dot_product_attention

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = signature.bind(module, *args, **kwargs).arguments
        timestep = float(torch.as_tensor(inputs["timestep"]).flatten()[0])
        if not whole and seen and timestep != seen[0].timestep:
            raise _Enough
        text_mask = inputs.get("encoder_attention_mask")
        seen.append(Forward(inputs["encoder_hidden_states"].detach().clone(), text_mask, timestep))

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any):
        if running:
            seen[-1].calls.append((running[-1], query.detach(), key.detach(), attn_mask, kwargs.get("scale")))
        return original(query, key, value, attn_mask, *args, **kwargs)

    handles = [denoiser.register_forward_pre_hook(before, with_kwargs=True)]
    for name, module in denoiser.named_modules() if whole else ():
        handles.append(module.register_forward_pre_hook(lambda _m, _a, name=name: running.append(name)))
        handles.append(module.register_forward_hook(_leave(running), always_call=True))
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", attend):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def apart(pipe: Any) -> Iterator[None]:
    """The pipeline's text encoders without attention, so that a column of their output depends on its own token alone."""
    changed: list[tuple[nn.Parameter, torch.Tensor]] = []
    for part in pipe.components.values():
        for name, module in part.named_modules() if isinstance(part, nn.Module) and part is not denoiser_of(pipe) else ():
            if name.split(".")[-1] in ("out_proj", "o_proj", "o"):
                for parameter in module.parameters():
                    changed.append((parameter, parameter.data))
                    parameter.data = torch.zeros_like(parameter)
    try:
        yield
    finally:
        for parameter, data in changed:
            parameter.data = data


@dataclass
class Place:
    """Where a prompt stands: which forward of a timestep and which sample of it carries it, and the columns of each word."""

    forward: int
    sample: int
    columns: dict[str, list[int]]


def place_of(pipe: Any, walked: Walked) -> Place:
    """Finds the prompt by exchanging its words, one after the other, and looking which columns of the embeddings move."""

    def texts(prompt: str) -> list[torch.Tensor]:
        with forwards_of(pipe, whole=False) as seen:
            try:
                drawn(pipe, walked, prompt)
            except _Enough:
                pass
        return [forward.text for forward in seen]

    found: dict[str, list[int]] = {}
    with apart(pipe):
        plain = texts(PROMPT)
        for word, other in EXCHANGED.items():
            moved = [(a != b).any(-1) for a, b in zip(plain, texts(PROMPT.replace(word, other)), strict=True)]
            f = next(f for f, each in enumerate(moved) if each.any())
            b = int(moved[f].any(-1).nonzero()[0])
            found[word] = moved[f][b].nonzero().flatten().tolist()
    return Place(f, b, found)


# The maps


def explicit_maps(pipe: Any, forwards: list[Forward], place: Place, layers: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
    """{layer: {word: [places]}}, the mean over heads and steps, float64: of every timestep the first forward that has the prompt."""
    first = [forward for forward in forwards if forward.timestep == forwards[0].timestep]
    prompt = first[place.forward].text[place.sample]
    belonging: list[tuple[Forward, int]] = []
    for forward in forwards:
        samples = [b for b, own in enumerate(forward.text) if own.shape == prompt.shape and torch.equal(own, prompt)]
        if samples and not (belonging and belonging[-1][0].timestep == forward.timestep):
            belonging.append((forward, samples[0]))
    sums: dict[str, dict[str, list[torch.Tensor]]] = {}
    for forward, sample in belonging:
        read = set()
        for layer, query, key, attention_mask, scale in forward.calls:
            if layer not in layers or layer in read:
                continue
            read.add(layer)
            attention = _attention(pipe, forward, sample, query, key, attention_mask, scale)
            for word, columns in place.columns.items():
                sums.setdefault(layer, {}).setdefault(word, []).append(attention[..., columns].mean(-1).mean(0))
        assert read == set(layers)
    return {layer: {word: torch.stack(maps).mean(0) for word, maps in words.items()} for layer, words in sums.items()}


@cache
def _layout(name: str) -> tuple[str, int]:
    """How a class of denoisers attends to text and picture, and how many places the pictures of the walk have."""
    denoiser = next(build for key, build in DENOISERS.items() if key.split("/")[0] == name)()
    return denoiser.layout, math.prod(denoiser.grid)


def _attention(
    pipe: Any, forward: Forward, sample: int, query: torch.Tensor, key: torch.Tensor, attention_mask: Any, scale: float | None
) -> torch.Tensor:
    """[H, places, text columns] of one sample's attention."""
    q, k = query[sample].double(), key[sample].double()
    if len(k) != len(q):
        k = k.repeat_interleave(len(q) // len(k), dim=0)
    scores = q @ k.mT * (scale or q.shape[-1] ** -0.5)
    if attention_mask is not None:
        own = attention_mask[min(sample, len(attention_mask) - 1)] if attention_mask.ndim == 4 else attention_mask
        scores = scores.masked_fill(~own, -math.inf) if own.dtype == torch.bool else scores + own.double()
    attention = scores.softmax(-1)
    denoiser = denoiser_of(pipe)
    layout, tokens = _layout(type(denoiser).__name__)
    if layout == "cross":
        return attention
    columns = forward.text.shape[1]
    if layout == "image first":
        return attention[:, :tokens, attention.shape[2] - columns :]
    lead = denoiser.register_tokens.shape[1] if hasattr(denoiser, "register_tokens") else 0
    length = columns if type(denoiser).__name__ != "Lumina2Transformer2DModel" else int(forward.text_mask[sample].sum())
    return attention[:, lead + length : lead + length + tokens, lead : lead + length]


@dataclass
class Outcome:
    """What became of a class.

    Attributes:
        refused: what the error says, or None where its maps were read.
        when: "patch" or "maps", where it was refused.
    """

    refused: str | None = None
    when: str | None = None


def walk(name: str) -> Outcome:
    """Draws a class's picture with and without the patch and compares everything; fails by an AssertionError."""
    pipe, walked = built(name), WALK[name]
    before = type(pipe)
    with forwards_of(pipe, whole=True) as forwards:
        plain = drawn(pipe, walked)
    assert plain
    assert all(torch.isfinite(each).all() for each in plain)
    try:
        lens = lavender.patch(pipe)
    except LavenderError as error:
        assert type(pipe) is before
        _require_equal(plain, drawn(pipe, walked))
        return Outcome(str(error), "patch")
    with lens:
        _require_equal(plain, drawn(pipe, walked))
        try:
            maps = lens.maps
        except LavenderError as error:
            return Outcome(str(error), "maps")
    assert type(pipe) is before
    _require_equal(plain, drawn(pipe, walked))
    assert list(maps) == list(dict.fromkeys(word.text for word in words_of(PROMPT)))
    place = place_of(pipe, walked)
    expected = explicit_maps(pipe, forwards, place, lens.layers)
    assert {entry.layer for entry in maps.entries} == set(lens.layers)
    numbers = {word.text: n for n, word in enumerate(maps.words)}
    for entry in maps.entries:
        size = {**USUAL, **walked.options}
        assert entry.maps.shape[-2] * size["width"] == entry.maps.shape[-1] * size["height"]
        for word in EXCHANGED:
            own = entry.maps.mean(0)[numbers[word]].double().flatten()
            torch.testing.assert_close(
                own, expected[entry.layer][word], rtol=1e-5, atol=1e-7, msg=lambda m, e=entry, w=word: f"{e.layer}, {w}: {m}"
            )
    return Outcome()


def _require_equal(expected: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    assert len(expected) == len(found)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def summary(outcomes: Mapping[str, Outcome]) -> str:
    """The table of the documentation."""
    return "\n".join(f"{name}: {outcome}" for name, outcome in outcomes.items())
