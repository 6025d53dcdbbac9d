"""Deprecated name of `lavender.training.train`."""

from lavender.errors import warn_renamed
from lavender.training.train import fine_tune, load_aligner, load_student

__all__ = ["fine_tune", "load_aligner", "load_student"]

warn_renamed("lavender.train", "lavender.training.train")
