"""Threads that share patched pipelines: every picture and every map is that of a thread that is alone."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import lavender
from lavender.config import TeacherConfig
from lavender.errors import CaptureError, ConfigError
from lavender.teachers.model import Teacher
from lavender.teachers.turns import Turns

from .pipeline_zoo import CAPTIONS, PIPELINES
from .test_pipelines import draw

MORE = [*CAPTIONS, "a red bird over the house", "a green cat", "two chairs"]


@pytest.fixture(autouse=True)
def _often():
    """Threads change places far more often than they would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def values_of(maps) -> list[torch.Tensor]:
    return [entry.maps.clone() for entry in maps.entries]


def in_threads(work, jobs, num_threads=4):
    """Results of `work(job)`, all threads beginning at once."""
    ready = threading.Barrier(num_threads)
    with ThreadPoolExecutor(num_threads, initializer=lambda: ready.wait(60)) as pool:
        return [future.result(120) for future in [pool.submit(work, job) for job in jobs]]


def assert_same(results, expected):
    for (picture, words, maps), (own_picture, own_words, own_maps) in zip(results, expected, strict=True):
        assert np.array_equal(picture, own_picture)
        assert words == own_words
        assert all(torch.equal(one, other) for one, other in zip(maps, own_maps, strict=True))


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_pictures_and_maps_are_those_of_a_thread_that_is_alone(name):
    pipe = PIPELINES[name]()

    def work(prompt):
        picture = draw(pipe, name, prompt)
        return picture, list(lens.maps), values_of(lens.maps)

    jobs = MORE * (2 if name == "StableDiffusionPipeline" else 1)
    with lavender.patch(pipe) as lens:
        alone = {prompt: work(prompt) for prompt in MORE}
        assert any(not np.array_equal(one[0], other[0]) for one, other in pairwise(alone.values()))
        assert_same(in_threads(work, jobs), [alone[prompt] for prompt in jobs])
    assert not _holders()


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_every_pipeline_serves_many_threads(name):
    pipe = PIPELINES[name]()

    def work(prompt):
        picture = draw(pipe, name, prompt)
        return picture, list(lens.maps), values_of(lens.maps)

    jobs = MORE * 8
    with lavender.patch(pipe) as lens:
        alone = {prompt: work(prompt) for prompt in MORE}
        assert_same(in_threads(work, jobs), [alone[prompt] for prompt in jobs])


def _holders():
    from lavender.teachers.turns import _TURNS

    return _TURNS._holders


