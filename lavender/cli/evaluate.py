"""`lavender evaluate`, and `lavender evaluate maps` for any target store."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import AlignmentConfig
from ..errors import ConfigError
from ..files import write_atomically
from .options import with_options

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
@with_options(alignment=(AlignmentConfig, ("rows",)))
def evaluate(
    *,
    context: typer.Context,
    student: Annotated[
        str | None, typer.Option(help="Folder or hub id (or NAME@REVISION) of a student; the embedded one if neither is given.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Folder or hub id (or NAME@REVISION) of a LoRA adapter for the student.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Folder or hub id (or NAME@REVISION) of a teacher to measure instead.")
    ] = None,
    alignment: dict[str, Any],
    scenes: Annotated[int, typer.Option(min=1, help="Number of held-out scenes of the small world.")] = 150,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
) -> None:
    """Measure where a student or a teacher looks, and what a student answers, on held-out scenes of the small world."""
    if context.invoked_subcommand is not None:
        for name in context.params:
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                raise ConfigError(f"--{name} stands before {context.invoked_subcommand}; its own options come behind it")
        return

    from ..miniworld import STUDENT
    from ..miniworld.measures import evaluate_student_folder, evaluate_teacher_folder

    if teacher is not None and (student is not None or adapter is not None):
        raise ConfigError("--teacher measures a teacher; leave out --student and --adapter")
    _require_folder(out)
    if teacher is not None:
        figures = evaluate_teacher_folder(teacher, scenes)
    else:
        named = str(STUDENT) if student is None else student
        figures = evaluate_student_folder(named, adapter, scenes, AlignmentConfig(**alignment).rows)
    text = json.dumps(figures, indent=2)
    print(text)
    if out is not None:
        write_atomically(out, text + "\n")


@app.command()
def maps(
    store: Annotated[Path, typer.Argument(help="Folder of the target store.")],
    masks: Annotated[Path, typer.Option(help="Masks or boxes: JSON lines, COCO's instances, or the folder of Flickr30k Entities.")],
    out: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
) -> None:
    """Measure where the word maps of a target store lie, on the masks or boxes that its pictures have.

    Control is the mean map of all measured words of a caption; chance is a map of noise.
    """
    from ..evaluation.grounding import read_groundings
    from ..evaluation.localization import evaluate_maps
    from ..targets.store import TargetStore

    _require_folder(out)
    figures = evaluate_maps(TargetStore(store), read_groundings(masks))
    counts = figures["counts"]
    measures = ("pointing", "own_object", "iou", "auc")
    print(" " * 8 + "".join(f"{measure:>12}" for measure in measures))
    for name in ("maps", "control", "chance"):
        print(f"{name:<8}" + "".join(f"{figures[name][measure]:>12.4f}" for measure in measures))
    print(
        f"{counts['words_measured']} words of {counts['samples_measured']} samples measured, of {counts['samples']} in the store; "
        f"{counts['samples_without_grounding']} samples without masks, {counts['words_without_map']} words without a map, "
        f"{counts['words_not_measurable']} whose object is not within it or fills it"
    )
    if out is not None:
        # JSON knows no NaN, which `own_object` is where every picture has one object.
        sound = {name: {k: None if math.isnan(v) else v for k, v in values.items()} for name, values in figures.items()}
        write_atomically(out, json.dumps(sound, indent=2) + "\n")


def _require_folder(out: Path | None) -> None:
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--out is {out}; there is no folder {out.parent}")
