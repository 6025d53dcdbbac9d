from __future__ import annotations

import os
from dataclasses import replace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: each computes on its own
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton: kernels that are asked for by name then run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from lavender.batches.collator import Collator
from lavender.data.samples import Sample
from lavender.miniworld.scenes import DESCRIBE, Scene, make_scenes
from lavender.types import WordBatch


@pytest.fixture(scope="session")
def scenes() -> list[Scene]:
    return list(make_scenes(seed=11, count=64))


@pytest.fixture(scope="session")
def processor(scenes):
    from recipes.student import make_processor

    return make_processor(scenes)


@pytest.fixture
def student(processor):
    """A small Llava with random weights, in training mode off."""
    from recipes.student import make_model

    torch.manual_seed(0)
    return make_model(processor).eval()


@pytest.fixture(scope="session")
def student_folder(processor, tmp_path_factory):
    from recipes.student import make_model

    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(0)
    make_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_folder(scenes, tmp_path_factory):
    """A Stable-Diffusion-like pipeline with random weights, as a diffusers folder."""
    from recipes.teacher import make_pipeline, train_tokenizer

    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    make_pipeline(train_tokenizer([s.caption for s in scenes])).save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub, which cannot be reached."""
    from huggingface_hub import constants

    from .pretrained.hub import Hub

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return Hub(tmp_path / "hub")


@pytest.fixture
def pipe(teacher_folder):
    from lavender.teachers.model import load_pipeline

    loaded = load_pipeline(teacher_folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def samples(scenes):
    return [Sample(str(i), s.image, DESCRIBE, s.caption) for i, s in enumerate(scenes)]


@pytest.fixture
def batch(processor, samples):
    """Four captions of different lengths, padded, with lavender's keys."""
    return Collator(processor)(samples[:4])


@pytest.fixture
def training_batch(batch):
    torch.manual_seed(1)
    return with_targets(batch, 32)


def words_of_batch(batch) -> WordBatch:
    """What lavender's keys in a batch hold."""
    words = WordBatch.split(batch)[1]
    assert words is not None
    return words


def without_lavender(batch):
    """A batch without lavender's keys."""
    return WordBatch.split(batch)[0]


def with_targets(batch, size):
    """A batch with random targets of `size` by `size`."""
    present = words_of_batch(batch).present
    return changed(batch, targets=torch.rand(*present.shape, size, size))


def changed(batch, **fields):
    """A batch whose `WordBatch` has other values in some fields; None takes a key away."""
    inputs, words = WordBatch.split(batch)
    return {**inputs, **replace(words, **fields).to_batch()}
