"""Deprecated name of `lavender.cli.presets`."""

from lavender.cli.presets import PRESETS, Preset, preset
from lavender.errors import warn_renamed

__all__ = ["PRESETS", "Preset", "preset"]

warn_renamed("lavender.presets", "lavender.cli.presets")
