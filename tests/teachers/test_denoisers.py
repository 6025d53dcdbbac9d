"""Where every denoiser keeps its text, against a probe that knows no layout, and maps against an explicit softmax."""

from __future__ import annotations

import math
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

import lavender
from lavender.teachers.denoisers import layout_of, places_of

from .zoo import DENOISERS, Denoiser

NAMES = sorted(DENOISERS)
WORD = 3
"""The text token that the probe changes."""


class Pipe:
    """What `lavender.patch` needs of a pipeline."""

    def __init__(self, denoiser):
        self.transformer = denoiser


@pytest.fixture
def denoiser(name) -> Denoiser:
    return DENOISERS[name]()


@contextmanager
def calls_of(modules):
    """(module name, query, key, mask, scale) of every attention call, as torch receives them."""
    seen, running = [], []
    original = F.scaled_dot_product_attention

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
        if running:
            seen.append((running[-1], query, key, attn_mask, scale))
        return original(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, **options)

    def leave(module, args, output):
        running.pop()

    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(lambda _m, _a, name=name: running.append(name)))
        handles.append(module.register_forward_hook(leave))
    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield seen
    for handle in handles:
        handle.remove()


def run(denoiser: Denoiser, **changed):
    with torch.no_grad():
        return denoiser.model(**{**denoiser.inputs, **changed}, return_dict=False)[0]


def weights_for(denoiser: Denoiser) -> torch.Tensor:
    """Two words: one token, and two tokens."""
    tokens = denoiser.inputs[denoiser.text].shape[1]
    weights = torch.zeros(2, 2, tokens)
    weights[:, 0, WORD] = 1
    weights[:, 1, 1:3] = 0.5
    return weights


@pytest.mark.parametrize("name", NAMES)
def test_one_text_token_and_one_patch_move_the_keys_where_the_layout_says(denoiser):
    model, text, image = denoiser.model, denoiser.inputs[denoiser.text], denoiser.inputs[denoiser.image]
    changed_text = text.clone()
    changed_text[:, WORD] += 5
    first = DenoiserPlaces(denoiser)
    with calls_of(dict(model.named_modules())) as plain:
        run(denoiser)
    with calls_of(dict(model.named_modules())) as worded:
        run(denoiser, **{denoiser.text: changed_text})
    read = [i for i, call in enumerate(plain) if call[0] in first.modules]
    assert {plain[i][0] for i in read} == set(first.modules)
    index = read[0]
    # A refiner lets every text token know of the change; without one it moves its own key alone.
    moved = (plain[index][2] != worded[index][2]).flatten(3).any(3).any(1)
    for b in range(2):
        columns = moved[b].nonzero().flatten()
        low, high = first.text_start, first.text_start + first.text_tokens[b]
        assert low + WORD in columns
        assert columns.min() >= low
        assert columns.max() < high
    if denoiser.layout == "cross":
        return
    # The latents' corner is the first image token, or all of them after a refiner: no text key moves.
    changed_image = image.clone()
    corner = (..., 0, 0) if image.ndim > 3 else (slice(None), 0)
    changed_image[corner] += 5
    with calls_of(dict(model.named_modules())) as painted:
        run(denoiser, **{denoiser.image: changed_image})
    moved = (plain[index][2] != painted[index][2]).flatten(3).any(3).any(1)
    for b in range(2):
        columns = moved[b].nonzero().flatten()
        assert columns.min() == first.image_start[b]
        assert columns.max() < first.image_start[b] + math.prod(denoiser.grid)


class DenoiserPlaces:
    """What the layout says of one call."""

    def __init__(self, denoiser: Denoiser):
        self.layout = layout_of(denoiser.model)
        patch = lavender.patch(Pipe(denoiser.model))
        self.modules = patch.layers
        patch.unpatch()
        places = places_of(self.layout, denoiser.model, denoiser.inputs)
        assert self.layout.order == denoiser.layout
        assert places.grid == denoiser.grid
        self.image_start, self.text_start = places.image_start.tolist(), places.text_start
        self.text_tokens = self.layout.text_tokens(denoiser.model, denoiser.inputs)


@pytest.mark.parametrize("name", NAMES)
def test_maps_equal_an_explicit_softmax_and_outputs_keep_every_bit(denoiser):
    model, places, weights = denoiser.model, DenoiserPlaces(denoiser), weights_for(denoiser)
    plain = run(denoiser)
    with calls_of({n: m for n, m in model.named_modules() if n in places.modules}) as calls:
        run(denoiser)
    with lavender.patch(Pipe(model)) as patch, patch.capture(weights) as recording:
        assert torch.equal(run(denoiser), plain)
    assert torch.equal(run(denoiser), plain)
    assert [e.layer for e in recording.entries] == [call[0] for call in calls]
    for entry, (_, query, key, mask, scale) in zip(recording.entries, calls, strict=True):
        scores = query.double() @ key.double().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
        probabilities = scores.softmax(-1)
        for b in range(2):
            own = probabilities[b]
            if places.layout.order != "cross":
                start = places.image_start[b]
                own = own[:, start : start + math.prod(denoiser.grid)]
            own = own[..., places.text_start : places.text_start + places.text_tokens[b]]
            expected = torch.einsum("hqn,wn->hwq", own, weights[b, :, : own.shape[-1]].double())
            torch.testing.assert_close(entry.maps[b].flatten(2).double(), expected, rtol=0, atol=1e-6)
        frames, rows, columns = denoiser.grid
        if denoiser.model.__class__.__name__ != "UNet2DConditionModel":
            assert entry.maps.shape[3:] == ((frames, rows, columns) if frames > 1 else (rows, columns))
        else:
            assert entry.maps.shape[3] / entry.maps.shape[4] == rows / columns


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_latents(denoiser):
    image = denoiser.inputs[denoiser.image].clone().requires_grad_()
    with lavender.patch(Pipe(denoiser.model)) as patch, patch.capture(weights_for(denoiser)) as recording:
        denoiser.model(**{**denoiser.inputs, denoiser.image: image}, return_dict=False)
    total = sum(entry.maps.square().sum() for entry in recording.entries)
    (gradient,) = torch.autograd.grad(total, image)
    assert gradient.abs().max() > 0
