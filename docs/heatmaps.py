"""Draws the README's picture from a finished demo: `python docs/heatmaps.py runs/demo [number of the example]`."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from lavender.maps import overlay
from lavender.miniworld.report import EXAMPLES, TITLES


def main() -> None:
    run, number = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with np.load(run / EXAMPLES) as stored:
        picture, words = stored[f"{number}/picture"], [str(w) for w in stored[f"{number}/words"]]
        rows = {"Teacher": stored[f"{number}/diffusion"]}
        rows |= {TITLES[arm]: stored[f"{number}/{arm}"] for arm in ("before", "none", "teacher")}
        caption = str(stored[f"{number}/caption"])
    size = (1.25 * (len(words) + 1) + 0.9, 1.25 * len(rows) + 0.6)
    figure, axes = plt.subplots(len(rows), len(words) + 1, figsize=size, layout="constrained")
    figure.suptitle(caption, fontsize=12)
    for row, (title, maps) in zip(axes, rows.items(), strict=True):
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].imshow(picture)
        row[0].set_ylabel(title, fontsize=9)
        for axis, values in zip(row[1:], maps, strict=True):
            axis.imshow(overlay(picture, values), interpolation="bilinear")
    for axis, word in zip(axes[0][1:], words, strict=True):
        axis.set_title(word, fontsize=11)
    figure.savefig(Path(__file__).with_name("heatmaps.png"), dpi=110)


if __name__ == "__main__":
    main()
