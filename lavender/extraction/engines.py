"""Who does the work of an extraction: this process, several on this machine, or Ray's actors on many. All give the same maps."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from tqdm import tqdm

from ..config import ExtractionConfig, TeacherConfig
from ..data.pairs import Pair
from ..errors import ConfigError, DataError, LavenderError, ModelError, importing
from ..images import Picture
from ..pretrained.notes import AsHere
from ..signals import SIGNALS
from ..targets.manifest import different_teacher
from ..targets.shards import Target
from ..teachers.model import Teacher
from ..words import Caption

_LOADERS = 4
"""Threads that decode the pictures of a batch."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Pictures that are computed together, and their places in the input."""

    positions: tuple[int, ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, eq=False)
class Finished:
    """What became of a batch: the targets with their places in the input, and what could not be used, with the reason.

    Attributes:
        start: the place of the batch's first picture, which tells batches apart.
        positions: of the targets.
        targets: the samples that could be used.
        failures: the ids of the others, and why.
    """

    start: int
    positions: tuple[int, ...]
    targets: tuple[Target, ...]
    failures: tuple[tuple[str, str], ...]


class Engine(ABC):
    """Computes batches, in any order. A context manager.

    Attributes:
        identity: what tells the teacher from others; see `Teacher`.
        reads_far_ahead: whether more batches are in hand than a run that is asked to end can wait for.
    """

    identity: dict[str, Any]
    reads_far_ahead = False

    @abstractmethod
    def results(self, batches: Iterable[Batch]) -> Generator[Finished]:
        """What becomes of each batch, once for each. `batches` is read ahead: little here, a data set's worth by Ray."""

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
    """A teacher, and what it does with a batch.

    Raises `ModelError` if the device has too little memory.
    """

    def __init__(self, model: str | Path | Any, config: TeacherConfig, work: ExtractionConfig, device: str) -> None:
        self._device = device
        self._threads = work.threads if torch.device(device).type == "cpu" else None
        with self._limit_threads(), self._name_memory("the teacher"):
            self.teacher = Teacher(model, config, device, offload=work.offload, vae_slicing=work.vae_slicing)

    def __call__(self, batch: Batch) -> Finished:
        failures: list[tuple[str, str]] = []
        usable: list[tuple[int, Pair, Picture, Caption]] = []
        with ThreadPoolExecutor(_LOADERS) as pool:
            loading = [pool.submit(Picture.open, pair.image) for pair in batch.pairs]
        for position, pair, future in zip(batch.positions, batch.pairs, loading, strict=True):
            caption = Caption.of(pair.caption)
            try:
                picture = future.result()
                reason = self.teacher.refusal(caption)
                if reason is not None:
                    raise DataError(reason)
            except DataError as error:
                failures.append((pair.id, str(error)))
            else:
                usable.append((position, pair, picture, caption))
        targets: list[Target] = []
        positions: list[int] = []
        if usable:
            _, _, pictures, captions = zip(*usable, strict=True)
            with self._limit_threads(), self._name_memory(f"{len(usable)} pictures at a time"):
                maps = self.teacher.word_maps_of(pictures, captions)
            for (position, pair, picture, _), word_maps in zip(usable, maps, strict=True):
                try:
                    self.teacher.require_finite(word_maps)
                except DataError as error:
                    failures.append((pair.id, str(error)))
                else:
                    positions.append(position)
                    targets.append(Target(pair.id, picture.sha256, word_maps, picture.file_sha256))
        return Finished(batch.positions[0], tuple(positions), tuple(targets), tuple(failures))

    @contextmanager
    def _name_memory(self, what: str) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{self._device} has too little memory for {what} ({str(error).splitlines()[0]}); give a smaller batch_size, "
                "dtype=bfloat16, vae_slicing=true or offload=model. What is stored is safe, the same command continues"
            ) from None

    @contextmanager
    def _limit_threads(self) -> Iterator[None]:
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

    def results(self, batches: Iterable[Batch]) -> Generator[Finished]:
        yield from map(self._worker, batches)

    def close(self) -> None:
        self._worker.teacher.close()


