from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from lavender.students.boxes import boxes_within, grid_of, rasterize, square_boxes
from lavender.students.families import ProcessedImages
from lavender.students.families.square import CROPPED


def test_a_square_grid_is_a_reshape():
    maps = torch.rand(2, 3, 35)
    boxes = square_boxes(5, 7).expand(2, -1, -1)
    assert grid_of(boxes) == (5, 7)
    torch.testing.assert_close(rasterize(maps, boxes, (5, 7)), maps.view(2, 3, 5, 7))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20), st.integers(1, 20))
def test_rasterizing_keeps_the_sum(height, width, rows, columns):
    maps = torch.rand(1, 2, height * width, dtype=torch.float64)
    raster = rasterize(maps, square_boxes(height, width)[None], (rows, columns))
    torch.testing.assert_close(raster.sum((-2, -1)), maps.sum(-1))


def test_tokens_without_a_place_are_left_out():
    boxes = square_boxes(2, 2).clone()
    boxes[3] = torch.nan
    raster = rasterize(torch.ones(1, 1, 4), boxes[None], (2, 2))
    assert raster.flatten().tolist() == [1, 1, 1, 0]
    assert grid_of(boxes[None]) == (2, 2)


def test_a_coarse_token_is_spread_over_its_cells():
    whole = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.0, 0.5, 0.5, 1.0]]])
    raster = rasterize(torch.tensor([[[1.0, 8.0]]]), whole, (2, 2))
    assert raster[0, 0].tolist() == [[0.25, 8.25], [0.25, 0.25]]


def llava_processor(crop):
    image_processor = SimpleNamespace(
        do_center_crop=crop,
        crop_size={"height": 64, "width": 64},
        size={"shortest_edge": 64} if crop else {"height": 64, "width": 64},
    )
    return SimpleNamespace(image_processor=image_processor, patch_size=8)


def test_llava_boxes_of_a_square_picture_cover_it():
    (own,) = CROPPED.boxes(ProcessedImages(llava_processor(crop=True), {}, [(200, 200)]))
    torch.testing.assert_close(own, square_boxes(8, 8))


def test_llava_boxes_know_the_center_crop():
    (own,) = CROPPED.boxes(ProcessedImages(llava_processor(crop=True), {}, [(64, 128)]))
    assert own[:, 0].min() == 0
    assert own[:, 2].max() == 1
    assert own[:, 1].min() == 0.25
    assert own[:, 3].max() == 0.75
    (own,) = CROPPED.boxes(ProcessedImages(llava_processor(crop=False), {}, [(64, 128)]))
    assert own[:, 1].min() == 0
    assert own[:, 3].max() == 1


def test_llava_boxes_lie_where_the_pixels_come_from(processor, student):
    """Paint one cell of a wide picture: the processor's patches that change are those whose boxes meet that cell."""
    from PIL import Image

    plain = Image.new("RGB", (96, 64), (90, 90, 90))
    painted = plain.copy()
    painted.paste((255, 0, 0), (40, 16, 56, 32))
    values = [processor(images=[p], text=["<image>"], return_tensors="pt").pixel_values[0] for p in (plain, painted)]
    changed = (values[0] != values[1]).any(0).view(8, 8, 8, 8).any(3).any(1).flatten()
    (own,) = CROPPED.boxes(ProcessedImages(processor, {}, [(64, 96)]))
    meets = (own[:, 0] < 32 / 64) & (own[:, 2] > 16 / 64) & (own[:, 1] < 56 / 96 - 1e-6) & (own[:, 3] > 40 / 96 + 1e-6)
    assert torch.equal(changed, meets)


def test_a_grid_is_nobody_elses():
    own = square_boxes(3, 3)
    own[0] = torch.nan
    assert not square_boxes(3, 3).isnan().any()
    with torch.device("meta"):
        assert square_boxes(4, 5).device.type == "cpu"


def test_half_precision_around_changes_nothing():
    """Under autocast, as in mixed precision training, values and gradients are those of float32."""
    maps, boxes = torch.rand(1, 2, 16, generator=torch.Generator().manual_seed(0)), square_boxes(4, 4)[None]
    found = []
    for enabled in (False, True):
        given = maps.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            spread = rasterize(given, boxes, (3, 5))
        spread.square().sum().backward()
        found.append((spread, given.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_boxes_within_a_part_of_the_picture():
    """A 4 x 4 grid seen through the part from a quarter to three quarters of the height, and the left half of the width."""
    within = boxes_within(square_boxes(4, 4), (0.25, 0.0, 0.75, 0.5)).view(4, 4, 4)
    assert within[[0, 3]].isnan().all()
    assert within[:, 2:].isnan().all()
    torch.testing.assert_close(within[1:3, :2], square_boxes(2, 2).view(2, 2, 4))
    assert grid_of(within.view(1, -1, 4)) == (2, 2)
    half = boxes_within(square_boxes(1, 2), (0.0, 0.25, 1.0, 1.0))
    torch.testing.assert_close(half, torch.tensor([[0, 0, 1, 1 / 3], [0, 1 / 3, 1, 1]]))
