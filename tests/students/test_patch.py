"""Capture in a transformers model: exact, invisible, differentiable, and gone when it is undone."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lavender
from lavender.batches.collator import Collator
from lavender.config import AlignmentConfig
from lavender.errors import CaptureError, ModelError
from lavender.students.families import student_family

from ..conftest import changed, without_lavender, words_of_batch


@pytest.fixture(scope="module", autouse=True)
def only_these_tests_objects_are_collected():
    """What was imported and built before is left out: the collections below are quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def registry_is_left_as_it_was():
    gc.collect()  # models that other tests dropped
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping
    yield
    gc.collect()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping


def eager_rows(model, batch, dtype=torch.float64, rows="predicts"):
    """[B, L, H, W, 8, 8] from eager attention: the mean over each word's rows, at the image tokens."""
    eager = copy.deepcopy(model).to(dtype)
    eager.set_attn_implementation("eager")
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in without_lavender(batch).items()}
    attentions = torch.stack(eager(**inputs, output_attentions=True).attentions, dim=1)
    words = words_of_batch(batch)
    num_words = words.present.shape[1]
    maps = attentions.new_zeros(*attentions.shape[:3], num_words, 64)
    for b in range(len(attentions)):
        for w in range(num_words):
            word_rows = words.tokens[b][words.token_words[b] == w] - int(rows == "predicts")
            if len(word_rows):
                maps[b, :, :, w] = attentions[b][:, :, word_rows][..., words.image_positions[b]].mean(2)
    return maps.unflatten(-1, (8, 8))


@pytest.mark.parametrize("rows", ["predicts", "reads"])
def test_maps_equal_eager_attention_in_float64(student, batch, rows):
    """The row that predicts a token is the one before it: the config's choice, or the call's."""
    with lavender.patch(student) as patch, torch.no_grad():
        maps = patch.capture(rows, **batch)
        default = patch.capture(**batch)
    assert maps.shape[:3] == (4, 4, 4)
    assert torch.equal(maps, default) == (rows == "predicts")
    torch.testing.assert_close(maps.double(), eager_rows(student, batch, rows=rows), rtol=0, atol=1e-6)


def test_the_tokens_of_words_are_labels_too(processor, samples, batch):
    valid = batch["lavender_tokens"] >= 0
    for b in range(2):
        at = batch["lavender_tokens"][b][valid[b]]
        words = [w.text for w in Collator.words(samples[b].answer)]
        assert processor.tokenizer.decode(batch["input_ids"][b][at]).split() == words
        assert torch.equal(batch["labels"][b][at], batch["input_ids"][b][at])


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_outputs_are_bit_identical_on_a_padded_batch(student, processor, samples, padding_side):
    padded = copy.deepcopy(processor)
    padded.tokenizer.padding_side = padding_side
    batch = Collator(padded)(samples[:4])
    assert not batch["attention_mask"].all(), "the batch is meant to be padded"
    plain = student(**without_lavender(batch))
    with lavender.patch(student) as patch:
        inert = student(**without_lavender(batch))
        captured = student(**batch)
        maps = patch.capture(**batch)
    assert torch.equal(inert.logits, plain.logits)
    assert torch.equal(captured.logits, plain.logits)
    assert torch.equal(captured.loss, plain.loss)
    # In float32: eager attention turns a left-padded row of a float64 model into NaN.
    torch.testing.assert_close(maps, eager_rows(student, batch, torch.float32), rtol=0, atol=1e-6)


def test_generation_is_untouched(student, batch):
    inputs = {
        k: v[:, :80] if k in ("input_ids", "attention_mask") else v for k, v in without_lavender(batch).items() if k != "labels"
    }
    plain = student.generate(**inputs, max_new_tokens=5, do_sample=False)
    with lavender.patch(student):
        assert torch.equal(student.generate(**inputs, max_new_tokens=5, do_sample=False), plain)


def test_unpatch_restores_the_very_objects(student):
    hooks_before = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in student.named_modules()}
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    state_before = list(student.state_dict())
    patch = lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim"))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not original
    patch.unpatch()
    patch.unpatch()
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in student.named_modules()} == hooks_before
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original
    assert list(student.state_dict()) == state_before
    assert not hasattr(student, "_lavender_patch")


