"""`lavender evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .options import Rows


def evaluate(
    student: Annotated[
        str | None, typer.Option(help="Folder or hub id of a student; the embedded one if neither is given.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="LoRA adapter folder for the student.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Folder or hub id of a teacher to measure instead.")] = None,
    rows: Annotated[Rows, typer.Option(help="Which row of a student's attention speaks for a token.")] = Rows.predicts,
    scenes: Annotated[int, typer.Option(min=1, help="Number of held-out scenes of the small world.")] = 150,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
) -> None:
    """Measure where a student or a teacher looks, and what a student answers, on held-out scenes of the small world."""
    import json

    from ..miniworld import STUDENT
    from ..miniworld.experiment import evaluate_student_folder, evaluate_teacher_folder

    if teacher is not None and (student is not None or adapter is not None):
        raise ConfigError("--teacher measures a teacher; leave out --student and --adapter")
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--out is {out}; there is no folder {out.parent}")
    if teacher is not None:
        figures = evaluate_teacher_folder(teacher, scenes)
    else:
        figures = evaluate_student_folder(student or str(STUDENT), adapter, scenes, rows.value)
    text = json.dumps(figures, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n")
