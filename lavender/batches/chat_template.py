"""The text that a processor's chat template makes of a conversation, and the places of the assistant's turns in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..data.conversations import PLACEHOLDER, Conversation, Message, parts_of
from ..errors import ConfigError, DataError


@dataclass(frozen=True)
class Turn:
    """One message of the assistant in the text of a conversation.

    Attributes:
        answer: the message.
        num_images: the number of pictures before it.
        start, end: its characters `[start, end)` in the text, with all that the template closes it with.
    """

    answer: str
    num_images: int
    start: int
    end: int


@dataclass(frozen=True)
class ChatText:
    """A conversation as one text, in which each picture is a placeholder of the processor's, and the assistant's turns in it."""

    text: str
    turns: tuple[Turn, ...]


def apply_chat_template(processor: Any, conversation: Conversation) -> ChatText:
    """The text of a conversation of `lavender.data.as_conversation` by the processor's chat template.

    A turn of the assistant begins where the template, asked for an answer, ends, and it ends where the template ends without the
    messages that follow: no template needs marks for it, but each must render a message the same whatever follows it.

    Raises:
        ConfigError: the template changes what stands before a message.
        DataError: a text holds the processor's own placeholder, or the template refuses the conversation.
    """
    name = f"sample {conversation.id!r}"
    placeholder = getattr(processor, "image_token", None)
    for n, message in enumerate(conversation.messages, start=1):
        if placeholder is not None and str(placeholder) in message.content.replace(PLACEHOLDER, ""):
            raise DataError(
                f"{name}: message {n} ({message.role}) holds {str(placeholder)!r}, which stands for the picture; the collator "
                f"adds it, write {PLACEHOLDER!r} where a picture stands in a conversation"
            )
    messages = [{"role": message.role, "content": _parts(message)} for message in conversation.messages]
    turns, text, num_images = [], "", 0
    for n, message in enumerate(conversation.messages):
        num_images += message.content.count(PLACEHOLDER)
        if message.role == "assistant":
            prompt = _extend(processor, text, messages[:n], name, add_generation_prompt=True)
            text = _extend(processor, prompt, messages[: n + 1], name)
            if message.is_learned:
                turns.append(Turn(message.content, num_images, len(prompt), len(text)))
    if conversation.messages[-1].role != "assistant":
        text = _extend(processor, text, messages, name)
    return ChatText(text, tuple(turns))


def _parts(message: Message) -> list[dict[str, str]]:
    """A message as chat templates take it."""
    return [{"type": "image"} if part == PLACEHOLDER else {"type": "text", "text": part} for part in parts_of(message)]


def _extend(processor: Any, before: str, messages: list[dict[str, Any]], name: str, **options: Any) -> str:
    """The messages' text, which has to begin with `before`, the text of the first of them."""
    from jinja2 import TemplateError

    try:
        text: str = processor.apply_chat_template(messages, tokenize=False, **options)
    except (TemplateError, TypeError) as error:
        raise DataError(
            f"{name}: the chat template refuses the conversation ({error}); give the messages as it expects them"
        ) from error
    if not text.startswith(before):
        raise ConfigError(
            f"{name}: the chat template renders {_end_of(before, text)!r} otherwise when more follows, so that lavender cannot "
            "find the answers. Some templates take the thinking out of earlier answers, or close the last one alone: set "
            "processor.chat_template to one that renders a message the same whatever follows, or give samples of one answer"
        )
    return text


def _end_of(before: str, text: str) -> str:
    """The first characters of `before` that `text` does not have."""
    same = next(n for n in range(len(before)) if before[n] != text[n : n + 1])
    return before[same : same + 40]
