"""A model's name, its revision and its commit; a model's own code, which never runs."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from typer.testing import CliRunner

from lavender.cli import app
from lavender.doctor import examine
from lavender.errors import ModelError
from lavender.pretrained.names import find_file, loading, locate_model, pin, split_revision
from lavender.students.loading import load_student
from lavender.teachers.loading import load_pipeline

from .hub import FIRST, SECOND


def test_a_name_and_its_revision(tmp_path):
    folder = tmp_path / "a@b"
    folder.mkdir()
    assert split_revision("org/name@v1.0") == ("org/name", "v1.0")
    assert split_revision("org/name") == ("org/name", None)
    assert split_revision(folder) == (str(folder), None)
    assert split_revision(f"{folder}/nowhere@c") == (f"{folder}/nowhere", "c")
    with pytest.raises(ModelError, match="lies on this machine, where it has no revision 'main'; leave out '@main'"):
        split_revision(f"{folder}@main")
    for wrong in ("org/name@", "@main"):
        with pytest.raises(ModelError, match="expected NAME@REVISION"):
            split_revision(wrong)


def test_a_revision_is_located_by_its_commit(hub, student_folder, tmp_path):
    hub.put("org/student", student_folder, FIRST, "v1")
    hub.put("org/student", student_folder, SECOND, "main", "v2")
    for name, commit in (
        ("org/student", SECOND),
        ("org/student@main", SECOND),
        ("org/student@v1", FIRST),
        (f"org/student@{FIRST}", FIRST),
    ):
        assert locate_model(name, "config.json") == ("org/student", commit)
        assert pin(name, "adapter_config.json", "config.json") == f"org/student@{commit}"
    assert find_file("org/student@v1", "config.json").parent.name == FIRST
    assert find_file("org/student", "adapter_config.json") is None
    for name in ("org/student@v3", f"org/student@{'3' * 40}", "org/other"):
        with pytest.raises(LocalEntryNotFoundError):
            locate_model(name, "config.json")
    assert locate_model(student_folder, "config.json") == (str(student_folder), None)
    assert pin(student_folder, "config.json") == str(student_folder)


OWN_CODE = """
from pathlib import Path
Path(r"{ran}").write_text(__name__)
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
class OwnConfig(LlavaConfig): model_type = "own"
class OwnModel(LlavaForConditionalGeneration): config_class = OwnConfig
class OwnProcessor(LlavaProcessor): pass
class OwnImageProcessor(CLIPImageProcessor): pass
"""


def _changed(path: Path, **values) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in (known | values).items() if value is not None}))


def _own_model(folder: Path) -> None:
    _changed(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})


def _own_class(folder: Path) -> None:
    """The config is known, but no image-text-to-text model has it."""
    config = {"model_type": "siglip_vision_model", "auto_map": {"AutoModelForImageTextToText": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))


def _own_processor(folder: Path) -> None:
    _changed(folder / "processor_config.json", processor_class="OwnProcessor", auto_map={"AutoProcessor": "own.OwnProcessor"})


def _own_image_processor(folder: Path) -> None:
    image = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    own = {"image_processor_type": "OwnImageProcessor", "auto_map": {"AutoImageProcessor": "own.OwnImageProcessor"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(image | own))
    _changed(folder / "processor_config.json", image_processor=None)


def _own_image_processor_without_a_class(folder: Path) -> None:
    """transformers takes the processor's class by the config, and forgets trust_remote_code on the way to its parts."""
    _own_image_processor(folder)
    for name in ("processor_config.json", "tokenizer_config.json"):
        _changed(folder / name, processor_class=None)


STUDENTS = [_own_model, _own_class, _own_processor, _own_image_processor, _own_image_processor_without_a_class]


@pytest.mark.parametrize("change", STUDENTS, ids=lambda change: change.__name__)
def test_a_students_own_code_never_runs(change, student_folder, tmp_path, monkeypatch):
    """Whatever lies on standard input."""
    folder, ran = tmp_path / "student", tmp_path / "ran"
    shutil.copytree(student_folder, folder)
    (folder / "own.py").write_text(OWN_CODE.format(ran=ran))
    change(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    with pytest.raises(ModelError, match="needs code of its own, which lavender does not run"):
        load_student(folder)
    result = CliRunner().invoke(app, ["doctor", str(folder)], input="y\n" * 99)
    assert "[y/N]" not in result.output
    assert result.exit_code == 1
    assert not ran.exists()


def _own_pipeline(index: dict) -> None:
    index["_class_name"] = ["own", "OwnPipeline"]


def _own_part(index: dict) -> None:
    index["text_encoder"] = ["own", "OwnModel"]


@pytest.mark.parametrize("change", [_own_pipeline, _own_part], ids=lambda change: change.__name__)
def test_a_pipelines_own_code_never_runs(change, teacher_folder, tmp_path, monkeypatch):
    folder, ran = tmp_path / "teacher", tmp_path / "ran"
    shutil.copytree(teacher_folder, folder)
    for place in (folder, folder / "text_encoder"):
        (place / "own.py").write_text(OWN_CODE.format(ran=ran))
    index = json.loads((folder / "model_index.json").read_text())
    change(index)
    (folder / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    with pytest.raises(ModelError, match="own"):
        load_pipeline(folder)
    result = CliRunner().invoke(app, ["doctor", str(folder)], input="y\n" * 99)
    assert "[y/N]" not in result.output
    assert result.exit_code != 0
    assert not ran.exists()


def test_what_a_library_raises_is_one_line():
    said = r"^cannot load a thing from 'x', which is nothing on this machine \(one: two\); give y$"
    with pytest.raises(ModelError, match=said), loading("a thing", "x", "give y"):
        raise RuntimeError("\none:\n  two\nthree")
    with pytest.raises(KeyboardInterrupt), loading("a thing", "x", "give y"):
        raise KeyboardInterrupt


def test_what_lies_at_a_path_is_named(student_folder, teacher_folder, tmp_path):
    """By the doctor, and by whatever loads a model."""
    (tmp_path / "file").touch()
    for folder in ("empty", "run/adapter", "unfinished", "checkpoints/checkpoint-10", "store", "weights", "other"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("run/run.json", "unfinished/run.json", "store/manifest.json", "weights/model.safetensors", "other/notes.txt"):
        (tmp_path / file).touch()
    for name, said in {
        "file": "it is a file; give the folder that it lies in",
        "empty": "it is empty",
        "run": f"it is a run's folder; give the run's result, {tmp_path / 'run/adapter'}",
        "unfinished": "it is the folder of a run that is not finished",
        "checkpoints": f"it holds checkpoints; give one of them, such as {tmp_path / 'checkpoints/checkpoint-10'}",
        "store": "it is no model but a target store",
        "weights": "it has weights, model.safetensors, and no config.json",
        "other": r"it has no config.json, model_index.json or adapter_config.json",
    }.items():
        for load in (examine, load_student, load_pipeline):
            with pytest.raises(ModelError) as caught:
                load(tmp_path / name)
            assert said in str(caught.value)
            assert "\n" not in str(caught.value)
