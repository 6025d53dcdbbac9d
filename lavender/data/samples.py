"""Pictures with texts: what a sample is, and reading samples from disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import DEFAULT_QUESTION
from ..errors import ConfigError, DataError
from ..files import is_folder, is_url, parse_json, path_within, read_file
from .conversations import (
    CONTENT,
    PLACEHOLDER,
    Conversation,
    Message,
    Sample,
    as_conversation,
    content_id,
    id_of,
    is_conversation,
    require_answer,
    require_unicode,
    source_of,
    with_sound_regions,
    written_path,
)
from .folders import open_folder
from .pairs import BadPair, Pair
from .regions import Region
from .tables import TABLE_ENDINGS, Columns, folder_of, read_table

__all__ = [
    "PLACEHOLDER",
    "BadPair",
    "Conversation",
    "Message",
    "Pair",
    "Region",
    "Sample",
    "as_conversation",
    "read_pairs",
    "read_samples",
    "require_unicode",
]


def read_pairs(
    data: str | Path, *, split: str | None = "train", images: str | Path | None = None, captions: str = "first"
) -> list[Pair]:
    """Pictures with captions from a JSON file or from an image folder.

    Args:
        data: JSON lines, or a JSON list, of `{"image": path, "caption": text}` with an optional `"id"` (the image path is the id by
            default), where `"text"` serves as caption and `"file_name"` as image; or Karpathy's JSON of Flickr30k or COCO; or a
            CSV file or a folder of pictures, see `lavender.open_pairs`. What a file is shows in its content.
        split: of Karpathy's file and of a folder with splits, the pictures of this split; None takes all.
        images: the folder that image paths in a file are relative to, and that none may lead out of; by default the one that
            the file is in. Files and folders may be URLs that fsspec knows.
        captions: of Karpathy's file, the `"first"` caption of each picture, whose id is its file name, or `"all"` of them, with
            the ids `name#0`, `name#1`...

    Raises:
        ConfigError: `captions` is neither.
        DataError: the file or folder is missing or empty, an entry is no such object, a picture lies outside of the folder, the
            split is empty, or an id occurs twice.
    """
    path = str(data) if is_url(data) else Path(data)
    if is_folder(path):
        pairs = [_whole(path, entry) for entry in open_folder(path, split, Columns(), images, captions)]
    elif str(path).lower().endswith(TABLE_ENDINGS):
        entries_of_table = read_table(str(path), images or folder_of(str(path)), Columns(), captions)
        pairs = [_whole(path, entry) for entry in entries_of_table]
    else:
        folder, entries = _folder_of(path, images), _json(path)
        if isinstance(entries, dict):
            pairs = [Pair(*fields) for fields in _karpathy(path, entries, split, folder, captions)]
        else:
            pairs = [_pair_of(place, entry, folder) for place, entry in entries]
    _require_unique([pair.id for pair in pairs], path)
    return pairs


def read_samples(
    data: str | Path, *, split: str | None = "train", images: str | Path | None = None, captions: str = "first"
) -> list[Sample | Conversation]:
    """Training samples from a JSON file.

    Args:
        data: JSON lines, or a JSON list, whose entries are samples `{"image", "answer"}` with optional `"question"` and `"id"`
            (`"caption"` serves as answer), or conversations `{"id", "image", "conversations"}` as published and as LLaVA writes
            them, or with `"messages"`, or `"prompt"` and `"completion"` (see `as_conversation`; an image path serves as id, and
            pictures may lie in the file in base64), both maybe with `"regions"` (see `Region`); or Karpathy's JSON of Flickr30k or
            COCO, whose captions are answers to `DEFAULT_QUESTION`. What a file is shows in its content. Several entries about one
            picture that have no id have its path and a hash of what they say.
        split, images, captions: as `read_pairs` has them.

    Raises:
        ConfigError, DataError: as `read_pairs`.
    """
    path = str(data) if is_url(data) else Path(data)
    samples: list[Sample | Conversation]
    folder, entries = _folder_of(path, images), _json(path)
    if isinstance(entries, dict):
        samples = [
            Sample(sample_id, image, DEFAULT_QUESTION, caption)
            for sample_id, image, caption in _karpathy(path, entries, split, folder, captions)
        ]
    else:
        # An entry without the id that others have lacks it, as in a table.
        ids = {"id": None} if any(entry.get("id") is not None for _, entry in entries) else {}
        samples = [
            _conversation_of(place, ids | entry, folder) if is_conversation(entry) else _sample_of(place, entry, folder)
            for place, entry in entries
        ]
        samples = _told_apart(samples, [entry.get("id") is not None for _, entry in entries])
    _require_unique([sample.id for sample in samples], path)
    return samples


def _told_apart(samples: Sequence[Sample | Conversation], named: Sequence[bool]) -> list[Sample | Conversation]:
    """The samples of a file, which may ask several questions about a picture: those that have no id and whose picture's path calls
    others too are all called by what they say as well."""
    times = Counter(sample.id for sample in samples)
    apart: list[Sample | Conversation] = []
    for sample, is_named in zip(samples, named, strict=True):
        if not is_named and times[sample.id] > 1:
            conversation = as_conversation(sample)
            said: list[Any] = [[message.role, message.content] for message in conversation.messages]
            said += [region.record() for region in conversation.regions]
            digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()
            sample = replace(sample, id=f"{sample.id}#{digest[:16]}")
        apart.append(sample)
    return apart


def _folder_of(path: str | Path, images: str | Path | None) -> str | Path:
    """The folder that the image paths of a file are relative to, or its URL."""
    if images is None:
        return path.parent if isinstance(path, Path) else path.rpartition("/")[0]
    if is_url(images):
        return images
    if not Path(images).is_dir():
        raise DataError(f"there is no folder {images}; give the one that the image paths in {path} are relative to")
    return Path(images)


def _json(path: str | Path) -> list[tuple[str, dict[str, Any]]] | dict[str, Any]:
    """The entries of a JSON list or of JSON lines, each with its place for messages; or the one object of Karpathy's format."""
    try:
        text = read_file(path).decode("utf-8-sig").strip()
    except FileNotFoundError:
        raise DataError(f"there is no data at {path}; expected JSON lines, or a folder of pictures with captions") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; expected a file of JSON lines") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start})") from None
    values: list[tuple[str, Any]] = []
    if text.startswith("["):
        values = [(f"{path}, entry {n}", value) for n, value in enumerate(_parsed(text, path, 1), start=1)]
    else:
        karpathy = _karpathy_object(text)
        if karpathy is not None:
            return karpathy
        for n, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                values.append((f"{path}, line {n}", _parsed(line, path, n)))
    if not values:
        raise DataError(f"{path} is empty; expected JSON lines")
    for place, value in values:
        if not isinstance(value, dict):
            raise DataError(f'{place} is no JSON object; expected one like {{"image": ..., "caption": ...}}')
    return values


