"""What a run's folder says of it: `run.json`, with every setting, the data and the targets, and which runs may go on by it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..batches.outcomes import Unusable
from ..config import AlignmentConfig, to_dict
from ..data.samples import Conversation, Sample
from ..errors import DataError, TargetError
from ..files import own_path, read_json, write_within
from ..images import Picture
from ..students.patch import ALIGNER_FILE
from .checkpoints import ASIDE

if TYPE_CHECKING:  # a run without targets needs no pyarrow
    from ..targets.store import TargetStore

HEADS_FILE = "heads.json"
"""Where a run keeps the scores of layers and heads, and which it chose."""
EARLIER: dict[str, dict[str, Any]] = {
    "alignment": {"heads": "mean", "question_rows": "reads", "question_layers": None, "question_heads": None, "until": 1.0},
    "words": {"roles": ["answer"]},
}
"""Settings that runs of older versions do not know, with the values that these had; they had no words of questions."""


def has_known_picture(sample: Sample | Conversation, targets: TargetStore) -> bool:
    images = (sample.image,) if isinstance(sample, Sample) else sample.images
    try:
        return any(targets.of_pictures([Picture.open(image).sha256], ()) for image in images)
    except DataError:  # the collator names it
        return False


def begin(
    out: Path,
    record: dict[str, Any],
    samples: Sequence[Sample | Conversation | Unusable],
    targets: TargetStore | None,
    writes: bool,
) -> bool:
    """Writes `run.json`, or compares it with the run that `out` holds already; whether that one is finished.

    Raises:
        TargetError: the folder holds a run of other settings, or one whose words an older version compared otherwise.
        DataError: its record is damaged, or something else is in its place.
    """
    path = out / "run.json"
    require_folder(out)
    finished = (out / "history.json").exists()
    if not finished:
        _require_no_links(out)
    if is_begun(out):
        try:
            present = read_json(path)
            if not isinstance(present, dict):
                raise ValueError("it is no JSON object")
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}); give --out a new folder") from None
        # Runs of older versions do not know their commits.
        present = {"model_commit": record["model_commit"], "adapter_commit": record["adapter_commit"]} | present
        # Nor the digits that a teacher's weights have now, wherever they lie.
        if targets is not None and present.get("targets_fingerprint") == [targets.earlier_fingerprint, targets.contents()]:
            present["targets_fingerprint"] = record["targets_fingerprint"]
        words = present.get("words")
        if targets is not None and not finished and isinstance(words, dict) and "roles" not in words:
            _require_same_words(out, samples, targets)
        for name, settings in EARLIER.items():
            if isinstance(present.get(name), dict) and record[name]:
                present[name] = {key: value for key, value in settings.items() if key in record[name]} | present[name]
        changed = [key for key in record if present.get(key) != record[key]]
        if changed:
            raise TargetError(
                f"{out} holds a run with another {', '.join(changed)}; give a new folder, or the settings of that run (see {path})"
            )
        return finished
    if writes:
        out.mkdir(parents=True, exist_ok=True)
        if _chosen(out) != record["alignment"]:  # of a run that was never begun
            (out / HEADS_FILE).unlink(missing_ok=True)
        write_within(out, path.name, json.dumps(record, indent=2) + "\n")
    return False


def require_folder(out: Path) -> None:
    """Raises `DataError` if a run's folder is something else."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; give --out a folder")
    if model := next((name for name in ("config.json", "model_index.json", "adapter_config.json") if (out / name).exists()), None):
        raise DataError(f"{out} holds a model (its {model}); give --out a folder of its own")


def is_begun(out: Path) -> bool:
    """Whether a folder holds a run that goes on: one that wrote no checkpoint may be begun anew with other settings."""
    has_results = (out / "history.json").exists() or any((out / "checkpoints").glob("checkpoint-*"))
    return (out / "run.json").exists() and has_results


def began_with(out: Path, alignment: AlignmentConfig) -> bool:
    """Whether a folder holds a run of this alignment."""
    try:
        present = read_json(out / "run.json")["alignment"] if is_begun(out) else None
        return present is not None and EARLIER["alignment"] | present == to_dict(alignment)
    except (OSError, ValueError, KeyError, TypeError):  # `begin` says so
        return False


def _chosen(out: Path) -> Any:
    """The alignment that `heads.json` is of."""
    try:
        return read_json(out / HEADS_FILE)["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _require_same_words(out: Path, samples: Sequence[Sample | Conversation | Unusable], targets: TargetStore) -> None:
    """Raises `TargetError` if a run of a version that knew no roles, which compared one answer and found targets by id alone, would
    go on with other words."""
    for sample in samples:
        if isinstance(sample, Unusable):
            continue
        messages = () if isinstance(sample, Sample) else sample.messages
        if sum(message.role == "assistant" and message.is_learned for message in messages) > 1:
            why = "has several answers, of which it compared one"
        elif sample.id not in targets and has_known_picture(sample, targets):
            why = "has targets by its picture, which it did not find"
        else:
            continue
        raise TargetError(
            f"{out} holds a run that an older version began, and sample {sample.id!r} {why}: the rest would be another training; "
            "give a new folder"
        )


def _require_no_links(out: Path) -> None:
    """Raises `DataError` for a link among what a run writes: transformers and PEFT would write through it."""
    kept = [out / name for name in ("adapter", "model", "checkpoints", ASIDE, "first_stage")]
    for path in (*kept, out / ALIGNER_FILE, out / HEADS_FILE, *chain.from_iterable(folder.rglob("*") for folder in kept[:4])):
        own_path(out, str(path.relative_to(out)))
