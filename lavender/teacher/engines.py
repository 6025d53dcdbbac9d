"""Who does the work of an extraction: this process, several on this machine, or Ray's actors on many. All give the same maps."""

from __future__ import annotations

import logging
import multiprocessing
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ..config import ExtractionConfig, TeacherConfig
from ..data import Pair
from ..errors import ConfigError, DataError, LavenderError, ModelError
from ..images import load_image
from ..shards import Target, file_sha256, image_sha256
from .model import Teacher

_LOADERS = 4
"""Threads that decode the pictures of a batch."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Pictures that are computed together, and their places in the input."""

    positions: tuple[int, ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, eq=False)
class Finished:
    """What became of a batch: the targets with their places in the input, and what could not be used, with the reason."""

    batch: Batch
    positions: tuple[int, ...]
    targets: tuple[Target, ...]
    failures: tuple[tuple[str, str], ...]


class Engine(ABC):
    """Computes batches, in any order. A context manager.

    Attributes:
        identity: the teacher's name and the digits of its weights.
    """

    identity: dict[str, str]

    @abstractmethod
    def results(self, batches: Iterable[Batch]) -> Iterator[Finished]:
        """What becomes of each batch, once for each; `batches` is read no further ahead than there is work in hand."""

    @abstractmethod
    def close(self) -> None:
        """Ends the work."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def engine_of(model: str | Path | Any, config: TeacherConfig, work: ExtractionConfig) -> Engine:
    """The engine that a config asks for. Raises `ConfigError` if it cannot be used with this model or here."""
    if work.engine == "local" and len(work.devices) == 1:
        return _Here(model, config, work)
    if not isinstance(model, str | Path):
        raise ConfigError("several processes load a teacher each: give its folder or hub id, not a loaded pipeline")
    return (_Processes if work.engine == "local" else _Ray)(str(model), config, work)


class Worker:
    """A teacher, and what it does with a batch."""

    def __init__(self, model: str | Path | Any, config: TeacherConfig, work: ExtractionConfig, device: str) -> None:
        self._threads = work.threads if torch.device(device).type == "cpu" else None
        with self._limited():
            self.teacher = Teacher(model, config, device, offload=work.offload, vae_slicing=work.vae_slicing)

    def __call__(self, batch: Batch) -> Finished:
        images: list[Image.Image] = []
        chosen: list[tuple[int, Pair]] = []
        failures: list[tuple[str, str]] = []
        with ThreadPoolExecutor(_LOADERS) as pool:
            loading = [pool.submit(load_image, pair.image) for pair in batch.pairs]
        for position, pair, loaded in zip(batch.positions, batch.pairs, loading, strict=True):
            try:
                image = loaded.result()
                reason = self.teacher.refusal(pair.caption)
                if reason is not None:
                    raise DataError(reason)
            except DataError as error:
                failures.append((pair.id, str(error)))
            else:
                images.append(image)
                chosen.append((position, pair))
        targets: list[Target] = []
        if chosen:
            with self._limited():
                maps = self.teacher.word_maps_of(images, [pair.caption for _, pair in chosen])
            for (_, pair), image, own in zip(chosen, images, maps, strict=True):
                targets.append(Target(pair.id, image_sha256(image), own, file_sha256(pair.image)))
        return Finished(batch, tuple(position for position, _ in chosen), tuple(targets), tuple(failures))

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """With another number of threads, a CPU adds numbers in another order."""
        before = torch.get_num_threads()
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class _Here(Engine):
    """This process."""

    def __init__(self, model: str | Path | Any, config: TeacherConfig, work: ExtractionConfig) -> None:
        self._worker = Worker(model, config, work, work.devices[0])
        self.identity = self._worker.teacher.identity

    def results(self, batches: Iterable[Batch]) -> Iterator[Finished]:
        return map(self._worker, batches)

    def close(self) -> None:
        self._worker.teacher.close()


_worker: Worker | None = None
"""A pool process's own."""


def _begin(model: str, config: TeacherConfig, work: ExtractionConfig, devices: Any) -> None:
    global _worker
    _worker = Worker(model, config, work, devices.get())


def _work(batch: Batch) -> Finished:
    assert _worker is not None
    return _worker(batch)


def _identity() -> dict[str, str]:
    assert _worker is not None
    return _worker.teacher.identity


