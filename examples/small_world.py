"""Something to try the other scripts on: generated pictures with captions, and the maps of the small teacher inside lavender."""

from pathlib import Path

import lavender
from lavender.miniworld.experiment import ExperimentConfig, extract_targets, training_scenes


def make_data(folder="runs/small_world"):
    """Writes captions.jsonl and targets/ (what is there already stays), and returns where they are."""
    scenes = training_scenes(ExperimentConfig(num_train=16))
    store = extract_targets(Path(folder), scenes, lavender.TeacherConfig(inversion="noise", timesteps=(151,)))
    return Path(folder) / "captions.jsonl", store.folder


if __name__ == "__main__":
    print("--data {} --targets {}".format(*make_data()))
