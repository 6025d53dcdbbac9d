"""The command as a user runs it: help that reads well, and one clear line with exit code 2 for every mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lavender.cli import main
from lavender.miniworld import write_dataset


@pytest.fixture
def lavender(monkeypatch, capsys):
    """Runs the command in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lavender", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        output = capsys.readouterr()
        return SimpleNamespace(returncode=end.value.code or 0, stdout=output.out, stderr=output.err)

    return run


@pytest.fixture
def refused(lavender):
    """Runs a command that must fail as a user's mistake does; returns its one line."""

    def run(*arguments):
        result = lavender(*arguments)
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr
        lines = [line for line in result.stderr.splitlines() if line.startswith("lavender: ")]
        assert len(lines) == 1, result.stderr
        return lines[0]

    return run


@pytest.mark.parametrize("command", [None, "demo", "extract", "train", "evaluate", "report"])
def test_help(command, lavender):
    result = lavender(*filter(None, [command]), "--help")
    assert result.returncode == 0
    assert "Usage: " in result.stdout
    if command is None:
        assert all(name in result.stdout for name in ("demo", "extract", "train", "evaluate", "report"))


def test_in_a_process_of_its_own(teacher_folder, data, tmp_path):
    """A run and a mistake, from the exit code to the streams."""
    command = (sys.executable, "-m", "lavender", "extract", "--model", str(teacher_folder), "--out", str(tmp_path / "t"))
    options = ("--inversion", "noise", "--timesteps", "51", "--map-size", "8")
    result = subprocess.run([*command, "--data", str(data), *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "3 written, 0 there before, 0 skipped" in result.stdout
    result = subprocess.run([*command, "--data", str(tmp_path / "nothing"), *options], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("lavender: there is no data at ")
    assert "Traceback" not in result.stderr


def test_an_unknown_option_is_a_users_mistake(lavender):
    assert lavender("extract", "--modle", "x").returncode == 2


@pytest.fixture
def data(scenes, tmp_path):
    return write_dataset(scenes[:3], tmp_path / "data")


def test_extract_then_train_then_evaluate(lavender, refused, teacher_folder, student_folder, data, tmp_path):
    options = ("--inversion", "noise", "--timesteps", "51", "--map-size", "8")
    result = lavender("extract", "--model", teacher_folder, "--data", data, "--out", tmp_path / "t", *options)
    assert result.returncode == 0, result.stderr
    assert "3 written, 0 there before, 0 skipped" in result.stdout
    train = ("train", "--model", student_folder, "--data", data, "--targets", tmp_path / "t", "--steps", 2, "--batch-size", 2)
    result = lavender(*train, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    result = lavender(
        "evaluate", "--student", student_folder, "--adapter", tmp_path / "run/adapter", "--scenes", 3, "--out", tmp_path / "e.json"
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "e.json").read_text())["answers"]["all"]["questions"] > 9
    # Stale: the store now belongs to another teacher config, and the run to other targets.
    assert "timesteps: [51] there, [151] now" in refused(
        "extract", "--model", teacher_folder, "--data", data, "--out", tmp_path / "t", "--inversion", "noise", "--timesteps", "151",
        "--map-size", "8",
    )  # fmt: skip
    assert "another training" in refused(*train[:-4], "--steps", 3, "--out", tmp_path / "run")


def test_mistakes_with_paths(refused, teacher_folder, student_folder, data, tmp_path):
    missing = tmp_path / "nothing"
    assert f"no data at {missing}" in refused("extract", "--model", teacher_folder, "--data", missing, "--out", tmp_path / "t")
    assert "cannot load a text-to-image pipeline" in refused("extract", "--model", missing, "--data", data, "--out", tmp_path / "t")
    assert "cannot load a text-to-image pipeline" in refused(
        "extract", "--model", student_folder, "--data", data, "--out", tmp_path / "t"
    )
    assert "image-text-to-text" in refused("train", "--model", teacher_folder, "--data", data, "--out", tmp_path / "r")
    assert "no target store" in refused(
        "train", "--model", student_folder, "--data", data, "--targets", missing, "--out", tmp_path / "r"
    )
    assert "no LoRA adapter" in refused("evaluate", "--student", student_folder, "--adapter", missing)
    assert "results.json" in refused("report", missing)
    assert not (tmp_path / "r").exists()
    file = tmp_path / "file"
    file.write_text("mine")
    for command in (
        ("extract", "--model", teacher_folder, "--data", data, "--out", file, "--inversion", "noise"),
        ("extract", "--model", teacher_folder, "--data", data, "--out", file / "below", "--inversion", "noise"),
        ("train", "--model", student_folder, "--data", data, "--out", file),
        ("demo", "--out", file),
        ("evaluate", "--student", student_folder, "--scenes", 1, "--out", missing / "e.json"),
    ):
        refused(*command)
    assert file.read_text() == "mine"


def test_mistakes_with_data(lavender, refused, teacher_folder, student_folder, data, tmp_path, caplog):
    empty = tmp_path / "data/empty.jsonl"
    empty.write_text('{"image": "images/00000.png", "caption": ""}')
    result = lavender("extract", "--model", teacher_folder, "--data", empty, "--out", tmp_path / "t", "--inversion", "noise")
    assert result.returncode == 1
    assert "1 skipped" in result.stdout
    assert "has no words" in result.stdout
    assert "holds no targets" in refused(
        "train", "--model", student_folder, "--data", data, "--targets", tmp_path / "t", "--out", tmp_path / "r"
    )
    assert "line 1: no answer" in refused("train", "--model", student_folder, "--data", empty, "--out", tmp_path / "r")
    train = ("train", "--model", student_folder, "--data", data, "--steps", 1, "--out")
    (tmp_path / "data/images/00001.png").write_bytes(b"broken")
    caplog.clear()
    assert lavender(*train, tmp_path / "r").returncode == 0
    skipped = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert re.match(r"skipped: sample 'images/00001.png': cannot read the image .*00001.png", skipped[0])
    for picture in (tmp_path / "data/images").iterdir():
        picture.write_bytes(b"broken")
    assert "cannot read the image" in refused(*train, tmp_path / "r2")


def test_mistakes_with_settings(refused, teacher_folder, data, tmp_path):
    common = ("extract", "--model", teacher_folder, "--data", data, "--out", tmp_path / "t")
    assert "timesteps is (1000,)" in refused(*common, "--timesteps", "1000")
    assert "integers separated by commas" in refused(*common, "--timesteps", "soon")
    assert "inversion_steps is 0" in refused(*common, "--inversion-steps", 0)
    assert "device 'tpu9'" in refused(*common, "--device", "tpu9")
    assert "no attention layer is named like attic" in refused(*common, "--layers", "attic")


def test_settings_that_would_do_nothing_are_refused(refused, teacher_folder, data, tmp_path):
    extract = ("extract", "--model", teacher_folder, "--data", data, "--out", tmp_path / "t")
    assert "there is no setting 'normalisation'" in refused(*extract, "--set", "normalisation=sum")
    assert "an option of its own, --map-size" in refused(*extract, "--set", "map_size=16")
    assert "guidance_scale is 7.5" in refused(*extract, "--inversion", "noise", "--guidance-scale", "7.5")
    assert "timesteps is (7,)" in refused(*extract, "--timesteps", "7")
    assert not (tmp_path / "t").exists()


def test_a_run_in_which_every_picture_fails_says_so_by_its_exit_code(lavender, teacher_folder, data, tmp_path):
    data.write_text('{"image": "images/none.png", "caption": "a red ring"}')
    result = lavender("extract", "--model", teacher_folder, "--data", data, "--out", tmp_path / "t", "--inversion", "noise")
    assert result.returncode == 1
    assert "0 written, 0 there before, 1 skipped" in result.stdout
