"""Each command without each optional package: what needs it names it and how to install it, in one line; the rest runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lavender.errors import OPTIONAL_PACKAGES, MissingPackageError, importing, install_command
from lavender.miniworld import STUDENT, TEACHER, write_dataset
from lavender.miniworld.stores import exact_targets

ROOT = Path(__file__).parents[2]
STORE = "store"
RUN = """
import contextlib, importlib.machinery, io, json, sys

package, *commands = json.loads(sys.argv[1])

class Hiding:
    # The finder of others; a package that it does not find, nothing finds.
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] == package else self.finder.find_spec(name, *rest)

sys.meta_path[:] = map(Hiding, sys.meta_path)
from lavender.cli import main

ends = []
for command in commands:
    sys.argv = ["lavender", *command]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        ends.append([end.code, err.getvalue()])
print(json.dumps(ends))
"""

EXTRACT = ["extract", "--model", str(TEACHER), "--data", "data/captions.jsonl", "--out", "out", "--inversion", "noise"]
EXTRACT += ["--timesteps", "51", "--map-size", "8"]
TRAIN = ["train", "--model", str(STUDENT), "--data", "data/captions.jsonl", "--out", "run", "--steps", "1", "--batch-size", "1"]
FULL = [*TRAIN, "--lora-rank", "0"]
EVALUATE = ["evaluate", "--scenes", "1"]
MAPS = ["evaluate", "maps", STORE, "--masks", "data/grounding.jsonl"]
INFO = ["targets", "info", STORE]
REPORT = ["report", "nothing"]
DEMO = ["demo", "--out", "demo"]
ALIGNED = [*FULL, "--targets", STORE]


def without(package, tmp_path, *commands):
    """Exit codes and what stands on standard error, by command."""
    words = json.dumps([package, *commands])
    done = subprocess.run(
        [sys.executable, "-c", RUN, words], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


NEEDED = {
    "diffusers": (EXTRACT, ["evaluate", "--teacher", str(TEACHER)], ["doctor", str(TEACHER)], DEMO),
    "pyarrow": (EXTRACT, MAPS, INFO, ALIGNED, DEMO),
    "filelock": (EXTRACT, DEMO),
    "datasets": ([*EXTRACT[:4], "no/such-set", *EXTRACT[5:]],),
    "accelerate": (TRAIN, FULL),
    "peft": (TRAIN, [*EVALUATE, "--adapter", "data"]),
    "jinja2": (),
    "rich": (DEMO,),
    "matplotlib": ([*EXTRACT, "--preview", "1"],),
    "ray": ([*EXTRACT, "--engine", "ray"],),
    "deepspeed": (),
    "tensorboard": (),
    "spacy": ([*ALIGNED, "--set", "words.tagger=en", "--set", "words.match=root"],),
    "triton": (),
    "trl": (),
    "bitsandbytes": (),
    "torchao": (),
    "liger_kernel": (),
    "torchvision": (),
}
"""Commands that need a package."""
FREE = {
    "diffusers": (EVALUATE, ["doctor", str(STUDENT)]),
    "pyarrow": (EVALUATE,),
    "filelock": (INFO,),
    "datasets": (EXTRACT, EVALUATE),
    "matplotlib": (EXTRACT, [*ALIGNED, "--out", "aligned"]),
    "peft": (EVALUATE, EXTRACT),
    "ray": (EXTRACT,),
}
"""Commands that run without it."""


@pytest.mark.parametrize(
    "package", [name if name in ("pyarrow", "matplotlib") else pytest.param(name, marks=pytest.mark.full) for name in NEEDED]
)
def test_a_missing_package_is_one_line(package, tmp_path, scenes):
    write_dataset(scenes[:1], tmp_path / "data")
    exact_targets(tmp_path / "store", scenes[:1], 8)
    needed, free = NEEDED[package], FREE.get(package, ())
    ends = without(package, tmp_path, *needed, *free)
    for command, (code, stderr) in zip(needed, ends, strict=False):
        assert code == 2, (command, stderr)
        assert "Traceback" not in stderr
        [line] = [text for text in stderr.splitlines() if text.startswith("lavender: ")]
        assert package in line.replace("spaCy", "spacy"), line
        assert install_command(package) in line
    for command, (code, stderr) in zip(free, ends[len(needed) :], strict=True):
        assert code == 0, (command, stderr)


def test_the_table_knows_every_optional_package():
    assert NEEDED.keys() == OPTIONAL_PACKAGES.keys()
    text = (ROOT / "pyproject.toml").read_text()
    [table] = re.findall(r"^\[project.optional-dependencies\]\n(.*?)^\[", text, re.MULTILINE | re.DOTALL)
    extras = {name: re.findall(r'"([\w-]+)', items) for name, items in re.findall(r"^(\w+) = \[(.*?)\]$", table, re.M | re.S)}
    for name, package in OPTIONAL_PACKAGES.items():
        if package.extra:
            assert (package.distribution or name) in extras[package.extra], name
    assert {name for extra, names in extras.items() if extra not in ("all", "dev") for name in names} - {"ninja"} <= NEEDED.keys()


def test_the_api_says_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    import numpy as np

    from lavender.maps import overlay

    with pytest.raises(MissingPackageError, match=r"matplotlib.*pip install '\.\[report\]'.*'lavender-attention\[report\]'"):
        overlay(np.zeros((4, 4, 3), np.uint8), np.zeros((2, 2), np.float32))


def test_what_libraries_raise_in_its_place_names_the_package_too():
    for kind in (ModuleNotFoundError, RuntimeError):
        cause = ModuleNotFoundError("No module named 'accelerate.utils'", name="accelerate.utils")
        with pytest.raises(MissingPackageError, match="needs the package accelerate") as raised, importing():
            raise kind("Could not import module 'TrainingArguments'") from cause
        assert raised.value.name == "accelerate"


def test_bugs_of_lavender_are_not_missing_packages():
    with pytest.raises(ModuleNotFoundError) as raised, importing():
        import lavender.nonsense  # type: ignore[import-not-found]  # noqa: F401
    assert not isinstance(raised.value, MissingPackageError)
