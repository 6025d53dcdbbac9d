"""The command line: parse, build a config, call one function. A user's mistake is one clear line and exit code 2."""

from __future__ import annotations

import sys
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from .config import AlignmentConfig, TeacherConfig, TrainingConfig
from .errors import ConfigError, LavenderError

if TYPE_CHECKING:
    from .data import Conversation, Sample

app = typer.Typer(
    name="lavender",
    help="See, and teach, where a vision-language model looks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

targets_app = typer.Typer(help="Bring published word maps into a target store, and out of it.", no_args_is_help=True)
app.add_typer(targets_app, name="targets")


class Inversion(str, Enum):
    ddim = "ddim"
    noise = "noise"


class Rows(str, Enum):
    predicts = "predicts"
    reads = "reads"


class AlignerKind(str, Enum):
    light = "light"
    sim = "sim"
    deep = "deep"
    identity = "identity"


class Format(str, Enum):
    folder = "folder"
    parquet = "parquet"


_TEACHER = TeacherConfig()
_ALIGNMENT = AlignmentConfig()
_TRAINING = TrainingConfig()


def _integers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"{option} is {text!r}; give integers separated by commas, as in 51,151,301") from None


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, runs and report; an interrupted demo in it is continued.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Chooses the training pictures, their order and the new weights.")] = 0,
) -> None:
    """Run the main job on the embedded small world and write a report.

    The teacher's word maps of generated pictures, plain fine-tuning and fine-tuning with the maps, measurements on held-out
    pictures, and runs/demo/report.html. Some minutes on two CPU cores.
    """
    from .miniworld.demo import run_demo
    from .miniworld.experiment import demo_config

    run_demo(out, demo_config(seed))


@app.command()
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
    from .data import read_pairs
    from .teacher.extract import extract as run

    config = TeacherConfig(
        inversion=inversion.value,
        inversion_steps=inversion_steps,
        diffusion_steps=diffusion_steps,
        timesteps=_integers(timesteps, "--timesteps"),
        last_timestep=last_timestep,
        layers=tuple(part.strip() for part in layers.split(",") if part.strip()),
        guidance_scale=guidance_scale,
        image_size=image_size,
        map_size=map_size,
        seed=seed,
    )
    summary = run(model, read_pairs(data), out, config, device=_device(device))
    print(f"{out}: {summary.written} written, {summary.present} there before, {summary.failed} skipped")
    if summary.failed:
        print(f"what was skipped, and why: {out / 'failed.jsonl'}")


@app.command()
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
    from .data import read_samples
    from .presets import Preset
    from .presets import preset as preset_of
    from .targets import TargetStore
    from .train import fine_tune

    if model is None and preset is None:
        raise ConfigError("no student: give --model, or a --preset that names one")
    start = Preset("", AlignmentConfig(), TrainingConfig()) if preset is None else preset_of(preset)
    alignment = {
        "weight": weight,
        "rows": rows and rows.value,
        "layers": None if layers is None else _integers(layers, "--layers"),
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


@app.command()
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

    from .miniworld import STUDENT
    from .miniworld.experiment import evaluate_student_folder, evaluate_teacher_folder

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


@targets_app.command("import")
def import_targets(
    source: Annotated[Path, typer.Argument(help="Published maps: the root of a folder of pictures, or parquet.")],
    out: Annotated[Path, typer.Option(help="Folder of the target store; an interrupted import into it is continued.")],
    samples: Annotated[
        Path | None, typer.Option(help="Samples to take ids, captions and pictures from, by the pictures' file names.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures.")] = None,
) -> None:
    """Make a target store of word maps in one of the published formats."""
    from .published import import_targets as run

    summary = run(source, out, samples=_samples(samples, images), images=images)
    print(
        f"{out}: {summary.written} written, {summary.present} there before, {summary.failed} skipped, "
        f"{summary.unused_maps} maps not used"
    )
    if summary.failed or summary.unused_maps:
        print(f"what was left out, and why: {out / 'failed.jsonl'}")


@targets_app.command("export")
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
    from .published import export_targets as run
    from .targets import TargetStore

    summary = run(TargetStore(store), out, format=format.value, samples=_samples(samples, images), images=images)
    for own_id, reason in summary.failed:
        print(f"skipped {own_id}: {reason}")
    print(f"{out}: {summary.written} samples with {summary.maps} maps written, {len(summary.failed)} skipped")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a finished `lavender demo`.")] = Path("runs/demo"),
) -> None:
    """Write report.html again from a finished demo's results."""
    from .report import write_report

    print(write_report(run))


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a transformers model or a diffusers pipeline.")],
) -> None:
    """Say what lavender finds in a model, what it can do with it, and what is missing. Weights are not loaded.

    Exit code 1 if something is missing.
    """
    from .doctor import examine

    findings = examine(model)
    width = max(len(finding.topic) for finding in findings)
    for finding in findings:
        print(f"{finding.topic:<{width}}  {finding.found}")
        if finding.remedy:
            print(f"{'':<{width}}  -> {finding.remedy}")
    if any(finding.remedy for finding in findings):
        raise typer.Exit(1)


def _samples(path: Path | None, images: Path | None) -> list[Sample | Conversation] | None:
    from .data import read_samples

    return None if path is None else read_samples(path, split=None, images=images)


def _device(name: str) -> str:
    import torch

    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]})") from None
    return name


def main() -> None:
    """Entry point of the `lavender` command."""
    try:
        app()
    except LavenderError as error:
        _say(str(error))
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        _say(f"{error.strerror}: {error.filename}")
        sys.exit(2)
    except ModuleNotFoundError as error:
        _say(f"this needs the package {error.name}; pip install 'lavender-attention[all]'")
        sys.exit(2)
    except KeyboardInterrupt:
        _say("interrupted; the same command continues")
        sys.exit(130)


def _say(message: str) -> None:
    """One line on standard error, below a progress bar if there is one."""
    tqdm.write(f"lavender: {message}", file=sys.stderr)
