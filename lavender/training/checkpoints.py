"""How a checkpoint is written, and which one a run continues from: the newest that is as it was written.

The Trainer continues from a checkpoint without the optimizer's state, or without the random numbers', and says nothing; the run
is another one then. So a checkpoint is written aside, and has its name when it is complete and on the disk. It has a record of its
files, and one that lacks some, or has them damaged, is passed over.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException
from transformers import Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import DataError, first_line
from ..files import name_full_disk, read_json, replace_folder, write_within
from ..pretrained.weights import non_finite
from .arguments import misfit

logger = logging.getLogger("lavender")

RECORD = "lavender.json"
"""By how many processes a checkpoint was written, and the size of every other file in it."""
STATE = "trainer_state.json"
ASIDE = "unfinished"
"""Where a folder is written before it has its name, beside its place."""
MAX_NAMED = 3
"""Faults of a checkpoint that a message names."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises `DataError`, which says what to do, where the disk is full: safetensors and torch have errors of their own for it."""
    with name_full_disk(folder):
        try:
            yield
        except (SafetensorError, RuntimeError, CheckpointException) as error:
            fault = next((fault for fault in _parts(error) if _says_full_disk(fault)), None)
            if fault is None:
                raise
            raise OSError(errno.ENOSPC, f"{first_line(fault)}; is the disk full?") from error


def _parts(error: BaseException) -> Iterator[BaseException]:
    """What an error consists of: a sharded checkpoint's has those of all processes."""
    if isinstance(error, CheckpointException):
        for fault, _ in error.failures.values():
            yield from _parts(fault)
    else:
        yield error


def _says_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    kinds = (
        ("I/O error",)
        if isinstance(error, SafetensorError)
        else ("PytorchStreamWriter failed", "inline_container.cc", "iostream error")
    )
    return any(kind in str(error) for kind in kinds)


def publish(made: Path, checkpoint: Path, num_processes: int) -> None:
    """Gives a checkpoint that was written aside its name, with a record of its files."""
    _write_record(made, num_processes)
    replace_folder(made, checkpoint)
    shutil.rmtree(made.parent)


def remove_old(folder: Path, num_kept: int | None) -> None:
    """Removes all checkpoints but the newest ones; none where `num_kept` is None or below 1. Each is there whole, or not at all."""
    numbers = sorted(_numbers(folder).items(), key=lambda entry: entry[1])
    for name, _ in numbers[:-num_kept] if num_kept and num_kept > 0 else []:
        aside = folder / ASIDE / name
        aside.parent.mkdir(exist_ok=True)
        os.replace(folder / name, aside)
        shutil.rmtree(aside.parent)


