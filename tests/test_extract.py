from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from lavender.config import TeacherConfig
from lavender.data import Pair, read_pairs
from lavender.errors import DataError, ModelError, TargetError
from lavender.families.prompts import word_weights
from lavender.miniworld import write_dataset
from lavender.targets import TargetStore
from lavender.teacher.extract import Teacher, extract
from lavender.words import words_of

NOISE = TeacherConfig(inversion="noise", timesteps=(51, 301), map_size=16)


@pytest.fixture
def dataset(scenes, tmp_path):
    return write_dataset(scenes[:6], tmp_path / "data")


def test_maps_follow_from_the_picture_and_its_words(teacher_folder, scenes):
    teacher = Teacher(teacher_folder, NOISE)
    maps = teacher.word_maps(scenes[0].image, scenes[0].caption)
    again = teacher.word_maps(scenes[0].image, scenes[0].caption)
    other = teacher.word_maps(scenes[1].image, scenes[0].caption)
    assert maps.maps.shape == (len(maps.words), 16, 16)
    np.testing.assert_array_equal(maps.maps, again.maps)
    assert not np.array_equal(maps.maps, other.maps)


def test_maps_equal_an_explicit_computation(teacher_folder, scenes):
    """Noise at one timestep, written out: encode, noise, one forward, attention by diffusers' own scores, mean."""
    from diffusers import DDPMScheduler

    from lavender.targets import image_sha256

    from .test_teacher_patch import explicit_maps

    config = TeacherConfig(inversion="noise", timesteps=(151,), map_size=16, seed=5)
    teacher = Teacher(teacher_folder, config)
    scene, pipe = scenes[0], teacher.pipe
    ours = teacher.word_maps(scene.image, scene.caption)
    with torch.no_grad():
        pixels = torch.from_numpy(scene.pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        seed = int(image_sha256(scene.image)[:15], 16) ^ 5
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        noisy = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(latents, noise, torch.tensor([151]))
        ids = pipe.tokenizer(scene.caption, padding="max_length", return_tensors="pt").input_ids
        tokens = pipe.tokenizer.convert_ids_to_tokens(ids[0])
        weights = torch.zeros(1, len(ours.words), ids.shape[1])
        for w, word in enumerate(ours.words):
            # Every word of the small world is one token, and repeated words come in order.
            seen = [v.text.lower() for v in ours.words[:w]].count(word.text.lower())
            places = [i for i, t in enumerate(tokens) if t == word.text.lower() + "</w>"]
            weights[0, w, places[seen]] = 1
        inputs = {"sample": noisy, "timestep": torch.tensor(151), "encoder_hidden_states": pipe.text_encoder(ids)[0]}
        layers = explicit_maps(pipe.unet, inputs, weights)
    resized = []
    for maps in layers.values():
        side = int(maps.shape[-1] ** 0.5)
        own = maps.mean(1).unflatten(-1, (side, side))
        resized.append(torch.nn.functional.interpolate(own, (16, 16), mode="bilinear", antialias=True))
    np.testing.assert_allclose(ours.maps, torch.stack(resized).mean(0)[0].numpy(), rtol=0, atol=1e-6)


def test_ddim_inversion_returns_to_the_picture(scenes):
    """Invert and denoise again: the latent comes back, and the more steps, the more exactly."""
    from lavender.miniworld import TEACHER
    from lavender.teacher.invert import look_at

    teacher = Teacher(TEACHER, NOISE)
    start = teacher._encode(scenes[0].image)
    embeddings, _ = teacher.pipe.encode_prompt(scenes[0].caption, "cpu", 1, False)
    seen = []

    def forward(latents, timestep):
        seen.append((int(timestep), latents))
        with torch.no_grad():
            return teacher.pipe.unet(latents, timestep, embeddings).sample

    errors = []
    for steps in (5, 50):
        config = TeacherConfig(inversion_steps=steps, diffusion_steps=steps)
        seen.clear()
        look_at(teacher.pipe.scheduler, start, config, forward, forward, torch.Generator())
        last_timestep, last = seen[-1]
        # The last look is at the least noisy level; its distance to the start is what the way there and back cost.
        assert last_timestep <= 1 + 1000 // steps
        errors.append(float((last - start).norm() / start.norm()))
    print(errors)
    assert errors[1] < 0.1
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_both_kinds_of_prediction_lead_to_noise_and_back(kind):
    """A denoiser that knows the picture, asked for the noise or for the velocity (Salimans and Ho 2022)."""
    from lavender.miniworld.teacher import make_scheduler
    from lavender.teacher.invert import look_at

    torch.manual_seed(0)
    picture, start = torch.randn(2, 1, 4, 8, 8)
    start = picture + 0.05 * start
    scheduler = make_scheduler()
    scheduler.register_to_config(prediction_type=kind)
    walk = []

    def forward(noisy, timestep):
        walk.append(noisy)
        signal, sigma = scheduler.alphas_cumprod[timestep].sqrt(), (1 - scheduler.alphas_cumprod[timestep]).sqrt()
        noise = (noisy - signal * picture) / sigma
        return noise if kind == "epsilon" else signal * noise - sigma * picture

    look_at(scheduler, start, TeacherConfig(inversion_steps=20, diffusion_steps=20), forward, forward, torch.Generator())
    assert len(walk) == 40
    distances = [float((latents - picture).norm() / picture.norm()) for latents in walk]
    assert distances[20] > 0.5, "halfway, most of the picture is gone"
    assert distances[-1] < 0.1, "at the end it is back"


def test_few_inversion_steps_start_denoising_where_they_stopped(teacher_folder, scenes):
    teacher = Teacher(teacher_folder, TeacherConfig(inversion_steps=5, diffusion_steps=10, map_size=8))
    timesteps = []
    teacher.pipe.unet.register_forward_pre_hook(lambda m, a: timesteps.append(int(a[1])))
    teacher.word_maps(scenes[0].image, scenes[0].caption)
    assert timesteps == [1, 201, 401, 601, 801, 801, 701, 601, 501, 401, 301, 201, 101, 1]


def test_guidance_reads_the_conditional_half(teacher_folder, scenes):
    """At guidance 1 + tiny the latents hardly change, so the maps must be those without guidance."""
    plain = Teacher(teacher_folder, TeacherConfig(map_size=8)).word_maps(scenes[0].image, scenes[0].caption)
    guided = Teacher(teacher_folder, TeacherConfig(map_size=8, guidance_scale=1.0001)).word_maps(scenes[0].image, scenes[0].caption)
    np.testing.assert_allclose(guided.maps, plain.maps, atol=1e-4)


def test_words_beyond_the_window_have_no_map(teacher_folder, scenes):
    teacher = Teacher(teacher_folder, NOISE)
    maps = teacher.word_maps(scenes[0].image, "a red circle " * 20)
    missing = np.isnan(maps.maps).all(axis=(1, 2))
    assert missing.sum() == 60 - 30
    assert not missing[:30].any()


def test_a_word_of_several_tokens_has_their_mean(teacher_folder, scenes):
    teacher = Teacher(teacher_folder, NOISE)
    caption = "a zebra."
    tokens = teacher.pipe.tokenizer.tokenize(caption)
    assert len(tokens) > 3, "zebra is meant to be split"
    weights, _ = word_weights(teacher.pipe, [caption], [words_of(caption)], 32, {})
    assert weights[0, 1].count_nonzero() == len(tokens) - 2
    assert weights[0, 1].sum() == pytest.approx(1)


def test_extract_writes_a_store(teacher_folder, dataset, scenes, tmp_path):
    summary = extract(teacher_folder, read_pairs(dataset), tmp_path / "t", NOISE, progress=False)
    assert (summary.written, summary.present, summary.failed) == (6, 0, 0)
    store = TargetStore(tmp_path / "t")
    assert store.config == NOISE
    assert len(store) == 6
    direct = Teacher(teacher_folder, NOISE).word_maps(scenes[2].image, scenes[2].caption)
    stored = store.checked("images/00002.png", scenes[2].image).word_maps
    np.testing.assert_array_equal(stored.maps, direct.maps.astype(np.float16))
    assert extract(teacher_folder, read_pairs(dataset), tmp_path / "t", NOISE, progress=False).present == 6


def test_bad_samples_are_skipped_and_listed(teacher_folder, dataset, tmp_path, capsys):
    (dataset.parent / "images/00001.png").write_bytes(b"not a picture")
    (dataset.parent / "images/00002.png").unlink()
    (dataset.parent / "images/00003.png").write_bytes(b"")
    pairs = [*read_pairs(dataset), Pair("empty", dataset.parent / "images/00000.png", " ... ")]
    summary = extract(teacher_folder, pairs, tmp_path / "t", NOISE, progress=False)
    assert (summary.written, summary.failed) == (3, 4)
    failed = [json.loads(line) for line in (tmp_path / "t/failed.jsonl").read_text().splitlines()]
    assert [f["id"] for f in failed] == ["images/00001.png", "images/00002.png", "images/00003.png", "empty"]
    assert "no image at" in failed[1]["reason"]
    assert "no words" in failed[3]["reason"]
    assert "skipped images/00001.png" in capsys.readouterr().out


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


def test_the_fingerprint_follows_every_weight_and_the_schedule(pipe):
    from lavender.teacher.extract import _weights_fingerprint

    before = _weights_fingerprint(pipe)
    weight = pipe.unet.mid_block.resnets[0].conv1.weight
    with torch.no_grad():
        weight[-1, -1, -1, -1] += 1e-3
    changed = _weights_fingerprint(pipe)
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    assert len({before, changed, _weights_fingerprint(pipe)}) == 3


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
    assert "no valid Unicode" in (tmp_path / "t/failed.jsonl").read_text()


def test_json_lines_may_hold_line_separators_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"image": "a.png", "caption": "a\u2028cat"}\r\n'.encode())
    assert [p.caption for p in read_pairs(path)] == ["a\u2028cat"]


def test_models_that_are_no_teacher_are_named(student_folder, tmp_path):
    for folder in (tmp_path / "nowhere", student_folder):
        with pytest.raises(ModelError, match="Stable Diffusion"):
            Teacher(folder, NOISE)


@pytest.mark.slow
def test_kill_9_and_the_same_command_end_as_an_undisturbed_run(teacher_folder, scenes, tmp_path):
    data = write_dataset(scenes[:12], tmp_path / "data")
    command = [
        *(sys.executable, "-m", "lavender", "extract", "--model", str(teacher_folder), "--data", str(data)),
        *("--inversion", "noise", "--timesteps", "51,301", "--map-size", "16", "--out"),
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
