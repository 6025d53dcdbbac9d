"""What `lavender.patch` promises of every family: `check_family(student)` holds a tiny random model against all of it.

Each check takes a `Student`, leaves its model as it was, and raises `AssertionError`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..patching import patch
from ..students.discovery import attention_modules, is_cross, text_tower
from ..types import WordBatch
from .grid_probe import check_grid
from .student import Student


def check_family(student: Student) -> None:
    """Runs every check of a family, the grid probe last. Raises `AssertionError` where one fails."""
    for check in CHECKS:
        check(student)
    check_grid(student)


def check_capture(student: Student) -> None:
    """Outputs are the same to the last bit, patched or not, captured or not; maps are eager attention's."""
    model, inputs = student.model, student.inputs()
    words = student.word_batch(inputs)
    assert words.boxes is not None
    with torch.no_grad():
        plain = _logits(model, inputs)
        with patch(model) as handle:
            assert torch.equal(_logits(model, inputs), plain), "patching changes the model's outputs"
            assert torch.equal(_logits(model, {**inputs, **words.to_batch()}), plain), "capturing changes the model's outputs"
            maps = handle.capture(**{**inputs, **replace(words, boxes=None).to_batch()})
            placed = handle.capture(**{**inputs, **words.to_batch()})
        assert torch.equal(_logits(model, inputs), plain), "a patch that was undone changes the model's outputs"
    expected = eager_maps(model, inputs, words)
    assert maps.shape == expected.shape, f"maps have the shape {tuple(maps.shape)}; expected {tuple(expected.shape)}"
    # Both round in float32, the more the larger the logits are.
    torch.testing.assert_close(maps, expected, rtol=2e-5, atol=2e-6)
    assert maps[:, :, :, :2].sum() > 1e-3, "the words see nothing of the picture"
    assert (maps[:, :, :, 2] == 0).all(), "a word without tokens has a map"
    # What has a place keeps its sum on the map; through a resampler, what its tokens make of places.
    if student.family.resamplers is None:
        has_place = ~words.boxes.isnan().any(-1)
        maps = maps * has_place[:, None, None, None]
        torch.testing.assert_close(placed.sum((-2, -1)), maps.sum(-1), rtol=1e-4, atol=1e-6)
    else:
        assert (placed.sum((-2, -1)) <= maps.sum(-1) + 1e-6).all(), "a map holds more attention than its image tokens got"


def check_gradients(student: Student) -> None:
    """Gradients reach the captured attention's weights, and are the same through gradient checkpointing."""
    model = copy.deepcopy(student.model)
    batch = student.batch(boxes=False)
    plain = _gradients(model, batch)
    last = attention_modules(text_tower(model))[-1]
    names = {id(p): name for name, p in text_tower(model).named_parameters()}
    weights = [names[id(p)] for p in last.parameters() if id(p) in names]
    assert any(plain[name].abs().sum() > 0 for name in weights if name in plain), "no gradient reaches the last attention's weights"
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():  # checkpoints are used in training; nothing else may change, such as a dropped path
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            vars(module).update({name: 0.0 for name in ("dropout", "activation_dropout") if name in vars(module)})
    again = _gradients(model, batch)
    assert again.keys() == plain.keys(), "gradient checkpointing changes which weights get a gradient"
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-7)


