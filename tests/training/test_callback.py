"""What a Trainer logs of an alignment, where it goes, and what drives lambda."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

import lavender
from lavender import AlignmentConfig
from lavender.batches.collator import Collator
from lavender.config import OUTSIDE
from lavender.errors import ConfigError, ModelError
from lavender.training.callback import _Sums, draw
from recipes.student import make_model

from ..conftest import changed, with_targets, without_lavender, words_of_batch


@pytest.fixture
def tracked(processor, samples, tmp_path):
    """A function that trains a little with a tracker, and returns the Trainer."""

    def train(config=None, watched=True, drop=(), **arguments):
        torch.manual_seed(0)
        student = make_model(processor)
        lavender.patch(student, config or AlignmentConfig(weight=2.0, aligner="identity"))
        collator = Collator(processor)

        def collate(given):
            torch.manual_seed(len(given[0].id))
            batch = with_targets(collator(given), 8)
            missing = torch.tensor([sample.id in drop for sample in given])
            present = words_of_batch(batch).present & ~missing[:, None]
            return changed(batch, present=present, outcomes=missing.long())

        settings = {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "logging_steps": 2,
            "remove_unused_columns": False,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "use_cpu": True,
            "train_sampling_strategy": "sequential",
        }
        trainer = Trainer(
            model=student,
            args=TrainingArguments(tmp_path / "o", **settings | arguments),
            train_dataset=samples[:8],
            data_collator=collate,
            processing_class=processor,
        )
        if watched:
            trainer.add_callback(lavender.LavenderCallback(trainer, picture_steps=2))
        trainer.train()
        return trainer

    return train


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_parts_add_up_to_the_loss(tracked, accumulation):
    trainer = tracked(gradient_accumulation_steps=accumulation)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert entry["alignment_weight"] == 2
        assert entry["alignment_loss"] > 0
        assert entry["language_loss"] > 0
        assert entry["loss"] == pytest.approx(entry["language_loss"] + 2 * entry["alignment_loss"], abs=1e-4)


def test_the_language_loss_is_that_of_the_model(tracked, processor, samples):
    """With a learning rate of zero: the mean over four batches of what the unpatched model says."""
    trainer = tracked(learning_rate=0.0, logging_steps=4)
    torch.manual_seed(0)
    student = make_model(processor).train()
    losses = []
    for start in range(0, 8, 2):
        batch = Collator(processor)(samples[start : start + 2])
        losses.append(student(**without_lavender(batch)).loss.item())
    assert trainer.state.log_history[0]["language_loss"] == pytest.approx(sum(losses) / 4, abs=1e-4)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_steps_without_label_tokens_take_nothing_from_the_language_loss(share):
    """Of two steps one has none: the logged loss is the mean with its zero. Two processes may halve shares."""
    sums = _Sums()
    for part, loss in ((share, 3.0), (0.0, 0.0)):
        values = {"share": torch.tensor(part), "words": torch.tensor(2.0), "loss": torch.tensor(loss), "weight": 2.0}
        sums.add(SimpleNamespace(**values, outcomes=torch.zeros(5)))
        sums.end_step()
    assert sums.parts((5.0 + 2 * 3.0 + 0.0) / 2)["language_loss"] == pytest.approx(2.5)


def test_tensorboard_gets_parts_and_pictures(tracked, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracked(report_to=["tensorboard"])
    (folder,) = {path.parent for path in (tmp_path / "o").rglob("events.out.tfevents.*")}
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    scalars = events.Tags()["scalars"]
    for name in ("language_loss", "alignment_loss", "alignment_weight", "matched_words"):
        assert [event.step for event in events.Scalars(f"train/{name}")] == [2, 4], scalars
    assert events.Scalars("train/alignment_weight")[0].value == 2
    assert [event.step for event in events.Images("alignment/maps")] == [2, 4]
    assert sorted(path.name for path in (tmp_path / "o/maps").iterdir()) == ["step-000002.png", "step-000004.png"]


def test_other_trackers_of_pictures_get_them_too(tracked, monkeypatch):
    """Weights & Biases, by a stand-in of the two functions that are called."""
    seen = []

    class Wandb:
        Image = staticmethod(lambda figure: figure)
        log = staticmethod(lambda values: seen.append(values))

    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        _wandb = Wandb

    original = Trainer.__init__

    def with_callback(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Callback())

    monkeypatch.setattr(Trainer, "__init__", with_callback)
    tracked()
    assert [values["train/global_step"] for values in seen] == [2, 4]
    assert all(len(values["alignment/maps"].axes) == 12 for values in seen)


@pytest.mark.parametrize(("schedule", "expected"), [("constant", [2, 2, 2, 2]), ("linear", [2, 1.5, 1, 0.5])])
def test_lambda_falls_with_the_optimizers_steps(tracked, schedule, expected):
    config = AlignmentConfig(weight=2.0, aligner="identity", schedule=schedule)
    for accumulation in (1, 2):
        trainer = tracked(config, logging_steps=1, gradient_accumulation_steps=accumulation)
        assert [entry["alignment_weight"] for entry in trainer.state.log_history[:4]] == expected


def test_a_lambda_that_falls_needs_to_know_how_far_the_training_is(tracked, student, training_batch):
    config = AlignmentConfig(schedule="linear", weight=10.0, aligner="sim")
    with pytest.raises(ConfigError, match=r"lavender.LavenderCallback\(trainer\)"):
        tracked(config, watched=False)
    with lavender.patch(student.train(), config) as patch:  # a loop of one's own sets it
        patch.progress = 0.25
        student(**training_batch)
        assert patch.last.weight == 7.5


def test_samples_without_targets_are_counted(tracked, caplog):
    trainer = tracked(drop=("0", "1", "2"))
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert first["samples_no_target"] == 3
    assert "samples_no_target" not in second
    assert first["matched_words"] < second["matched_words"]
    assert any("no target: 3" in record.message for record in caplog.records)


def test_pictures_show_each_words_maps_under_its_name(student, processor, samples, training_batch):
    with lavender.patch(student, AlignmentConfig(aligner="identity", weight=10.0)) as patch:
        student(**training_batch)
        figure = draw(patch.last, processor)
    words = [ax.get_title() for ax in figure.axes[:6]]
    spoken = [word.text for sample in samples[:2] for word in Collator.words(sample.answer) if word.text not in OUTSIDE]
    assert words == spoken[:6]
    first, second = map(tuple, training_batch["lavender_present"].nonzero()[:2].tolist())
    shown = figure.axes[6].images[0].get_array()
    assert torch.equal(torch.as_tensor(shown.data), patch.last.aligned[first])
    assert torch.equal(torch.as_tensor(figure.axes[1].images[0].get_array().data), training_batch["lavender_targets"][second])


def test_losses_that_drop_the_models_own_are_refused(student, tmp_path):
    with lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")):
        for settings in ({"label_smoothing_factor": 0.1}, {}):
            arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, **settings)
            trainer = Trainer(model=student, args=arguments, compute_loss_func=None if settings else lambda *_, **__: 0)
            with pytest.raises(ConfigError, match="drops the model's loss"):
                lavender.LavenderCallback(trainer)


def test_a_model_that_is_not_patched_for_training_is_named(student, tmp_path):
    trainer = Trainer(model=student, args=TrainingArguments(tmp_path, report_to=[], use_cpu=True))
    with pytest.raises(ModelError, match=r"lavender.patch\(model, AlignmentConfig"):
        lavender.LavenderCallback(trainer)


def test_the_callback_stands_before_the_trackers(tracked):
    """They get what it adds to the log; every other callback keeps its place."""
    trainer = tracked(report_to=["tensorboard"])
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert names[0] == "LavenderCallback"
    assert names.count("LavenderCallback") == 1
    assert {"DefaultFlowCallback", "TensorBoardCallback"} <= {*names}


def test_watch_is_deprecated_and_adds_the_callback(student, tmp_path, monkeypatch):
    monkeypatch.setattr(lavender.errors, "_warned", set())
    trainer = Trainer(model=student, args=TrainingArguments(tmp_path, report_to=[], use_cpu=True))
    with lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")):
        with pytest.warns(FutureWarning, match=r"add_callback\(lavender.LavenderCallback\(trainer\)\)"):
            lavender.watch(trainer, picture_steps=3)
        assert trainer.callback_handler.callbacks[-1].picture_steps == 3
