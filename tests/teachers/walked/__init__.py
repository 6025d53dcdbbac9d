"""Tiny pipelines of the classes that diffusers has, with random weights, and a call of each: what the walk over them draws."""

from . import dits, unets
from .parts import HEIGHT, PROMPT, WIDTH_PIXELS, Walked, mask, picture
from .switched import SWITCHED

WALK: dict[str, Walked] = {**unets.WALK, **dits.WALK}
"""Class name of a pipeline, with "/" and a variant where there are several -> how it is built and called."""

__all__ = ["HEIGHT", "PROMPT", "SWITCHED", "WALK", "WIDTH_PIXELS", "Walked", "mask", "picture"]
