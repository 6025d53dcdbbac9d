"""A store's manifest: what its maps came from, how they are kept, which shards hold them, and what could not be used."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Normalization, Storage, check_fields, fingerprint, from_dict, to_dict
from ..errors import ConfigError, TargetError
from ..files import read_file
from .shards import Shard

FORMAT = "lavender-targets"
VERSION = 3
OLD_VERSION = 2
"""Manifests of this version have the keys `teacher` and `config`, a teacher's, in place of `source` and a store's `config`. Their
stores are read and continued, and keep their version and their fingerprint, which run folders recorded."""
NAMES = ("model", "model_commit", "source")
"""Entries of a source that only name it: they decide nothing about the maps."""
PROOFS = ("weights_as_loaded", "behavior", "continued_by")
"""Entries of a source that compare it with another: the digits that older stores know its weights by, and what it does; of a store
that was begun when stores did not keep that, what the teacher does that continued it.

Of a behavior, lists of numbers are the same up to the relative distance `tolerance`, other entries if they are equal; `digits` of a
source that its weights do not tell apart enter the fingerprint."""
LARGEST_TOLERANCE = 0.1
"""Of a behavior. Teachers differ by more, roundings in the coarsest dtype by less."""
_LARGEST_NUMBER = 1e30
"""Of a behavior: squares are added without an overflow."""
SHOWN = 60
"""Characters of a wrong value that an error shows."""
_JSON_NAMES = {dict: "a mapping", list: "a list", str: "a text", bool: "true or false"}
_SHA256 = re.compile("[0-9a-f]{64}")


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
    """The manifest of a store that holds nothing yet. `source` is plain JSON values.

    Raises `TargetError` if it cannot be compared with others.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "source": json.loads(json.dumps(dict(source))),
        "config": to_dict(config),
    }
    if problem := _source_problem(manifest["source"]):
        raise TargetError(f"{problem}; sources are told apart by that")
    digits = _fingerprint(manifest, manifest["source"].get("weights"))
    return {**manifest, "fingerprint": digits, "complete": False, "shards": {}, "failed": []}


def _fingerprint(manifest: Mapping[str, Any], weights: Any) -> str:
    # An extraction's fingerprint is that of version 2, so that a run folder knows a store that was extracted again.
    settings = {name: value for name, value in _identity(manifest).items() if name != "weights"}
    behavior = proven_source_of(manifest).get("behavior")
    switched = behavior.get("digits") if isinstance(behavior, dict) else None
    return fingerprint([weights, settings, *([switched] if switched else [])])


