"""Samples of every form that a user has, as conversations: pictures, and what is said about them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

from ..errors import DataError
from ..images import ImageSource, file_sha256, image_sha256, load_image, picture_in, with_file_paths
from .regions import Region, regions_of


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture, what the user asks and what the student shall answer, for `lavender.Collator`; `id`, `has_id` and `regions` as in
    `Conversation`: the question is turn 0, the answer turn 1."""

    id: str
    image: ImageSource
    question: str
    answer: str
    has_id: bool = True
    regions: tuple[Region, ...] = ()


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: `"system"`, `"user"` or `"assistant"`.
        content: what is said. `<image>`, with the line breaks beside it, stands for the next of the conversation's pictures.
        parts: the texts that the content consists of, to the letter, with `<image>` for every picture between them, where it was
            given in parts; empty otherwise.
        is_learned: whether the student learns to say it, if it is the assistant's.
    """

    role: str
    content: str
    parts: tuple[str, ...] = ()
    is_learned: bool = True


@dataclass(frozen=True, eq=False)
class Conversation:
    """Pictures and what is said about them, for `lavender.Collator`. The student learns what the assistant says.

    Pictures that no message has a place for come before the first user's text.

    Attributes:
        id: the sample's; its targets have the same.
        images: its pictures, in the order of their places.
        messages: what is said.
        has_id: whether the id was given, by itself or as a picture's path in a file. One that was not is made from the sample.
        regions: where spans of the messages lie in the picture.
    """

    id: str
    images: tuple[ImageSource, ...]
    messages: tuple[Message, ...]
    has_id: bool = True
    regions: tuple[Region, ...] = ()


PLACEHOLDER = "<image>"
"""What stands for a picture in a message."""
_THINKING_ENDS = ("</think>", "<channel|>")
"""What closes the thinking in a message of Qwen, DeepSeek, GLM and Nemotron, and of Gemma. Their templates look for it too."""
CONTENT = "sha256:"
"""What the id of a sample begins with that is called by its content."""
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
"""The names of roles in chat templates and in LLaVA's files."""
_SOURCES = ("image", "url", "path", "base64", "image_url")
"""Under which a part holds its picture, in transformers and with OpenAI."""
_MESSAGE_KEYS = ("role", "from", "content", "value", "parts", "is_learned")
_UNREAD = ("tools", "system", "chat_template_kwargs", "video", "videos", "audio", "audios")
"""What would change a sample's text or add to its pictures, and is not read."""

SampleT = TypeVar("SampleT", bound=Sample | Conversation)
_Held = tuple[str, Any]
"""A picture that a part of a message holds, and under which key."""
Locate = Callable[[str], str | Path]
"""Where the picture lies that a data set gives by this path or URL."""


def as_conversation(sample: Sample | Conversation | Mapping[str, Any], locate: Locate = lambda path: path) -> Conversation:
    """Whatever `lavender.Collator` takes as one sample, as a conversation that is sound and has a place for every picture.

    A mapping has one of these forms. A value that is None counts as missing, since a table has every column in every row.

    - `"image"`, `"question"` and `"answer"`, as a `Sample`;
    - `"messages"` or `"conversations"`, with `"image"` or `"images"` where messages do not hold the pictures. Messages are
      `{"role", "content"}` or LLaVA's `{"from": "human" or "gpt", "value"}`; the content is a text, in which `<image>` stands for
      the next of the images, or a list of parts: `{"type": "text", "text"}`, `{"type": "image"}` for the next of the images,
      `{"type": "image"}` with the picture itself under `"image"`, `"url"`, `"path"` or `"base64"`, and OpenAI's
      `{"type": "image_url", "image_url": {"url"}}`. Texts of a user's or system's parts reach the chat template one by one and
      unchanged; an answer's are one text;
    - TRL's `"prompt"` and `"completion"`, lists of messages or texts, with `"image"` or `"images"`. The student learns the
      completion alone. Texts become a question and its answer in the student's chat template.

    A mapping may have `"regions"` beside them, a list of `lavender.data.Region`s or of mappings of their fields.

    A picture is a path, a URL (`http` and `https` are fetched whenever the sample is used, `file` is a path), a data URI, base64
    of an encoded picture, encoded bytes, a PIL image, or the mapping of `"bytes"` and `"path"` that `datasets` makes.

    A sample without `"id"` is called by the path of its first picture as it is written, as `lavender extract` calls it, else by a
    hash of its pictures and texts.

    Args:
        sample: a sample, a conversation, or a mapping.
        locate: where a picture lies that is given by a path or URL.

    Returns:
        The conversation; its pictures are in the order of their places.

    Raises:
        DataError: it is none of these, it lacks something, or it has something that is not read and would change its meaning, such
            as calls of tools; the message names the sample.
    """
    if isinstance(sample, Conversation):
        conversation = _of_conversation(sample)
    elif isinstance(sample, Sample):
        conversation = _of_sample(vars(sample), locate)
    elif not isinstance(sample, Mapping):
        raise DataError(f"a sample is a {type(sample).__name__}; expected a Sample, a Conversation or a mapping")
    elif is_conversation(sample):
        conversation = _of_mapping(sample, locate)
    else:
        require_answer(sample, _name_of(sample))
        missing = [name for name in ("image", "question", "answer") if name not in sample]
        if missing:
            raise DataError(
                f"a sample lacks {', '.join(missing)}; it has {', '.join(map(str, sample))}. Give id, image, question and answer, "
                "or id, images and messages"
            )
        conversation = _of_sample(sample, locate)
    _require_sound(conversation)
    return _place_images(replace(conversation, regions=sound_regions(conversation)))


