"""Which rows of the attention speak for which words, by the role that each word has in its batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import AlignmentConfig
from ..errors import CaptureError
from ..types import ROLES, WordBatch, WordRows

_QUESTION, _PROMPT_END = ROLES.index("question"), ROLES.index("prompt end")


@dataclass(frozen=True, eq=False)
class Reading:
    """The rows of a batch's words, and what is compared: C comparisons, the words and, again, those that are compared twice.

    Attributes:
        rows: of the comparisons: comparison w < W is of word w, W + w again.
        own: bool [B, R], the tokens whose own rows are read, beside or without the rows before.
        twice: bool [B, W], the words that comparison W + w is of; None where C is W.
        asked: bool [B, W], the words that the user says; None where the batch has no roles.
    """

    rows: WordRows
    own: torch.Tensor
    twice: torch.Tensor | None
    asked: torch.Tensor | None

    @property
    def questions(self) -> torch.Tensor | None:
        """bool [B, C], the comparisons of words that the user says."""
        return None if self.asked is None else self.compared(self.asked)

    def compared(self, values: torch.Tensor) -> torch.Tensor:
        """What words have, [B, W, ...], of the comparisons: [B, C, ...]. Of a mask, nothing is compared again that is not there."""
        if self.twice is None:
            return values
        again = values & self.twice.to(values.device) if values.dtype == torch.bool else values
        return torch.cat([values, again], dim=1)

    def by_word(self, values: torch.Tensor) -> torch.Tensor:
        """What comparisons have, [B, C, ...], as the mean of each word's: [B, W, ...]."""
        if self.twice is None:
            return values
        first, again = values.chunk(2, dim=1)
        twice = self.twice.to(values.device).view(*self.twice.shape, *[1] * (values.ndim - 2))
        return torch.where(twice, (first + again) / 2, first)


def read_words(words: WordBatch, config: AlignmentConfig, apart: bool) -> Reading:
    """The rows that a config reads a batch's words by.

    Args:
        words: the batch's.
        config: its `rows` are those of answers, its `question_rows` of questions. The end of a prompt has its own row.
        apart: whether the two readings of a word of `both` are two comparisons, or the halves of one.

    Raises:
        CaptureError: the batch's roles are of another shape than its words, or a word that is compared has none.
    """
    of_answer, of_question = config.rows, config.question_rows or config.rows
    asked, ends = _roles_of(words)

    def read_by(*rows: str) -> torch.Tensor:
        """bool [B, W], the words that are read by one of these, the ends of prompts aside."""
        return torch.where(asked, of_question in rows, of_answer in rows) & ~ends

    tokens, of_words, shares = words.tokens, words.token_words.clamp_min(0), words.token_weights
    real = (tokens >= 0) & (words.token_words >= 0)
    before, own = (read_by(*rows).gather(1, of_words) for rows in (("predicts", "both"), ("reads", "both")))
    own = own | ends.gather(1, of_words)
    if "last" in (of_answer, of_question):
        last = torch.full_like(words.present, -1, dtype=tokens.dtype)
        last = last.scatter_reduce(1, of_words, tokens.where(real, -1), "amax")
        by_last = read_by("last")
        is_last = by_last.gather(1, of_words) & (tokens == last.gather(1, of_words))
        # It has what the word's tokens have together.
        whole = shares.new_zeros(words.present.shape).scatter_add(1, of_words, shares * real)
        shares = whole.gather(1, of_words).where(is_last, shares)
        own = own | is_last
    own_rows, rows_before = tokens.where(own & real, -1), (tokens - 1).clamp_min(-1).where(before & real, -1)
    num_words = words.present.shape[1]
    if "both" not in (of_answer, of_question):
        rows = own_rows.where(own, rows_before)
        return Reading(WordRows(rows, words.token_words, shares, num_words), own, None, None if words.roles is None else asked)
    twice = read_by("both")
    again = twice.gather(1, of_words)
    # Of a word that is read once, either row is of the first comparison.
    second = words.token_words + num_words * again if apart else words.token_words
    shares = shares if apart else torch.where(again, shares / 2, shares)
    both = WordRows(
        torch.cat([own_rows, rows_before], dim=1),
        torch.cat([words.token_words, second.where(real, -1)], dim=1),
        torch.cat([shares, shares], dim=1),
        num_words * (1 + apart),
    )
    return Reading(both, own, twice if apart else None, None if words.roles is None else asked)


def _roles_of(words: WordBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [B, W] twice: the words that the user says, and the ends of prompts.

    Raises `CaptureError` unless every word that is compared has a role.
    """
    roles, present = words.roles, words.present
    if roles is None:
        none = torch.zeros_like(present)
        return none, none
    key = WordBatch.KEYS["roles"]
    if roles.shape != present.shape or roles.is_floating_point():
        raise CaptureError(
            f"{key} is {tuple(roles.shape)} of {roles.dtype}, and {WordBatch.KEYS['present']} {tuple(present.shape)}; expected one "
            f"integer per word: its place in {ROLES}"
        )
    roles = roles.to(present.device)
    wrong = present & ((roles < 0) | (roles >= len(ROLES)))
    if wrong.any():
        b, w = wrong.nonzero()[0].tolist()
        raise CaptureError(f"{key} is {int(roles[b, w])} at word {w} of row {b}; expected a place in {ROLES}")
    return roles == _QUESTION, roles == _PROMPT_END
