"""Deprecated name of `python -m recipes`, which stands beside the package in a checkout."""

import runpy

from ..errors import warn_renamed

if __name__ == "__main__":
    warn_renamed("python -m lavender.miniworld", "python -m recipes")
    runpy.run_module("recipes", run_name="__main__", alter_sys=True)
