"""What a demo's `results.json` has to hold for the report, as shapes that its values are compared with.

A shape is a type (`float` is a finite number, whole or not), a list of one shape for all items, a dictionary of shapes by key,
whose key `...` stands for all other keys, a text that the value is, or a tuple of alternatives.
"""

from __future__ import annotations

import math
from types import NoneType
from typing import Any, get_args

from ..config import Rows
from .experiment import ARMS, MAIN_WORLD

_INTERVAL = {"mean": float, "low": float, "high": float}
_ROW = {"first": _INTERVAL, "second": _INTERVAL, "difference": _INTERVAL, "usual": float, "questions": int}
_FIGURES = {"pointing": float, "own_object": float, "iou": float, "auc": float, "words": int}
_COMPARED = {"maps": _FIGURES, "control": _FIGURES, "chance": _FIGURES}
_STEP = {"step": int, "cpu_s": float, "answers": {...: float}}
_LAYERS = ([int], str)
_WORD = {"word": str, "role": str, "object": (int, NoneType), "maps": {key: [[float]] for key in ARMS}}
_QUESTION = {"text": str, "answer": str, "said": dict.fromkeys(ARMS, str), "words": [_WORD]}
_ROWS: dict[Any, Any] = {"all": _ROW, ...: _ROW}
SHAPE: dict[str, Any] = {
    "answers": {MAIN_WORLD: _ROWS, ...: _ROWS},
    "attention": {key: {"question": _COMPARED, "answer": _COMPARED} for key in ARMS},
    "history": {key: [_STEP] for key in ARMS},
    "examples": [{"picture": int, "questions": [_QUESTION]}],
    "teacher": _COMPARED,
    "config": {
        "num_fresh": int,
        "num_curve": int,
        "alignment": {
            "aligner": str,
            "layers": _LAYERS,
            "heads": str,
            "rows": get_args(Rows),
            "question_layers": (*_LAYERS, NoneType),
            "question_heads": (str, NoneType),
            "question_rows": (*get_args(Rows), NoneType),
        },
    },
    "environment": {...: str},
}
"""Of the values that the report reads."""


def misfit(value: Any, shape: Any, place: str = "") -> str:
    """Where a value is not of a shape, in words; empty if it is."""
    if isinstance(shape, tuple):
        misfits = [misfit(value, option, place) for option in shape]
        return "" if "" in misfits else misfits[0]
    if isinstance(shape, str):
        return "" if value == shape else _wrong(place, value, repr(shape))
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return _wrong(place, value, "a mapping")
        for key in shape.keys() - {...} - value.keys():
            return f"{place or 'it'} lacks {key!r}"
        parts = {f"{place}.{key}".lstrip("."): (item, shape.get(key, shape.get(...))) for key, item in value.items()}
        return next((found for at, (item, other) in parts.items() if other is not None and (found := misfit(item, other, at))), "")
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _wrong(place, value, "a list")
        return next((found for n, item in enumerate(value) if (found := misfit(item, shape[0], f"{place}[{n}]"))), "")
    if shape is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return "" if is_number else _wrong(place, value, "a number")
    return "" if isinstance(value, shape) and not isinstance(value, bool) else _wrong(place, value, f"one of type {shape.__name__}")


def impossible(results: dict[str, Any]) -> str:
    """What in results of the right shape cannot be; empty if nothing is."""
    for arm, steps in results["history"].items():
        if not steps or any(entry["step"] < 1 or entry["cpu_s"] <= 0 or not entry["answers"] for entry in steps):
            return f"history.{arm} has no steps, or one without a number, time or answers"
    for n, example in enumerate(results["examples"]):
        if example["picture"] < 0:
            return f"examples[{n}].picture is {example['picture']}, expected a number that is not negative"
        words = [word for question in example["questions"] for word in question["words"]]
        if any(len({len(row) for row in values}) != 1 or not values[0] for word in words for values in word["maps"].values()):
            return f"examples[{n}] has a map whose rows are not equally long"
    return ""


def _wrong(place: str, value: Any, expected: str) -> str:
    return f"{place or 'it'} is {str(value)[:60]!r}, expected {expected}"
