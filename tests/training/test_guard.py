"""A training whose numbers are no longer finite stops, and names the step and its samples; nothing of it is written."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

import lavender
from lavender.batches.collator import Collator
from lavender.cli import main
from lavender.config import PUBLISHED, AlignmentConfig, TrainingConfig
from lavender.data.samples import read_samples
from lavender.errors import ConfigError, DataError, ModelError
from lavender.miniworld import write_dataset
from lavender.students.discovery import base_model_of
from lavender.training import guard, train
from lavender.training.train import fine_tune

from .test_train import write_targets

pytestmark = pytest.mark.usefixtures("no_pictures")
TRAINING = TrainingConfig(
    steps=3,
    batch_size=2,
    learning_rate=1e-3,
    warmup_steps=0,
    save_steps=1,
    lora_dropout=0.0,
    arguments={"train_sampling_strategy": "sequential", "use_cpu": True},
)
BEGUN = [".lock", ".sound-0", "run.json", "samples.json"]
"""The files of a run before its first checkpoint."""
POISONED = 3
"""Index of the sample that makes the loss NaN: in the second step."""


@pytest.fixture
def data(scenes, tmp_path):
    return write_dataset(scenes[:6], tmp_path / "data")


@pytest.fixture
def samples(data):
    return read_samples(data)


@pytest.fixture
def targets(scenes, samples, tmp_path):
    return write_targets(tmp_path / "targets", scenes[:6], [sample.id for sample in samples])


@pytest.fixture
def poisoned(samples, monkeypatch):
    """A function that puts a value into a tensor of every batch with the sample `POISONED`; the sample's id is its result."""

    def poison(key, value):
        class Poisoned(Collator):
            def __call__(self, batch_samples):
                batch = super().__call__(batch_samples)
                for b, sample in enumerate(batch_samples):
                    if sample.id == samples[POISONED].id:
                        batch[key][b] = value
                return batch

        monkeypatch.setattr(train, "Collator", Poisoned)
        return samples[POISONED].id

    return poison


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("**/checkpoint-*"))


def weights_of(checkpoint):
    return load_file(checkpoint / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("pixel_values", torch.nan, "loss nan, language loss nan, alignment loss nan"),
        ("lavender_targets", torch.inf, r"loss nan, language loss \d+\.\d+, alignment loss nan"),
    ],
)
def test_the_first_loss_that_is_not_finite_ends_the_run(key, value, parts, poisoned, student_folder, samples, targets, tmp_path):
    fine_tune(student_folder, samples, tmp_path / "sound", TRAINING, targets=targets, progress=False)
    out, poison = tmp_path / "run", poisoned(key, value)
    for _ in range(2 if key == "lavender_targets" else 1):  # the same command continues, and meets the same samples
        with pytest.raises(ModelError, match=f"loss of step 2 is not finite.*{parts}, .*'{samples[2].id}', '{poison}'") as error:
            fine_tune(student_folder, samples, out, TRAINING, targets=targets, progress=False)
        assert str(out / "checkpoints/checkpoint-1") in str(error.value)
        assert checkpoints(out) == ["checkpoint-1"]
        assert sorted(path.name for path in out.iterdir()) == sorted([*BEGUN, "checkpoints"])
    # What is kept is what an undisturbed run had at that step.
    short = replace(TRAINING, steps=3, arguments={**TRAINING.arguments, "save_total_limit": 3})
    fine_tune(student_folder, samples[:2] + samples[:2], tmp_path / "whole", short, targets=targets, progress=False)
    kept, undisturbed = (weights_of(folder / "checkpoints/checkpoint-1") for folder in (out, tmp_path / "whole"))
    assert kept.keys() == undisturbed.keys()
    assert all(torch.equal(value, undisturbed[name]) for name, value in kept.items())