def _parsed(text: str, path: str | Path, line: int) -> Any:
    """The value of a JSON text that begins at a line of a file."""
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {line + error.lineno - 1} is no JSON ({error.msg})") from None
    except ValueError as error:  # numbers too long, lists too deep
        raise DataError(f"{path}, line {line} cannot be read as JSON ({error})") from None


def _karpathy_object(text: str) -> dict[str, Any] | None:
    """A JSON text's only object if it lists images and is no conversation."""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    alone = end == len(text) and isinstance(value, dict)
    lists_images = alone and isinstance(value.get("images"), list) and not {"messages", "conversations"} & value.keys()
    return value if lists_images else None


def _karpathy(
    path: str | Path, data: dict[str, Any], split: str | None, folder: str | Path, captions: str
) -> list[tuple[str, str | Path, str]]:
    """Id, picture and caption of every sample of Karpathy's format."""
    if captions not in ("first", "all"):
        raise ConfigError(f"captions is {captions!r}; choose first or all")
    samples: list[tuple[str, str | Path, str]] = []
    splits = set()
    for n, image in enumerate(data["images"], start=1):
        place = f"{path}, image {n}"
        name = image.get("filename") if isinstance(image, dict) else None
        if not isinstance(name, str) or not name:
            raise DataError(f"{place} is {str(image)[:80]}; expected an object with a file name under 'filename'")
        splits.add(str(image.get("split")))
        if split is not None and image.get("split") != split:
            continue
        sentences = image.get("sentences")
        texts: list[Any] = (
            [sentence.get("raw") if isinstance(sentence, dict) else None for sentence in sentences]
            if isinstance(sentences, list)
            else []
        )
        texts = texts[:1] if captions == "first" else texts
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f"{place} ({name}): no captions; expected texts under 'raw' in 'sentences'")
        source = _within(folder, os.path.join(str(image.get("filepath") or ""), name), place)
        for k, text in enumerate(texts):
            require_unicode(text, f"{place} ({name}): caption {k + 1}")
            sample_id = name if captions == "first" else f"{name}#{k}"
            samples.append((sample_id, source, text.strip()))
    if not samples:
        raise DataError(f"{path} has no pictures of the split {split!r}; its splits are {', '.join(sorted(splits)) or 'none'}")
    return samples