def is_conversation(sample: Mapping[str, Any]) -> bool:
    """Whether a mapping is more than a picture with a question and an answer."""
    return any(sample.get(key) is not None for key in ("messages", "conversations", "completion", "chosen", "rejected"))


def require_answer(sample: Mapping[str, Any], name: str) -> None:
    """Raises `DataError` for forms of data in which the answer cannot be told from the rest."""
    if any(sample.get(key) is not None for key in ("answer", "caption")):
        return
    if sample.get("text") is not None:
        raise DataError(
            f'{name} has a "text" and no answer, and in one text no answer can be told from a question; give messages, a prompt '
            "and a completion, or a question and an answer"
        )
    if sample.get("prompt") is not None:
        raise DataError(f'{name} has a "prompt" and no "completion"; give both')


def without_thinking(message: str) -> str:
    """What a message says after its thinking (`<think>...</think>`); a message without thinking is the same."""
    ends = [message.rfind(mark) + len(mark) for mark in _THINKING_ENDS if mark in message]
    return message[max(ends) :].strip() if ends else message


def with_sound_regions(sample: SampleT) -> SampleT:
    """A sample whose regions are `sound_regions`."""
    if isinstance(sample, Sample):
        turns = (Message("user", sample.question), Message("assistant", sample.answer))
        told = Conversation(sample.id, (sample.image,), turns, regions=sample.regions)
    else:
        told = sample
    return replace(sample, regions=sound_regions(told))


def sound_regions(conversation: Conversation) -> tuple[Region, ...]:
    """A conversation's regions, whose turns are counted from 0. Raises `DataError` for one that is no span of what is said, or that
    lies in no picture of the conversation."""
    name = f"sample {conversation.id!r}"
    return tuple(
        _sound_region(region, conversation, f"{name}, region {n}")
        for n, region in enumerate(regions_of(conversation.regions, name), start=1)
    )


def _sound_region(region: Region, conversation: Conversation, name: str) -> Region:
    turn, start, end = _turn_of(region, conversation.messages, name), region.start, region.end
    message = conversation.messages[turn]
    role = {"user": "question", "assistant": "answer"}.get(message.role)
    if role is None:
        raise DataError(f"{name} is of a message of the {message.role}; expected one of the user or the assistant")
    if region.role == "prompt end" and (role != "answer" or not message.is_learned or start is not None or end is not None):
        raise DataError(
            f'{name}: "prompt end" is the last token before an answer that is learned; give the turn of one, without start and end'
        )
    if region.role not in (None, "prompt end", role):
        raise DataError(f"{name} has the role {region.role!r}, and its message is of the {message.role}; leave the role out")
    said = without_thinking(message.content) if role == "answer" else message.content
    begins = message.content.rindex(said)
    if (start is None) != (end is None) or (start is not None and end is not None and not 0 <= start < end <= len(message.content)):
        raise _no_span(region, len(message.content), name)
    if start is not None and start < begins:
        raise DataError(f"{name} is a part of the answer's thinking, which ends at character {begins}; give what is said behind it")
    if not message.content[start or begins : end].replace(PLACEHOLDER, "").strip():
        raise DataError(f"{name} has no text in it, but white space or a picture; give characters of words")
    if region.image is not None and not 0 <= region.image < len(conversation.images):
        raise DataError(f"{name} lies in image {region.image}; the sample has {len(conversation.images)}, counted from 0")
    if region.image is None and region.is_place and len(conversation.images) != 1:
        raise DataError(
            f"{name} does not say in which of {len(conversation.images)} pictures it lies; give its number as image, counted from "
            "0 in the order of the conversation"
        )
    return replace(region, turn=turn)


