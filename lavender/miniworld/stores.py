"""The targets of an experiment's arms: the teacher's maps, exact masks, and the maps of random words of other pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..batches.collator import Collator
from ..config import TeacherConfig
from ..data.samples import read_pairs
from ..errors import TargetError
from ..evaluation.localization import SpanMaps, maps_by_span
from ..extraction.extract import extract
from ..images import image_sha256
from ..targets.manifest import StoreConfig
from ..targets.store import Target, TargetStore, TargetWriter
from ..types import WordMaps
from ..words import words_of
from . import TEACHER, write_dataset
from .scenes import Scene


def teacher_targets(folder: Path, scenes: Sequence[Scene], config: TeacherConfig, progress: bool = True) -> TargetStore:
    """Writes the scenes as a data set and the teacher's targets for it, below `folder`."""
    captions = write_dataset(scenes, folder)
    extract(TEACHER, read_pairs(captions), folder / "targets", config, progress=progress)
    return TargetStore(folder / "targets")


def exact_targets(folder: Path, scenes: Sequence[Scene], size: int) -> TargetStore:
    """Exact masks for words that name objects, none for others: the share of each of [size, size] places that the object covers.

    Raises `TargetError` if the folder holds targets of other scenes.
    """
    digest = hashlib.sha256()
    for scene in scenes:
        digest.update(scene.pixels.tobytes() + np.packbits(scene.masks).tobytes() + repr((scene.caption, scene.referents)).encode())
    source = {"model": "exact masks", "scenes": [len(scenes), digest.hexdigest()[:16]]}
    with TargetWriter(folder, source, StoreConfig(map_size=size)) as writer:
        for number, scene in enumerate(scenes):
            if (sample_id := f"{number:05d}") in writer.done:
                continue
            masks = {(r.start, r.end): scene.word_mask(r) for r in scene.referents}
            words = tuple(words_of(scene.caption))
            maps = np.full((len(words), size, size), np.nan, np.float32)
            for w, word in enumerate(words):
                if (mask := masks.get((word.start, word.end))) is not None:
                    maps[w] = np.asarray(Image.fromarray(mask.astype(np.float32)).resize((size, size), Image.Resampling.BOX))
            writer.add(Target(sample_id, image_sha256(scene.image), WordMaps(scene.caption, words, maps)))
        writer.close()
    return TargetStore(folder)


def shuffled_targets(folder: Path, teacher: TargetStore, seed: int) -> TargetStore:
    """A store that differs from the teacher's in its maps alone: every word has that of a random word of another picture.

    Raises `TargetError` if the teacher has maps of one picture alone, or the folder holds targets of another teacher or seed.
    """
    rng = np.random.default_rng([seed, 1])
    pool = [(number, values) for number, maps in enumerate(target_maps(teacher)) for values in maps.values()]
    if len({number for number, _ in pool}) < 2:
        raise TargetError(f"{teacher.folder} has maps of one picture or none, and each word takes one of another picture's")

    def maps_of(number: int, target: Target) -> np.ndarray:
        maps = np.empty_like(target.word_maps.maps)
        for w in range(len(maps)):
            owner = number
            while owner == number:
                owner, maps[w] = pool[int(rng.integers(len(pool)))]
        return maps

    return _store_with(folder, teacher, {"model": "shuffled", "seed": seed}, maps_of)


def agnostic_targets(folder: Path, teacher: TargetStore) -> TargetStore:
    """A store that differs from the teacher's in its maps alone: every word has the mean of its caption's content words.

    Raises `TargetError` if the folder holds targets of another teacher.
    """
    means = [np.mean(list(maps.values()), axis=0) for maps in target_maps(teacher)]

    def maps_of(number: int, target: Target) -> np.ndarray:
        return np.broadcast_to(means[number], target.word_maps.maps.shape).astype(np.float32)

    return _store_with(folder, teacher, {"model": "agnostic"}, maps_of)


def _store_with(
    folder: Path, teacher: TargetStore, source: dict[str, Any], maps_of: Callable[[int, Target], np.ndarray]
) -> TargetStore:
    """The teacher's store with other maps: `maps_of` its number-th sample."""
    # Of teacher, settings and samples: what decides about its maps.
    known = {"weights": f"{source['model']} of {teacher.fingerprint}", "contents": teacher.contents()}
    with TargetWriter(folder, source | known, teacher.config) as writer:
        for number, sample_id in enumerate(teacher):
            target = teacher[sample_id]
            maps = maps_of(number, target)  # drawn for finished samples too, so that a restart draws the same
            if sample_id not in writer.done:
                writer.add(Target(sample_id, target.image_sha256, replace(target.word_maps, maps=maps)))
        writer.close()
    return TargetStore(folder)


def target_maps(store: TargetStore) -> list[SpanMaps]:
    """A store's maps of the content words, per sample."""
    maps: list[SpanMaps] = []
    for sample_id in store:
        word_maps = store[sample_id].word_maps
        content = {(w.start, w.end) for w in Collator.words(word_maps.caption)}
        maps.append({span: values for span, values in maps_by_span(word_maps).items() if span in content})
    return maps
