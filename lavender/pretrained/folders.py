"""What a folder holds that is no model, and what of it to give instead."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import ModelError


def require_regular_files(folder: Path) -> None:
    """Raises `ModelError` for a pipe or a device among the files of a model: a library that opened it might wait for ever."""
    for root, folders, files in os.walk(folder):
        if Path(root) != folder:
            folders.clear()  # a pipeline has its parts in folders, and these have none
        for name in files:
            path = Path(root) / name
            mode = path.stat().st_mode if path.exists() else stat.S_IFREG
            if not stat.S_ISREG(mode):
                kind = "a pipe" if stat.S_ISFIFO(mode) else "no regular file"
                raise ModelError(f"{path} is {kind}, where a file of a model is expected; give a whole copy of the model")


def misplaced(path: Path) -> str:
    """Why no model is loaded from a path on this machine, in words; empty if there may be one.

    Looks at names alone: whether what has a model's name is one, its library says.
    """
    if path.is_file():
        return "it is a file; give the folder that it lies in"
    if not path.is_dir() or any((path / name).is_file() for name in ("config.json", "model_index.json", "adapter_config.json")):
        return ""
    if not any(path.iterdir()):
        return "it is empty"
    if (path / "run.json").is_file():
        results = [str(path / name) for name in ("model", "adapter") if (path / name).is_dir()]
        if results:
            return f"it is a run's folder; give the run's result, {results[0]}"
        return "it is the folder of a run that is not finished; its results, model/ or adapter/, are not there yet"
    checkpoints = sorted(path.glob("checkpoint-*"), key=lambda child: child.stat().st_mtime)
    if checkpoints:
        return f"it holds checkpoints; give one of them, such as {checkpoints[-1]}"
    if (path / "manifest.json").is_file():
        return f"it is no model but a target store, of which `lavender targets info {path}` says more"
    weights = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    if weights:
        return f"it has weights, {weights[0].name}, and no config.json, without which nobody knows what they are of"
    return "it has no config.json, model_index.json or adapter_config.json"
