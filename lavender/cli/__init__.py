"""The command line: parse, build a config, call one function. A user's mistake is one clear line and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ..errors import LavenderError, importing
from .evaluate import app as evaluate_app
from .extract import extract
from .targets import app as targets_app
from .train import train

app = typer.Typer(
    name="lavender",
    help="See, and teach, where a vision-language model looks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it would take "[all]" for markup
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, runs and report; an interrupted demo in it is continued.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Chooses the training pictures, their order and the first weights.")
    ] = 0,
) -> None:
    """Run the main job on the embedded small world and write a report.

    The teacher's word maps of generated pictures; a small student that learns to answer questions about them from random weights,
    once plainly and once with the maps; measurements on fresh pictures, and runs/demo/report.html. Some minutes on two CPU cores.
    """
    from ..miniworld.demo import run_demo
    from ..miniworld.experiment import demo_config

    run_demo(out, demo_config(seed))


app.command()(extract)
app.command()(train)
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(targets_app, name="targets")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Folder of a finished `lavender demo`.")] = Path("runs/demo")) -> None:
    """Write report.html again from a finished demo's results."""
    from ..miniworld.report import write_report

    print(write_report(run))


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder or hub id (or NAME@REVISION) of a transformers model, an adapter or a diffusers pipeline; the machine "
            "without it."
        ),
    ] = None,
) -> None:
    """Report what lavender finds in a model, what it can do with it, and what is missing. Loads no weights.

    Without a model: what this machine has, by which kernels lavender runs on it, and what is missing.
    Exit code 1 if something is missing.
    """
    from ..doctor import examine, examine_machine

    findings = examine_machine() if model is None else examine(model)
    width = max(len(finding.topic) for finding in findings) + 2
    for finding in findings:
        print(f"{finding.topic:<{width}}{finding.result}".replace("\n", "\n" + " " * width))
        if finding.remedy:
            print(f"{'':<{width}}-> {finding.remedy}")
    if any(finding.remedy for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the `lavender` command."""
    try:
        with importing():
            app()
    except LavenderError as error:
        _print_error(str(error))
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        _print_error(f"{error.strerror}: {error.filename}")
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:  # what typer makes of Ctrl-C
            _print_error("interrupted; the same command continues")
        raise


def _print_error(message: str) -> None:
    """One line on standard error, below a progress bar if there is one."""
    tqdm.write(f"lavender: {message}", file=sys.stderr)
