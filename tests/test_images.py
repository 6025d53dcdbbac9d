"""Every picture comes out upright, RGB, eight bits, with the colors that one sees; what is no sound picture is told."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lavender.errors import DataError
from lavender.images import StoredImage, image_sha256, load_image, read_bytes


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(source) -> np.ndarray:
    loaded = load_image(source)
    assert loaded.mode == "RGB"
    return np.asarray(loaded)


def pixel(source) -> tuple[int, ...]:
    return tuple(int(value) for value in pixels(source)[0, 0])


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_the_same_pixels_from_wherever_they_are(tmp_path, kind):
    import fsspec

    data = encoded(NOISE, kind, **({"lossless": True} if kind == "WEBP" else {}))
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "inside").write_bytes(b"before" + data + b"behind")
    memory = fsspec.filesystem("memory")
    memory.pipe("/pictures/a", data)
    memory.pipe("/pictures/inside", b"before" + data + b"behind")
    sources = [
        tmp_path / "a",
        str(tmp_path / "a"),
        data,
        f"file://{tmp_path}/a",
        "memory://pictures/a",
        StoredImage(str(tmp_path / "inside"), 6, len(data)),
        StoredImage("memory://pictures/inside", 6, len(data)),
    ]
    for source in sources:
        assert read_bytes(source) == data
        np.testing.assert_array_equal(pixels(source), np.asarray(NOISE))
        assert image_sha256(load_image(source)) == image_sha256(NOISE)
    assert read_bytes(NOISE) is None


def test_transparent_pictures_lie_on_white():
    """The hidden color shows in none of them: half of red over white is (255, 127, 127)."""
    half, none = Image.new("RGBA", (4, 4), (255, 0, 0, 128)), Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert pixel(encoded(half)) == pixel(half) == (255, 127, 127)
    assert pixel(encoded(none)) == pixel(none) == (255, 255, 255)
    assert pixel(encoded(none, "WEBP", lossless=True, exact=True)) == (255, 255, 255)
    assert pixel(encoded(Image.new("LA", (4, 4), (0, 51)))) == (204, 204, 204)
    grey = Image.new("L", (4, 4), 7)
    assert pixel(encoded(grey, transparency=7)) == (255, 255, 255)
    assert pixel(encoded(grey, transparency=8)) == (7, 7, 7)
    assert pixel(encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    assert pixel(encoded(palette)) == (0, 0, 255)
    assert pixel(encoded(palette, transparency=1)) == (255, 255, 255)
    assert pixel(encoded(palette, transparency=bytes([255, 128]))) == (127, 127, 255)
    assert pixel(encoded(palette, "GIF", transparency=1)) == (255, 255, 255)


@pytest.mark.parametrize(("kind", "options"), [("TIFF", {}), ("JPEG", {"quality": 100})])
def test_printers_colors(kind, options):
    for inks, wanted in (((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0), ((0, 0, 0, 102), 153)):
        np.testing.assert_allclose(pixel(encoded(Image.new("CMYK", (8, 8), inks), kind, **options)), (wanted,) * 3, atol=1)
    assert pixel(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF")) == (0, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_range(kind):
    ramp = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(ramp.astype(np.uint16) * 257), kind))[..., 1], ramp)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_cameras_held_any_way(kind, orientation):
    """Three quarters of a picture in colors of their own, as they were stored and as they are seen."""
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:16, :24, 0] = stored[:16, 24:, 1] = stored[16:, :24, 2] = 255
    seen = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(stored)
    options = {"exif": exif} | (
        {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    )
    loaded = load_image(encoded(image, kind, **options))
    np.testing.assert_allclose(np.asarray(loaded).astype(int), seen[orientation], atol=6 if kind == "JPEG" else 0)
    again = Image.open(io.BytesIO(encoded(loaded)))
    assert image_sha256(again) == image_sha256(loaded), "it is turned once"


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert pixel(data) == (255, 0, 0)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it is this large and holds next to nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")


FAULTS = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "text": (b"no picture at all", "is no picture in a format that PIL knows"),
    "pickle": (b"\x80\x04cposix\nsystem\n(S'false'\ntR.", "is no picture"),
    "truncated jpeg": (encoded(NOISE.resize((200, 200)), "JPEG")[:2000], "truncated"),
    "truncated png": (encoded(NOISE.resize((200, 200)))[:2000], "truncated"),
    "header alone": (encoded(NOISE)[:40], "cannot read the image"),
    "bomb": (png_of_size(40000, 40000), "1600000000 pixels.*PIL.Image.MAX_IMAGE_PIXELS"),
    "large": (png_of_size(10000, 10000), r"100000000 pixels \(10000 x 10000\), the limit is \d+.*PIL.Image.MAX_IMAGE_PIXELS"),
    "no width": (png_of_size(0, 10), "no pixels|cannot read"),
    "floats": (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "32 bits"),
    "program": (encoded(NOISE, "EPS"), "PostScript program"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_the_picture_and_what_is_wrong(tmp_path, name):
    data, message = FAULTS[name]
    path = tmp_path / "the one.png"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        load_image(path)
    assert "the one.png" in str(caught.value)
    with pytest.raises(DataError, match=message):
        load_image(data)


def test_missing_pictures_are_named(tmp_path):
    (tmp_path / "tar").write_bytes(b"0123456789")
    for source, message in (
        (tmp_path / "nowhere.png", "there is no image at .*nowhere.png"),
        ("memory://nowhere/a.png", "there is no image at memory://nowhere/a.png"),
        (StoredImage(str(tmp_path / "nowhere.tar"), 0, 4), "there is no image at .*nowhere.tar"),
        (StoredImage(str(tmp_path / "tar"), 8, 4), "truncated: the file ends after 2 of its 4 bytes"),
        (tmp_path, "cannot read the image"),
        ("a\0b", "cannot read the image"),
        (7, "an image is a int; expected a path"),
        (Image.new("RGB", (0, 5)), "no pixels: it is 0 wide and 5 high"),
    ):
        with pytest.raises(DataError, match=message):
            load_image(source)


def test_the_limit_of_pixels_is_the_users(monkeypatch):
    data = encoded(Image.new("RGB", (10, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(DataError, match=r"100 pixels \(10 x 10\), the limit is 99"):
        load_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert pixel(data) == (0, 0, 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert pixel(data) == (0, 0, 0)


def test_pictures_that_are_taken_leave_no_warnings_and_the_filters_as_they_were():
    damaged = bytearray(
        encoded(NOISE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05" + b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" + b"\xff" * 20)
    )
    palette = Image.new("P", (4, 4), 1)
    sources = [bytes(damaged), encoded(palette, transparency=bytes([255, 128]))]
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for source in sources:
            load_image(source)
    assert [str(own.message) for own in caught] == []
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load_image, sources * 50))
    assert list(warnings.filters) == before


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_whatever_is_damaged_is_a_picture_or_told(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]))
    sound = bytearray(encoded(NOISE, kind))
    for _ in range(data.draw(st.integers(1, 6))):
        sound[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(sound[: data.draw(st.integers(0, len(sound)))])
    with contextlib.suppress(DataError):
        assert load_image(damaged).mode == "RGB"
