"""Rows and heads by the role of a word under a Trainer, TRL's, and a loop of one's own: one step is that of the definition."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from datasets import Dataset
from matplotlib.image import imread
from transformers import Trainer, TrainingArguments

import lavender
from lavender.config import AlignmentConfig

from ..conftest import without_lavender, words_of_batch
from ..students.test_reading import by_definition, pick, with_roles

CONFIG = AlignmentConfig(
    aligner="identity", weight=2.0, rows="both", question_rows="last", heads="3.1,0.2", question_heads="1.0,3.1"
)
SETTINGS = {
    "answer": {"rows": "both", "heads": [(3, 1), (0, 2)]},
    "question": {"rows": "last", "heads": [(1, 0), (3, 1)]},
}


def plain_loop(student, batch, optimizer, processor, folder):
    student(**batch).loss.backward()
    optimizer.step()


def of_arguments(trainer_class, arguments_class, **more):
    def train(student, batch, optimizer, processor, folder):
        arguments = arguments_class(
            folder,
            max_steps=1,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=True,
            max_grad_norm=0.0,
            **more,
        )
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        trainer = trainer_class(
            model=student,
            args=arguments,
            train_dataset=Dataset.from_list([{"n": n} for n in range(8)]),
            data_collator=lambda rows: dict(batch),
            processing_class=processor,
            optimizers=(optimizer, constant),
        )
        trainer.add_callback(lavender.LavenderCallback(trainer, picture_steps=1))
        trainer.train()
        return trainer

    return train


def by_transformers(*arguments):
    return of_arguments(Trainer, TrainingArguments)(*arguments)


def by_trl(*arguments):
    from trl import SFTConfig, SFTTrainer

    return of_arguments(
        SFTTrainer, SFTConfig, bf16=False, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True}
    )(*arguments)


@pytest.mark.parametrize("train", [plain_loop, by_transformers, by_trl])
def test_a_step_is_that_of_the_definition(student, processor, batch, tmp_path, train):
    batch = with_roles(batch)
    words = words_of_batch(batch)
    eager = copy.deepcopy(student).double().train()
    eager.set_attn_implementation("eager")
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in without_lavender(batch).items()}
    output = eager(**inputs, output_attentions=True)
    attention = torch.stack(output.attentions, dim=1)
    term, aligned = by_definition(attention, words, SETTINGS, lambda own, maps: pick(own, maps).mean((0, 1)))
    (output.loss + 2 * term).backward()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    patch = lavender.patch(student.train(), CONFIG)
    trainer = train(student, batch, torch.optim.SGD(student.parameters(), lr=0.5), processor, tmp_path)
    whole = sum(p.grad.square().sum() for p in eager.parameters() if p.grad is not None).sqrt()
    for name, parameter in eager.named_parameters():
        step = (before[name] - student.get_parameter(name).detach()).double() / 0.5
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (step - wanted).norm() <= 1e-4 * whole, name
    torch.testing.assert_close(patch.last.loss, term.detach().float(), rtol=1e-4, atol=1e-5)
    for (b, w), one in aligned.items():
        torch.testing.assert_close(patch.last.aligned[b, w], one.detach().float(), rtol=1e-3, atol=1e-4)
    if trainer is None:
        return
    logged = trainer.state.log_history[0]
    assert logged["matched_words"] == words.present.sum()
    assert logged["alignment_loss"] == pytest.approx(term.item(), rel=1e-4)
    assert logged["loss"] == pytest.approx((output.loss + 2 * term).item(), rel=1e-4)
    picture = imread(io.BytesIO((tmp_path / "maps/step-000001.png").read_bytes()))
    assert picture.shape[1] > picture.shape[0]  # six words, side by side
