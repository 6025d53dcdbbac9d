"""A sample of the campaign of `campaign.py`; and trainings that are asked to end, out of disk, or two at once."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import time
from dataclasses import replace

import psutil
import pytest
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from lavender.cli import main
from lavender.config import PUBLISHED, TrainingConfig
from lavender.data.samples import read_samples
from lavender.errors import DataError
from lavender.files import FolderLock
from lavender.miniworld import write_dataset
from lavender.signals import SIGNALS, Stopped
from lavender.training import trainer as trainer_module
from lavender.training.checkpoints import writing
from lavender.training.train import fine_tune
from lavender.training.trainer import StudentTrainer

from .campaign import crash, kill, make_world
from .test_train import assert_same_run, write_targets

pytestmark = pytest.mark.usefixtures("no_pictures")
# Its log has one entry, of all steps: what is summed up until a signal comes must not be lost.
TRAINING = TrainingConfig(steps=4, batch_size=2, learning_rate=1e-3, lora_dropout=0.2, arguments={"use_cpu": True})


@pytest.fixture(scope="module")
def world(student_folder, scenes, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lavender.training.callback.LavenderCallback._draw", lambda *_: None)
        return make_world(student_folder, scenes, tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("points", [range(20, 111, 45), pytest.param(range(1, 10**6, 11), marks=pytest.mark.full)])
def test_a_training_that_dies_at_a_step_of_its_writing_ends_as_an_undisturbed_one(points, world, tmp_path):
    assert crash(world, tmp_path, points) >= min(len(points), 10)


@pytest.mark.full
def test_a_training_that_is_killed_at_random_moments_ends_as_an_undisturbed_one(world, tmp_path):
    assert kill(world, tmp_path, 10)[0] == 10


@pytest.fixture(scope="module")
def given(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    data = write_dataset(scenes[:8], folder / "data")
    return data, write_targets(folder / "targets", scenes[:8], [sample.id for sample in read_samples(data)])


@pytest.fixture
def train(given, student_folder, tmp_path):
    def run(name, training=TRAINING, **settings):
        defaults = {"targets": given[1], "alignment": PUBLISHED, "progress": False}
        fine_tune(student_folder, read_samples(given[0]), tmp_path / name, training, **defaults | settings)
        return tmp_path / name

    return run


@pytest.fixture
def signaled(monkeypatch):
    """Sends a signal to this process while it computes a step."""

    def send(number, step):
        original, steps = StudentTrainer.training_step, []

        def training_step(self, *args, **kwargs):
            steps.append(self)
            if len(steps) == step:
                os.kill(os.getpid(), number)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(StudentTrainer, "training_step", training_step)

    return send


@pytest.mark.parametrize("number", [SIGNALS[0], *(pytest.param(number, marks=pytest.mark.full) for number in SIGNALS[1:])])
def test_a_training_that_is_asked_to_end_writes_a_checkpoint_and_goes_on_from_there(number, train, signaled, tmp_path):
    before = [signal.getsignal(one) for one in SIGNALS]
    whole = train("whole")
    signaled(number, 2)
    name = signal.Signals(number).name
    with pytest.raises(Stopped, match=f"{name} ended the training after step 2: checkpoint-2 is written; the same") as stopped:
        train("run")
    assert stopped.value.code == 143
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("*-*")) == ["checkpoint-2"]
    assert_same_run(whole, train("run"))


@pytest.mark.full
@pytest.mark.parametrize("number", SIGNALS)
def test_workers_outlast_a_signal_that_all_processes_get(number, train, monkeypatch, tmp_path):
    original = StudentTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 1:
            workers = psutil.Process().children(recursive=True)
            assert workers
            for process in (*workers, psutil.Process()):
                process.send_signal(number)
            time.sleep(0.5)  # or they would have no time to die in
        return original(self, *args, **kwargs)

    training = replace(TRAINING, arguments={"use_cpu": True, "dataloader_num_workers": 2})
    whole = train("whole", training)
    with monkeypatch.context() as patch:
        patch.setattr(StudentTrainer, "training_step", training_step)
        with pytest.raises(Stopped, match="after step 2: checkpoint-2 is written"):
            train("run", training)
    assert_same_run(whole, train("run", training))


def test_epochs_that_end_elsewhere_log_and_save_as_if_nothing_had_come(train, signaled):
    """Four steps of an epoch of four, and of the next."""
    training = TrainingConfig(
        steps=6, batch_size=2, arguments={"use_cpu": True, "logging_strategy": "epoch", "save_strategy": "epoch"}
    )
    whole = train("whole", training)
    assert len(json.loads((whole / "history.json").read_text())) == 2
    signaled(signal.SIGTERM, 2)
    with pytest.raises(Stopped):
        train("run", training)
    assert_same_run(whole, train("run", training))


def test_a_signal_before_the_first_step_ends_the_training_without_a_checkpoint(train, monkeypatch, tmp_path):
    original = trainer_module.Interruption.on_train_begin
    monkeypatch.setattr(
        trainer_module.Interruption,
        "on_train_begin",
        lambda *args, **kwargs: (signal.raise_signal(signal.SIGTERM), original(*args, **kwargs)),
    )
    with pytest.raises(Stopped, match="ended the training before step 1; the same command continues"):
        train("run")
    assert not [*(tmp_path / "run").glob("checkpoints/*")]


def test_the_command_ends_by_exit_code_143_and_one_line(given, student_folder, signaled, tmp_path, monkeypatch, capsys):
    command = ["lavender", "train", "--model", student_folder, "--data", given[0], "--steps", 4, "--batch-size", 2]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--out", str(tmp_path / "run")])
    signaled(signal.SIGTERM, 2)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 143
    errors = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert [line for line in errors if line.startswith("lavender: ")] == [
        "lavender: SIGTERM ended the training after step 2: checkpoint-2 is written; the same command continues"
    ]
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code


def test_two_trainings_on_a_folder_are_one(train, tmp_path):
    (tmp_path / "run").mkdir()
    with FolderLock(tmp_path / "run"):
        with pytest.raises(DataError, match=rf"another process \(process {os.getpid()} on .*\) is training in .*run; wait until"):
            train("run")
        assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", ".lock.json"}
    out = train("run")
    assert not (out / ".lock.json").exists()
    with FolderLock(out):  # whoever reads a finished run keeps nobody out
        train("run")


def without_disk(work, limit):
    """What a process says that may write no file of more bytes than the limit."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            work()
        except BaseException as error:  # of which a test fails
            os.write(write, (str(error) if isinstance(error, DataError) else repr(error)).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read) as file:
        return file.read()


