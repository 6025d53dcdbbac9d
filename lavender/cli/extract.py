"""`lavender extract`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..config import TeacherConfig
from .options import integers, usable_device

_TEACHER = TeacherConfig()


class Inversion(str, Enum):
    ddim = "ddim"
    noise = "noise"


def extract(
    model: Annotated[str, typer.Option(help="Folder or hub id of a Stable Diffusion 1.x or 2.x pipeline.")],
    data: Annotated[Path, typer.Option(help='JSON lines {"image", "caption"}, or a folder in the imagefolder layout of datasets.')],
    out: Annotated[Path, typer.Option(help="Folder of the target store; an interrupted extraction in it is continued.")],
    inversion: Annotated[
        Inversion,
        typer.Option(help="ddim: invert, then read while denoising. noise: add noise, read one forward each."),
    ] = Inversion.ddim,
    inversion_steps: Annotated[int, typer.Option(help="ddim: steps of the inversion.")] = _TEACHER.inversion_steps,
    diffusion_steps: Annotated[int, typer.Option(help="ddim: steps of the denoising.")] = _TEACHER.diffusion_steps,
    timesteps: Annotated[str, typer.Option(help="noise: training timesteps, 0 to 999.")] = ",".join(map(str, _TEACHER.timesteps)),
    last_timestep: Annotated[int, typer.Option(help="ddim: read below this timestep only.")] = _TEACHER.last_timestep,
    layers: Annotated[
        str, typer.Option(help="Cross-attention layers to read, as name parts: mid_block,up_blocks.1. All if empty.")
    ] = "",
    guidance_scale: Annotated[float, typer.Option(help="ddim: classifier-free guidance; 1 is none.")] = _TEACHER.guidance_scale,
    image_size: Annotated[
        int | None, typer.Option(help="Side that pictures are resized to, in pixels; the model's own by default.")
    ] = None,
    map_size: Annotated[int, typer.Option(help="Height and width of the stored maps.")] = _TEACHER.map_size,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = _TEACHER.seed,
    device: Annotated[str, typer.Option(help="Where the teacher runs: cpu, cuda, cuda:1, mps.")] = "cpu",
) -> None:
    """Ask a diffusion model where each word of each caption lies, and store the maps."""
    from ..data import read_pairs
    from ..teacher.extract import extract as run

    config = TeacherConfig(
        inversion=inversion.value,
        inversion_steps=inversion_steps,
        diffusion_steps=diffusion_steps,
        timesteps=integers(timesteps, "--timesteps"),
        last_timestep=last_timestep,
        layers=tuple(part.strip() for part in layers.split(",") if part.strip()),
        guidance_scale=guidance_scale,
        image_size=image_size,
        map_size=map_size,
        seed=seed,
    )
    summary = run(model, read_pairs(data), out, config, device=usable_device(device))
    print(f"{out}: {summary.written} written, {summary.present} there before, {summary.failed} skipped")
    if summary.failed:
        print(f"what was skipped, and why: {out / 'failed.jsonl'}")