def test_plain_fine_tuning_stops_too_and_knows_its_samples_in_other_processes(poisoned, student_folder, samples, tmp_path):
    poison = poisoned("pixel_values", torch.nan)
    arguments = {**TRAINING.arguments, "dataloader_num_workers": 1, "gradient_accumulation_steps": 2}
    training = replace(TRAINING, steps=2, batch_size=1, arguments=arguments)
    # Of the two micro-batches of step 2 the one at fault is named.
    with pytest.raises(ModelError, match=rf"loss of step 2 is not finite \(loss nan, with the samples '{poison}'\)"):
        fine_tune(student_folder, samples, tmp_path / "run", training, progress=False)
    assert checkpoints(tmp_path / "run") == ["checkpoint-1"]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_a_collator_is_one_line(workers, student_folder, samples, tmp_path, monkeypatch):
    """From a process of a DataLoader it comes with that process's traceback."""

    def refuse(collator, batch_samples):
        raise DataError(f"sample {batch_samples[0].id!r} is of no use; leave it out")

    monkeypatch.setattr(Collator, "__call__", refuse)
    training = replace(TRAINING, arguments={**TRAINING.arguments, "dataloader_num_workers": workers})
    with pytest.raises(DataError) as error:
        fine_tune(student_folder, samples, tmp_path / "run", training, progress=False)
    assert str(error.value) == f"sample {samples[0].id!r} is of no use; leave it out"


def test_arguments_that_the_trainer_refuses_are_a_users_mistake(student_folder, samples, tmp_path):
    training = replace(TRAINING, arguments={**TRAINING.arguments, "eval_strategy": "steps"})
    with pytest.raises(ConfigError, match=r"refuses the training's arguments .*eval_dataset"):
        fine_tune(student_folder, samples, tmp_path / "run", training, progress=False)


def test_samples_without_label_tokens_are_counted_in_plain_training_too(student_folder, samples, tmp_path, caplog):
    long = [samples[0], *(replace(sample, question="what is it? " * 20) for sample in samples[1:])]
    fine_tune(student_folder, long, tmp_path / "run", replace(TRAINING, max_length=96), progress=False)
    assert "samples without label tokens, skipped or cut off (counted each time they came up): 5" in caplog.messages


def test_weights_that_a_step_makes_infinite_are_never_written(student_folder, samples, targets, tmp_path):
    """The loss of that step is finite: without another look its checkpoint, and the adapter of a run of one step, would be NaN."""
    wild = replace(TRAINING, learning_rate=1e38)
    for number, settings in enumerate(({"targets": targets}, {})):
        out = tmp_path / str(number)
        with pytest.raises(
            ModelError, match=rf"weights are not finite after step 1 .*'{samples[0].id}'.*no checkpoint was"
        ) as error:
            fine_tune(student_folder, samples, out, replace(wild, steps=1), progress=False, **settings)
        assert "lora_" in str(error.value)
        assert sorted(path.name for path in out.rglob("*") if path.is_file()) == BEGUN


def test_a_gradient_that_is_not_finite_ends_the_run(student_folder, samples, targets, tmp_path, monkeypatch):
    spoil_gradient(monkeypatch, lambda gradient: gradient * torch.nan)
    with pytest.raises(ModelError, match=r"weights are not finite after step 1"):
        fine_tune(student_folder, samples, tmp_path / "run", TRAINING, targets=targets, progress=False)
    assert not checkpoints(tmp_path / "run")


def spoil_gradient(monkeypatch, hook):
    build = train._Run.build

    def spoiled(run):
        trained, *others = build(run)
        next(p for name, p in trained.named_parameters() if "lora_B" in name).register_hook(hook)
        return trained, *others

    monkeypatch.setattr(train._Run, "build", spoiled)


@pytest.fixture
def loss_scaling(monkeypatch):
    """Trains by torch's GradScaler, as fp16 does on a GPU."""
    fit = train._train

    def scaled(trainer, checkpoint):
        accelerator = trainer.accelerator
        # Beyond what float32 holds, once it is multiplied with the loss.
        accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        accelerator.unscale_gradients = lambda: scaler.unscale_(trainer.optimizer.optimizer)
        fit(trainer, checkpoint)

    monkeypatch.setattr(train, "_train", scaled)


