"""`lavender extract`."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..config import (
    Dtype,
    Engine,
    ExtractionConfig,
    Fit,
    Inversion,
    LongCaptions,
    Offload,
    Storage,
    TeacherConfig,
    override,
)
from ..errors import ConfigError
from .options import integers, usable_device

_TEACHER = TeacherConfig()
_WORK = ExtractionConfig()
_OPTIONS = {
    *("inversion", "inversion_steps", "diffusion_steps", "timesteps", "last_timestep", "layers", "resolutions", "heads"),
    *("guidance_scale", "long_captions", "image_size", "fit", "map_size", "storage", "dtype", "seed"),
    *("devices", "batch_size", "engine", "offload"),
}
"""Settings that have an option of their own."""
_WITHOUT_USE: dict[Inversion, tuple[str, ...]] = {
    "ddim": ("timesteps", "inner_steps"),
    "flow": ("timesteps", "inner_steps"),
    "null_text": ("timesteps", "inversion_steps"),
    "noise": ("inversion_steps", "diffusion_steps", "inner_steps", "first_timestep", "last_timestep", "guidance_scale"),
}
"""What an inversion does nothing with."""


class Captions(str, Enum):
    first = "first"
    all = "all"


def extract(
    model: Annotated[str, typer.Option(help="Folder or hub id of a text-to-image pipeline: Stable Diffusion, Flux, PixArt.")],
    data: Annotated[
        str,
        typer.Option(help='JSON lines {"image", "caption"}; imagefolder; parquet or tars, or a pattern of them; a hub id; URLs.'),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the target store; an interrupted extraction in it is continued.")],
    images: Annotated[str | None, typer.Option(help="Folder that image paths are relative to; the data's own by default.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set or of Karpathy's JSON.")] = "train",
    captions: Annotated[Captions, typer.Option(help="Where a picture has several captions.")] = Captions.first,
    image_column: Annotated[str | None, typer.Option(help="Column of the pictures, where it cannot be told.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of the captions, where it cannot be told.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of the ids, if not `id`.")] = None,
    preview: Annotated[
        int | None,
        typer.Option(
            min=1, help="Only draw the maps of so many pictures into OUT/preview.png, and estimate the time and disk of all."
        ),
    ] = None,
    failed_only: Annotated[bool, typer.Option("--failed-only", help="Only try again what failed before.")] = False,
    inversion: Annotated[
        Inversion,
        typer.Option(
            help="ddim: invert, then read while denoising; null_text: so with exact guidance; flow: for Stable Diffusion 3 and "
            "Flux; noise: add noise, read one forward each."
        ),
    ] = _TEACHER.inversion,
    inversion_steps: Annotated[int, typer.Option(help="Steps of the inversion.")] = _TEACHER.inversion_steps,
    diffusion_steps: Annotated[int, typer.Option(help="Steps of the denoising.")] = _TEACHER.diffusion_steps,
    timesteps: Annotated[str, typer.Option(help="noise: training timesteps, 0 to 999.")] = ",".join(map(str, _TEACHER.timesteps)),
    last_timestep: Annotated[int, typer.Option(help="All but noise: read up to this timestep only.")] = _TEACHER.last_timestep,
    layers: Annotated[str, typer.Option(help="Attention layers to read, as name parts: mid_block,up_blocks.1 [all].")] = "",
    resolutions: Annotated[str, typer.Option(help="Layers to read by the longer side of their grid: 16,32 [all].")] = "",
    heads: Annotated[str, typer.Option(help="Heads to read, from 0 [all].")] = "",
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = _TEACHER.guidance_scale,
    long_captions: Annotated[
        LongCaptions, typer.Option(help="Captions beyond the text encoder's window: read in chunks, truncated, or refused.")
    ] = _TEACHER.long_captions,
    image_size: Annotated[int | None, typer.Option(help="Side of the square that pictures are brought to [the model's].")] = None,
    fit: Annotated[Fit, typer.Option(help="How they are brought to it.")] = _TEACHER.fit,
    map_size: Annotated[int, typer.Option(help="Height and width of the stored maps.")] = _TEACHER.map_size,
    storage: Annotated[Storage, typer.Option(help="What maps are stored as.")] = _TEACHER.storage,
    dtype: Annotated[Dtype, typer.Option(help="In which the teacher runs.")] = _TEACHER.dtype,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = _TEACHER.seed,
    device: Annotated[str, typer.Option(help="Where teachers run, a process each: cuda, or cuda:0,cuda:1; cpu; mps.")] = "cpu",
    batch_size: Annotated[int, typer.Option(help="Pictures that are computed together.")] = _WORK.batch_size,
    engine: Annotated[Engine, typer.Option(help="local: this machine. ray: Ray Data's actors, as many as devices.")] = _WORK.engine,
    offload: Annotated[Offload, typer.Option(help="What leaves the GPU while it is not used.")] = _WORK.offload,
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
    of_teacher, of_work = ({field.name for field in fields(kind)} for kind in (TeacherConfig, ExtractionConfig))
    teacher_settings, work_settings = [], []
    for assignment in setting or []:
        name = assignment.partition("=")[0].strip()
        if name in _OPTIONS:
            option = "--device" if name == "devices" else f"--{name.replace('_', '-')}"
            raise ConfigError(f"--set {assignment}: this has an option of its own, {option}")
        if name not in of_teacher | of_work:
            raise ConfigError(f"there is no setting {name!r}; --set takes {', '.join(sorted((of_teacher | of_work) - _OPTIONS))}")
        (teacher_settings if name in of_teacher else work_settings).append(assignment)
    config = override(
        TeacherConfig(
            inversion=inversion,
            inversion_steps=inversion_steps,
            diffusion_steps=diffusion_steps,
            timesteps=integers(timesteps, "--timesteps"),
            last_timestep=last_timestep,
            layers=tuple(part.strip() for part in layers.split(",") if part.strip()),
            resolutions=integers(resolutions, "--resolutions"),
            heads=integers(heads, "--heads"),
            guidance_scale=guidance_scale,
            long_captions=long_captions,
            image_size=image_size,
            fit=fit,
            map_size=map_size,
            storage=storage,
            dtype=dtype,
            seed=seed,
        ),
        teacher_settings,
    )
    for name in _WITHOUT_USE[config.inversion]:
        if getattr(config, name) != getattr(_TEACHER, name):
            raise ConfigError(
                f"{name} is {getattr(config, name)}, which inversion={config.inversion} does nothing with; leave it out"
            )
    devices = tuple(part.strip() for part in device.split(",") if part.strip())
    if engine == "local":
        devices = tuple(usable_device(name) for name in devices)
    work = override(ExtractionConfig(batch_size=batch_size, devices=devices, engine=engine, offload=offload), work_settings)
    pairs = open_pairs(
        data,
        images=images,
        split=split,
        captions=captions.value,
        image_column=image_column,
        caption_column=caption_column,
        id_column=id_column,
    )
    if preview is not None:
        print(draw(model, pairs, out, preview, config, work))
        return
    summary = run(model, pairs, out, config, work, failed_only=failed_only)
    print(f"{out}: {summary.written} written, {summary.present} there before, {summary.failed} skipped")
    if summary.failed:
        print(f'what was skipped, and why: "failed" in {out / "manifest.json"}; to try it alone: --failed-only')
        if not summary.written + summary.present:
            raise typer.Exit(1)
