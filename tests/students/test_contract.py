"""What `lavender.patch` promises, held against every family: one contract, tiny random models, the families' real processors."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lavender
from lavender.students.discovery import attention_modules, is_cross, text_tower
from lavender.students.families import Pictures, student_family
from lavender.students.image_tokens import model_type_of, place_columns

from .probe import noise
from .zoo import Student, students

NAMES = sorted(students())
SIZES = [(60, 90), (96, 48)]


@cache
def built(name: str) -> Student:
    return students()[name]()


@pytest.fixture
def student(name) -> Student:
    """The family's tiny model; a copy, since tests change it."""
    original = built(name)
    return copy.copy(original).__class__(copy.deepcopy(original.model), original.processor, original.placeholder)


def family_of(student: Student):
    return student_family(model_type_of(student.processor, student.model.config))


def encoded(student: Student, sizes=SIZES) -> dict[str, torch.Tensor]:
    """A padded batch of two pictures of different shapes and two texts of different lengths."""
    return student.encode(
        [noise(*size, seed=i) for i, size in enumerate(sizes)], ["what is this ? a red cat", "a dog"][: len(sizes)]
    )


def with_keys(student: Student, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Lavender's keys for three words: the last token, the two before it, and none."""
    config = student.model.config
    family = family_of(student)
    boxes = family.boxes(Pictures(student.processor, inputs, SIZES[: len(inputs["input_ids"])], config))
    read = inputs.get("decoder_input_ids", inputs["input_ids"])
    lengths = torch.full((len(read),), read.shape[1])
    if "decoder_input_ids" not in inputs and inputs["attention_mask"][:, 0].all():  # padded on the right
        lengths = inputs["attention_mask"].sum(dim=1)
    rows = lengths[:, None] - torch.tensor([0, 1, 2])  # of tokens whose predicting rows are the last three
    keys = {
        "lavender_tokens": rows,
        "lavender_token_words": torch.tensor([0, 1, 1]).expand_as(rows).clone(),
        "lavender_token_weights": torch.tensor([1.0, 0.5, 0.5]).expand_as(rows).clone(),
        "lavender_present": torch.tensor([True, True, False]).expand_as(rows).clone(),
    }
    keys["lavender_columns"], keys["lavender_boxes"] = place_columns(inputs["input_ids"], boxes, family, student.processor, config)
    return {**inputs, **keys}


def eager_maps(model, inputs, batch) -> torch.Tensor:
    """[B, L, H, W, M] from the weights that eager attention returns."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    seen = []
    handles = [
        module.register_forward_hook(lambda _m, _a, output: seen.append(output[1]))
        for module in attention_modules(text_tower(eager))
    ]
    with torch.no_grad():
        eager(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    weights = torch.stack(seen, dim=1)
    columns = batch["lavender_columns"]
    result = []
    for b in range(len(weights)):
        rows = weights[b][:, :, batch["lavender_tokens"][b] - 1][..., columns[b].clamp_min(0)] * (columns[b] >= 0)
        result.append(torch.stack([rows[:, :, 0], rows[:, :, 1:].mean(2), torch.zeros_like(rows[:, :, 0])], dim=2))
    return torch.stack(result)


def logits_of(model, inputs):
    return model(**inputs, use_cache=False).logits


def without_boxes(batch):
    return {key: value for key, value in batch.items() if key != "lavender_boxes"}


@pytest.mark.parametrize("name", NAMES)
def test_capture_changes_no_bit_and_gives_what_eager_attention_gives(student):
    model = student.model
    inputs = encoded(student)
    batch = with_keys(student, inputs)
    with torch.no_grad():
        plain = logits_of(model, inputs)
        with lavender.patch(model) as patch:
            assert torch.equal(logits_of(model, inputs), plain)
            assert torch.equal(logits_of(model, batch), plain)
            maps = patch.capture(**without_boxes(batch))
            placed = patch.capture(**batch)
        assert torch.equal(logits_of(model, inputs), plain)
    expected = eager_maps(model, inputs, batch)
    assert maps.shape == expected.shape
    torch.testing.assert_close(maps, expected, rtol=0, atol=2e-6)
    assert maps[:, :, :, :2].sum() > 1e-3, "the words see nothing of the picture"
    assert (maps[:, :, :, 2] == 0).all()
    # What has a place keeps its sum on the map; through a resampler, what its tokens make of places.
    if family_of(student).resamplers is None:
        has_place = ~batch["lavender_boxes"].isnan().any(-1)
        maps = maps * has_place[:, None, None, None]
        torch.testing.assert_close(placed.sum((-2, -1)), maps.sum(-1), rtol=1e-4, atol=1e-6)
    else:
        assert (placed.sum((-2, -1)) <= maps.sum(-1) + 1e-6).all()


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with lavender.patch(model) as patch:
        patch.capture(**without_boxes(batch)).square().sum().backward()
    return {name: p.grad.clone() for name, p in text_tower(model).named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_text_tower_also_through_checkpoints(student):
    model = student.model
    batch = with_keys(student, encoded(student))
    plain = gradients(model, batch)
    last = attention_modules(text_tower(model))[-1]
    names = {id(p): n for n, p in text_tower(model).named_parameters()}
    owned = [names[id(p)] for p in last.parameters() if id(p) in names]
    assert any(plain[n].abs().sum() > 0 for n in owned if n in plain)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():  # checkpoints are used in training; nothing else may change, such as a dropped path
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            vars(module).update({name: 0.0 for name in ("dropout", "activation_dropout") if name in vars(module)})
    again = gradients(model, batch)
    assert again.keys() == plain.keys()
    for parameter, value in plain.items():
        torch.testing.assert_close(again[parameter], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_unpatch_and_an_exception_restore_the_very_objects(student):
    model = student.model
    inputs = encoded(student)
    entry = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def hooks():
        return {n: (list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in model.named_modules()}

    before, names = hooks(), list(vars(model))
    patch = lavender.patch(model)
    assert hooks() != before
    patch.unpatch()
    assert hooks() == before
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is entry
    with pytest.raises(ZeroDivisionError), lavender.patch(model):
        raise ZeroDivisionError
    assert hooks() == before
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is entry
    assert list(vars(model)) == names
    with torch.no_grad():
        logits_of(model, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_second_models_do_not_mix(student):
    model = student.model
    batch = without_boxes(with_keys(student, encoded(student)))
    with torch.no_grad(), lavender.patch(model) as patch:
        alone = patch.capture(**batch)
        twin = copy.deepcopy(model)
        for parameter in attention_modules(text_tower(twin))[0].parameters():
            parameter.mul_(1.5)
        other = twin._lavender_patch
        assert not torch.equal(other.capture(**batch), alone)
        assert torch.equal(patch.capture(**batch), alone)
        other.unpatch()
        assert torch.equal(patch.capture(**batch), alone)


@pytest.mark.parametrize("name", [n for n in NAMES if built(n).model.can_generate()])
def test_generation_is_untouched(student):
    model = student.model
    inputs = encoded(student, SIZES[:1])
    inputs.pop("decoder_input_ids", None)
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with lavender.patch(model):
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), plain)


@pytest.mark.parametrize("name", NAMES)
def test_a_peft_model_is_captured_by_its_adapted_attention(student):
    from peft import LoraConfig, get_peft_model

    model = student.model
    batch = without_boxes(with_keys(student, encoded(student)))
    names = dict(text_tower(model).named_modules())
    last = attention_modules(text_tower(model))[-1]
    path = next(n for n, m in names.items() if m is last)
    linear = next(n for n, m in last.named_modules() if isinstance(m, torch.nn.Linear))
    prefix = next(n for n, m in model.named_modules() if m is last)
    assert prefix.endswith(path)
    with torch.no_grad():
        with lavender.patch(model) as patch:
            plain = patch.capture(**batch)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[f"{prefix}.{linear}"], init_lora_weights=False))
        with lavender.patch(adapted) as patch:
            maps = patch.capture(**batch)
    torch.testing.assert_close(maps[:, :-1], plain[:, :-1], rtol=0, atol=1e-6)
    assert (maps[:, -1] - plain[:, -1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["llava", *(n for n in NAMES if n == "mllama")])
def test_a_compiled_model_is_captured(student):
    model = student.model
    batch = without_boxes(with_keys(student, encoded(student)))
    with torch.no_grad(), lavender.patch(model) as patch:
        plain = patch.capture(**batch)
        model.compile(backend="aot_eager")
        torch.testing.assert_close(patch.capture(**batch), plain, rtol=0, atol=1e-6)
        assert lavender.patch(torch.compile(model)) is patch


@pytest.mark.parametrize("name", NAMES)
def test_cross_attention_is_found_where_there_is_one(student):
    decoder = text_tower(student.model)
    names = {m: n for n, m in decoder.named_modules()}
    crossing = [is_cross(names[m], m) for m in attention_modules(decoder)]
    assert all(crossing) == any(crossing)
    encoder_decoder = student.model.config.is_encoder_decoder
    assert any(crossing) == (family_of(student).cross or encoder_decoder)
