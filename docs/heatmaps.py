"""Draws the README's picture from a finished demo: `python docs/heatmaps.py runs/demo [number of the example]`."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from lavender.miniworld.report import TITLES, draw_map, draw_scene, example_scene, read_results

WIDTH = 8.0
"""Of the picture, in sides of a map."""
BETWEEN, HEAD, FOOT, LABEL = 0.3, 0.62, 0.22, 0.34
"""In sides of a map: between two questions, above and below a row, and to its left."""
RIGHT, WRONG = "#1f8a4c", "#c2413a"


def main() -> None:
    run, number = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    example = read_results(run)["examples"][number]
    scene = example_scene(example)
    lines: list[list[dict]] = [[]]
    x = LABEL + 1 + BETWEEN  # the picture comes first
    for question in example["questions"]:
        if x + len(question["words"]) > WIDTH:
            lines.append([])
            x = LABEL
        lines[-1].append(question)
        x += len(question["words"]) + BETWEEN
    height = len(lines) * (HEAD + len(TITLES) * (1 + FOOT)) + 0.1
    figure = plt.figure(figsize=(1.5 * WIDTH, 1.5 * height))

    def show(x: float, y: float, pixels: np.ndarray) -> None:
        """A map whose upper left corner is at so many sides from the figure's."""
        axis = figure.add_axes((x / WIDTH, 1 - (y + 0.97) / height, 0.97 / WIDTH, 0.97 / height))
        axis.imshow(pixels)
        axis.set_axis_off()

    def write(x: float, y: float, text: str, size: float, **more: object) -> None:
        figure.text(
            x / WIDTH, 1 - y / height, text, **{"ha": "center", "va": "baseline", "fontsize": size, "linespacing": 1.05, **more}
        )

    y = HEAD
    for n, questions in enumerate(lines):
        x = LABEL
        if n == 0:
            write(x + 0.5, y - 0.06, "the picture", 10)
            show(x, y, draw_scene(scene))
            x += 1 + BETWEEN
        for question in questions:
            width = len(question["words"])
            write(x + width / 2, y - 0.26, fill(question["text"], 17 * width), 11, fontweight="bold")
            for row, (arm, title) in enumerate(TITLES.items()):
                top = y + row * (1 + FOOT)
                for place, word in enumerate(question["words"]):
                    if row == 0:
                        write(x + place + 0.5, top - 0.06, ("→ " if word["role"] == "answer" else "") + word["word"], 10)
                    show(x + place, top, draw_map(scene, word["maps"][arm], word["object"]))
                said, right = question["said"][arm], question["said"][arm] == question["answer"]
                write(x + width / 2, top + 1.13, f"says “{said}” {'✓' if right else '✗'}", 10, color=RIGHT if right else WRONG)
                if question is questions[0]:
                    at = LABEL + (1 + BETWEEN if n == 0 else 0) - 0.05
                    label = fill(title.lower(), 12)
                    write(at, top + 0.5, label, 9, rotation=90, ha="right", va="center", multialignment="center")
            x += width + BETWEEN
        y += HEAD + len(TITLES) * (1 + FOOT)
    figure.savefig(Path(__file__).with_name("heatmaps.png"), dpi=90)


if __name__ == "__main__":
    main()
