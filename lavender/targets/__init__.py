"""Word maps on disk, whatever made them: the store, its upkeep, and published formats."""

from .shards import Target
from .store import TargetStore, TargetWriter

__all__ = ["Target", "TargetStore", "TargetWriter"]
