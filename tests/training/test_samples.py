"""Samples that have no ids are known by their pictures before a run, too."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from lavender.config import TrainingConfig
from lavender.data.regions import Region
from lavender.data.samples import Conversation, Message, Sample, as_conversation
from lavender.errors import DataError, ModelError, TargetError
from lavender.images import image_sha256
from lavender.students.patch import ALIGNER_FILE
from lavender.targets.manifest import StoreConfig
from lavender.targets.store import Target, TargetStore, TargetWriter
from lavender.training.train import _paths, _require_targets, fine_tune, load_student
from lavender.types import WordMaps
from lavender.words import words_of

RED, BLUE = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
ASKED = {"question": "Who?", "answer": "A zebra."}


def test_targets_of_samples_that_the_store_does_not_name_are_looked_for_by_picture(tmp_path, caplog):
    words = words_of("A zebra.")
    with TargetWriter(tmp_path, {"model": "m"}, StoreConfig(map_size=8)) as writer:
        writer.add(Target("train#0", image_sha256(RED), WordMaps("A zebra.", words, torch.rand(len(words), 8, 8).numpy())))
        writer.close()
    store = TargetStore(tmp_path)
    red, blue = (as_conversation({"image": image, **ASKED}) for image in (RED, BLUE))
    for known in (red, Sample("x", RED, "Who?", "A zebra.")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lavender"):
            _require_targets([known, blue], store)
        assert "has no targets for 2 of 2 samples" in caplog.text
        assert "by their ids" in caplog.text
        assert "but for those whose picture it has, and for regions" in caplog.text
    placed = Sample("x", BLUE, "Who?", "A zebra.", regions=(Region(1, box=(0, 0, 0.5, 0.5)),))
    _require_targets([placed, blue], store)
    with pytest.raises(TargetError, match=r"2 of 2 samples by their ids .* or pictures; extract"):
        _require_targets([blue, replace(placed, regions=(Region(1, word="zebra"),))], store)
    for samples in ([blue], [Sample("x", BLUE, "Who?", "A zebra.")], [as_conversation({"image": "nowhere.png", **ASKED})]):
        with pytest.raises(TargetError, match="has no targets for 1 of 1 samples"):
            _require_targets(samples, store)


def test_pictures_at_urls_are_no_files_that_are_missing():
    sample = as_conversation({"image": "https://host/a.png", **ASKED})
    assert sample.id == "https://host/a.png"
    assert _paths(sample) == []


def test_a_run_takes_regions_as_the_collator_does(student_folder, tmp_path, caplog):
    """As mappings in samples and conversations, or None; one that is no place costs its sample alone."""
    red, blue = (image.resize((64, 64)) for image in (RED, BLUE))
    words = words_of("A zebra.")
    with TargetWriter(tmp_path / "t", {"model": "m"}, StoreConfig(map_size=8)) as writer:
        writer.add(Target("other", image_sha256(blue), WordMaps("A zebra.", words, torch.rand(len(words), 8, 8).numpy())))
        writer.close()
    talk = (Message("user", "Who?"), Message("assistant", "Me."))
    place = {"turn": -1, "box": (0, 0, 0.5, 0.5)}
    digests = []
    for regions in ([place], (Region(**place),)):
        samples = [
            Sample("a", red, "Who?", "Me.", regions=regions),
            Conversation("b", (red,), talk, regions=regions),
            Sample("c", red, "Who?", "Me.", regions=None),
            Sample("d", red, "Who?", "Me.", regions=[{**place, "box": (0, 0, 0, 0)}]),
        ]
        out, config = tmp_path / f"run{len(digests)}", TrainingConfig(steps=1, batch_size=4)
        fine_tune(student_folder, samples, out, config, targets=TargetStore(tmp_path / "t"), progress=False)
        digests.append(json.loads((out / "run.json").read_text())["samples_sha256"])
        (step,) = [entry for entry in json.loads((out / "history.json").read_text()) if "matched_words" in entry]
        assert step["matched_words"] == 2
        assert step["samples_skipped"] == step["samples_no_target"] == 1
    assert digests[0] == digests[1]
    assert "sample 'd', region 1: its boxes are" in caplog.text


def test_a_run_takes_mappings(student_folder, tmp_path):
    sample = {"image": RED.resize((64, 64)), "question": "Describe the picture.", "answer": "A red ring."}
    fine_tune(student_folder, [sample], tmp_path, TrainingConfig(steps=1, batch_size=1), progress=False)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_modules_that_an_adapter_saves_are_kept_trained_and_saved(student_folder, samples, tmp_path):
    """Beside LoRA, PEFT saves whole modules that its config names."""
    student, _ = load_student(student_folder)
    before = student.lm_head.weight.detach().clone()
    wrapped = get_peft_model(student, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        wrapped.base_model.model.lm_head.modules_to_save["default"].weight.add_(1.0)
    wrapped.save_pretrained(tmp_path / "start")
    training = TrainingConfig(steps=1, batch_size=2, warmup_steps=0)
    fine_tune(student_folder, samples[:2], tmp_path / "run", training, adapter=tmp_path / "start", progress=False)
    saved = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    head = next(value for name, value in saved.items() if name.endswith("lm_head.weight"))
    torch.testing.assert_close(head - before, torch.ones_like(head), rtol=0, atol=0.01)
    assert not torch.equal(head, before + 1.0)
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]
    path = tmp_path / "start/adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if not name.endswith("lm_head.weight")}, path)
    with pytest.raises(ModelError, match=r"lm_head|damaged"):
        fine_tune(student_folder, samples[:2], tmp_path / "other", training, adapter=tmp_path / "start", progress=False)


@pytest.mark.parametrize("name", ["checkpoints", "adapter/adapter_model.safetensors", "lavender_aligner"])
def test_a_run_writes_through_no_link_in_its_folder(student_folder, tmp_path, name):
    """Links that came with the folder would lead what a run saves elsewhere."""
    mine, out = tmp_path / "mine", tmp_path / "run"
    mine.mkdir()
    (mine / "a").write_text("mine")
    path = out / (ALIGNER_FILE if name == "lavender_aligner" else name)
    path.parent.mkdir(parents=True)
    path.symlink_to(mine if name == "checkpoints" else mine / "a")
    sample = {"image": RED.resize((64, 64)), "question": "Describe the picture.", "answer": "A red ring."}
    with pytest.raises(DataError, match=rf"{path} is a link to {mine}"):
        fine_tune(student_folder, [sample], out, TrainingConfig(steps=1, batch_size=1), progress=False)
    path.unlink()
    for written in ("run.json", "history.json.partial"):
        (out / written).symlink_to(mine / "a")
    fine_tune(student_folder, [sample], out, TrainingConfig(steps=1, batch_size=1), progress=False)
    assert {entry.name: entry.read_text() for entry in mine.iterdir()} == {"a": "mine"}
    assert not any(entry.is_symlink() for entry in out.iterdir())
