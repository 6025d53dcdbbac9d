"""The target store: word maps as parquet shards with a manifest, written so that a kill loses at most the samples in hand.

    manifest.json            format, version, the source and the config of the maps and their fingerprint, whether the store is
                             complete, the shards with their sha256 and numbers of samples, and what could not be used and why
    data-00000.parquet ...   finished shards, with the columns of `lavender.targets.shards`;
                             `datasets.load_dataset("parquet", data_files="targets/*.parquet")` reads them
    pending/*.parquet        finished samples that are in no shard yet; gone when the store is complete
    .lock, .lock.json        held while a process writes the store, and which process that is
    .pictures.jsonl          an extraction's notes of the pictures that it saw, which may go; see `lavender.extraction.seen`

Only `TargetWriter` writes the rest. A shard is there whole before the manifest lists it, and the manifest lists it before its
pending files go, so a kill at any moment leaves a store that the next writer continues.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pyarrow as pa
from PIL import Image

from ..config import fingerprint, require_kind
from ..errors import DataError, TargetError, warn_renamed
from ..files import FolderLock, name_full_disk, own_path, write_within
from ..images import ImageSource, file_sha256, image_sha256, load_image
from .manifest import (
    StoreConfig,
    config_of,
    continue_by,
    difference,
    earlier_fingerprint,
    known_behavior,
    new_manifest,
    proven_source_of,
    read_manifest,
    shard_name,
    shards_of,
    source_of,
    unlisted_shards,
)
from .shards import (
    GROUP_SIZE,
    Shard,
    Target,
    damaged,
    encoded,
    group_of,
    ids_of,
    opened,
    read,
    require_rows,
    require_sha256,
    schema,
    sha256_of,
    to_table,
)

logger = logging.getLogger("lavender")

SHARD_SIZE = 256
"""Samples of a shard."""

_POSITION = pa.field("position", pa.int64())
"""A pending file's column beside those of a shard: the samples' places in the input."""
_IDENTITY = ["id", "image_sha256", "file_sha256", "caption"]
_EARLY_FILES = {".lock", ".lock.json", ".lock.json.partial", "manifest.json.partial", "pending", "preview.png"}
"""What a folder may hold before it is a store: left by a writer that was killed at once, or by `lavender extract --preview`."""


def _write(folder: Path, name: str, data: str | memoryview) -> None:
    with name_full_disk((folder / name).parent, TargetError):
        write_within(folder, name, data)


class Identity(NamedTuple):
    """What tells whether a stored sample was made from a given picture and caption."""

    image_sha256: str
    file_sha256: str
    caption: str


class _Waiting(NamedTuple):
    """A stored sample that is in no shard yet; sorts by its place in the input."""

    position: int
    id: str
    file: Path
    row: int


class TargetWriter:
    """Fills a store; one that was begun before is continued. As a context manager it lets go of the store at the end.

    Only `close` makes a store complete. One writer at a time: a second one is refused until `close` or `release`.

    Attributes:
        folder: where the store lies.
        done: what is stored, by id.
        failed: why samples could not be used, by id.

    Raises:
        TargetError: the folder holds something else, or targets of another source or config; or another process writes it.
    """

    def __init__(
        self, folder: Path, source: Mapping[str, Any], config: StoreConfig | None = None, shard_size: int = SHARD_SIZE
    ) -> None:
        """`source` says what the maps come from, in plain JSON values: a model, its weights, its settings, whatever decides about
        the maps. The entries `model`, `model_commit` and `source` are names: stores that differ in them alone hold the same maps.
        """
        config = StoreConfig() if config is None else config
        require_kind("config", config, StoreConfig)
        self.folder = folder
        self.shard_size = shard_size
        self._storage = config.storage
        self._pending = folder / "pending"
        _require_store(folder)
        with name_full_disk(folder, TargetError):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(folder, error=TargetError)
            try:
                self._open(new_manifest(source, config))
            except BaseException:
                self._lock.release()
                raise

    def _open(self, manifest: dict[str, Any]) -> None:
        self._manifest = manifest
        self._newly_known: dict[str, Any] | None = None
        # A store that nothing was written to yet may be begun anew with other settings.
        if any(self.folder.glob("data-*.parquet")) or any(self._pending.glob("*.parquet")):
            self._manifest = read_manifest(self.folder)
            if how := difference(self._manifest, manifest):
                raise TargetError(
                    f"{self.folder} holds targets of another teacher or config ({how}); "
                    "give --out a new folder, or the settings that the store was begun with"
                )
            if not known_behavior(proven_source_of(self._manifest)):
                self._newly_known = known_behavior(proven_source_of(manifest))
            if self._newly_known:
                logger.warning(
                    "%s was begun before stores kept what their teacher does: it is continued by its weights alone", self.folder
                )
        elif (self.folder / "manifest.json").exists() and read_manifest(self.folder)["shards"]:
            raise TargetError(f"{self.folder} has lost all its shards; put them back, or give --out a new folder")
        self.failed: dict[str, str] = {entry["id"]: entry["reason"] for entry in self._manifest["failed"]}
        self.done: dict[str, Identity] = {}
        for shard in shards_of(self.folder, self._manifest):
            require_sha256(shard)
            self.done |= _identities(shard.path)
        self._adopt()
        for path in _partial_files(self.folder):
            path.unlink()
        self._waiting: list[_Waiting] = []
        if not self._manifest["complete"]:
            self._write_manifest()
            self._pending.mkdir(exist_ok=True)
        for path in sorted(self._pending.glob("*.parquet")):
            self._take_up(path)
        self._next = 1 + max((sample.position for sample in self._waiting), default=-1)

    def _adopt(self) -> None:
        """Lists a shard that was finished just before a kill."""
        for path in unlisted_shards(self.folder, self._manifest):
            identities = _identities(path)
            if path.name != self._next_shard() or identities.keys() & self.done.keys():
                raise TargetError(f"{path} is no shard of this store, by its name or its samples; move it elsewhere")
            require_rows(path, schema(self._storage))
            self._manifest["shards"][path.name] = {"sha256": sha256_of(path), "samples": len(identities)}
            self._manifest["complete"] = False
            self.done |= identities

    def _take_up(self, path: Path) -> None:
        """Finds the samples of a pending file. Those that are in a shard already were written just before a kill."""
        require_rows(path, schema(self._storage).append(_POSITION))
        positions = read(path, ["position"])["position"]
        identities = _identities(path)
        new = [
            _Waiting(position, sample_id, path, row)
            for row, (position, sample_id) in enumerate(zip(positions, identities, strict=True))
            if sample_id not in self.done
        ]
        if not new:
            path.unlink()
        self._waiting += new
        self.done |= identities

    def add(self, *targets: Target, position: int | Sequence[int] | None = None) -> None:
        """Stores samples, all of them or none; they survive a kill from here on.

        Args:
            targets: the samples.
            position: their places in the input, which are their order in the store whatever order they come in; or the place of
                the first one, if the others follow it there. They stay out of the shards until `advance` has passed them. None
                puts them behind everything so far, and passes them at once.

        Raises:
            TargetError: the store has one of them already, is closed, or the disk is full.
            DataError: a word's values are neither finite nor all NaN.
        """
        if not targets:
            return
        self._require_open()
        start = self._next if position is None else position
        positions = list(range(start, start + len(targets))) if isinstance(start, int) else list(start)
        seen: set[str] = set()
        for target in targets:
            if target.id in self.done or target.id in seen:
                raise TargetError(f"the store has a sample {target.id!r} already")
            seen.add(target.id)
        table = to_table(targets, self._storage).append_column(_POSITION, pa.array(positions, _POSITION.type))
        if self._manifest["complete"] or self._newly_known:  # until here a run may end, and the store is what it was
            self._manifest["complete"] = False
            if self._newly_known:
                continue_by(self._manifest, self._newly_known)
                self._newly_known = None
            self._write_manifest()
            self._pending.mkdir(exist_ok=True)
        # The id makes the name unique where an earlier run counted the input's places in another way.
        name = hashlib.sha256(targets[0].id.encode()).hexdigest()[:16]
        path = self._pending / f"{positions[0]:012d}-{name}.parquet"
        _write(self.folder, f"{self._pending.name}/{path.name}", encoded(table, "none"))
        for row, (place, target) in enumerate(zip(positions, targets, strict=True)):
            self._waiting.append(_Waiting(place, target.id, path, row))
            self.done[target.id] = Identity(target.image_sha256, target.file_sha256, target.word_maps.caption)
        self._next = max(self._next, 1 + max(positions))
        if position is None:
            self.advance(self._next)

    def advance(self, position: int) -> None:
        """Says that every sample of the input before `position` is stored or failed: those that fill a shard go into one.

        So the shards do not depend on the order in which the samples were added.
        """
        self._require_open()
        passed = sorted(sample for sample in self._waiting if sample.position < position)
        while len(passed) >= self.shard_size:
            self._write_shard(passed[: self.shard_size])
            del passed[: self.shard_size]

    def has(self, sample_id: str, image: ImageSource, caption: str) -> bool:
        """Whether a sample is stored already. The picture is decoded only if its encoded bytes are not those of then.

        Raises:
            TargetError: the sample is stored, but for another picture or caption.
            DataError: the sample is stored, but the picture cannot be read.
        """
        stored = self.done.get(sample_id)
        if stored is None:
            return False
        if stored.caption != caption:
            what = "caption"
        elif _is_picture(image, stored):
            return True
        else:
            what = "picture"
        raise TargetError(
            f"{self.folder} holds maps of another {what} for sample {sample_id!r}; "
            "give the sample another id, or --out a new folder"
        )

    def fail(self, sample_id: str, reason: str) -> None:
        """Notes that a sample, or a part of it, could not be used, and why: a line for each reason.

        The manifest has it from the next shard or the end on; a run that is killed before tries the sample again anyway.
        """
        before = self.failed.get(sample_id)
        self.failed[sample_id] = reason if before is None else f"{before}\n{reason}"

    def begin_run(self) -> None:
        """Forgets earlier failures: this run tries those samples again."""
        self.failed.clear()

    def close(self, name: Path | None = None) -> None:
        """Writes the last shard, leaves nothing pending, marks the store as complete and lets go of it.

        With `name`, the folder then has that name, which nothing has or an empty folder: so a store is there whole or not at all.
        """
        if not self._lock.is_held():
            return
        waiting = sorted(self._waiting)
        for start in range(0, len(waiting), self.shard_size):
            self._write_shard(waiting[start : start + self.shard_size])
        shutil.rmtree(self._pending, ignore_errors=True)
        # Last, so that a complete store never has anything pending.
        self._manifest["complete"] = True
        self._write_manifest()
        if name is not None:
            self._lock.rename(name)
            self.folder, self._pending = name, name / "pending"
        self._lock.release()

    def release(self) -> None:
        """Lets go of a store that is not complete; another writer may continue it."""
        if not self._lock.is_held():
            return
        try:
            if not self._manifest["complete"]:
                self._write_manifest()
        finally:
            self._lock.release()

    def __enter__(self) -> TargetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            self.release()
        else:
            with suppress(OSError, TargetError):  # the error that led here says more
                self.release()

    def _require_open(self) -> None:
        if not self._lock.is_held():
            raise TargetError(f"the writer of {self.folder} is closed; open another one to continue the store")

    def _next_shard(self) -> str:
        return shard_name(len(self._manifest["shards"]))

    def _write_manifest(self) -> None:
        self._manifest["failed"] = [{"id": sample_id, "reason": reason} for sample_id, reason in self.failed.items()]
        _write(self.folder, "manifest.json", json.dumps(self._manifest, indent=2) + "\n")

    def _write_shard(self, samples: Sequence[_Waiting]) -> None:
        """A kill after the first step leaves a shard to adopt, one after the second pending files to ignore."""
        columns = schema(self._storage).names
        tables = {}
        for path in {sample.file for sample in samples}:
            with opened(path) as file:
                tables[path] = file.read(columns)
        table = pa.concat_tables([tables[sample.file].slice(sample.row, 1) for sample in samples])
        data = encoded(table, "zstd")
        name = self._next_shard()
        _write(self.folder, name, data)
        self._manifest["shards"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "samples": len(samples)}
        self._write_manifest()
        written = {sample.id for sample in samples}
        self._waiting = [sample for sample in self._waiting if sample.id not in written]
        for path in tables.keys() - {sample.file for sample in self._waiting}:
            path.unlink()


def _partial_files(folder: Path) -> list[Path]:
    """What a kill left half written in a store. Raises `TargetError` for a folder under such a name."""
    partial = [*folder.glob("*.partial"), *(folder / "pending").glob("*.partial")]
    for path in partial:
        if path.is_dir() and not path.is_symlink():
            raise TargetError(f"{path} is a folder, where a store has a file under this name; move it elsewhere")
    return partial


def _require_store(folder: Path) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        is_link = folder.is_symlink() and not folder.exists()
        raise TargetError(f"{folder} is {'a link that leads to nothing' if is_link else 'a file'}; give --out a folder")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if "manifest.json" not in names and names - _EARLY_FILES:
        raise TargetError(f"{folder} exists and is no target store; give --out a new or empty folder")
    try:
        pending = own_path(folder, "pending")
    except DataError as error:
        raise TargetError(str(error)) from None
    if pending.exists() and not pending.is_dir():
        raise TargetError(f"{pending} is no folder, as a store has one under this name; remove it, or give --out a new folder")


def _is_picture(image: ImageSource, stored: Identity) -> bool:
    digest = file_sha256(image)
    return (digest != "" and digest == stored.file_sha256) or image_sha256(load_image(image)) == stored.image_sha256


class TargetStore:
    """Read access to a store by sample id. Maps are read when they are asked for.

    Attributes:
        folder: where it lies.
        source: what the maps came from, as its writer said: of an extraction the model, its weights and the teacher's settings.
        config: how the maps are kept.
        fingerprint: sixteen digits that change with source and config, but not with the model's name.
        earlier_fingerprint: what lavender would have said before, when it changed with the model's folder too.
        failed: why samples could not be used, by id.
        shards: its files, in the order of the samples.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises `TargetError` when the folder is no finished store."""
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        self.source = source_of(manifest)
        self.config = config_of(manifest)
        self.fingerprint: str = manifest["fingerprint"]
        self.earlier_fingerprint = earlier_fingerprint(manifest)
        self.failed: dict[str, str] = {entry["id"]: entry["reason"] for entry in manifest["failed"]}
        if not manifest["complete"]:
            raise TargetError(f"the extraction into {self.folder} has not finished; run it again to continue it")
        if any((self.folder / "pending").glob("*.parquet")):
            raise TargetError(
                f"{self.folder} is marked as finished, but samples are pending; run the extraction again to continue it"
            )
        if extra := unlisted_shards(self.folder, manifest):
            raise TargetError(f"{extra[0]} is not listed in the manifest; move it elsewhere, or extract into a new folder")
        shards = shards_of(self.folder, manifest)
        self.shards = [shard.path for shard in shards]
        if not shards:
            raise TargetError(
                f'{self.folder} holds no targets; was every picture refused? See "failed" in {self.folder / "manifest.json"}'
            )
        self._shards = shards
        self._place_of: dict[str, tuple[Shard, int]] = {}
        for shard in shards:
            for row, sample_id in enumerate(ids_of(shard, self.config.storage)):
                if sample_id in self._place_of:
                    raise damaged(shard.path, f"the store has the sample {sample_id!r} twice")
                self._place_of[sample_id] = shard, row

    @property
    def teacher(self) -> dict[str, str]:
        """Deprecated: what names the source, and its weights, as they stand in `source`."""
        warn_renamed("TargetStore.teacher", "TargetStore.source")
        return {name: self.source[name] for name in ("model", "weights", "source") if name in self.source}

    def __len__(self) -> int:
        return len(self._place_of)

    def __contains__(self, sample_id: object) -> bool:
        """Raises `TargetError` where the store cannot tell since a shard is damaged."""
        if sample_id in self._place_of:
            return True
        self._require_shards()  # a sample is missing only where all ids are what was written
        return False

    def __iter__(self) -> Iterator[str]:
        return iter(self._place_of)

    def __getitem__(self, sample_id: str) -> Target:
        """Raises `TargetError` naming the sample that is missing, or the shard that is damaged."""
        if sample_id not in self:
            raise TargetError(f"{self.folder} has no targets for sample {sample_id!r}; extract them, or drop the sample")
        shard, number = self._place_of[sample_id]
        require_sha256(shard)
        row = group_of(shard.path, shard.sha256, number // GROUP_SIZE)[number % GROUP_SIZE]
        if row.id != sample_id:  # the ids were read before the shard's bytes were compared
            raise TargetError(f"{shard.path} has changed while it was in use; load the store again")
        return row.decoded(shard.path)

    def shard_of(self, sample_id: str) -> Path:
        """The file that has a sample."""
        return self._place_of[sample_id][0].path

    def _require_shards(self) -> None:
        for shard in self._shards:
            require_sha256(shard)

    def of_pictures(self, images: Sequence[str], captions: Sequence[str]) -> Target | None:
        """The targets that were made from one of these pictures, by `image_sha256`: of several the first with one of these
        captions, white space around them not counted, else the first; None if there are none."""
        made = [sample for image in images for sample in self._samples_of.get(image, ())]
        said = {caption.strip() for caption in captions}
        chosen = next((sample_id for sample_id, caption in made if caption.strip() in said), made[0][0] if made else None)
        return None if chosen is None else self[chosen]

    def beside(self, target: Target) -> list[Target]:
        """All targets that were made from a target's picture, in the order of the store: one for each of its captions.

        Those that show another part of the picture are left out: no place in them is one in its maps.
        """
        targets = [self[sample_id] for sample_id, _ in self._samples_of[target.image_sha256]]
        return [other for other in targets if other.word_maps.crop == target.word_maps.crop]

    @cached_property
    def _samples_of(self) -> dict[str, list[tuple[str, str]]]:
        """Of every picture the ids and captions of its samples, in the order of the store."""
        self._require_shards()
        samples: dict[str, list[tuple[str, str]]] = {}
        for path in self.shards:
            for sample_id, identity in _identities(path).items():
                samples.setdefault(identity.image_sha256, []).append((sample_id, identity.caption))
        return samples

    def contents(self) -> str:
        """Sixteen hexadecimal digits that change with the samples: their ids, pictures and captions."""
        self._require_shards()
        names = ["id", "image_sha256", "caption"]
        columns = [read(path, names) for path in self.shards]
        return fingerprint([[cell for column in columns for cell in column[name]] for name in names])

    def checked(self, sample_id: str, image: Image.Image) -> Target:
        """The targets of a sample after a look at its picture. Raises `TargetError` if they were made from another one."""
        target = self[sample_id]
        if target.image_sha256 != image_sha256(image):
            raise TargetError(
                f"the targets of sample {sample_id!r} in {self.folder} were made from another picture; "
                "extract them into a new folder"
            )
        return target


def _identities(path: Path) -> dict[str, Identity]:
    """The picture and caption of every sample in a file, by id, in their order."""
    ids, *rest = read(path, _IDENTITY).values()
    identities = dict(zip(ids, map(Identity, *rest), strict=True))
    if len(identities) != len(ids):
        raise damaged(path, "it has a sample twice")
    return identities
