"""Pictures with texts: what a sample is, and reading samples from disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import DEFAULT_QUESTION
from .errors import DataError
from .images import ImageSource


@dataclass(frozen=True, eq=False)
class Pair:
    """A picture and its caption, for `lavender.extract`. `image` is a path, encoded bytes or a PIL image."""

    id: str
    image: ImageSource
    caption: str


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture, what the user asks and what the student shall answer, for `lavender.Collator`."""

    id: str
    image: ImageSource
    question: str
    answer: str


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: `"system"`, `"user"` or `"assistant"`.
        content: what is said. `<image>` stands for the next of the conversation's pictures.
    """

    role: str
    content: str


@dataclass(frozen=True, eq=False)
class Conversation:
    """Pictures and what is said about them, for `lavender.Collator`. The student learns what the assistant says.

    Pictures that no message has a place for come before the first user's text.
    """

    id: str
    images: tuple[ImageSource, ...]
    messages: tuple[Message, ...]


def read_pairs(data: str | Path) -> list[Pair]:
    """Pictures with captions from JSON lines or from an image folder.

    Args:
        data: a `.jsonl` file whose lines are `{"image": path, "caption": text}` with an optional `"id"` (paths are relative to
            the file; the image path is the id by default), or a folder in the `imagefolder` layout of `datasets` with captions
            in its `metadata.csv` or `metadata.jsonl` under `caption` or `text`.

    Raises:
        DataError: the file or folder is missing or empty, a line is no such object, or an id occurs twice.
    """
    path = Path(data)
    pairs = _pairs_of_folder(path) if path.is_dir() else [_pair_of(path, n, line) for n, line in _json_lines(path)]
    _require_unique([pair.id for pair in pairs], path)
    return pairs


def read_samples(data: str | Path) -> list[Sample]:
    """Training samples from JSON lines `{"image", "answer"}` with optional `"question"` and `"id"`; `"caption"` serves as answer.

    Raises:
        DataError: as `read_pairs`.
    """
    path = Path(data)
    samples = []
    for number, line in _json_lines(path):
        answer: Any = line.get("caption") if line.get("answer") is None else line["answer"]
        question = line.get("question", DEFAULT_QUESTION)
        for name, text in (("answer", answer), ("question", question)):
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{path}, line {number}: no {name}; expected a text under {name!r}")
            require_unicode(text, f"{path}, line {number}: the {name}")
        image = _image_of(path, number, line)
        samples.append(Sample(_id_of(line), image, question, answer))
    _require_unique([sample.id for sample in samples], path)
    return samples


def _json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    if not path.exists():
        raise DataError(f"there is no data at {path}; expected JSON lines, or a folder of pictures with captions")
    if path.is_dir():
        raise DataError(f"{path} is a folder; expected a file of JSON lines")
    lines = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start})") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is no JSON ({error.msg})") from None
        if not isinstance(values, dict):
            raise DataError(f'{path}, line {number} is no JSON object; expected one like {{"image": ..., "caption": ...}}')
        lines.append((number, values))
    if not lines:
        raise DataError(f"{path} is empty; expected JSON lines")
    return lines


def _image_of(path: Path, number: int, line: Mapping[str, Any]) -> Path:
    image = line.get("image")
    if not isinstance(image, str) or not image:
        raise DataError(f"{path}, line {number}: no image; expected a path under 'image'")
    return path.parent / image


def _pair_of(path: Path, number: int, line: Mapping[str, Any]) -> Pair:
    image = _image_of(path, number, line)
    caption = line.get("caption", line.get("text"))
    if not isinstance(caption, str):
        raise DataError(f"{path}, line {number}: no caption; expected a text under 'caption'")
    return Pair(_id_of(line), image, caption)


def _id_of(line: Mapping[str, Any]) -> str:
    return str(line["image"] if line.get("id") is None else line["id"])


def require_unicode(text: str, name: str) -> None:
    """JSON may hold half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{name} is no valid Unicode ({error.reason}, at character {error.start})") from None


def _pairs_of_folder(path: Path) -> list[Pair]:
    from datasets import Image as ImageFeature
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        dataset = load_dataset("imagefolder", data_dir=str(path), split="train")
    except (FileNotFoundError, ValueError, DatasetGenerationError) as error:
        raise DataError(f"{path} is no folder of pictures in the imagefolder layout ({str(error).splitlines()[0]})") from None
    column = next((name for name in ("caption", "text") if name in dataset.column_names), None)
    if column is None:
        raise DataError(f"{path} has no captions; expected a metadata.jsonl with 'file_name' and 'caption' in it")
    pairs = []
    for row in dataset.cast_column("image", ImageFeature(decode=False)):
        file, caption = row["image"]["path"], row[column] or ""
        name = os.path.relpath(file, os.path.abspath(path))
        if not isinstance(caption, str):
            raise DataError(f"{path}: the caption of {name} is {caption!r}; expected a text")
        pairs.append(Pair(name, row["image"]["bytes"] or Path(file), caption))
    return pairs


def _require_unique(ids: Sequence[str], path: Path) -> None:
    seen: set[str] = set()
    for sample_id in ids:
        if sample_id in seen:
            raise DataError(f'{path} has the id {sample_id!r} twice; give each sample an "id" of its own')
        seen.add(sample_id)
