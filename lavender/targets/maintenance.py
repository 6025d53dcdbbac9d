"""Looking after target stores: what one holds, whether it is sound, and several made into one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, groupby
from pathlib import Path
from typing import Any

import numpy as np

from ..data.sources import as_pairs
from ..errors import DataError, TargetError
from ..files import own_path
from ..signals import Stopped, stopping
from .manifest import (
    StoreConfig,
    config_of,
    difference,
    known_behavior,
    proven_source_of,
    read_manifest,
    shards_of,
    source_of,
    unlisted_shards,
)
from .shards import Target, group_problem, opened, require_sha256, rows_of, schema, sha256_of
from .soundness import store_problems
from .store import TargetStore, TargetWriter

NAMED = 10
"""Ids that one line names; a data set may lack thousands."""


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds, finished or not.

    Attributes:
        source: what the maps came from.
        config: how they are kept.
        complete: whether the store is finished.
        samples: how many are stored, pending ones too.
        words: how many they have in all.
        words_without_map: how many of these have none.
        failed: how many samples could not be used.
        shards: number of finished files.
        num_bytes: size of shards, pending files and manifest.
    """

    source: dict[str, Any]
    config: StoreConfig
    complete: bool
    samples: int
    words: int
    words_without_map: int
    failed: int
    shards: int
    num_bytes: int

    @property
    def bytes_per_sample(self) -> float:
        return self.num_bytes / self.samples if self.samples else 0.0


def info(folder: str | Path) -> StoreInfo:
    """Looks through a store, finished or not. Raises `TargetError` if it is none, or damaged."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    config = config_of(manifest)
    for shard in shards_of(folder, manifest):
        require_sha256(shard)
    shards = sorted(folder.glob("data-*.parquet"))
    files = [*shards, *sorted((folder / "pending").glob("*.parquet"))]
    words = without_map = 0
    ids: set[str] = set()
    for path in files:
        with opened(path) as file:
            for row in chain.from_iterable(rows_of(file, number) for number in range(file.num_row_groups)):
                if row.id not in ids:  # a kill may leave samples that are pending although they are in a shard
                    ids.add(row.id)
                    maps = row.decoded(path).word_maps.maps
                    words += len(maps)
                    without_map += int(np.isnan(maps).all(axis=(1, 2)).sum())
    return StoreInfo(
        source=source_of(manifest),
        config=config,
        complete=manifest["complete"],
        samples=len(ids),
        words=words,
        words_without_map=without_map,
        failed=len({entry["id"] for entry in manifest["failed"]} - ids),
        shards=len(shards),
        num_bytes=sum(path.stat().st_size for path in [*files, folder / "manifest.json"]),
    )


def verify(folder: str | Path, pairs: Iterable[Any] | str | Path | None = None) -> list[str]:
    """Checks every byte and every row of a store.

    Args:
        folder: of the store.
        pairs: the data set that it was made from, objects with `id` and `caption`, or what `lavender.open_pairs` opens.
            Every one must be stored with its caption, or listed as failed. One without `caption` could not be read, and must be
            listed.

    Returns:
        What is wrong, one line each; nothing if the store is sound.

    Raises:
        TargetError: the folder is no store of this version.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems: list[str] = []
    if not manifest["complete"]:
        problems.append("the store is not finished: run the same command again to continue it")
    elif (folder / "pending").exists():
        problems.append("the store is marked as finished, but samples are pending: run the same command again")
    problems += [f"{path.name} is not listed in the manifest: move it elsewhere" for path in unlisted_shards(folder, manifest)]
    captions: dict[str, str] = {}
    whole = True
    for name, listed in manifest["shards"].items():
        path = folder / name
        try:
            digest = sha256_of(path)
        except FileNotFoundError:
            wrong, readable = ["it is missing: put it back, or extract into a new folder"], False
        except OSError as error:
            wrong, readable = [f"it cannot be read ({error.strerror}): restore it, or extract anew"], False
        else:
            if digest != listed["sha256"]:
                wrong, readable = ["it is damaged, its sha256 is not that of the manifest: restore it, or extract anew"], False
            else:
                wrong, readable = _shard_problems(path, listed["samples"], manifest, captions)
        problems += [f"{name}: {problem}" for problem in wrong]
        whole = whole and readable
    if pairs is not None and whole:
        problems += _input_problems(as_pairs(pairs), captions, {entry["id"] for entry in manifest["failed"]})
    elif pairs is not None:
        problems.append("the data set was not compared with the store, which is not whole")
    return problems


def _shard_problems(path: Path, samples: int, manifest: Mapping[str, Any], captions: dict[str, str]) -> tuple[list[str], bool]:
    """What is wrong with a shard's rows, and whether they could be read. Adds their captions to `captions`, by id."""
    problems: list[str] = []
    config, is_attention = config_of(manifest), "weights" in source_of(manifest)
    columns = schema(config.storage)
    try:
        with opened(path) as file:
            if not file.schema_arrow.equals(columns):
                return [f"it has other columns or types than the storage {config.storage!r}: extract anew"], False
            if file.metadata.num_rows != samples:
                problems.append(f"it has {file.metadata.num_rows} samples, the manifest says {samples}")
            problems += filter(None, [group_problem(file)])
            for number in range(file.num_row_groups):
                for row in rows_of(file, number):
                    if row.id in captions:
                        problems.append(f"sample {row.id!r} is there twice")
                    captions[row.id] = row.caption
                    wrong = row.problems or store_problems(
                        row.decoded(path).word_maps, config.map_size, config.normalization, is_attention
                    )
                    problems += [f"sample {row.id!r}: {problem}" for problem in wrong]
    except TargetError as error:
        return [*problems, str(error)], False
    return problems, True


