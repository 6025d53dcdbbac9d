"""Something to try the other scripts on: generated pictures with captions, and the maps of the small teacher inside lavender."""

import json
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


def make_questions(folder="runs/small_world"):
    """Writes questions.jsonl beside them: questions about the same pictures, each with an id of its own.

    An answer that names nothing ("yes", "red") lies where the shape lies that it is about: its region is the caption's word.
    """
    captions, targets = make_data(folder)
    lines = []
    for number, scene in enumerate(make_scenes(TRAINING_SEED, 16)):
        for n, asked in enumerate(scene.questions):
            line = {"id": f"{number}-{n}", "image": f"images/{number:05d}.png", "question": asked.text, "answer": asked.answer}
            if asked.object_index is not None:
                line["regions"] = [{"turn": 1, "word": scene.objects[asked.object_index].shape}]
            lines.append(json.dumps(line))
    (captions.parent / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return captions.parent / "questions.jsonl", targets


if __name__ == "__main__":
    print("--data {} --targets {}".format(*make_data()))
