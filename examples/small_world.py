"""Something to try the other scripts on: generated pictures with captions, and the maps of the small teacher inside lavender."""

from pathlib import Path

import lavender
from lavender.miniworld import TRAINING_SEED
from lavender.miniworld.scenes import make_scenes
from lavender.miniworld.stores import teacher_targets


def make_data(folder="runs/small_world"):
    """Writes captions.jsonl and targets/ (what is there already stays), and returns where they are."""
    scenes = list(make_scenes(TRAINING_SEED, 16))
    store = teacher_targets(Path(folder), scenes, lavender.TeacherConfig(inversion="noise", timesteps=(151,)))
    return Path(folder) / "captions.jsonl", store.folder


if __name__ == "__main__":
    print("--data {} --targets {}".format(*make_data()))
