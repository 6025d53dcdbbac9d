"""The embedded default: a small world of scenes, a small teacher and a small student that ship inside the package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .scenes import DESCRIBE, Scene

WEIGHTS = Path(__file__).parent / "weights"
TEACHER = WEIGHTS / "teacher"
"""A diffusers folder: `StableDiffusionPipeline.from_pretrained(TEACHER)`."""
STUDENT = WEIGHTS / "student"
"""A transformers folder: `AutoModelForImageTextToText.from_pretrained(STUDENT)`."""

TRAINING_SEED = 100
"""Seed of the scenes that students are fine-tuned on; the embedded models have not seen them."""
HELD_OUT_SEED = 200
"""Seed of the scenes that everything is measured on."""


def write_dataset(scenes: Sequence[Scene], folder: Path) -> Path:
    """Writes pictures and `captions.jsonl` (lines of `image`, `caption`, `question`, `answer`); returns the latter's path."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, scene in enumerate(scenes):
        name = f"images/{number:05d}.png"
        scene.image.save(folder / name)
        line = {"image": name, "caption": scene.caption, "question": DESCRIBE, "answer": scene.caption}
        lines.append(json.dumps(line))
    path = folder / "captions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
