"""`lavender extract`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import ExtractionConfig, Inversion, TeacherConfig
from ..errors import ConfigError
from .options import PAIR_OPTIONS, flag_of, with_options
from .settings import override

_TEACHER = (
    *("inversion", "inversion_steps", "diffusion_steps", "timesteps", "last_timestep", "layers", "resolutions", "heads"),
    *("guidance_scale", "long_captions", "image_size", "fit", "map_size", "storage", "dtype", "seed"),
)
_EXTRACTION = ("devices", "batch_size", "engine", "offload")
_WITHOUT_USE: dict[Inversion, tuple[str, ...]] = {
    "ddim": ("timesteps", "inner_steps"),
    "flow": ("timesteps", "inner_steps"),
    "null_text": ("timesteps", "inversion_steps"),
    "noise": ("inversion_steps", "diffusion_steps", "inner_steps", "first_timestep", "last_timestep", "guidance_scale"),
}
"""Settings that an inversion ignores."""


@with_options(pairs=PAIR_OPTIONS, teacher=(TeacherConfig, _TEACHER), extraction=(ExtractionConfig, _EXTRACTION))
def extract(
    *,
    model: Annotated[
        str, typer.Option(help="Folder or hub id (or NAME@REVISION) of a text-to-image pipeline: Stable Diffusion, Flux, PixArt.")
    ],
    data: Annotated[
        str,
        typer.Option(
            help='JSON lines {"image", "caption"}; a folder: imagefolder, or a.txt beside a.jpg; CSV, parquet or tars, or a '
            "pattern of them; a hub id; URLs."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the target store; an interrupted extraction in it is continued.")],
    pairs: dict[str, Any],
    preview: Annotated[
        int | None,
        typer.Option(
            min=1, help="Only draw the maps of so many pictures into OUT/preview.png, and estimate the time and disk of all."
        ),
    ] = None,
    failed_only: Annotated[bool, typer.Option("--failed-only", help="Only try again what failed before.")] = False,
    rehash: Annotated[
        bool,
        typer.Option("--rehash", help="Read every stored picture again, not only those whose files have another size or time."),
    ] = False,
    teacher: dict[str, Any],
    extraction: dict[str, Any],
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting: head_reduction=max, vae_tiling=true, layer_weights=[1,2], threads=4."),
    ] = None,
) -> None:
    """Ask a diffusion model where each word of each caption lies, and store the maps. Exit code 1 if no picture could be used."""
    from ..data.sources import open_pairs
    from ..extraction.extract import extract as run
    from ..extraction.preview import preview as draw

    if preview is not None and failed_only:
        raise ConfigError("--preview draws and stops, --failed-only extracts; give one of them")
    teacher_settings, extraction_settings = _split_settings(setting or [])
    config = override(TeacherConfig(**teacher), teacher_settings)
    for name in _WITHOUT_USE[config.inversion]:
        if getattr(config, name) != getattr(TeacherConfig, name):
            raise ConfigError(
                f"{name} is {getattr(config, name)}, which inversion={config.inversion} does nothing with; leave it out"
            )
    work = override(ExtractionConfig(**extraction), extraction_settings)
    if work.engine == "local":
        for device in work.devices:
            _require_usable(device)
    source = open_pairs(data, **pairs)
    if preview is not None:
        print(draw(model, source, out, preview, config, work))
        return
    summary = run(model, source, out, config, work, failed_only=failed_only, rehash=rehash)
    print(f"{out}: {summary.written} written, {summary.present} there before, {summary.failed} skipped")
    if summary.failed:
        print(f'what was skipped, and why: "failed" in {out / "manifest.json"}; to try it alone: --failed-only')
        if not summary.written + summary.present:
            raise typer.Exit(1)


def _split_settings(assignments: list[str]) -> tuple[list[str], list[str]]:
    """The teacher's settings and the extraction's. Raises `ConfigError` on an unknown one, and on one
    that has an option."""
    settings: dict[type, list[str]] = {TeacherConfig: [], ExtractionConfig: []}
    owners = {field.name: cls for cls in settings for field in fields(cls)}
    for assignment in assignments:
        name = assignment.partition("=")[0].strip()
        if name in _TEACHER + _EXTRACTION:
            raise ConfigError(f"--set {assignment}: this has an option of its own, {flag_of(name)}")
        if name not in owners:
            others = ", ".join(sorted(owners.keys() - {*_TEACHER, *_EXTRACTION}))
            raise ConfigError(f"there is no setting {name!r}; --set takes {others}")
        settings[owners[name]].append(assignment)
    return settings[TeacherConfig], settings[ExtractionConfig]


def _require_usable(device: str) -> None:
    import torch

    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]})") from None
