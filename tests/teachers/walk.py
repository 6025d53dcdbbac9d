"""One step of the walk over diffusers' pipelines: a class's picture with and without the patch, and its maps against an independent
computation of words' columns and of the attention to them.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache, wraps
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lavender
from lavender.errors import LavenderError
from lavender.maps import Maps
from lavender.teachers.denoisers import LAYOUTS
from lavender.words import words_of

from .walked import HEIGHT, PROMPT, SWITCHED, WALK, WIDTH_PIXELS, Walked, mask, picture
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


def pipeline_class(name: str) -> type:
    """The class that a name of the walk begins with."""
    name = name.partition("/")[0]
    if name.startswith("Kolors"):  # shown by diffusers only where sentencepiece is installed
        folder, file = ("pag", "pag_kolors") if "PAG" in name else ("kolors", "kolors_img2img" if "Img2Img" in name else "kolors")
        return getattr(importlib.import_module(f"diffusers.pipelines.{folder}.pipeline_{file}"), name)
    return getattr(diffusers, name)


def built(name: str) -> Any:
    """A pipeline of the walk."""
    walked = {**WALK, **SWITCHED}[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = walked.build() if walked.build is not None else _assembled(pipeline_class(name), walked)
    pipe.set_progress_bar_config(disable=True)
    if walked.prepare is not None:
        walked.prepare(pipe)
    return pipe


def _assembled(cls: type, walked: Walked) -> Any:
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    made = {p.name: walked.parts[p.name]() for p in parameters if p.name in walked.parts}
    required = {p.name: None for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return cls(**{**required, **made})


def drawn(pipe: Any, walked: Walked, prompt: str = PROMPT, **more: Any) -> list[torch.Tensor]:
    """What a pipeline draws."""
    known = inspect.signature(type(pipe).__call__).parameters
    options = {key: value for key, value in {**USUAL, **walked.options}.items() if key in known and value is not None}
    if "generator" in known or walked.call is not None:
        options["generator"] = torch.Generator().manual_seed(0)
    if "num_inference_steps" in known and "strength" not in known:
        options["num_inference_steps"] = 2
    torch.manual_seed(1)
    options |= {"prompt": prompt, **more}
    output = pipe(**options) if walked.call is None else walked.call(pipe, options)
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
        step: how many steps the scheduler had made.
        calls: (layer, query, key, mask, scale) of every attention call in it.
    """

    text: torch.Tensor
    text_mask: torch.Tensor | None
    step: int
    calls: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None, float | None]] = field(default_factory=list)


def denoisers_of(pipe: Any) -> list[nn.Module]:
    """What draws: Wan 2.2 has two."""
    parts = (getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2"))
    return [part for part in parts if part is not None]


class _Enough(Exception):
    """Raised where the forwards after the first step are not wanted."""


def _leave(running: list[str]) -> Callable[..., None]:
    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        running.pop()

    return leave


@contextmanager
def forwards_of(pipe: Any, whole: bool = True, attention: bool = True) -> Iterator[list[Forward]]:
    """The denoiser's calls, or those of the first step alone, with their attention or without: that of a pipeline that is not
    patched.
    """
    seen, running, steps = [], [], []
    scheduler = type(pipe.scheduler)
    step = scheduler.step
    signature = inspect.signature(type(denoisers_of(pipe)[0]).forward)
    original = F.scaled_dot_product_attention

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = signature.bind(module, *args, **kwargs).arguments
        if not whole and steps:
            raise _Enough
        text_mask = inputs.get("encoder_attention_mask")
        seen.append(Forward(inputs["encoder_hidden_states"].detach().clone(), text_mask, len(steps)))

    @wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return step(*args, **kwargs)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any):
        if running:
            seen[-1].calls.append((running[-1], query.detach(), key.detach(), attn_mask, kwargs.get("scale")))
        return original(query, key, value, attn_mask, *args, **kwargs)

    handles = [denoiser.register_forward_pre_hook(before, with_kwargs=True) for denoiser in denoisers_of(pipe)]
    for name, module in (each for denoiser in denoisers_of(pipe) if attention for each in denoiser.named_modules()):
        handles.append(module.register_forward_pre_hook(lambda _m, _a, name=name: running.append(name)))
        handles.append(module.register_forward_hook(_leave(running), always_call=True))
    try:
        with (
            mock.patch.object(scheduler, "step", counted),
            mock.patch.object(F, "scaled_dot_product_attention", attend) if attention else nullcontext(),
        ):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def apart(pipe: Any) -> Iterator[None]:
    """The pipeline's text encoders without attention, so that a column of their output depends on its own token alone."""
    changed: list[tuple[nn.Parameter, torch.Tensor]] = []
    for part in pipe.components.values():
        for name, module in part.named_modules() if isinstance(part, nn.Module) and part not in denoisers_of(pipe) else ():
            if name.endswith((".out_proj", ".o_proj", ".o", "attention.dense")):
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
    """Where a prompt stands: which forward of a step and which sample of it carries it, and the columns of each word."""

    forward: int
    sample: int
    columns: dict[str, list[int]]


