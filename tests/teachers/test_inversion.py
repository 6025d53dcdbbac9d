"""From pictures to noisy latents and back: formulas, exactness, and how well the pictures come back."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from lavender.config import TeacherConfig
from lavender.images import Picture
from lavender.miniworld import TEACHER
from lavender.teachers.framing import frame
from lavender.teachers.inversion import read_maps
from lavender.teachers.model import Teacher, _frozen
from lavender.words import Caption, words_of
from recipes.teacher import make_scheduler

from .explicit import NAMES, SIDE, built, forwards_of, picture

CAPTION = "a cat in a red hat"
NOISE = TeacherConfig(inversion="noise", timesteps=(51, 301), image_size=SIDE, map_size=8)
DDIM = TeacherConfig(inversion="ddim", inversion_steps=2, diffusion_steps=4, image_size=SIDE, map_size=8)
FLOW = replace(DDIM, inversion="flow")


class Stub:
    """Stands in for a bound denoiser: predictions are functions of latents, timestep and the empty caption's embedding."""

    flow_matching = False

    def __init__(self, function, guidance_scale=1.0, empty=None, levels=None):
        self.function, self.guidance_scale, self.start, self.levels = function, guidance_scale, empty, levels
        self.scheduler = make_scheduler()
        self.fitted = []

    def predict(self, latents, timestep):
        return self.function(latents, timestep)

    def record(self, latents, timestep):
        return self.predict(latents, timestep)

    def predict_guided(self, latents, timestep, record):
        return self.predict(latents, timestep)

    def empty(self):
        return self.start

    def guide(self, unconditional, conditional):
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def predict_for(self, embeddings, latents, timestep):
        self.fitted.append((int(timestep), embeddings.detach().clone()))
        return self.function(latents, timestep) + embeddings.mean(dim=1)[:, :, None, None]

    def sigmas(self, num_steps, latents):
        return self.levels or torch.linspace(1, 0, num_steps + 1).tolist()


def there_and_back(teacher, config, images, captions):
    """(start, noisiest, last) latents of the teacher's way."""
    passages = [teacher._passage(n, caption, words_of(caption)) for n, caption in enumerate(captions)]
    with torch.no_grad(), _frozen(teacher.family.denoiser):
        start = teacher.family.encode(torch.stack([frame(image, teacher.side, "pad").pixels for image in images])).float()
        return start, *read_maps(teacher.bind(passages), start, config, lambda: torch.zeros_like(start))


def decibels(teacher, start, last):
    """PSNR of every decoded picture against what the autoencoder alone makes of it; pixels reach from -1 to 1."""
    with torch.no_grad():
        error = (teacher.family.decode(last) - teacher.family.decode(start)).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error)


def test_fifty_steps_of_ddim_bring_the_pictures_back(scenes):
    chosen = scenes[:4]
    found = {}
    for steps in (5, 50):
        config = TeacherConfig(inversion_steps=steps, diffusion_steps=steps)
        teacher = Teacher(TEACHER, config)
        start, noisiest, last = there_and_back(teacher, config, [s.image for s in chosen], [s.caption for s in chosen])
        found[steps] = decibels(teacher, start, last)
        if steps == 50:
            assert decibels(teacher, start, noisiest).max() < 20, "the picture is gone on the way"
    print("ddim, no guidance, dB:", {steps: [round(v, 1) for v in own.tolist()] for steps, own in found.items()})
    assert found[50].mean() >= 30
    assert (found[50] > found[5]).all()


