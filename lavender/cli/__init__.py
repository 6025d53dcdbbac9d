"""The command line: parse, build a config, call one function. A user's mistake is one clear line and exit code 2."""

from __future__ import annotations

import sys
import traceback
from contextlib import nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ..errors import LavenderError, ModelError, first_line, importing, lacks_memory
from ..pretrained.notes import without_notes
from ..signals import Stopped
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
_INTERRUPTED = 130
"""The exit code of what Ctrl-C ended."""


@app.callback()
def options(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what the libraries in use warn of, and where an error arose.")
    ] = False,
) -> None:
    # `main` reads the option, before anything is imported; without the docstring of a callback, the help above stays.
    del verbose


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
    Exit code 1 if something is missing, 2 if a file of weights is damaged.
    """
    from ..doctor import examine, examine_machine

    findings = examine_machine() if model is None else examine(model)
    width = max(len(finding.topic) for finding in findings) + 2
    for finding in findings:
        print(f"{finding.topic:<{width}}{finding.result}".replace("\n", "\n" + " " * width))
        if finding.remedy:
            print(f"{'':<{width}}-> {finding.remedy}")
    for finding in findings:
        if finding.is_damaged:
            raise ModelError(finding.result)
    if any(finding.remedy for finding in findings):
        raise typer.Exit(1)


# typer has its own copy of click, or uses click itself.
UsageError, ClickException = typer.BadParameter.__mro__[1:3]


def main() -> None:
    """Entry point of the `lavender` command: exit code 2, with one line on standard error, for what the user can mend."""
    verbose = sys.argv[1:2] in (["-v"], ["--verbose"])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # names of files need not be Unicode
            stream.reconfigure(errors="backslashreplace")
    if not verbose:  # to the process's end: libraries' finalizers may fail on what an error left half made
        sys.unraisablehook = lambda _: None
    try:
        with nullcontext() if verbose else without_notes(), importing():
            code = app(prog_name="lavender", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Stopped as end:
        _print_error(str(end))
        raise
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        message = _message_of(error)
        if message is None:
            raise
        if verbose:
            traceback.print_exception(error)
        _print_error(message)
        sys.exit(2)
    if code == _INTERRUPTED:
        _print_error("interrupted; the same command continues")
    sys.exit(code if isinstance(code, int) else 0)


def _message_of(error: Exception) -> str | None:
    """What to tell the user of an error; None where it is a bug of lavender's."""
    if isinstance(error, LavenderError):
        return str(error)
    if isinstance(error, ClickException):
        context = getattr(error, "ctx", None)
        remedy = f"; see {context.command_path} --help" if context is not None else ""
        return " ".join(error.format_message().split()).rstrip(".") + remedy  # type: ignore[attr-defined]
    if lacks_memory(error):
        return f"there is not enough memory ({first_line(error)}); ask for less at once, such as by a smaller --batch-size"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror}: {error.filename}" if error.filename is not None else str(error.strerror)
    return None


def _print_error(message: str) -> None:
    """One line on standard error, below a progress bar if there is one."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    tqdm.write(f"lavender: {line}", file=sys.stderr)
