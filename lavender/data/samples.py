"""Pictures with texts: what a sample is, and reading samples from disk."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DEFAULT_QUESTION
from ..errors import ConfigError, DataError
from ..files import is_folder, is_url, path_within, read_file
from ..images import ImageSource


@dataclass(frozen=True, eq=False)
class Pair:
    """A picture and its caption, for `lavender.extract`."""

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
        content: what is said. `<image>`, with the line breaks beside it, stands for the next of the conversation's pictures.
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


PLACEHOLDER = "<image>"
"""What stands for a picture in a message."""
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
"""The names of roles in chat templates and in LLaVA's files."""


def as_conversation(sample: Sample | Conversation | Mapping[str, Any]) -> Conversation:
    """Whatever `lavender.Collator` takes as one sample, as a conversation that is sound and has a place for every picture.

    Args:
        sample: a sample, a conversation, or a mapping: with the fields of a `Sample`, or with `"id"`, `"image"` or `"images"`, and
            `"messages"` or `"conversations"`. Its messages are `{"role", "content"}`, where the content is a text or a list of
            parts `{"type": "image"}` and `{"type": "text", "text"}`, or LLaVA's `{"from": "human" or "gpt", "value"}`.

    Returns:
        The conversation; its pictures are in the order of their places.

    Raises:
        DataError: it is none of these, or it lacks something; the message names the sample.
    """
    if isinstance(sample, Conversation):
        conversation = sample
    elif isinstance(sample, Sample):
        conversation = _of_sample(sample)
    elif not isinstance(sample, Mapping):
        raise DataError(f"a sample is a {type(sample).__name__}; expected a Sample, a Conversation or a mapping")
    elif sample.get("messages") is not None or sample.get("conversations") is not None:
        conversation = _of_mapping(sample)
    else:
        missing = [name for name in Sample.__dataclass_fields__ if name not in sample]
        if missing:
            raise DataError(
                f"a sample lacks {', '.join(missing)}; it has {', '.join(map(str, sample))}. Give id, image, question and answer, "
                "or id, images and messages"
            )
        conversation = _of_sample(Sample(**{name: sample[name] for name in Sample.__dataclass_fields__}))
    _require_sound(conversation)
    return _place_images(conversation)


def _of_sample(sample: Sample) -> Conversation:
    for name, text in (("question", sample.question), ("answer", sample.answer)):
        if isinstance(text, str) and PLACEHOLDER in text:
            raise DataError(
                f"sample {sample.id!r}: the {name} holds {PLACEHOLDER!r}, which stands for the picture; the collator adds it"
            )
    return Conversation(str(sample.id), (sample.image,), (Message("user", sample.question), Message("assistant", sample.answer)))


def _of_mapping(sample: Mapping[str, Any]) -> Conversation:
    if sample.get("id") is None:
        raise DataError(f'a sample has no "id"; give each one of its own. It has {", ".join(map(str, sample))}')
    name = f"sample {sample['id']!r}"
    messages = sample["messages"] if sample.get("messages") is not None else sample["conversations"]
    if not isinstance(messages, list | tuple):
        raise DataError(f"{name}: its messages are a {type(messages).__name__}; expected a list")
    if sample.get("image") is not None and sample.get("images") is not None:
        raise DataError(f'{name} has both "image" and "images"; give one of them')
    images = sample["images"] if sample.get("images") is not None else sample.get("image")
    if images is None:
        images = ()
    elif not isinstance(images, list | tuple):
        images = (images,)
    turns = tuple(_message_of(message, f"{name}, message {n}") for n, message in enumerate(messages, start=1))
    return Conversation(str(sample["id"]), tuple(images), turns)


