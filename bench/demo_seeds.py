"""Does the demo show the same with other seeds? `lavender demo` five times, and what its reports say.

    python bench/demo_seeds.py --out runs/demo-seeds [--json bench/results/demo_seeds.json]

A finished demo in the folder is read, an interrupted one is continued.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lavender.miniworld.demo import run_demo
from lavender.miniworld.experiment import ARMS, MAIN_WORLD, demo_config
from lavender.miniworld.report import environment, read_results

SEEDS = range(5)


def figures_of(results: dict[str, Any]) -> dict[str, Any]:
    """The answers of both students, and of the first picture's words that are an object's how many point into it."""
    row = results["answers"][MAIN_WORLD]["all"]
    words = [word["found"] for question in results["examples"][0]["questions"] for word in question["words"] if "found" in word]
    return {
        "answers": {arm: row[key]["mean"] for arm, key in zip(ARMS, ("first", "second"), strict=True)},
        "difference": row["difference"],
        "first picture": {arm: [sum(found[arm] for found in words), len(words)] for arm in ARMS},
        "cpu_s": {arm: history[-1]["cpu_s"] for arm, history in results["history"].items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-seeds"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = {}
    for seed in SEEDS:
        folder = arguments.out / f"seed{seed}"
        run_demo(folder, demo_config(seed))
        found[seed] = figures_of(read_results(folder))
        print(f"seed {seed}: {found[seed]}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": environment(), "seeds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