class _Processes(Engine):
    """One process for each device. One that dies is replaced, and what it had in hand is done again."""

    def __init__(self, model: str, config: TeacherConfig, work: ExtractionConfig) -> None:
        self._arguments = (model, config, work)
        self._again: list[Batch] = []
        self._deaths: Counter[str] = Counter()
        self._processes: list[_Process] = []
        self.identity = {}
        try:
            for device in work.devices:
                self._processes.append(_Process(device, *self._arguments))
            while not all(process.is_ready for process in self._processes):
                self._receive()
        except BaseException:
            self.close()
            raise

    def results(self, batches: Iterable[Batch]) -> Generator[Finished]:
        coming = iter(batches)
        while True:
            ready = [process for process in self._processes if process.is_ready]
            # One in work, and one waiting.
            for depth in (1, 2):
                for process in ready:
                    if len(process.in_hand) < depth:
                        batch = self._again.pop(0) if self._again else next(coming, None)
                        if batch is not None:
                            process.give(batch)
            if ready and not any(process.in_hand for process in ready):
                return
            yield from self._receive()

    def _receive(self) -> list[Finished]:
        """Waits until some processes have an answer, or are dead."""
        finished = []
        speaking = wait([process.pipe for process in self._processes])
        for number, process in enumerate(self._processes):
            if process.pipe not in speaking:
                continue
            try:
                answer = process.pipe.recv()
            except (EOFError, OSError):
                self._replace(number)
                continue
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, Finished):
                process.in_hand.pop(0)
                finished.append(answer)
            else:
                _require_same(self.identity or answer, answer)
                self.identity, process.is_ready = self.identity or answer, True
                self._deaths.pop(_name_loading(number), None)
        return finished

    def _replace(self, number: int) -> None:
        process = self._processes[number]
        fate = process.fate()
        process.end()
        # What was in work may be the reason; what was waiting cannot.
        reason = process.in_hand[0].pairs[0].id if process.in_hand else _name_loading(number)
        self._deaths[reason] += 1
        max_retries = self._arguments[2].max_retries
        if self._deaths[reason] > max_retries:
            raise ModelError(
                f"the process on {process.device} died {max_retries + 1} times at {reason} (at last: {fate}). Is there "
                "too little memory? Try fewer devices or a smaller batch_size. What is stored is safe, the same command continues"
            )
        tqdm.write(f"the process on {process.device} died ({fate}) and is replaced; {len(process.in_hand)} batches are done again")
        self._again += process.in_hand
        self._processes[number] = _Process(process.device, *self._arguments)

    def close(self) -> None:
        for process in self._processes:  # all of them, before any is waited for: an interrupt may come meanwhile
            process.kill()
        for process in self._processes:
            process.end()


def _name_loading(number: int) -> str:
    return f"loading the teacher (process {number}; in a script, extract must be called below `if __name__ == '__main__':`)"


class _Process:
    """A process with a teacher.

    Attributes:
        pipe: sends the teacher's identity, then a `Finished` for each batch in turn; or the error that ended the process.
        is_ready: whether the identity has come.
        in_hand: the batches that it has, the oldest first.
    """

    def __init__(self, device: str, model: str, config: TeacherConfig, work: ExtractionConfig) -> None:
        self.device = device
        self.is_ready = False
        self.in_hand: list[Batch] = []
        # A forked process could not use CUDA.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=AsHere(_serve), args=(theirs, device, model, config, work), daemon=True)
        with _no_signals():
            self._process.start()
        theirs.close()  # so that a read fails when the process is dead

    def give(self, batch: Batch) -> None:
        self.in_hand.append(batch)
        with suppress(OSError):  # it is dead, which the next read finds
            self.pipe.send(batch)

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        """Ends the process at once, if it has not ended by itself."""
        self.kill()
        self._process.join()
        self.pipe.close()

    def fate(self) -> str:
        """How a process ended that is dead, or about to be."""
        self._process.join(timeout=5)
        code = self._process.exitcode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


@contextmanager
def _no_signals() -> Iterator[None]:
    """Processes that are started here never get a terminal's interrupts, and a scheduler's signals to end, which both send to all
    processes: they are for the one that ends these."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # or else the first start would do it, and unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *SIGNALS})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, device: str, model: str, config: TeacherConfig, work: ExtractionConfig) -> None:
    """What a process does."""
    inbox: SimpleQueue[Batch] = SimpleQueue()

    def read() -> None:
        # Always reading, so that the other side never waits while this one does; and not outliving it, even if it is killed.
        try:
            while True:
                inbox.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    try:
        _hush()
        worker = Worker(model, config, work, device)
        pipe.send(worker.teacher.identity)
        while True:
            pipe.send(worker(inbox.get()))
    except (LavenderError, ModuleNotFoundError) as error:
        pipe.send(error)
    except Exception:
        pipe.send(RuntimeError(f"in the process on {device}:\n{traceback.format_exc()}"))


def _hush() -> None:
    """Leaves the console to the process that everything was started from."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _require_same(expected: dict[str, Any], loaded: dict[str, Any]) -> None:
    named = [
        {name: identity[name] for name in ("model", "model_commit", "weights") if name in identity}
        for identity in (expected, loaded)
    ]
    how = "" if named[0] == named[1] else "other names or weights"
    if how := how or different_teacher(expected, loaded):
        raise ModelError(
            f"the processes loaded different teachers, {named[0]} and {named[1]} ({how}); give them all the same files"
        )


