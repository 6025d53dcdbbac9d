"""The text that a processor's chat template makes of a conversation, and the places of the assistant's turns in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from ..data.conversations import PLACEHOLDER, Conversation, Message, parts_of, without_thinking
from ..errors import DataError, reading

_PLACE = re.compile(f"({re.escape(PLACEHOLDER)})")
_KEYS_OF_PARTS = ("'type': 'text'", '"type": "text"')
"""What stands in a text for a part that was not shown, but written as it is."""
_OPEN_TAG = re.compile(r"[<\[][^<>\[\]\s]*$")


@dataclass(frozen=True)
class Turn:
    """One message of the assistant in the text of a conversation.

    Attributes:
        message: its number in the conversation, from 0.
        answer: what it says: the message without the thinking before it.
        num_images: the number of pictures before it.
        start, end: its characters `[start, end)` in the text: all that follows the generation prompt, with what the template closes
            it with. Thinking is in there in the form that the template gives it, or is not if the template takes it out.
        answer_end: where the answer ends in the text, white space behind it not counted.
    """

    message: int
    answer: str
    num_images: int
    start: int
    end: int
    answer_end: int


@dataclass(frozen=True)
class Passage:
    """Characters `[start, end)` of a message's content that stand in the text of a conversation, to the letter, from `at` on."""

    start: int
    end: int
    at: int


@dataclass(frozen=True)
class ChatText:
    """A conversation as one text, in which each picture is a placeholder of the processor's.

    Attributes:
        text: the text.
        turns: what the assistant says in it and the student learns.
        passages: by message where its texts stand: without white space around them, and without an answer's thinking. Pictures
            stand between two passages. A message that the template does not show once and to the letter is missing.
    """

    text: str
    turns: tuple[Turn, ...]
    passages: Mapping[int, tuple[Passage, ...]] = field(default_factory=dict)


def apply_chat_template(processor: Any, conversation: Conversation, sought: Collection[int] = ()) -> ChatText:
    """The text of a conversation of `lavender.data.as_conversation` by the processor's chat template.

    The text is what the template makes of the whole conversation. It is made again with a mark behind each message, which shows
    where messages end, and with marks in place of the answers, which shows what surrounds them. A turn begins where the generation
    prompt ends: what the prompt says, the assistant does not. Templates may therefore trim messages, take thinking out of earlier
    ones, and close the last one otherwise than those before.

    A template that takes no parts (`{"type": "text", "text": ...}`) gets texts, with the processor's `image_token` for a picture.

    Args:
        processor: the student's.
        conversation: see `lavender.data.as_conversation`.
        sought: the messages whose `passages` are looked for beside those of the answers that are learned.

    Raises:
        DataError: a text holds the processor's own placeholder, the template refuses the conversation, or an answer cannot be found
            in what it makes of it.
    """
    name = f"sample {conversation.id!r}"
    placeholder = getattr(processor, "image_token", None)
    for n, message in enumerate(conversation.messages, start=1):
        if placeholder is not None and str(placeholder) in message.content.replace(PLACEHOLDER, ""):
            raise DataError(
                f"{name}: message {n} ({message.role}) holds {str(placeholder)!r}, which stands for the picture; the collator "
                f"adds it, write {PLACEHOLDER!r} where a picture stands in a conversation"
            )
    try:
        return _Template(processor, conversation, parts_of, _as_parts).chat_text(sought)
    except _FormError as error:
        refusal = error
    if any(message.role == "system" and PLACEHOLDER not in message.content for message in conversation.messages):
        # Llama 3.2's takes parts of the user's, and writes the system's content as it is.
        with suppress(_FormError):
            return _Template(processor, conversation, parts_of, _as_parts_but_of_system).chat_text(sought)
    if _takes_parts(processor):
        raise refusal
    if placeholder is None and any(PLACEHOLDER in message.content for message in conversation.messages):
        raise DataError(f"{refusal}. {type(processor).__name__} names no image_token that could stand in a text")

    def as_text(role: str, parts: Sequence[str]) -> str:
        return "".join(str(placeholder) if part == PLACEHOLDER else part for part in parts)

    return _Template(processor, conversation, lambda message: _PLACE.split(message.content), as_text).chat_text(sought)


def _takes_parts(processor: Any) -> bool:
    """Whether the chat template shows a text that comes as a part."""
    template = _Template(processor, Conversation("parts", (), (Message("user", "Look"),)), parts_of, _as_parts)
    try:
        return template.marks[0] in template.render(template.marked, add_generation_prompt=True)
    except DataError:
        return False


class _FormError(DataError):
    """The template fails on a conversation, or shows none of its texts: it may not take contents of this form."""


class _LostError(DataError):
    """An answer is not found."""


