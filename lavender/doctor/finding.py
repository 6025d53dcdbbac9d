"""What the doctor reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis: a topic, the result, and what to do if something is missing.

    Attributes:
        is_damaged: whether a file of weights is missing, cut off or none, so that there is no model to speak of.
    """

    topic: str
    result: str
    remedy: str = ""
    is_damaged: bool = False