class _Ray(Engine):
    """One actor of Ray Data for each device, wherever the cluster has place for it; Ray replaces those that die."""

    reads_far_ahead = True

    def __init__(self, model: str, config: TeacherConfig, work: ExtractionConfig) -> None:
        with importing():
            import ray
            import ray.data
        kinds = {torch.device(device).type for device in work.devices}
        if len(kinds) > 1:
            raise ConfigError(f"devices are {', '.join(work.devices)}; Ray's actors are all of one kind")
        self._ray: Any = ray
        self._arguments, self._kind = (model, config, work), kinds.pop()
        with ExitStack() as undo:
            if not ray.is_initialized():
                undo.callback(ray.shutdown)
                with _same_handlers():
                    _start_ray(ray, len(work.devices))
            undo.enter_context(_quiet(ray))
            identity = ray.remote(_identity_of).options(**self._resources).remote(model, config, work, self._kind)
            with self._unwrap_errors():
                self.identity = ray.get(identity)
            self._undo = undo.pop_all()

    @property
    def _resources(self) -> dict[str, float]:
        return {"num_gpus": 1} if self._kind == "cuda" else {"num_cpus": 1}

    def results(self, batches: Iterable[Batch]) -> Generator[Finished]:
        coming = iter(batches)
        while together := _take_batches(coming):
            with warnings.catch_warnings():
                # Ray 2.60 to 2.63 say that what limits retries will go.
                warnings.simplefilter("ignore", DeprecationWarning)
                dataset = self._dataset(together)
            with self._unwrap_errors():
                for row in dataset.iter_rows():
                    yield pickle.loads(row["finished"])

    def _dataset(self, batches: list[Batch]) -> Any:
        model, config, work = self._arguments
        return self._ray.data.from_items(
            [{"batch": pickle.dumps(batch)} for batch in batches], override_num_blocks=min(len(batches), _MOST_BLOCKS)
        ).map(
            _Actor,
            fn_constructor_args=(model, config, work, self._kind, self.identity),
            compute=self._ray.data.ActorPoolStrategy(size=len(work.devices)),
            max_restarts=-1,
            max_task_retries=work.max_retries,
            **self._resources,
        )

    @contextmanager
    def _unwrap_errors(self) -> Iterator[None]:
        """What an actor raises comes wrapped up."""
        try:
            yield
        except self._ray.exceptions.RayError as error:
            cause: BaseException | None = error
            # Ray makes wrappers that are of the class of what they wrap.
            while isinstance(cause, self._ray.exceptions.RayError) or (
                cause is not None and not isinstance(cause, LavenderError | ModuleNotFoundError)
            ):
                cause = getattr(cause, "cause", None) or cause.__cause__
            if cause is not None:
                raise cause from None
            if isinstance(error, self._ray.exceptions.RayTaskError | self._ray.exceptions.UserCodeException):
                raise
            raise ModelError(
                f"Ray gave up ({type(error).__name__}: {' '.join(str(error).split())[:500]}). Is there too little memory? Try "
                "fewer devices or a smaller batch_size. What is stored is safe, the same command continues"
            ) from None

    def close(self) -> None:
        self._undo.close()


def _start_ray(ray: Any, num_actors: int) -> None:
    """Joins the cluster that RAY_ADDRESS names, or starts one of this machine alone. By itself Ray would find anybody's."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with _silence_stderr():
        if not os.environ.get("RAY_ADDRESS"):
            ray.init(address="local", num_cpus=max(os.cpu_count() or 1, num_actors), include_dashboard=False, **quiet)
            return
        try:
            ray.init(**quiet)
        except ConnectionError as error:
            raise ConfigError(
                f"there is no Ray cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']!r} ({str(error).splitlines()[0]}); start one, "
                "or unset it to use this machine alone"
            ) from None


@contextmanager
def _same_handlers() -> Iterator[None]:
    """With the handlers of signals that there were before: Ray's own end the process at once."""
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) is not None}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _silence_stderr() -> Iterator[None]:
    """Without standard error, also of what is no Python: Ray says there that it was told to say nothing."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Without Ray Data's messages and progress bars, beside those of the extraction."""
    logger, context = logging.getLogger("ray.data"), ray.data.DataContext.get_current()
    before = (logger.level, context.enable_progress_bars)
    logger.setLevel(logging.CRITICAL)
    context.enable_progress_bars = False
    try:
        yield
    finally:
        logger.setLevel(before[0])
        context.enable_progress_bars = before[1]


class _Actor:
    """What Ray Data makes an actor of."""

    def __init__(self, model: str, config: TeacherConfig, work: ExtractionConfig, device: str, identity: dict[str, Any]) -> None:
        self._worker = Worker(model, config, work, device)
        _require_same(identity, self._worker.teacher.identity)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"finished": pickle.dumps(self._worker(pickle.loads(row["batch"])))}


def _identity_of(model: str, config: TeacherConfig, work: ExtractionConfig, device: str) -> dict[str, Any]:
    return Worker(model, config, work, device).teacher.identity


_MOST_BLOCKS = 2000
"""Blocks that a data set of Ray is cut into: each is what an actor takes at a time, and does again if it dies."""
_MOST_BATCHES = 20_000
"""Batches of one data set. The next one has new actors, which load the teacher again."""
_BYTES_AT_ONCE = 2**30
"""Encoded pictures that are handed to Ray in one data set. Pictures that the actors read themselves do not count."""


def _take_batches(batches: Iterator[Batch]) -> list[Batch]:
    """The next batches, as many as go into one data set."""
    taken: list[Batch] = []
    size = 0
    for batch in batches:
        taken.append(batch)
        size += sum(len(pair.image) for pair in batch.pairs if isinstance(pair.image, bytes))
        if size >= _BYTES_AT_ONCE or len(taken) == _MOST_BATCHES:
            break
    return taken
