"""Pictures of any shape in the teacher's square, and maps back on the picture: known values and known places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lavender.config import TeacherConfig
from lavender.miniworld import TEACHER
from lavender.teachers.framing import frame, on_picture
from lavender.teachers.model import Teacher

from .explicit import picture

WHOLE = (0.0, 0.0, 1.0, 1.0)
GRAY = 127 / 127.5 - 1


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


@pytest.mark.parametrize(("width", "height", "inside"), [(96, 48, (0.25, 0, 0.75, 1)), (40, 120, (0, 1 / 3, 1, 2 / 3))])
def test_padded_pictures_keep_their_shape(width, height, inside):
    image = picture(0, width, height)
    own = frame(image, 48, "pad")
    assert own.inside == pytest.approx(inside)
    assert own.crop == WHOLE
    top, left, bottom, right = (round(48 * edge) for edge in inside)
    expected = pixels_of(image.resize((right - left, bottom - top), Image.Resampling.BICUBIC))
    assert torch.equal(own.pixels[:, top:bottom, left:right], expected)
    beside = torch.ones(48, 48, dtype=torch.bool)
    beside[top:bottom, left:right] = False
    assert beside.sum() == 48 * 48 - (bottom - top) * (right - left)
    torch.testing.assert_close(own.pixels[:, beside], torch.full((3, int(beside.sum())), GRAY))


@pytest.mark.parametrize(("width", "height", "crop"), [(96, 48, (0, 0.25, 1, 0.75)), (40, 120, (1 / 3, 0, 2 / 3, 1))])
def test_cropped_pictures_are_their_middle(width, height, crop):
    image = picture(0, width, height)
    own = frame(image, 48, "crop")
    assert own.inside == WHOLE
    assert own.crop == pytest.approx(crop)
    left, top = (width - min(width, height)) / 2, (height - min(width, height)) / 2
    box = (left, top, width - left, height - top)
    assert torch.equal(own.pixels, pixels_of(image.resize((48, 48), Image.Resampling.BICUBIC, box=box)))
    # Away from the edges, where PIL looks beyond the box, it is the part cut out, to two levels of 255.
    apart = pixels_of(image.crop(tuple(map(int, box))).resize((48, 48), Image.Resampling.BICUBIC))
    torch.testing.assert_close(own.pixels[:, 4:-4, 4:-4], apart[:, 4:-4, 4:-4], rtol=0, atol=2.01 / 127.5)


def test_an_odd_middle_lies_between_pixels():
    image = picture(0, 51, 30)
    own = frame(image, 48, "crop")
    assert own.crop == pytest.approx((0, 10.5 / 51, 1, 40.5 / 51))
    assert torch.equal(own.pixels, pixels_of(image.resize((48, 48), Image.Resampling.BICUBIC, box=(10.5, 0, 40.5, 30))))


def test_stretched_pictures_fill_the_square():
    image = picture(0, 96, 40)
    own = frame(image, 48, "stretch")
    assert (own.inside, own.crop) == (WHOLE, WHOLE)
    assert torch.equal(own.pixels, pixels_of(image.resize((48, 48), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_square_pictures_are_the_same_however_they_fit(fit):
    image = picture(0, 48, 48)
    own = frame(image, 48, fit)
    assert torch.equal(own.pixels, pixels_of(image))
    assert (own.inside, own.crop) == (WHOLE, WHOLE)


def test_a_line_keeps_one_pixel():
    own = frame(Image.new("RGB", (1000, 1), (255, 255, 255)), 48, "pad")
    top, left, bottom, right = (round(48 * edge) for edge in own.inside)
    assert (bottom - top, left, right) == (1, 0, 48)
    assert torch.equal(own.pixels[:, top], torch.ones(3, 48))


@pytest.mark.parametrize("size", [5, 8, 16, 40])
@pytest.mark.parametrize("shape", [(16, 16), (8, 12), (7, 5)])
def test_maps_of_whole_squares_are_resampled_as_torch_does(shape, size):
    torch.manual_seed(0)
    maps = torch.rand(2, 3, *shape, dtype=torch.float64)
    expected = F.interpolate(maps, (size, size), mode="bilinear", antialias=True)
    torch.testing.assert_close(on_picture(maps, [WHOLE] * 2, size), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("inside", [(0.25, 0, 0.75, 1), (0, 0.375, 1, 0.625)])
def test_parts_are_resampled_as_pil_resizes_a_box(inside):
    """PIL's bilinear resize with a box, which sees what lies around the box too; its numbers are single precision."""
    torch.manual_seed(0)
    maps = torch.rand(1, 1, 16, 16)
    top, left, bottom, right = (16 * edge for edge in inside)
    for size in (3, 8, 32):
        ours = on_picture(maps, [inside], size)[0, 0]
        square = Image.fromarray(maps[0, 0].numpy())
        theirs = square.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
        torch.testing.assert_close(ours, torch.from_numpy(np.array(theirs)), rtol=0, atol=1e-5)