def check_undo(student: Student) -> None:
    """Undoing a patch, by `unpatch` or by an exception in its `with`, restores the very objects that it changed."""
    model = student.model
    entry = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def hooks() -> dict[str, tuple[list[int], list[int]]]:
        return {name: (list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()}

    def require_restored() -> None:
        assert hooks() == before, "a hook of the patch is left"
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is entry, "the attention registry's entry is not the one before"
        assert list(vars(model)) == names, "an attribute of the patch is left"

    before, names = hooks(), list(vars(model))
    handle = patch(model)
    assert hooks() != before
    handle.unpatch()
    require_restored()
    with suppress(ZeroDivisionError), patch(model):
        raise ZeroDivisionError
    require_restored()
    with torch.no_grad():
        _logits(model, student.inputs())


def check_copies(student: Student) -> None:
    """A copy of a patched model and its original do not mix, and are unpatched one by one."""
    model = copy.deepcopy(student.model)
    batch = student.batch(boxes=False)
    with torch.no_grad(), patch(model) as handle:
        alone = handle.capture(**batch)
        twin = copy.deepcopy(model)
        for parameter in attention_modules(text_tower(twin))[0].parameters():
            parameter.mul_(1.5)
        other: Any = twin._lavender_patch
        assert not torch.equal(other.capture(**batch), alone), "a copy's patch reads the original's attention"
        assert torch.equal(handle.capture(**batch), alone), "a copy changes what the original's patch reads"
        other.unpatch()
        assert torch.equal(handle.capture(**batch), alone), "unpatching a copy changes what the original's patch reads"


def check_generation(student: Student) -> None:
    """A patched model generates the same tokens. Models that cannot generate pass."""
    model: Any = student.model
    if not model.can_generate():
        return
    inputs = student.inputs(1)
    inputs.pop("decoder_input_ids", None)
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with patch(model):
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), plain), "patching changes what is generated"


def check_peft(student: Student) -> None:
    """An adapter in the last attention changes that layer's maps and no other's."""
    from peft import LoraConfig, get_peft_model

    model: Any = copy.deepcopy(student.model)
    batch = student.batch(boxes=False)
    last = attention_modules(text_tower(model))[-1]
    linear = next(name for name, m in last.named_modules() if isinstance(m, nn.Linear))
    prefix = next(name for name, m in model.named_modules() if m is last)
    with torch.no_grad():
        with patch(model) as handle:
            plain = handle.capture(**batch)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[f"{prefix}.{linear}"], init_lora_weights=False))
        with patch(adapted) as handle:
            maps = handle.capture(**batch)
    torch.testing.assert_close(maps[:, :-1], plain[:, :-1], rtol=0, atol=1e-6)
    assert (maps[:, -1] - plain[:, -1]).abs().max() > 1e-4, "an adapter in the last attention does not change its maps"


def check_cross_attention(student: Student) -> None:
    """Either all captured attention is cross-attention or none, as the family says."""
    decoder = text_tower(student.model)
    names = {module: name for name, module in decoder.named_modules()}
    crossing = [is_cross(names[module], module) for module in attention_modules(decoder)]
    assert all(crossing) == any(crossing), "some of the captured attention is cross-attention, and some is not"
    expected = student.family.cross or student.model.config.is_encoder_decoder
    assert any(crossing) == expected, f"Family(cross={student.family.cross}); the captured attention is otherwise"


CHECKS: tuple[Callable[[Student], None], ...] = (
    check_capture,
    check_gradients,
    check_undo,
    check_copies,
    check_generation,
    check_peft,
    check_cross_attention,
)
"""The contract, all but the grid probe (`lavender.testing.grid_probe.check_grid`)."""


def eager_maps(model: Any, inputs: dict[str, Any], words: WordBatch) -> torch.Tensor:
    """Maps [B, L, H, W, M] of `Student.word_batch`, from the weights that eager attention returns."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    weights: list[torch.Tensor] = []
    for module in attention_modules(text_tower(eager)):
        module.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    with torch.no_grad():
        eager(**inputs, use_cache=False)
    attention, positions = torch.stack(weights, dim=1), words.image_positions
    samples = []
    for b in range(len(attention)):
        rows = attention[b][:, :, words.tokens[b] - 1][..., positions[b].clamp_min(0)] * (positions[b] >= 0)
        samples.append(torch.stack([rows[:, :, 0], rows[:, :, 1:].mean(2), torch.zeros_like(rows[:, :, 0])], dim=2))
    return torch.stack(samples)


def _logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits


def _gradients(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with patch(model) as handle:
        handle.capture(**batch).square().sum().backward()
    return {name: p.grad.clone() for name, p in text_tower(model).named_parameters() if p.grad is not None}
