"""`lavender targets`: what can be done with a target store."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .options import samples_in

app = typer.Typer(help="Bring published word maps into a target store, and out of it.", no_args_is_help=True)


class Format(str, Enum):
    folder = "folder"
    parquet = "parquet"


@app.command("import")
def import_targets(
    source: Annotated[Path, typer.Argument(help="Published maps: the root of a folder of pictures, or parquet.")],
    out: Annotated[Path, typer.Option(help="Folder of the target store; an interrupted import into it is continued.")],
    samples: Annotated[
        Path | None, typer.Option(help="Samples to take ids, captions and pictures from, by the pictures' file names.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures.")] = None,
) -> None:
    """Make a target store of word maps in one of the published formats."""
    from ..published import import_targets as run

    summary = run(source, out, samples=samples_in(samples, images), images=images)
    print(
        f"{out}: {summary.written} written, {summary.present} there before, {summary.failed} skipped, "
        f"{summary.unused_maps} maps not used"
    )
    if summary.failed or summary.unused_maps:
        print(f"what was left out, and why: {out / 'failed.jsonl'}")


@app.command("export")
def export_targets(
    store: Annotated[Path, typer.Argument(help="Folder of the target store.")],
    out: Annotated[Path, typer.Argument(help="New folder, or new file whose name ends in .parquet.")],
    format: Annotated[Format, typer.Option(help="folder: one JPEG a word. parquet: one row a sample, with its picture.")],
    samples: Annotated[Path | None, typer.Option(help="The store's samples, for their pictures and questions.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures; without --samples, the store's ids are paths in it.")
    ] = None,
) -> None:
    """Write a target store in one of the published formats."""
    from ..published import export_targets as run
    from ..targets import TargetStore

    summary = run(TargetStore(store), out, format=format.value, samples=samples_in(samples, images), images=images)
    for own_id, reason in summary.failed:
        print(f"skipped {own_id}: {reason}")
    print(f"{out}: {summary.written} samples with {summary.maps} maps written, {len(summary.failed)} skipped")
