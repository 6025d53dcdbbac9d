"""An alignment that ends before the training does: what is left is the student's own training, at its own cost."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

import lavender
from lavender.config import AlignmentConfig
from lavender.errors import ConfigError
from lavender.kernels.row_maps import row_maps
from lavender.students import registry

from ..conftest import without_lavender


@pytest.fixture
def calls(monkeypatch):
    """The word rows of every layer that is read."""
    calls = []

    def counted(query, key, rows, *args, **kwargs):
        calls.append(rows)
        return row_maps(query, key, rows, *args, **kwargs)

    monkeypatch.setattr(registry, "row_maps", counted)
    return calls


def test_after_its_end_the_student_trains_alone(student, training_batch, calls):
    """To the last bit, with nothing captured; and the term is a zero, for a loss of one's own."""
    student.train()
    plain = copy.deepcopy(student)
    expected = plain(**without_lavender(training_batch)).loss
    expected.backward()
    with lavender.patch(student, AlignmentConfig(aligner="identity", until=0.5, weight=10.0, question_rows=None)) as patch:
        with pytest.raises(ConfigError, match=r"until=0\.5.*LavenderCallback"):
            student(**training_batch)
        calls.clear()
        patch.progress = 0.49
        assert student(**training_batch).loss > expected
        assert len(calls) == 4
        calls.clear()
        patch.progress = 0.5
        loss = student(**training_batch).loss
        assert not calls
        assert torch.equal(loss, expected)
        assert (patch.term, patch.last.weight, patch.last.loss, patch.last.aligned) == (0, 0, 0, None)
        assert patch.last.words == 0
        loss.backward()
        for (name, ours), theirs in zip(student.named_parameters(), plain.parameters(), strict=True):
            assert ours.grad is None if theirs.grad is None else torch.equal(ours.grad, theirs.grad), name
        with torch.no_grad():  # who looks at it still sees it
            assert student(**training_batch).loss == expected
            assert patch.last.loss > 0
            assert patch.align(**training_batch).any()
    empty = training_batch | {"labels": torch.full_like(training_batch["labels"], -100)}
    with lavender.patch(student, AlignmentConfig(aligner="identity", until=0.5, weight=10.0, question_rows=None)) as patch:
        patch.progress = 0.9
        assert student(**empty).loss == 0  # and no 0 / 0


def test_the_weights_of_an_aligner_stay_in_use(student, training_batch):
    """Engines that exchange gradients wait for those of every weight."""
    student.train()
    with lavender.patch(student, AlignmentConfig(until=0.5, weight=10.0, aligner="sim", question_rows=None)) as patch:
        patch.progress = 0.6
        loss = student(**training_batch).loss
        torch.testing.assert_close(loss, student(**without_lavender(training_batch)).loss)
        loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in student.lavender.parameters())


@pytest.mark.parametrize("aligner", ["identity", "light"])
def test_a_trainer_ends_the_alignment(student, training_batch, tmp_path, aligner):
    lavender.patch(student, AlignmentConfig(aligner=aligner, until=0.5, weight=2.0, question_rows=None))
    arguments = TrainingArguments(
        tmp_path,
        max_steps=6,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=student, args=arguments, train_dataset=[0] * 8, data_collator=lambda rows: training_batch)
    trainer.add_callback(lavender.LavenderCallback(trainer, picture_steps=1))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "alignment_weight" in entry]
    assert [entry["alignment_weight"] for entry in entries] == [2, 2, 2, 0, 0, 0]
    assert [entry["matched_words"] > 0 for entry in entries] == [True] * 3 + [aligner != "identity"] * 3
    assert all(entry["language_loss"] == pytest.approx(entry["loss"], abs=1e-4) for entry in entries[3:])
    assert len(list((tmp_path / "maps").iterdir())) == (3 if aligner == "identity" else 6)
