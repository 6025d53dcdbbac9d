"""`lavender train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import AlignmentConfig, TrainingConfig
from ..errors import ConfigError
from .options import with_options


@with_options(
    alignment=(AlignmentConfig, ("weight", "rows", "layers", "heads", "aligner")),
    training=(
        TrainingConfig,
        ("steps", "batch_size", "learning_rate", "lora_rank", "gradient_checkpointing", "save_steps", "seed"),
    ),
)
def train(
    *,
    data: Annotated[Path, typer.Option(help='JSON lines {"image", "question", "answer"}, or a published format.')],
    out: Annotated[Path, typer.Option(help="Run folder; an interrupted run in it is continued.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id (or NAME@REVISION) of the student; the preset's without it.")
    ] = None,
    targets: Annotated[Path | None, typer.Option(help="Target store of `lavender extract`; plain fine-tuning without it.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Settings to start from in place of the defaults, such as llama-3.2-11b-vision-lora.")
    ] = None,
    alignment: dict[str, Any],
    training: dict[str, Any],
    adapter: Annotated[
        str | None, typer.Option(help="Folder or hub id (or NAME@REVISION) of a LoRA adapter to start from, in place of a new one.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End before the first step if a sample cannot be used, in place of skipping it.")
    ] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any other setting: alignment.schedule=linear, words.match=exact, training.arguments.bf16=true."
        ),
    ] = None,
) -> None:
    """Fine-tune a student, with the alignment loss if there are targets."""
    from ..data.samples import read_samples
    from ..training.samples import SKIPPED
    from ..training.train import fine_tune
    from .presets import Preset
    from .presets import preset as preset_of

    if model is None and preset is None:
        raise ConfigError("no student: give --model, or a --preset that names one")
    start = Preset("", AlignmentConfig(), TrainingConfig()) if preset is None else preset_of(preset)
    chosen = replace(
        start, alignment=replace(start.alignment, **alignment), training=replace(start.training, **training)
    ).with_settings(setting or [])
    store = None
    if targets is not None:
        from ..targets.store import TargetStore

        store = TargetStore(targets)
    fine_tune(
        chosen.model if model is None else model,
        read_samples(data),
        out,
        chosen.training,
        targets=store,
        alignment=chosen.alignment,
        words=chosen.words,
        adapter=adapter,
        strict=strict,
    )
    skipped = out / SKIPPED
    print(
        f"{out}: {'adapter/' if chosen.training.lora_rank else 'model/'} and history.json written"
        + f"; samples were skipped, which {skipped} lists" * skipped.exists()
    )
