"""Word maps where words own key columns."""

from .api import column_attention, column_maps

__all__ = ["column_attention", "column_maps"]
