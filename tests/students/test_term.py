"""The alignment term joins a loss and reaches the optimizer; the aligner's weights are trained and saved, or an error raised."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

import lavender
from lavender.batches.collator import Collator
from lavender.config import AlignmentConfig
from lavender.errors import CaptureError, ModelError
from lavender.training.train import load_aligner

from ..conftest import changed, with_targets, without_lavender, words_of_batch


def trainer_of(student, batch, folder, kind=Trainer, optimizers=(None, None), compute_loss_func=None, **arguments):
    """A Trainer of a few steps, each over the same batch."""
    arguments = TrainingArguments(
        folder, max_steps=2, report_to=[], save_strategy="no", remove_unused_columns=False, disable_tqdm=True, **arguments
    )
    return kind(
        model=student,
        args=arguments,
        train_dataset=[0] * 8,
        data_collator=lambda rows: batch,
        optimizers=optimizers,
        compute_loss_func=compute_loss_func,
    )


def cross_entropy(outputs, labels):
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        loss = cross_entropy(model(**inputs), labels)
        return (loss, None) if return_outputs else loss


class OwnLossAndTerm(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = cross_entropy(model(**inputs), inputs["labels"]) + model._lavender_patch.term
        return (loss, None) if return_outputs else loss


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "how",
    [
        {"label_smoothing_factor": 0.1},
        {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: cross_entropy(outputs, labels)},
        {"kind": OwnLoss},
    ],
    ids=["label_smoothing_factor", "compute_loss_func", "compute_loss"],
)
def test_a_trainer_that_drops_the_models_loss_is_stopped_in_its_first_step(student, training_batch, tmp_path, how, accumulation):
    lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim"))
    before = copy.deepcopy(student.state_dict())
    trainer = trainer_of(student, training_batch, tmp_path, gradient_accumulation_steps=accumulation, **how)
    with pytest.raises(CaptureError, match=r"does not hold the alignment.*label_smoothing_factor.*patch\.term"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_loss_of_ones_own_takes_the_term(student, training_batch, tmp_path):
    """It then trains as the model's own loss does."""
    student.train()
    trained = []
    for kind in (Trainer, OwnLossAndTerm):
        twin = copy.deepcopy(student)
        torch.manual_seed(0)
        lavender.patch(twin, AlignmentConfig(weight=10.0, aligner="sim"))
        trainer_of(twin, training_batch, tmp_path, kind).train()
        trained.append(twin.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "config",
    [AlignmentConfig(weight=10.0, aligner="sim"), AlignmentConfig(aggregation="learned", aligner="identity", weight=10.0)],
    ids=str,
)
@pytest.mark.parametrize("left_out", ["all", "last"])
def test_an_aligner_that_no_optimizer_has_is_noticed(student, training_batch, config, left_out):
    """Made before the patch, an optimizer has none of its weights; made by hand, it may lack some."""
    student.train()
    with lavender.patch(student, config):
        names = [name for name, _ in student.named_parameters() if name.startswith("lavender.")]
        lacking = names if left_out == "all" else names[-1:]
        optimizer = torch.optim.AdamW([p for name, p in student.named_parameters() if name not in lacking], lr=1e-3)
        student(**training_batch).loss.backward()
        student(**training_batch).loss.backward()  # accumulated: no step was made
        optimizer.step()
        with pytest.raises(
            CaptureError, match=rf"left {len(lacking)} weights of the aligner.*such as lavender\..*after lavender.patch"
        ):
            student(**training_batch)