def _turn_of(region: Region, messages: Sequence[Message], name: str) -> int:
    if not -len(messages) <= region.turn < len(messages):
        raise DataError(f"{name} is of turn {region.turn}; the sample has {len(messages)} messages, counted from 0")
    return region.turn % len(messages)


def _no_span(region: Region, length: int, name: str) -> DataError:
    return DataError(
        f"{name} has the characters {region.start} to {region.end} of a text of {length}; expected start < end in it, or neither"
    )


def _in_content(region: Region, turns: Sequence[Message], name: str) -> Region:
    """A region of a message that came as a list of parts: characters of its texts become those of its content, where pictures are
    too."""
    turn = turns[_turn_of(region, turns, name)]
    if region.start is None or region.end is None or PLACEHOLDER not in turn.parts:
        return region
    places: list[int] = []
    begin = 0
    for part in turn.parts:
        places += range(begin, begin + len(part) * (part != PLACEHOLDER))
        begin += len(part)
    if not 0 <= region.start < region.end <= len(places):
        raise _no_span(region, len(places), name)
    return replace(region, start=places[region.start], end=places[region.end - 1] + 1)


def parts_of(message: Message) -> tuple[str, ...]:
    """The texts and pictures of a message as chat templates take them, one at least; `<image>` stands for a picture.

    In a content that was given as one text, line breaks beside a picture are the template's affair: LLaVA's files have them.
    """
    if message.parts:
        return message.parts
    parts: list[str] = []
    texts = message.content.split(PLACEHOLDER)
    for n, text in enumerate(texts):
        if n:
            parts.append(PLACEHOLDER)
            text = text.lstrip("\n")
        if n < len(texts) - 1:
            text = text.rstrip("\n")
        if text:
            parts.append(text)
    return tuple(parts) or ("",)


def id_of(value: Any, name: str) -> str:
    """An id as text. Raises `DataError` if it is neither a text nor a whole number."""
    if isinstance(value, bool) or not isinstance(value, str | Integral):
        raise DataError(f"{name}: the id is a {type(value).__name__}; expected a text or a whole number")
    return str(value)


def written_path(picture: Any) -> str | None:
    """The path or URL that a data set gives for a picture; None where it has the picture itself."""
    if isinstance(picture, Mapping):
        picture = picture.get("path")
    if isinstance(picture, Path):
        return str(picture)
    return picture if isinstance(picture, str) and picture and picture_in(picture) is None else None


def source_of(picture: Any, locate: Locate) -> Any:
    """A picture as data sets give it, as what `lavender.images` reads; what is no picture stays, and is refused there."""
    if isinstance(picture, Mapping):
        encoded, path = picture.get("bytes"), written_path(picture)
        if encoded is not None:
            return encoded
        if path is None:
            raise DataError(f"a picture has {', '.join(map(str, picture))}; expected bytes or a path")
        picture = path
    if not isinstance(picture, str):
        return picture
    encoded = picture_in(picture)
    return locate(with_file_paths(picture)) if encoded is None else encoded


def content_id(images: Sequence[Any], texts: Sequence[Any]) -> str:
    """A name that the same pictures and texts have in every run. Raises `DataError` if a picture cannot be read."""
    pictures = [
        str(image) if isinstance(image, str | Path) else file_sha256(image) or image_sha256(load_image(image)) for image in images
    ]
    return f"{CONTENT}{hashlib.sha256(json.dumps([pictures, texts], default=str).encode()).hexdigest()[:32]}"


