"""A store's manifest: what its maps came from, how they are kept, which shards hold them, and what could not be used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Normalization, Storage, check_fields, fingerprint, from_dict, to_dict
from ..errors import ConfigError, TargetError

FORMAT = "lavender-targets"
VERSION = 3
OLD_VERSION = 2
"""Manifests of this version have the keys `teacher` and `config`, a teacher's, in place of `source` and a store's `config`. Their
stores are read and continued, and keep their version and their fingerprint, which run folders recorded."""
NAMES = ("model", "model_commit", "source")
"""Entries of a source that only name it: they decide nothing about the maps."""
PROOFS = ("weights_as_loaded", "behavior")
"""Entries of a source that compare it with another: the digits that older stores know its weights by, and what it does.

Of `behavior`, lists of numbers are the same up to the relative distance `tolerance`, other entries if they are equal; `digits` of a
source that its weights do not tell apart enter the fingerprint."""


@dataclass(frozen=True)
class StoreConfig:
    """How a store keeps its maps. Raises `ConfigError` when a value is out of its range."""

    map_size: int = 32
    """Height and width of the maps."""
    storage: Storage = "float16"
    """What maps are stored as: `float16`, or `uint8` between each map's own lowest and highest value, in half the space."""
    normalization: Normalization = "none"
    """How the maps were normalized before they were stored; with `none` they are raw attention, which is never negative."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.map_size < 1:
            raise ConfigError(f"map_size is {self.map_size}; it must be at least 1")


def new_manifest(source: Mapping[str, Any], config: StoreConfig) -> dict[str, Any]:
    """The manifest of a store that holds nothing yet. `source` is plain JSON values."""
    manifest = {"format": FORMAT, "version": VERSION, "source": json.loads(json.dumps(dict(source))), "config": to_dict(config)}
    digits = _fingerprint(manifest, manifest["source"].get("weights"))
    return {**manifest, "fingerprint": digits, "complete": False, "shards": {}, "failed": []}


def _fingerprint(manifest: Mapping[str, Any], weights: Any) -> str:
    # An extraction's fingerprint is that of version 2, so that a run folder knows a store that was extracted again.
    settings = {name: value for name, value in _identity(manifest).items() if name != "weights"}
    switched = (proven_source_of(manifest).get("behavior") or {}).get("digits")
    return fingerprint([weights, settings, *([switched] if switched else [])])


def earlier_fingerprint(manifest: Mapping[str, Any]) -> str:
    """The fingerprint by the digits that older stores know the weights by, which run folders may have recorded."""
    weights = proven_source_of(manifest).get("weights_as_loaded")
    return manifest["fingerprint"] if weights is None else _fingerprint(manifest, weights)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A store's manifest. Raises `TargetError` if there is none, or if it is damaged or of another version."""
    path = folder / "manifest.json"
    if not path.exists():
        raise TargetError(f"{folder} is no target store: it has no manifest.json. `lavender extract --out {folder}` makes one")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise TargetError(f"{path} is damaged ({error}); extract into a new folder") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        format_read = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise TargetError(f"{path} says the format {format_read!r}; expected {FORMAT!r}. Give the folder of a target store")
    if manifest.get("version") not in (OLD_VERSION, VERSION):
        raise TargetError(
            f"{path} says version {manifest.get('version')!r}; this lavender reads the versions {OLD_VERSION} and {VERSION}: "
            "extract anew, into a new folder"
        )
    source = "source" if manifest["version"] == VERSION else "teacher"
    missing = [key for key in (source, "config", "fingerprint", "complete", "shards", "failed") if key not in manifest]
    if missing:
        raise TargetError(f"{path} is damaged: it lacks {', '.join(missing)}; extract into a new folder")
    return manifest


def source_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a store's maps came from."""
    return {name: value for name, value in proven_source_of(manifest).items() if name not in PROOFS}


def proven_source_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The same with `PROOFS`, which stores that were written before do not have."""
    if manifest["version"] == OLD_VERSION:
        return {**manifest["teacher"], **manifest["config"]}
    return dict(manifest["source"])


def config_of(manifest: Mapping[str, Any]) -> StoreConfig:
    """How a store keeps its maps."""
    known = {field.name for field in fields(StoreConfig)}
    return from_dict(StoreConfig, {name: value for name, value in manifest["config"].items() if name in known})


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides about a store's maps."""
    entries = {**source_of(manifest), **manifest["config"]}
    return {name: value for name, value in entries.items() if name not in NAMES}


def difference(there: Mapping[str, Any], now: Mapping[str, Any], places: tuple[str, str] = ("there", "now")) -> str:
    """How the sources and configs of two manifests differ, in words; empty if they do not. `places` says where each of them is.

    An old manifest has a teacher's whole config whatever the maps came from: what the newer one lacks does not count.
    """
    ours, theirs = _identity(there), _identity(now)
    newer = max(there["version"], now["version"])
    versions = ((now["version"], theirs), (there["version"], ours))
    names = dict.fromkeys(name for version, entries in versions if version == newer for name in entries)
    changed = [name for name in names if name != "weights" and ours.get(name) != theirs.get(name)]
    settings = [f"{name}: {ours.get(name)} {places[0]}, {theirs.get(name)} {places[1]}" for name in changed]
    sources = (proven_source_of(there), proven_source_of(now))
    return "; ".join(settings) or different_teacher(*sources)


def different_teacher(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How the sources of maps differ in weights or behavior, in words; empty if they do not, as far as both have them."""
    digits = [{source.get("weights"), source.get("weights_as_loaded")} for source in (there, now)]
    if there.get("weights") != now.get("weights") and not (digits[0] & digits[1]) - {None}:
        return "other weights"
    ours, theirs = there.get("behavior"), now.get("behavior")
    if not ours or not theirs:
        return ""
    names = [name for name in ours.keys() | theirs.keys() if name not in ("digits", "tolerance")]
    tolerance = max(ours["tolerance"], theirs["tolerance"])
    changed = sorted(name for name in names if not _are_alike(ours.get(name), theirs.get(name), tolerance))
    if not changed:
        return ""
    return (
        f"the weights are the same, and the teacher behaves otherwise in {', '.join(changed)}: the scale of a LoRA, FreeU, an "
        "attention processor, the tokenizer, the scheduler or the like was switched"
    )


def _are_alike(ours: Any, theirs: Any, tolerance: float) -> bool:
    if not isinstance(ours, list) or not isinstance(theirs, list):
        return bool(ours == theirs)
    if len(ours) != len(theirs):
        return False
    one, other = np.array(ours), np.array(theirs)
    return bool(np.linalg.norm(one - other) <= tolerance * max(np.linalg.norm(one), np.linalg.norm(other)))


def shard_paths(folder: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """The shards that a manifest lists, in their order. Raises `TargetError` if one is not there."""
    paths = [folder / name for name in manifest["shards"]]
    for path in paths:
        if not path.is_file():
            raise TargetError(f"{path} is missing, though the manifest lists it; put it back, or extract into a new folder")
    return paths


def unlisted_shards(folder: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """Finished shards that a manifest does not list."""
    return sorted(path for path in folder.glob("data-*.parquet") if path.name not in manifest["shards"])
