"""A run continues from the newest checkpoint that is whole, and ends as an undisturbed one; or it says why it cannot."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lavender.config import PUBLISHED, TrainingConfig
from lavender.data.samples import read_samples
from lavender.errors import DataError
from lavender.miniworld import write_dataset
from lavender.training.checkpoints import _faults_of_file, _has_state, _record, last_checkpoint
from lavender.training.train import fine_tune

from .test_train import assert_same_run, write_targets

pytestmark = pytest.mark.usefixtures("no_pictures")
TRAINING = TrainingConfig(
    steps=3,
    batch_size=2,
    learning_rate=1e-3,
    warmup_steps=1,
    save_steps=1,
    lora_dropout=0.2,
    arguments={"save_total_limit": 3, "use_cpu": True},
)
FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def missing(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-64])


def zeroed(path):
    """As a power cut leaves it on some file systems."""
    path.write_bytes(bytes(path.stat().st_size))


def overwritten(path):
    """In its middle, at the same length."""
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entry = archive.read(max(archive.infolist(), key=lambda info: info.file_size))
    path.write_bytes(content.replace(entry, entry[:-4] + b"\xff" * 4))


DAMAGES = (missing, empty, truncated, zeroed, overwritten)
# A file of safetensors has no checksum: what overwrote its middle are numbers among the others.
CASES = [(name, damage) for name in FILES for damage in DAMAGES if damage is not overwritten or not name.endswith(".safetensors")]


@pytest.fixture(scope="module")
def world(scenes, student_folder, tmp_path_factory):
    """The call of a run of three steps, and its undisturbed folder."""
    folder = tmp_path_factory.mktemp("checkpoints")
    samples = read_samples(write_dataset(scenes[:8], folder / "data"))
    targets = write_targets(folder / "targets", scenes[:8], [sample.id for sample in samples])

    def train(out, training=TRAINING, **settings):
        defaults = {"targets": targets, "alignment": PUBLISHED, "progress": False}
        return fine_tune(student_folder, samples, out, training, **defaults | settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lavender.training.callback.LavenderCallback._draw", lambda *_: None)
        train(folder / "whole")
    return SimpleNamespace(train=train, whole=folder / "whole", samples=samples)


@pytest.fixture
def killed(world, tmp_path):
    """A run that was killed after its second checkpoint."""
    out = tmp_path / "run"
    shutil.copytree(world.whole, out)
    for path in (out / "adapter", out / "checkpoints/checkpoint-3"):
        shutil.rmtree(path)
    for name in ("history.json", "aligner.safetensors"):
        (out / name).unlink()
    return out


def told(caplog):
    return [record.message for record in caplog.records if record.name == "lavender" and "checkpoint-" in record.message]


@pytest.mark.parametrize(("name", "damage"), [*zip(FILES, (truncated, missing, empty, missing), strict=True)])
def test_the_checkpoint_before_a_damaged_one_gives_the_same_run(name, damage, world, killed, caplog):
    before = {path.name: path.read_bytes() for path in (killed / "checkpoints/checkpoint-2").iterdir()}
    damage(killed / "checkpoints/checkpoint-2" / name)
    world.train(killed)
    assert_same_run(world.whole, killed)
    (line,) = told(caplog)
    aside = killed / "checkpoints/damaged/checkpoint-2"
    assert "checkpoint-2 is damaged" in line
    assert name in line
    assert line.endswith(f"continuing from checkpoint-1; it is kept as {aside}")
    # What was there can be mended: all but the one file is as it was.
    assert {path.name: path.read_bytes() for path in aside.iterdir() if path.name != name} == {
        key: value for key, value in before.items() if key != name
    }
    assert [*sorted(path.name for path in (killed / "checkpoints").glob("checkpoint-*"))] == [
        f"checkpoint-{step}" for step in (1, 2, 3)
    ]


@pytest.fixture
def trainer(world):
    """What `last_checkpoint` asks of a Trainer."""
    arguments = SimpleNamespace(should_save=True, world_size=1, process_index=0)
    accelerator = SimpleNamespace(scaler=None, wait_for_everyone=lambda: None)
    model = SimpleNamespace(peft_config={})
    return SimpleNamespace(args=arguments, accelerator=accelerator, model=model, is_deepspeed_enabled=False, is_fsdp_enabled=False)


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "of_an_earlier_version"])
@pytest.mark.parametrize(("name", "damage"), CASES)
def test_every_damage_of_every_file_is_found(name, damage, recorded, killed, trainer):
    folder = killed / "checkpoints"
    if not recorded:
        (folder / "checkpoint-2/lavender.json").unlink()
    assert last_checkpoint(folder, trainer) == str(folder / "checkpoint-2")
    damage(folder / "checkpoint-2" / name)
    assert last_checkpoint(folder, trainer) == str(folder / "checkpoint-1")


def test_a_recorded_checkpoint_lacks_none_of_its_files(killed, trainer):
    """Engines have files of their own."""
    folder = killed / "checkpoints"
    names = set(json.loads((folder / "checkpoint-2/lavender.json").read_text())["bytes"])
    assert names == {path.name for path in (folder / "checkpoint-2").iterdir()} - {"lavender.json"}
    (folder / "checkpoint-2/README.md").unlink()
    assert last_checkpoint(folder, trainer) == str(folder / "checkpoint-1")


@pytest.mark.parametrize("damage", [missing, empty, truncated])
def test_a_checkpoint_that_was_complete_is_kept_if_its_state_is_damaged(damage, killed, trainer, caplog):
    """One that is without a record was being written, and is removed."""
    folder = killed / "checkpoints"
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-10")
    (folder / "checkpoint-10/lavender.json").unlink()
    for name in ("checkpoint-2", "checkpoint-10"):
        damage(folder / name / "trainer_state.json")
    assert last_checkpoint(folder, trainer) == str(folder / "checkpoint-1")
    assert [path.name for path in (folder / "damaged").iterdir()] == ["checkpoint-2"]
    assert not (folder / "checkpoint-10").exists()
    assert ["is removed" in line for line in told(caplog)] == [True, False]


def test_weights_that_lack_some_or_are_not_finite_are_passed_over(killed, trainer, caplog):
    folder = killed / "checkpoints"
    spoiled = load_file(folder / "checkpoint-2/adapter_model.safetensors")
    name = next(name for name in spoiled if "lora_A" in name)
    spoiled[name][1, 1] = torch.nan
    save_file(spoiled, folder / "checkpoint-2/adapter_model.safetensors", metadata={"format": "pt"})
    assert last_checkpoint(folder, trainer) == str(folder / "checkpoint-1")
    assert f"has weights that are not finite, such as {name}" in told(caplog)[0]
    weights = load_file(folder / "checkpoint-1/adapter_model.safetensors")
    weights.pop(name)
    save_file(weights, folder / "checkpoint-1/adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"checkpoint-1: adapter_model.safetensors has \d+ bytes of \d+"):
        last_checkpoint(folder, trainer)


def test_without_a_sound_checkpoint_a_run_does_not_begin_anew_by_itself(world, killed):
    for step, name in ((1, "optimizer.pt"), (2, "rng_state.pth")):
        (killed / f"checkpoints/checkpoint-{step}" / name).unlink()
    with pytest.raises(DataError, match=r"checkpoint-2: rng_state.pth is missing; checkpoint-1: optimizer.pt is missing.*anew"):
        world.train(killed)
    # Nothing was moved or removed: whoever puts a file back continues.
    shutil.copy(world.whole / "checkpoints/checkpoint-2/rng_state.pth", killed / "checkpoints/checkpoint-2")
    world.train(killed)
    assert_same_run(world.whole, killed)


def test_without_any_checkpoint_a_run_begins_anew(world, killed, trainer, caplog):
    """One that was being written when the run was killed, the first, is none."""
    shutil.rmtree(killed / "checkpoints/checkpoint-2")
    for name in ("trainer_state.json", "lavender.json"):
        (killed / "checkpoints/checkpoint-1" / name).unlink()
    world.train(killed)
    assert_same_run(world.whole, killed)
    (line,) = told(caplog)
    assert "was being written when its run ended" in line
    assert last_checkpoint(killed / "none", trainer) is None


def test_a_damaged_checkpoint_that_comes_again_is_kept_beside_the_first(killed, trainer):
    folder = killed / "checkpoints"
    for _ in range(3):
        shutil.copytree(folder / "checkpoint-1", folder / "checkpoint-2", dirs_exist_ok=True)
        empty(folder / "checkpoint-2/optimizer.pt")
        assert last_checkpoint(folder, trainer) == str(folder / "checkpoint-1")
    assert len([*(folder / "damaged").iterdir()]) == 3


def test_checkpoints_of_weights_alone_are_not_continued(world, tmp_path):
    """The Trainer would: with another optimizer."""
    training = replace(TRAINING, steps=2, arguments={**TRAINING.arguments, "save_only_model": True})
    world.train(tmp_path / "run", training)
    for name in ("adapter", "checkpoints/checkpoint-2"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run/history.json").unlink()
    with pytest.raises(
        DataError, match=r"checkpoint-1: optimizer.pt is missing, rng_state.pth is missing, scheduler.pt is missing"
    ):
        world.train(tmp_path / "run", training)


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_a_run_without_targets_falls_back_too(rank, world, tmp_path, caplog):
    training = replace(TRAINING, lora_rank=rank, steps=2, learning_rate=1e-4)
    world.train(tmp_path / "whole", training, targets=None)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run/history.json").unlink()
    weights = "model" if rank == 0 else "adapter_model"
    truncated(tmp_path / f"run/checkpoints/checkpoint-2/{weights}.safetensors")
    result = tmp_path / f"run/{'model' if rank == 0 else 'adapter'}"
    expected = load_file(result / f"{weights}.safetensors")
    shutil.rmtree(result)
    world.train(tmp_path / "run", training, targets=None)
    assert len(told(caplog)) == 1
    written = load_file(result / f"{weights}.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(value, written[name]) for name, value in expected.items())


def test_another_number_of_processes_is_said(killed, trainer, caplog):
    folder = killed / "checkpoints"
    record = folder / "checkpoint-2/lavender.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"num_processes": 2}))
    assert last_checkpoint(folder, trainer) == str(folder / "checkpoint-1")  # it has no rng_state_1.pth
    shutil.copytree(folder / "damaged/checkpoint-2", folder / "checkpoint-2")
    for rank in (0, 1):
        shutil.copy(folder / "checkpoint-2/rng_state.pth", folder / f"checkpoint-2/rng_state_{rank}.pth")
    caplog.clear()
    assert last_checkpoint(folder, trainer) == str(folder / "checkpoint-2")
    assert any("was written by 2 processes, and 1 continue" in line for line in told(caplog))
    trainer.is_deepspeed_enabled = True
    with pytest.raises(DataError, match="checkpoint-2: DeepSpeed wrote it by 2 processes and cannot continue by 1"):
        last_checkpoint(folder, trainer)


def test_a_finished_run_whose_results_are_gone_is_not_loaded_without_them(world, tmp_path):
    """The student would come back as it was before the training."""
    for name in ("adapter", "aligner.safetensors"):
        out = tmp_path / name
        shutil.copytree(world.whole, out)
        shutil.rmtree(out / name) if name == "adapter" else (out / name).unlink()
        with pytest.raises(DataError, match=f"is finished, and {out / name} is gone"):
            world.train(out)
        (out / "history.json").unlink()
        world.train(out)
        assert_same_run(world.whole, out)


@pytest.mark.parametrize("content", ["\0" * 9, "{", ""])
def test_a_damaged_json_file_is_found(tmp_path, content):
    """The Trainer would end in a traceback over it."""
    (tmp_path / "config.json").write_text(content)
    assert [fault[:14] for fault in _faults_of_file(tmp_path / "config.json")] == ["cannot be read"]
    (tmp_path / "lavender.json").write_text("[]")
    with pytest.raises(ValueError, match="no JSON object"):
        _record(tmp_path)
    (tmp_path / "trainer_state.json").write_text("null")
    assert not _has_state(tmp_path)
