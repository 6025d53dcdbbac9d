from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from lavender import images
from lavender.config import TeacherConfig, to_dict
from lavender.data.samples import Pair, read_pairs
from lavender.errors import DataError, TargetError
from lavender.extraction.extract import extract
from lavender.images import Picture
from lavender.miniworld import write_dataset
from lavender.targets.manifest import StoreConfig
from lavender.targets.store import TargetStore
from lavender.teachers.model import Teacher
from lavender.words import Caption

NOISE = TeacherConfig(inversion="noise", timesteps=(51, 301), map_size=16)


@pytest.fixture
def dataset(scenes, tmp_path):
    return write_dataset(scenes[:6], tmp_path / "data")


def maps_of(teacher, images, captions):
    return teacher.word_maps_of([*map(Picture.open, images)], [*map(Caption.of, captions)])


def test_extract_writes_a_store(teacher_folder, dataset, scenes, tmp_path):
    summary = extract(teacher_folder, read_pairs(dataset), tmp_path / "t", NOISE, progress=False)
    assert (summary.written, summary.present, summary.failed) == (6, 0, 0)
    store = TargetStore(tmp_path / "t")
    assert store.config == StoreConfig(map_size=16)
    assert store.source.items() >= to_dict(NOISE).items()
    assert store.source.keys() - to_dict(NOISE).keys() == {"model", "weights"}
    assert len(store) == 6
    direct = maps_of(Teacher(teacher_folder, NOISE), [s.image for s in scenes[:6]], [s.caption for s in scenes[:6]])[2]
    stored = store.checked("images/00002.png", scenes[2].image).word_maps
    np.testing.assert_array_equal(stored.maps, direct.maps.astype(np.float16))
    assert extract(teacher_folder, read_pairs(dataset), tmp_path / "t", NOISE, progress=False).present == 6


def test_a_picture_is_read_once_and_hashed_once(teacher_folder, dataset, tmp_path, monkeypatch):
    """Its noise, its target and a later run all need what only its bytes or its pixels say."""
    read, hashed = Counter(), []
    read_file, image_sha256 = images.read_file, images.image_sha256

    def reading(location, *rest):
        read[str(location)] += 1
        return read_file(location, *rest)

    def hashing(image):
        hashed.append(image_sha256(image))
        return hashed[-1]

    monkeypatch.setattr(images, "read_file", reading)
    monkeypatch.setattr(images, "image_sha256", hashing)
    pairs = read_pairs(dataset)
    extract(teacher_folder, pairs, tmp_path / "t", NOISE, progress=False)
    assert read == {str(pair.image): 1 for pair in pairs}
    store = TargetStore(tmp_path / "t")
    assert sorted(hashed) == sorted(store[sample_id].image_sha256 for sample_id in store)
    assert extract(teacher_folder, pairs, tmp_path / "t", NOISE, progress=False).present == len(pairs)
    assert read == {str(pair.image): 1 for pair in pairs}  # size and time are those of then: no byte is looked at
    extract(teacher_folder, pairs, tmp_path / "t", NOISE, rehash=True, progress=False)
    assert read == {str(pair.image): 2 for pair in pairs}  # the bytes are those of then: no pixel is looked at
    assert len(hashed) == len(pairs)


def test_bad_samples_are_skipped_and_listed(teacher_folder, dataset, tmp_path, capsys):
    (dataset.parent / "images/00001.png").write_bytes(b"not a picture")
    (dataset.parent / "images/00002.png").unlink()
    (dataset.parent / "images/00003.png").write_bytes(b"")
    pairs = [*read_pairs(dataset), Pair("empty", dataset.parent / "images/00000.png", " ... ")]
    summary = extract(teacher_folder, pairs, tmp_path / "t", NOISE, progress=False)
    assert (summary.written, summary.failed) == (3, 4)
    failed = TargetStore(tmp_path / "t").failed
    assert list(failed) == ["images/00001.png", "images/00002.png", "images/00003.png", "empty"]
    assert "no image at" in failed["images/00002.png"]
    assert "no words" in failed["empty"]
    assert "skipped images/00001.png" in capsys.readouterr().out


def test_what_failed_is_tried_again_alone(teacher_folder, dataset, tmp_path):
    lost = dataset.parent / "images/00002.png"
    picture = lost.read_bytes()
    lost.unlink()
    with pytest.raises(TargetError, match="no target store"):
        extract(teacher_folder, read_pairs(dataset), tmp_path / "t", NOISE, failed_only=True, progress=False)
    extract(teacher_folder, read_pairs(dataset), tmp_path / "t", NOISE, progress=False)
    lost.write_bytes(picture)
    summary = extract(teacher_folder, read_pairs(dataset), tmp_path / "t", NOISE, failed_only=True, progress=False)
    assert (summary.written, summary.present, summary.failed) == (1, 0, 0)
    assert len(TargetStore(tmp_path / "t")) == 6


def test_attention_that_is_not_finite_is_a_failure_and_no_map(teacher_folder, dataset, pipe, tmp_path):
    """As where half precision overflows: one picture's latents are not finite, its neighbors in the batch are stored."""
    encode, batches = pipe.vae.encode, []

    def overflowing(pixels):
        found = encode(pixels)
        if len(pixels) > 1:  # the teacher asks for one picture of its own before
            found.latent_dist.mean[1] = float("inf")
            batches.append(len(pixels))
        return found

    pipe.vae.encode = overflowing
    summary = extract(pipe, read_pairs(dataset), tmp_path / "t", NOISE, progress=False)
    assert (summary.written, summary.failed, batches) == (5, 1, [6])
    store = TargetStore(tmp_path / "t")
    assert "not finite in float32" in store.failed["images/00001.png"]
    plain = Teacher(teacher_folder, NOISE)
    pairs = read_pairs(dataset)[:3]
    direct = maps_of(plain, [pair.image for pair in pairs], [pair.caption for pair in pairs])[2]
    np.testing.assert_allclose(store["images/00002.png"].word_maps.maps, direct.maps, atol=1e-3)


