"""Long sessions in one process: what is done hundreds of times leaves no hook, tensor, thread, file or memory behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.multiprocessing.reductions import shared_cache
from torch.utils.data import DataLoader
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lavender
from lavender.batches.collator import Collator
from lavender.config import AlignmentConfig
from lavender.errors import CaptureError, LavenderError
from lavender.students.loading import load_student
from lavender.testing.student import noise_image

from .conftest import without_lavender

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts what Linux shows under /proc")

RSS_MB = 40
"""What the allocator may keep over hundreds of cycles without a leak: one picture's maps in every cycle would be more."""
PICTURES = [noise_image(60 + 8 * n, 90 - 8 * n, seed=n) for n in range(4)]


class Interrupted(Exception):
    """Raised by a callback."""


@dataclass(frozen=True)
class Footprint:
    """What there is at a moment. Counts are exact; memory may grow by `RSS_MB`. Objects may grow by less than one in two cycles, in
    the half of them in which they grow less: libraries fill caches once, whenever they like."""

    hooks: int
    attributes: int
    tensors: int
    files: int
    threads: int
    children: int
    functions: int
    objects: int
    rss_mb: float

    @classmethod
    def of(cls, *modules: torch.nn.Module) -> Footprint:
        shared_cache.free_dead_references()  # of batches that came from workers; torch does it now and then
        for _ in range(3):  # what a finalizer lets go of is there until the next one
            gc.collect()
        parts = [part for module in modules for part in module.modules()]
        objects = gc.get_objects()
        return cls(
            hooks=sum(
                len(value) for part in parts for name, value in vars(part).items() if "_hooks" in name and isinstance(value, dict)
            ),
            attributes=sum(len(vars(part)) for part in parts),
            tensors=sum(issubclass(type(each), torch.Tensor) for each in objects),
            files=len(os.listdir("/proc/self/fd")),
            threads=threading.active_count(),
            children=len(multiprocessing.active_children()),
            functions=len(ALL_ATTENTION_FUNCTIONS._local_mapping),
            objects=len(objects),
            rss_mb=psutil.Process().memory_info().rss / 2**20,
        )

    def require_like(self, middle: Footprint, before: Footprint, cycles: int) -> None:
        for field in fields(self):
            end, half, start = (getattr(each, field.name) for each in (self, middle, before))
            margin = {"objects": max(2, cycles / 4), "rss_mb": RSS_MB}.get(field.name, 0)
            growth = min(end - half, half - start) if field.name == "objects" else end - start
            assert growth <= margin, f"{field.name} grew from {start} to {half} and {end} in {cycles} cycles"


def soak(cycle: Callable[[int], Any], cycles: int, *modules: torch.nn.Module) -> None:
    """Runs a cycle so many times, after a fifth of them as a warm-up, and compares."""
    gc.collect()
    gc.freeze()  # what other tests left is neither counted nor looked through again and again
    try:
        _compare(cycle, cycles, *modules)
    finally:
        gc.unfreeze()


