"""What the doctor reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis: a topic, the result, and what to do if something is missing."""

    topic: str
    result: str
    remedy: str = ""