def earlier_fingerprint(manifest: Mapping[str, Any]) -> str:
    """The fingerprint by the digits that older stores know the weights by, which run folders may have recorded."""
    weights = proven_source_of(manifest).get("weights_as_loaded")
    return manifest["fingerprint"] if weights is None else _fingerprint(manifest, weights)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A store's manifest, all of whose entries are of their types and agree with each other.

    Raises `TargetError` if there is none, or if it is damaged or of another version.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(read_file(path), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise TargetError(
            f"{folder} is no target store: it has no manifest.json. `lavender extract --out {folder}` makes one"
        ) from None
    except OSError as error:
        raise TargetError(f"cannot read {path}: {error.strerror}; give the folder of a target store") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        format_read = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise TargetError(f"{path} says the format {_short(format_read)}; expected {FORMAT!r}. Give the folder of a target store")
    version = manifest.get("version")
    if type(version) is not int or version not in (OLD_VERSION, VERSION):
        raise TargetError(
            f"{path} says version {_short(version)}; this lavender reads the versions {OLD_VERSION} and {VERSION}: "
            "extract anew, into a new folder"
        )
    if problem := _problem(manifest):
        raise _damaged(path, problem)
    return manifest


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _damaged(path: Path, what: str) -> TargetError:
    return TargetError(f"{path} is damaged ({what}); restore it, or extract into a new folder")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _problem(manifest: dict[str, Any]) -> str:
    """What is wrong with a manifest of a known version; empty if nothing is."""
    source = "source" if manifest["version"] == VERSION else "teacher"
    kinds: dict[str, type] = {source: dict, "config": dict, "fingerprint": str, "complete": bool, "shards": dict, "failed": list}
    if missing := [key for key in kinds if key not in manifest]:
        return f"it lacks {', '.join(missing)}"
    if unknown := manifest.keys() - {"format", "version", *kinds}:
        return f"it has the unknown entry {_short(min(unknown))}"
    for key, kind in kinds.items():
        if not isinstance(manifest[key], kind):
            return f"{key} is {_short(manifest[key])}, expected {_JSON_NAMES[kind]}"
    try:
        config_of(manifest)
    except ConfigError as error:
        return f"its config: {error}"
    if problem := _source_problem(proven_source_of(manifest)):
        return problem
    if manifest["fingerprint"] != (digits := _fingerprint(manifest, source_of(manifest).get("weights"))):
        return f"its source and config have the fingerprint {digits}, and it says {_short(manifest['fingerprint'])}"
    for number, (name, listed) in enumerate(manifest["shards"].items()):
        if name != shard_name(number):
            return f"it lists a shard {_short(name)} where {shard_name(number)} is expected"
        if not isinstance(listed, dict) or listed.keys() != {"sha256", "samples"}:
            return f"of {name} it says {_short(listed)}, expected sha256 and samples"
        if not (isinstance(listed["sha256"], str) and _SHA256.fullmatch(listed["sha256"])):
            return f"the sha256 of {name} is {_short(listed['sha256'])}, expected 64 hexadecimal digits"
        if type(listed["samples"]) is not int or listed["samples"] < 1:
            return f"the samples of {name} are {_short(listed['samples'])}, expected their number"
    for entry in manifest["failed"]:
        if not (isinstance(entry, dict) and entry.keys() == {"id", "reason"} and all(isinstance(v, str) for v in entry.values())):
            return f"failed has {_short(entry)}, expected an id and a reason"
    return ""


def _source_problem(source: Mapping[str, Any]) -> str:
    """What is wrong with the entries by which a source is compared; empty if nothing is."""
    for name in ("weights", "weights_as_loaded"):
        if name in source and not isinstance(source[name], str):
            return f"the {name} of its source is {_short(source[name])}, expected a text"
    for name in ("behavior", "continued_by"):
        if name in source and (problem := _behavior_problem(source[name])):
            return f"the {name} of its source {problem}"
    return ""


def _behavior_problem(behavior: Any) -> str:
    if not isinstance(behavior, dict):
        return f"is {_short(behavior)}, expected a mapping"
    tolerance = behavior.get("tolerance")
    if type(tolerance) is not float or not 0 < tolerance <= LARGEST_TOLERANCE:
        return f"has the tolerance {_short(tolerance)}, expected a number above 0, up to {LARGEST_TOLERANCE}"
    for name, value in behavior.items():
        if name != "tolerance" and not (isinstance(value, str) or (isinstance(value, list) and all(map(_is_small, value)))):
            return f"has {_short(value)} for {_short(name)}, expected a text or a list of numbers below {_LARGEST_NUMBER:g}"
    return ""


def _is_small(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST_NUMBER


def source_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a store's maps came from."""
    return {name: value for name, value in proven_source_of(manifest).items() if name not in PROOFS}


def proven_source_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The same with `PROOFS`, which stores that were written before do not have."""
    if manifest["version"] == OLD_VERSION:
        return {**manifest["teacher"], **manifest["config"]}
    return dict(manifest["source"])


def known_behavior(source: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the teacher does that made a source's maps, of an older store those since then; None if nobody wrote it down."""
    return source.get("behavior") or source.get("continued_by")


def continue_by(manifest: Mapping[str, Any], behavior: Mapping[str, Any]) -> None:
    """Notes in the manifest of an older store what the teacher does that continues it; its fingerprint stays."""
    manifest["source" if manifest["version"] == VERSION else "teacher"]["continued_by"] = dict(behavior)


def config_of(manifest: Mapping[str, Any]) -> StoreConfig:
    """How a store keeps its maps. Raises `ConfigError` for settings that it cannot have."""
    config = manifest["config"]
    if manifest["version"] == OLD_VERSION:  # a teacher's, of which three are the store's
        known = {field.name for field in fields(StoreConfig)}
        config = {name: value for name, value in config.items() if name in known}
    return from_dict(StoreConfig, config)


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
    ours, theirs = known_behavior(there), known_behavior(now)
    if not ours or not theirs:
        return ""
    names = [name for name in ours.keys() | theirs.keys() if name not in ("digits", "tolerance")]
    tolerance = min(ours["tolerance"], theirs["tolerance"])
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
    one, other = np.array(ours, np.float64), np.array(theirs, np.float64)
    return bool(
        np.isfinite([*one, *other]).all()
        and np.linalg.norm(one - other) <= tolerance * max(np.linalg.norm(one), np.linalg.norm(other))
    )


def shard_name(number: int) -> str:
    return f"data-{number:05d}.parquet"


def shards_of(folder: Path, manifest: Mapping[str, Any]) -> list[Shard]:
    """The shards that a manifest lists, in their order. Raises `TargetError` if one is not there."""
    shards = [Shard(folder / name, listed["sha256"], listed["samples"]) for name, listed in manifest["shards"].items()]
    for shard in shards:
        if not shard.path.exists():
            raise TargetError(f"{shard.path} is missing, though the manifest lists it; put it back, or extract into a new folder")
    return shards


def unlisted_shards(folder: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """Finished shards that a manifest does not list."""
    return sorted(path for path in folder.glob("data-*.parquet") if path.name not in manifest["shards"])
