"""What cannot be captured is refused by an error that says what to do, and changes nothing."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StableLmConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lavender
from lavender.batches.collator import Collator
from lavender.config import AlignmentConfig
from lavender.errors import CaptureError, DataError, ModelError
from lavender.students.families import STUDENTS, Family, ProcessedImages, known_family, register_family
from lavender.types import WordBatch

from ..conftest import changed, with_targets, words_of_batch
from .zoo import built

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_attention_outside_the_registry_is_named():
    model = BlipForConditionalGeneration(
        BlipConfig(
            text_config={**SMALL, "vocab_size": 64, "encoder_hidden_size": 32},
            vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        )
    )
    with pytest.raises(ModelError, match=r"Blip.*(registry|no text decoder)"):
        lavender.patch(model)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_layer_that_takes_no_further_arguments_is_named(student, monkeypatch):
    gc.collect()
    tapped = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)  # by models of other tests that still live
    layer = type(student.model.language_model.layers[0])
    original = layer.forward

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, position_embeddings=None):
        return original(self, hidden_states, attention_mask, position_ids, past_key_values, position_embeddings=position_embeddings)

    monkeypatch.setattr(layer, "forward", forward)
    with pytest.raises(ModelError, match=r"LlamaDecoderLayer\.forward takes no \*\*kwargs"):
        lavender.patch(student)
    assert not any(m._forward_pre_hooks for m in student.modules())
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == tapped


def test_a_layer_that_passes_nothing_on_is_noticed():
    """StableLM's decoder layer takes keyword arguments, and keeps them from its attention."""
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**SMALL, image_size=32, patch_size=8),
            text_config=StableLmConfig(**SMALL, vocab_size=64, num_key_value_heads=2),
            image_token_index=5,
        )
    )
    ids = torch.full((1, 20), 5)
    ids[:, 16:] = 7
    words = WordBatch(
        tokens=torch.tensor([[17]]),
        token_words=torch.zeros(1, 1, dtype=torch.long),
        token_weights=torch.ones(1, 1),
        image_positions=torch.arange(16)[None],
        present=torch.ones(1, 1, dtype=torch.bool),
    )
    told = pytest.raises(CaptureError, match=r"2 of 2 .* recorded nothing.*StableLmAttention")
    with lavender.patch(model) as patch, torch.no_grad(), told:
        patch.capture(input_ids=ids, pixel_values=torch.zeros(1, 3, 32, 32), **words.to_batch())


def test_another_attention_after_patching_is_noticed(student, batch):
    with lavender.patch(student) as patch:
        student.set_attn_implementation("eager")
        with torch.no_grad(), pytest.raises(CaptureError, match=r"4 of 4 attention layers recorded nothing.*patch again"):
            patch.capture(**batch)


def test_a_layer_that_runs_twice_is_recorded_once(student, batch):
    """Gradient checkpointing runs a layer again: the first result stays, whatever the second one is."""
    layer = student.model.language_model.layers[1]
    original = layer.forward

    def twice(hidden_states, **kwargs):
        output = original(hidden_states, **kwargs)
        original(2 * hidden_states + 1, **kwargs)
        return output

    with torch.no_grad(), lavender.patch(student) as patch:
        plain = patch.capture(**batch)
        layer.forward = twice
        assert torch.equal(patch.capture(**batch), plain)


def test_reentrant_checkpointing_in_training_is_refused(student, training_batch):
    student.train()
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with (
        lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")),
        pytest.raises(CaptureError, match="'use_reentrant': False"),
    ):
        student(**training_batch)


def test_places_that_are_not_as_many_as_image_tokens_are_refused(processor, samples):
    family = known_family("llava")
    register_family("llava", Family(boxes=lambda images: [b[1:] for b in family.boxes(images)]))
    try:
        with pytest.raises(DataError, match=r"samples '0', '1': 64 image tokens but 63 places"):
            Collator(processor)(samples[:2])
    finally:
        STUDENTS["llava"] = "square:CROPPED"


def test_mllama_without_its_cross_attention_mask_is_refused():
    student = built("mllama")
    batch = student.batch()
    del batch["cross_attention_mask"]
    with lavender.patch(student.model) as patch, torch.no_grad(), pytest.raises(CaptureError, match="cross_attention_mask"):
        patch.capture(**batch)


def test_mllama_without_a_picture_is_told_so():
    student = built("mllama")
    batch = {name: value for name, value in student.batch().items() if name not in ("pixel_values", "cross_attention_mask")}
    for name in ("aspect_ratio_ids", "aspect_ratio_mask"):
        batch.pop(name, None)
    with lavender.patch(student.model) as patch, torch.no_grad(), pytest.raises(CaptureError, match=r"no picture.*pixel_values"):
        patch.capture(**batch)


