"""Which samples a run can use: all are looked at before its first step, and it goes on with those that it began with.

A sample that cannot be used keeps its place, in which the collator puts a stand-in: so the others come in the same order, in the
same batches, whatever becomes of some of them while a run is under way. In the run's folder are

    skipped.jsonl    {"id", "reason"} of each sample that cannot be used; no file if all can
    samples.json     what the run began with: of each sample its id and a hash of what it says, empty for one that cannot be used
    .sound-0 ...     hashes of the samples that were found to be sound, by process; they may go, and all samples are looked at again
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, get_worker_info
from tqdm import tqdm
from transformers import TrainingArguments

from ..batches.collator import Collator
from ..batches.outcomes import Unusable
from ..data.regions import record_of
from ..data.samples import Conversation, Sample
from ..errors import DataError, TargetError
from ..extraction.seen import stamp_of
from ..files import is_url, own_path, read_file, read_json, write_within
from ..signals import Stop, Stopped, outlast
from .guard import of_all_processes

logger = logging.getLogger("lavender")

SAMPLES = "samples.json"
SKIPPED = "skipped.jsonl"
SOUND = ".sound-{}"
LOOKED_AT_ONCE = 16
"""Samples between two looks at whether the run was asked to end."""
MAX_NAMED = 8
"""Samples that a line names."""


@dataclass(frozen=True)
class _Known:
    """What a run's folder knows of its samples.

    Attributes:
        identity: the entries of `run.json` about them.
        each: per sample its id, and a hash of what it says; no hash of one that could not be used.
    """

    identity: dict[str, Any]
    each: Sequence[tuple[str, str]]

    @staticmethod
    def of(samples: Sequence[Sample | Conversation]) -> _Known:
        digest = hashlib.sha256()
        each = []
        for sample in samples:
            text = json.dumps(_texts(sample)).encode()
            digest.update(text)
            each.append((sample.id, hashlib.sha256(text).hexdigest()[:16]))
        return _Known({"samples": len(samples), "samples_sha256": digest.hexdigest()}, each)

    @staticmethod
    def read(out: Path) -> _Known | None:
        """None where an older version of lavender began the run, or nobody did."""
        try:
            value = read_json(out / SAMPLES)
            each = [(str(sample_id), str(digest)) for sample_id, digest in value["each"]]
            return _Known({name: value[name] for name in ("samples", "samples_sha256")}, each)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def places(self, given: _Known) -> list[int | None] | None:
        """Per sample its place in what is given now; None for one that is gone.

        None for all where these are other samples: some are new or come in another order, or most are gone.
        """
        places: list[int | None] = []
        n = 0
        for sample_id, _ in self.each:
            is_there = n < len(given.each) and given.each[n][0] == sample_id
            places.append(n if is_there else None)
            n += is_there
        return places if n == len(given.each) and 2 * n >= len(self.each) else None


@dataclass(frozen=True)
class RunSamples:
    """The samples of a run, in the order that it began with.

    Attributes:
        samples: `Unusable` in the places of those that cannot be used.
        identity: the entries of `run.json` about the samples that the run began with.
        before: per sample its id, and the hash of what it said when it was last looked at; empty if it could not be used.
        now: the same of what it says now.
    """

    samples: Sequence[Sample | Conversation | Unusable]
    identity: dict[str, Any]
    before: Sequence[tuple[str, str]]
    now: Sequence[tuple[str, str]]

    @staticmethod
    def recognize(out: Path, samples: Sequence[Sample | Conversation], has_begun: bool, is_finished: bool) -> RunSamples:
        """What is given, as the run in `out` knows it.

        Raises `TargetError` where that began with other samples. It may go on without some; `look` says which may be others.
        """
        given = _Known.of(samples)
        known = _Known.read(out) if has_begun else None
        if known is None:  # `record.begin` compares them all together
            return RunSamples(samples, given.identity, given.each, given.each)
        places = known.places(given)
        if places is None:
            raise _other_samples(out, is_other_number=len(known.each) != len(given.each))
        gone = [sample_id for (sample_id, _), place in zip(known.each, places, strict=True) if place is None]
        if gone:
            logger.warning("%d samples that the run began with are gone; it goes on without them: %s", len(gone), _listed(gone))
        found = RunSamples(
            [Unusable(known.each[n][0], "it is gone") if place is None else samples[place] for n, place in enumerate(places)],
            known.identity,
            known.each,
            [known.each[n] if place is None else given.each[place] for n, place in enumerate(places)],
        )
        if is_finished and (changed := found.changed()):
            raise _other_samples(out, ids=[found.now[n][0] for n in changed])
        return found

    def changed(self) -> list[int]:
        """The places of samples that could be used and say something else now."""
        both = zip(self.before, self.now, strict=True)
        return [n for n, ((_, before), (_, now)) in enumerate(both) if before not in ("", now)]

    def look(
        self,
        out: Path,
        collator: Collator,
        settings: str,
        arguments: TrainingArguments,
        *,
        strict: bool,
        progress: bool,
        stop: Stop,
    ) -> RunSamples:
        """Looks at all samples as the collator does, each process at its share, and lists those that cannot be used.

        Args:
            out: the run's folder.
            collator: of the training.
            settings: what decides beside a sample whether it can be used.
            arguments: of the training: its processes, and how many workers each has.
            strict: whether a sample that cannot be used ends the run.
            progress: whether to show a progress bar.
            stop: whether the run was asked to end.

        Raises:
            DataError: no sample can be used, or one cannot and the run is `strict`.
            TargetError: a sample that the run began with is another one now.
            Stopped: a signal asked to end.
        """
        collator.require_usable([sample for sample in self.samples if not isinstance(sample, Unusable)])
        faults = dict(of_all_processes(self._faults(out, collator, settings, arguments, progress, stop), arguments))
        for name in of_all_processes([stop.named()] if stop.requested else [], arguments):
            raise Stopped(f"{name} ended the training while its samples were looked at; the same command continues")
        if changed := [self.now[n][0] for n in self.changed() if n not in faults]:
            raise _other_samples(out, ids=changed)
        samples = [Unusable(sample.id, faults[n]) if n in faults else sample for n, sample in enumerate(self.samples)]
        unusable = {n: sample.reason for n, sample in enumerate(samples) if isinstance(sample, Unusable)}
        if arguments.process_index == 0:
            self._list(out, unusable)
        first = next(iter(faults.values()), "")
        if len(unusable) == len(samples):
            raise DataError(f"none of the {len(samples)} samples can be used; the first: {first}")
        if strict and faults:
            raise DataError(
                f"{len(faults)} of {len(samples)} samples cannot be used, which {out / SKIPPED} lists; the first: {first}. Mend "
                "them, leave them out, or do not ask for strict"
            )
        if arguments.process_index == 0:
            self._say(out, faults, unusable)
        return replace(self, samples=samples)

    def _faults(
        self, out: Path, collator: Collator, settings: str, arguments: TrainingArguments, progress: bool, stop: Stop
    ) -> list[tuple[int, str]]:
        """The places of this process's samples that cannot be used, and why."""
        rank = arguments.process_index
        sound = _Sound(out, rank)
        keys = {
            n: _key(sample, self.now[n][1], settings)
            for n, sample in list(enumerate(self.samples))[rank :: arguments.world_size]
            if not isinstance(sample, Unusable)
        }
        todo = [n for n, key in keys.items() if key not in sound]
        if not todo:
            return []
        parts = [todo[start : start + LOOKED_AT_ONCE] for start in range(0, len(todo), LOOKED_AT_ONCE)]
        reasons: DataLoader[Any] = DataLoader(
            [[self.samples[n] for n in part] for part in parts],  # type: ignore[arg-type]  # a list is a data set
            batch_size=None,
            collate_fn=_Reasons(collator),
            num_workers=arguments.dataloader_num_workers,
        )
        faults = []
        with tqdm(total=len(todo), desc="samples", unit="sample", disable=not progress or rank > 0) as bar:
            for part, found in zip(parts, reasons, strict=True):
                faults += [(n, reason) for n, reason in zip(part, found, strict=True) if reason]
                sound.add(keys[n] for n, reason in zip(part, found, strict=True) if not reason)
                bar.update(len(part))
                if stop.requested:
                    break
        return faults

    def _list(self, out: Path, unusable: dict[int, str]) -> None:
        lines = [json.dumps({"id": self.now[n][0], "reason": reason}) for n, reason in unusable.items()]
        if lines:
            write_within(out, SKIPPED, "\n".join(lines) + "\n")
        else:
            own_path(out, SKIPPED).unlink(missing_ok=True)
        each = [(sample_id, "" if n in unusable else digest) for n, (sample_id, digest) in enumerate(self.now)]
        write_within(out, SAMPLES, json.dumps(self.identity | {"each": each}) + "\n")

    def _say(self, out: Path, faults: dict[int, str], unusable: dict[int, str]) -> None:
        for n, reason in faults.items():
            sample_id = self.now[n][0]
            logger.warning("skipped: %s", reason if repr(sample_id) in reason else f"sample {sample_id!r}: {reason}")
        if unusable:
            logger.warning("%d of %d samples are skipped; %s lists them", len(unusable), len(self.samples), out / SKIPPED)
        mended = [sample_id for n, (sample_id, digest) in enumerate(self.before) if not digest and n not in unusable]
        if mended:
            logger.warning("%d samples that were skipped are used from here on: %s", len(mended), _listed(mended))