@pytest.mark.usefixtures("loss_scaling")
def test_steps_that_loss_scaling_skips_do_not_end_the_run(student_folder, samples, targets, tmp_path):
    trained = fine_tune(student_folder, samples, tmp_path / "run", replace(TRAINING, steps=9), targets=targets, progress=False)
    assert trained is not None
    saved = [weights_of(tmp_path / f"run/checkpoints/checkpoint-{step}") for step in (8, 9)]
    assert all(value.isfinite().all() for weights in saved for value in weights.values())
    assert any(not torch.equal(value, saved[1][name]) for name, value in saved[0].items())
    scaler = torch.load(tmp_path / "run/checkpoints/checkpoint-9/scaler.pt", weights_only=True)
    assert scaler["scale"] < 2.0**127  # steps were skipped


@pytest.mark.usefixtures("loss_scaling")
def test_steps_that_are_skipped_for_ever_end_the_run(student_folder, samples, targets, tmp_path, monkeypatch):
    spoil_gradient(monkeypatch, lambda gradient: gradient * torch.inf)
    monkeypatch.setattr(guard, "MAX_SKIPPED", 4)
    with pytest.raises(ModelError, match=r"gradient was not finite in the last 4 steps, up to step 4 .*with the samples"):
        fine_tune(student_folder, samples, tmp_path / "run", replace(TRAINING, steps=9), targets=targets, progress=False)


@pytest.mark.parametrize("aligned", [True, False])
def test_a_trainer_of_ones_own_stops_too(aligned, student, processor, samples, targets, tmp_path):
    """It cannot know its samples; the callback knows the parts of the loss."""
    patch = lavender.patch(student.train(), AlignmentConfig(weight=2.0, aligner="sim"))
    collator = Collator(processor, targets)

    def collate(batch_samples):
        batch = collator(batch_samples)
        if samples[POISONED] in batch_samples:
            batch["lavender_targets" if aligned else "pixel_values"][0] = torch.inf
        return batch

    arguments = TrainingArguments(
        tmp_path / "o", max_steps=3, per_device_train_batch_size=2, remove_unused_columns=False, report_to=[], disable_tqdm=True,
        save_steps=1, train_sampling_strategy="sequential", use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model=student, args=arguments, train_dataset=samples, data_collator=collate)
    trainer.add_callback(lavender.LavenderCallback(trainer))
    parts = r"\(language loss \d+\.\d+, alignment loss nan\)" if aligned else r"\(language loss nan, alignment loss nan\)"
    with pytest.raises(ModelError, match=f"loss of step 2 is not finite {parts}"):
        trainer.train()
    assert checkpoints(tmp_path / "o") == ["checkpoint-1"]
    assert all(p.isfinite().all() for p in student.parameters())  # it stopped before the optimizer's step
    patch.unpatch()


def test_a_model_that_is_not_finite_is_not_trained(student, samples, processor, tmp_path):
    patch = lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim"))
    student.model.language_model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    arguments = TrainingArguments(tmp_path / "o", max_steps=1, report_to=[], use_cpu=True, remove_unused_columns=False)
    trainer = Trainer(model=student, args=arguments, train_dataset=samples, data_collator=Collator(processor))
    trainer.add_callback(lavender.LavenderCallback(trainer))
    with pytest.raises(ModelError, match=r"not finite before step 1 \('model.language_model.layers.1.mlp.up_proj.weight'\)"):
        trainer.train()
    patch.unpatch()


def test_adapters_and_aligners_that_are_not_finite_or_damaged_are_refused_by_name(student_folder, samples, targets, tmp_path):
    def start(name, **settings):
        fine_tune(
            student_folder,
            samples,
            tmp_path / name,
            replace(TRAINING, steps=1),
            targets=targets,
            alignment=PUBLISHED,
            progress=False,
            **settings,
        )
        return tmp_path / name

    out = start("run")
    adapter, aligner = out / "adapter/adapter_model.safetensors", out / "aligner.safetensors"
    for path, settings in ((adapter, {"adapter": adapter.parent}), (aligner, {"aligner": out})):
        weights = load_file(path)
        name = max(weights, key=lambda key: weights[key].numel())
        for value in (torch.nan, -torch.inf):
            weights[name].view(-1)[-1] = value
            save_file(weights, path)
            with pytest.raises(ModelError, match=f"1 weights in .* are not finite, such as {name}"):
                start("from", **settings)
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(ModelError, match=r"(cannot load a LoRA adapter .* from|aligner.safetensors is damaged)"):
            start("from", **settings)
        path.write_bytes(b"")
        with pytest.raises(ModelError):
            start("from", **settings)
        path.unlink()