@pytest.mark.parametrize("name", [pytest.param("adapter_model.safetensors", marks=pytest.mark.full), "optimizer.pt"])
def test_a_disk_that_is_full_while_a_checkpoint_is_written_is_one_line(name, world, tmp_path):
    """safetensors and torch say it by errors of their own."""
    limit = (world.whole / f"checkpoints/checkpoint-4/{name}").stat().st_size - 1
    said = without_disk(lambda: world.train(tmp_path / "run"), limit)
    assert said.startswith(f"cannot write to {tmp_path / 'run/checkpoints'}: ")
    assert said.endswith("What is stored there is safe; free some space and run the same command again to continue")
    assert "\n" not in said
    assert not [*(tmp_path / "run/checkpoints").iterdir()]
    world.train(tmp_path / "run")
    world.require_end(tmp_path / "run")


@pytest.mark.parametrize("points", [(28,), pytest.param(range(1, 100, 9), marks=pytest.mark.full)])
def test_a_disk_that_is_full_at_any_moment_is_one_line_and_the_same_command_continues(points, world, tmp_path, monkeypatch):
    fsync = os.fsync
    for point in points:
        passed = []

        def synchronize(descriptor, point=point, passed=passed):
            passed.append(descriptor)
            if len(passed) > point:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        out = tmp_path / f"run{point}"
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", synchronize)
            try:
                world.train(out)
                said = ""
            except DataError as error:
                said = str(error)
        assert (len(passed) > point) == ("No space left on device. What is stored there is safe; free some space" in said)
        world.train(out)
        world.require_end(out)
    assert points == (28,) or len(passed) < point  # all of them


def test_what_libraries_say_of_a_full_disk_is_known_and_other_errors_are_themselves(tmp_path):
    full = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    for error in (
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        full,
        CheckpointException("ranks", {1: (full, None)}),
    ):
        with pytest.raises(DataError, match=r"^cannot write to .*What is stored there is safe"), writing(tmp_path):
            raise error
    others = (RuntimeError("shapes"), SafetensorError("shapes"), CheckpointException("ranks", {0: (ValueError("x"), None)}))
    for error in (*others, OSError(errno.EIO, "broken")):
        with pytest.raises(type(error)) as raised, writing(tmp_path):
            raise error
        assert raised.value is error


def test_a_checkpoint_that_lies_in_its_place_is_complete(train, monkeypatch, tmp_path):
    """While one is written it is aside, and older ones go when it has its name."""
    seen = []
    original = StudentTrainer._save_rng_state

    def save(self, output_dir):
        original(self, output_dir)
        seen.append(sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()))

    monkeypatch.setattr(StudentTrainer, "_save_rng_state", save)
    training = TrainingConfig(steps=3, batch_size=2, save_steps=1, arguments={"use_cpu": True, "save_total_limit": 1})
    out = train("run", training)
    assert seen == [["unfinished"], ["checkpoint-1", "unfinished"], ["checkpoint-2", "unfinished"]]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-3"]
    recorded = json.loads((out / "checkpoints/checkpoint-3/lavender.json").read_text())["bytes"]
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= recorded.keys()