class _Reasons:
    """Why samples cannot be used, empty where they can. A class, since spawned workers get it pickled."""

    def __init__(self, collator: Collator) -> None:
        self._collator = collator

    def __call__(self, samples: Sequence[Sample | Conversation]) -> list[str]:
        if get_worker_info() is not None:
            outlast()
        return [str(self._collator.fault_of(sample) or "") for sample in samples]


class _Sound:
    """Hashes of samples that were found to be sound, of all processes; this one's are kept as they are found."""

    def __init__(self, out: Path, rank: int) -> None:
        self._keys: set[str] = set()
        for path in out.glob(SOUND.format("*")):
            with suppress(OSError, UnicodeDecodeError):
                self._keys.update(read_file(path).decode().split())
        self._file: Path | None = None
        with suppress(OSError, DataError):  # a run can do without
            self._file = own_path(out, SOUND.format(rank))
            if self._file.exists():  # a kill may have cut its last line off
                self._append(["\n"])

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add(self, keys: Iterable[str]) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._append(f"{key}\n" for key in keys if key)

    def _append(self, lines: Iterable[str]) -> None:
        assert self._file is not None
        with open(self._file, "a") as file:
            file.writelines(lines)


def _key(sample: Sample | Conversation, digest: str, settings: str) -> str:
    """What a sample is found sound by; empty where it holds a picture itself, or names one that is no local file."""
    stamps = [stamp_of(image) for image in _images(sample)]
    if None in stamps:
        return ""
    return hashlib.sha256("\0".join([settings, digest, *map(str, stamps)]).encode(errors="surrogateescape")).hexdigest()[:32]


