"""Boxes of every family against a probe that knows no grid rule."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from lavender.data import model_type_of
from lavender.families import Family, student_family

from .probe import disagreement
from .zoo import Student, students

SIZES = [(60, 90), (96, 48), (24, 96)]

# What mixes patches otherwise than by attention, or not in the order of the tokens, is told apart below.
RESAMPLED = {"blip-2", "idefics2", "minicpmv"}
NAMES = sorted(set(students()) - RESAMPLED)


@cache
def built(name: str) -> Student:
    return students()[name]()


def family_of(student: Student) -> Family:
    return student_family(model_type_of(student.processor, student.model.config))


def tolerance(name: str) -> float:
    """A cell of the probe is 1/6 wide, so a center is known to half of that; a coarse token's own width adds to it."""
    return 0.25 if name == "florence2" else 0.125


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_boxes_agree_with_what_moves_each_token(name, size):
    student = built(name)
    assert disagreement(student, family_of(student), size) < tolerance(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_probe_fails_when_rows_and_columns_are_swapped(name):
    student, family = built(name), family_of(built(name))
    swapped = Family(lambda pictures: [b[:, [1, 0, 3, 2]] for b in family.boxes(pictures)], cross=family.cross)
    assert disagreement(student, swapped, (60, 90)) > 0.4


@pytest.mark.parametrize("name", sorted(RESAMPLED))
def test_a_resampler_spreads_every_patch_over_every_token(name):
    """Why such families have boxes of patches: their tokens have no place."""
    student, family = built(name), family_of(built(name))
    one_place = Family(lambda pictures: [torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(4, -1)])
    assert family.resamplers is not None
    assert disagreement(student, one_place, (60, 90)) == float("inf")
