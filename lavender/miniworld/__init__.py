"""The embedded default: a small world of scenes, a small teacher and a small student that ship inside the package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..evaluation.grounding import run_lengths
from ..files import own_path, write_within
from .scenes import DESCRIBE, MEASURED_KINDS, Scene

WEIGHTS = Path(__file__).parent / "weights"
TEACHER = WEIGHTS / "teacher"
"""A diffusers folder: `StableDiffusionPipeline.from_pretrained(TEACHER)`."""
STUDENT = WEIGHTS / "student"
"""A transformers folder: `AutoModelForImageTextToText.from_pretrained(STUDENT)`."""

TRAINING_SEED = 100
"""Seed of the scenes that students are fine-tuned on; the embedded models have not seen them."""
HELD_OUT_SEED = 200
"""Seed of the scenes that everything is measured on."""


def write_dataset(scenes: Sequence[Scene], folder: str | Path) -> Path:
    """Writes pictures, `captions.jsonl` (lines of `image`, `caption`, `question`, `answer`) and `grounding.jsonl`.

    The grounding has every object's exact mask and the words to measure(`evaluation.grounding`). Returns the captions' path.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    captions, groundings = [], []
    for number, scene in enumerate(scenes):
        name = f"images/{number:05d}.png"
        scene.image.save(own_path(folder, name))
        captions.append({"image": name, "caption": scene.caption, "question": DESCRIBE, "answer": scene.caption})
        objects = [{"rle": run_lengths(mask)} for mask in scene.masks]
        measured = [r for r in scene.referents if r.kind in MEASURED_KINDS]
        words = [{"start": r.start, "end": r.end, "object": r.object_index} for r in measured]
        groundings.append({"id": name, "objects": objects, "words": words})
    for name, lines in (("grounding.jsonl", groundings), ("captions.jsonl", captions)):
        write_within(folder, name, "\n".join(map(json.dumps, lines)) + "\n")
    return folder / "captions.jsonl"
