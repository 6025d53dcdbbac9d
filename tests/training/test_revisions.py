"""A run knows the commit of what it started from, and continues from that and no other."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from lavender.cli import app
from lavender.config import TrainingConfig
from lavender.doctor import examine
from lavender.errors import ModelError, TargetError
from lavender.training.train import fine_tune

from ..pretrained.hub import FIRST, SECOND


def record(out) -> dict:
    return json.loads((out / "run.json").read_text())


def train(model, samples, out, steps=1, **options):
    training = TrainingConfig(steps=steps, batch_size=2, save_steps=1)
    return fine_tune(model, samples, out, training, progress=False, **options)


def test_the_commit_of_student_and_adapter_is_recorded(hub, student_folder, samples, tmp_path):
    hub.put("org/student", student_folder, FIRST, "main", "v1")
    train("org/student@v1", samples[:4], tmp_path / "run")
    names = ("model", "model_commit", "adapter", "adapter_commit")
    assert [record(tmp_path / "run")[name] for name in names] == ["org/student", FIRST, None, None]
    hub.put("org/adapter", tmp_path / "run/adapter", SECOND, "main")
    train(student_folder, samples[:4], tmp_path / "more", adapter="org/adapter")
    assert [record(tmp_path / "more")[name] for name in names] == [str(student_folder), None, "org/adapter", SECOND]
    saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("org/student", FIRST)  # what AutoPeftModel loads
    findings = {finding.topic: finding.result for finding in examine("org/adapter")}
    assert findings["base model"] == f"org/student@{FIRST}, as follows"
    with pytest.raises(ModelError, match="cannot load a LoRA adapter from 'org/adapter@v7'"):
        train(student_folder, samples[:4], tmp_path / "other", adapter="org/adapter@v7")


def test_a_run_goes_on_from_its_own_commit_alone(hub, student_folder, samples, tmp_path):
    hub.put("org/student", student_folder, FIRST, "main")
    train("org/student", samples[:4], tmp_path / "run")
    hub.put("org/student", student_folder, SECOND, "main")  # somebody has pushed to the branch
    with pytest.raises(TargetError, match="another model_commit"):
        train("org/student", samples[:4], tmp_path / "run")
    train(f"org/student@{FIRST}", samples[:4], tmp_path / "run")


@pytest.mark.parametrize("finished", [True, False])
def test_runs_of_before_commits_were_recorded_go_on(student_folder, samples, tmp_path, finished):
    train(student_folder, samples[:4], tmp_path / "run")
    old = {name: value for name, value in record(tmp_path / "run").items() if not name.endswith("_commit")}
    (tmp_path / "run/run.json").write_text(json.dumps(old))
    if not finished:
        (tmp_path / "run/history.json").unlink()
        shutil.rmtree(tmp_path / "run/adapter")
    train(student_folder, samples[:4], tmp_path / "run")
    assert (tmp_path / "run/adapter").is_dir()


def test_the_command_line_takes_revisions(hub, student_folder, teacher_folder, samples, tmp_path):
    hub.put("org/student", student_folder, FIRST, "v1")
    hub.put("org/teacher", teacher_folder, SECOND, "v2")
    samples[0].image.save(tmp_path / "a.png")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"image": "a.png", "caption": samples[0].answer, "question": "What?", "answer": samples[0].answer}))

    def run(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    store, out = tmp_path / "store", tmp_path / "run"
    run("extract", "--model", "org/teacher@v2", "--data", data, "--out", store, "--inversion", "noise")
    assert f"model_commit {SECOND}" in run("targets", "info", store)
    run("train", "--model", "org/student@v1", "--data", data, "--targets", store, "--out", out, "--steps", 1, "--batch-size", 1)
    assert record(out)["model_commit"] == FIRST
    hub.put("org/adapter", out / "adapter", SECOND, "v3")
    more = ("--steps", 1, "--batch-size", 1, "--adapter", "org/adapter@v3")
    run("train", "--model", "org/student@v1", "--data", data, "--out", tmp_path / "more", *more)
    assert record(tmp_path / "more")["adapter_commit"] == SECOND
    figures = json.loads(run("evaluate", "--student", "org/student@v1", "--adapter", "org/adapter@v3", "--scenes", 2))
    assert figures.keys() >= {"attention", "answers"}
    assert "a student" in run("doctor", "org/student@v1")
    assert "of target stores" in run("doctor", "org/teacher@v2")
