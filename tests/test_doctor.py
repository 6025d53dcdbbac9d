"""`lavender doctor` says what it finds, and what is missing."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from lavender.cli import app
from lavender.doctor import examine
from lavender.errors import ModelError
from lavender.families import STUDENTS

from .families.teacher_zoo import PIPELINES
from .families.test_contract import NAMES, built


def found(model) -> dict[str, str]:
    return {finding.topic: finding.found for finding in examine(model)}


def remedies(model) -> dict[str, str]:
    return {finding.topic: finding.remedy for finding in examine(model) if finding.remedy}


def test_a_students_folder(student_folder):
    report = found(student_folder)
    assert report["model"] == "LlavaForConditionalGeneration (model type llava), a student"
    assert report["text tower"] == "LlamaModel at model.language_model"
    assert report["attention layers"].startswith("4 (4 x LlamaAttention)")
    assert report["base attention"].startswith("sdpa")
    assert report["grid rule"].startswith("square")
    assert report["processor"] == "LlavaProcessor"
    assert "heads of 32 in float32" in report["kernels"]
    assert not remedies(student_folder)


def test_a_teachers_folder(teacher_folder):
    report = found(teacher_folder)
    assert report["model"].startswith("StableDiffusionPipeline with UNet2DConditionModel")
    assert report["layout"] == "cross-attention to text alone"
    assert report["attention layers"].startswith("7, ")
    assert report["words"] == "tokenizer"


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_healthy(name):
    student = built(name)
    report = found(student.model)
    assert "attention layers" in report
    if name not in ("flamingo",):
        assert "unknown" not in report["grid rule"]
    assert not remedies(student.model)


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline", "StableDiffusionXLPipeline"])
def test_pipelines(name, tmp_path):
    pipe = PIPELINES[name]()
    pipe.save_pretrained(tmp_path)
    assert found(pipe) == found(tmp_path)
    order = {"FluxPipeline": "text first", "StableDiffusion3Pipeline": "image first"}.get(name, "cross-attention")
    assert order in found(pipe)["layout"]


def test_what_is_missing_has_a_remedy(student, student_folder, tmp_path):
    registered = STUDENTS.pop("llava")
    try:
        assert "register_family" in remedies(student)["grid rule"]
    finally:
        STUDENTS["llava"] = registered
    student.model.language_model.config._attn_implementation = "paged|eager"
    assert "set_attn_implementation('sdpa')" in remedies(student)["base attention"]
    with pytest.raises(ModelError, match="give a folder"):
        examine(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableAudioPipeline"}))
    with pytest.raises(ModelError, match="StableAudioPipeline"):
        examine(tmp_path)
    with pytest.raises(ModelError, match="cannot patch a object"):
        examine(object())
    assert "attention" in remedies(torch.nn.Linear(2, 2))


def test_the_command_prints_and_exits_by_what_is_missing(student_folder, tmp_path):
    result = CliRunner().invoke(app, ["doctor", str(student_folder)])
    assert result.exit_code == 0
    assert "grid rule" in result.output
    config = json.loads((student_folder / "config.json").read_text())
    assert config["model_type"] == "llava"
    registered = STUDENTS.pop("llava")
    try:
        result = CliRunner().invoke(app, ["doctor", str(student_folder)])
        assert result.exit_code == 1
        assert "->" in result.output
    finally:
        STUDENTS["llava"] = registered


def test_damaged_folders_are_one_clear_line(teacher_folder, tmp_path):
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(teacher_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match=r"model_index\.json .* cannot be read"):
        examine(folder)
    for wrong in ([], {}, {**index, "_class_name": ["A"]}, {**index, "unet": None}, {**index, "unet": ["mine", "OwnUNet"]}):
        (folder / "model_index.json").write_text(json.dumps(wrong))
        with pytest.raises(ModelError, match="expected a text-to-image pipeline"):
            examine(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "unet")
    with pytest.raises(ModelError, match=r"the unet of .* cannot be built"):
        examine(folder)


def test_attention_slicing_is_seen_before_anything_runs():
    pipe = PIPELINES["StableDiffusionPipeline"]()
    assert not remedies(pipe)
    pipe.enable_attention_slicing()
    assert "disable_attention_slicing" in remedies(pipe)["attention processors"]
    pipe.disable_attention_slicing()
    assert not remedies(pipe)


def test_a_language_model_is_no_student():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    assert "image-text-to-text" in remedies(LlamaForCausalLM(config))["picture"]