@pytest.mark.parametrize("accepts", [pytest.param(True, marks=pytest.mark.full), False], ids=["counts_tokens", "own_mean"])
@pytest.mark.parametrize("with_targets", [True, False], ids=["aligned", "plain"])
def test_a_batch_without_label_tokens_is_a_step_of_zero(
    accepts, with_targets, student_folder, samples, targets, tmp_path, monkeypatch
):
    """Cut off before the answer: it adds nothing to another micro-batch, and a step of nothing else has loss and gradient zero.

    Models such as Qwen2.5-VL take the mean of each batch by itself, which is then 0 / 0.
    """
    from transformers import LlavaForConditionalGeneration

    monkeypatch.setattr(LlavaForConditionalGeneration, "accepts_loss_kwargs", accepts, raising=False)
    settings = {"targets": targets, "alignment": AlignmentConfig(weight=1.0, aligner="sim")} if with_targets else {}

    def train_on(name, long, arguments=None, **changes):
        training = replace(TRAINING, max_length=72, batch_size=1, **changes)
        training = replace(training, arguments={**TRAINING.arguments, "logging_steps": 1, **(arguments or {})})
        fine_tune(student_folder, long, tmp_path / name, training, progress=False, **settings)
        history = json.loads((tmp_path / name / "history.json").read_text())
        return weights_of(tmp_path / name / "adapter"), history

    # A short question leaves room for a few tokens of the answer.
    short = replace(samples[0], question="?")
    cut, history = train_on("cut", samples, steps=2)
    assert [entry["loss"] for entry in history] == [0, 0]
    assert [entry["grad_norm"] for entry in history] == [0, 0]
    assert all(value.eq(0).all() for name, value in cut.items() if "lora_B" in name)
    both, history = train_on("both", [short, samples[1]], {"gradient_accumulation_steps": 2}, steps=1)
    alone, expected = train_on("alone", [short], steps=1)
    assert any(value.ne(0).any() for name, value in alone.items() if "lora_B" in name)
    share = 1 if accepts else 0.5  # the mean over micro-batches is theirs
    assert history[0]["loss"] == pytest.approx(share * expected[0]["loss"], rel=1e-5)
    assert history[0]["loss"] > 0
    assert all(value.isfinite().all() for value in both.values())


def test_the_command_says_it_in_one_line(student_folder, data, tmp_path, monkeypatch, capfd):
    command = ["lavender", "train", "--model", student_folder, "--data", data, "--out", tmp_path / "run", "--steps", "2"]
    settings = ["--learning-rate", "1e38", "--set", "training.warmup_steps=0", "--set", "training.arguments.use_cpu=true"]
    monkeypatch.setattr(sys, "argv", [*map(str, command), *settings])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "lavender: " in line]
    assert len(lines) == 1
    assert "weights are not finite after step 1" in lines[0]


def test_the_guard_costs_no_output(student, samples, processor, targets, tmp_path):
    """Losses with the callback equal those without it, bit for bit; and the part that it names is the model's own loss."""
    seen = []

    class Listener(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            last = base_model_of(model)._lavender_patch.last
            seen.append((last.language.item(), last.loss.item(), last.weight))

    def losses(watched):
        torch.manual_seed(0)
        student.load_state_dict(start)
        arguments = TrainingArguments(
            tmp_path / "o", max_steps=2, report_to=[], use_cpu=True, remove_unused_columns=False, save_strategy="no",
            logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=student, args=arguments, train_dataset=samples, data_collator=Collator(processor, targets))
        trainer.add_callback(Listener())
        if watched:
            trainer.add_callback(lavender.LavenderCallback(trainer))
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    with lavender.patch(student, AlignmentConfig(weight=2.0, aligner="identity")):
        start = {name: value.clone() for name, value in student.state_dict().items()}
        unwatched = losses(False)
        assert losses(True) == unwatched
    assert unwatched == pytest.approx([language + weight * loss for language, loss, weight in seen[:2]], rel=1e-5)