def place_of(pipe: Any, walked: Walked) -> Place:
    """Finds the prompt by exchanging its words, one after the other, and looking which columns of the embeddings move."""

    def texts(prompt: str) -> list[torch.Tensor]:
        with forwards_of(pipe, whole=False, attention=False) as seen, suppress(_Enough):
            drawn(pipe, walked, prompt)
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

Expected = dict[tuple[str, int], dict[str, torch.Tensor]]
"""Layer and number of places -> word -> [places], float64."""


def explicit_maps(pipe: Any, forwards: list[Forward], place: Place, layers: tuple[str, ...]) -> Expected:
    """The mean over heads and steps: of every step the first forward that has the prompt."""
    first = [forward for forward in forwards if not forward.step]
    prompt = first[place.forward].text[place.sample]
    belonging: list[tuple[Forward, int]] = []
    for forward in forwards:
        samples = [b for b, own in enumerate(forward.text) if own.shape == prompt.shape and torch.equal(own, prompt)]
        if samples and not (belonging and belonging[-1][0].step == forward.step):
            belonging.append((forward, samples[0]))
    return mean_maps(pipe, belonging, place, layers)


def mean_maps(pipe: Any, forwards: list[tuple[Forward, int]], place: Place, layers: tuple[str, ...]) -> Expected:
    """The mean over heads and over these forwards, each of one of its samples, float64."""
    sums: dict[tuple[str, int], dict[str, list[torch.Tensor]]] = {}
    for forward, sample in forwards:
        read = set()
        for layer, query, key, attention_mask, scale in forward.calls:
            if layer not in layers or layer in read:
                continue
            read.add(layer)
            attention = _attention(pipe, forward, sample, query, key, attention_mask, scale)
            for word, columns in place.columns.items():
                found = attention[..., columns].mean(-1).mean(0)
                sums.setdefault((layer, len(found)), {}).setdefault(word, []).append(found)
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
    denoiser = denoisers_of(pipe)[0]
    layout, tokens = _layout(type(denoiser).__name__)
    if layout == "cross":
        return attention
    columns = forward.text.shape[1]
    if layout == "image first":
        return attention[:, :tokens, attention.shape[2] - columns :]
    lead = denoiser.register_tokens.shape[1] if hasattr(denoiser, "register_tokens") else 0
    length = columns if type(denoiser).__name__ != "Lumina2Transformer2DModel" else int(forward.text_mask[sample].sum())
    return attention[:, lead + length : lead + length + tokens, lead : lead + length]


@dataclass(frozen=True)
class Outcome:
    """What became of a class.

    Attributes:
        denoiser: its class.
        when: where it was refused: by "patch", by the pipeline's "call" before the denoiser ran, or by "maps"; None where maps were
            read.
        error: what was said.
        missing: how many of its layers were not read, if any.
    """

    denoiser: str
    when: str | None = None
    error: str = ""
    missing: str = ""


