"""Questions about pictures for the small student's language stage: several behind one picture, which is read once.

A picture's questions are one conversation for `lavender.Collator`, which finds words, labels and targets. Here the conversation is
cut into its turns; a batch joins some of them behind the picture, and its attention mask lets no turn see another. So every
question is answered as if it stood alone behind the picture, and a step costs a fraction of as many samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from ..batches.collator import Collator
from ..data.samples import Conversation
from ..errors import ConfigError, DataError
from ..images import Picture
from ..types import OUTCOMES, WordBatch

_SKIPPED = OUTCOMES.index("skipped")
_COLLATED = 50
"""Conversations per call of the collator."""


@dataclass(frozen=True, eq=False)
class _Turn:
    """A question and its answer, without what stands before the question.

    Attributes:
        ids, labels: int64 [T].
        words: per compared word the places of its tokens, from 0, and their weights.
        roles: int64 [W].
        targets: float32 [W, y, x]; None without a store.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    words: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    roles: torch.Tensor
    targets: torch.Tensor | None


class PackedPictures:
    """Pictures and their turns, ready to be joined to batches.

    Attributes:
        turns: per picture, as given, its turns.
        pictures: per picture its sha256.
    """

    def __init__(self, collator: Collator, conversations: Iterable[Conversation]) -> None:
        """
        Args:
            collator: of a student whose chat template begins a turn with `<|user|>`, and of targets, if words are compared.
            conversations: one picture each, and one or more questions with their answers.

        Raises:
            DataError: there are no conversations, or the collator had to skip one.
        """
        tokenizer = collator.processor.tokenizer
        self._image, self._user, self._padding = (
            tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<|user|>", tokenizer.pad_token)
        )
        self.turns: list[list[_Turn]] = []
        self.pictures: list[str] = []
        self.prefix = torch.empty(0, dtype=torch.long)
        self.boxes = torch.empty(0)
        iterator = iter(conversations)
        while some := list(islice(iterator, _COLLATED)):
            batch = collator(some)
            for b, conversation in enumerate(some):
                if batch[WordBatch.KEYS["outcomes"]][b] == _SKIPPED:  # another picture stands in its place
                    raise DataError(collator.skipped[conversation.id])
                self.turns.append(self._cut({key: value[b] for key, value in batch.items()}))
                self.pictures += [Picture.open(image).sha256 for image in conversation.images]
        if not self.turns:
            raise DataError("there are no conversations to pack")

    def __len__(self) -> int:
        return len(self.turns)

    @property
    def has_targets(self) -> bool:
        """Whether a word at least has a target."""
        return any(turn.targets is not None and len(turn.words) for turns in self.turns for turn in turns)

    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with the pictures, their turns, the words that are compared and the targets."""
        known: dict[str, torch.Tensor | str | None] = {
            "pictures": ",".join(self.pictures),
            "prefix": self.prefix,
            "boxes": self.boxes,
        }
        for picture, turns in enumerate(self.turns):
            for n, turn in enumerate(turns):
                of_turn: dict[str, torch.Tensor | None] = {
                    "ids": turn.ids,
                    "labels": turn.labels,
                    "roles": turn.roles,
                    "targets": turn.targets,
                }
                for w, (places, weights) in enumerate(turn.words):
                    of_turn |= {f"{w} places": places, f"{w} weights": weights}
                known |= {f"{picture} {n} {name}": value for name, value in of_turn.items()}
        return digest_of(known)

    def _cut(self, row: dict[str, torch.Tensor]) -> list[_Turn]:
        ids, keys = row["input_ids"], WordBatch.KEYS
        length = int(row["attention_mask"].sum())
        first = int((ids == self._image).nonzero()[-1]) + 1
        self.prefix, self.boxes = ids[:first], row[keys["boxes"]]
        # The first turn has this token before the picture.
        users = [at for at in (ids[:length] == self._user).nonzero().flatten().tolist() if at >= first]
        starts, ends = [first, *(at + 1 for at in users)], [*users, length]
        present = row[keys["present"]]
        turns = []
        for start, end in zip(starts, ends, strict=True):
            words, roles, chosen = [], [], []
            for w in present.nonzero().flatten().tolist():
                of_word = row[keys["token_words"]] == w
                at = row[keys["tokens"]][of_word]
                if start <= int(at[0]) < end:
                    words.append((at - start, row[keys["token_weights"]][of_word]))
                    roles.append(row[keys["roles"]][w])
                    chosen.append(w)
            targets = row[keys["targets"]][chosen] if keys["targets"] in row else None
            kinds = torch.stack(roles) if roles else torch.empty(0, dtype=torch.long)
            turns.append(_Turn(ids[start:end], row["labels"][start:end], tuple(words), kinds, targets))
        return turns

    def batch(self, pictures: Sequence[int], chosen: Sequence[Sequence[int]], *, with_words: bool) -> dict[str, torch.Tensor]:
        """Some turns of some pictures, as inputs of a Llava but for the pictures.

        Args:
            pictures: numbers of B pictures.
            chosen: of each the numbers of its turns.
            with_words: whether lavender's keys are there.

        Returns:
            `input_ids`, `position_ids` and `labels` [B, T], `attention_mask` bool [B, 1, T, T], and with words the keys of
            `WordBatch`.

        Raises `ConfigError` for no picture, one without turns, or numbers that there are not.
        """
        self._require_there(pictures, chosen)
        first = len(self.prefix)
        rows = [[self.turns[picture][n] for n in turns] for picture, turns in zip(pictures, chosen, strict=True)]
        lengths = [first + sum(len(turn.ids) for turn in row) for row in rows]
        size = (len(rows), max(lengths))
        ids, labels = torch.full(size, self._padding), torch.full(size, -100)
        positions, turns = torch.zeros(size, dtype=torch.long), torch.full(size, -2)
        words: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        for b, row in enumerate(rows):
            ids[b, :first], positions[b, :first], turns[b, :first] = self.prefix, torch.arange(first), -1
            at, found = first, []
            for n, turn in enumerate(row):
                end = at + len(turn.ids)
                ids[b, at:end], labels[b, at:end], turns[b, at:end] = turn.ids, turn.labels, n
                positions[b, at:end] = torch.arange(first, first + len(turn.ids))
                found += [(places + at, weights) for places, weights in turn.words]
                at = end
            words.append(found)
        seen = (turns[:, :, None] == turns[:, None]) | (turns[:, None] == -1)
        mask = seen & torch.ones(size[1], size[1], dtype=torch.bool).tril()
        batch = {
            "input_ids": ids,
            "position_ids": positions,
            "labels": labels,
            "attention_mask": mask[:, None],
        }
        if with_words:
            batch |= self._words(rows, words, ids)
        return batch

    def _require_there(self, pictures: Sequence[int], chosen: Sequence[Sequence[int]]) -> None:
        if not len(pictures) or len(pictures) != len(chosen):
            raise ConfigError(f"{len(pictures)} pictures and the turns of {len(chosen)} were given; expected as many, at least one")
        for picture, turns in zip(pictures, chosen, strict=True):
            if not 0 <= picture < len(self):
                raise ConfigError(f"picture {picture} was asked for; there are {len(self)}, counted from 0")
            count = len(self.turns[picture])
            if not len(turns) or not all(0 <= n < count for n in turns):
                raise ConfigError(f"turns {list(turns)} of picture {picture} were asked for; give some of its {count}, from 0")

    def _words(
        self, rows: list[list[_Turn]], words: list[list[tuple[torch.Tensor, torch.Tensor]]], ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        num_words = max(1, *(len(found) for found in words))
        num_tokens = max(1, *(sum(len(places) for places, _ in found) for found in words))
        size = (len(rows), num_tokens)
        tokens, owners, weights = torch.full(size, -1), torch.full(size, -1), torch.zeros(size)
        present, roles = torch.zeros(len(rows), num_words, dtype=torch.bool), torch.zeros(len(rows), num_words, dtype=torch.long)
        targets: torch.Tensor | None = None
        for b, (row, found) in enumerate(zip(rows, words, strict=True)):
            if found:
                places = torch.cat([places for places, _ in found])
                tokens[b, : len(places)] = places
                owners[b, : len(places)] = torch.cat([torch.full_like(places, w) for w, (places, _) in enumerate(found)])
                weights[b, : len(places)] = torch.cat([shares for _, shares in found])
            present[b, : len(found)] = True
            roles[b, : len(found)] = torch.cat([turn.roles for turn in row])
            maps = [turn.targets for turn in row if turn.targets is not None]
            if maps:
                joined = torch.cat(maps)
                targets = torch.zeros(*present.shape, *joined.shape[1:]) if targets is None else targets
                targets[b, : len(found)] = joined
        image = (ids == self._image).nonzero()[:, 1].view(len(rows), -1)
        boxes = self.boxes.expand(len(rows), -1, -1)
        return WordBatch(tokens, owners, weights, image, present, boxes, targets=targets, input_ids=ids, roles=roles).to_batch()


def digest_of(values: Mapping[str, torch.Tensor | str | None]) -> str:
    """Sixteen hexadecimal digits of tensors and texts, by their names."""
    digest = hashlib.sha256()
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name} {value} ".encode())
    return digest.hexdigest()[:16]