class _Processes(Engine):
    """One process for each device. If one dies, all are started anew, and what they had in hand is done again."""

    def __init__(self, model: str, config: TeacherConfig, work: ExtractionConfig) -> None:
        self._given = (model, config, work)
        self._start()
        try:
            self.identity = self._pool.submit(_identity).result()
        except BrokenProcessPool:
            self.close()
            raise ModelError(_why_broken(model, work)) from None

    def _start(self) -> None:
        # A forked process could not use CUDA.
        context = multiprocessing.get_context("spawn")
        devices = context.Queue()
        for device in self._given[2].devices:
            devices.put(device)
        self._pool = ProcessPoolExecutor(len(self._given[2].devices), context, _begin, (*self._given, devices))

    def results(self, batches: Iterable[Batch]) -> Iterator[Finished]:
        model, _, work = self._given
        coming = iter(batches)
        in_hand: dict[Future[Finished], Batch] = {}
        again: list[Batch] = []
        deaths = 0
        while True:
            # Two for each process: one in work, and one waiting.
            while len(in_hand) < 2 * len(work.devices):
                batch = again.pop() if again else next(coming, None)
                if batch is None:
                    break
                try:
                    in_hand[self._pool.submit(_work, batch)] = batch
                except BrokenProcessPool:
                    again.append(batch)
                    break
            if not in_hand and not again:
                return
            broken = bool(again) and not in_hand
            for future in wait(in_hand, return_when=FIRST_COMPLETED).done:
                batch = in_hand.pop(future)
                try:
                    finished = future.result()
                except BrokenProcessPool:
                    again.append(batch)
                    broken = True
                else:
                    deaths = 0
                    yield finished
            if broken:
                deaths += 1
                if deaths > work.max_retries:
                    raise ModelError(_why_broken(model, work))
                tqdm.write(f"a process died; starting {len(work.devices)} anew, {len(again) + len(in_hand)} batches are done again")
                again += in_hand.values()
                in_hand.clear()
                self._pool.shutdown(cancel_futures=True)
                self._start()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _why_broken(model: str, work: ExtractionConfig) -> str:
    return (
        f"the processes with the teacher {model!r} on {', '.join(work.devices)} died {work.max_retries + 1} times in a row; is "
        "there too little memory? Try fewer devices or a smaller batch_size. What is stored is safe, the same command continues"
    )


class _Ray(Engine):
    """One actor of Ray Data for each device, wherever the cluster has place for it; Ray replaces those that die."""

    def __init__(self, model: str, config: TeacherConfig, work: ExtractionConfig) -> None:
        try:
            import ray
            import ray.data
        except ModuleNotFoundError:
            raise ConfigError("engine is 'ray', which is not installed; pip install 'lavender-attention[ray]'") from None
        kinds = {torch.device(device).type for device in work.devices}
        if len(kinds) > 1:
            raise ConfigError(f"devices are {', '.join(work.devices)}; Ray's actors are all of one kind")
        self._ray, self._given, self._kind = ray, (model, config, work), kinds.pop()
        self._started = not ray.is_initialized()
        if self._started:
            quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            try:
                ray.init(address="auto", **quiet)
            except ConnectionError:  # there is no cluster: one of this machine alone
                cores = max(os.cpu_count() or 1, len(work.devices))
                ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # there is a progress bar already
        ray.data.DataContext.get_current().enable_progress_bars = False
        told = ray.remote(_identity_of).options(**self._resources).remote(model, config, work, self._kind)
        with self._own_errors():
            self.identity = ray.get(told)

    @property
    def _resources(self) -> dict[str, float]:
        return {"num_gpus": 1} if self._kind == "cuda" else {"num_cpus": 1}

    def results(self, batches: Iterable[Batch]) -> Iterator[Finished]:
        model, config, work = self._given
        coming = iter(batches)
        while some := _some(coming):
            dataset = self._ray.data.from_items(
                [{"batch": batch} for batch in some], override_num_blocks=min(len(some), _MOST_BLOCKS)
            ).map(
                _Actor,
                fn_constructor_args=(model, config, work, self._kind),
                compute=self._ray.data.ActorPoolStrategy(size=len(work.devices)),
                **self._resources,
            )
            with self._own_errors():
                for row in dataset.iter_rows():
                    yield row["finished"]

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """What an actor raises comes wrapped up."""
        try:
            yield
        except self._ray.exceptions.RayError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, LavenderError):
                cause = getattr(cause, "cause", None) or cause.__cause__
            if cause is None:
                raise ModelError(f"Ray gave up: {error}. What is stored is safe, the same command continues") from error
            raise cause from None

    def close(self) -> None:
        if self._started:
            self._ray.shutdown()


class _Actor:
    """What Ray Data makes an actor of."""

    def __init__(self, model: str, config: TeacherConfig, work: ExtractionConfig, device: str) -> None:
        self._worker = Worker(model, config, work, device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"finished": self._worker(row["batch"])}


def _identity_of(model: str, config: TeacherConfig, work: ExtractionConfig, device: str) -> dict[str, str]:
    return Worker(model, config, work, device).teacher.identity


_MOST_BLOCKS = 2000
"""Blocks that a data set of Ray is cut into: each is what an actor takes at a time, and does again if it dies."""
_BYTES_AT_ONCE = 2**30
"""Encoded pictures that are handed to Ray in one data set. Pictures that the actors read themselves do not count."""


def _some(batches: Iterator[Batch]) -> list[Batch]:
    """The next batches, as many as go into one data set."""
    some: list[Batch] = []
    size = 0
    for batch in batches:
        some.append(batch)
        size += sum(len(pair.image) for pair in batch.pairs if isinstance(pair.image, bytes))
        if size >= _BYTES_AT_ONCE:
            break
    return some
