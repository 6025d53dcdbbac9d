"""What libraries write beside the command's own output is shown by `lavender -v` alone."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest
from transformers.utils import logging as of_transformers

from lavender.cli import main
from lavender.miniworld import STUDENT
from lavender.pretrained.notes import AsHere, without_notes
from lavender.students.loading import load_student

OTHERS = ("transformers.generation", "diffusers.pipelines", "torchao", "some.library")


def write_notes():
    for name in OTHERS:
        logging.getLogger(name).warning("a hint of %s", name)
    of_transformers.get_logger("transformers.models").warning("a hint of transformers")
    warnings.warn("it goes in the next version", FutureWarning, stacklevel=1)
    logging.getLogger("lavender").warning("a sample is skipped")


def test_notes_of_others_are_left_out(caplog, recwarn):
    with without_notes():
        write_notes()
        assert os.environ["PYTHONWARNINGS"] == "ignore"
    assert [record.getMessage() for record in caplog.records] == ["a sample is skipped"]
    assert not recwarn.list


def test_everything_is_as_it_was_afterwards(caplog, recwarn):
    before = logging.root.manager.disable, dict(os.environ)
    with pytest.raises(KeyboardInterrupt), without_notes():
        raise KeyboardInterrupt
    assert (logging.root.manager.disable, dict(os.environ)) == before
    write_notes()
    assert {"a hint of torchao", "a hint of some.library", "a sample is skipped"} <= {r.getMessage() for r in caplog.records}
    assert [type(warning.message) for warning in recwarn.list] == [FutureWarning]


def test_a_library_called_without_notes_shows_no_bars(capfd):
    with without_notes():
        load_student(STUDENT)
    assert "Loading weights" not in capfd.readouterr().err
    assert of_transformers.is_progress_bar_enabled()
    load_student(STUDENT)
    assert "Loading weights" in capfd.readouterr().err


def test_verbose_shows_where_an_error_arose(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{")
    for words, has_trace in ((["doctor", str(tmp_path)], False), (["-v", "doctor", str(tmp_path)], True)):
        monkeypatch.setattr(sys, "argv", ["lavender", *words])
        with pytest.raises(SystemExit) as end:
            main()
        stderr = capsys.readouterr().err
        assert end.value.code == 2
        assert ("Traceback" in stderr) == has_trace
        assert stderr.splitlines()[-1].startswith("lavender: ")


@pytest.mark.full
def test_a_command_in_a_process_of_its_own_writes_nothing_else(tmp_path):
    command = [sys.executable, "-m", "lavender", "evaluate", "--scenes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0
    assert not done.stderr
    assert json.loads(done.stdout)


def test_one_line_whatever_is_in_a_name(monkeypatch, capsys):
    for name in ("a\nb", "a\rb", "a\x1b[31mb", "a\udcffb"):
        monkeypatch.setattr(sys, "argv", ["lavender", "targets", "info", name])
        with pytest.raises(SystemExit):
            main()
        line = capsys.readouterr().err
        assert line.startswith("lavender: ")
        assert line.count("\n") == 1
        assert line[:-1].isprintable()


@pytest.mark.parametrize(
    "words",
    [
        "demo --seed -1",
        "train --steps x",
        "nonsense",
        "targets merge --out x",
        "extract",
        "report --nonsense",
        "targets export a b",
    ],
)
def test_mistakes_with_options_are_one_line_too(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lavender", *words.split()])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("lavender: ")
    assert line.endswith("--help")


def _write_notes(channel):
    write_notes()
    channel.send(logging.root.manager.disable)


def test_a_spawned_process_is_as_quiet_as_this_one(capfd):
    context = multiprocessing.get_context("spawn")
    for quiet in (True, False):
        here, there = context.Pipe()
        with without_notes() if quiet else nullcontext():
            process = context.Process(target=AsHere(_write_notes), args=(there,))
            process.start()
            there.close()
            assert (here.recv() >= logging.ERROR) == quiet
            process.join()
        said = capfd.readouterr().err
        assert "a sample is skipped" in said
        assert ("a hint of some.library" in said, "it goes in the next version" in said) == (not quiet, not quiet)
        assert quiet or "torchao" in said
