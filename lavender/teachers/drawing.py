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
    """An embedding [N, C] that the denoiser may get, and what it carries of the call's texts; None for any other text."""

    embedding: torch.Tensor
    carried: Carried | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of the call that it carries: several where they have the same tokens."""
        return () if self.carried is None else self.carried.equals

    def is_of(self, embedding: torch.Tensor) -> bool:
        """Whether it is this embedding, in the precision of that one."""
        return self.embedding.shape == embedding.shape and torch.equal(self.embedding.to(embedding), embedding)


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
        error: why maps cannot be told.
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
    error: Exception | None = None

    def clear(self) -> None:
        """Forgets what was recorded."""
        self.recording, self.step, self.latents = None, (), None
        self.owners = []

    def pictures(self, rows: Sequence[Row], latents: torch.Tensor) -> list[int]:
        """The samples of a batch that show the pictures, by the texts that they carry.

        Branches lie one behind the other: [unconditional, conditional, perturbed]. Perturbed guidance computes the prompt's samples
        once more, and a negative prompt may be another picture's prompt: on the latents of its picture. Raises `CaptureError` where
        samples with the texts are not so.
        """
        expected = [text for text in self.texts for _ in range(self.copies)]
        count, size = len(expected), len(rows)
        starts = [
            start
            for start in range(0, size - count + 1, count)
            if all(text in row.texts for text, row in zip(expected, rows[start : start + count], strict=True))
        ]
        carriers = [sample for sample, row in enumerate(rows) if set(row.texts) & set(self.texts)]
        if not starts or not all(torch.equal(latents[sample], latents[starts[0] + sample % count]) for sample in carriers):
            raise CaptureError(
                f"the denoiser got {len(carriers)} samples of {size} with the {self.name}, not all on the same latents, for "
                f"{count} pictures; lavender reads pictures that are drawn whole, and together: draw one at a time, without "
                "views or frames of their own, or record the forwards that you mean with patch.capture(word_weights)"
            )
        return list(range(starts[0], starts[0] + count))

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
        received: what the text encoders received, where no embedding is known to be of it.
        first_step: when the denoiser ran first. What it got by then is what the prompt was encoded to: other embeddings that come
            later are not, however like it they are.
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
    received: list[str] = field(default_factory=list)
    first_step: tuple[Any, ...] = ()
    is_suspended: bool = False
    is_closed: bool = False
    left_out: Counter[str] = field(default_factory=Counter)
    error: Exception | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any], more: Sequence[str], whole: bool) -> Drawing:
        copies = arguments.get("num_images_per_prompt") or arguments.get("num_videos_per_prompt") or 1
        prompts = branch_of("prompt", arguments.get("prompt"), more, copies)
        negatives = arguments.get("negative_prompt")
        if isinstance(negatives, str):  # one for all prompts
            negatives = [negatives] * max(1, len(prompts.texts))
        return cls(prompts, branch_of("negative prompt", negatives, more, copies), whole, arguments)

    @property
    def branches(self) -> tuple[Branch, Branch]:
        return self.prompts, self.negatives

    @property
    def has_recordings(self) -> bool:
        return any(branch.recording is not None for branch in self.branches)

    def close(self) -> None:
        """The pipeline's call has ended: its maps stay, its tensors do not."""
        self.forget_texts()
        self.is_closed, self.arguments = True, {}
        self.rows.clear()
        self.others.clear()
        for branch in self.branches:
            branch.latents = None

    def begin_step(self, step: tuple[Any, ...]) -> None:
        """Before a forward of the denoiser in the pipeline's own call."""
        self.first_step = self.first_step or step
        if not _are_equal(step, self.first_step):
            self.forget_texts()

    def forget_texts(self) -> None:
        """Lets go of what the text encoders gave; what they received is kept where it explains that nothing was recorded."""
        if self.texts is not None and not self.rows:
            self.received = self.texts.received
        self.texts = None

    def row_of(self, embedding: torch.Tensor) -> Row:
        """What an embedding [N, C] carries. Raises `CaptureError` where its tokens and the texts can be aligned in several ways."""
        for row in chain(self.rows, self.others):
            if row.is_of(embedding):
                return row
        texts = [*self.prompts.texts, *self.negatives.texts]
        carried = None if self.texts is None else self.texts.identify(embedding, texts, self.arguments)
        if carried is None:
            self.others.append(Row(embedding.clone()))
            return self.others[-1]
        self.rows.append(Row(embedding.clone(), carried))
        return self.rows[-1]

    def rows_of(self, embeddings: torch.Tensor) -> list[Row]:
        """Those of a batch's embeddings [B, N, C]."""
        return [self.row_of(embedding) for embedding in embeddings.detach()]


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
        # A further pass may be of fewer samples: those of one batch are at one timestep.
        ours, theirs = (each[0] if each.ndim else each for each in (ours, theirs))
        return ours.shape == theirs.shape and torch.equal(ours, theirs)
    return bool(ours == theirs)