def test_pipelines_that_share_their_denoiser_serve_two_threads():
    """Each has a patch of its own on the same U-Net, and one scheduler."""
    first = PIPELINES["StableDiffusionPipeline"]()
    second = StableDiffusionPipeline.from_pipe(first, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    assert second.unet is first.unet
    lenses = {id(first): lavender.patch(first), id(second): lavender.patch(second, heads=True)}

    def work(job):
        pipe, prompt = job
        picture = draw(pipe, "StableDiffusionPipeline", prompt)
        lens = lenses[id(pipe)]
        return picture, list(lens.maps), values_of(lens.maps)

    jobs = [(pipe, prompt) for prompt in MORE for pipe in (first, second)]
    alone = [work(job) for job in jobs]
    assert_same(in_threads(work, jobs), alone)
    for lens in lenses.values():
        lens.unpatch()


def test_loops_and_captures_of_threads_are_apart():
    """Of the user's own over the parts of a pipeline, which do not wait for each other."""
    pipe = PIPELINES["StableDiffusionPipeline"]()
    torch.manual_seed(0)
    latents = torch.randn(1, pipe.unet.config.in_channels, 8, 8)
    encoded = {prompt: pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in MORE}

    def work(prompt):
        # Encoded before: tokenizers themselves are not for several threads.
        weights = torch.zeros(1, 1, encoded[prompt].shape[1])
        weights[0, 0, 1 + MORE.index(prompt)] = 1
        meet.wait(60)
        with torch.no_grad(), lens.capture(weights) as recording:
            meet.wait(60)
            output = pipe.unet(latents, torch.tensor(51), encoded[prompt]).sample
            meet.wait(60)
        return output.numpy(), [prompt], values_of(recording)

    with lavender.patch(pipe) as lens:
        meet = threading.Barrier(1)
        alone = [work(prompt) for prompt in MORE]
        meet = threading.Barrier(2)
        assert_same(in_threads(work, MORE, num_threads=2), alone)
        meet = threading.Barrier(1)
        with pytest.raises(CaptureError, match="did not run in this thread"), lens.capture(torch.zeros(1, 1, 16)):
            in_threads(lambda prompt: pipe.unet(latents, torch.tensor(51), encoded[prompt]), MORE[:1], num_threads=1)


def test_each_thread_has_the_maps_of_its_own_picture():
    pipe = PIPELINES["StableDiffusionPipeline"]()

    def work(prompt):
        draw(pipe, "StableDiffusionPipeline", prompt)
        return " ".join(lens.maps)

    def read(_):
        return " ".join(lens.maps)

    with lavender.patch(pipe) as lens:
        assert in_threads(work, ["a green cat"], num_threads=1) == ["a green cat"]
        assert " ".join(lens.maps) == "a green cat"  # of the one thread that has drawn
        assert in_threads(work, ["two birds"], num_threads=1) == ["two birds"]
        with pytest.raises(CaptureError, match="several threads drew with this pipeline, and this one did not"):
            lens.maps  # noqa: B018
        assert work("a red hat") == "a red hat"
        assert in_threads(work, ["a chair"], num_threads=1) == ["a chair"]
        assert " ".join(lens.maps) == "a red hat"
        with pytest.raises(CaptureError, match="several threads"):
            in_threads(read, [None], num_threads=1)


def test_another_thread_does_not_take_the_patch_away():
    pipe = PIPELINES["StableDiffusionPipeline"]()

    def work(options):
        with lavender.patch(pipe, **options) as lens:
            return lens.settings[1]

    with lavender.patch(pipe) as lens:
        with pytest.raises(CaptureError, match="another thread uses this pipeline's patch, with other settings"):
            in_threads(work, [{"heads": True}], num_threads=1)
        assert in_threads(work, [{}], num_threads=1) == [False]
        assert lens.is_patched
    assert in_threads(work, [{"heads": True}], num_threads=1) == [True]


def test_one_teacher_reads_the_pictures_of_two_threads(teacher_folder, scenes):
    with closing(Teacher(teacher_folder, TeacherConfig(inversion_steps=2, diffusion_steps=2))) as teacher:

        def work(scene):
            return teacher.word_maps(scene.image, scene.caption).maps

        alone = [work(scene) for scene in scenes[:6]]
        for one, other in zip(in_threads(work, scenes[:6], num_threads=2), alone, strict=True):
            assert np.array_equal(one, other)


@pytest.mark.full
def test_a_compiled_denoiser_serves_threads():
    name = "StableDiffusionPipeline"
    pipe = PIPELINES[name]()

    def work(prompt):
        picture = draw(pipe, name, prompt)
        return picture, list(lens.maps), values_of(lens.maps)

    torch.compiler.reset()
    with lavender.patch(pipe) as lens:
        plain = [work(prompt) for prompt in MORE]
        pipe.unet.compile(backend="aot_eager")
        compiled = [work(MORE[0]), *in_threads(work, MORE[1:-1], num_threads=2), work(MORE[-1])]
    torch.compiler.reset()
    for (picture, words, maps), (own_picture, own_words, own_maps) in zip(compiled, plain, strict=True):
        assert np.abs(picture - own_picture).max() < 1e-5
        assert words == own_words
        torch.testing.assert_close(maps, own_maps, rtol=0, atol=1e-6)


def test_each_thread_may_patch_for_itself():
    """As a web page does for every visitor: the patch lasts until the last of them has left its `with`."""
    name = "StableDiffusionPipeline"
    pipe = PIPELINES[name]()
    before = type(pipe)

    def work(prompt):
        with lavender.patch(pipe) as lens:
            picture = draw(pipe, name, prompt)
            with lavender.patch(pipe):
                pass
            return picture, list(lens.maps), values_of(lens.maps)

    alone = {prompt: work(prompt) for prompt in MORE}
    assert type(pipe) is before
    jobs = MORE * 4
    assert_same(in_threads(work, jobs), [alone[prompt] for prompt in jobs])
    assert type(pipe) is before
    assert not pipe.unet._forward_hooks


def test_a_call_within_a_call_and_one_that_fails_give_their_turn_back():
    """A callback draws another picture by as many steps, which leaves the scheduler as it was."""
    name = "StableDiffusionPipeline"
    pipe = PIPELINES[name]()

    def work(prompt):
        inner = []

        def again(pipe, step, timestep, tensors):
            if step == 0:
                inner.extend([draw(pipe, name, f"{prompt} in a hat"), list(lens.maps)])
            return tensors

        picture = draw(pipe, name, prompt, callback_on_step_end=again)
        return np.concatenate([picture, inner[0]]), [list(lens.maps), inner[1]], values_of(lens.maps)

    def fail(prompt):
        with pytest.raises(ZeroDivisionError):
            draw(pipe, name, prompt, callback_on_step_end=lambda *_: 1 / 0)
        return prompt

    with lavender.patch(pipe) as lens:
        alone = [work(prompt) for prompt in MORE]
        assert_same(in_threads(work, MORE), alone)
        assert in_threads(fail, MORE) == MORE
        assert_same(in_threads(work, MORE), alone)
    assert not _holders()


def test_to_undo_a_patch_waits_for_the_picture_that_is_drawn():
    pipe = PIPELINES["StableDiffusionPipeline"]()
    drawing, undoing = threading.Event(), threading.Event()

    def step(pipe, step, timestep, tensors):
        drawing.set()
        undoing.wait(60)
        return tensors

    def work(prompt):
        draw(pipe, "StableDiffusionPipeline", prompt, callback_on_step_end=step)
        return list(lens.maps), {entry.layer for entry in lens.maps.entries}

    lens = lavender.patch(pipe)
    with ThreadPoolExecutor(2) as pool:
        result = pool.submit(work, "a green cat")
        assert drawing.wait(60)
        undone = pool.submit(lens.unpatch)
        undoing.set()
        assert result.result(60) == (["a", "green", "cat"], set(lens.layers))
        undone.result(60)
    assert not lens.is_patched


def test_threads_that_would_wait_for_each_other_are_told():
    turns, one, other = Turns(), object(), object()
    meet = threading.Barrier(2)

    def work(first, second):
        with turns.take(first):
            meet.wait(60)
            try:
                with turns.take(first, second):
                    return "had both"
            except CaptureError as error:
                return str(error)

    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(work, one, other), pool.submit(work, other, one)]
        told = sorted(result.result(60) for result in results)
    assert told[0] == "had both"
    assert told[1].startswith("two threads would wait for each other")
    assert not turns._holders
    assert not turns._awaited


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 5}, "layers is 5; expected a text or a list of texts"),
        ({"words": ["a", 1]}, r"words is \['a', 1\]; expected"),
        ({"heads": 2}, "heads is 2; expected True or False"),
        ({"steps": "all"}, "steps is 'all'; expected True or False"),
    ],
)
def test_settings_of_another_type_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        lavender.patch(PIPELINES["StableDiffusionPipeline"](), **options)