@pytest.mark.full
def test_null_text_makes_guidance_return_to_the_picture(scenes):
    chosen = scenes[:2]
    found = {}
    for inversion in ("ddim", "null_text"):
        config = TeacherConfig(inversion=inversion, inversion_steps=25, diffusion_steps=25, guidance_scale=7.5)
        teacher = Teacher(TEACHER, config)
        start, _, last = there_and_back(teacher, config, [s.image for s in chosen], [s.caption for s in chosen])
        found[inversion] = decibels(teacher, start, last)
    print("guidance 7.5, dB:", {name: [round(v, 1) for v in own.tolist()] for name, own in found.items()})
    assert (found["null_text"] > found["ddim"]).all()
    assert found["null_text"].mean() > found["ddim"].mean() + 5


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", ["sd", "sd v", "sdxl", "pixart"])
def test_every_latent_follows_from_the_prediction_before(name, guidance):
    """DDIM by hand (Song et al. 2021, equation 12 without noise), over the denoiser's own inputs and outputs."""
    pipe = built(name)
    teacher = Teacher(pipe, replace(DDIM, inversion_steps=4, guidance_scale=guidance))
    outputs = []
    teacher.family.denoiser.register_forward_hook(lambda _m, _a, output: outputs.append(output.sample.double()))
    with forwards_of(teacher.family.denoiser) as forwards:
        teacher.word_maps(picture(0), CAPTION)
    velocity = pipe.scheduler.config.prediction_type == "v_prediction"
    alphas = pipe.scheduler.alphas_cumprod.double()
    last_alpha = alphas[0] if name in ("sd", "sd v") else torch.ones(())  # what `set_alpha_to_one` says of the last step

    def level(timestep):
        alpha = alphas[timestep] if timestep >= 0 else last_alpha
        return alpha.sqrt(), (1 - alpha).sqrt()

    def moved(latents, output, at, start, end):
        """`output` was predicted at timestep `at`; the latents go from `start` to `end`."""
        if len(output) == 2:
            output = output[:1] + guidance * (output[1:] - output[:1])
        output = output[:, : latents.shape[1]]
        (signal, sigma), (new_signal, new_sigma) = level(start), level(end)
        if velocity:
            original, noise = signal * latents - sigma * output, signal * output + sigma * latents
        else:
            original, noise = (latents - sigma * output) / signal, output
        return new_signal * original + new_sigma * noise

    offset = 1 if name in ("sd", "sd v", "sdxl") else 0
    steps = [0 + offset, 250 + offset, 500 + offset, 750 + offset]
    assert [int(own.timestep) for own in forwards] == [*steps, *reversed(steps)]
    latents = [own.latents[-1:].double() for own in forwards]
    for n, timestep in enumerate(steps):
        expected = moved(latents[n], outputs[n], timestep, timestep - 250, timestep)
        torch.testing.assert_close(latents[n + 1], expected, rtol=0, atol=1e-4)
    for n, timestep in enumerate(reversed(steps[1:]), start=4):
        expected = moved(latents[n], outputs[n], timestep, timestep, timestep - 250)
        torch.testing.assert_close(latents[n + 1], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "LCMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("saved", [False, True])
def test_the_noise_schedule_is_the_pipelines_whatever_its_scheduler(kind, saved, tmp_path):
    """Saved schedulers write every setting down; in memory, diffusers does not hand on those that are their kind's defaults."""
    scheduler = getattr(diffusers, kind)()
    if saved:
        scheduler.save_pretrained(tmp_path)
        scheduler = getattr(diffusers, kind).from_pretrained(tmp_path)
    pipe = built("sd")
    pipe.scheduler = scheduler
    noise = torch.ones(1, 4, 12, 12)
    stub = Stub(lambda latents, t: seen.append((int(t), latents.clone())) or noise)
    stub.scheduler = scheduler
    for timestep in (51, 501):
        seen = []
        read_maps(stub, torch.zeros(1, 4, 12, 12), replace(NOISE, timesteps=(timestep,)), lambda: noise)
        assert float(seen[0][1][0, 0, 0, 0]) == pytest.approx(float((1 - scheduler.alphas_cumprod[timestep]).sqrt()), rel=1e-5)
    seen = []
    read_maps(stub, torch.zeros(1, 4, 12, 12), replace(DDIM, inversion_steps=5, diffusion_steps=5), lambda: noise)
    timesteps = [t for t, _ in seen]
    assert len(timesteps) == 10
    assert timesteps[:5] == timesteps[:4:-1]
    # A prediction that is always the same leads to noise and back without an error.
    for (_, there), (_, back) in zip(seen[1:5], seen[:5:-1], strict=True):
        torch.testing.assert_close(there, back, rtol=0, atol=1e-5)
    assert Teacher(pipe, DDIM).word_maps(picture(0), CAPTION).maps.shape == (6, 8, 8)


def noises_of(images, shape, seed):
    """As a picture's noise is defined: a generator whose seed follows from the picture's pixels and the config."""
    seeds = [int(Picture.open(image).sha256[:15], 16) ^ seed for image in images]
    return [torch.Generator().manual_seed(own) for own in seeds], shape


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_added_by_the_models_own_formula(name):
    """(1 - s) x + s e or sqrt(a) x + sqrt(1 - a) e; other noise at every timestep and in every picture."""
    config = replace(NOISE, timesteps=(51, 301, 900), seed=3)
    pipe = built(name)
    teacher = Teacher(pipe, config)
    images = [picture(0), picture(1)]
    with torch.no_grad():
        start = teacher.family.encode(torch.stack([frame(image, SIDE, "pad").pixels for image in images]))
    with forwards_of(teacher.family.denoiser) as forwards:
        teacher.word_maps_of([*map(Picture.open, images)], [Caption.of(CAPTION), Caption.of("two birds")])
    generators, shape = noises_of(images, start.shape[1:], 3)
    assert [round(own.timestep) for own in forwards] == [51, 301, 900]
    for forward, timestep in zip(forwards, config.timesteps, strict=True):
        noise = torch.stack([torch.randn(shape, generator=own) for own in generators])
        if teacher.family.flow_matching:
            expected = (1 - timestep / 1000) * start + timestep / 1000 * noise
        else:
            alpha = pipe.scheduler.alphas_cumprod[timestep]
            expected = alpha.sqrt() * start + (1 - alpha).sqrt() * noise
        given = forward.latents
        if name == "flux":  # 2x2 patches in a row: [B, 36, 4 * 4]
            given = given.reshape(2, 6, 6, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 12, 12)
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)


