"""Deprecated name of `lavender.training.train`."""

import sys

from lavender.errors import warn_renamed
from lavender.training import train

warn_renamed("lavender.train", "lavender.training.train")
sys.modules[__name__] = train
