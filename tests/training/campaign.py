"""Trainings that are killed before and after every step by which files become what they are, and at random moments.

    python -m tests.training.campaign [--stride N] [--kills N]

Each must end as an undisturbed one: the same tensors and history, and nothing left over. The tests take a sample of it.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lavender.config import PUBLISHED, TrainingConfig
from lavender.data.samples import read_samples
from lavender.miniworld import write_dataset
from lavender.miniworld.scenes import make_scenes
from lavender.training.callback import LavenderCallback
from lavender.training.train import fine_tune

from ..crashes import crash_at
from .test_train import assert_same_run, write_targets

TRAINING = TrainingConfig(
    steps=4, batch_size=2, learning_rate=1e-3, save_steps=2, lora_dropout=0.2, arguments={"use_cpu": True, "save_total_limit": 1}
)
STAYS = {"adapter", "aligner.safetensors", "checkpoints", "history.json", "run.json", "samples.json", ".sound-0", ".lock"}
"""What a finished run's folder has."""


@dataclass(frozen=True)
class World:
    """A training that can be called again and again, and the folder of an undisturbed one."""

    train: Callable[[Path], Any]
    whole: Path

    def require_end(self, out: Path) -> None:
        assert_same_run(self.whole, out)
        assert {path.name for path in out.iterdir()} <= {*STAYS, "skipped.jsonl", ".lock.json"}
        assert [path.name for path in (out / "checkpoints").iterdir()] == [f"checkpoint-{TRAINING.steps}"]


def make_world(student_folder: Path, scenes: list[Any], folder: Path) -> World:
    torch.set_num_threads(1)  # threads of a pool do not survive a fork
    samples = read_samples(write_dataset(scenes[:8], folder / "data"))
    targets = write_targets(folder / "targets", scenes[:8], [sample.id for sample in samples])

    def train(out: Path) -> Any:
        return fine_tune(student_folder, samples, out, TRAINING, targets=targets, alignment=PUBLISHED, progress=False)

    train(folder / "whole")
    return World(train, folder / "whole")


def crash(world: World, folder: Path, points: range) -> int:
    """Kills a training at each of the points, as far as it has them, and goes on; returns how many deaths there were."""
    deaths = 0
    for point in points:
        out = folder / f"point{point}"
        if not crash_at(point, lambda out=out: world.train(out)):
            world.require_end(out)
            break
        deaths += 1
        world.train(out)
        world.require_end(out)
    return deaths


def kill(world: World, folder: Path, num_kills: int, seed: int = 0) -> tuple[int, int]:
    """Kills trainings at random moments, and goes on in the same folder until one ends: the numbers of kills and of ends."""
    moments = random.Random(seed)
    start = time.monotonic()
    world.train(folder / "timed")
    longest = time.monotonic() - start
    kills = ends = 0
    while kills < num_kills:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                world.train(folder / f"killed{ends}")
                code = 0
            finally:
                os._exit(code)
        time.sleep(moments.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), f"after {kills} kills: the training failed"
        kills += code != 0
        if code == 0:
            world.require_end(folder / f"killed{ends}")
            ends += 1
    world.train(folder / f"killed{ends}")
    world.require_end(folder / f"killed{ends}")
    return kills, ends + 1


def main() -> None:
    from recipes.student import make_model, make_processor

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--kills", type=int, default=50)
    chosen = parser.parse_args()
    logging.getLogger("lavender").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    LavenderCallback._draw = lambda *_: None  # type: ignore[method-assign]  # takes longer than a step
    with tempfile.TemporaryDirectory() as name:
        scenes = list(make_scenes(seed=11, count=64))
        processor = make_processor(scenes)
        torch.manual_seed(0)
        make_model(processor).save_pretrained(f"{name}/student")
        processor.save_pretrained(f"{name}/student")
        world = make_world(Path(name, "student"), scenes, Path(name))
        deaths = crash(world, Path(name), range(0, 10**6, chosen.stride))
        print(f"{deaths} crash points, each ended as an undisturbed training", flush=True)
        kills, ends = kill(world, Path(name), chosen.kills)
        print(f"{kills} kills at random moments of {ends} trainings, each ended as an undisturbed one")


if __name__ == "__main__":
    main()
