"""`lavender train`."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import AlignmentConfig, TrainingConfig
from ..errors import ConfigError
from .options import Rows, integers

_ALIGNMENT = AlignmentConfig()
_TRAINING = TrainingConfig()


class AlignerKind(str, Enum):
    light = "light"
    sim = "sim"
    deep = "deep"
    identity = "identity"


def train(
    data: Annotated[Path, typer.Option(help='JSON lines {"image", "question", "answer"}, or a published format.')],
    out: Annotated[Path, typer.Option(help="Run folder; an interrupted run in it is continued.")],
    model: Annotated[str | None, typer.Option(help="Folder or hub id of the student; the preset's without it.")] = None,
    targets: Annotated[Path | None, typer.Option(help="Target store of `lavender extract`; plain fine-tuning without it.")] = None,
    preset: Annotated[str | None, typer.Option(help="Settings to start from, such as llama-3.2-11b-vision-lora.")] = None,
    weight: Annotated[float | None, typer.Option(help=f"Lambda, the weight of the alignment loss [{_ALIGNMENT.weight}].")] = None,
    rows: Annotated[Rows | None, typer.Option(help=f"Which row speaks for a token [{_ALIGNMENT.rows}].")] = None,
    layers: Annotated[str | None, typer.Option(help="Decoder layers to align, as numbers from 0 [all].")] = None,
    aligner: Annotated[AlignerKind | None, typer.Option(help=f"The aligner's size [{_ALIGNMENT.aligner}].")] = None,
    steps: Annotated[int | None, typer.Option(help=f"Optimizer steps [{_TRAINING.steps}].")] = None,
    batch_size: Annotated[int | None, typer.Option(help=f"Samples a step and device [{_TRAINING.batch_size}].")] = None,
    learning_rate: Annotated[float | None, typer.Option(help=f"Peak learning rate of AdamW [{_TRAINING.learning_rate}].")] = None,
    lora_rank: Annotated[int | None, typer.Option(help=f"LoRA's rank; 0 trains every weight [{_TRAINING.lora_rank}].")] = None,
    gradient_checkpointing: Annotated[bool | None, typer.Option(help="Recompute activations in the backward pass.")] = None,
    save_steps: Annotated[int | None, typer.Option(help=f"Steps between checkpoints [{_TRAINING.save_steps}].")] = None,
    seed: Annotated[int | None, typer.Option(help=f"Seed of order, dropout and new weights [{_TRAINING.seed}].")] = None,
    adapter: Annotated[Path | None, typer.Option(help="LoRA adapter to start from, in place of a new one.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any other setting: alignment.schedule=linear, words.match=exact, training.arguments.bf16=true."
        ),
    ] = None,
) -> None:
    """Fine-tune a student, with the alignment loss if there are targets."""
    from ..data.samples import read_samples
    from ..targets.store import TargetStore
    from ..training.train import fine_tune
    from .presets import Preset
    from .presets import preset as preset_of

    if model is None and preset is None:
        raise ConfigError("no student: give --model, or a --preset that names one")
    start = Preset("", AlignmentConfig(), TrainingConfig()) if preset is None else preset_of(preset)
    alignment = {
        "weight": weight,
        "rows": rows and rows.value,
        "layers": None if layers is None else integers(layers, "--layers"),
        "aligner": aligner and aligner.value,
    }
    training = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "lora_rank": lora_rank,
        "gradient_checkpointing": gradient_checkpointing,
        "save_steps": save_steps,
        "seed": seed,
    }
    chosen = replace(
        start, alignment=replace(start.alignment, **_given(alignment)), training=replace(start.training, **_given(training))
    ).with_settings(setting or [])
    store = TargetStore(targets) if targets is not None else None
    settings = {"alignment": chosen.alignment, "words": chosen.words} if store is not None else {}
    fine_tune(model or chosen.model, read_samples(data), out, chosen.training, targets=store, adapter=adapter, **settings)
    print(f"{out}: {'adapter/' if chosen.training.lora_rank else 'model/'} and history.json written")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
