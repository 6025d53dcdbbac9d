"""`lavender demo`: the main job from end to end on the small world, in minutes on a CPU."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..config import to_dict
from ..errors import LavenderError, TargetError
from ..files import FolderLock, read_json, write_within
from ..pretrained.notes import AsHere
from .experiment import (
    ARMS,
    MAIN_WORLD,
    MEASURED,
    DemoConfig,
    choose_alignment,
    compare_arms,
    fresh_scenes,
    run_arm,
    training_scenes,
    write_questions,
)
from .language import differing_settings
from .measures import compare_targets
from .report import RESULTS, TITLES, environment, headline, write_report
from .stores import target_maps, teacher_targets

SETTINGS = "demo.json"
LAYOUT = 2
"""Of the folder. The first one had no `demo.json`."""
_FIRST_LAYOUT = ("captions.jsonl", "held_out", "none")

Tell = Callable[[str, float], None]


def run_demo(out: Path, config: DemoConfig) -> Path:
    """Pictures, targets, two trainings (plain and with the teacher's maps), measurements, report; returns the report's path.

    The trainings are two processes side by side, or one after another where there is one core. Every stage continues where a killed
    run stopped. Raises `TargetError` when `out` holds a demo of other settings or of another version, or another process runs one
    there.
    """
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    with FolderLock(out, "running a demo in", error=TargetError):
        _require_same(out, config)
        console.rule("1/3  Teacher: where does each word lie?")
        teacher_targets(out / "data", training_scenes(config), config.teacher)
        write_questions(out / "data", config)
        fresh = fresh_scenes(MAIN_WORLD, config.num_fresh)
        teacher = target_maps(teacher_targets(out / "fresh", fresh, config.teacher))
        console.rule("2/3  Two students: plain, and with the teacher's maps")
        config = choose_alignment(out, config)
        _run_arms(out, config, console)
        console.rule("3/3  Report")
        results = {
            **compare_arms(out, config),
            "teacher": compare_targets(fresh, teacher),
            "config": to_dict(config),
            "environment": environment(),
        }
        write_within(out, RESULTS, json.dumps(results, indent=1) + "\n")
        report = write_report(out)
    console.print(headline(results), highlight=False)
    console.print(f"Report: {report}")
    return report


def _require_same(out: Path, config: DemoConfig) -> None:
    """Notes what the folder holds. Raises `TargetError` if it is something else."""
    try:
        lavender = version("lavender-attention")
    except PackageNotFoundError:
        lavender = "not installed"
    settings = {"layout": LAYOUT, "version": lavender, "torch": torch.__version__, **to_dict(config)}
    if (out / SETTINGS).exists():
        try:
            known = read_json(out / SETTINGS)
        except ValueError:
            raise TargetError(f"{out / SETTINGS} is damaged; choose another folder with --out") from None
        if others := differing_settings(known, settings):
            raise TargetError(f"{out} holds a demo of other settings ({others}); choose another folder with --out")
    elif old := [name for name in _FIRST_LAYOUT if (out / name).exists()]:
        raise TargetError(
            f"{out} holds a demo of an earlier version of lavender, or something else ({', '.join(old)}); its report.html stays as "
            "it is: choose another folder with --out"
        )
    write_within(out, SETTINGS, json.dumps(settings, indent=1) + "\n")


def _run_arms(out: Path, config: DemoConfig, console: Console) -> None:
    progress = Progress(
        TextColumn("{task.description:30}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[answers]}"),
        TimeElapsedColumn(),
        console=console,
    )
    with progress:
        tells: dict[str, Tell] = {}
        for arm in ARMS:
            task = progress.add_task(TITLES[arm], total=config.stage(arm).steps, answers="reads its questions")

            def tell(what: str, value: float, task: Any = task) -> None:
                if what == "step":
                    progress.update(task, completed=value)
                else:
                    progress.update(task, answers=f"{value:.0%} right")

            tells[arm] = tell
        if _cores() == 1:
            threads = torch.get_num_threads()
            try:
                torch.set_num_threads(1)
                for arm in ARMS:
                    run_arm(out, arm, config, tells[arm])
            finally:
                torch.set_num_threads(threads)
        else:
            _run_side_by_side(out, config, tells)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_side_by_side(out: Path, config: DemoConfig, tells: dict[str, Tell]) -> None:
    """A process per arm that is not finished. Raises an arm's `LavenderError`, or one if its process died."""
    context = get_context("spawn")
    with ExitStack() as stack:
        running: dict[Connection, tuple[str, Any]] = {}
        for arm, tell in tells.items():
            if (out / arm / MEASURED).exists():
                tell("step", config.stage(arm).steps)
                continue
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=AsHere(_work), args=(sending, out, arm, config), daemon=True)
            with _ignoring_interrupts():
                process.start()
            stack.callback(process.join)
            stack.callback(process.terminate)
            sending.close()  # so that its end is noticed
            running[receiving] = (arm, process)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                arm, process = running[connection]
                try:
                    message = connection.recv()
                except EOFError:
                    process.join()
                    raise TargetError(
                        f"the training in {out / arm} ended with exit code {process.exitcode}; the same command continues it"
                    ) from None
                if isinstance(message, LavenderError):
                    raise message
                if message is None:
                    del running[connection]
                else:
                    tells[arm](*message)


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes that start here ignore interrupts: a terminal's reaches them all, and the one that began the others ends them."""
    if threading.current_thread() is not threading.main_thread():  # another thread cannot choose
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(connection: Connection, out: Path, arm: str, config: DemoConfig) -> None:
    """An arm in a process of its own, which ends with the one that began it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it warns of a picture's questions in one text, of which a batch has a few
    try:
        run_arm(out, arm, config, lambda what, value: connection.send((what, value)))
    except LavenderError as error:
        connection.send(error)
    else:
        connection.send(None)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
