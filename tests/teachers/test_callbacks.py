"""Callbacks that do anything at all in the middle of a drawing: the picture is the one without the patch, and the maps are those of
the forwards that the pipeline itself made for its prompt, or one error says why there are none.

`LAVENDER_FUZZ=500 pytest tests/teachers/test_callbacks.py` tries that many for each pipeline.
"""

from __future__ import annotations

import copy
import os
import random
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import pytest
import torch

import lavender
from lavender.errors import LavenderError
from lavender.maps import Maps

from .walk import Forward, Place, built, denoisers_of, drawn, forwards_of, mean_maps, place_of, require_equal, require_maps
from .walked import PROMPT, WALK

NAMES = ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"]
OTHERS = {
    "StableDiffusionPipeline": "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusion3Pipeline": "StableDiffusion3Img2ImgPipeline",
    "FluxPipeline": "FluxImg2ImgPipeline",
}
"""Pipelines that share all their parts."""
OTHER_PROMPT = "two birds over the blue house"
STEPS = 4
FUZZ = int(os.environ.get("LAVENDER_FUZZ", "5"))
"""Callbacks of each pipeline that are tried."""


class Stopped(Exception):
    """Raised by a callback."""


@dataclass
class Run:
    """One drawing with a callback.

    Attributes:
        pipe: the pipeline.
        name: of the walk.
        lens: its patch, or None.
        seen: the denoiser's calls.
        foreign: how many of them a callback made, by their numbers.
        last: arguments of the denoiser's latest call.
        kept: by how many of the calls the patch was in place.
        read: maps that a callback read, with the number of calls before.
    """

    pipe: Any
    name: str
    lens: Any = None
    seen: list[Forward] = field(default_factory=list)
    foreign: set[int] = field(default_factory=set)
    last: tuple[tuple, dict[str, Any]] = ((), {})
    kept: int | None = None
    read: list[tuple[int, Maps | None]] = field(default_factory=list)

    @property
    def denoiser(self) -> Any:
        return denoisers_of(self.pipe)[0]

    def call_denoiser(self, **changed: Any) -> None:
        """A call like the latest one, with something changed in it."""
        args, kwargs = self.last
        names = ("sample" if "sample" not in kwargs else "", "timestep", "encoder_hidden_states")
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        latents = "sample" if "sample" in inputs else "hidden_states"
        if "latents" in changed:
            changed[latents] = changed.pop("latents")(inputs[latents])
        changed = {key: value(inputs[key]) if callable(value) else value for key, value in changed.items()}
        with torch.no_grad():
            self.denoiser(**{**inputs, **changed})


Given = dict[str, Any]
"""What a pipeline hands its callback, and takes back."""
ACTIONS: dict[str, Callable[[Run, Given], None]] = {}


def action(function: Callable[[Run, Given], None]) -> Callable[[Run, Given], None]:
    ACTIONS[function.__name__.strip("_")] = function
    return function


def _draw_other(run: Run, prompt: str, patched: bool = False) -> None:
    cls = getattr(diffusers, OTHERS[run.name])
    other = cls.from_pipe(run.pipe, scheduler=copy.deepcopy(run.pipe.scheduler))
    other.set_progress_bar_config(disable=True)
    if not patched:
        drawn(other, WALK[OTHERS[run.name]], prompt)
        return
    with lavender.patch(other) as lens:
        drawn(other, WALK[OTHERS[run.name]], prompt)
        with suppress(LavenderError):
            assert lens.maps.text == prompt


@action
def _another_pipeline_draws(run: Run, given: Given) -> None:
    _draw_other(run, OTHER_PROMPT)


@action
def _another_pipeline_draws_the_same_prompt(run: Run, given: Given) -> None:
    _draw_other(run, PROMPT)


@action
def _another_patched_pipeline_draws(run: Run, given: Given) -> None:
    _draw_other(run, OTHER_PROMPT, patched=run.lens is not None)