def test_a_cross_attention_with_too_few_keys_is_refused():
    student = built("mllama")
    batch = student.batch()
    positions = words_of_batch(batch).image_positions
    batch = changed(batch, image_positions=torch.cat([positions, positions + 68], dim=1), boxes=None)
    with lavender.patch(student.model) as patch, torch.no_grad(), pytest.raises(CaptureError, match=r"68 keys .* 136 places"):
        patch.capture(**batch)


def test_dropped_query_rows_are_refused():
    """Where layers share their keys, Gemma 4 computes only the rows whose logits are kept."""
    student = built("gemma4")
    batch = student.batch()
    with lavender.patch(student.model) as patch, torch.no_grad():
        with pytest.raises(CaptureError, match=r"received 1 queries .* every logit kept"):
            patch.capture(**batch, logits_to_keep=1)
        assert patch.capture(**batch)[:, -1].sum() > 0


def test_a_family_of_ones_own(processor, samples):
    """A model type that lavender has never heard of is captured; its places come from a registered family."""
    student = built("llava")
    model = student.model
    batch = changed(student.batch(), boxes=None)
    named = model.config.model_type
    type(model.config).model_type = "unheard_of"
    try:
        assert known_family("unheard_of") is None
        with torch.no_grad(), lavender.patch(model) as patch:
            assert patch.family is None
            tokens = patch.capture(**batch)
        assert tokens.shape[-1] == words_of_batch(batch).image_positions.shape[1]
        register_family("unheard_of", Family(boxes=lambda images: known_family("llava").boxes(images)))
        assert len(known_family("unheard_of").boxes(ProcessedImages(student.processor, student.inputs(), [(60, 90)]))[0]) == 36
    finally:
        type(model.config).model_type = named
        STUDENTS.pop("unheard_of", None)


def test_data_parallel_is_refused_with_the_remedy(student, training_batch):
    """nn.DataParallel marks its copies so; it needs two GPUs to make any."""
    with lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")):
        replica = student._replicate_for_data_parallel()
        replica._is_replica = True
        with pytest.raises(CaptureError, match=r"one process per GPU \(torchrun"):
            replica(**training_batch)


def test_split_sequences_are_refused(student, training_batch):
    """transformers' context and sequence parallelism give labels that are shifted already."""
    with (
        lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")),
        pytest.raises(CaptureError, match="sequence is split over processes"),
    ):
        student(**training_batch, shift_labels=training_batch["labels"])


def test_a_batch_of_another_models_processor_is_named(student, training_batch):
    """Its image positions hold other tokens: found at the first forward of a training."""
    with lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")):
        student(**training_batch)
    positions = words_of_batch(training_batch).image_positions
    training_batch = changed(training_batch, image_positions=torch.where(positions >= 0, positions + 1, positions))
    told = r"made for another model: 4 of its image positions .* LlavaForConditionalGeneration's image token \d+"
    with lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")), pytest.raises(CaptureError, match=told):
        student(**training_batch)


def gradients_of_a_step(student, batch):
    student.zero_grad()
    student(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("aggregation", ["project_mean", "parallel"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_batch_sees_anything_of_another(student, processor, samples, checkpointing, aggregation):
    """Train, evaluate, train: the second step is what it would be alone, with other words, lengths and sizes between."""

    def targeted(chosen):
        return with_targets(Collator(processor)(chosen), 16)

    torch.manual_seed(0)
    first, between, second = targeted(samples[:4]), targeted(samples[4:7]), targeted(samples[7:9])
    if checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with lavender.patch(student, AlignmentConfig(aggregation=aggregation, parallel_heads=2, weight=10.0, aligner="sim")) as patch:
        alone = gradients_of_a_step(student.train(), second)
        gradients_of_a_step(student, first)
        with torch.no_grad():
            student.eval()(**between)
            patch.capture(**between)
            patch.align(**between)
        found = gradients_of_a_step(student.train(), second)
        assert patch.last.words == words_of_batch(second).present.sum()
    assert found.keys() == alone.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, alone[name]), name


def test_a_compiled_student_trains_the_same(student, training_batch):
    """torch.compile around the patched model: same loss and gradients."""
    student.train()
    with lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")):
        plain = gradients_of_a_step(student, training_batch)
        loss = student(**training_batch).loss
        compiled = torch.compile(student, backend="aot_eager")
        student.zero_grad()
        output = compiled(**training_batch)
        torch.testing.assert_close(output.loss, loss)
        output.loss.backward()
        for name, parameter in student.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_the_old_name_of_a_familys_setting_warns_once(monkeypatch):
    monkeypatch.setattr(lavender.errors, "_warned", set())
    with pytest.warns(FutureWarning, match=r"Family\(num_images=...\)"):
        family = Family(boxes=list, pictures=(1, 1))
    assert family == Family(boxes=list, num_images=(1, 1))
    with pytest.warns(FutureWarning, match="Family.num_images"):
        assert family.pictures == (1, 1)
    with pytest.warns(FutureWarning, match="use lavender.ProcessedImages"):
        assert lavender.Pictures is ProcessedImages