def _compare(cycle: Callable[[int], Any], cycles: int, *modules: torch.nn.Module) -> None:
    warm_up = max(5, cycles // 5)
    for number in range(warm_up):
        cycle(number)
    before = middle = Footprint.of(*modules)
    for number in range(cycles):
        if number == cycles // 2:
            middle = Footprint.of(*modules)
        cycle(number)
    Footprint.of(*modules).require_like(middle, before, cycles)


@pytest.mark.parametrize("cycles", [20, pytest.param(500, marks=pytest.mark.full)])
@pytest.mark.parametrize("patched", ["once", "each time"])
def test_looking(student, processor, batch, cycles, patched):
    """Answers of its own and given ones, and errors: no words, and an interrupt in the middle of a forward."""
    student(**without_lavender(batch))  # transformers itself leaves hooks at the first one
    initial = Footprint.of(student)

    def interrupt(module, args, output):
        raise Interrupted

    def look(number):
        with lavender.patch(student, processor=processor) as lens:
            picture = PICTURES[number % 4]
            if number % 5 == 1:
                with suppress(CaptureError):
                    lens.look(picture, max_new_tokens=2, do_sample=False)
            elif number % 5 == 2:
                with pytest.raises(CaptureError, match="no words"):
                    lens.look(picture, answer="...")
            elif number % 5 == 3:
                hook = student.model.language_model.layers[-1].register_forward_hook(interrupt)
                with pytest.raises(Interrupted):
                    lens.look(picture, answer="a red circle")
                hook.remove()
            else:
                maps = lens.look(picture, answer="a red circle")
                assert len(maps) == 3

    if patched == "once":
        handle = lavender.patch(student, processor=processor)
        soak(look, cycles, student)
        assert handle.is_patched
        handle.unpatch()
    else:
        soak(look, cycles, student)
    end = Footprint.of(student)
    assert (end.hooks, end.attributes, end.functions) == (initial.hooks, initial.attributes, initial.functions)


@pytest.mark.parametrize("cycles", [12, pytest.param(150, marks=pytest.mark.full)])
@pytest.mark.parametrize("patched", ["once", "each time"])
def test_drawing_with_callbacks_that_raise(pipe, cycles, patched):
    """Two drawings of three are ended by their callback, after the first step or the last one."""
    unpatched = type(pipe)
    initial = Footprint.of(pipe.unet, pipe.text_encoder, pipe.vae)
    steps = 2

    def draw(number):
        def callback(pipe, step, timestep, given):
            if number % 3 < steps and step == number % 3:
                raise Interrupted
            return given

        with lavender.patch(pipe, steps=number % 2 == 1) if patched == "each time" else lavender.patch(pipe) as lens:
            prompt = f"a red circle above {number % 4} blue rings"
            arguments = {"num_inference_steps": steps, "output_type": "latent", "callback_on_step_end": callback}
            if number % 3 < steps:
                with pytest.raises(Interrupted):
                    pipe(prompt, **arguments)
                with suppress(LavenderError):
                    assert lens.maps.text == prompt
            else:
                pipe(prompt, **arguments)
                assert lens.maps["circle"].values.max() > 0

    if patched == "once":
        handle = lavender.patch(pipe)
        soak(draw, cycles, pipe.unet, pipe.text_encoder, pipe.vae)
        assert handle.is_patched
        handle.unpatch()
    else:
        soak(draw, cycles, pipe.unet, pipe.text_encoder, pipe.vae)
    end = Footprint.of(pipe.unet, pipe.text_encoder, pipe.vae)
    assert (end.hooks, end.attributes) == (initial.hooks, initial.attributes)
    assert type(pipe) is unpatched


@pytest.mark.parametrize("cycles", [4, pytest.param(200, marks=pytest.mark.full)])
def test_patches_within_patches(student, pipe, training_batch, cycles):
    """Of a model and of a pipeline, at once; for training and to look; undone by the outer or the inner one, by hand or twice."""
    modules = (student, pipe.unet)
    student(**without_lavender(training_batch))  # transformers itself leaves hooks at the first one
    initial, unpatched = Footprint.of(*modules), type(pipe)
    config = AlignmentConfig(weight=10.0, aligner="sim")

    def cycle(number):
        outer, drawing = lavender.patch(student), lavender.patch(pipe)
        with lavender.patch(pipe) as inner_drawing, lavender.patch(student) as inner:
            assert (inner, inner_drawing) == (outer, drawing)
            with torch.no_grad():
                inner.capture(**training_batch)
            if number % 4 == 0:
                outer.unpatch()
            elif number % 4 == 1:
                drawing.unpatch()
        if number % 4 == 2:
            trained = lavender.patch(student, config)  # which undoes the first one
            assert not outer.is_patched
            with lavender.patch(student) as looking, torch.no_grad():
                looking.capture(**training_batch)
            student(**training_batch).loss.backward()
            student.zero_grad(set_to_none=True)
            assert trained.is_patched
            trained.unpatch()
        assert drawing.is_patched == (number % 4 != 1)
        for handle in (drawing, outer) if number % 2 else (outer, drawing, outer):
            handle.unpatch()
        assert not outer.is_patched
        assert type(pipe) is unpatched

    soak(cycle, cycles, *modules)
    end = Footprint.of(*modules)
    assert (end.hooks, end.attributes, end.functions) == (initial.hooks, initial.attributes, initial.functions)


def _values_of(lens: Any) -> bytes:
    return np.asarray(lens.look(PICTURES[0], answer="a red circle")["red"].values).tobytes()


def _look_and_end(lens: Any, channel: Any) -> None:
    torch.set_num_threads(1)
    channel.send_bytes(_values_of(lens))


@pytest.mark.parametrize("cycles", [3, pytest.param(25, marks=pytest.mark.full)])
def test_forked_processes(student, processor, samples, cycles):
    """Workers of a data loader with a collator, and a process that looks through its parent's patch, while that is in use."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads of OpenMP do not live on in a forked process
    try:
        with lavender.patch(student, processor=processor) as lens:
            expected = _values_of(lens)

            def cycle(number):
                loader = DataLoader(
                    samples[:4], batch_size=2, num_workers=2, collate_fn=Collator(processor), multiprocessing_context="fork"
                )
                assert sum(len(batch["input_ids"]) for batch in loader) == 4
                here, there = multiprocessing.Pipe()
                process = multiprocessing.get_context("fork").Process(target=_look_and_end, args=(lens, there))
                process.start()
                there.close()
                assert here.recv_bytes() == expected
                process.join()
                process.close()
                here.close()
                assert _values_of(lens) == expected

            soak(cycle, cycles, student)
    finally:
        torch.set_num_threads(before)


def _load_and_look(folder: Path, channel: Any) -> None:
    torch.set_num_threads(1)
    student, processor = load_student(folder)
    with lavender.patch(student.eval(), processor=processor) as lens:
        channel.send_bytes(_values_of(lens))


@pytest.mark.full
def test_spawned_processes(student_folder, samples):
    """They get a collator by pickle. transformers' models run in no process that got them so: they load and patch their own."""
    student, processor = load_student(student_folder)
    with lavender.patch(student.eval(), processor=processor) as lens:
        expected = np.frombuffer(_values_of(lens), np.float32)

        def cycle(number):
            loader = DataLoader(
                samples[:4], batch_size=2, num_workers=1, collate_fn=Collator(processor), multiprocessing_context="spawn"
            )
            assert sum(len(batch["input_ids"]) for batch in loader) == 4
            here, there = multiprocessing.Pipe()
            process = multiprocessing.get_context("spawn").Process(target=_load_and_look, args=(student_folder, there))
            process.start()
            there.close()
            np.testing.assert_allclose(np.frombuffer(here.recv_bytes(), np.float32), expected, atol=1e-6)
            process.join()
            process.close()
            here.close()

        cycle(0)
        before = Footprint.of(student)
        cycle(1)
        middle = Footprint.of(student)
        cycle(2)
        Footprint.of(student).require_like(middle, before, 2)
