"""Deprecated name of `lavender.cli.presets`."""

import sys

from lavender.cli import presets
from lavender.errors import warn_renamed

warn_renamed("lavender.presets", "lavender.cli.presets")
sys.modules[__name__] = presets
