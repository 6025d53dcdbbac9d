"""The alignment loss of two sets of maps."""

from .api import map_loss, map_loss_reference, normalize, resample

__all__ = ["map_loss", "map_loss_reference", "normalize", "resample"]