def test_each_picture_of_a_batch_has_its_own_box():
    torch.manual_seed(0)
    maps = torch.rand(2, 3, 16, 16)
    boxes = [(0.25, 0.0, 0.75, 1.0), (0.0, 0.375, 1.0, 0.625)]
    both = on_picture(maps, boxes, 8)
    for n in range(2):
        torch.testing.assert_close(both[n], on_picture(maps[n : n + 1], boxes[n : n + 1], 8)[0])


def test_an_even_map_stays_even():
    maps = torch.full((1, 1, 6, 6), 0.25)
    for inside in (WHOLE, (0.4, 0.0, 0.6, 1.0), (0.0, 0.49, 1.0, 0.51)):
        torch.testing.assert_close(on_picture(maps, [inside], 9), torch.full((1, 1, 9, 9), 0.25))


@pytest.mark.parametrize(("width", "height"), [(96, 48), (40, 120), (48, 48)])
@pytest.mark.parametrize("spot", [(0.2, 0.3), (0.8, 0.9), (0.5, 0.1)])
def test_a_spot_of_the_picture_is_found_where_it_was(width, height, spot):
    """A picture with one bright spot is framed; its brightness, as a map of the square, is brought back."""
    y, x = np.mgrid[:height, :width]
    distance = ((y + 0.5) / height - spot[0]) ** 2 * (height / width) + ((x + 0.5) / width - spot[1]) ** 2 * (width / height)
    bright = (255 * np.exp(-distance / 0.005)).astype(np.uint8)
    image = Image.fromarray(np.repeat(bright[..., None], 3, axis=2))
    for fit in ("pad", "stretch", "crop"):
        own = frame(image, 64, fit)
        maps = (own.pixels.mean(0) + 1)[None, None]
        (back,) = on_picture(maps, [own.inside], 32)[0].double()
        top, left, bottom, right = own.crop
        expected = ((spot[0] - top) / (bottom - top), (spot[1] - left) / (right - left))
        if not all(0.05 < place < 0.95 for place in expected):
            continue  # not in the crop
        back = back.clamp_min(back.max() / 2) - back.max() / 2  # the spot without the padding's traces
        places = (torch.arange(32) + 0.5) / 32
        found = (float((back.sum(1) * places).sum() / back.sum()), float((back.sum(0) * places).sum() / back.sum()))
        assert found == pytest.approx(expected, abs=0.02), fit


def test_an_object_at_the_edge_of_a_wide_picture_is_found_there(scenes):
    """The small teacher: a scene's circle at the right end of a picture twice as wide as high, and at the left end."""
    canvas = np.full((64, 128, 3), scenes[0].pixels[0, 0], dtype=np.uint8)
    y, x = np.mgrid[:64, :128]
    config = TeacherConfig(inversion="noise", timesteps=(51, 151, 301), map_size=32)
    teacher = Teacher(TEACHER, config)
    for center in (112, 16):
        pixels = canvas.copy()
        pixels[(y - 32) ** 2 + (x - center) ** 2 < 13**2] = (220, 40, 40)
        maps = teacher.word_maps(Image.fromarray(pixels), "a red circle")
        assert maps.crop == WHOLE
        row, column = np.unravel_index(maps["circle"].argmax(), (32, 32))
        assert abs((column + 0.5) / 32 - center / 128) < 0.12
        assert abs((row + 0.5) / 32 - 0.5) < 0.25


def test_the_crop_is_recorded():
    for fit, crop in (("crop", (0, 0.25, 1, 0.75)), ("pad", WHOLE), ("stretch", WHOLE)):
        teacher = Teacher(TEACHER, TeacherConfig(inversion="noise", timesteps=(51,), map_size=8, fit=fit))
        assert teacher.word_maps(picture(0, 96, 48), "a red circle").crop == pytest.approx(crop)


def test_maps_of_a_padded_picture_are_the_squares_middle():
    """As maps of the square that somebody padded beforehand."""
    settings = {"inversion_steps": 2, "diffusion_steps": 2}
    wide = picture(0, 128, 64)
    square = Image.new("RGB", (64, 64), (127, 127, 127))
    square.paste(wide.resize((64, 32), Image.Resampling.BICUBIC), (0, 16))
    teacher = Teacher(TEACHER, TeacherConfig(**settings, map_size=16, layers=("down_blocks.0",)))
    whole = teacher.word_maps(square, "a red circle").maps
    teacher.close()
    small = Teacher(TEACHER, TeacherConfig(**settings, map_size=8, layers=("down_blocks.0",)))
    own = small.word_maps(wide, "a red circle").maps
    # The square's rows 4 to 12 of 16, and every two columns, as antialiasing takes them together.
    weights = torch.zeros(8, 16)
    for n in range(8):
        for place in range(16):
            weights[n, place] = max(0.0, 1 - abs(place + 0.5 - (2 * n + 1)) / 2)
    weights /= weights.sum(1, keepdim=True)
    expected = torch.from_numpy(whole[:, 4:12]) @ weights.T
    np.testing.assert_allclose(own, expected.numpy(), rtol=0, atol=1e-5 * whole.max())