def require_unicode(text: str, name: str) -> None:
    """JSON may hold half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{name} is no valid Unicode ({error.reason}, at character {error.start})") from None


def _name_of(sample: Mapping[str, Any]) -> str:
    if sample.get("id") is not None:
        return f"sample {sample['id']!r}"
    path = written_path(sample.get("image"))
    return "a sample without an id" if path is None else f"the sample of {path}"


def _of_conversation(sample: Conversation) -> Conversation:
    name = f"sample {sample.id!r}"
    for what, values in (("images", sample.images), ("messages", sample.messages)):
        if not isinstance(values, list | tuple):
            raise DataError(f"{name}: its {what} are a {type(values).__name__}; expected a tuple")
    for n, message in enumerate(sample.messages, start=1):
        if not isinstance(message, Message):
            raise DataError(f"{name}, message {n} is a {type(message).__name__}; expected a Message")
    images = tuple(source_of(image, lambda path: path) for image in sample.images)
    return replace(sample, id=id_of(sample.id, "a sample"), images=images, messages=tuple(sample.messages))


def _of_sample(sample: Mapping[str, Any], locate: Locate) -> Conversation:
    name = _name_of(sample)
    for key in ("question", "answer"):
        text = sample[key]
        if isinstance(text, str) and PLACEHOLDER in text:
            raise DataError(f"{name}: the {key} holds {PLACEHOLDER!r}, which stands for the picture; the collator adds it")
    turns = (Message("user", sample["question"]), Message("assistant", sample["answer"]))
    regions = regions_of(sample.get("regions"), name)
    return replace(_identified(sample, [sample["image"]], turns, locate), regions=regions)


def _of_mapping(sample: Mapping[str, Any], locate: Locate) -> Conversation:
    name = _name_of(sample)
    unread = [key for key in _UNREAD if not _is_empty(sample.get(key))]
    if unread:
        raise DataError(
            f"{name} has {', '.join(map(repr, unread))}, which lavender does not read; put what is said into the messages, and "
            "leave the rest out"
        )
    images = sample.get("image") if _is_empty(sample.get("images")) else sample["images"]
    if images is not sample.get("image") and sample.get("image") is not None:
        raise DataError(f'{name} has both "image" and "images"; give one of them')
    images = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    counter = itertools.count()
    turns: list[Message] = []
    listed: list[bool] = []  # whether its content came as a list of parts
    pictures: list[_Held | None] = []
    for n, (message, is_learned) in enumerate(_messages_of(sample, name), start=1):
        turn, held = _message_of(message, f"{name}, message {n}", counter)
        turns.append(turn if is_learned else replace(turn, is_learned=False))
        listed.append(bool(turn.parts) and not message.get("parts"))
        pictures += held
    places = pictures.count(None)
    if places != len(images) and any(PLACEHOLDER in turn.parts for turn in turns):
        own = next((f", and one holds a picture under {held[0]!r}" for held in pictures if held is not None), "")
        raise DataError(
            f'{name} has {places} parts {{"type": "image"}} without a picture{own}, but {len(images)} pictures under "images"; '
            "give one there for each part without one"
        )
    regions = regions_of(sample.get("regions"), name)
    if images and any(held is not None for held in pictures) and any(region.image is not None for region in regions):
        raise DataError(
            f'{name} has pictures in its messages and under "images", and regions that name one by its number; put all pictures '
            'into the messages, or all under "images"'
        )
    following = iter(images)
    placed = [next(following, None) if held is None else held[1] for held in pictures]
    images = [*(picture for picture in placed if picture is not None), *following]
    regions = tuple(
        _in_content(region, turns, f"{name}, region {n}") if listed[_turn_of(region, turns, f"{name}, region {n}")] else region
        for n, region in enumerate(regions, start=1)
    )
    return replace(_identified(sample, images, tuple(turns), locate), regions=regions)


def _messages_of(sample: Mapping[str, Any], name: str) -> Iterator[tuple[Any, bool]]:
    """The messages of a sample, and whether the student learns what the assistant says in each."""
    given = [key for key in ("messages", "conversations") if sample.get(key) is not None]
    if len(given) == 2:
        raise DataError(f'{name} has both "messages" and "conversations"; give one of them')
    if given:
        messages = sample[given[0]]
        if not isinstance(messages, list | tuple):
            raise DataError(f"{name}: its messages are a {type(messages).__name__}; expected a list")
        yield from ((message, True) for message in map(_mapping_of, messages))
        return
    preferences = [key for key in ("chosen", "rejected", "label") if sample.get(key) is not None]
    if preferences:
        raise DataError(
            f"{name} has {', '.join(map(repr, preferences))}: it is a preference, and lavender trains on answers that are right; "
            'give those as "messages", or as "prompt" and "completion"'
        )
    prompt, completion = sample.get("prompt"), sample["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        yield {"role": "user", "content": prompt}, False
        yield {"role": "assistant", "content": completion}, True
        return
    if not isinstance(prompt, list | tuple) or not isinstance(completion, list | tuple):
        raise DataError(
            f"{name}: its prompt is a {type(prompt).__name__} and its completion a {type(completion).__name__}; expected two "
            "texts, or two lists of messages"
        )
    prompt, completion = (list(map(_mapping_of, messages)) for messages in (prompt, completion))
    roles = [_role_of(message) for message in completion if isinstance(message, Mapping)]
    if any(role != "assistant" for role in roles):
        raise DataError(f"{name}: its completion has messages of {', '.join(roles)}; expected one of the assistant")
    yield from ((message, False) for message in prompt)
    yield from ((message, True) for message in completion)


def _mapping_of(message: Any) -> Any:
    return vars(message) if isinstance(message, Message) else message


def _role_of(message: Mapping[str, Any]) -> str:
    role = message.get("role") if message.get("role") is not None else message.get("from")
    return _ROLES.get(str(role), str(role))


def _message_of(message: Any, name: str, counter: Iterator[int]) -> tuple[Message, list[_Held | None]]:
    """A message, and for each place of a picture what it holds, or None where it stands for the next of the sample's images.

    `counter` numbers those across the sample.
    """
    if not isinstance(message, Mapping):
        raise DataError(
            f'{name} is a {type(message).__name__}; expected a mapping with "role" and "content", or "from" and "value"'
        )
    for key, value in message.items():
        if key not in _MESSAGE_KEYS and not _is_empty(value):
            raise DataError(
                f"{name} has {key!r}, which lavender does not read; leave it out of messages, tools and their calls too"
            )
    for one, other in (("role", "from"), ("content", "value")):
        if message.get(one) is not None and message.get(other) is not None:
            raise DataError(f'{name} has both "{one}" and "{other}"; give one of them')
    role, learned = _role_of(message), message.get("is_learned")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    parts = tuple(message.get("parts") or ())
    if not isinstance(content, list | tuple):
        places = [next(counter) for _ in range(content.count(PLACEHOLDER))] if isinstance(content, str) else []
        return Message(role, content, parts, learned is not False), [None] * len(places)  # type: ignore[arg-type]  # see _require_sound
    texts: list[str] = []
    held: list[_Held | None] = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
            texts.append(PLACEHOLDER)
            held.append(_picture_of(part, name, counter))
        else:
            texts.append(_text_of(part, name))
    content = "".join(texts)
    # An answer is one text, whose words are looked for.
    return Message(role, content, () if role == "assistant" else tuple(texts), learned is not False), held


def _picture_of(part: Mapping[str, Any], name: str, counter: Iterator[int]) -> _Held | None:
    # A table of parts has a column for whatever one of them has.
    held = {key: value for key, value in part.items() if value is not None and not (key == "text" and value == "")}
    kind, number = held.pop("type"), held.pop("index", None)
    unread = [key for key in held if key not in _SOURCES]
    if unread:
        raise DataError(
            f"{name} has a part of the type {kind!r} with {unread[0]!r}, which lavender does not read; leave it out (the processor "
            "has settings for sizes of pictures)"
        )
    if len(held) > 1:
        raise DataError(f"{name}: a part holds a picture under {' and '.join(map(repr, held))}; give one of them")
    if not held:
        if kind == "image_url":
            raise DataError(f'{name}: a part of the type "image_url" holds nothing under "image_url"; give {{"url": ...}} there')
        place = next(counter)
        if number not in (None, place):
            raise DataError(
                f'{name}: a part has the index {number!r}, but it is the place of picture {place} of "images", counted from 0; put '
                "the images in the order of their parts"
            )
        return None
    ((key, picture),) = held.items()
    if isinstance(picture, Mapping) and key == "image_url":
        unread = [key for key, value in picture.items() if key not in ("url", "detail") and value is not None]
        if unread or not isinstance(picture.get("url"), str):
            raise DataError(f'{name}: "image_url" has {", ".join(map(str, picture))}; expected a text under "url"')
        picture = picture["url"]
    if key == "base64" and (not isinstance(picture, str) or picture_in(picture) is None):
        raise DataError(f'{name}: a part holds no picture under "base64"; expected an encoded picture in base64')
    return key, picture


def _text_of(part: Any, name: str) -> str:
    held = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    text = held.get("text") if held.get("type") == "text" else None
    if not isinstance(text, str):
        raise DataError(
            f'{name} has a part {str(part)[:200] if isinstance(part, Mapping) else repr(part)}; expected {{"type": "text", "text": '
            '...} or {"type": "image"}, with a picture under "image", "url", "path" or "base64" or without one'
        )
    unread = [key for key in held if key not in ("type", "text")]
    if unread:
        raise DataError(f"{name} has a part of text with {unread[0]!r}, which lavender does not read; leave it out")
    if PLACEHOLDER in text:
        raise DataError(f'{name}: a text holds {PLACEHOLDER!r}, which stands for a picture; give a part {{"type": "image"}}')
    return text


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | Sequence | Mapping) and not len(value))


def _identified(sample: Mapping[str, Any], images: Sequence[Any], turns: tuple[Message, ...], locate: Locate) -> Conversation:
    """The conversation by the sample's id, or by one that is made from what it holds."""
    name = _name_of(sample)
    try:
        path = written_path(images[0]) if images else None
        sources = tuple(source_of(image, locate) for image in images)
        made = path or ("" if "id" in sample else content_id(sources, [[turn.role, turn.content] for turn in turns]))
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    if sample.get("id") is not None:
        return Conversation(id_of(sample["id"], name), sources, turns, sample.get("has_id") is not False)
    if not made:
        raise DataError(f'a sample has no "id"; give each one of its own. It has {", ".join(map(str, sample))}')
    return Conversation(made, sources, turns, has_id=False)


