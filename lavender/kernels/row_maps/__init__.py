"""Word maps where words own query rows."""

from .api import row_maps
from .reference import row_maps_reference

__all__ = ["row_maps", "row_maps_reference"]
