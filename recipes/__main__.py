"""Train the embedded models again, and measure them: `python -m recipes train|card teacher|student ...`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a model of the small world by its recipe")
    train.add_argument("model", choices=["teacher", "student"])
    train.add_argument("--out", type=Path, required=True, help="folder to write; an unfinished run in it is continued")
    train.add_argument("--seed", type=int, default=0)
    card = commands.add_parser("card", help="measure a trained model and write its README.md")
    card.add_argument("model", choices=["teacher", "student"])
    card.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    # Sums are ordered by thread: with one thread the same seed gives the same weights.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if arguments.command == "card":
        from .cards import write_card

        print(write_card(arguments.model, arguments.folder))
    elif arguments.model == "teacher":
        from .teacher import TeacherRecipe, train_teacher

        train_teacher(arguments.out, TeacherRecipe(seed=arguments.seed))
    else:
        from .student import StudentRecipe, train_student

        train_student(arguments.out, StudentRecipe(seed=arguments.seed))


if __name__ == "__main__":
    main()
