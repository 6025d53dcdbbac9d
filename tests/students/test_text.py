"""Maps are read at the batch's own words, whatever stands before them; a forward over another text is refused."""

from __future__ import annotations

import copy

import pytest
import torch

import lavender
from lavender.config import AlignmentConfig
from lavender.errors import CaptureError
from lavender.students.discovery import attention_modules, text_tower

from ..conftest import changed, with_targets, without_lavender, words_of_batch
from .zoo import built

NUM_VIRTUAL = 5


def tuned(model, kind):
    import peft

    made = {
        "prompt tuning": peft.PromptTuningConfig,
        "p-tuning": peft.PromptEncoderConfig,
        "prefix tuning": peft.PrefixTuningConfig,
    }
    torch.manual_seed(2)
    return peft.get_peft_model(model, made[kind](task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL))


def maps_by_eager(model, batch, attentions, shift, shift_of_keys):
    """[B, L, H, W, M] of a batch from all attention weights, with the positions of text shifted."""
    words = words_of_batch(batch)
    attentions = torch.stack(attentions, dim=1)
    maps = attentions.new_zeros(*attentions.shape[:3], words.present.shape[1], words.image_positions.shape[1])
    for b in range(len(maps)):
        for w in range(maps.shape[3]):
            rows = words.tokens[b][words.token_words[b] == w] - 1 + shift
            if len(rows):
                maps[b, :, :, w] = attentions[b][:, :, rows][..., words.image_positions[b] + shift_of_keys].mean(2)
    return maps


@pytest.mark.parametrize("patched_first", [False, True])
@pytest.mark.parametrize("kind", ["prompt tuning", "p-tuning"])
def test_virtual_tokens_shift_rows_and_keys(student, batch, kind, patched_first):
    """PEFT puts them before the text, as embeddings in place of ids."""
    eager = copy.deepcopy(student)
    eager.set_attn_implementation("eager")
    batch = changed(batch, boxes=None)
    with torch.no_grad():
        attentions = tuned(eager, kind)(**without_lavender(batch), output_attentions=True, use_cache=False).attentions
        expected = maps_by_eager(eager, batch, attentions, NUM_VIRTUAL, NUM_VIRTUAL)
        if patched_first:
            lavender.patch(student)
        wrapped = tuned(student, kind)
        patch = lavender.patch(wrapped)
        plain = wrapped(**without_lavender(batch)).logits
        assert torch.equal(wrapped(**batch).logits, plain)
        maps = patch.capture(**batch)
    torch.testing.assert_close(maps, expected, rtol=0, atol=2e-6)
    patch.unpatch()


@pytest.mark.parametrize("aggregation", ["project_mean", "parallel"])
@pytest.mark.parametrize("kind", ["prompt tuning", "p-tuning"])
def test_a_prompt_is_tuned_by_the_maps_behind_it(student, batch, kind, aggregation):
    """Term and gradient are those of the same embeddings given as a text of their own, in float64."""
    student = student.double()
    batch = with_targets(batch, 8)
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    config = AlignmentConfig(weight=1.0, aligner="identity", aggregation=aggregation, parallel_heads=2)
    twin = copy.deepcopy(student)
    torch.manual_seed(0)
    lavender.patch(twin, config)
    wrapped = tuned(student, kind).double()
    torch.manual_seed(0)
    patch = lavender.patch(wrapped, config)
    loss = wrapped(**batch).loss
    prompt = wrapped.get_prompt(4)
    words = words_of_batch(batch)
    ids = batch["input_ids"]
    longer = changed(
        batch,
        tokens=torch.where(words.tokens >= 0, words.tokens + NUM_VIRTUAL, -1),
        image_positions=torch.where(words.image_positions >= 0, words.image_positions + NUM_VIRTUAL, -1),
        input_ids=torch.nn.functional.pad(ids, (NUM_VIRTUAL, 0)),
    )
    longer["inputs_embeds"] = torch.cat([prompt, twin.get_input_embeddings()(ids)], dim=1)
    longer["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (NUM_VIRTUAL, 0), value=1)
    longer["labels"] = torch.nn.functional.pad(batch["labels"], (NUM_VIRTUAL, 0), value=-100)
    del longer["input_ids"]
    expected = twin(**longer).loss
    torch.testing.assert_close(loss, expected)
    weight = next(p for name, p in wrapped.named_parameters() if "prompt_encoder" in name and p.requires_grad)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], torch.autograd.grad(expected, weight)[0])
    assert patch.last.loss > 0


