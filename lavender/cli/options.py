"""What options of several commands are made into."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..data.samples import Conversation, Sample


class Rows(str, Enum):
    predicts = "predicts"
    reads = "reads"


def integers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"{option} is {text!r}; give integers separated by commas, as in 51,151,301") from None


def samples_in(path: Path | None, images: Path | None) -> list[Sample | Conversation] | None:
    from ..data.samples import read_samples

    return None if path is None else read_samples(path, split=None, images=images)


def usable_device(name: str) -> str:
    import torch

    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]})") from None
    return name
