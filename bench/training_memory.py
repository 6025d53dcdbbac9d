"""What a training step's memory is with alignment, beside plain fine-tuning and eager attention weights.

A Llama 3.2 Vision of few and narrow layers, as long as the real one: 1,024 text tokens that read 6,404 keys, four tiles. Every way
runs in this one process, after a round that pays for what is loaded late; the medians of several rounds are printed, and
written with `--json`. Peak memory is what a step takes on top of what was there before it: weights and gradients stay.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from attn_fusion import peak_bytes
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

import lavender
from lavender.config import AlignmentConfig
from lavender.miniworld.report import environment
from lavender.students.boxes import square_boxes, tiled_boxes
from lavender.types import WordBatch

TEXT, TILES, SIDE, WORDS, VOCABULARY = 1024, 4, 40, 16, 8192
KEYS = TILES * (1 + SIDE * SIDE)
M_MMAP_THRESHOLD = -3


def student() -> MllamaForConditionalGeneration:
    """Five layers, one of them a cross-attention, as in the real model; its gate is open."""
    torch.manual_seed(0)
    text = MllamaTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        cross_attention_layers=[3],
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    vision = MllamaVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_global_layers=1, attention_heads=2, image_size=14 * SIDE
    )
    model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text, image_token_index=1))
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.constant_(parameter, 0.5)
    return model.train()


def batch_for(model: MllamaForConditionalGeneration) -> tuple[dict[str, torch.Tensor], WordBatch]:
    """One sample's inputs, its picture already encoded, and its words."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (1, TEXT), generator=generator)
    inputs = {
        "input_ids": ids,
        "labels": ids,
        "cross_attention_mask": torch.ones(1, TEXT, 1, TILES, dtype=torch.long),
        "cross_attention_states": torch.randn(1, KEYS, model.config.text_config.hidden_size, generator=generator),
    }
    boxes = torch.full((TILES, 1 + SIDE * SIDE, 4), torch.nan)
    boxes[:, 1:] = tiled_boxes(2, 2, square_boxes(SIDE, SIDE)).view(TILES, -1, 4)
    words = WordBatch(
        tokens=torch.arange(TEXT - WORDS, TEXT)[None],
        token_words=torch.arange(WORDS)[None],
        token_weights=torch.ones(1, WORDS),
        image_positions=torch.arange(KEYS)[None],
        present=torch.ones(1, WORDS, dtype=torch.bool),
        boxes=boxes.flatten(0, 1)[None],
        targets=torch.rand(1, WORDS, 32, 32, generator=generator),
    )
    return inputs, words


def ways() -> dict[str, Callable[[], object]]:
    """A forward and backward pass, plain and with maps by one or the other way."""
    model = student()
    inputs, words = batch_for(model)

    def step(**given: torch.Tensor) -> None:
        model(**inputs, **given).loss.backward()

    def aligned(aligner: str) -> None:
        with lavender.patch(model, AlignmentConfig(aligner=aligner)):
            step(**words.to_batch())

    def eager() -> None:
        model.set_attn_implementation("eager")
        output = model(**inputs, output_attentions=True)
        maps = output.attentions[3][:, :, words.tokens[0] - 1]
        (output.loss + maps.square().sum()).backward()
        model.set_attn_implementation("sdpa")

    return {
        "plain": step,
        "aligned, identity": lambda: aligned("identity"),
        "aligned, sim": lambda: aligned("sim"),
        "eager output_attentions": eager,
    }


def measure(rounds: int) -> dict[str, float]:
    """Median peak memory of a step by way, in MiB."""
    calls = ways()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            peak = peak_bytes(call, torch.device("cpu"))
            assert peak is not None, "peak memory can be asked on Linux only"
            if turn:
                found[name].append(peak / 2**20)
    return {name: round(statistics.median(peaks), 1) for name, peaks in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    # Blocks of 64 KiB and more go back at once: the process's size is then what is in use, not what was.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    peaks = measure(arguments.rounds)
    rows = [{"way": name, "peak_mib": peak, "x_plain": round(peak / peaks["plain"], 3)} for name, peak in peaks.items()]
    for row in rows:
        print(f"{row['way']:<26} {row['peak_mib']:>8.1f} MiB   {row['x_plain']:.3f} x plain")
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
