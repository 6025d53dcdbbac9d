"""The names that models are loaded by, and what a library may do and raise while it loads one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

from ..errors import ModelError, first_line, reading
from .folders import misplaced, require_regular_files


def split_revision(model: str | Path) -> tuple[str, str | None]:
    """A model's name and its revision: `org/name@v1.0` is `("org/name", "v1.0")`, a name without `@` has None.

    What lies on this machine is a path, `@` or not. Raises `ModelError` where a revision is empty, or one of a local folder.
    """
    name, at, revision = str(model).rpartition("@")
    if not at or Path(model).exists():
        return str(model), None
    if not name or not revision:
        raise ModelError(f"{str(model)!r} names no model at a revision; expected NAME@REVISION, a branch, tag or commit of the hub")
    if Path(name).exists():
        raise ModelError(f"{name!r} lies on this machine, where it has no revision {revision!r}; leave out {at + revision!r}")
    return name, revision


def locate_model(model: str | Path, *files: str) -> tuple[str, str | None]:
    """What `from_pretrained` takes for a model: `(name, revision)`. The revision is the commit that a hub id with or without
    `@REVISION` stands for at this moment, so that all parts are read from one; None for a folder.

    Args:
        model: a folder, or a hub id, maybe with `@REVISION`.
        files: a model has one of them at least; the first that there is tells the commit. It is downloaded.

    Raises:
        ModelError: see `split_revision`.
        OSError, ValueError: no such model, revision or file; or the hub cannot be reached.
    """
    name, revision = split_revision(model)
    if Path(name).exists():
        require_regular_files(Path(name))
        if not any((Path(name) / file).is_file() for file in files):  # libraries would look for it in the hub, and wait for that
            raise ValueError(f"there is no {' or '.join(files)} in it")
        return name, None
    if Path(name).is_symlink():
        raise ValueError("it is a link to nothing")
    for file in files[:-1]:
        path = find_file(model, file)
        if path is not None:
            return name, path.parent.name
    return name, _download(name, files[-1], revision).parent.name


def find_file(model: str | Path, file: str) -> Path | None:
    """A file of a model: in its folder, or in the hub's cache after a download; None if the model has no such file.

    Raises `ModelError`, `OSError` and `ValueError` as `locate_model` does.
    """
    from huggingface_hub.errors import EntryNotFoundError

    name, revision = split_revision(model)
    if Path(name).exists():
        path = Path(name) / file
        return path if path.is_file() else None
    try:
        return _download(name, file, revision)
    except EntryNotFoundError:
        return None


def _download(name: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, file, revision=revision))


def pin(model: str | Path, *files: str) -> str:
    """A model's name with the commit that it stands for now, `NAME@COMMIT`; of a folder its path. See `locate_model`."""
    name, commit = locate_model(model, *files)
    return name if commit is None else f"{name}@{commit}"


@contextmanager
def loading(what: str, model: str | Path, expected: str) -> Iterator[None]:
    """Around a library's loading of a model: the model's own code never runs, and what fails is a `ModelError` of one line.

    `trust_remote_code=False` is not enough: transformers drops it on its way to some parts of a processor, and asks on standard
    input where it is missing.

    Args:
        what: "an image-text-to-text model".
        model: as the user gave it.
        expected: what to give in its place.
    """
    path = Path(split_revision(model)[0])
    place = "" if path.exists() else ", which is nothing on this machine"

    def explain(error: BaseException) -> str:
        return misplaced(path) or first_line(error)

    with reading(f"cannot load {what} from {str(model)!r}{place}", expected, ModelError, explain), _never_asked(), _without_bars():
        try:
            yield
        except Exception as error:
            if "trust_remote_code" not in str(error) and "custom code" not in str(error):
                raise
            raise ModelError(
                f"{str(model)!r} needs code of its own, which lavender does not run; read that code, load the model in a script "
                "with trust_remote_code=True, and pass the loaded object to lavender.patch"
            ) from error


_lock = RLock()


@contextmanager
def _never_asked() -> Iterator[None]:
    """transformers refuses a model's own code where it would ask whether to run it. One thread loads at a time: the constant is the
    process's."""
    from transformers import dynamic_module_utils

    with _lock:
        seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
        try:
            yield
        finally:
            dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers and diffusers show no bars of their own where their warnings are not heard; downloads keep theirs."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    libraries = [sys.modules[name] for name in ("transformers.utils.logging", "diffusers.utils.logging") if name in sys.modules]
    unheard: list[Any] = [
        library
        for library in libraries
        if library.is_progress_bar_enabled() and not library.get_logger().isEnabledFor(logging.WARNING)
    ]
    as_before = disable_progress_bars if are_progress_bars_disabled() else enable_progress_bars
    for library in unheard:
        library.disable_progress_bar()
    as_before()
    try:
        yield
    finally:
        for library in unheard:
            library.enable_progress_bar()
        as_before()
