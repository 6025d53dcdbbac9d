"""What compilers and the emulator said of the kernels, kept beside a key of all that it depends on.

    python -m tests.kernels.record [triton] [cuda] [faults]

measures anew and rewrites `recorded/*.json`. The fast tests assert on the records, and that their keys fit the sources and
compilers of now; the tests marked `full` measure everything again and compare.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "recorded"
KERNELS = ROOT / "lavender/kernels"
LAUNCHERS = [KERNELS / "grids.py", KERNELS / "numerics.py", *(KERNELS / op / f"{name}.py" for op in ("row_maps", "column_maps")
             for name in ("call", "op"))]  # fmt: skip


def key_of(paths: Iterable[Path], versions: Iterable[object]) -> str:
    """SHA-256 of files, their places in the repository, and versions."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(ROOT)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    for version in versions:
        digest.update(f"{version}\0".encode())
    return digest.hexdigest()


def triton_key() -> str:
    import triton

    from .compile_budget import ptxas_version

    sources = [KERNELS / "tiles.py", *KERNELS.glob("*/triton_kernels.py"), *KERNELS.glob("map_loss/*.py"), *LAUNCHERS]
    return key_of({*sources, ROOT / "tests/kernels/compile_budget.py"}, [triton.__version__, *ptxas_version()])


def cuda_key() -> str:
    from lavender.kernels.cuda.nvrtc import find_nvrtc

    from .cuda_budget import WIDTHS

    sources = [*(ROOT / "csrc").glob("*.cuh"), KERNELS / "cuda/driver.py", ROOT / "tests/kernels/cuda_budget.py"]
    return key_of(sources, [find_nvrtc(architecture).version for architecture in WIDTHS])


def faults_key() -> str:
    names = ("emulator.h", "emulator.py", "faults.py", "budget.py")
    sources = [*(ROOT / "csrc").glob("*.cuh"), KERNELS / "cuda/driver.py", *KERNELS.glob("*/cuda_launch.py"), *LAUNCHERS]
    return key_of([*sources, *(ROOT / "tests/kernels" / name for name in names)], [])


def measure_triton() -> dict[str, Any]:
    from .compile_budget import SHARED_BYTES, compile_apart

    return {name: numbers for capability in SHARED_BYTES for name, numbers in compile_apart(capability).items()}


def measure_cuda() -> dict[str, Any]:
    from .cuda_budget import CASES, measure

    return {name: numbers for case in CASES for name, numbers in measure(*case).items()}


def measure_faults() -> dict[str, Any]:
    from .faults import FAULTS, outcome

    return {name: outcome(name) for name in FAULTS}


RECORDS: dict[str, tuple[Callable[[], str], Callable[[], dict[str, Any]]]] = {
    "triton": (triton_key, measure_triton),
    "cuda": (cuda_key, measure_cuda),
    "faults": (faults_key, measure_faults),
}


def recorded(name: str) -> dict[str, Any]:
    """The entries of a record; fails the test, in one line, if they are those of other sources or compilers."""
    path = FOLDER / f"{name}.json"
    content = json.loads(path.read_text()) if path.exists() else {"key": None}
    if content["key"] != RECORDS[name][0]():
        pytest.fail(
            f"{path.relative_to(ROOT)} is not of these sources and compilers: run `python -m tests.kernels.record {name}`",
            pytrace=False,
        )
    return content["entries"]


def write(name: str) -> None:
    key, measure = RECORDS[name]
    before, entries = key(), measure()
    if key() != before:
        raise SystemExit(f"the sources of {name} changed while they were measured; run this again")
    lines = ",\n".join(f"  {json.dumps(entry)}: {json.dumps(value, sort_keys=True)}" for entry, value in sorted(entries.items()))
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(f'{{"key": "{before}",\n "entries": {{\n{lines}\n}}}}\n')
    print(f"{name}: {len(entries)} entries")


def main(names: list[str]) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    for name in names or RECORDS:
        write(name)


if __name__ == "__main__":
    main(sys.argv[1:])
