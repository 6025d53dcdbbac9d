"""Deprecated name of `lavender.students.boxes`."""

import sys

from lavender.errors import warn_renamed
from lavender.students import boxes

warn_renamed("lavender.boxes", "lavender.students.boxes")
sys.modules[__name__] = boxes