def test_cross_attention_shifts_rows_alone():
    """mllama, whose embeddings PEFT does not find, gets them by hand."""
    student = built("mllama").copy()
    inputs = student.inputs()
    ids = inputs.pop("input_ids")
    torch.manual_seed(2)
    prompt = torch.randn(len(ids), NUM_VIRTUAL, student.model.config.text_config.hidden_size)
    inputs["inputs_embeds"] = torch.cat([prompt, student.model.get_input_embeddings()(ids)], dim=1).detach()
    inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (NUM_VIRTUAL, 0), value=1)
    seen = inputs["cross_attention_mask"]
    inputs["cross_attention_mask"] = torch.cat([seen[:, :1].expand(-1, NUM_VIRTUAL, -1, -1), seen], dim=1)
    batch = inputs | changed(student.batch(boxes=False), input_ids=ids)
    del batch["input_ids"]
    batch |= inputs
    eager = copy.deepcopy(student.model)
    eager.set_attn_implementation("eager")
    weights = []
    for module in attention_modules(text_tower(eager)):
        module.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    with torch.no_grad(), lavender.patch(student.model) as patch:
        eager(**inputs, use_cache=False)
        maps = patch.capture(**batch)
    torch.testing.assert_close(maps, maps_by_eager(eager, batch, weights, NUM_VIRTUAL, 0), rtol=2e-5, atol=2e-6)


def test_a_prefix_of_keys_is_refused_by_its_name(student, batch):
    with lavender.patch(tuned(student, "prefix tuning")) as patch, pytest.raises(CaptureError, match="prefix tuning"):
        patch.capture(**batch)


def cut(batch):
    for name in ("input_ids", "attention_mask", "labels"):
        batch[name] = batch[name][:, :-4]


def cut_at_the_start(batch):
    for name in ("input_ids", "attention_mask", "labels"):
        batch[name] = batch[name][:, 1:]


def shift(batch):
    for name in ("input_ids", "attention_mask", "labels"):
        batch[name] = batch[name].roll(1, dims=1)


def swap_samples(batch):
    batch["input_ids"] = batch["input_ids"].flip(0)


def pack(batch):
    mask = batch["attention_mask"].bool()
    batch["input_ids"] = batch["input_ids"][mask][None]
    batch["labels"] = batch["labels"][mask][None]
    del batch["attention_mask"]


def other_word(batch):
    words = words_of_batch(batch)
    batch["input_ids"][1, words.tokens[1, 0]] += 1


@pytest.mark.parametrize("spoil", [cut, cut_at_the_start, shift, swap_samples, pack, other_word])
def test_a_forward_over_another_text_is_refused(student, training_batch, spoil):
    """Whatever stands between the collator and the model: a trainer's `max_length`, packing, augmentation."""
    with lavender.patch(student.train(), AlignmentConfig(weight=10.0, aligner="sim")):
        student(**training_batch)
        training_batch["input_ids"] = training_batch["input_ids"].clone()
        spoil(training_batch)
        with pytest.raises(CaptureError, match=r"cut or extend the text|hold other tokens|made for another model|rows of text"):
            student(**training_batch)


@pytest.mark.parametrize("spoil", ["text", "no ids", "noise"])
def test_embeddings_of_another_text_are_refused(student, batch, spoil):
    """In place of ids, they must be those of the batch's ids; nothing else says where the words are."""
    ids = batch.pop("input_ids")
    batch["inputs_embeds"] = student.get_input_embeddings()(ids)
    with torch.no_grad(), lavender.patch(student) as patch:
        patch.capture(**batch)
        if spoil == "text":
            batch["inputs_embeds"] = batch["inputs_embeds"].roll(1, dims=1)
        elif spoil == "noise":
            batch["inputs_embeds"] = batch["inputs_embeds"] + 0.01
        else:
            batch = changed(batch, input_ids=None)
        with pytest.raises(CaptureError, match=r"not the embeddings of the batch's text|which text the words' positions"):
            patch.capture(**batch)
