"""How much faster two processes extract than one, on the embedded small world; and that disturbed runs end with the same bytes.

    python bench/extract_scale.py [--pictures N] [--repeats N] [--json OUT.json]

Each run is a process of its own; one and two take turns, and medians are compared. Before anything is printed, the shards of all
runs must be equal, byte by byte, with those of two actors of Ray of which one is killed while the other works. `work` is the time
from the first picture that is asked for, when every process has loaded its teacher, to the end; `whole` is that of the command.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from lavender.config import ExtractionConfig, TeacherConfig
from lavender.data.samples import Pair
from lavender.data.sources import BadPair, Pairs, open_pairs
from lavender.extraction.extract import extract
from lavender.miniworld import TEACHER, write_dataset
from lavender.miniworld.report import environment
from lavender.miniworld.scenes import make_scenes
from lavender.targets.manifest import read_manifest

CONFIG = TeacherConfig(inversion="noise")
SHARD_SIZE = 64
WAYS: dict[str, dict[str, Any]] = {
    "one process": {"devices": ("cpu",)},
    "two processes": {"devices": ("cpu", "cpu")},
    "two actors of Ray, one killed": {"devices": ("cpu", "cpu"), "engine": "ray"},
}


class Timed(Pairs):
    """Pairs that remember when the first of them was asked for."""

    def __init__(self, pairs: Pairs) -> None:
        self.count, self._pairs, self.asked = pairs.count, pairs, 0.0

    def _entries(self) -> Iterator[Pair | BadPair]:
        self.asked = time.perf_counter()
        yield from self._pairs


def run_here(way: str, data: Path, out: Path) -> None:
    """One extraction; prints the seconds of its work."""
    killer = threading.Thread(target=kill_an_actor, args=(out,))
    if "killed" in way:
        killer.start()
    pairs = Timed(open_pairs(data))
    extract(TEACHER, pairs, out, CONFIG, ExtractionConfig(shard_size=SHARD_SIZE, **WAYS[way]), progress=False)
    print(json.dumps({"work_s": time.perf_counter() - pairs.asked}))
    if "killed" in way:
        killer.join()


def kill_an_actor(out: Path) -> None:
    """Kills one as soon as something is stored, so that work is left."""
    while not any(out.glob("pending/*.parquet")):
        time.sleep(0.01)
    actors = [own for own in psutil.Process().children(recursive=True) if "MapWorker" in " ".join(own.cmdline())]
    assert len(actors) == 2, f"there are {len(actors)} actors"
    actors[0].kill()
    assert not read_manifest(out)["complete"], "the actor was killed when all was done"


def run(way: str, data: Path, out: Path) -> dict[str, float]:
    """One extraction in a new process; seconds of its work, and of the whole command."""
    command = [sys.executable, __file__, "--way", way, "--data", str(data), "--out", str(out)]
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True)
    whole = time.perf_counter() - start
    assert result.returncode == 0, result.stderr
    return {"work_s": json.loads(result.stdout.splitlines()[-1])["work_s"], "whole_s": whole}


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("data-*.parquet")}


def measure(pictures: int, repeats: int, folder: Path) -> list[dict[str, object]]:
    data = write_dataset(list(make_scenes(seed=7, count=pictures)), folder / "data")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    wanted: dict[str, bytes] = {}
    for repeat in range(repeats):
        for way in list(WAYS)[: 3 if repeat == 0 else 2]:
            out = folder / f"{len(found[way])} {way}"
            found[way].append(run(way, data, out))
            wanted = wanted or shards(out)
            assert shards(out) == wanted, f"{way}: other bytes than one process"
    return [
        {"way": way, "runs": len(runs)} | {name: round(statistics.median(own[name] for own in runs), 2) for name in runs[0]}
        for way, runs in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    for own in ("--way", "--data", "--out"):  # of the processes that are started here
        parser.add_argument(own, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        run_here(arguments.way, Path(arguments.data), Path(arguments.out))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments.pictures, arguments.repeats, Path(folder))
    one, two = rows[:2]
    ratios = {f"two_over_one_{name[:-2]}": round(one[name] / two[name], 3) for name in ("work_s", "whole_s")}  # type: ignore[operator]
    print(f"{arguments.pictures} pictures; the shards of every run are byte-identical")
    for row in rows:
        rate = arguments.pictures / row["work_s"]  # type: ignore[operator]
        print(f"{row['way']:<30} {row['work_s']:>7} s of work ({rate:.1f} pictures/s), {row['whole_s']:>7} s with loading")
    print(f"throughput of two processes over one: {ratios['two_over_one_work']} x without loading, "
          f"{ratios['two_over_one_whole']} x with it")  # fmt: skip
    if arguments.json:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        record = {
            "environment": environment() | {"commit": head.stdout.strip()},
            "pictures": arguments.pictures,
            "byte_identical": True,
            **ratios,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
