"""Everything is declared in pyproject.toml; this file is where the CUDA sources of `csrc/` join the package."""

from setuptools import setup

setup()
