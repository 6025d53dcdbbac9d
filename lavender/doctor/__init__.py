"""`lavender doctor`: what lavender finds in a model or on a machine, what it can do with it, and what is missing.

Nothing heavy is imported before it is known what a name stands for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..pretrained.folders import misplaced
from ..pretrained.names import find_file, split_revision
from .finding import Finding as Finding
from .machine import examine as _examine_machine


def examine(model: str | Path | Any) -> list[Finding]:
    """Reports what lavender finds in a model's structure. Loads no weights.

    Args:
        model: a transformers image-text-to-text model, a diffusers pipeline or an adapter of PEFT: a folder, a hub id, maybe as
            `NAME@REVISION`, or a loaded model or pipeline.

    Raises:
        ModelError: there is no such model, or it is of no kind.
    """
    if isinstance(model, str | Path):
        return _examine_name(str(model))
    from torch import nn

    if isinstance(model, nn.Module):
        from . import student

        return list(student.examine(model, None))
    from ..teachers.patch import denoisers_of

    denoiser = denoisers_of(model)[0]
    from . import teacher

    return list(teacher.examine(model, denoiser))


def _examine_name(model: str) -> list[Finding]:
    reason = misplaced(Path(split_revision(model)[0]))
    if reason:
        raise ModelError(
            f"{model!r} is no image-text-to-text model, no adapter and no pipeline: {reason}. Otherwise give a folder that "
            "save_pretrained wrote, or a hub id"
        )
    try:
        index, adapter = find_file(model, "model_index.json"), find_file(model, "adapter_config.json")
    except (OSError, ValueError):
        index = adapter = None  # the hub knows no such model, or cannot be reached: transformers reports it
    if index is not None:
        from . import teacher

        return list(teacher.examine_name(model, index))
    if adapter is not None:
        from .adapter import examine_name

        return list(examine_name(model, adapter))
    from . import student

    return list(student.examine_name(model))


def examine_machine() -> list[Finding]:
    """Reports what of lavender runs on this machine, and by which kernels. A missing part has a remedy
    only if lavender needs it."""
    return list(_examine_machine())
