"""Small target stores to test with."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq

from lavender.targets.manifest import StoreConfig
from lavender.targets.store import Target, TargetWriter
from lavender.types import WordMaps
from lavender.words import words_of

SOURCE = {"model": "test", "weights": "abc", "inversion_steps": 5}
CONFIG = StoreConfig(map_size=4)


def make_target(number, caption="a red circle", size=4):
    words = words_of(caption)
    maps = np.random.default_rng(number).random((len(words), size, size), np.float32)
    return Target(f"s{number}", f"{number:064x}", WordMaps(caption, words, maps))


def fill(folder, numbers, shard_size=3):
    writer = TargetWriter(folder, SOURCE, CONFIG, shard_size)
    for number in numbers:
        if f"s{number}" not in writer.done:
            writer.add(make_target(number))
    return writer


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and p.name != ".lock"}


def shards(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith(".parquet")}


def ids_of(folder, shard):
    return pq.read_table(folder / f"data-{shard:05d}.parquet")["id"].to_pylist()
