"""A teacher that is loaded by its name is whole and sound, or is refused by the names of its weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from lavender.config import TeacherConfig
from lavender.data.samples import read_pairs
from lavender.errors import ModelError, TargetError
from lavender.extraction.extract import extract
from lavender.miniworld import write_dataset
from lavender.targets.store import TargetStore
from lavender.teachers.loading import empty_pipeline, load_pipeline
from lavender.teachers.model import Teacher

from ..pretrained.hub import FIRST, SECOND
from .pipeline_zoo import MORE_TEACHERS, PIPELINES

NOISE = TeacherConfig(inversion="noise", timesteps=(51, 301), map_size=16)
FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def refusal(load, *arguments) -> str:
    with pytest.raises(ModelError) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(teacher_folder, tmp_path):
    return shutil.copytree(teacher_folder, tmp_path / "teacher")


def change(folder, part, changed) -> str:
    """Changes the last of a part's weights, or takes it away; returns its name in the file."""
    path = folder / part / FILES[part]
    weights = load_file(path)
    name = sorted(weights)[-1]
    value = changed(weights.pop(name))
    save_file(weights if value is None else weights | {name: value}, path, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("part", FILES)
def test_missing_misshapen_and_non_finite_weights_are_named(folder, part):
    originals = shutil.copytree(folder / part, folder / "original")
    for changed, said in (
        (lambda value: None, "which would be random"),
        (lambda value: torch.zeros(3, 5, 2), "[3, 5, 2] in the file"),
        (lambda value: value * float("nan"), "hold NaN or infinity"),
        (lambda value: (value * 100).to(torch.int8), "are integers in the file"),
    ):
        name = change(folder, part, changed)
        message = refusal(Teacher, folder, NOISE)
        assert said in message
        assert f"the {part} of {str(folder)!r}" in message
        assert name in message
        shutil.copytree(originals, folder / part, dirs_exist_ok=True)
    Teacher(folder, NOISE).close()


def test_a_pipeline_that_was_loaded_before_is_looked_at_too(pipe):
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] = float("nan")
    assert "the unet of this StableDiffusionPipeline hold NaN or infinity (conv_in.weight)" in refusal(Teacher, pipe, NOISE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_pipeline_is_what_diffusers_loads(teacher_folder, dtype):
    ours = load_pipeline(teacher_folder, TeacherConfig(dtype=dtype))
    theirs = DiffusionPipeline.from_pretrained(teacher_folder, torch_dtype=getattr(torch, dtype))
    assert ours.components.keys() == theirs.components.keys()
    for name, part in theirs.components.items():
        assert type(ours.components[name]) is type(part)
        if isinstance(part, torch.nn.Module):
            for (key, value), (other_key, other) in zip(
                ours.components[name].state_dict().items(), part.state_dict().items(), strict=True
            ):
                assert key == other_key
                assert torch.equal(value, other)
                assert value.dtype == other.dtype
        elif hasattr(part, "config"):
            assert ours.components[name].config == part.config


def test_a_pipeline_that_cannot_be_a_teacher_is_refused_before_its_weights_are_read(tmp_path):
    PIPELINES["StableDiffusionPAGPipeline"]().save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    assert "a StableDiffusionPAGPipeline cannot be a teacher" in refusal(load_pipeline, tmp_path)


def test_a_part_that_no_library_has_is_named(folder):
    """Kolors as it was published: an index that says StableDiffusionXLPipeline, and a text encoder in code of its own."""
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": ["modeling_chatglm", "ChatGLMModel"]}))
    for load in (load_pipeline, empty_pipeline):
        assert "its text_encoder is a ChatGLMModel of modeling_chatglm" in refusal(load, folder)


@pytest.mark.parametrize("name", {**PIPELINES, **MORE_TEACHERS})
def test_an_empty_pipeline_has_the_parts_of_the_whole_one(name, tmp_path):
    pipe = {**PIPELINES, **MORE_TEACHERS}[name]()
    pipe.save_pretrained(tmp_path)
    empty = empty_pipeline(tmp_path)
    assert type(empty) is type(pipe)
    for part, whole in pipe.components.items():
        if isinstance(whole, torch.nn.Module):
            shapes = {key: value.shape for key, value in whole.state_dict().items()}
            assert {key: value.shape for key, value in empty.components[part].state_dict().items()} == shapes
            assert all(parameter.is_meta for parameter in empty.components[part].parameters())


def test_a_revision_is_loaded_and_its_commit_is_in_the_manifest(hub, folder, scenes, tmp_path):
    hub.put("org/teacher", folder, FIRST, "v1")
    change(folder, "unet", lambda value: value + 1)
    hub.put("org/teacher", folder, SECOND, "main")
    pairs = read_pairs(write_dataset(scenes[:2], tmp_path / "data"))
    for model, out, commit in (("org/teacher@v1", "a", FIRST), ("org/teacher", "b", SECOND)):
        assert extract(model, pairs, tmp_path / out, NOISE, progress=False).written == 2
        source = TargetStore(tmp_path / out).source
        assert (source["model"], source["model_commit"]) == ("org/teacher", commit)
    assert TargetStore(tmp_path / "a").source["weights"] != TargetStore(tmp_path / "b").source["weights"]
    assert "cannot load a text-to-image pipeline from 'org/teacher@v9'" in refusal(Teacher, "org/teacher@v9", NOISE)
    with pytest.raises(TargetError, match="other weights"):
        extract("org/teacher@v1", pairs, tmp_path / "b", NOISE, progress=False)
    # A commit is a name, which decides nothing about maps: a store that was begun without goes on, and is the same to a run.
    fingerprint = TargetStore(tmp_path / "b").fingerprint
    manifest = json.loads((tmp_path / "b/manifest.json").read_text())
    del manifest["source"]["model_commit"]
    (tmp_path / "b/manifest.json").write_text(json.dumps(manifest))
    assert extract(f"org/teacher@{SECOND}", pairs, tmp_path / "b", NOISE, progress=False).present == 2
    assert extract("org/teacher", pairs, tmp_path / "c", NOISE, progress=False).written == 2
    assert TargetStore(tmp_path / "c").fingerprint == fingerprint
