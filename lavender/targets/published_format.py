"""Targets as Lavender's authors publish them, from and to a target store: a folder of small pictures, or a parquet table.

    <root>/<file name of the picture>/lpm_attention/<its stem>/attention_<word>.jpg
    table.parquet    columns `image`, `question`, `answers`, `attention_images` (word -> picture)

A map is a grey picture of eight bits, scaled so that it reaches from 0 to 255. There is one for each word of a caption, whatever
the number of its occurrences, and the folder does not say which caption.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..data.samples import Conversation, Sample
from ..images import ImageSource

ROWS_AT_ONCE = 256
"""Rows of a parquet table that are read or written together."""


def images_of(sample: Sample | Conversation) -> tuple[ImageSource, ...]:
    return (sample.image,) if isinstance(sample, Sample) else sample.images


def name_of(image: ImageSource | None, sample_id: str) -> str:
    """A picture's file name; one that is no file, or unknown, has that of its sample's id."""
    return Path(image if isinstance(image, str | Path) else without_number(sample_id)).name


def without_number(sample_id: str) -> str:
    """An id without the number that tells the captions of one picture apart."""
    return re.sub(r"#\d+$", "", sample_id)
