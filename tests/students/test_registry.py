"""Every base attention gives the same maps: sdpa, eager, flex, and the flash attentions by what their calls receive."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import LlamaConfig, MistralConfig
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lavender
from lavender.batches.collator import Collator
from lavender.config import AlignmentConfig
from lavender.errors import CaptureError, ModelError
from lavender.students.registry import Request, mask_of, require_supported
from lavender.types import WordBatch, WordRows

from ..conftest import changed, without_lavender, words_of_batch
from .flash import flash_on_cpu


def captured(student, batch, config=None):
    with torch.no_grad(), lavender.patch(student, config) as patch:
        return patch.capture(**batch)


@pytest.mark.parametrize("renormalize", [False, True])
def test_eager_attention_gives_its_own_weights(student, batch, renormalize):
    config = AlignmentConfig(renormalize=renormalize, weight=10.0, aligner="sim")
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


def test_flash_attention_is_read_by_what_its_call_receives(student, batch):
    """transformers' own flash attention, over its functions on a CPU."""
    by_sdpa = captured(student, batch)
    received = []
    student.model.language_model.config._attn_implementation = "flash_attention_2"
    for layer in student.model.language_model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: received.append(kwargs["attention_mask"]), with_kwargs=True
        )
    with flash_on_cpu():
        maps = captured(student, batch)
    assert received[0].ndim == 2
    assert not received[0].all(), "the batch is meant to be padded"
    torch.testing.assert_close(maps, by_sdpa, rtol=0, atol=2e-6)


def packed(batches):
    """Batches of one sample each as one row, as a collator without padding lays them."""
    words = [words_of_batch(one) for one in batches]
    starts = torch.tensor([0, *(one["input_ids"].shape[1] for one in batches)]).cumsum(0).tolist()
    numbers = torch.tensor([0, *(one.present.shape[1] for one in words)]).cumsum(0).tolist()

    def joined(field, offsets=None):
        values = [getattr(one, field) for one in words]
        if offsets is not None:
            values = [torch.where(one >= 0, one + offset, one) for one, offset in zip(values, offsets, strict=False)]
        return torch.cat(values, dim=1)

    together = WordBatch(
        joined("tokens", starts),
        joined("token_words", numbers),
        joined("token_weights"),
        joined("image_positions", starts),
        joined("present"),
    )
    return {
        "input_ids": torch.cat([one["input_ids"] for one in batches], dim=1),
        "pixel_values": torch.cat([one["pixel_values"] for one in batches]),
        "position_ids": torch.cat([torch.arange(one["input_ids"].shape[1]) for one in batches])[None],
        **together.to_batch(),
    }