def _sample_of(place: str, entry: Mapping[str, Any], folder: str | Path) -> Sample:
    require_answer(entry, place)
    answer: Any = entry.get("caption") if entry.get("answer") is None else entry["answer"]
    question = entry.get("question", DEFAULT_QUESTION)
    for name, text in (("answer", answer), ("question", question)):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{place}: no {name}; expected a text under {name!r}")
        require_unicode(text, f"{place}: the {name}")
    image = _image_of(place, entry, folder)
    sample_id = _id_of(place, entry, image, [question, answer])
    has_id = entry.get("id") is not None or isinstance(image, str | Path)
    sample = Sample(sample_id, image, question, answer, has_id, entry.get("regions"))  # type: ignore[arg-type]  # made sound here
    try:
        return with_sound_regions(sample)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _conversation_of(place: str, entry: Mapping[str, Any], folder: str | Path) -> Conversation:
    for key in ("image", "images"):
        value = entry.get(key)
        names = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(name, str) and name for name in names):
            raise DataError(f"{place}: {key!r} is {str(value)[:80]}; expected a path or a list of paths")
    try:
        conversation = as_conversation(entry, lambda path: _within(folder, path, "its pictures"))
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    for image in conversation.images:
        if not isinstance(image, str | Path | bytes):
            raise DataError(f"{place}: a part holds the picture {str(image)[:80]}; expected a path or an encoded picture")
    # The path of a picture is what `lavender extract` calls it by.
    return replace(conversation, has_id=conversation.has_id or not conversation.id.startswith(CONTENT))


def _image_of(place: str, entry: Mapping[str, Any], folder: str | Path) -> str | Path | bytes:
    image = entry.get("image")
    if not isinstance(image, str) or not image:
        raise DataError(f"{place}: no image; expected a path under 'image'")
    try:
        source: str | Path | bytes = source_of(image, lambda path: _within(folder, path, "its picture"))
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    return source


def _within(folder: str | Path, name: str, place: str) -> str | Path:
    require_unicode(name, f"{place}: the path of the picture")
    return path_within(folder, name, place)


def _pair_of(place: str, entry: Mapping[str, Any], folder: str | Path) -> Pair:
    if "image" not in entry and "file_name" in entry:
        entry = {**entry, "image": entry["file_name"]}
    image = _image_of(place, entry, folder)
    caption = entry.get("caption", entry.get("text"))
    if not isinstance(caption, str):
        raise DataError(f"{place}: no caption; expected a text under 'caption'")
    return Pair(_id_of(place, entry, image, [caption]), image, caption)


def _whole(path: str | Path, entry: Pair | BadPair) -> Pair:
    if isinstance(entry, BadPair):
        raise DataError(f"{path}, {entry.id}: {entry.reason}")
    return entry


def _id_of(place: str, entry: Mapping[str, Any], image: str | Path | bytes, texts: Sequence[str]) -> str:
    """The id of an entry; without one the path of its picture as it is written, or a hash where it holds the picture itself."""
    if entry.get("id") is not None:
        return id_of(entry["id"], place)
    return written_path(entry["image"]) or content_id([image], texts)


def _require_unique(ids: Sequence[str], path: str | Path) -> None:
    seen: set[str] = set()
    for sample_id in ids:
        if sample_id in seen:
            raise DataError(f'{path} has the id {sample_id!r} twice; give each sample an "id" of its own')
        seen.add(sample_id)