def test_the_same_folder_with_another_config_is_refused(teacher_folder, dataset, tmp_path):
    extract(teacher_folder, read_pairs(dataset)[:1], tmp_path / "t", NOISE, progress=False)
    with pytest.raises(TargetError, match="timesteps"):
        extract(teacher_folder, read_pairs(dataset), tmp_path / "t", TeacherConfig(inversion="noise", map_size=16), progress=False)


def test_a_changed_picture_or_caption_is_refused_with_a_remedy(teacher_folder, dataset, scenes, tmp_path):
    extract(teacher_folder, read_pairs(dataset)[:2], tmp_path / "t", NOISE, progress=False)
    pairs = read_pairs(dataset)[:2]
    with pytest.raises(TargetError, match=r"another caption for sample 'images/00001\.png'"):
        extract(teacher_folder, [pairs[0], Pair(pairs[1].id, pairs[1].image, "A cat.")], tmp_path / "t", NOISE, progress=False)
    scenes[5].image.save(dataset.parent / "images/00000.png")
    with pytest.raises(TargetError, match=r"another picture for sample 'images/00000.png'; give .* a new folder"):
        extract(teacher_folder, pairs, tmp_path / "t", NOISE, progress=False)


def test_pictures_of_every_mode_look_alike(tmp_path):
    from PIL import Image

    from lavender.images import load_image

    ramp = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    wanted = np.repeat(ramp[..., None], 3, axis=2)
    pictures = {
        "grey.png": Image.fromarray(ramp),
        "rgba.png": Image.fromarray(np.dstack([wanted, np.full((8, 8), 255, np.uint8)])),
        "palette.png": Image.fromarray(wanted).quantize(64),
        "deep.png": Image.fromarray(ramp.astype(np.uint16) * 257),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        loaded = np.asarray(load_image(tmp_path / name)).astype(int)
        assert np.abs(loaded - wanted).max() <= (3 if name == "palette.png" else 0), name
    rotated = Image.fromarray(wanted)
    exif = rotated.getexif()
    exif[0x0112] = 6  # a camera held upright: turn a quarter clockwise to see it
    rotated.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "turned.png")), np.rot90(wanted, -1))
    with pytest.raises(DataError, match="32 bits"):
        load_image(Image.fromarray(ramp.astype(np.float32)))


def test_half_a_surrogate_pair_is_skipped(teacher_folder, dataset, tmp_path):
    dataset.write_text('{"image": "images/00000.png", "caption": "a red \\ud83d ring"}')
    assert extract(teacher_folder, read_pairs(dataset), tmp_path / "t", NOISE, progress=False).failed == 1
    [failed] = json.loads((tmp_path / "t/manifest.json").read_text())["failed"]
    assert "no valid Unicode" in failed["reason"]


def test_json_lines_may_hold_line_separators_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"image": "a.png", "caption": "a\u2028cat"}\r\n'.encode())
    assert [p.caption for p in read_pairs(path)] == ["a\u2028cat"]


@pytest.mark.full
def test_kill_9_and_the_same_command_end_as_an_undisturbed_run(teacher_folder, scenes, tmp_path):
    data = write_dataset(scenes[:12], tmp_path / "data")
    command = [
        *(sys.executable, "-m", "lavender", "extract", "--model", str(teacher_folder), "--data", str(data)),
        *("--inversion", "noise", "--timesteps", "51,301", "--map-size", "16", "--batch-size", "1", "--out"),
    ]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    kills = 0
    for _ in range(3):
        process = subprocess.Popen([*command, str(tmp_path / "t")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(list((tmp_path / "t").glob("pending/*.parquet")))
        while process.poll() is None and len(list((tmp_path / "t").glob("pending/*.parquet"))) < before + 2:
            time.sleep(0.005)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 3
    subprocess.run([*command, str(tmp_path / "t")], check=True, capture_output=True)
    for name in ("data-00000.parquet", "manifest.json"):
        assert (tmp_path / "t" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_read_pairs_from_an_image_folder(scenes, tmp_path):
    (tmp_path / "f/sub").mkdir(parents=True)
    lines = []
    for i, scene in enumerate(scenes[:3]):
        scene.image.save(tmp_path / f"f/sub/{i}.png")
        lines.append(json.dumps({"file_name": f"sub/{i}.png", "text": scene.caption}))
    (tmp_path / "f/metadata.jsonl").write_text("\n".join(lines))
    pairs = read_pairs(tmp_path / "f")
    assert [(p.id, p.caption) for p in pairs] == [(f"sub/{i}.png", s.caption) for i, s in enumerate(scenes[:3])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("{", "line 1 is no JSON"),
        ("[1]", "no JSON object"),
        ('{"image": "a.png"}', "line 1: no caption"),
        ('{"caption": "x"}', "line 1: no image"),
        ('{"image": "a.png", "caption": "x"}\n{"image": "a.png", "caption": "y"}', "twice"),
    ],
)
def test_wrong_json_lines_are_named(tmp_path, text, message):
    path = tmp_path / "captions.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_pairs(path)


def test_missing_data_is_named(tmp_path):
    with pytest.raises(DataError, match="no data at"):
        read_pairs(tmp_path / "nothing.jsonl")