@pytest.mark.parametrize(
    ("name", "has_borders"), [("flash_attention_2", False), ("flash_attention_2", True), ("sdpa", False), ("eager", False)]
)
def test_each_of_two_packed_samples_sees_itself_alone(student, processor, samples, name, has_borders):
    """Padding-free rows: every base attention splits them where positions restart, flash also at borders that it is given."""
    apart = [Collator(processor)([sample]) for sample in samples[:2]]
    lengths = [one["input_ids"].shape[1] for one in apart]
    alone = [captured(student, changed(one, boxes=None))[0] for one in apart]
    row = packed(apart)
    if has_borders:
        borders = torch.tensor([0, *lengths]).cumsum(0).int()
        row |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    with torch.no_grad():
        expected = torch.cat([student(**without_lavender(one)).logits[0] for one in apart])
        row["use_cache"] = False  # with a cache, transformers' masks do not look at positions
        student.model.language_model.config._attn_implementation = name
        with flash_on_cpu():
            logits = student(**without_lavender(row)).logits[0]
            maps = captured(student, {name: value for name, value in row.items() if name != "use_cache"})[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    words, tokens = alone[0].shape[2:]
    torch.testing.assert_close(maps[:, :, :words, :tokens], alone[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(maps[:, :, words:, tokens:], alone[1], rtol=0, atol=2e-6)
    assert not maps[:, :, words:, :tokens].any()
    assert not maps[:, :, :words, tokens:].any()


class Attention(torch.nn.Module):
    """What transformers' attention functions ask of the module that calls them."""

    is_causal = True

    def __init__(self) -> None:
        super().__init__()
        self.config = LlamaConfig()
        self.config._attn_implementation = "flash_attention_2"
        self.weight = torch.nn.Linear(1, 1, dtype=torch.float64)


T, N = 9, 7
HOLES = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 0, 0]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
JUMPS = torch.tensor([[5, 6, 7, 20, 21, 22, 23, 24, 25]])
BORDERS = torch.tensor([0, 4, 6, 9], dtype=torch.int32)
OF_TWO_ROWS = torch.tensor([0, 4, 9, 15, 15, 18], dtype=torch.int32)


def varlen(rows, keys=None):
    return {"cu_seq_lens_q": rows, "cu_seq_lens_k": rows if keys is None else keys, "max_length_q": T, "max_length_k": T}


CALLS = {
    "causal": (2, T, None, {}),
    "every key": (2, T, None, {"is_causal": False}),
    "holes": (2, T, HOLES, {}),
    "holes, every key": (2, T, HOLES, {"is_causal": False}),
    "window": (2, T, None, {"sliding_window": 3}),
    "wide window": (2, T, None, {"sliding_window": 9}),
    "window, every key": (2, T, None, {"sliding_window": 3, "is_causal": False}),
    "window and holes": (2, T, HOLES, {"sliding_window": 2}),
    "positions": (1, T, None, {"position_ids": POSITIONS}),
    "positions and window": (1, T, None, {"position_ids": POSITIONS, "sliding_window": 2}),
    "positions of two rows": (2, T, None, {"position_ids": POSITIONS.expand(2, -1)}),
    "positions beside a mask": (1, T, HOLES[:1], {"position_ids": POSITIONS}),
    "positions that jump": (1, T, None, {"position_ids": JUMPS}),
    "ordinary positions": (1, T, None, {"position_ids": torch.arange(T)[None] + 3}),
    "borders": (1, T, None, varlen(BORDERS)),
    "borders and window": (1, T, None, {**varlen(BORDERS), "sliding_window": 2}),
    "borders beside a mask": (1, T, HOLES[:1], varlen(BORDERS)),
    "borders before positions": (1, T, None, {**varlen(BORDERS), "position_ids": POSITIONS.flip(1)}),
    "borders of two rows": (2, T, None, varlen(OF_TWO_ROWS)),
    "borders, a length missing": (1, T, None, {**varlen(BORDERS), "max_length_q": None}),
    "fewer keys": (2, N, None, {"is_causal": False}),
    "fewer keys, causal": (2, N, None, {}),
    "borders of rows and keys": (1, N, None, varlen(BORDERS, torch.tensor([0, 3, 4, 7], dtype=torch.int32))),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_visible_keys_are_those_that_move_the_output_of_flash_attention(call):
    """transformers' own function is probed: the value of one key at a time changes; outputs that move see it."""
    batch, num_keys, mask, arguments = CALLS[call]
    torch.manual_seed(0)
    query, key, value = (torch.randn(batch, 2, n, 16, dtype=torch.float64) for n in (T, num_keys, num_keys))
    module = Attention()
    moved = torch.zeros(batch, T, num_keys, dtype=torch.bool)
    with flash_on_cpu():
        plain = flash_attention_forward(module, query, key, value, mask, **arguments)[0]
        for n in range(num_keys):
            other = value.clone()
            other[:, :, n] += 1
            output = flash_attention_forward(module, query, key, other, mask, **arguments)[0]
            moved[:, :, n] = (output - plain).abs().amax((2, 3)) > 1e-9
    seen, causal = mask_of("flash_attention_2", module, query, key, mask, arguments)
    if seen is None:
        seen = torch.ones(T, num_keys, dtype=torch.bool)
        seen = seen.tril() if causal else seen
    assert torch.equal(seen.expand(batch, 1, T, num_keys)[:, 0], moved)
    assert moved.any()


@pytest.mark.parametrize("kind", ["places", "scores", "bool scores", "none"])
def test_the_visible_keys_are_those_that_flex_attention_sees(kind, monkeypatch):
    """A tensor is added to flex attention's scores, whatever its dtype: one of bool hides nothing."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from transformers.integrations import flex_attention as integration

    # Compiled for a CPU, it aborts with scores.
    monkeypatch.setattr(
        integration, "compile_friendly_flex_attention", lambda *args, training, **more: flex_attention(*args, **more)
    )
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, T, 16) for _ in range(3))
    scores = torch.randn(2, 1, T, T).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    mask = {
        "places": create_block_mask(lambda b, h, q, k: (k <= q) & (k >= b), 2, None, T, T, device="cpu"),
        "scores": scores,
        "bool scores": scores > 0,
        "none": None,
    }[kind]
    module = Attention().eval()
    with torch.no_grad():
        output = flex_attention_forward(module, query, key, value, mask, scaling=0.25)[0]
        seen, causal = mask_of("flex_attention", module, query, key, mask, {})
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=0.25).transpose(1, 2)
    assert not causal
    rows = output.abs().amax((2, 3)) > 0  # a row that sees nothing is zeros by one and NaN by the other
    torch.testing.assert_close(output[rows], expected[rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "arguments", "message"),
    [
        (torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0, 0]]), {}, "expected .* of 0 and 1"),
        (torch.zeros(1, 1, T, T), {}, r"mask \(1, 1, 9, 9\)"),
        (torch.ones(1, T + 3), {}, r"mask \(1, 12\) of torch.float32 for 9 keys; .*prefix"),
        (None, varlen(torch.tensor([0, 5, T - 3])), r"from 0 to 6, and the batch has 9 places"),
        (None, {"position_ids": torch.arange(3 * T).view(3, 1, T)[:, :, ::2]}, "expected one position"),
    ],
)
def test_calls_of_flash_attention_that_nobody_can_read_are_refused(mask, arguments, message):
    query = torch.zeros(1, 2, T, 16)
    with pytest.raises(CaptureError, match=message):
        mask_of("flash_attention_2", Attention(), query, query, mask, arguments)


def test_a_sequence_that_runs_over_two_samples_is_refused():
    query = torch.zeros(2, 2, T, 16)
    with pytest.raises(CaptureError, match="from one sample of the batch into the next"):
        mask_of("flash_attention_2", Attention(), query, query, None, varlen(torch.tensor([0, 5, 12, 18])))


def test_an_attention_function_of_somebody_else_is_refused(student):
    """DeepSpeed's sequence parallelism, for one, puts its own under the name of sdpa: nobody knows what it attends to."""
    theirs = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = lambda *args, **kwargs: theirs(*args, **kwargs)
    try:
        with pytest.raises(ModelError, match=r"registered as 'sdpa' is .*set_attn_implementation\('eager'\)"):
            lavender.patch(student)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert not hasattr(student, "_lavender_patch")
    assert not any(module._forward_pre_hooks for module in student.modules())


def test_dropout_in_the_weights_of_eager_attention_is_refused(student, training_batch):
    """sdpa's maps are those before dropout; eager attention returns what is left of them."""
    for layer in student.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    with lavender.patch(student.train(), AlignmentConfig(weight=10.0, aligner="sim")):
        student(**training_batch)
    student.set_attn_implementation("eager")
    with lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim")):
        with pytest.raises(CaptureError, match=r"dropout of 0\.5.*attention_dropout=0"):
            student(**training_batch)
        student.eval()(**training_batch)


def test_a_request_follows_each_layers_device():
    """As `device_map` spreads them; beside the CPU a machine without a GPU has the empty device alone, which mixes with none."""
    rows = WordRows(torch.tensor([[2, 4]]), torch.tensor([[0, 1]]), torch.ones(1, 2), 2)
    layers = {Attention(): 0, Attention(): 1}
    request = Request(rows, torch.tensor([[0, 1]]), layers, cross=False, renormalize=False, length=T)
    for layer, device in zip(layers, ("cpu", "meta"), strict=True):
        request.record_weights(layer, torch.rand(1, 2, T, T, device=device))
    assert [request.recorded[n].device.type for n in range(2)] == ["cpu", "meta"]
    assert request.recorded[1].shape == request.recorded[0].shape


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