def _require_sound(conversation: Conversation) -> None:
    name = f"sample {conversation.id!r}"
    for n, message in enumerate(conversation.messages, start=1):
        where = f"{name}, message {n}"
        if message.role not in ("system", "user", "assistant"):
            raise DataError(f"{where} has the role {message.role!r}; expected system, user or assistant (human or gpt with LLaVA)")
        if not isinstance(message.content, str):
            raise DataError(f"{where} says a {type(message.content).__name__}; expected a text")
        if message.parts and (
            "".join(map(str, message.parts)) != message.content
            or message.parts.count(PLACEHOLDER) != message.content.count(PLACEHOLDER)
        ):
            raise DataError(f"{where} has parts that are not its content; give one of them")
        require_unicode(message.content, f"{where} of the {message.role}")
        if message.role == "assistant" and not message.content.strip():
            raise DataError(f"{name} has an empty answer; every message of the assistant needs a text")
        if message.role == "assistant" and PLACEHOLDER in message.content:
            raise DataError(
                f"{where}: the answer holds {PLACEHOLDER!r}, which stands for a picture; the student answers with text, put "
                "pictures into messages of the user"
            )
    if not any(message.role == "assistant" and message.is_learned for message in conversation.messages):
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
    added, message = (PLACEHOLDER,) * (len(images) - placed), messages[first]
    parts = (*added, *message.parts) if message.parts else ()
    messages[first] = replace(message, content="".join(added) + message.content, parts=parts)
    order = [*range(before), *range(placed, len(images)), *range(before, placed)]
    shift = len("".join(added))

    def moved(region: Region) -> Region:
        if region.image is not None:
            region = replace(region, image=order.index(region.image))
        if region.turn == first and region.start is not None and region.end is not None:
            region = replace(region, start=region.start + shift, end=region.end + shift)
        return region

    regions = tuple(map(moved, conversation.regions))
    return replace(conversation, images=tuple(images[n] for n in order), messages=tuple(messages), regions=regions)
