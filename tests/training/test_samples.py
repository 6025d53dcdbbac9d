"""Samples that have no ids are known by their pictures before a run, too."""

from __future__ import annotations

import logging

import pytest
import torch
from PIL import Image

from lavender.config import TrainingConfig
from lavender.data.samples import Sample, as_conversation
from lavender.errors import TargetError
from lavender.images import image_sha256
from lavender.targets.manifest import StoreConfig
from lavender.targets.store import Target, TargetStore, TargetWriter
from lavender.training.train import _paths, _require_targets, fine_tune
from lavender.types import WordMaps
from lavender.words import words_of

RED, BLUE = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
ASKED = {"question": "Who?", "answer": "A zebra."}


def test_targets_of_samples_without_ids_are_looked_for_by_picture(tmp_path, caplog):
    words = words_of("A zebra.")
    with TargetWriter(tmp_path, {"model": "m"}, StoreConfig(map_size=8)) as writer:
        writer.add(Target("train#0", image_sha256(RED), WordMaps("A zebra.", words, torch.rand(len(words), 8, 8).numpy())))
        writer.close()
    store = TargetStore(tmp_path)
    red, blue = (as_conversation({"image": image, **ASKED}) for image in (RED, BLUE))
    with caplog.at_level(logging.WARNING, "lavender"):
        _require_targets([red, blue], store)
    assert "has no targets for 2 of 2 samples" in caplog.text
    assert "but for those without an id whose picture it has" in caplog.text
    for samples in ([blue], [Sample("x", RED, "Who?", "A zebra.")], [as_conversation({"image": "nowhere.png", **ASKED})]):
        with pytest.raises(TargetError, match="has no targets for 1 of 1 samples"):
            _require_targets(samples, store)


def test_pictures_at_urls_are_no_files_that_are_missing():
    sample = as_conversation({"image": "https://host/a.png", **ASKED})
    assert sample.id == "https://host/a.png"
    assert _paths(sample) == []


def test_a_run_takes_mappings(student_folder, tmp_path):
    sample = {"image": RED.resize((64, 64)), "question": "Describe the picture.", "answer": "A red ring."}
    fine_tune(student_folder, [sample], tmp_path, TrainingConfig(steps=1, batch_size=1), progress=False)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
