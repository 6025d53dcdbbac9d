"""`extract`: photographs and captions in, a target store out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..config import ExtractionConfig, TeacherConfig, require_kind, to_dict
from ..data.pairs import BadPair, Pair
from ..data.sources import as_pairs
from ..errors import DataError, TargetError
from ..signals import Stop, Stopped, stopping
from ..targets.manifest import StoreConfig, read_manifest
from ..targets.store import TargetWriter
from .engines import Batch, Finished, engine_of
from .seen import SeenPictures, stamp_of


@dataclass(frozen=True)
class Summary:
    """What one run of `extract` did, in samples."""

    written: int
    present: int
    failed: int


def extract(
    model: str | Path | Any,
    pairs: Iterable[Pair | BadPair] | str | Path,
    out: str | Path,
    config: TeacherConfig | None = None,
    work: ExtractionConfig | None = None,
    *,
    failed_only: bool = False,
    rehash: bool = False,
    progress: bool = True,
) -> Summary:
    """Writes a target store of word maps for pictures with captions.

    A store that was begun with the same teacher and config is continued; pictures that are stored are not read again if their files
    have the size and the time of their last change that they had. A picture or caption that cannot be used is reported,
    listed in the store's manifest and skipped; the next run tries it again. What the store holds in the end depends neither on the
    engine nor on where earlier runs were cut off.

    Args:
        model: folder or hub id of a text-to-image pipeline, maybe as `NAME@REVISION`, or a loaded pipeline (one device,
            `engine="local"`).
        pairs: pictures with captions, or the data set that `lavender.open_pairs` opens.
        out: folder of the store.
        config: how the maps are read.
        work: where, and how many pictures at a time.
        failed_only: whether only what failed before is tried, without a look at the rest; the store must be complete.
        rehash: whether every stored picture is read, so that a change is found that left size and time as they were.
        progress: whether to show a progress bar.

    Raises:
        DataError: there is no entry in `pairs`, or no data set there.
        ConfigError: the settings do not fit the model, or the engine is missing.
        ModelError: `model` cannot be loaded or read, or its processes die.
        TargetError: `out` holds something else, is not complete (`failed_only`), or another process writes it; the disk is full.
        Stopped: the process was asked to end by SIGTERM or SIGUSR1; what was in work is finished and stored.
    """
    config = TeacherConfig() if config is None else config
    work = ExtractionConfig() if work is None else work
    require_kind("config", config, TeacherConfig)
    require_kind("work", work, ExtractionConfig)
    out, pairs = Path(out), as_pairs(pairs)
    if failed_only and not read_manifest(out)["complete"]:
        raise TargetError(f"the extraction into {out} has not finished; finish it before you try what failed")
    count = getattr(pairs, "count", None) if not isinstance(pairs, Sequence) else len(pairs)
    given = iter(pairs)
    first = next(given, None)
    if first is None:
        raise DataError("there is no picture with a caption in the data, not even one that cannot be used; nothing was written")
    kept = StoreConfig(config.map_size, config.storage, config.normalization)
    with (
        stopping() as stop,
        engine_of(model, config, work) as engine,
        TargetWriter(out, {**engine.identity, **to_dict(config)}, kept, work.shard_size) as writer,
    ):
        entries = _Entries(chain([first], given), writer, work.batch_size, failed_only, SeenPictures(out, rehash), stop)
        with tqdm(total=count, desc="word maps", unit="picture", disable=not progress, smoothing=0.05) as bar:
            written = 0
            with closing(engine.results(entries)) as results:
                for finished in results:
                    writer.add(*finished.targets, position=finished.positions)
                    entries.note(finished)
                    written += len(finished.targets)
                    for sample_id, reason in finished.failures:
                        entries.fail(sample_id, reason)
                    writer.advance(entries.finish(finished))
                    bar.update(entries.seen - bar.n)
                    if stop.requested and engine.reads_far_ahead:
                        entries.is_cut_off = True
                        break
            bar.update(entries.seen - bar.n)
        if entries.is_cut_off:
            raise Stopped(f"ended by {stop.named()}, {written} pictures stored in {out}; the same command continues")
        writer.close()
    return Summary(written, entries.present, entries.failed)


class _Entries:
    """The input as batches of what the store lacks.

    A batch is made of so many neighbors in the input, whatever is stored of them already, so that batches are the same in every
    run: the numbers of a picture's maps may depend on its company, in their last bits.

    Attributes:
        present: samples that the store had.
        failed: samples that could not be used.
        seen: entries that are dealt with.
        is_cut_off: whether there are more, which were left since the run was asked to end.
    """

    def __init__(
        self,
        pairs: Iterable[Pair | BadPair],
        writer: TargetWriter,
        batch_size: int,
        failed_only: bool,
        pictures: SeenPictures,
        stop: Stop,
    ) -> None:
        self.present = self.failed = self.seen = 0
        self.is_cut_off = False
        self._stop = stop
        self._pairs, self._writer, self._size = pairs, writer, batch_size
        self._pictures = pictures
        self._stamps: dict[str, str | None] = {}
        self._tried = set(writer.failed) if failed_only else None
        self._in_work: dict[int, int] = {}
        self._next = 0
        writer.begin_run()

    def __iter__(self) -> Iterator[Batch]:
        chosen: list[tuple[int, Pair]] = []
        for position, entry in enumerate(self._pairs):
            if self._stop.requested:
                self.is_cut_off = True
                return
            if position % self._size == 0 and chosen:
                yield self._batch(chosen)
                chosen = []
            if self._is_wanted(entry):
                chosen.append((position, entry))  # type: ignore[arg-type]  # a bad entry is not
            else:
                self.seen += 1
            if not chosen:
                self._next = position + 1
        if chosen:
            yield self._batch(chosen)

    def _batch(self, chosen: list[tuple[int, Pair]]) -> Batch:
        self._in_work[chosen[0][0]] = len(chosen)
        self._next = chosen[-1][0] + 1
        return Batch(tuple(position for position, _ in chosen), tuple(pair for _, pair in chosen))

    def _is_wanted(self, entry: Pair | BadPair) -> bool:
        if self._tried is not None and entry.id not in self._tried:
            return False
        if isinstance(entry, BadPair):
            self.fail(entry.id, entry.reason)
            return False
        stamp = stamp_of(entry.image)  # before it is read: if the file changes in between, the next run reads it again
        stored = self._writer.done.get(entry.id)
        if stored is None:
            self._stamps[entry.id] = stamp
            return True
        if stored.caption != entry.caption or not self._pictures.knows(entry.id, stamp, stored):
            try:
                self._writer.has(entry.id, entry.image, entry.caption)
            except DataError as error:
                self.fail(entry.id, str(error))
                return False
            self._pictures.add([(entry.id, stamp, stored)])
        self.present += 1
        return False

    def fail(self, sample_id: str, reason: str) -> None:
        """Lists a sample that cannot be used."""
        self.failed += 1
        self._writer.fail(sample_id, reason)
        tqdm.write(f"skipped {sample_id}: {reason}")

    def note(self, finished: Finished) -> None:
        """Notes which pictures a batch's stored targets were made from."""
        stamps = {target.id: self._stamps.pop(target.id, None) for target in finished.targets}
        self._pictures.add((sample_id, stamp, self._writer.done[sample_id]) for sample_id, stamp in stamps.items())
        for sample_id, _ in finished.failures:
            self._stamps.pop(sample_id, None)

    def finish(self, finished: Finished) -> int:
        """Notes that a batch is done; before the place that is returned, every entry is stored or has failed."""
        self.seen += self._in_work.pop(finished.start)
        return min(self._in_work, default=self._next)