class _Template:
    """A chat template at work on one conversation, whose contents it gets in one form.

    A mark stands directly behind the last letter of a text. What a template makes of white space around the text, or of thinking
    before it, does not move it.

    Attributes:
        parts: the messages' texts, with `<image>` between them for every picture; `write` makes a content of them.
        marks: by message. Those of answers show where answers end; those of the user show where generation prompts begin.
        marked: the contents with their marks.
        frame: the same, of answers the mark alone and the white space behind it.
    """

    def __init__(
        self,
        processor: Any,
        conversation: Conversation,
        split: Callable[[Message], Sequence[str]],
        write: Callable[[str, Sequence[str]], Any],
    ) -> None:
        self.processor = processor
        self.name = f"sample {conversation.id!r}"
        self.messages = conversation.messages
        self.parts = [split(message) for message in self.messages]
        self._content = write
        self._mark(_marks(self.messages))

    def write(self, n: int, parts: Sequence[str]) -> Any:
        """What the template gets as the content of message `n`, if these are its parts."""
        return self._content(self.messages[n].role, parts)

    def _mark(self, marks: Mapping[int, str]) -> None:
        self.marks = marks
        self.marked = [self.write(n, parts) for n, parts in enumerate(self.parts)]
        self.frame = [*self.marked]
        for n, mark in marks.items():
            self.marked[n] = self.frame[n] = self.write(n, _insert(self.parts[n], mark))
            if self.messages[n].role == "assistant":
                self.frame[n] = self.write(n, [mark + _spaces_behind(self.messages[n].content)])

    def chat_text(self, sought: Collection[int]) -> ChatText:
        text, marked = self.render([self.write(n, parts) for n, parts in enumerate(self.parts)]), self.render(self.marked)
        if any(text.count(key) > sum(message.content.count(key) for message in self.messages) for key in _KEYS_OF_PARTS):
            raise _FormError(f"{self.name}: the chat template writes the parts of a message as a list; set one that shows them")
        if not any(mark in marked for mark in self.marks.values()):
            raise _FormError(f"{self.name}: the chat template leaves out what the messages say; set one that shows it")
        try:
            turns = self._find_turns(text, marked)
        except _LostError:
            # What the user says may be left out, or shown twice, or looked at: the answers tell enough.
            self._mark({n: mark for n, mark in self.marks.items() if self.messages[n].role == "assistant"})
            turns = self._find_turns(text, self.render(self.marked))
        passages = self._find_passages(text, [*sought]) if sought else {}
        for turn in turns:
            said = turn.answer.strip()
            if said and text.endswith(said, turn.start, turn.answer_end):
                start = self.messages[turn.message].content.rindex(said)
                passages[turn.message] = (Passage(start, start + len(said), turn.answer_end - len(said)),)
        return ChatText(text, tuple(turns), passages)

    def _find_passages(self, text: str, numbers: Sequence[int]) -> dict[int, tuple[Passage, ...]]:
        """The passages of messages, by marks behind each of their texts. A template may look at what some of them say: then each
        message has a mark alone, and those that it looks at are not found."""
        try:
            return self._passages_of(text, numbers)
        except DataError:
            found: dict[int, tuple[Passage, ...]] = {}
            for n in numbers if len(numbers) > 1 else ():
                with suppress(DataError):
                    found |= self._passages_of(text, [n])
            return found

    def _passages_of(self, text: str, numbers: Sequence[int]) -> dict[int, tuple[Passage, ...]]:
        salt = _salt(self.messages)
        contents = [self.write(n, parts) for n, parts in enumerate(self.parts)]
        marks: list[tuple[int, int, str, str]] = []  # message, where a text begins in its content, the text, its mark
        for n in numbers:
            content, at, marked = self.messages[n].content, 0, [*self.parts[n]]
            for k, part in enumerate(self.parts[n]):
                at = content.index(part, at)  # line breaks beside pictures are in no part
                if part != PLACEHOLDER and part.strip():
                    said = (without_thinking(part) if self.messages[n].role == "assistant" else part).strip()
                    marks.append((n, at + part.rindex(said), said, f'\ue000"{salt}:{n}.{k}\ue001'))
                    marked[k] = part.rstrip() + marks[-1][-1] + _spaces_behind(part)
                at += len(part)
            contents[n] = self.write(n, marked)
        passages: dict[int, tuple[Passage, ...]] = {}
        rendered, end = self.render(contents), 0
        pieces = []
        for n, start, said, mark in marks:
            piece, found, rendered = rendered.partition(mark)
            if not found or not piece.endswith(said):
                raise self._lost(f"does not show message {n + 1} to the letter")
            pieces.append(piece)
            end += len(piece)
            passages[n] = (*passages.get(n, ()), Passage(start, start + len(said), end - len(said)))
        if "".join([*pieces, rendered]) != text:  # marks that are shown twice are left in it
            raise self._lost("renders messages otherwise if they are longer")
        return passages

    def _find_turns(self, text: str, marked: str) -> list[Turn]:
        pieces = self._split(marked)
        if "".join(pieces.values()) != text:
            raise self._lost("renders messages otherwise if they are longer")
        frame = self._split(self.render(self.frame))
        turns, start, before, num_images = [], 0, "", 0
        for n, message in enumerate(self.messages):
            num_images += message.content.count(PLACEHOLDER)
            if n not in self.marks:
                continue
            end = start + len(pieces[n])
            if message.role == "assistant" and message.is_learned:
                prompt = self._prompt_length(n, before, pieces[n], frame[n])
                closing = self._closing_length(n, before, text[end:])
                turns.append(Turn(n, without_thinking(message.content), num_images, start + prompt, end + closing, end))
            start, before = end, self.marks[n]
        return turns

    def _prompt_length(self, n: int, before: str, piece: str, frame: str) -> int:
        """How much of `piece`, what stands between the mark `before` and that of answer `n`, the assistant does not say.

        That is the generation prompt. A template may prompt for more than an answer of the conversation has (`<think>`): then it is
        what the two share.
        """
        prompt = _behind(before, self.render(self.frame[:n], add_generation_prompt=True))
        if piece.startswith(prompt):
            return len(prompt)
        shared = _OPEN_TAG.sub("", _shared(prompt, piece, frame))
        closing = _shared(prompt, _behind(before, self.render(self.frame[:n])))
        if len(shared) < len(closing) or (len(shared) == len(closing) and shared != frame):
            raise self._lost(f"prompts for message {n + 1} by {prompt[:40]!r} and begins it otherwise, by {frame[:40]!r}")
        return len(shared)

    def _closing_length(self, n: int, before: str, rest: str) -> int:
        """How much of `rest`, what stands behind the last letter of answer `n`, belongs to its turn: all of it if none follows."""
        if n == len(self.messages) - 1:
            return len(rest)
        return next(len(closing) for closing in self._closings(n, before) if rest.startswith(closing))

    def _closings(self, n: int, before: str) -> Iterator[str]:
        """What the template may close answer `n` with where more follows: as if none did, else as it closes messages of the user
        (GPT-OSS), else as if none did but without the end of the text (Phi-3)."""
        last = _behind(self.marks[n], self.render(self.frame[: n + 1]))
        yield last
        spaces = last[: len(last) - len(last.lstrip())]
        if of_user := _behind(before, self.render(self.frame[:n])).lstrip():
            yield spaces + of_user
        yield last.removesuffix(str(getattr(self.processor.tokenizer, "eos_token", None) or ""))
        yield ""

    def _split(self, text: str) -> dict[int, str]:
        """What the template makes of the conversation, cut at its marks: per message that has one what ends there, and the rest."""
        pieces: dict[int, str] = {}
        for n, mark in self.marks.items():
            if text.count(mark) != 1:
                raise self._lost(f"shows message {n + 1} ({self.messages[n].role}) {text.count(mark)} times")
            pieces[n], _, text = text.partition(mark)
        return pieces | {-1: text}

    def render(self, contents: Sequence[Any], **options: Any) -> str:
        messages = [{"role": message.role, "content": content} for message, content in zip(self.messages, contents, strict=False)]
        refuses = f"{self.name}: the chat template refuses the conversation"
        with reading(refuses, "give the messages as it expects them", _FormError):
            text: str = self.processor.apply_chat_template(messages, tokenize=False, **options)
        return text

    def _lost(self, reason: str) -> _LostError:
        return _LostError(
            f"{self.name}: the answers cannot be found in the conversation, for the chat template {reason}; set "
            "processor.chat_template to one that shows each answer once, or give samples of one answer"
        )


