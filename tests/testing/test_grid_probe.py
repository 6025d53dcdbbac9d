"""Boxes of every family against a probe that knows no grid rule."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lavender.testing.grid_probe import TOLERANCE, check_grid, disagreement

from ..students.zoo import built, families, sampled


@pytest.mark.parametrize("name", sampled(families()))
def test_boxes_agree_with_what_moves_each_token(name):
    check_grid(built(name), tolerance=0.25 if name == "florence2" else TOLERANCE)


@pytest.mark.parametrize("name", sampled(families()))
def test_the_probe_fails_when_height_and_width_are_swapped(name):
    student = built(name)
    family = student.family
    swapped = replace(family, boxes=lambda images: [b[:, [1, 0, 3, 2]] for b in family.boxes(images)])
    assert disagreement(student, swapped, (60, 90)) > 0.4
    with pytest.raises(AssertionError, match="boxes disagree with the probe for an image of 60 x 90 pixels"):
        check_grid(student, swapped)
