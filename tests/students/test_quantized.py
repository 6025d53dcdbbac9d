"""QLoRA: a student with quantized weights has the maps, loss and gradients of plain attention by its dequantized weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TorchAoConfig

import lavender
from lavender.config import AlignmentConfig

from ..conftest import with_targets, without_lavender, words_of_batch
from .definition import alignment_loss, attention_weights, compared_maps, word_maps
from .zoo import built

CONFIG = AlignmentConfig(weight=3.0, aligner="sim")


def quantization(kind: str) -> Any:
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=kind == "nf4, double",
        bnb_4bit_compute_dtype=torch.float32,
    )


def is_quantized(weight: Any) -> bool:
    return type(weight.data) is not torch.Tensor or hasattr(weight, "quant_state")


def dequantized(weight: Any) -> torch.Tensor:
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize() if is_quantized(weight) else weight.data


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False, **settings)


@pytest.mark.parametrize(
    ("kind", "name", "checkpointing"),
    [
        ("nf4", "llava", False),
        ("int8", "llava", True),
        ("nf4, double", "qwen2_vl", True),
        ("int8", "qwen2_vl", False),
        ("nf4", "mllama", True),
    ],
)
def test_a_quantized_student_trains_by_its_dequantized_weights(tmp_path, kind, name, checkpointing):
    student = built(name)
    student.model.save_pretrained(tmp_path)
    model: Any = AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=quantization(kind), device_map="cpu", dtype=torch.float32
    )
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    torch.manual_seed(0)
    batch = with_targets(student.batch(), 8)
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    batch["labels"][:, -3:] = batch["input_ids"][:, -3:]
    patch: Any = lavender.patch(model, CONFIG)
    trained = get_peft_model(model, lora(modules_to_save=["lavender"]))
    trained.train()(**batch).loss.backward()
    with torch.no_grad():
        maps = patch.capture(**{key: value for key, value in batch.items() if key != "lavender_boxes"})

    plain = get_peft_model(student.copy().model, lora())
    weights = dict(trained.named_parameters())
    assert any(is_quantized(weight) for key, weight in weights.items() if "language_model.layers.0.self_attn.q_proj" in key)
    with torch.no_grad():
        for key, weight in plain.named_parameters():
            weight.copy_(dequantized(weights[key]))
    plain.set_attn_implementation("eager")
    attention = {"llava": "LlamaAttention", "qwen2_vl": "Qwen2VLAttention", "mllama": "MllamaTextCrossAttention"}[name]
    words = words_of_batch(batch)
    with attention_weights(plain.train(), attention) as probabilities:
        language_loss = plain(**without_lavender(batch)).loss
    compared = compared_maps(probabilities, words, CONFIG)
    expected = word_maps(words, CONFIG, compared)
    torch.testing.assert_close(maps.double(), expected, rtol=1e-4, atol=1e-5)
    aligner = patch.model.lavender.modules_to_save["default"]
    alignment = copy.deepcopy(aligner).double()
    alignment.zero_grad()
    term, _ = alignment_loss(alignment, compared, words, CONFIG)
    torch.testing.assert_close(patch.last.loss.double(), term, rtol=1e-4, atol=1e-6)
    (language_loss + CONFIG.weight * term).backward()
    for key, weight in plain.named_parameters():
        if "lora_" in key:
            gradient: Any = weights[key].grad
            assert (gradient - weight.grad).norm() <= 1e-4 * weight.grad.norm() + 1e-6, key
    for own, theirs in zip(aligner.parameters(), alignment.parameters(), strict=True):
        assert (own.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm() + 1e-5
