"""Runs the command line on hostile input: one process imports everything once, and forks for each case.

`python -m tests.cli.hostile [PATTERN ...]` prints the verdict of each case, or of those whose names begin with a pattern, and their
count by verdict.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

TIMEOUT_S = 300
"""After which a case hangs; on a machine that has nothing else to do, none takes a hundredth of it."""
SPARE_BYTES = 1 << 30
"""What a case of `memory` may allocate beside what is there already; others a few times as much."""
CANARY = "executed"
"""The file that a malicious pickle writes."""
_BAR = re.compile(r"\d+%\|| \d+(\.\d+)?(it|s)/|\d+[a-z]+ \[\d+:")


@dataclass(frozen=True)
class Case:
    """A command line and what is wrong with what it is given.

    Attributes:
        name: of the case.
        arguments: of `lavender`, as in a shell; relative paths lie in the case's folder. What of the common inputs they name, or
            `needs`, is copied there.
        spoil: edits the folder.
        ends: `line` for one line and exit code 2; `works` for exit code 0, `lists` for 1 and a list on standard output.
        says: a regular expression, found in the line or, where there is none, in the output.
        needs: common inputs beside those that the arguments name.
        writes: what in the folder may be written.
        memory: whether it is about memory.
    """

    name: str
    arguments: str
    spoil: Callable[[Path], object] | None = None
    ends: str = "line"
    says: str = ""
    needs: tuple[str, ...] = ()
    writes: tuple[str, ...] = ("out",)
    memory: bool = False


@dataclass(frozen=True)
class Verdict:
    """What a command did.

    Attributes:
        kind: `line`, `works` or `lists` (see `Case`); `noise` for a line, or a success, between other lines; `traceback`, `hang`,
            `signal`; `wrote` for a file that is not to be written, `executed` for a pickle that was.
        code: exit code, or the negative number of a signal.
    """

    kind: str
    code: int
    stderr: str
    stdout: str
    more: str
    seconds: float


def import_all() -> None:
    """What the commands import, so that no case pays for it."""
    import datasets  # noqa: F401
    import diffusers
    import matplotlib.figure  # noqa: F401
    import peft  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch
    import transformers
    from PIL import Image

    from lavender.batches import collator  # noqa: F401
    from lavender.cli import presets  # noqa: F401
    from lavender.doctor import adapter, student, teacher  # noqa: F401
    from lavender.evaluation import grounding, localization  # noqa: F401
    from lavender.extraction import extract, preview  # noqa: F401
    from lavender.miniworld import demo, measures, report  # noqa: F401
    from lavender.targets import maintenance, published_export, published_import  # noqa: F401
    from lavender.training import train  # noqa: F401

    torch.set_num_threads(1)
    Image.init()
    for name in ("LlavaForConditionalGeneration", "LlavaProcessor", "CLIPTextModel", "CLIPTokenizerFast", "CLIPVisionModel"):
        getattr(transformers, name)
    for name in ("StableDiffusionPipeline", "UNet2DConditionModel", "AutoencoderKL", "DDIMScheduler"):
        getattr(diffusers, name)


def make_inputs(base: Path) -> None:
    """The common inputs: a student, a teacher, pictures, a target store, a run with checkpoints, an adapter, a demo's results."""
    import torch

    from lavender.miniworld import write_dataset
    from lavender.miniworld.scenes import make_scenes
    from recipes.student import make_model, make_processor
    from recipes.teacher import make_pipeline, train_tokenizer
    from tests.miniworld.test_report import results_of_a_demo

    scenes = list(make_scenes(seed=11, count=64))
    torch.manual_seed(0)
    processor = make_processor(scenes)
    make_model(processor).save_pretrained(base / "student")
    processor.save_pretrained(base / "student")
    make_pipeline(train_tokenizer([scene.caption for scene in scenes])).save_pretrained(base / "teacher")
    write_dataset(scenes[:3], base / "data")
    (base / "demo").mkdir()
    (base / "demo" / "results.json").write_text(json.dumps(results_of_a_demo()))
    here = os.getcwd()
    os.chdir(base)
    try:
        _lavender("extract --model teacher --data data/captions.jsonl --out store --inversion noise --timesteps 51 --map-size 8")
        run = "train --model student --data data/captions.jsonl --batch-size 2 --targets store --steps 2 --save-steps 1 --out run"
        _lavender(run)
    finally:
        os.chdir(here)
    (base / "run" / "history.json").unlink()  # so that it goes on
    shutil.copytree(base / "run" / "adapter", base / "adapter")