@action
def _the_same_pipeline_draws(run: Run, given: Given) -> None:
    pipe, kept = run.pipe, {}
    for name in ("scheduler", "_guidance_scale", "_num_timesteps", "_interrupt", "_current_timestep"):
        kept[name] = getattr(pipe, name, None)
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    drawn(pipe, WALK[run.name], OTHER_PROMPT)
    for name, value in kept.items():
        setattr(pipe, name, value)


@action
def _the_denoiser_is_called_with_other_latents(run: Run, given: Given) -> None:
    run.call_denoiser(latents=lambda latents: latents.flip(-1) + 0.5)


@action
def _the_denoiser_is_called_at_another_timestep(run: Run, given: Given) -> None:
    run.call_denoiser(timestep=lambda timestep: timestep * 0.5)


@action
def _the_denoiser_is_called_with_another_text(run: Run, given: Given) -> None:
    run.call_denoiser(encoder_hidden_states=lambda text: text.flip(1))


@action
def _the_denoiser_is_called_in_another_thread(run: Run, given: Given) -> None:
    thread = threading.Thread(target=run.call_denoiser, kwargs={"latents": lambda latents: latents * 0.5})
    thread.start()
    thread.join()


@action
def _guidance_ends(run: Run, given: Given) -> None:
    if "prompt_embeds" in given and len(given["prompt_embeds"]) > 1:  # once, and not of Flux
        run.pipe._guidance_scale = 0.0
        for name in ("prompt_embeds", "pooled_prompt_embeds", "add_text_embeds", "add_time_ids"):
            if name in given:
                given[name] = given[name][-1:]


@action
def _guidance_is_changed(run: Run, given: Given) -> None:
    run.pipe._guidance_scale = 2.5


@action
def _the_text_is_exchanged(run: Run, given: Given) -> None:
    if "prompt_embeds" in given:
        given["prompt_embeds"] = given["prompt_embeds"].flip(1)


@action
def _a_text_is_encoded_and_taken(run: Run, given: Given) -> None:
    if "prompt_embeds" in given:
        options = {"max_sequence_length": 24} if run.name in ("StableDiffusion3Pipeline", "FluxPipeline") else {}
        if run.name == "StableDiffusionPipeline":
            options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        elif run.name != "FluxPipeline":
            options |= {"prompt_2": None, "do_classifier_free_guidance": False}
            options |= {"prompt_3": None} if run.name == "StableDiffusion3Pipeline" else {}
        else:
            options |= {"prompt_2": None}
        own = run.pipe.encode_prompt(OTHER_PROMPT, **options)[0]
        given["prompt_embeds"] = torch.cat([given["prompt_embeds"][:-1], own])


@action
def _it_raises(run: Run, given: Given) -> None:
    raise Stopped


@action
def _it_interrupts(run: Run, given: Given) -> None:
    run.pipe._interrupt = True


@action
def _latents_are_replaced(run: Run, given: Given) -> None:
    if "latents" in given:
        given["latents"] = torch.randn(given["latents"].shape, generator=torch.Generator().manual_seed(7))


@action
def _maps_are_read(run: Run, given: Given) -> None:
    if run.lens is not None:
        try:
            run.read.append((len(run.seen), run.lens.maps))
        except LavenderError:
            run.read.append((len(run.seen), None))


@action
def _the_patch_is_undone(run: Run, given: Given) -> None:
    if run.lens is not None and run.kept is None:
        run.lens.unpatch()
        run.kept = len(run.seen)


@action
def _it_is_patched_again(run: Run, given: Given) -> None:
    if run.lens is not None and run.kept is None:
        assert lavender.patch(run.pipe) is run.lens


@action
def _it_is_patched_otherwise(run: Run, given: Given) -> None:
    if run.lens is not None and run.kept is None:
        run.kept = len(run.seen)
        lavender.patch(run.pipe, heads=True)


