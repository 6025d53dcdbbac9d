"""What a patched pipeline was asked to draw: its texts, the embeddings that carry them, and what was recorded of each."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch

from ..errors import CaptureError
from ..types import Word
from ..words import words_and
from .encoding import Carried, Texts, TokenName
from .recording import Recording


@dataclass(frozen=True, eq=False)
class Row:
    """An embedding [N, C] that the denoiser may get, and the text of a branch that it carries; of no branch, another text."""

    embedding: torch.Tensor
    branch: Branch | None = None
    number: int = 0
    carried: Carried | None = None


@dataclass(eq=False)
class Branch:
    """The prompts of a drawing, or its negative prompts, and what was recorded of them.

    Attributes:
        name: what messages call it.
        texts: P of them.
        words: of each.
        copies: pictures per text.
        owners: the text of every picture that was recorded.
        missing: of each text, the words and tokens that have no text column.
        recording: of its samples.
    """

    name: str
    texts: tuple[str, ...] = ()
    words: tuple[tuple[Word, ...], ...] = ()
    copies: int = 1
    owners: list[int] = field(default_factory=list)
    missing: dict[int, list[Word | TokenName]] = field(default_factory=dict)
    recording: Recording | None = None
    step: tuple[Any, ...] = ()
    latents: torch.Tensor | None = None

    def clear(self) -> None:
        """Forgets what was recorded."""
        self.recording, self.step, self.latents = None, (), None
        self.owners = []

    def pictures(self, numbers: Sequence[int | None], latents: torch.Tensor) -> list[int]:
        """The samples of a batch that show the pictures, of those whose text has a number.

        Perturbed guidance computes the prompt's samples once more in the same batch, from the same latents; and where the negative
        prompt equals the prompt, the unconditional ones carry it too. Samples that carry a text on latents of their own are
        pictures: the frames of a video, each with the text.
        """
        carriers = [sample for sample, number in enumerate(numbers) if number is not None]
        left = Counter({text: self.texts.count(text) * self.copies for text in self.texts})
        first: list[int] = []
        for sample in carriers:
            text = self.texts[numbers[sample]]  # type: ignore[index]
            if left[text]:
                left[text] -= 1
                first.append(sample)
        are_repeated = all(
            any(numbers[sample] == numbers[other] and torch.equal(latents[sample], latents[other]) for other in first)
            for sample in carriers
            if sample not in first
        )
        return first if are_repeated else carriers

    def is_further_pass(self, latents: torch.Tensor, step: tuple[Any, ...], first_shows: bool) -> bool:
        """Whether a forward of this step was recorded already; if not, the one with these latents is.

        Raises `CaptureError` if both carry the texts, on other latents, and nothing says which of them the picture is made of.
        """
        if self.latents is not None and _are_equal(step, self.step):
            if not first_shows and not (latents.shape == self.latents.shape and torch.equal(latents, self.latents)):
                raise CaptureError(
                    f"in one step the denoiser got the {self.name} with two kinds of latents (views of a picture, a reference, a "
                    "second pass): lavender cannot tell which of them the picture is made of; record the forwards that you mean "
                    "with patch.capture(word_weights)"
                )
            return True
        self.step, self.latents = step, latents.detach().clone()
        return False


@dataclass(eq=False)
class Drawing:
    """What a pipeline was asked to draw.

    Attributes:
        prompts: those of the call, or those of `encode_prompt`.
        negatives: the negative prompts.
        whole: whether the pipeline's own call draws, and not a user's loop over its parts.
        arguments: of the pipeline's call, or of `encode_prompt`, with defaults; forgotten when the call ends.
        texts: what the text encoders read; None when no more of it is needed.
        rows: the embeddings that are known to be of its texts.
        others: the latest embeddings that are of none.
        is_suspended: whether a callback runs: what the denoiser does there is not part of the call.
        is_closed: whether the call has ended: what the denoiser does later is not part of it.
        left_out: how many forwards were not recorded, by reason.
        error: why maps cannot be told.
    """

    prompts: Branch
    negatives: Branch
    whole: bool
    arguments: Mapping[str, Any]
    texts: Texts | None = None
    rows: list[Row] = field(default_factory=list)
    others: deque[Row] = field(default_factory=lambda: deque(maxlen=8))
    latest: tuple[torch.Tensor, int, list[Row]] | None = None
    is_suspended: bool = False
    is_closed: bool = False
    left_out: Counter[str] = field(default_factory=Counter)
    error: Exception | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any], more: Sequence[str], whole: bool) -> Drawing:
        copies = arguments.get("num_images_per_prompt") or arguments.get("num_videos_per_prompt") or 1
        prompts = branch_of("prompt", arguments.get("prompt"), more, copies)
        return cls(prompts, branch_of("negative prompt", arguments.get("negative_prompt"), more, copies), whole, arguments)

    @property
    def branches(self) -> tuple[Branch, Branch]:
        return self.prompts, self.negatives

    def close(self) -> None:
        """The pipeline's call has ended: its maps stay, its tensors do not."""
        self.is_closed, self.arguments, self.texts, self.latest = True, {}, None, None
        self.rows.clear()
        self.others.clear()
        for branch in self.branches:
            branch.latents = None

    def row_of(self, embedding: torch.Tensor) -> Row:
        """What an embedding [N, C] carries. Raises `CaptureError` where its tokens and the texts can be aligned in several ways."""
        for row in chain(self.rows, self.others):
            if row.embedding.shape == embedding.shape and torch.equal(row.embedding.to(embedding), embedding):
                return row
        texts = [*self.prompts.texts, *self.negatives.texts]
        carried = None if self.texts is None else self.texts.identify(embedding, texts, self.arguments)
        if carried is None:
            self.others.append(Row(embedding.clone()))
            return self.others[-1]
        count = len(self.prompts.texts)
        branch, number = (self.prompts, carried.index) if carried.index < count else (self.negatives, carried.index - count)
        self.rows.append(Row(embedding.clone(), branch, number, carried))
        return self.rows[-1]

    def rows_of(self, embeddings: torch.Tensor) -> list[Row]:
        """Those of a batch's embeddings [B, N, C]."""
        version = -1 if embeddings.is_inference() else embeddings._version  # inference tensors do not count what is done to them
        if self.latest is None or self.latest[0] is not embeddings or self.latest[1] != version or version < 0:
            self.latest = embeddings, version, [self.row_of(embedding) for embedding in embeddings.detach()]
        return self.latest[2]


def branch_of(name: str, texts: Any, more: Sequence[str], copies: int) -> Branch:
    texts = (texts,) if isinstance(texts, str) else tuple(texts) if isinstance(texts, list | tuple) else ()
    if not all(isinstance(text, str) for text in texts):
        texts = ()
    return Branch(name, texts, tuple(words_and(text, more) for text in texts), copies)


def _are_equal(step: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Of two steps, each a timestep and what a scheduler counts."""
    if len(step) != len(other) or step[1:] != other[1:]:
        return False
    ours, theirs = step[0], other[0]
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return ours.shape == theirs.shape and torch.equal(ours, theirs)
    return bool(ours == theirs)
