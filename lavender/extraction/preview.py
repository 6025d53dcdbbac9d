"""The maps of some pictures before the long run, and what that run will cost."""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..config import ExtractionConfig, TeacherConfig
from ..data.pairs import BadPair, Pair
from ..data.sources import as_pairs
from ..errors import DataError, TargetError, importing
from ..files import name_full_disk, write_within
from ..images import load_image
from ..maps import overlay
from ..targets.shards import Target, encoded, to_table
from ..words import FUNCTION_WORDS
from .engines import Batch, Finished, Worker

WORDS_SHOWN = 8
PICTURES_SHOWN = 100
"""More would be higher than a drawing can be."""


@dataclass(frozen=True)
class Preview:
    """What was drawn, and an estimate of the whole run.

    Attributes:
        path: the drawing.
        failures: pictures that could not be used, with the reason.
        seconds: per picture, on one device.
        bytes: per picture, in the store.
        num_pictures: of the input; None if it cannot be told, then the estimate is of 1000.
        num_devices: that share the work.
    """

    path: Path
    failures: tuple[tuple[str, str], ...]
    seconds: float
    bytes: float
    num_pictures: int | None
    num_devices: int

    def __str__(self) -> str:
        lines = [f"skipped {sample_id}: {reason}" for sample_id, reason in self.failures]
        lines.append(f"{self.path}: look at it before the long run")
        lines.append(f"one picture: {_time(self.seconds)} on one device, {_size(self.bytes)} in the store")
        count, what = (1000, "1000 pictures") if self.num_pictures is None else (self.num_pictures, f"all {self.num_pictures}")
        devices = "one device" if self.num_devices == 1 else f"{self.num_devices} devices"
        time_of_all = _time(self.seconds * count / self.num_devices)
        lines.append(f"{what}: about {time_of_all} on {devices}, {_size(self.bytes * count)}")
        return "\n".join(lines)


def _time(seconds: float) -> str:
    """A length of time in the unit that suits it."""
    units = (("s", 1, 60), ("min", 60, 60), ("h", 3600, 48), ("days", 86400, float("inf")))
    return _in_unit(seconds, units)


def _size(num_bytes: float) -> str:
    units = [(name, 1024.0**n, 1024.0) for n, name in enumerate(("bytes", "KiB", "MiB", "GiB"))]
    return _in_unit(num_bytes, [*units, ("TiB", 1024.0**4, float("inf"))])


def _in_unit(value: float, units: Iterable[tuple[str, float, float]]) -> str:
    """Three digits in the first unit of which there are fewer than its limit, once they are rounded."""
    name, digits = next((name, digits) for name, unit, limit in units if (digits := float(f"{value / unit:.3g}")) < limit)
    return f"{digits:g} {name}"


def preview(
    model: str | Path | Any,
    pairs: Iterable[Pair | BadPair] | str | Path,
    out: str | Path,
    count: int,
    config: TeacherConfig | None = None,
    work: ExtractionConfig | None = None,
) -> Preview:
    """Draws heat maps of the first `count` pictures' words (of 100 of them at most) into `out`/preview.png; nothing is stored.

    The time is that of the batches after the first, which warms the device up (of the first, if it is the only one). The other
    arguments are those of `lavender.extract`.

    Raises:
        DataError: none of the pictures can be used.
        ConfigError, ModelError: as `extract`.
        TargetError: the disk is full.
    """
    with importing():
        import matplotlib.figure  # noqa: F401  # and not when everything is there to be drawn
    config, work, out = config or TeacherConfig(), work or ExtractionConfig(), Path(out)
    pairs = as_pairs(pairs)
    some = list(islice(pairs, count))
    failures = [(entry.id, entry.reason) for entry in some if isinstance(entry, BadPair)]
    good = [entry for entry in some if isinstance(entry, Pair)]
    worker = Worker(model, config, work, work.devices[0])
    finished: list[Finished] = []
    seconds: list[float] = []
    try:
        for start in tqdm(range(0, len(good), work.batch_size), desc="preview", unit="batch"):
            chosen = good[start : start + work.batch_size]
            started = time.perf_counter()
            finished.append(worker(Batch(tuple(range(len(chosen))), tuple(chosen))))
            if finished[-1].targets:
                seconds.append((time.perf_counter() - started) / len(finished[-1].targets))
    finally:
        worker.teacher.close()
    targets = [target for batch in finished for target in batch.targets]
    failures += [failure for batch in finished for failure in batch.failures]
    if not targets:
        reasons = "; ".join(f"{sample_id}: {reason}" for sample_id, reason in failures[:3])
        raise DataError(f"none of the first {len(some)} pictures can be used ({reasons or 'there are none'})")
    out.mkdir(parents=True, exist_ok=True)
    image_of = {pair.id: pair.image for pair in good}
    path = out / "preview.png"
    shown = targets[:PICTURES_SHOWN]
    _draw([(target, np.asarray(load_image(image_of[target.id]))) for target in shown], path)
    total = len(pairs) if isinstance(pairs, Sequence) else getattr(pairs, "count", None)
    size = len(encoded(to_table(targets, config.storage), "zstd")) / len(targets)
    return Preview(path, tuple(failures), float(np.median(seconds[1:] or seconds)), size, total, len(work.devices))


def _draw(rows: list[tuple[Target, np.ndarray]], path: Path) -> None:
    """One row a picture: itself, and the maps of some words, function words last, over the part of it that the teacher saw."""
    from matplotlib.figure import Figure

    width = 1 + min(WORDS_SHOWN, max(len(target.word_maps.words) for target, _ in rows))
    figure = Figure(figsize=(1.8 * width, 2.1 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), width, squeeze=False)
    for row, (target, image) in zip(axes, rows, strict=True):
        maps, (image_height, image_width) = target.word_maps, image.shape[:2]
        top, left, bottom, right = (
            round(share * side)
            for share, side in zip(maps.crop, (image_height, image_width, image_height, image_width), strict=True)
        )
        # However narrow, there is a pixel to see.
        top, left = min(top, image_height - 1), min(left, image_width - 1)
        part = image[top : max(bottom, top + 1), left : max(right, left + 1)]
        for ax in row:
            ax.set_axis_off()
        row[0].imshow(image)
        row[0].set_title(target.id[-24:], fontsize=7, parse_math=False)
        order = sorted(range(len(maps.words)), key=lambda n: maps.words[n].text.casefold() in FUNCTION_WORDS)
        shown = sorted(order[:WORDS_SHOWN])
        for ax, word, values in zip(row[1:], [maps.words[n] for n in shown], maps.maps[shown], strict=False):
            ax.imshow(part if np.isnan(values).any() else overlay(part, values, 0.85, "inferno"))
            ax.set_title(word.text + (" (no map)" if np.isnan(values).any() else ""), fontsize=9, parse_math=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks
        drawing = io.BytesIO()
        figure.savefig(drawing, format="png", dpi=100)
    with name_full_disk(path.parent, TargetError):
        write_within(path.parent, path.name, drawing.getvalue())