def test_a_frozen_student_may_stay_as_it_is(student, training_batch):
    student.train().requires_grad_(False)
    with lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")):
        optimizer = torch.optim.SGD(student.lavender.parameters(), lr=1e-2)
        losses = []
        for _ in range(3):
            loss = student(**training_batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[2] < losses[0]


def test_a_loss_of_shares_is_refused(student, training_batch, monkeypatch):
    """A model whose loss is one number per sample: where the term would be added, it would count once for each."""
    forward = type(student).forward

    def per_sample(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.loss = output.loss.expand(4)
        return output

    with lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")):
        monkeypatch.setattr(type(student), "forward", per_sample)
        with pytest.raises(CaptureError, match=r"loss is of shape \(4,\)"):
            student(**training_batch)


@pytest.mark.parametrize("trains", [False, True])
def test_a_tuple_without_a_loss_stays_as_it_is(student, training_batch, trains):
    student.train(trains)
    batch = {name: value for name, value in training_batch.items() if name != "labels"}
    plain = student(**without_lavender(batch), return_dict=False)
    with lavender.patch(student, AlignmentConfig(weight=1000.0, aligner="sim")) as patch:
        output = student(**batch, return_dict=False)
        assert patch.last.loss > 0
        assert len(output) == len(plain)
        assert torch.equal(output[0], plain[0])
        if trains:
            with pytest.raises(CaptureError, match="does not hold the alignment"):
                output[0].sum().backward()


def test_a_batch_without_label_tokens_has_the_term_alone(student, training_batch):
    """The mean over no tokens is NaN."""
    batch = training_batch | {"labels": torch.full_like(training_batch["labels"], -100)}
    assert student(**without_lavender(batch)).loss.isnan()
    with lavender.patch(student, AlignmentConfig(weight=2.0, aligner="sim")) as patch:
        student.train()
        loss = student(**batch).loss
        torch.testing.assert_close(loss, 2 * patch.last.loss)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
        nothing = changed(batch, present=torch.zeros_like(words_of_batch(batch).present))
        assert student(**nothing).loss == 0


def test_a_training_without_targets_is_noticed_once(student, batch, caplog):
    student.train()
    with lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")), caplog.at_level(logging.WARNING, "lavender"):
        student.eval()(**without_lavender(batch))
        assert not caplog.records
        student.train()(**without_lavender(batch))
        student(**without_lavender(batch))
        student(**batch)
    assert [record.getMessage()[:37] for record in caplog.records] == ["a batch without lavender's keys train"]


PEFT_KINDS = {
    "LoRA": lambda peft: peft.LoraConfig(target_modules=["q_proj"]),
    "IA3": lambda peft: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "prompt tuning": lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_an_aligner_patched_onto_a_peft_model_is_trained_saved_and_loaded(student, training_batch, tmp_path, kind):
    import peft

    wrapped = peft.get_peft_model(student, PEFT_KINDS[kind](peft))
    patch = lavender.patch(wrapped, AlignmentConfig(weight=10.0, aligner="sim"))
    wrapped.train()
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    wrapped(**training_batch).loss.backward()
    optimizer.step()
    trained = {name: value for name, value in student.lavender.state_dict().items() if "modules_to_save" in name}
    wrapped.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, value in trained.items():
        key = next(key for key in saved if key.endswith("lavender." + name.removeprefix("modules_to_save.default.")))
        assert torch.equal(saved[key], value)
    assert any((value != student.lavender.original_module.state_dict()[name[24:]]).any() for name, value in trained.items())
    patch.unpatch()
    assert wrapped.peft_config["default"].modules_to_save is None


def test_an_aligner_beside_an_adapter_that_would_not_save_it_is_refused(student, training_batch):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(student, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="pass the PeftModel"):
        lavender.patch(wrapped.get_base_model(), AlignmentConfig(weight=10.0, aligner="sim"))
    assert not hasattr(student, "lavender")
    wrapped.add_adapter("more", LoraConfig(target_modules=["v_proj"]))
    wrapped.base_model.set_adapter(["default", "more"])
    with pytest.raises(ModelError, match=r"'default' \(LORA\), 'more' \(LORA\)"):
        lavender.patch(wrapped, AlignmentConfig(weight=10.0, aligner="sim"))
    # No weights, nothing to save.
    lavender.patch(wrapped, AlignmentConfig(aligner="identity", weight=10.0)).unpatch()


def test_an_adapter_of_transformers_is_refused(student):
    from peft import LoraConfig

    student.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="modules_to_save"):
        lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim"))


def test_an_aligner_unfrozen_beside_an_adapter_is_refused(student, training_batch):
    from peft import LoraConfig, get_peft_model

    lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim"))
    wrapped = get_peft_model(student, LoraConfig(target_modules=["q_proj"])).train()
    student.lavender.requires_grad_(True)
    with pytest.raises(CaptureError, match=r"does not save it.*modules_to_save=\['lavender'\]"):
        wrapped(**training_batch)


def test_a_patched_model_generates_from_a_collated_batch(student, training_batch):
    inputs = {name: training_batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    plain = student.generate(**inputs, max_new_tokens=4, do_sample=False)
    with lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")):
        assert torch.equal(student.generate(**training_batch, max_new_tokens=4, do_sample=False), plain)
        twin = copy.deepcopy(student)
        torch.nn.init.zeros_(twin.lm_head.weight)
        assert not torch.equal(twin.generate(**training_batch, max_new_tokens=4, do_sample=False), plain)
        twin._lavender_patch.unpatch()
    assert "generate" not in vars(student)


def test_a_saved_model_is_plain_and_its_aligner_lies_beside_it(student, processor, samples, tmp_path):
    """A Trainer's checkpoints hold the aligner among the weights, and continue to the weights of an undisturbed run."""

    def trainer(folder):
        torch.manual_seed(3)
        twin = copy.deepcopy(student)
        lavender.patch(twin, AlignmentConfig(weight=10.0, aligner="sim"))
        collator = Collator(processor)
        torch.manual_seed(4)
        batches = [with_targets(collator(samples[n : n + 2]), 8) for n in range(0, 8, 2)]
        arguments = TrainingArguments(
            folder, max_steps=4, save_steps=2, report_to=[], remove_unused_columns=False, per_device_train_batch_size=1,
            disable_tqdm=True,
        )  # fmt: skip
        return Trainer(model=twin, args=arguments, train_dataset=list(range(4)), data_collator=lambda rows: batches[rows[0]])

    whole = trainer(tmp_path / "run")
    whole.train()
    again = trainer(tmp_path / "run")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    again.save_model(str(tmp_path / "saved"))
    assert not any(name.startswith("lavender.") for name in load_file(tmp_path / "saved" / "model.safetensors"))
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    fresh = lavender.patch(loaded, AlignmentConfig(weight=10.0, aligner="sim"))
    load_aligner(fresh, tmp_path / "saved")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("around", ["forward", "part"])
def test_a_batch_that_goes_around_the_patched_model_is_refused(student, training_batch, around):
    """Its loss, to which the term is added, would not be there."""
    batch = {name: value for name, value in training_batch.items() if name != "labels"}
    with (
        lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")),
        pytest.raises(CaptureError, match="went around the patched Llava"),
    ):
        student.forward(**batch) if around == "forward" else student.model(**batch)


def test_what_is_dropped_in_eval_mode_or_behind_a_frozen_tower_is_noticed(student, training_batch):
    with lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")):
        with pytest.raises(CaptureError, match="does not hold the alignment"):
            cross_entropy(student.eval()(**training_batch), training_batch["labels"]).backward()
        student.requires_grad_(False)
        student.lm_head.requires_grad_(True)
        student.lavender.requires_grad_(True)
        with pytest.raises(CaptureError, match="does not hold the alignment"):
            cross_entropy(student.train()(**training_batch), training_batch["labels"]).backward()


def test_an_aligner_that_an_adapter_was_saved_with_is_not_replaced(student, training_batch, tmp_path):
    """Patched after the adapter was loaded, it would be a new one."""
    from peft import LoraConfig, PeftModel, get_peft_model

    plain = copy.deepcopy(student)
    wrapped = get_peft_model(student, LoraConfig(target_modules=["q_proj"]))
    lavender.patch(wrapped, AlignmentConfig(weight=10.0, aligner="sim"))
    torch.nn.init.normal_(student.lavender.modules_to_save["default"].aligner.blocks[0].weight)
    wrapped.save_pretrained(tmp_path)
    late = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path, is_trainable=True)
    with pytest.raises(ModelError, match=r"patch the model before get_peft_model or PeftModel\.from_pretrained"):
        lavender.patch(late, AlignmentConfig(weight=10.0, aligner="sim"))
    lavender.patch(plain, AlignmentConfig(weight=10.0, aligner="sim"))
    again = PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    assert torch.equal(again.train()(**training_batch).loss, wrapped.train()(**training_batch).loss)


@pytest.mark.parametrize("folder", ["checkpoints", "checkpoint-final", "final"])
def test_only_a_trainers_checkpoints_hold_the_aligner_among_the_weights(student, tmp_path, folder):
    with lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")) as patch:
        student.save_pretrained(tmp_path / folder)
        load_aligner(patch, tmp_path / folder)
    assert not any(name.startswith("lavender.") for name in load_file(tmp_path / folder / "model.safetensors"))
