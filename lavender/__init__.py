"""See, and teach, where a vision-language model looks: per-word attention maps of diffusers and transformers models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AlignmentConfig": "config",
    "ExtractionConfig": "config",
    "TeacherConfig": "config",
    "TrainingConfig": "config",
    "LavenderError": "errors",
    "Collator": "collator",
    "Conversation": "data",
    "Family": "families",
    "HeatMap": "maps",
    "Maps": "maps",
    "Message": "data",
    "Pictures": "families",
    "TargetStore": "targets",
    "Word": "types",
    "WordsConfig": "config",
    "WordMaps": "types",
    "extract": "teacher.extract",
    "open_pairs": "sources",
    "patch": "patching",
    "register_family": "families",
    "fine_tune": "train",
    "watch": "watching",
    "words_of": "words",
}

__all__ = [
    "AlignmentConfig",
    "Collator",
    "Conversation",
    "ExtractionConfig",
    "Family",
    "HeatMap",
    "LavenderError",
    "Maps",
    "Message",
    "Pictures",
    "TargetStore",
    "TeacherConfig",
    "TrainingConfig",
    "Word",
    "WordMaps",
    "WordsConfig",
    "__version__",
    "extract",
    "fine_tune",
    "open_pairs",
    "patch",
    "register_family",
    "watch",
    "words_of",
]

if TYPE_CHECKING:
    from .collator import Collator
    from .config import AlignmentConfig, ExtractionConfig, TeacherConfig, TrainingConfig, WordsConfig
    from .data import Conversation, Message
    from .errors import LavenderError
    from .families import Family, Pictures, register_family
    from .maps import HeatMap, Maps
    from .patching import patch
    from .sources import open_pairs
    from .targets import TargetStore
    from .teacher.extract import extract
    from .train import fine_tune
    from .types import Word, WordMaps
    from .watching import watch
    from .words import words_of


def __getattr__(name: str) -> Any:
    """Loads public names on first use, so that importing lavender imports neither torch nor any model library."""
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
