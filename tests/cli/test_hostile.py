"""Whatever is wrong with what a user gives, the command line ends in one line, works, or lists what it left out.

Never in a traceback or without end, and no pickle is executed. `python -m tests.cli.hostile` runs every kind that there is; here
are some of each.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .hostile_data import CASES

EVERY, IN_TEST = 4, 24
"""Of so many kinds one is tested, and one in `make test`."""
TESTED = [name for n, name in enumerate(CASES) if n % EVERY == 0 or name.startswith("malicious")]


@pytest.fixture(scope="module")
def hostile():
    """Runs a case in a process that has imported everything, and forks."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cli.hostile", "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"

    def run(name):
        process.stdin.write(name + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()
    process.wait()


def test_there_are_enough_kinds():
    assert len(TESTED) >= 250
    assert {CASES[name].arguments.split()[0] for name in TESTED} >= {"extract", "train", "evaluate", "targets", "report", "doctor"}


@pytest.mark.parametrize(
    "name", [name if n % (IN_TEST // EVERY) == 0 else pytest.param(name, marks=pytest.mark.full) for n, name in enumerate(TESTED)]
)
def test_a_kind(name, hostile):
    case, verdict = CASES[name], hostile(name)
    assert verdict["kind"] in case.ends.split("|"), (verdict["code"], verdict["more"], verdict["stderr"][-2000:])
    assert re.search(case.says, verdict["stderr"] if verdict["kind"] == "line" else verdict["stdout"])
