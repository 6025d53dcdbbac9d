"""Which token every text column of a denoiser comes from: read off what the text encoders received and gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..types import Word

TokenName = str | int
"""A token's string, as `convert_ids_to_tokens` gives it, for all columns that have it; or the index of a text column."""


@dataclass(frozen=True, eq=False)
class Carried:
    """The text that an embedding carries, column by column.

    Attributes:
        text: the candidate.
        index: which of the candidates.
        columns: N tokens as strings; None for columns that come from no token that an encoder received (zeros, pictures).
    """

    text: str
    index: int
    columns: tuple[str | None, ...]

    def weights(self, words: Sequence[Word], tokens: Sequence[TokenName] = ()) -> tuple[torch.Tensor, list[Word | TokenName]]:
        """Each column's share of each word, then of each token.

        Args:
            words: W words of `text` (as `words_of` or `words_and` give them).
            tokens: K tokens that are no words.

        Returns:
            float32 [W + K, N] on the CPU: a word's columns share 1 evenly over the encoders that have it, and in each over its
            tokens; and the words and tokens that no column stands for, whose rows are zero.
        """
        raise NotImplementedError


class Texts:
    """What a pipeline's text encoders received and gave inside one `TextReader.reading()`. Tensors are references."""

    def identify(
        self, embedding: torch.Tensor, candidates: Sequence[str], arguments: Mapping[str, Any] | None = None
    ) -> Carried | None:
        """Which candidate an embedding [N, C] carries, and in which columns; None if it is none of them that were encoded here.

        Args:
            embedding: one sample's text, as the denoiser gets it.
            candidates: texts; equal ones count as the first.
            arguments: of the pipeline's call or of `encode_prompt`, with defaults: some templates stand there.

        Raises:
            CaptureError: the embedding's tokens and a candidate cannot be aligned in one way alone.
        """
        raise NotImplementedError


class TextReader:
    """Reads what a pipeline's text encoders do; see `reading`. It puts hooks on them only while it reads."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @contextmanager
    def reading(self) -> Iterator[Texts]:
        """Records this thread's forwards of the text encoders inside the `with` block.

        A block inside the block, of this reader or of another, has the forwards for itself: so a callback's are kept apart.
        """
        yield Texts()