def _other_samples(out: Path, is_other_number: bool = False, ids: Sequence[str] = ()) -> TargetError:
    named = f" ({len(ids)} say something else or have another picture: {_listed(ids)})" if ids else ""
    return TargetError(
        f"{out} holds a run with another {'samples, ' * is_other_number}samples_sha256{named}; give a new folder, or the samples "
        "of that run: some of them may be gone, and those that it skipped may be others"
    )


def _listed(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - MAX_NAMED} more" if len(ids) > MAX_NAMED else ""
    return ", ".join(map(repr, ids[:MAX_NAMED])) + more


def _texts(sample: Sample | Conversation) -> list[Any]:
    """What a run's record knows of a sample; of pictures their paths and sizes."""
    pictures = [[str(path), path.stat().st_size if path.is_file() else None] for path in _paths(sample)]
    if isinstance(sample, Sample):
        return [sample.id, pictures, sample.question, sample.answer, *record_of(sample.regions)]
    return [sample.id, pictures, *([message.role, message.content] for message in sample.messages), *record_of(sample.regions)]


def _images(sample: Sample | Conversation) -> Sequence[Any]:
    return (sample.image,) if isinstance(sample, Sample) else sample.images


def _paths(sample: Sample | Conversation) -> list[Path]:
    return [Path(image) for image in _images(sample) if isinstance(image, str | Path) and not is_url(image)]
