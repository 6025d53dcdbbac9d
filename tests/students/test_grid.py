"""Boxes of every family against a probe that knows no grid rule."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from lavender.students.families import Family, student_family
from lavender.students.image_tokens import model_type_of

from .probe import disagreement
from .zoo import Student, students

SIZES = [(60, 90), (96, 48), (24, 96)]

NAMES = sorted(students())


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
    swapped = replace(family, boxes=lambda pictures: [b[:, [1, 0, 3, 2]] for b in family.boxes(pictures)])
    assert disagreement(student, swapped, (60, 90)) > 0.4