@cache
def place(name: str) -> Place:
    """Where the words stand."""
    return place_of(built(name), WALK[name])


def draw(run: Run, plan: list[tuple[int, str]], kind: str) -> list[torch.Tensor] | None:
    """Draws with a callback that does what is planned; None where it raised."""
    pipe = run.pipe

    def act(step: int, given: Given) -> None:
        before = len(run.seen)
        try:
            for at, what in plan:
                if at == step:
                    ACTIONS[what](run, given)
        finally:
            run.foreign |= set(range(before, len(run.seen)))

    def on_step_end(pipe: Any, step: int, timestep: Any, given: Given) -> Given:
        act(step, given)
        return given

    class OnStepEnd(diffusers.callbacks.PipelineCallback):
        tensor_inputs = pipe._callback_tensor_inputs

        def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: Given) -> Given:
            act(step_index, callback_kwargs)
            return callback_kwargs

    if kind == "legacy":
        options: dict[str, Any] = {"callback": lambda step, timestep, latents: act(step, {}), "callback_steps": 1}
    elif kind == "object":
        options = {"callback_on_step_end": OnStepEnd(cutoff_step_ratio=None, cutoff_step_index=0)}
    else:
        options = {"callback_on_step_end": on_step_end, "callback_on_step_end_tensor_inputs": pipe._callback_tensor_inputs}

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if threading.current_thread() is threading.main_thread():
            run.last = args, kwargs

    handle = run.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    pipe._interrupt = False
    try:
        with forwards_of(pipe, attention=run.lens is None) as run.seen, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return drawn(pipe, WALK[run.name], num_inference_steps=STEPS, **options)
    except Stopped:
        return None
    finally:
        handle.remove()


def belonging(run: Run, until: int) -> list[tuple[Forward, int]]:
    """The forwards that the pipeline itself made for its prompt, and the sample that carries it."""
    where = place(run.name)
    prompt = run.seen[where.forward].text[where.sample]
    found = []
    for number, forward in enumerate(run.seen[:until]):
        samples = [b for b, own in enumerate(forward.text) if own.shape == prompt.shape and torch.equal(own, prompt)]
        if number not in run.foreign and samples:
            found.append((forward, samples[0]))
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(FUZZ))
def test_callbacks_change_neither_the_picture_nor_whose_maps_are_read(name, seed):
    chance = random.Random(f"{name} {seed}")
    plan = [(chance.randrange(STEPS - 1), chance.choice(sorted(ACTIONS))) for _ in range(chance.randint(1, 3))]
    kinds = ["function", "object"] + ["legacy"] * (name in NAMES[:2])
    check(name, plan, chance.choice(kinds))


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", sorted(ACTIONS))
def test_every_action_alone(name, what):
    for kind in ["function", "object"] + ["legacy"] * (name in NAMES[:2]):
        check(name, [(1, what)], kind)


def check(name: str, plan: list[tuple[int, str]], kind: str) -> None:
    """Draws with a callback and without the patch, then with it."""
    plain = Run(built(name), name)
    expected = draw(plain, plan, kind)
    run = Run(built(name), name)
    with lavender.patch(run.pipe) as run.lens:
        found = draw(run, plan, kind)
        assert (found is None) == (expected is None)
        require_equal(expected or [], found or [])
        assert (len(run.seen), run.foreign) == (len(plain.seen), plain.foreign)
        run.read.append((len(run.seen) if run.kept is None else run.kept, _maps(run.lens)))
    if run.kept is not None:
        lavender.patch(run.pipe).unpatch()
    for until, maps in run.read:
        if maps is not None:
            own = belonging(plain, min(until, len(run.seen) if run.kept is None else run.kept))
            assert maps.text == PROMPT
            require_maps(maps, mean_maps(plain.pipe, own, place(name), run.lens.layers))


def _maps(lens: Any) -> Maps | None:
    try:
        return lens.maps
    except LavenderError:
        return None
