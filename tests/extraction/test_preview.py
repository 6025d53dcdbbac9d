from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavender.config import ExtractionConfig, TeacherConfig
from lavender.data.samples import Pair
from lavender.data.sources import BadPair
from lavender.errors import DataError, TargetError
from lavender.extraction.preview import PICTURES_SHOWN, Preview, preview
from lavender.miniworld import write_dataset

NOISE = TeacherConfig(inversion="noise", timesteps=(51,), map_size=8)


@pytest.mark.parametrize(
    ("seconds", "num_bytes", "devices", "one", "whole"),
    [
        (0.0421, 900, 1, "0.0421 s", "2.1 s on one device, 43.9 KiB"),
        (1.5, 20_000, 1, "1.5 s on one device, 19.5 KiB", "1.25 min on one device, 977 KiB"),
        (60, 3e6, 2, "1 min on one device, 2.86 MiB", "25 min on 2 devices, 143 MiB"),
        (600, 1e9, 1, "10 min", "8.33 h on one device, 46.6 GiB"),
        (86400, 1e12, 1, "24 h", "50 days on one device, 45.5 TiB"),
    ],
)
def test_costs_are_in_units_that_suit_them(seconds, num_bytes, devices, one, whole):
    lines = str(Preview(Path("p.png"), (("a", "no words"),), seconds, num_bytes, 50, devices)).splitlines()
    assert lines[0] == "skipped a: no words"
    assert one in lines[2]
    assert lines[3].endswith("about " + whole)


def test_an_unknown_number_of_pictures():
    assert "1000 pictures: about 16.7 min" in str(Preview(Path("p.png"), (), 1, 1024, None, 1))


def test_awkward_pictures_and_captions(pipe, tmp_path):
    """One word; words without a map; letters that no font has; what looks like a formula; a picture of one line."""
    picture = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    pairs = [
        Pair("one", picture, "ring"),
        Pair("long", picture, "a red ring " * 40),
        Pair("$x_$", picture, r"$\frac$ 一只 חתול 😀 costs"),
        Pair("line", picture.resize((1000, 1)), "a line"),
        Pair("point", picture.resize((1, 1)), "a point"),
    ]
    for fit in ("pad", "crop"):
        config = TeacherConfig(inversion="noise", timesteps=(51,), map_size=8, long_captions="truncate", fit=fit)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found = preview(pipe, pairs, tmp_path / fit, 5, config)
        assert not found.failures
        assert found.num_pictures == 5
        assert found.seconds > 0
        assert np.asarray(Image.open(found.path)).std() > 0


def test_one_picture_of_one_word(pipe, tmp_path):
    picture = Image.fromarray(np.zeros((20, 20, 3), np.uint8))
    found = preview(pipe, [Pair("one", picture, "ring")], tmp_path, 3, NOISE)
    width, height = Image.open(found.path).size
    assert width < 2 * height  # the picture and one map
    assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]


@pytest.mark.parametrize("most", [3, pytest.param(PICTURES_SHOWN, marks=pytest.mark.full)])
def test_more_pictures_than_can_be_drawn(pipe, tmp_path, monkeypatch, most):
    monkeypatch.setattr("lavender.extraction.preview.PICTURES_SHOWN", most)
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    pairs = [Pair(str(n), picture, "ring") for n in range(most + 1)]
    found = preview(pipe, pairs, tmp_path, len(pairs), NOISE, ExtractionConfig(batch_size=32))
    assert found.path.exists()


def test_what_cannot_be_used_is_told(pipe, tmp_path):
    good = Pair("good", Image.new("RGB", (8, 8)), "a ring")
    pairs = [BadPair("bad", "it is bad"), Pair("empty", Image.new("RGB", (8, 8)), "..."), good]
    assert dict(preview(pipe, pairs, tmp_path, 3, NOISE).failures).keys() == {"bad", "empty"}
    with pytest.raises(DataError, match=r"none of the first 2 pictures can be used \(bad: it is bad; empty: .* has no words\)"):
        preview(pipe, pairs, tmp_path, 2, NOISE)
    with pytest.raises(DataError, match="there are none"):
        preview(pipe, [], tmp_path, 2, NOISE)


def test_the_command(teacher_folder, scenes, tmp_path):
    data = write_dataset(scenes[:4], tmp_path / "data")
    command = [
        *(sys.executable, "-m", "lavender", "extract", "--model", str(teacher_folder), "--data", str(data), "--preview", "2"),
        *("--inversion", "noise", "--timesteps", "51", "--map-size", "8", "--out", str(tmp_path / "t")),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "preview.png: look at it before the long run" in result.stdout
    assert "all 4: about " in result.stdout
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["preview.png"]


def test_a_full_disk_is_named(pipe, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    pairs = [Pair("one", Image.new("RGB", (20, 30)), "a ring")]
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TargetError, match=r"^cannot write to .*/out: No space left on device.* run the same command again"):
        preview(pipe, pairs, tmp_path / "out", 1, NOISE)
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.undo()
    assert preview(pipe, pairs, tmp_path / "out", 1, NOISE).path.is_file()
