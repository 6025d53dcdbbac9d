"""What cannot be captured is refused by an error that says what to do, and changes nothing."""

from __future__ import annotations

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
from lavender.collator import Collator
from lavender.config import AlignmentConfig
from lavender.errors import CaptureError, DataError, ModelError
from lavender.families import Family, Pictures, known_family, register_family

from .families.test_contract import built, encoded, with_keys

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
    layer = type(student.model.language_model.layers[0])
    original = layer.forward

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, position_embeddings=None):
        return original(self, hidden_states, attention_mask, position_ids, past_key_values, position_embeddings=position_embeddings)

    monkeypatch.setattr(layer, "forward", forward)
    with pytest.raises(ModelError, match=r"LlamaDecoderLayer\.forward takes no \*\*kwargs"):
        lavender.patch(student)
    assert not any(m._forward_pre_hooks for m in student.modules())
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping


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
    keys = {
        "lavender_tokens": torch.tensor([[17]]),
        "lavender_token_words": torch.zeros(1, 1, dtype=torch.long),
        "lavender_token_weights": torch.ones(1, 1),
        "lavender_present": torch.ones(1, 1, dtype=torch.bool),
        "lavender_columns": torch.arange(16)[None],
    }
    told = pytest.raises(CaptureError, match=r"2 of 2 .* recorded nothing.*StableLmAttention")
    with lavender.patch(model) as patch, torch.no_grad(), told:
        patch.capture(input_ids=ids, pixel_values=torch.zeros(1, 3, 32, 32), **keys)


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
    with lavender.patch(student, AlignmentConfig()), pytest.raises(CaptureError, match="'use_reentrant': False"):
        student(**training_batch)


def test_places_that_are_not_as_many_as_image_tokens_are_refused(processor, samples):
    family = known_family("llava")
    register_family("llava", Family(boxes=lambda pictures: [b[1:] for b in family.boxes(pictures)]))
    try:
        with pytest.raises(DataError, match=r"samples '0', '1': 64 image tokens but 63 places"):
            Collator(processor)(samples[:2])
    finally:
        lavender.families.STUDENTS["llava"] = "square:CROPPED"


def test_mllama_without_its_cross_attention_mask_is_refused():
    student = built("mllama")
    batch = with_keys(student, encoded(student))
    del batch["cross_attention_mask"]
    with lavender.patch(student.model) as patch, torch.no_grad(), pytest.raises(CaptureError, match="cross_attention_mask"):
        patch.capture(**batch)


def test_a_cross_attention_with_too_few_keys_is_refused():
    student = built("mllama")
    batch = with_keys(student, encoded(student))
    batch["lavender_columns"] = torch.cat([batch["lavender_columns"], batch["lavender_columns"] + 68], dim=1)
    del batch["lavender_boxes"]
    with lavender.patch(student.model) as patch, torch.no_grad(), pytest.raises(CaptureError, match=r"68 keys .* 136 places"):
        patch.capture(**batch)


def test_dropped_query_rows_are_refused():
    """Where layers share their keys, Gemma 4 computes only the rows whose logits are kept."""
    student = built("gemma4")
    batch = with_keys(student, encoded(student))
    with lavender.patch(student.model) as patch, torch.no_grad():
        with pytest.raises(CaptureError, match=r"received 1 queries .* every logit kept"):
            patch.capture(**batch, logits_to_keep=1)
        assert patch.capture(**batch)[:, -1].sum() > 0


def test_a_family_of_ones_own(processor, samples):
    """A model type that lavender has never heard of is captured; its places come from a registered family."""
    student = built("llava")
    model = student.model
    inputs = encoded(student)
    batch = with_keys(student, inputs)
    named = model.config.model_type
    type(model.config).model_type = "unheard_of"
    try:
        assert known_family("unheard_of") is None
        del batch["lavender_boxes"]
        with torch.no_grad(), lavender.patch(model) as patch:
            assert patch.family is None
            tokens = patch.capture(**batch)
        assert tokens.shape[-1] == batch["lavender_columns"].shape[1]
        register_family("unheard_of", Family(boxes=lambda pictures: known_family("llava").boxes(pictures)))
        assert len(known_family("unheard_of").boxes(Pictures(student.processor, inputs, [(60, 90)]))[0]) == 36
    finally:
        type(model.config).model_type = named
        lavender.families.STUDENTS.pop("unheard_of", None)
