"""The cards of the embedded models: what made them, what it cost, and what they measure, written by the measurement itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lavender.config import TeacherConfig
from lavender.miniworld.measures import compare_targets, evaluate_answers, evaluate_attention, held_out_scenes, teacher_maps
from lavender.miniworld.scenes import Scene
from lavender.patching import patch
from lavender.students.loading import load_student
from lavender.teachers.model import Teacher, load_pipeline

from .teacher import make_text_encoder, make_unet, to_float

NUM_SCENES = 200
NUM_UNTRAINED = 5


def measure_teacher(folder: Path) -> dict[str, Any]:
    """Localization under both inversions, of the same pipeline with an untrained U-Net, and the autoencoder's fidelity."""
    scenes = held_out_scenes(NUM_SCENES)
    figures: dict[str, Any] = {"scenes": NUM_SCENES}
    for inversion in ("ddim", "noise"):
        teacher = Teacher(folder, TeacherConfig(inversion=inversion))
        figures[inversion] = compare_targets(scenes, teacher_maps(teacher, scenes))
    figures["untrained_unet"] = measure_untrained(folder, scenes, text_encoder_too=False)
    figures["untrained"] = measure_untrained(folder, scenes, text_encoder_too=True)
    figures["autoencoder_psnr_db"] = round(autoencoder_psnr(load_pipeline(folder).vae, scenes), 2)
    return figures


def measure_untrained(folder: Path, scenes: list[Scene], *, text_encoder_too: bool) -> dict[str, float]:
    """Mean over several random U-Nets: with so few different words, each favors places of its own."""
    per_seed = []
    for seed in range(NUM_UNTRAINED):
        pipe = load_pipeline(folder)
        torch.manual_seed(seed)
        pipe.unet = make_unet()
        if text_encoder_too:
            pipe.text_encoder = make_text_encoder(pipe.tokenizer)
        teacher = Teacher(pipe, TeacherConfig(inversion="noise"))
        per_seed.append(compare_targets(scenes, teacher_maps(teacher, scenes))["maps"])
    return {key: float(np.mean([figures[key] for figures in per_seed])) for key in per_seed[0]}


@torch.no_grad()
def autoencoder_psnr(autoencoder: Any, scenes: Sequence[Scene]) -> float:
    """Peak signal-to-noise ratio of decoded against original pictures in decibels, mean over scenes."""
    pixels = to_float(torch.from_numpy(np.stack([s.pixels for s in scenes])).permute(0, 3, 1, 2))
    decoded = autoencoder.decode(autoencoder.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    error = ((decoded - pixels) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * torch.log10(error)).mean())


def measure_student(folder: Path) -> dict[str, Any]:
    """Answers by question type, and localization of the raw attention for both kinds of rows."""
    scenes = held_out_scenes(NUM_SCENES)
    model, processor = load_student(folder)
    figures: dict[str, Any] = {"scenes": NUM_SCENES, "answers": evaluate_answers(model, processor, scenes)}
    with patch(model) as handle:
        for rows in ("predicts", "reads"):
            figures[f"attention_{rows}"] = evaluate_attention(handle, processor, scenes, rows)["raw"]
    return figures


def write_card(model: str, folder: Path) -> Path:
    """Measures a trained model and writes its `README.md`; returns the path."""
    record = json.loads((folder / "recipe.json").read_text())
    text = _teacher_card(record, measure_teacher(folder)) if model == "teacher" else _student_card(record, measure_student(folder))
    path = folder / "README.md"
    path.write_text(text)
    return path


def _teacher_card(record: dict[str, Any], figures: dict[str, Any]) -> str:
    rows = []
    for title, key in (("DDIM inversion (5 + 10)", "ddim"), ("noise at 51, 151, 301", "noise")):
        rows.append(_row(title, figures[key]["maps"]))
    rows.append(_row(f"untrained U-Net, trained text encoder, noise (mean of {NUM_UNTRAINED})", figures["untrained_unet"]))
    rows.append(_row(f"untrained U-Net and text encoder, noise (mean of {NUM_UNTRAINED})", figures["untrained"]))
    rows.append(_row("word-agnostic control (noise)", figures["noise"]["control"]))
    rows.append(_row("chance", figures["noise"]["chance"]))
    return f"""# The small teacher

A text-to-image diffusion model of 64x64 pictures, made for `lavender`'s demo and tests. An ordinary diffusers folder:
`StableDiffusionPipeline.from_pretrained(folder)`.

## Measured on {figures["scenes"]} held-out scenes

Color and shape words.

| maps | pointing | own object | IoU | AUC |
|---|---|---|---|---|
{chr(10).join(rows)}

Autoencoder: {figures["autoencoder_psnr_db"]} dB on the same pictures.

{_how("teacher", record)}"""


def _student_card(record: dict[str, Any], figures: dict[str, Any]) -> str:
    answers = "\n".join(
        f"| {kind} | {a['accuracy']:.3f} | {a['low']:.3f} to {a['high']:.3f} | {a['questions']} |"
        for kind, a in figures["answers"].items()
    )
    rows = []
    for name in ("predicts", "reads"):
        rows.append(_row(f"rows that {name[:-1]} the word", figures[f"attention_{name}"]["maps"]))
        rows.append(_row("its word-agnostic control", figures[f"attention_{name}"]["control"]))
    rows.append(_row("chance", figures["attention_reads"]["chance"]))
    return f"""# The small student

A vision-language model of 64x64 pictures, made for `lavender`'s demo and tests: a Llava with a CLIP vision tower and a Llama.
An ordinary transformers folder: `AutoModelForImageTextToText.from_pretrained(folder)`, `AutoProcessor.from_pretrained(folder)`.

## Measured on {figures["scenes"]} held-out scenes

| question | right | 95 % interval | questions |
|---|---|---|---|
{answers}

Raw attention (mean over layers and heads), color and shape words of captions:

| rows | pointing | own object | IoU | AUC |
|---|---|---|---|---|
{chr(10).join(rows)}

{_how("student", record)}"""


def _row(title: str, figures: dict[str, float]) -> str:
    return "| " + " | ".join([title, *(f"{figures[key]:.3f}" for key in ("pointing", "own_object", "iou", "auc"))]) + " |"


def _how(model: str, record: dict[str, Any]) -> str:
    seed = record["recipe"]["seed"]
    cost = "\n".join(
        f"- {stage}: {c['steps']} steps, {c['cpu_seconds']} CPU seconds on one core" for stage, c in record["cost"].items()
    )
    return f"""## Recipe

`python -m recipes train {model} --seed {seed} --out FOLDER`; every number of it is in `recipe.json`.

{cost}

The pictures are generated (`lavender/miniworld/scenes.py`); no other data was used. Weights are float16. License: Apache-2.0.
"""
