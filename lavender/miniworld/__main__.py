"""Deprecated name of `python -m recipes`, which stands beside the package in a checkout."""

import runpy
import sys
from importlib.util import find_spec

from ..errors import warn_renamed

if __name__ == "__main__":
    warn_renamed("python -m lavender.miniworld", "python -m recipes")
    if find_spec("recipes") is None:
        print("lavender: the recipes are in a checkout of the repository: run `python -m recipes` there", file=sys.stderr)
        sys.exit(2)
    runpy.run_module("recipes", run_name="__main__", alter_sys=True)
