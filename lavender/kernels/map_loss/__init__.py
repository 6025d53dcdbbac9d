"""The alignment loss of two sets of maps."""

from .api import map_loss
from .normalization import normalize, resample
from .reference import map_loss_reference

__all__ = ["map_loss", "map_loss_reference", "normalize", "resample"]
