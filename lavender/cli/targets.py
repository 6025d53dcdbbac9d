"""`lavender targets`: what can be done with a target store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import Format
from .options import PAIR_OPTIONS, with_options

if TYPE_CHECKING:
    from ..data.samples import Conversation, Sample

app = typer.Typer(
    help="Look at target stores, check and merge them; bring published word maps into one, and out of it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def info(store: Annotated[Path, typer.Argument(help="Folder of the target store, finished or not.")]) -> None:
    """Print what a target store holds."""
    from ..config import TeacherConfig, to_dict
    from ..targets.maintenance import info as run

    facts, defaults = run(store), to_dict(TeacherConfig())
    entries = {**facts.source, **to_dict(facts.config)}
    changed = {name: value for name, value in entries.items() if name in defaults and value != defaults[name]}
    for topic, text in (
        ("teacher", ", ".join(f"{name} {value}" for name, value in entries.items() if name not in defaults)),
        ("settings", ", ".join(f"{name}={value}" for name, value in changed.items()) or "the defaults"),
        ("finished", "yes" if facts.complete else "no: run the same command again to continue it"),
        ("samples", f"{facts.samples} in {facts.shards} shards; {facts.failed} failed"),
        ("words", f"{facts.words}, {facts.words_without_map} of them without a map"),
        ("size", f"{facts.num_bytes / 1e6:.1f} MB, {facts.bytes_per_sample:.0f} bytes a sample"),
    ):
        print(f"{topic:<8}  {text}")


@app.command()
@with_options(pairs=PAIR_OPTIONS)
def verify(
    *,
    store: Annotated[Path, typer.Argument(help="Folder of the target store.")],
    data: Annotated[
        str | None, typer.Option(help="Data set that it was extracted from, to look for what is missing; as for extract.")
    ] = None,
    pairs: dict[str, Any],
) -> None:
    """Check every byte and every row of a target store. Exit code 1, and a line for each problem, if there is any."""
    from ..targets.maintenance import verify as run
    from ..targets.store import TargetStore

    source = None
    if data is not None:
        from ..data.sources import open_pairs

        source = open_pairs(data, **pairs)
    problems = run(store, source)
    if problems:
        print("\n".join(problems))
        raise typer.Exit(1)
    sound = TargetStore(store)
    print(f"{len(sound)} samples in {len(sound.shards)} shards: sound")


@app.command()
def merge(
    stores: Annotated[list[Path], typer.Argument(help="Folders of finished target stores, of the same teacher and settings.")],
    out: Annotated[Path, typer.Option(help="New folder; an interrupted merge into it is continued.")],
) -> None:
    """Make several target stores into one; a sample that is in several is taken once."""
    from ..targets.maintenance import merge as run

    print(f"{out}: {run(stores, out)} samples")


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
    from ..targets.published_import import import_targets as run

    summary = run(source, out, samples=_read_samples(samples, images), images=images)
    print(
        f"{out}: {summary.written} written, {summary.present} there before, {summary.failed} skipped, "
        f"{summary.unused_maps} maps not used"
    )
    if summary.failed or summary.unused_maps:
        print(f'what was left out, and why: "failed" in {out / "manifest.json"}')


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
    from ..targets.published_export import export_targets as run
    from ..targets.store import TargetStore

    summary = run(TargetStore(store), out, format=format, samples=_read_samples(samples, images), images=images)
    for sample_id, reason in summary.failed:
        print(f"skipped {sample_id}: {reason}")
    print(f"{out}: {summary.written} samples with {summary.maps} maps written, {len(summary.failed)} skipped")


def _read_samples(path: Path | None, images: Path | None) -> list[Sample | Conversation] | None:
    from ..data.samples import read_samples

    return None if path is None else read_samples(path, split=None, images=images)
