"""Deprecated name of `lavender.students.boxes`."""

from lavender.errors import warn_renamed
from lavender.students.boxes import boxes_within, shown_boxes, square_boxes, tiled_boxes, unframed_boxes

__all__ = ["boxes_within", "shown_boxes", "square_boxes", "tiled_boxes", "unframed_boxes"]

warn_renamed("lavender.boxes", "lavender.students.boxes")