@cache
def walk(name: str) -> Outcome:
    """Draws a class's picture with and without the patch and compares everything; fails by an AssertionError."""
    pipe, walked = built(name), {**WALK, **SWITCHED}[name]
    before, denoiser = type(pipe), type(denoisers_of(pipe)[0]).__name__
    with forwards_of(pipe) as forwards:
        plain = drawn(pipe, walked)
    assert plain
    assert all(torch.isfinite(each).all() for each in plain)

    def refused(when: str, error: LavenderError) -> Outcome:
        assert type(pipe) is before
        require_equal(plain, drawn(pipe, walked))
        return Outcome(denoiser, when, str(error))

    try:
        lens = lavender.patch(pipe)
    except LavenderError as error:
        return refused("patch", error)
    with lens:
        try:
            with forwards_of(pipe, attention=False) as begun:
                patched = drawn(pipe, walked)
        except LavenderError as error:
            assert not begun or walked.call is not None
            lens.unpatch()
            return refused("call", error)
        require_equal(plain, patched)
        try:
            maps = lens.maps
        except LavenderError as error:
            lens.unpatch()
            return refused("maps", error)
    assert type(pipe) is before
    require_equal(plain, drawn(pipe, walked))
    assert list(maps) == list(dict.fromkeys(word.text for word in words_of(PROMPT)))
    expected = explicit_maps(pipe, forwards, place_of(pipe, walked), lens.layers)
    missing = maps.coverage.missing_layers
    assert sorted({entry.layer for entry in maps.entries} | set(missing)) == sorted(lens.layers)
    assert len(maps.entries) == len({key for key in expected if key[0] not in missing})
    size = {**USUAL, **walked.options}
    assert all(e.maps.shape[-2] * size["width"] == e.maps.shape[-1] * size["height"] for e in maps.entries)
    require_maps(maps, expected)
    return Outcome(denoiser, missing=f"{len(missing)} of {len(lens.layers)}" if missing else "")


def require_maps(maps: Maps, expected: Expected) -> None:
    """Maps are those that were expected, of the words that were exchanged."""
    numbers = {word.text: n for n, word in enumerate(maps.words)}
    for entry in maps.entries:
        for word in EXCHANGED:
            own = entry.maps.mean(0)[numbers[word]].double().flatten()
            torch.testing.assert_close(
                own,
                expected[entry.layer, len(own)][word],
                rtol=1e-5,
                atol=1e-7,
                msg=lambda m, e=entry, w=word: f"{e.layer}, {w}: {m}",
            )


