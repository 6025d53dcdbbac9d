"""A student that is loaded by its name is whole and sound, or is refused by the names of its weights."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from lavender.config import AlignmentConfig
from lavender.errors import ModelError
from lavender.patching import patch
from lavender.pretrained.weights import require_complete, require_finite
from lavender.students.loading import empty_student, load_adapter, load_student, require_checkpoint
from lavender.training.train import load_student as load_student_as_before

from ..pretrained.hub import FIRST, SECOND
from .zoo import built, families, sampled

NORM = "model.language_model.layers.0.input_layernorm.weight"
ROWS = "language_model.model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def damaged(student_folder, tmp_path):
    """Writes a student whose weights, by their names in the file, were changed; returns its folder."""

    def write(change):
        folder = tmp_path / "damaged"
        shutil.copytree(student_folder, folder, dirs_exist_ok=True)
        weights = load_file(folder / "model.safetensors")
        weights = change(weights) or weights
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write


def refusal(load, *arguments) -> str:
    with pytest.raises(ModelError) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def doctors(folder) -> str:
    """What the doctor, who loads no weights, says of a checkpoint."""
    return refusal(require_checkpoint, empty_student(folder), folder)


def test_a_sound_student_is_what_transformers_loads(student_folder, caplog, capsys):
    student, _ = load_student(student_folder)
    expected = AutoModelForImageTextToText.from_pretrained(student_folder).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in student.state_dict().items())
    assert not caplog.records
    assert load_student_as_before is load_student
    assert require_checkpoint(empty_student(student_folder), student_folder) == len(load_file(student_folder / "model.safetensors"))


def test_missing_weights_are_named(damaged):
    lost = sorted(load_file(damaged(lambda weights: None) / "model.safetensors"))[10:15]
    folder = damaged(lambda weights: {name: value for name, value in weights.items() if name not in lost})
    said = refusal(load_student, folder)
    assert "lacks 5 of" in said
    assert f"({', '.join(f'model.{name}'.replace('language_model.model', 'language_model') for name in lost[:3])}, ...)" in said
    assert doctors(folder) == said


def test_weights_under_other_names_are_those_of_another_model(damaged):
    folder = damaged(lambda weights: {f"transformer.{name}": value for name, value in weights.items()})
    said = refusal(load_student, folder)
    assert "which would be random" in said
    assert "that a LlavaForConditionalGeneration does not know (transformer." in said
    assert doctors(folder) == said


def test_weights_of_another_shape_are_named(damaged):
    folder = damaged(lambda weights: weights.update({ROWS: torch.zeros(3, 5)}))
    said = refusal(load_student, folder)
    assert "1 of" in said
    assert ": [3, 5] in the file, [" in said
    assert doctors(folder) == said


def test_weights_that_are_integers_are_named(damaged):
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    folder = damaged(lambda weights: weights.update({name: (weights[name] * 100).to(torch.int8)}))
    said = refusal(load_student, folder)
    assert f"1 of 113 weights of the student {str(folder)!r} are integers in the file ({name})" in said
    assert doctors(folder) == said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(damaged, value):
    def change(weights):
        weights[ROWS][-1, -1] = value

    said = refusal(load_student, damaged(change))
    assert "1 of" in said
    assert "(model.language_model.layers.0.mlp.up_proj.weight)" in said


def test_weights_that_overflow_in_half_precision_are_named(damaged):
    def change(weights):
        weights[ROWS][0, 0] = 1e30

    folder = damaged(change)
    load_student(folder, "bfloat16")
    assert "in float16 hold NaN or infinity" in refusal(load_student, folder, "float16")


def test_weights_without_a_place_are_named_and_an_aligners_are_not(damaged, student, processor, tmp_path, caplog):
    load_student(damaged(lambda weights: weights.update({"visual_head.weight": torch.zeros(2)})))
    assert [record.message for record in caplog.records if record.name == "lavender"] == [
        f"the student {str(tmp_path / 'damaged')!r}: a LlavaForConditionalGeneration has no place for 1 of its weights "
        "(visual_head.weight)"
    ]
    assert not any("LOAD REPORT" in record.getMessage() for record in caplog.records)
    caplog.clear()
    patch(student, AlignmentConfig(weight=10.0, aligner="sim"))
    student.save_pretrained(tmp_path / "checkpoint-7")
    processor.save_pretrained(tmp_path / "checkpoint-7")
    assert any("lavender." in name for name in load_file(tmp_path / "checkpoint-7/model.safetensors"))
    load_student(tmp_path / "checkpoint-7")
    assert not caplog.records


def test_damaged_files_are_one_line(student_folder, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(student_folder, folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "cannot load an image-text-to-text model" in refusal(load_student, folder)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(load_student, folder)
    for content in ("[]", "{", "{}", '{"model_type": 3}', '{"model_type": "llava", "text_config": 7}'):
        (folder / "config.json").write_text(content)
        refusal(load_student, folder)


def test_what_a_process_holds_is_looked_at():
    """Of a tensor that is sharded, its part; of one on the meta device, or of integers, nothing."""
    model = torch.nn.Linear(2, 2)
    model.register_buffer("running", torch.tensor([1.0, float("nan")]))
    assert "(running)" in refusal(require_finite, model, "it")
    model.register_buffer("running", torch.tensor([1.0, float("nan")]), persistent=False)
    require_finite(model, "it")
    require_finite(torch.nn.Linear(2, 2, device="meta"), "it")
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16):
        model.weight = torch.nn.Parameter(torch.ones(2, 2).to(dtype), requires_grad=False)
        require_finite(model, "it")
        model.weight.data = torch.full((2, 2), float("nan")).to(dtype)
        assert "(weight)" in refusal(require_finite, model, "it")
    report = {"missing_keys": ["bias"], "unexpected_keys": [], "mismatched_keys": []}
    assert "1 of 2 weights" in refusal(require_complete, torch.nn.Linear(2, 2), report, "it")
    counting = torch.nn.BatchNorm1d(2)
    require_complete(counting, report | {"missing_keys": ["num_batches_tracked"]}, "it")
    assert "running_mean" in refusal(require_complete, counting, report | {"missing_keys": ["running_mean"]}, "it")


@pytest.mark.parametrize("name", sampled(families()))
def test_no_family_is_refused_that_transformers_saved(name, tmp_path, caplog):
    """Its weights are tied, renamed, and left out by rules of its own."""
    model = built(name).model
    model.save_pretrained(tmp_path)
    kind = type(model)
    loaded, report = kind.from_pretrained(tmp_path, output_loading_info=True, ignore_mismatched_sizes=True)
    require_complete(loaded, report, name)
    require_finite(loaded, name)
    assert require_checkpoint(model, tmp_path) is not None
    assert not [record for record in caplog.records if record.name == "lavender"]


# Adapters


@pytest.fixture
def adapter(student, student_folder, tmp_path):
    """A folder with a LoRA adapter whose both matrices are random."""
    model = get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(student_folder)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_no_student(adapter, processor, student_folder):
    processor.save_pretrained(adapter)
    said = refusal(load_student, adapter)
    assert f"is an adapter of {str(student_folder)!r}; give that as the model" in said


def test_a_sound_adapter_is_what_peft_loads(adapter, student_folder, batch):
    from ..conftest import without_lavender

    ours = load_adapter(load_student(student_folder)[0], adapter).eval()
    theirs = PeftModel.from_pretrained(load_student(student_folder)[0], adapter).eval()
    inputs = without_lavender(batch)
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)


def test_damaged_adapters_are_refused_by_the_names_of_their_weights(adapter, student_folder, tmp_path):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[-1]
    save_file({key: value for key, value in weights.items() if key != name}, path)
    said = refusal(load_adapter, load_student(student_folder)[0], adapter)
    assert f"lacks 1 weights ({name})" in said
    save_file(weights | {name: weights[name] * float("nan")}, path)
    assert name.removesuffix(".weight") in refusal(load_adapter, load_student(student_folder)[0], adapter)
    assert "there is no LoRA adapter" in refusal(load_adapter, load_student(student_folder)[0], tmp_path)


# The hub


def test_a_revision_is_loaded(hub, student_folder, damaged):
    hub.put("org/student", student_folder, FIRST, "v1")
    hub.put("org/student", damaged(lambda weights: weights.update({ROWS: weights[ROWS] + 1})), SECOND, "main")
    values = {name: load_student(name)[0].state_dict() for name in ("org/student@v1", "org/student", f"org/student@{FIRST}")}
    ours = ROWS.replace("language_model.model", "model.language_model")
    first, second, again = (value[ours] for value in values.values())
    assert torch.equal(second, first + 1)
    assert torch.equal(first, again)
    assert "cannot load an image-text-to-text model from 'org/student@v9'" in refusal(load_student, "org/student@v9")


def test_an_adapter_at_a_revision_is_loaded(hub, adapter, student_folder, tmp_path):
    path = adapter / "adapter_model.safetensors"
    hub.put("org/adapter", adapter, FIRST, "v1")
    weights = load_file(path)
    save_file({name: value + 1 for name, value in weights.items()}, path)
    hub.put("org/adapter", adapter, SECOND, "main")
    name = next(iter(weights))
    for model, added in (("org/adapter@v1", 0), ("org/adapter", 1)):
        loaded = load_adapter(load_student(student_folder)[0], model).state_dict()
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], weights[name] + added)
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 2
    assert logging.getLogger("transformers.modeling_utils").filters == []


def test_a_config_of_a_far_larger_model_is_refused_before_it_is_built(student_folder, tmp_path):
    folder = tmp_path / "large"
    shutil.copytree(student_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    expected = sum(weight.numel() for weight in load_file(folder / "model.safetensors").values())
    (folder / "config.json").write_text(json.dumps(config | {"text_config": {"model_type": "llama"}}))  # seven billion weights
    with pytest.raises(ModelError, match=rf"is of a model with [67],\d+,\d+,\d+ weights, and its files have {expected:,}; give"):
        load_student(folder)
    (folder / "config.json").write_text(json.dumps(config | {"text_config": config["text_config"] | {"hidden_size": 10**9}}))
    with pytest.raises(ModelError, match=r"large'"):
        load_student(folder)


def test_adapters_with_names_of_another_type_are_refused(adapter, student_folder, tmp_path):
    for name, value in (("modules_to_save", 7), ("target_modules", {"a": 1}), ("base_model_name_or_path", 7), ("revision", [])):
        folder = tmp_path / name
        shutil.copytree(adapter, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(ModelError, match=f"adapter_config.json of .* says {name} "):
            load_adapter(load_student(student_folder)[0], folder)
