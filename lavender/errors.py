"""What a user can get wrong. Every message says what was given, what was expected and what to do."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb


class LavenderError(Exception):
    """Base of every error that a user can cause and mend; the command line prints it as one line and exits with 2."""


class ConfigError(LavenderError, ValueError):
    """A setting is out of its range, or two settings contradict each other."""


class ModelError(LavenderError):
    """A model cannot be loaded, or cannot be captured as it is set up."""


class CaptureError(LavenderError, RuntimeError):
    """A captured forward did not record what it had to."""


class DataError(LavenderError):
    """A data file, a picture or a caption cannot be used."""


class TargetError(LavenderError):
    """A target store is missing, damaged, or belongs to other pictures or another teacher."""


class MissingPackageError(LavenderError, ModuleNotFoundError):
    """A package that is not installed; `name` is its name in imports."""


@dataclass(frozen=True)
class OptionalPackage:
    """A package that lavender's own dependencies do not include.

    Attributes:
        extra: of lavender's extras the one that installs it; empty where it is installed by itself.
        commands: of `lavender`, which do not run without it.
        uses: what else needs it: an option, or a part of the Python API.
        distribution: what pip calls it, where that is not its name in imports.
    """

    extra: str
    commands: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    distribution: str = ""


OPTIONAL_PACKAGES = {
    "diffusers": OptionalPackage("extract", ("demo", "extract"), ("evaluate --teacher", "doctor of a pipeline", "patch(pipe)")),
    "pyarrow": OptionalPackage("extract", ("demo", "extract", "evaluate maps", "targets"), ("train --targets", "parquet files")),
    "filelock": OptionalPackage("extract", ("demo", "extract", "train"), ("targets merge, import and export",)),
    "datasets": OptionalPackage("extract", (), ("data sets of the hub", "targets export --format parquet")),
    "accelerate": OptionalPackage("train", ("demo", "train")),
    "peft": OptionalPackage("train", (), ("train with LoRA (the default)", "evaluate --adapter")),
    "jinja2": OptionalPackage("report", ("demo", "report")),
    "rich": OptionalPackage("report", ("demo",)),
    "matplotlib": OptionalPackage("report", (), ("extract --preview", "pictures of train --targets", "plot and overlay of maps")),
    "triton": OptionalPackage("triton", (), ("the fastest kernels of a GPU",)),
    "ray": OptionalPackage("ray", (), ("extract --engine ray",)),
    "deepspeed": OptionalPackage("deepspeed", (), ("train --set training.arguments.deepspeed=FILE",)),
    "tensorboard": OptionalPackage("tensorboard", (), ("train --set training.arguments.report_to=tensorboard",)),
    "spacy": OptionalPackage("words", (), ("train --set words.tagger=NAME",)),
    "trl": OptionalPackage("trl", (), ("TRL's trainers in place of train",)),
    "bitsandbytes": OptionalPackage("", (), ("models quantized by it",)),
    "torchao": OptionalPackage("", (), ("models quantized by it",)),
    "liger_kernel": OptionalPackage("", (), ("train --set training.arguments.use_liger_kernel=true",), "liger-kernel"),
    "torchvision": OptionalPackage("", (), ("processors of some students",)),
}
"""Packages by their names in imports. Where they are missing, lavender imports, and what does without them runs."""


def install_command(package: str) -> str:
    """How a package is installed, by its name in imports: from a clone of lavender, and from an index."""
    known = OPTIONAL_PACKAGES.get(package, OptionalPackage(""))
    if not known.extra:
        return f"pip install {known.distribution or package}"
    return f"pip install '.[{known.extra}]' in a clone of lavender, else pip install 'lavender-attention[{known.extra}]'"


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of optional packages: a missing one is a `MissingPackageError` that says how to install it."""
    try:
        yield
    except (ImportError, RuntimeError) as error:
        package = ""
        cause: BaseException | None = error
        while not package and cause is not None:  # transformers and diffusers raise errors in its place, which name a class
            if isinstance(cause, ModuleNotFoundError):
                package = (cause.name or "").partition(".")[0]
            cause = cause.__cause__
        if isinstance(error, LavenderError) or package in ("", "lavender"):
            raise
        message = f"this needs the package {package}, which is not installed: {install_command(package)}"
        raise MissingPackageError(message, name=package) from error


_BUGS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, NotImplementedError, TypeError)
"""What a mistake in the code raises, where it arises in the code itself."""
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "out of memory", "std::bad_alloc")
"""What torch and others say in a `RuntimeError`."""


@contextmanager
def reading(
    what: str,
    remedy: str,
    kind: type[LavenderError] = DataError,
    explain: Callable[[BaseException], str] | None = None,
) -> Iterator[None]:
    """The border with third parties, around their reading of what a user gave: what they raise means that it cannot be used.

    Libraries raise anything there: parsers their own errors, tokenizers a bare Exception, Rust's a BaseException, and code that
    takes a value for one of another type whatever follows from it. So where an error arises decides, and not its type: one that
    lavender's own lines raise is a bug, and passes. The original is the `__cause__`.

    Args:
        what: the subject and the verb: "cannot read the model in FOLDER".
        remedy: what to do.
        kind: of the error, whose message is one line: `WHAT (WHY); REMEDY`.
        explain: says why; by default what the library says, in one line.
    """
    try:
        yield
    except (LavenderError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, _BUGS) and _arose_here(error):
            raise
        why = "not enough memory" if lacks_memory(error) else (explain or first_line)(error)
        if "weights_only" in str(error):  # torch says how to execute it all the same
            why = "it holds more than weights, which could be code, and is not unpickled"
        raise kind(f"{what} ({why}); {remedy}") from error


def _arose_here(error: BaseException) -> bool:
    """Whether the innermost frame of an error is one of lavender's."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, of the machine or of a device."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):  # torch.OutOfMemoryError is one
        return any(words in str(error) for words in _NO_MEMORY)
    return isinstance(error, MemoryError)


def first_line(error: BaseException) -> str:
    """What an error says, in one line: the first, and the second if the first announces it by a colon; of a `KeyError`, which says
    no more than the key, its name too."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, KeyError):
        return f"{type(error).__name__}: {first}"
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first


_warned: set[str] = set()


def warn_renamed(old: str, new: str) -> None:
    """Warns once per process, by a `FutureWarning`, that a public name is deprecated; `new` replaces it."""
    if old not in _warned:
        _warned.add(old)
        warnings.warn(f"{old} is deprecated; use {new}", FutureWarning, stacklevel=3)