def test_an_exception_leaves_nothing_behind(student, batch):
    with pytest.raises(ZeroDivisionError), lavender.patch(student):
        raise ZeroDivisionError
    patch = lavender.patch(student)
    with pytest.raises(ValueError):
        student(**{**batch, "pixel_values": batch["pixel_values"][:, :, :5]})
    plain = without_lavender(batch)
    student(**plain)  # the failed forward's request must not reach this one
    assert patch._active is None
    patch.unpatch()


def test_patching_twice_is_one_patch(student):
    patch = lavender.patch(student)
    assert lavender.patch(student) is patch
    trained = lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim"))
    assert not patch.is_patched
    assert trained.is_patched
    assert lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")) is trained
    trained.unpatch()


def test_looking_at_a_model_in_training_leaves_its_patch(student, training_batch):
    plain = student(**without_lavender(training_batch)).loss
    patch = lavender.patch(student, AlignmentConfig(weight=1, aligner="sim"))
    with lavender.patch(student) as looking:
        looking.capture(**training_batch)
    assert patch.is_patched
    assert student(**training_batch).loss > plain
    with patch:
        pass
    assert not patch.is_patched


def test_two_patched_models_do_not_mix(student, batch):
    other = copy.deepcopy(student)
    torch.nn.init.normal_(other.model.language_model.layers[0].self_attn.q_proj.weight)
    with torch.no_grad(), lavender.patch(student) as one:
        alone = one.capture(**batch)
        with lavender.patch(other) as two:
            assert not torch.equal(two.capture(**batch), alone)
            assert torch.equal(one.capture(**batch), alone)
        assert torch.equal(one.capture(**batch), alone)


def test_a_deepcopy_of_a_patched_model_is_independent(student, batch):
    with torch.no_grad(), lavender.patch(student) as patch:
        maps = patch.capture(**batch)
        twin = copy.deepcopy(student)
        torch.nn.init.normal_(student.model.language_model.layers[0].self_attn.q_proj.weight)
        assert torch.equal(twin._lavender_patch.capture(**batch), maps)
        assert not torch.equal(patch.capture(**batch), maps)
        patch.unpatch()
        assert torch.equal(twin._lavender_patch.capture(**batch), maps)
        twin._lavender_patch.unpatch()


def test_a_dropped_model_lets_go_of_the_registry(processor):
    from recipes.student import make_model

    lavender.patch(make_model(processor))
    gc.collect()
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping


def test_chosen_layers_are_captured(student, batch):
    with torch.no_grad(), lavender.patch(student) as patch:
        everything = patch.capture(**batch)
    with torch.no_grad(), lavender.patch(student, AlignmentConfig(layers=(3, 1), weight=10.0, aligner="sim")) as patch:
        assert torch.equal(patch.capture(**batch), everything[:, [3, 1]])


def test_renormalized_maps_sum_to_one(student, batch):
    with torch.no_grad(), lavender.patch(student, AlignmentConfig(renormalize=True, weight=10.0, aligner="sim")) as patch:
        sums = patch.capture(**batch).sum((-2, -1))
    there = (batch["lavender_token_words"][:, None] == torch.arange(sums.shape[-1])[:, None]).any(dim=2)  # compared or not
    torch.testing.assert_close(sums, there.float()[:, None, None].expand_as(sums), rtol=0, atol=1e-5)


@pytest.mark.parametrize("aligner", ["sim", "identity"])
def test_the_loss_is_language_loss_plus_weighted_alignment(student, training_batch, aligner):
    plain = student(**without_lavender(training_batch)).loss
    with lavender.patch(student, AlignmentConfig(weight=3.0, aligner=aligner)) as patch:
        output = student(**training_batch)
        assert patch.last.loss > 0
        torch.testing.assert_close(output.loss, plain + 3.0 * patch.last.loss)
        as_tuple = student(**training_batch, return_dict=False)
        assert torch.equal(as_tuple[0], output.loss)


def test_the_identity_aligner_trains_on_the_mean_over_heads_alone(student, training_batch):
    """No map per head is made in training; term and gradients are those of the mean over maps that keep their heads."""
    student = student.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in training_batch.items() if k != "labels"}
    with lavender.patch(student, AlignmentConfig(aligner="identity", weight=1.0)) as patch:
        kept = patch.capture(**batch)
        words = words_of_batch(batch)
        expected = mean_loss(student.lavender(kept, lambda maps: maps, words.targets, words.present)[0], batch)
        wanted = torch.autograd.grad(expected, student.model.language_model.layers[0].self_attn.q_proj.weight)[0]
        seen = []
        student.lavender.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[2]))
        loss = student(**batch).loss
        found = torch.autograd.grad(loss, student.model.language_model.layers[0].self_attn.q_proj.weight)[0]
    assert kept.shape[2] == 4
    assert seen == [1]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, wanted)