def _numbers(folder: Path) -> dict[str, int]:
    """The steps of the checkpoints in a folder, by name."""
    names = [path.name for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    numbers = {name: name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for name in names}
    return {name: int(number) for name, number in numbers.items() if number.isdecimal()}


def _write_record(checkpoint: Path, num_processes: int) -> None:
    sizes = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != RECORD:
            with open(path, "rb") as file:  # opened, since a network file system may know an old size until then
                sizes[path.relative_to(checkpoint).as_posix()] = os.fstat(file.fileno()).st_size
    write_within(checkpoint, RECORD, json.dumps({"num_processes": num_processes, "bytes": sizes}, indent=2) + "\n")


def last_checkpoint(folder: Path, trainer: Trainer | None = None) -> str | None:
    """The newest sound checkpoint in a folder of checkpoints, the same in all processes; None if there is no checkpoint at all.

    Unfinished ones, left by a kill while they were written, are removed. Damaged ones are moved to `damaged/`, so that neither
    resuming nor the Trainer's own removal of old checkpoints meets them.

    Args:
        folder: the Trainer's `output_dir`.
        trainer: what is to continue; without it no more than the Trainer's state is read.

    Raises:
        DataError: there are checkpoints, and none is sound.
    """
    names = _finished(folder, removes=trainer is None or trainer.args.should_save)
    if trainer is None:
        return next((str(folder / name) for name in names if _has_state(folder / name)), None)
    [names] = broadcast_object_list([names])
    passed: dict[str, str] = {}
    for name in names:
        faults = gather_object(_faults(folder / name, trainer))
        if not faults:
            _set_aside(folder, passed, name, trainer)
            return str(folder / name)
        more = f" and {len(faults) - MAX_NAMED} faults more" if len(faults) > MAX_NAMED else ""
        passed[name] = ", ".join(faults[:MAX_NAMED]) + more
    if passed:
        raise DataError(
            f"no checkpoint in {folder} can be continued from: {'; '.join(f'{name}: {why}' for name, why in passed.items())}. Put "
            "back what is missing, or remove the checkpoints (or give a new folder) to begin anew"
        )
    return None


def _finished(folder: Path, removes: bool) -> list[str]:
    """Names of the checkpoints that were written to their end, newest first; others may be removed."""
    aside = folder / ASIDE
    if removes and aside.exists():
        for path in aside.iterdir():
            logger.warning("%s was unfinished when its run ended, and is removed", path)
        shutil.rmtree(aside)
    numbers = _numbers(folder)
    for name in [*numbers]:
        path = folder / name
        if _has_state(path) or (path / RECORD).exists():
            continue
        del numbers[name]
        if removes:
            logger.warning("%s was being written when its run ended, and is removed", path)
            shutil.rmtree(path)
    return sorted(numbers, key=lambda name: -numbers[name])


def _has_state(checkpoint: Path) -> bool:
    """Whether the Trainer's state, which it writes last, can be read."""
    try:
        return isinstance(read_json(checkpoint / STATE), dict)
    except (FileNotFoundError, ValueError):
        return False


def _set_aside(folder: Path, passed: dict[str, str], chosen: str, trainer: Trainer) -> None:
    if trainer.args.should_save:
        for name, why in passed.items():
            place = folder / "damaged" / name
            while place.exists():
                place = place.with_name(f"{place.name}-again")
            place.parent.mkdir(exist_ok=True)
            (folder / name).rename(place)
            logger.warning("%s is damaged (%s): continuing from %s; it is kept as %s", name, why, chosen, place)
        written_by = _record(folder / chosen).get("num_processes", trainer.args.world_size)
        if written_by != trainer.args.world_size:
            logger.warning(
                "%s was written by %d processes, and %d continue: batches and random numbers are others than in an undisturbed run",
                folder / chosen,
                written_by,
                trainer.args.world_size,
            )
    trainer.accelerator.wait_for_everyone()


def _record(checkpoint: Path) -> dict[str, Any]:
    """What `publish` wrote; empty where an earlier version of lavender, or the Trainer alone, wrote the checkpoint."""
    path = checkpoint / RECORD
    record: Any = read_json(path) if path.exists() else {}
    if not isinstance(record, dict):
        raise ValueError(f"{RECORD} is no JSON object")
    return record


def _faults(checkpoint: Path, trainer: Trainer) -> list[str]:
    """What is wrong with a checkpoint. Each process reads its share of the files: that takes as long as loading them."""
    processes, rank = trainer.args.world_size, trainer.args.process_index
    try:
        record = _record(checkpoint)
        sizes: dict[str, int] = record.get("bytes", {})
        written_by: int = record.get("num_processes", processes)
        required = {*sizes, *_required(checkpoint, trainer, written_by)}
    except ValueError as error:
        return [f"a JSON file in it is damaged ({error})"]
    faults = []
    if trainer.args.should_save:
        if not _has_state(checkpoint) or not _is_state(read_json(checkpoint / STATE)):
            faults.append(f"{STATE} is missing or damaged")
        if trainer.is_deepspeed_enabled and written_by != processes:
            faults.append(f"DeepSpeed wrote it by {written_by} processes and cannot continue by {processes}")
        faults += [f"{name} is missing" for name in sorted(required - {STATE}) if not (checkpoint / name).is_file()]
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file())[rank::processes]:
        name, size = path.relative_to(checkpoint).as_posix(), path.stat().st_size
        if size != sizes.get(name, size):
            faults.append(f"{name} has {size} bytes of {sizes[name]}")
        else:
            faults += [f"{name} {fault}" for fault in _faults_of_file(path)]
    return faults


def _is_state(state: dict[str, Any]) -> bool:
    """Whether the Trainer can take its state for its own."""
    counted = all(isinstance(state.get(name), int) for name in ("global_step", "max_steps")) and state["global_step"] >= 0
    known = state.keys() <= {field.name for field in fields(TrainerState)}
    return counted and known and isinstance(state.get("log_history"), list) and not misfit(TrainerState, state)


def _required(checkpoint: Path, trainer: Trainer, processes: int) -> list[str]:
    """Files that a checkpoint of such a run cannot do without, recorded or not."""
    names = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    if trainer.is_deepspeed_enabled:
        return [*names, "latest"]
    names.append(SCHEDULER_NAME)
    if trainer.accelerator.scaler is not None:
        names.append(SCALER_NAME)
    if trainer.is_fsdp_enabled:
        return names
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    if hasattr(trainer.model, "peft_config"):
        weights = [ADAPTER_SAFE_WEIGHTS_NAME]
    elif index.exists():
        weights = [index.name, *read_json(index)["weight_map"].values()]
    else:
        weights = [SAFE_WEIGHTS_NAME]
    return [*names, OPTIMIZER_NAME, *weights]


def _faults_of_file(path: Path) -> Iterator[str]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                bad = non_finite((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            if bad:
                yield f"has weights that are not finite, such as {bad[0]}"
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:
                bad_entry = archive.testzip()
            if bad_entry is not None:
                yield f"is damaged in {bad_entry}"
        elif path.suffix == ".json":
            read_json(path)
    except (SafetensorError, ValueError, zipfile.BadZipFile, OSError) as error:
        yield f"cannot be read ({error})"
