"""Every base attention gives the same maps: sdpa, eager, flex, and the flash attentions by what their calls receive."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import MistralConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lavender
from lavender.config import AlignmentConfig
from lavender.errors import CaptureError, ModelError
from lavender.students.registry import mask_of, require_supported

from ..conftest import without_lavender


def captured(student, batch, config=None):
    with torch.no_grad(), lavender.patch(student, config) as patch:
        return patch.capture(**batch)


@pytest.mark.parametrize("renormalize", [False, True])
def test_eager_attention_gives_its_own_weights(student, batch, renormalize):
    config = AlignmentConfig(renormalize=renormalize)
    by_sdpa = captured(student, batch, config)
    student.set_attn_implementation("eager")
    with torch.no_grad():
        plain = student(**without_lavender(batch))
        torch.testing.assert_close(captured(student, batch, config), by_sdpa, rtol=0, atol=2e-6)
        with lavender.patch(student, config):
            assert torch.equal(student(**batch).logits, plain.logits)
    assert "eager" not in ALL_ATTENTION_FUNCTIONS._local_mapping


@pytest.mark.parametrize("checkpointing", [False, True])
def test_eager_attention_trains_as_sdpa_does(student, training_batch, checkpointing):
    gradients = []
    if checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name in ("sdpa", "eager"):
        student.set_attn_implementation(name)
        student.train().zero_grad()
        with lavender.patch(student, AlignmentConfig(weight=100.0, aligner="identity")) as patch:
            student(**training_batch).loss.backward()
            assert patch.last.loss > 0
        gradients.append(student.model.language_model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-3 * gradients[0].abs().max().item())


def test_flex_attention_is_read_by_its_mask_function(student, batch):
    by_sdpa = captured(student, batch)
    student.set_attn_implementation({"text_config": "flex_attention"})
    with torch.no_grad():
        plain = student(**without_lavender(batch)).logits
        with lavender.patch(student) as patch:
            assert torch.equal(student(**batch).logits, plain)
            torch.testing.assert_close(patch.capture(**batch), by_sdpa, rtol=0, atol=2e-6)


@pytest.fixture
def flash():
    """A stand-in for flash attention, which needs a GPU: the same call and the same mask of two axes, answered by sdpa."""
    received = []

    def attend(module, query, key, value, attention_mask=None, **kwargs):
        received.append(attention_mask)
        mask, causal = mask_of("flash_attention_2", module, query, key, attention_mask, kwargs)
        share = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
        return output.transpose(1, 2), None

    before = ALL_ATTENTION_FUNCTIONS._local_mapping.get("flash_attention_2")
    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = attend
    yield received
    del ALL_ATTENTION_FUNCTIONS._local_mapping["flash_attention_2"]
    if before is not None:
        ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = before


def test_flash_attention_is_read_by_what_its_call_receives(student, batch, flash):
    by_sdpa = captured(student, batch)
    student.model.language_model.config._attn_implementation = "flash_attention_2"
    maps = captured(student, batch)
    assert flash[0].ndim == 2
    assert not flash[0].all(), "the batch is meant to be padded"
    torch.testing.assert_close(maps, by_sdpa, rtol=0, atol=2e-6)


class Attention(torch.nn.Module):
    is_causal = True


@pytest.mark.parametrize("window", [None, 3, 5])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_the_flash_mask_is_the_one_that_transformers_makes_for_sdpa(window, padding):
    length = 9
    present = torch.ones(2, length, dtype=torch.long)
    if padding != "none":
        present[1, :3] = 0 if padding == "left" else 1
        present[1, -3:] = 0 if padding == "right" else 1
    config = MistralConfig(sliding_window=window, attn_implementation="sdpa")
    make = create_causal_mask if window is None else create_sliding_window_causal_mask
    given = present if padding != "none" else None
    expected = make(config=config, inputs_embeds=torch.zeros(2, length, 4), attention_mask=given, past_key_values=None)
    query = torch.zeros(2, 4, length, 8)
    mask, causal = mask_of("flash_attention_2", Attention(), query, query, given, {"sliding_window": window})
    if expected is None:
        assert mask is None
        assert causal
        return
    assert not causal
    seen = expected if expected.dtype == torch.bool else expected == 0
    # Rows that are padding themselves are nobody's.
    rows = present.bool()[:, None, :, None]
    assert torch.equal(mask.expand_as(seen) & rows, seen & rows)


def test_a_cross_attention_by_flash_sees_every_key():
    module = Attention()
    module.is_causal = False
    mask, causal = mask_of("flash_attention_2", module, torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 6, 8), None, {})
    assert mask is None
    assert not causal


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "position_bias", "cu_seq_lens_q"])
def test_calls_that_the_kernels_cannot_follow_are_refused(student, batch, argument):
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    layer = student.model.language_model.layers[0]

    def more(module, args, kwargs):
        return args, {**kwargs, argument: torch.zeros(1)}

    with lavender.patch(student) as patch:
        handle = layer.register_forward_pre_hook(more, with_kwargs=True)
        with pytest.raises((CaptureError, ValueError), match=rf"{argument}.*|eager"), torch.no_grad():
            patch.capture(**batch)
        handle.remove()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original


def test_attention_that_nobody_can_read_is_refused_by_name():
    for name in ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3", "kernels/flash-attn"):
        require_supported(name)
    for name in ("paged|eager", "paged|flash_attention_2", "my_attention"):
        with pytest.raises(ModelError, match=rf"{re.escape(repr(name))}.*set_attn_implementation\('sdpa'\)"):
            require_supported(name)