def mean_loss(per_word, batch):
    return per_word.sum() / batch["lavender_present"].sum()


def language_gradients(model):
    layers = model.model.language_model.layers
    return {(i, n): getattr(layer.self_attn, n).weight.grad for i, layer in enumerate(layers) for n in ("q_proj", "k_proj")}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_alignment_gradient_reaches_q_and_k_of_every_layer(student, training_batch, checkpointing):
    student.train()
    no_labels = {k: v for k, v in training_batch.items() if k != "labels"}
    if checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")):
        student(**no_labels).loss.backward()  # no labels: the loss is the alignment alone
        gradients = language_gradients(student)
        assert len(gradients) == 8
        assert all(g is not None and g.norm() > 1e-4 for g in gradients.values())
        if checkpointing:
            student.gradient_checkpointing_disable()
            student.zero_grad()
            student(**no_labels).loss.backward()
            for name, gradient in language_gradients(student).items():
                torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-8)


def test_the_gradient_equals_that_of_eager_attention(student, training_batch):
    """The whole chain - capture, aligner, loss - against the same chain on eager attention, in float64."""
    student = student.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in training_batch.items() if k != "labels"}
    with lavender.patch(student, AlignmentConfig(weight=1.0, aligner="sim")):
        student(**batch).loss.backward()
        captured = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
        alignment = student.lavender
        student.zero_grad()
        student.set_attn_implementation("eager")
        inputs = dict(without_lavender(batch).items())
        attentions = torch.stack(student(**inputs, output_attentions=True).attentions, dim=1)
        words = words_of_batch(batch)
        indicator = torch.zeros(4, words.present.shape[1], attentions.shape[3], dtype=torch.float64)
        for b in range(4):
            for row, word, share in zip(words.tokens[b], words.token_words[b], words.token_weights[b], strict=True):
                if word >= 0:
                    indicator[b, word, row - 1] = share
        columns = words.image_positions[:, None, None, None].expand(-1, 4, 4, attentions.shape[3], -1)
        maps = (indicator[:, None, None] @ attentions.gather(4, columns)).unflatten(-1, (8, 8))
        per_word, _ = alignment(maps, lambda maps: maps, words.targets, words.present)
        mean_loss(per_word, batch).backward()
        student.set_attn_implementation("sdpa")
    assert captured.keys() == {n for n, p in student.named_parameters() if p.grad is not None} | {
        n for n in captured if n.startswith("lavender.")
    }
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            # transformers' eager softmax runs in float32 whatever the model's dtype.
            assert (captured[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm() + 1e-10, name


def test_reentrant_checkpointing_is_refused(student, training_batch):
    student.train()
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")), pytest.raises(CaptureError, match="use_reentrant"):
        student(**training_batch)


def test_no_matched_word_adds_exactly_zero(student, training_batch):
    training_batch = changed(training_batch, present=torch.zeros_like(words_of_batch(training_batch).present))
    plain = student(**without_lavender(training_batch)).loss
    with lavender.patch(student, AlignmentConfig(weight=1000, aligner="sim")) as patch:
        assert torch.equal(student(**training_batch).loss, plain)
        assert patch.last.loss == 0


def test_a_weight_of_zero_leaves_the_loss(student, training_batch):
    plain = student(**without_lavender(training_batch)).loss
    with lavender.patch(student, AlignmentConfig(weight=0, aligner="sim")):
        assert torch.equal(student(**training_batch).loss, plain)


def test_the_term_is_scaled_as_the_trainer_expects(student, training_batch):
    """A micro-batch that holds a quarter of the step's label tokens carries a quarter of the alignment loss."""
    plain = without_lavender(training_batch)
    total = 4 * (training_batch["labels"] != -100).sum()
    expected = student(**plain, num_items_in_batch=total).loss
    with lavender.patch(student, AlignmentConfig(weight=2, aligner="sim")) as patch:
        loss = student(**training_batch, num_items_in_batch=total).loss
        torch.testing.assert_close(loss, expected + 2 * patch.last.loss / 4)


def test_half_precision_students_are_captured(student, training_batch):
    half = copy.deepcopy(student).bfloat16()
    batch = {k: v.bfloat16() if k == "pixel_values" else v for k, v in training_batch.items()}
    with (
        torch.no_grad(),
        lavender.patch(student) as exact,
        lavender.patch(half, AlignmentConfig(weight=10.0, aligner="sim")) as patch,
    ):
        maps, reference = patch.capture(**batch), exact.capture(**training_batch)
        assert maps.dtype == torch.float32
        assert (maps - reference).norm() / reference.norm() < 0.02
        assert torch.isfinite(half(**batch).loss)


def test_frozen_aligners_are_refused_with_the_remedy(student, training_batch):
    from peft import LoraConfig, get_peft_model

    student.train()
    lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim"))
    wrapped = get_peft_model(student, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(CaptureError, match=r"modules_to_save=\['lavender'\]"):
        wrapped(**training_batch)
    lavender.patch(wrapped).unpatch()


def test_a_peft_model_trains_adapter_and_aligner(student, training_batch):
    from peft import LoraConfig, get_peft_model

    student.train()
    patch = lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim"))
    wrapped = get_peft_model(student, LoraConfig(target_modules=["q_proj"], modules_to_save=["lavender"]))
    assert lavender.patch(wrapped) is patch
    wrapped(**{k: v for k, v in training_batch.items() if k != "labels"}).loss.backward()
    with_gradient = {n for n, p in wrapped.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("language_model.layers.0.self_attn.q_proj.lora_B" in n for n in with_gradient)
    assert any("lavender.modules_to_save.default.aligner" in n for n in with_gradient)
    patch.unpatch()
    assert wrapped.peft_config["default"].modules_to_save is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b.pop("lavender_columns"), "lacks lavender_columns"),
        (lambda b: b.update(inputs_embeds=None, input_ids=None), "input_ids"),
    ],
)
def test_incomplete_batches_are_refused(student, batch, spoil, message):
    spoil(batch)
    with lavender.patch(student), pytest.raises(CaptureError, match=message):
        student(**batch)


def test_changing_the_attention_after_patching_is_noticed(student, batch):
    with lavender.patch(student):
        student.set_attn_implementation("eager")
        with pytest.raises(CaptureError, match="recorded nothing"):
            student(**batch)
        student.set_attn_implementation("sdpa")


def test_decoding_steps_are_refused(student, batch):
    with lavender.patch(student) as patch:
        cache = student(**without_lavender(batch), use_cache=True).past_key_values
        with pytest.raises(CaptureError, match="use_cache=False"):
            student(
                **{k: v for k, v in batch.items() if k not in ("labels", "pixel_values", "attention_mask")}, past_key_values=cache
            )
        assert patch._active is None


def test_models_that_cannot_be_patched_are_named(student):
    with pytest.raises(ModelError, match="Linear"):
        lavender.patch(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="int"):
        lavender.patch(3)
    student.model.language_model.config._attn_implementation = "paged|eager"
    with pytest.raises(ModelError, match="set_attn_implementation"):
        lavender.patch(student)
    student.model.language_model.config._attn_implementation = "sdpa"
    with pytest.raises(ModelError, match="layers 0 to 3"):
        lavender.patch(student, AlignmentConfig(layers=(4,), weight=10.0, aligner="sim"))
    with pytest.raises(ModelError, match="qwen9_vl"):
        student_family("qwen9_vl")


def test_a_with_around_the_patch_ends_it_whoever_asked_for_it_again(student):
    with lavender.patch(student) as patch:
        assert lavender.patch(student) is patch
    assert not patch.is_patched


def test_an_aligner_in_training_is_not_thrown_away(student):
    patch = lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim"))
    with pytest.raises(ModelError, match="aligner would be lost"):
        lavender.patch(student, AlignmentConfig(weight=3.0, aligner="sim"))
    assert patch.is_patched
    patch.unpatch()
    with pytest.raises(CaptureError, match="patch was undone"):
        patch.capture(lavender_tokens=None)


def test_ids_may_come_by_position(student, batch):
    ids = batch.pop("input_ids")
    batch.pop("labels")
    with torch.no_grad(), lavender.patch(student):
        student(ids, **batch)  # captured: nothing is refused
        assert student._lavender_patch._active is None


def test_an_encoder_decoder_is_captured_and_not_trained():
    from .zoo import built

    florence = built("florence2")
    with pytest.raises(ModelError, match="encoder-decoder"):
        lavender.patch(florence.model, AlignmentConfig(weight=10.0, aligner="sim"))
    assert not student_family("florence2").collates