def _marks(messages: Sequence[Message]) -> Mapping[int, str]:
    """Per message of the user's or the assistant's that has a text, a mark that stands in none of the messages.

    A mark is of characters that no text has by chance, and of a quote, which is escaped where a template writes a list or a JSON
    object in place of a text. Its first character is not its last: it overlaps with no other mark, nor with itself.
    """
    salt = _salt(messages)
    return {
        n: f'\ue000"{salt}:{n}\ue001'
        for n, message in enumerate(messages)
        if message.role == "assistant" or (message.role == "user" and message.content.replace(PLACEHOLDER, "").strip())
    }


def _salt(messages: Sequence[Message]) -> int:
    """A number by which no message holds the beginning of a mark."""
    texts = "".join(message.content for message in messages)
    return next(n for n in range(len(texts) + 2) if f'\ue000"{n}:' not in texts)


def _insert(parts: Sequence[str], mark: str) -> list[str]:
    """A message's parts with a mark behind the last letter of its texts."""
    last = max(n for n, part in enumerate(parts) if part != PLACEHOLDER and part.strip())
    return [*parts[:last], parts[last].rstrip() + mark + _spaces_behind(parts[last]), *parts[last + 1 :]]


def _spaces_behind(text: str) -> str:
    """The white space that a text ends with."""
    return text[len(text.rstrip()) :]


def _shared(first: str, *others: str) -> str:
    """What some texts begin with alike."""
    return "".join(letters[0] for letters in takewhile(lambda letters: len({*letters}) == 1, zip(first, *others, strict=False)))


def _behind(mark: str, text: str) -> str:
    """What stands behind a mark in a text; all of the text if there is none."""
    return text.rpartition(mark)[2] if mark else text


def _as_parts_but_of_system(role: str, parts: Sequence[str]) -> Any:
    return "".join(parts) if role == "system" else _as_parts(role, parts)


def _as_parts(role: str, parts: Sequence[str]) -> list[dict[str, str]]:
    return [{"type": "image"} if part == PLACEHOLDER else {"type": "text", "text": part} for part in parts]