def _message_of(message: Any, name: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(
            f'{name} is a {type(message).__name__}; expected a mapping with "role" and "content", or "from" and "value"'
        )
    role, content = (
        message.get(a) if message.get(a) is not None else message.get(b) for a, b in (("role", "from"), ("content", "value"))
    )
    if isinstance(content, list | tuple):
        content = "".join(_part_of(part, name) for part in content)
    return Message(_ROLES.get(str(role), str(role)), content)  # type: ignore[arg-type]  # see _require_sound


def _part_of(part: Any, name: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        # A table of parts has a column for the text of all.
        sources = [key for key, value in part.items() if key not in ("type", "text") and value is not None]
        if sources:
            raise DataError(f'{name}: a part holds a picture under {sources[0]!r}; pictures go into "images", a part marks a place')
        return PLACEHOLDER
    text = part.get("text") if kind == "text" else None
    if not isinstance(text, str):
        raise DataError(f'{name} has a part {part!r}; expected {{"type": "image"}} or {{"type": "text", "text": ...}}')
    if PLACEHOLDER in text:
        raise DataError(f'{name}: a text holds {PLACEHOLDER!r}, which stands for a picture; give a part {{"type": "image"}}')
    return text


def _require_sound(conversation: Conversation) -> None:
    name = f"sample {conversation.id!r}"
    for n, message in enumerate(conversation.messages, start=1):
        where = f"{name}, message {n}"
        if message.role not in ("system", "user", "assistant"):
            raise DataError(f"{where} has the role {message.role!r}; expected system, user or assistant (human or gpt with LLaVA)")
        if not isinstance(message.content, str):
            raise DataError(f"{where} says a {type(message.content).__name__}; expected a text")
        require_unicode(message.content, f"{where} of the {message.role}")
        if message.role == "assistant" and not message.content.strip():
            raise DataError(f"{name} has an empty answer; every message of the assistant needs a text")
        if message.role == "assistant" and PLACEHOLDER in message.content:
            raise DataError(
                f"{where}: the answer holds {PLACEHOLDER!r}, which stands for a picture; the student answers with text, put "
                "pictures into messages of the user"
            )
    if not any(message.role == "assistant" for message in conversation.messages):
        raise DataError(f"{name} has no message of the assistant; the student has nothing to learn from it")
    if conversation.messages[0].role == "assistant":
        raise DataError(f"{name} begins with a message of the assistant; expected one of the user or the system before it")


def _place_images(conversation: Conversation) -> Conversation:
    """The conversation with a place for every picture, and its pictures in the order of their places."""
    messages, images = list(conversation.messages), conversation.images
    counts = [message.content.count(PLACEHOLDER) for message in messages]
    placed = sum(counts)
    if placed > len(images):
        raise DataError(
            f"sample {conversation.id!r} has {placed} times {PLACEHOLDER!r} but {len(images)} pictures; give one for each of them"
        )
    if placed == len(images):
        return conversation
    first = next((n for n, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        raise DataError(
            f"sample {conversation.id!r} has {len(images)} pictures but no message of the user; they stand in what the user says"
        )
    before = sum(counts[:first])
    messages[first] = Message("user", PLACEHOLDER * (len(images) - placed) + messages[first].content)
    return Conversation(conversation.id, (*images[:before], *images[placed:], *images[before:placed]), tuple(messages))


def read_pairs(
    data: str | Path, *, split: str | None = "train", images: str | Path | None = None, captions: str = "first"
) -> list[Pair]:
    """Pictures with captions from a JSON file or from an image folder.

    Args:
        data: JSON lines, or a JSON list, of `{"image": path, "caption": text}` with an optional `"id"` (the image path is the id by
            default); or Karpathy's JSON of Flickr30k or COCO; or a folder in the `imagefolder` layout of `datasets` with captions
            in its `metadata.csv` or `metadata.jsonl` under `caption` or `text`. What a file is shows in its content.
        split: of Karpathy's file, the pictures of this split; None takes all.
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
        pairs = _pairs_of_folder(path)
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
            them (see `as_conversation`; an image path serves as id); or Karpathy's JSON of Flickr30k or COCO, whose captions are
            answers to `DEFAULT_QUESTION`. What a file is shows in its content.
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
        samples = [
            _sample_of(place, entry, folder)
            if entry.get("conversations") is None and entry.get("messages") is None
            else _conversation_of(place, entry, folder)
            for place, entry in entries
        ]
    _require_unique([sample.id for sample in samples], path)
    return samples


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
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {line + error.lineno - 1} is no JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # numbers too long, lists too deep
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
    answer: Any = entry.get("caption") if entry.get("answer") is None else entry["answer"]
    question = entry.get("question", DEFAULT_QUESTION)
    for name, text in (("answer", answer), ("question", question)):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{place}: no {name}; expected a text under {name!r}")
        require_unicode(text, f"{place}: the {name}")
    image = _image_of(place, entry, folder)
    return Sample(_id_of(entry), image, question, answer)


def _conversation_of(place: str, entry: Mapping[str, Any], folder: str | Path) -> Conversation:
    sample: dict[str, Any] = dict(entry)
    for key in ("image", "images"):
        if entry.get(key) is None:
            continue
        names = entry[key] if isinstance(entry[key], list) else [entry[key]]
        if not all(isinstance(name, str) and name for name in names):
            raise DataError(f"{place}: {key!r} is {str(entry[key])[:80]}; expected a path or a list of paths")
        sample[key] = [_within(folder, name, place) for name in names]
        if sample.get("id") is None and names:
            sample["id"] = names[0]
    try:
        return as_conversation(sample)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _image_of(place: str, entry: Mapping[str, Any], folder: str | Path) -> str | Path:
    image = entry.get("image")
    if not isinstance(image, str) or not image:
        raise DataError(f"{place}: no image; expected a path under 'image'")
    return _within(folder, image, place)


def _within(folder: str | Path, name: str, place: str) -> str | Path:
    require_unicode(name, f"{place}: the path of the picture")
    return path_within(folder, name, place)


def _pair_of(place: str, entry: Mapping[str, Any], folder: str | Path) -> Pair:
    image = _image_of(place, entry, folder)
    caption = entry.get("caption", entry.get("text"))
    if not isinstance(caption, str):
        raise DataError(f"{place}: no caption; expected a text under 'caption'")
    return Pair(_id_of(entry), image, caption)


def _id_of(entry: Mapping[str, Any]) -> str:
    return str(entry["image"] if entry.get("id") is None else entry["id"])


def require_unicode(text: str, name: str) -> None:
    """JSON may hold half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{name} is no valid Unicode ({error.reason}, at character {error.start})") from None


def _pairs_of_folder(path: str | Path) -> list[Pair]:
    if isinstance(path, str):
        return _pairs_of_metadata(path.rstrip("/"))
    from datasets import Image as ImageFeature
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        dataset = load_dataset("imagefolder", data_dir=str(path), split="train")
    except (FileNotFoundError, ValueError, DatasetGenerationError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]  # what datasets raises while it reads says nothing in itself
        raise DataError(f"{path} is no folder of pictures in the imagefolder layout ({cause})") from None
    column = next((name for name in ("caption", "text") if name in dataset.column_names), None)
    if column is None:
        raise DataError(f"{path} has no captions; expected a metadata.jsonl with 'file_name' and 'caption' in it")
    pairs = []
    for row in dataset.cast_column("image", ImageFeature(decode=False)):
        file, caption = row["image"]["path"], row[column] or ""
        name = os.path.relpath(file, os.path.abspath(path))
        if not isinstance(caption, str):
            raise DataError(f"{path}: the caption of {name} is {caption!r}; expected a text")
        pairs.append(Pair(name, row["image"]["bytes"] or path_within(path, name, f"{path}, the entry {name}"), caption))
    return pairs


def _pairs_of_metadata(folder: str) -> list[Pair]:
    """The imagefolder layout at a URL, where `datasets` does not read it."""
    try:
        table = io.StringIO(read_file(f"{folder}/metadata.csv").decode("utf-8-sig"))
        entries: Any = [(f"{folder}/metadata.csv, row {n}", row) for n, row in enumerate(csv.DictReader(table), start=1)]
    except FileNotFoundError:
        entries = _json(f"{folder}/metadata.jsonl")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {folder}/metadata.csv: {error}") from None
    if isinstance(entries, dict):
        raise DataError(f"{folder}/metadata.jsonl is no list; expected lines with 'file_name' and 'caption'")
    return [_pair_of(place, {**entry, "image": entry.get("file_name"), "id": None}, folder) for place, entry in entries]


def _require_unique(ids: Sequence[str], path: str | Path) -> None:
    seen: set[str] = set()
    for sample_id in ids:
        if sample_id in seen:
            raise DataError(f'{path} has the id {sample_id!r} twice; give each sample an "id" of its own')
        seen.add(sample_id)