def test_flow_inversion_is_exact_where_the_velocity_is_constant():
    """As it is on straight ways: x + s (noise - x)."""
    torch.manual_seed(0)
    start, velocity = torch.randn(2, 2, 4, 8, 8)
    stub = Stub(lambda latents, t: seen.append((float(t), latents.clone())) or velocity, levels=[1.0, 0.8, 0.3, 0.0])
    stub.flow_matching, seen = True, []
    noisiest, last = read_maps(stub, start, replace(FLOW, inversion_steps=3, diffusion_steps=3), lambda: None)
    torch.testing.assert_close(noisiest, start + velocity)
    torch.testing.assert_close(last, start)
    assert [round(t) for t, _ in seen] == [300, 800, 1000, 1000, 800, 300]
    for sigma, (_, latents) in zip((0.0, 0.3, 0.8, 1.0, 0.8, 0.3), seen, strict=True):
        torch.testing.assert_close(latents, start + sigma * velocity)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_flow_inversion_is_of_first_order(name):
    """Twice the steps, half the error; the random model's velocity is made twice as steep."""
    pipe = built(name)
    with torch.no_grad():
        pipe.transformer.proj_out.weight *= 2
    errors = []
    for steps in (8, 16, 32):
        config = replace(FLOW, inversion_steps=steps, diffusion_steps=steps)
        teacher = Teacher(pipe, config)
        start, noisiest, last = there_and_back(teacher, config, [picture(0)], [CAPTION])
        teacher.close()
        assert (noisiest - start).norm() > 0.1 * start.norm(), "the way is long"
        errors.append(float((last - start).norm() / start.norm()))
    print(name, errors)
    assert errors[0] > 1e-4
    for more, fewer in zip(errors[1:], errors, strict=False):
        assert 1.5 < fewer / more < 2.5