def require_equal(expected: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    """Pictures are equal bit for bit."""
    assert len(expected) == len(found)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


# The classes whose denoiser is not read


def unread() -> dict[str, Outcome]:
    """Of the classes that take a prompt and are not in the walk: what `lavender.patch` says of one that has its denoiser alone."""
    walked = {name.partition("/")[0] for name in WALK}
    outcomes = {}
    for name in sorted(dir(diffusers)):
        cls = getattr(diffusers, name) if "Pipeline" in name and name not in walked else None
        if not isinstance(cls, type) or not issubclass(cls, diffusers.DiffusionPipeline):
            continue
        if "prompt" not in inspect.signature(vars(cls).get("__call__", print)).parameters:
            continue
        pipe = _bare(cls)
        if pipe is None:
            continue
        with pytest.raises(LavenderError) as caught:
            pytest.fail(f"{name} was patched: {lavender.patch(pipe).layers}")
        assert type(pipe) is cls
        parts = [type(part).__name__ for part in pipe.components.values() if isinstance(part, nn.Module)]
        outcomes[name] = Outcome(parts[0] if parts else "", "patch", str(caught.value))
    return outcomes


def _bare(cls: type) -> Any:
    """A pipeline of its denoiser, without memory, and of nothing else; None where it cannot be made so."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    parts: dict[str, Any] = {p.name: None for p in parameters if p.default is p.empty}
    for p in parameters:
        if p.name in ("unet", "transformer", "prior", "decoder", "prior_prior"):
            kinds = [p.annotation, *getattr(p.annotation, "__args__", ())]
            kinds = [getattr(diffusers, kind, None) if isinstance(kind, str) else kind for kind in kinds]
            kind = next((k for k in reversed(kinds) if isinstance(k, type) and issubclass(k, nn.Module)), None)
            if kind is None:
                return None
            sizes = _SIZES.get(kind.__name__, {})
            if kind is diffusers.UNet2DConditionModel and cls.__name__.startswith(("IF", "Kandinsky")):
                sizes = _PIXELS
            elif any(base.__name__ in LAYOUTS for base in kind.__mro__):  # it can be read: what it asks for is not made here
                return None
            try:
                parts[p.name] = _without_memory(kind, tuple(sizes.items()))
            except (TypeError, ValueError, AssertionError):  # a class without sizes of its own
                return None
    try:
        return cls(**parts)
    except (TypeError, AttributeError, ImportError, NameError):  # it asks something of another part
        return None


@cache
def _without_memory(kind: type, sizes: tuple[tuple[str, Any], ...]) -> nn.Module:
    with torch.device("meta"):
        return kind(**dict(sizes))


_SIZES: dict[str, dict[str, Any]] = {
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2, "sample_size": 8},
    "LuminaNextDiT2DModel": {"num_kv_heads": 32},
    "HiDreamImageTransformer2DModel": {"caption_channels": (32, 32), "in_channels": 16, "patch_size": 2},
}
"""What classes of denoisers cannot be made without."""
_PIXELS: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}
"""The kind of U-Net that DeepFloyd IF and Kandinsky have: text and places are keys of one attention."""


# The table of the documentation

DOCUMENT = Path(__file__).parents[2] / "docs" / "pipelines.md"
_START, _END = "<!-- table -->\n", "<!-- end of the table -->\n"
_WHERE = {"patch": "`patch`", "call": "the call, before its first step", "maps": "`lens.maps`"}


def table() -> str:
    """What the walk gives, in Markdown."""
    lines = ["| pipeline | denoiser | its maps |", "|---|---|---|"]
    for name in sorted(WALK):
        outcome = walk(name)
        lines.append(f"| {name.replace('/', ', ')} | {outcome.denoiser} | {_described(outcome)} |")
    apart: dict[tuple[str, str], list[str]] = {}
    for name, outcome in unread().items():
        apart.setdefault((outcome.denoiser or "none of them", _described(outcome)), []).append(name)
    lines += ["", "| denoiser | pipelines | their maps |", "|---|---|---|"]
    lines += [f"| {kind} | {', '.join(names)} | {described} |" for (kind, described), names in sorted(apart.items())]
    lines += ["", "| pipeline | what is switched on | its maps |", "|---|---|---|"]
    lines += [f"| {name.replace('/', ' | ')} | {_described(walk(name))} |" for name in sorted(SWITCHED)]
    return "\n".join(lines) + "\n"


def _described(outcome: Outcome) -> str:
    if outcome.when is None:
        return f"read, but for {outcome.missing} layers" if outcome.missing else "read"
    clauses = re.split(r"; |\. (?=[A-Z])|\n", re.sub(r" \([^()]*, [^()]*\)", "", outcome.error))
    reason = "; ".join(clauses[: 2 if "recorded nothing" in clauses[0] else 1])
    reason = re.sub(r"\b(an?|this|a) [A-Z]\w+Pipeline\b", "this pipeline", reason)
    return f"refused by {_WHERE[outcome.when]}: {reason}".replace("|", "\\|")


def committed_table() -> str:
    """What the documentation has."""
    return DOCUMENT.read_text().partition(_START)[2].partition(_END)[0]


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text().partition(_START)
    DOCUMENT.write_text(before + _START + table() + _END + rest.partition(_END)[2])