def _lavender(arguments: str) -> int:
    from lavender.cli import main

    sys.argv = ["lavender", *shlex.split(arguments)]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def run(case: Case, base: Path) -> Verdict:
    """Forks, and judges what the command did in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    try:
        place = folder / "place"
        place.mkdir()
        (folder / "home").mkdir()
        for name in sorted(_named(case, base)):
            copy = shutil.copytree if (base / name).is_dir() else shutil.copy
            copy(base / name, place / name)
        if case.spoil is not None:
            case.spoil(place)
        before, common = _state(place), _state(base)
        started = time.monotonic()
        code, hangs = _fork(case, folder)
        seconds = time.monotonic() - started
        stderr, stdout = ((folder / name).read_text(errors="replace") for name in ("stderr", "stdout"))
        own = json.loads((folder / "own.json").read_text()) if (folder / "own.json").exists() else []
        after = _state(place)
        wrote = [
            name
            for name in sorted(before.keys() | after.keys())
            if before.get(name) != after.get(name)
            and not any(name == other or name.startswith(other + "/") for other in case.writes)
        ]
        wrote += [str(base)] * (_state(base) != common)
        executed = any(folder.rglob(CANARY))
        kind = "hang" if hangs else "executed" if executed else "wrote" if wrote else _kind_of(code, stderr, own)
        return Verdict(kind, code, stderr, stdout, ", ".join(wrote), seconds)
    finally:
        for path in folder.rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(folder)


def _named(case: Case, base: Path) -> set[str]:
    names = {re.split(r"[/=]", word.split("=")[-1])[0] for word in shlex.split(case.arguments)}
    return {*names, *case.needs} & set(os.listdir(base))


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(root, name)
            status = os.lstat(path)
            # Of folders the names in them count.
            found[os.path.relpath(path, folder)] = (0, 0) if name in folders else (status.st_size, status.st_mtime_ns)
    return found


def _fork(case: Case, folder: Path) -> tuple[int, bool]:
    """The exit code, and whether the case took too long."""
    child = os.fork()
    if not child:
        _child(case, folder)
    end = time.monotonic() + TIMEOUT_S
    pause = 0.005
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what it left running
            return os.waitstatus_to_exitcode(status), False
        time.sleep(pause)
        pause = min(0.05, 2 * pause)
    os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), True


def _child(case: Case, folder: Path) -> NoReturn:
    code = 99
    try:
        os.setsid()
        os.chdir(folder / "place")
        os.environ |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "home")}
        for number, name, mode in ((0, os.devnull, os.O_RDONLY), (1, "stdout", os.O_WRONLY), (2, "stderr", os.O_WRONLY)):
            os.dup2(os.open(folder / name, mode | (os.O_CREAT if number else 0), 0o600), number)
        os.closerange(3, 256)  # nothing of this process's outlives it in one that hangs
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        most = used + (1 if case.memory else 4) * SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        own = _Own()
        logging.getLogger("lavender").addHandler(own)
        code = _lavender(case.arguments)
        (folder / "own.json").write_text(json.dumps(own.messages))
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class _Own(logging.Handler):
    """Keeps what lavender itself warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _kind_of(code: int, stderr: str, own: list[str]) -> str:
    if code < 0:
        return "signal"
    if "Traceback (most recent call last)" in stderr:
        return "traceback"
    for message in own:
        stderr = stderr.replace(message, "")
    lines = [line for line in re.split(r"[\r\n]", stderr) if line.strip() and not _BAR.search(line)]
    if code in (0, 1):
        return "noise" if lines else "works" if code == 0 else "lists"
    return "line" if code == 2 and len(lines) == 1 and lines[0].startswith("lavender: ") else "noise"


def serve() -> None:
    """Answers names of cases, one a line on standard input, by verdicts in JSON."""
    from .hostile_data import CASES

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints while it is imported
    with inputs() as base:
        answers.write("ready\n")
        answers.flush()
        for line in sys.stdin:
            answers.write(json.dumps(asdict(run(CASES[line.strip()], base))) + "\n")
            answers.flush()


@contextlib.contextmanager
def inputs() -> Iterator[Path]:
    import_all()
    with tempfile.TemporaryDirectory(prefix="hostile-inputs-") as name:
        base = Path(name).resolve()
        child = os.fork()  # which computes, so that this process keeps one thread
        if not child:
            code = 1
            try:
                make_inputs(base)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        if os.waitpid(child, 0)[1]:
            raise RuntimeError("the inputs cannot be made")
        yield base


def count(patterns: list[str]) -> None:
    """Prints the verdict of each case, and how many there are of each kind."""
    from .hostile_data import CASES

    verdicts: Counter[str] = Counter()
    wrong: list[str] = []
    with inputs() as base:
        for name, case in CASES.items():
            if patterns and not any(re.match(pattern, name) for pattern in patterns):
                continue
            verdict = run(case, base)
            verdicts[verdict.kind] += 1
            good = verdict.kind in case.ends.split("|")
            if not good:
                wrong.append(name)
            shown = " | ".join(line for line in re.split(r"[\r\n]+", verdict.stderr) if line.strip() and not _BAR.search(line))
            if not shown:
                shown = " | ".join(verdict.stdout.splitlines())
            mark = "  " if good else "!!"
            print(f"{mark} {verdict.kind:<9} {verdict.seconds:5.1f}s {name}: {verdict.more} {shown[-700:]}", flush=True)
    counts = ", ".join(f"{kind} {number}" for kind, number in verdicts.most_common())
    print(f"{sum(verdicts.values())} cases: {counts}; {len(wrong)} not as expected")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is nothing here is asked of the hub, again and again
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        count(sys.argv[1:])