def _input_problems(pairs: Iterable[Any], captions: Mapping[str, str], failed: set[str]) -> list[str]:
    ids: set[str] = set()
    missing, changed = [], []
    for pair in pairs:
        ids.add(pair.id)
        if pair.id not in captions:
            if pair.id not in failed:
                missing.append(pair.id)
        elif getattr(pair, "caption", captions[pair.id]) != captions[pair.id]:
            changed.append(pair.id)
    kinds = (
        ("of the data set are neither stored nor listed as failed", missing),
        ("have another caption in the data set", changed),
        ("are stored, but not in the data set", [sample_id for sample_id in captions if sample_id not in ids]),
    )
    return [f"{len(ids)} samples {what}: {_list_ids(ids)}" for what, ids in kinds if ids]


def _list_ids(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return ", ".join(map(repr, ids[:NAMED])) + more


def merge(folders: Sequence[str | Path], out: str | Path) -> int:
    """Makes several finished stores of one source and config into a new one, in their order.

    A sample that several of them have is taken once. The new store appears under its name when it is whole; until then it lies
    beside it, in `<out>.merging`, from where the same merge continues after a kill.

    Args:
        folders: of the stores.
        out: new folder.

    Returns:
        The number of samples.

    Raises:
        TargetError: a store is damaged, not finished, or of another source or config; a sample differs between two of them; or
            `out` exists, or another process merges into it; the disk is full.
        Stopped: the process was asked to end by SIGTERM or SIGUSR1.
    """
    if not folders:
        raise TargetError("there is nothing to merge; give the folders of one or more target stores")
    out = Path(out)
    _require_new(out)
    stores = [TargetStore(folder) for folder in folders]
    manifests = [read_manifest(store.folder) for store in stores]
    for (first, one), (second, other) in combinations(zip(stores, manifests, strict=True), 2):
        if how := difference(one, other, (f"in {first.folder}", f"in {second.folder}")):
            raise TargetError(f"{second.folder} holds targets of another teacher or config ({how}); merge stores of the same ones")
    sources = [proven_source_of(manifest) for manifest in manifests]
    source = min(sources, key=lambda source: "behavior" in source)
    if "behavior" not in source and (known := next(filter(None, map(known_behavior, sources)), None)):
        source["continued_by"] = known  # of one of them nobody knows what its teacher did
    try:
        unfinished = own_path(out.parent, f"{out.name}.merging")
    except DataError as error:
        raise TargetError(str(error)) from None
    taken: dict[str, TargetStore] = {}
    with stopping() as stop, TargetWriter(unfinished, source, stores[0].config) as writer:
        try:
            _require_new(out)  # again: another process may have finished in between
        except TargetError:
            shutil.rmtree(unfinished)
            raise
        writer.begin_run()
        for store in stores:
            for _, ids in groupby(store, store.shard_of):
                writer.add(*[target for target in _take_new(ids, store, taken) if target.id not in writer.done])
                if stop.requested:
                    raise Stopped(f"ended by {stop.named()}; the same command continues the merge into {out}")
        if writer.done.keys() != taken.keys():
            raise TargetError(f"{unfinished} is left from a merge of other stores; remove it, or give another --out")
        for sample_id, reason in {key: reason for store in stores for key, reason in store.failed.items()}.items():
            if sample_id not in taken:
                writer.fail(sample_id, reason)
        writer.close(out)
    return len(taken)


def _require_new(out: Path) -> None:
    if os.path.ismount(out):  # nothing else takes its name
        raise TargetError(f"{out} is a mount point; give a new folder in it")
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise TargetError(f"{out} exists; give a new folder")


def _take_new(ids: Iterable[str], store: TargetStore, taken: dict[str, TargetStore]) -> Iterator[Target]:
    """The samples of a shard that no shard before it had."""
    for target in map(store.__getitem__, ids):
        if target.id not in taken:
            taken[target.id] = store
            yield target
        elif not _are_equal(target, taken[target.id][target.id]):
            raise TargetError(
                f"sample {target.id!r} is not the same in {taken[target.id].folder} and {store.folder}: they differ in picture, "
                "caption or maps. Leave one of the stores out, or give the samples different ids"
            )


def _are_equal(one: Target, other: Target) -> bool:
    ours, theirs = one.word_maps, other.word_maps
    return (
        (one.image_sha256, ours.caption, ours.words, ours.crop) == (other.image_sha256, theirs.caption, theirs.words, theirs.crop)
        and ours.maps.shape == theirs.maps.shape
        and np.array_equal(ours.maps, theirs.maps, equal_nan=True)
    )
