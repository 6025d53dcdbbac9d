"""Tiny pipelines of the classes that diffusers has, with random weights, and a call of each: what the walk over them draws."""

from . import dits, modular, switched, unets
from .parts import HEIGHT, PROMPT, WIDTH_PIXELS, Walked, mask, picture

WALK: dict[str, Walked] = {**unets.WALK, **dits.WALK, **modular.WALK}
"""Class name of a pipeline, with "/" and a variant where there are several -> how it is built and called."""

SWITCHED: dict[str, Walked] = {**switched.SWITCHED, **modular.SWITCHED}
"""The same of pipelines with something switched on: class name, "/" and what it is."""

__all__ = ["HEIGHT", "PROMPT", "SWITCHED", "WALK", "WIDTH_PIXELS", "Walked", "mask", "picture"]
