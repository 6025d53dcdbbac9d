"""Threads that share a patched student get the maps of their own pictures, to the last bit."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lavender
from lavender.batches.collator import Collator
from lavender.config import AlignmentConfig
from lavender.testing.student import noise_image

from ..conftest import without_lavender
from .zoo import WORDS, built

NUM_THREADS = 3
ROUNDS = 8


@pytest.fixture(autouse=True)
def one_core_each():
    """Products are the same bits however many threads run, and switches come often."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_threads(work):
    """What `work(n, round)` gives in as many threads as there are n, all at once."""
    start = threading.Barrier(NUM_THREADS)

    def run(n):
        start.wait()
        return [work(n, r) for r in range(ROUNDS)]

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return [future.result() for future in [pool.submit(run, n) for n in range(NUM_THREADS)]]


def test_captures_of_several_threads_do_not_mix(student, processor, samples):
    """Captures, plain forwards and forwards with lavender's keys, of batches of different sizes and words, at once."""
    batches = [Collator(processor)(samples[3 * n : 3 * n + 1 + n]) for n in range(NUM_THREADS)]
    plain = [without_lavender(batch) for batch in batches]
    with torch.no_grad(), lavender.patch(student) as patch:
        maps = [patch.capture(**batch) for batch in batches]
        reads = [patch.capture("reads", **batch) for batch in batches]
        logits = [student(**inputs).logits for inputs in plain]

        @torch.no_grad()
        def work(n, r):
            if (n + r) % 3 == 0:
                return torch.equal(patch.capture(**batches[n]), maps[n])
            if (n + r) % 3 == 1:
                return torch.equal(patch.capture("reads", **batches[n]), reads[n])
            return torch.equal(student(**(plain if r % 2 else batches)[n]).logits, logits[n])

        results = in_threads(work)
    assert results == [[True] * ROUNDS] * NUM_THREADS


def test_losses_of_several_threads_do_not_mix(student, processor, samples, training_batch):
    """Forwards with targets, beside the plain forwards of others."""
    with torch.no_grad(), lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")):
        loss, plain = student(**training_batch).loss, student(**without_lavender(training_batch)).loss
        assert loss != plain

        @torch.no_grad()
        def work(n, r):
            batch = training_batch if n == 0 else without_lavender(training_batch)
            return torch.equal(student(**batch).loss, loss if n == 0 else plain)

        results = in_threads(work)
    assert results == [[True] * ROUNDS] * NUM_THREADS


@pytest.mark.parametrize("name", ["qwen2_vl", "idefics2"])
def test_visitors_of_one_lens_see_their_own_pictures(name):
    """Qwen2-VL keeps a prompt's positions on the model from one decoding step to the next; resamplers record on their own."""
    student = built(name).copy()
    images = [noise_image(60 + 12 * n, 90 - 12 * n, seed=n) for n in range(NUM_THREADS)]
    prompt = f"{student.placeholder} what is this ?"
    vocabulary = student.processor.tokenizer.get_vocab()
    others = sorted({*range(student.model.config.get_text_config().vocab_size)} - {vocabulary[word] for word in WORDS[:20]})
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": others}

    def look(lens, n):
        return lens.look(images[n], prompt=prompt, answer="a red cat" if n == 2 else None, **options)

    def equal(one, other):
        return one.text == other.text and all(
            torch.equal(one.heat_map_of(n).values, other.heat_map_of(n).values) for n in range(len(other.words))
        )

    with lavender.patch(student.model, processor=student.processor) as lens:
        expected = [look(lens, n) for n in range(NUM_THREADS)]

        def work(n, r):
            maps = look(lens, n)
            return equal(maps, expected[n]) and lens.maps is maps

        results = in_threads(work)
        assert lens.maps is expected[-1]
    assert results == [[True] * ROUNDS] * NUM_THREADS


def test_a_copy_of_a_patched_model_waits_for_nobody(student, batch):
    """Locks and running forwards stay behind."""
    with torch.no_grad(), lavender.patch(student) as patch, patch._queue:
        twin = copy.deepcopy(student)
        with ThreadPoolExecutor(1) as pool:
            maps = pool.submit(torch.no_grad()(lambda: twin._lavender_patch.capture(**batch))).result(timeout=60)
        assert torch.equal(maps, patch.capture(**batch))
        twin._lavender_patch.unpatch()


def test_a_part_of_the_model_in_another_thread_is_left_alone(student, processor, samples):
    """An embedding service calls the text tower's own model, around the patched one, on a text of the same length."""
    batches = [Collator(processor)([sample]) for sample in samples[:NUM_THREADS]]
    plain = without_lavender(batches[1])
    inner = {name: plain[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad(), lavender.patch(student) as patch:
        maps, hidden = patch.capture(**batches[0]), student.model(**inner).last_hidden_state

        @torch.no_grad()
        def work(n, r):
            if n == 0:
                return torch.equal(patch.capture(**batches[0]), maps)
            return torch.equal(student.model(**inner).last_hidden_state, hidden)

        results = in_threads(work)
    assert results == [[True] * ROUNDS] * NUM_THREADS


def test_threads_that_patch_one_model_share_the_patch(student, batch):
    with torch.no_grad():
        with lavender.patch(student) as patch:
            maps = patch.capture(**batch)
        results = in_threads(lambda n, r: torch.equal(torch.no_grad()(lavender.patch(student).capture)(**batch), maps))
    assert results == [[True] * ROUNDS] * NUM_THREADS
    lavender.patch(student).unpatch()
