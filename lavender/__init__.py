"""See, and teach, where a vision-language model looks: per-word attention maps of diffusers and transformers models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__path__ = [*__path__, f"{__path__[0]}/deprecated"]
"""Where submodules are found: modules that moved are importable by their old names, with a warning."""

_HOME = {
    "AlignmentConfig": "config",
    "ExtractionConfig": "config",
    "TeacherConfig": "config",
    "TrainingConfig": "config",
    "LavenderError": "errors",
    "Collator": "batches.collator",
    "Conversation": "data.samples",
    "Family": "students.families",
    "HeatMap": "maps",
    "LavenderCallback": "training.callback",
    "LocalizationHeads": "students.heads",
    "Maps": "maps",
    "Message": "data.samples",
    "ProcessedImages": "students.families",
    "TargetStore": "targets.store",
    "Word": "types",
    "WordsConfig": "config",
    "WordMaps": "types",
    "choose_heads": "students.heads",
    "extract": "extraction.extract",
    "open_pairs": "data.sources",
    "patch": "patching",
    "register_family": "students.families",
    "fine_tune": "training.train",
    "watch": "training.callback",  # deprecated
    "words_of": "words",
}

_RENAMED = {"Pictures": "ProcessedImages"}
"""Deprecated public names, and the names that replaced them."""

__all__ = [
    "AlignmentConfig",
    "Collator",
    "Conversation",
    "ExtractionConfig",
    "Family",
    "HeatMap",
    "LavenderCallback",
    "LavenderError",
    "LocalizationHeads",
    "Maps",
    "Message",
    "ProcessedImages",
    "Region",
    "TargetStore",
    "TeacherConfig",
    "TrainingConfig",
    "Word",
    "WordMaps",
    "WordsConfig",
    "__version__",
    "choose_heads",
    "extract",
    "fine_tune",
    "open_pairs",
    "patch",
    "register_family",
    "words_of",
]

if TYPE_CHECKING:
    from .batches.collator import Collator
    from .config import AlignmentConfig, ExtractionConfig, TeacherConfig, TrainingConfig, WordsConfig
    from .data.samples import Conversation, Message, Region
    from .data.sources import open_pairs
    from .errors import LavenderError
    from .extraction.extract import extract
    from .maps import HeatMap, Maps
    from .patching import patch
    from .students.families import Family, ProcessedImages, register_family
    from .students.heads import LocalizationHeads, choose_heads
    from .targets.store import TargetStore
    from .training.callback import LavenderCallback
    from .training.train import fine_tune
    from .types import Word, WordMaps
    from .words import words_of


def __getattr__(name: str) -> Any:
    """Loads public names on first use, so that importing lavender imports neither torch nor any model library."""
    if name in _RENAMED:
        import_module(f"{__name__}.errors").warn_renamed(f"lavender.{name}", f"lavender.{_RENAMED[name]}")
        name = _RENAMED[name]
    if name in _HOME:
        with import_module(f"{__name__}.errors").importing():
            return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