def test_flux_takes_guidance_as_an_input():
    """While denoising only, and nothing is computed twice."""
    config = replace(FLOW, guidance_scale=3.5)
    teacher = Teacher(built("flux"), config)
    with forwards_of(teacher.family.denoiser) as forwards:
        teacher.word_maps(picture(0), CAPTION)
    assert [own.inputs["guidance"].tolist() for own in forwards] == [[1.0]] * 2 + [[3.5]] * 4
    assert all(len(own.latents) == 1 for own in forwards)


def test_each_picture_of_a_batch_is_fitted_as_if_it_were_alone():
    """The second picture's empty caption is right from the start: it is done earlier, which changes nothing for the first."""
    torch.manual_seed(0)
    start = torch.randn(2, 4, 8, 8)
    slope = torch.tensor([0.5, 0.0])[:, None, None, None]
    empty = torch.full((2, 3, 4), 0.05) * torch.tensor([1.0, 0.0])[:, None, None]
    config = replace(DDIM, inversion="null_text", diffusion_steps=4, inner_steps=20, guidance_scale=5.0)

    def run(rows):
        stub = Stub(lambda latents, t: slope[rows] * latents, 5.0, empty[rows])
        _, last = read_maps(stub, start[rows], config, lambda: None)
        return last, stub.fitted

    both, _ = run(slice(None))
    first, many = run(slice(0, 1))
    second, few = run(slice(1, 2))
    torch.testing.assert_close(both, torch.cat([first, second]), rtol=0, atol=1e-4)
    assert len(few) < len(many) / 2
    assert (first - start[:1]).abs().max() > 1e-3, "the first one is not done when its steps are used up"
    torch.testing.assert_close(second, start[1:], rtol=0, atol=0.02)


def test_the_empty_caption_is_fitted_at_every_timestep_from_where_it_was():
    """Adam's first step moves each number by the learning rate, which falls linearly to a half."""
    start = torch.ones(1, 4, 8, 8)
    stub = Stub(lambda latents, t: 0.5 * latents, 5.0, torch.ones(1, 3, 4))
    config = replace(DDIM, inversion="null_text", diffusion_steps=4, inner_steps=1, guidance_scale=5.0)
    read_maps(stub, start, config, lambda: None)
    before = torch.ones(1, 3, 4)
    assert [t for t, _ in stub.fitted] == [751, 751, 501, 501, 251, 251, 1, 1]
    for step in range(4):
        (_, tried), (_, used) = stub.fitted[2 * step : 2 * step + 2]
        torch.testing.assert_close(tried, before)
        torch.testing.assert_close((used - tried).abs(), torch.full_like(used, 0.01 * (1 - step / 8)), rtol=1e-3, atol=0)
        before = used


def test_null_text_of_a_batch_equals_one_by_one(scenes):
    config = TeacherConfig(inversion="null_text", diffusion_steps=3, inner_steps=3, guidance_scale=3.0, map_size=8)
    teacher = Teacher(TEACHER, config)
    chosen = scenes[:2]
    ends = [
        there_and_back(teacher, config, [s.image for s in own], [s.caption for s in own])[2]
        for own in (chosen, chosen[:1], chosen[1:])
    ]
    torch.testing.assert_close(ends[0], torch.cat(ends[1:]), rtol=0, atol=1e-4)
    together = teacher.word_maps_of([Picture.open(s.image) for s in chosen], [Caption.of(s.caption) for s in chosen])
    for scene, maps in zip(chosen, together, strict=True):
        np.testing.assert_allclose(maps.maps, teacher.word_maps(scene.image, scene.caption).maps, rtol=0, atol=1e-4)
