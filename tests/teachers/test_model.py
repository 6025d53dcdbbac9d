from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lavender.config import TeacherConfig
from lavender.errors import ModelError
from lavender.teachers.inversion import read_maps
from lavender.teachers.model import Teacher
from lavender.teachers.prompts import word_weights
from lavender.words import words_of

NOISE = TeacherConfig(inversion="noise", timesteps=(51, 301), map_size=16)


class Denoiser:
    """Stands in for a bound denoiser: a function of latents and timestep, and a list of its calls."""

    flow_matching = False

    def __init__(self, function, scheduler):
        self.function, self.scheduler = function, scheduler
        self.calls = []

    def predict(self, latents, timestep):
        self.calls.append((int(timestep), latents))
        with torch.no_grad():
            return self.function(latents, timestep)

    def record(self, latents, timestep):
        return self.predict(latents, timestep)

    def predict_guided(self, latents, timestep, record):
        return self.predict(latents, timestep)


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

    from lavender.images import image_sha256

    from .test_patch import explicit_maps

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
    from lavender.teachers.framing import frame

    teacher = Teacher(TEACHER, NOISE)
    with torch.no_grad():
        start = teacher.family.encode(frame(scenes[0].image, 64, "pad").pixels[None])
    embeddings, _ = teacher.pipe.encode_prompt(scenes[0].caption, "cpu", 1, False)
    errors = []
    for steps in (5, 50):
        config = TeacherConfig(inversion_steps=steps, diffusion_steps=steps)
        denoiser = Denoiser(lambda latents, t: teacher.pipe.unet(latents, t, embeddings).sample, teacher.pipe.scheduler)
        _, last = read_maps(denoiser, start, config, lambda: None)
        errors.append(float((last - start).norm() / start.norm()))
    print(errors)
    assert errors[1] < 0.1
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_both_kinds_of_prediction_lead_to_noise_and_back(kind):
    """A denoiser that knows the picture, asked for the noise or for the velocity (Salimans and Ho 2022)."""
    from recipes.teacher import make_scheduler

    torch.manual_seed(0)
    picture, start = torch.randn(2, 1, 4, 8, 8)
    start = picture + 0.05 * start
    scheduler = make_scheduler()
    scheduler.register_to_config(prediction_type=kind)

    def forward(noisy, timestep):
        signal, sigma = scheduler.alphas_cumprod[timestep].sqrt(), (1 - scheduler.alphas_cumprod[timestep]).sqrt()
        noise = (noisy - signal * picture) / sigma
        return noise if kind == "epsilon" else signal * noise - sigma * picture

    denoiser = Denoiser(forward, scheduler)
    read_maps(denoiser, start, TeacherConfig(inversion_steps=20, diffusion_steps=20), lambda: None)
    assert len(denoiser.calls) == 40
    distances = [float((latents - picture).norm() / picture.norm()) for _, latents in denoiser.calls]
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


def test_nothing_drops_out_while_maps_are_read(pipe, scenes):
    """PEFT's dropout trains in a pipeline that does not; whoever trains the model goes on with it."""
    from peft import LoraConfig

    torch.manual_seed(0)
    adapter = LoraConfig(r=2, target_modules=["to_q", "to_k"], lora_dropout=0.5, init_lora_weights=False)
    pipe.unet.add_adapter(adapter)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False))
    maps, identities = [], []
    for train in (False, True):
        pipe.unet.mid_block.train(train)
        parts = [module for part in (pipe.unet, pipe.text_encoder, pipe.vae) for module in part.modules()]
        flags = [module.training for module in parts]
        assert any(flags)
        teacher = Teacher(pipe, NOISE)
        maps += [teacher.word_maps(scenes[0].image, scenes[0].caption).maps for _ in range(2)]
        identities.append(teacher.identity)
        teacher.close()
        assert [module.training for module in parts] == flags
    pipe.unet.eval()
    pipe.text_encoder.eval()
    maps.append(Teacher(pipe, NOISE).word_maps(scenes[0].image, scenes[0].caption).maps)
    for values in maps[1:]:
        np.testing.assert_array_equal(values, maps[0])
    assert identities[0] == identities[1]


def test_words_beyond_the_window_have_no_map(teacher_folder, scenes):
    teacher = Teacher(teacher_folder, replace(NOISE, long_captions="truncate"))
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


def test_the_fingerprint_follows_every_weight_and_the_schedule(pipe):
    from lavender.teachers.model import _weights_fingerprint

    before = _weights_fingerprint(pipe)
    weight = pipe.unet.mid_block.resnets[0].conv1.weight
    with torch.no_grad():
        weight[-1, -1, -1, -1] += 1e-3
    changed = _weights_fingerprint(pipe)
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    assert len({before, changed, _weights_fingerprint(pipe)}) == 3


def test_models_that_are_no_teacher_are_named(student_folder, tmp_path):
    for folder in (tmp_path / "nowhere", student_folder):
        with pytest.raises(ModelError, match="StableDiffusionPipeline"):
            Teacher(folder, NOISE)


def test_the_old_name_of_flow_matching_warns():
    from lavender.teachers.families import TeacherFamily

    with pytest.warns(FutureWarning, match=r"TeacherFamily\.flows is deprecated; use TeacherFamily\.flow_matching"):

        class Mine(TeacherFamily):
            flows = True

    assert Mine.flow_matching
