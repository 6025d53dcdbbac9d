"""Which of the denoiser's forwards belong to a call: maps are an explicit softmax of exactly those, and pictures keep every bit."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
import warnings
from contextlib import contextmanager

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from torch import nn

import lavender
from lavender.errors import CaptureError, ModelError
from lavender.teachers.denoisers import layout_of, places_of

from .pipeline_zoo import CAPTIONS, PIPELINES
from .said import says
from .test_denoisers import calls_of
from .test_pipelines import GUIDED, PROMPT, TOKENS, draw

SD, SDXL, SD3, FLUX = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"


class Log:
    """Every forward of a denoiser, with the queries and keys of its text attention, as torch receives them."""

    def __init__(self, denoiser, modules):
        self.denoiser, self.modules = denoiser, modules
        self.forwards = []
        self.belongs = True

    @contextmanager
    def keeping(self):
        signature = inspect.signature(type(self.denoiser).forward)

        def begin(module, args, kwargs):
            inputs = signature.bind(module, *args, **kwargs).arguments
            self.forwards.append((self.belongs, inputs, len(calls)))

        handle = self.denoiser.register_forward_pre_hook(begin, with_kwargs=True)
        with calls_of(self.modules) as calls:
            yield
        handle.remove()
        ends = [start for _, _, start in self.forwards[1:]] + [len(calls)]
        self.forwards = [(own, inputs, calls[start:end]) for (own, inputs, start), end in zip(self.forwards, ends, strict=True)]

    def maps(self, sample, columns, wanted=lambda number: True):
        """{layer: mean over heads and forwards, [y * x]} of text columns, in float64."""
        layout, found = layout_of(self.denoiser), {}
        own = [(inputs, calls) for belongs, inputs, calls in self.forwards if belongs]
        for number, (inputs, calls) in enumerate(own):
            if not wanted(number):
                continue
            places = places_of(layout, self.denoiser, inputs)
            for layer, query, key, _, scale in calls:
                b = sample if sample < len(query) else 0
                scores = query[b].double() @ key[b].double().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
                shares = scores.softmax(-1).mean(0)
                if layout.order != "cross":
                    start = places.image_start[b]
                    shares = shares[start : start + math.prod(places.grid)]
                found.setdefault(layer, []).append(shares[:, torch.tensor(columns) + places.text_start].mean(-1))
        return {layer: torch.stack(maps).mean(0) for layer, maps in found.items()}


def log_of(pipe, lens_layers):
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return Log(denoiser, {name: module for name, module in denoiser.named_modules() if name in lens_layers})


def agree(maps, expected, word="cat"):
    assert set(maps.layers) == set(expected)
    for layer, own in expected.items():
        values = maps.heat_map(word, layers=[layer]).values.flatten().double()
        torch.testing.assert_close(values, own, rtol=0, atol=1e-5 * own.max().item())


def plainly(pipe, name, log, run):
    """A run without lavender, whose forwards are logged."""
    with log.keeping():
        return run()


def layers_of(pipe):
    with lavender.patch(pipe) as lens:
        return lens.layers


SIBLINGS = {
    SD: diffusers.StableDiffusionImg2ImgPipeline,
    SDXL: diffusers.StableDiffusionXLImg2ImgPipeline,
    SD3: diffusers.StableDiffusion3Img2ImgPipeline,
    FLUX: diffusers.FluxImg2ImgPipeline,
}


@pytest.mark.parametrize("prompt", [PROMPT, "two birds"])
@pytest.mark.parametrize("name", [SD, SDXL, SD3, FLUX])
def test_another_pipeline_that_draws_in_a_callback_is_not_part_of_the_call(name, prompt):
    """With the same prompt its embedding is the same too."""
    from PIL import Image

    pipe = PIPELINES[name]()
    other = SIBLINGS[name](**pipe.components)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    source = Image.new("RGB", (48, 32), "red")
    log = log_of(pipe, layers_of(pipe))

    def inside(_pipe, step, timestep, given):
        log.belongs = False
        more = {"max_sequence_length": 24} if name in (SD3, FLUX) else {}
        other(prompt, image=source, num_inference_steps=4, height=32, width=48, guidance_scale=5.0, **more)
        log.belongs = True
        return given

    plain = plainly(pipe, name, log, lambda: draw(pipe, name, callback_on_step_end=inside))
    expected = log.maps(1, TOKENS.get(name, [2]))
    with lavender.patch(pipe) as lens:
        assert (draw(pipe, name, callback_on_step_end=inside) == plain).all()
        agree(lens.maps, expected)
        assert lens.maps.coverage.forwards == 2
        assert lens.maps.coverage.left_out["inside a callback"] >= 2
        assert lens.maps.coverage.missing_layers == ()


@pytest.mark.parametrize("kind", ["function", "object", "legacy"])
def test_what_a_callback_asks_the_denoiser_is_not_part_of_the_call(kind):
    pipe = PIPELINES[SD]()
    with torch.no_grad():
        prompt, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    both, latents = torch.cat([negative, prompt]), torch.randn(2, 4, 8, 12)

    def ask(timestep):
        with torch.no_grad():
            pipe.unet(latents, timestep, both)

    class Asking(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012

        def callback_fn(self, pipeline, step, timestep, given):
            self.seen = [*getattr(self, "seen", []), step]
            ask(timestep)
            return given

    asking = Asking(cutoff_step_ratio=None, cutoff_step_index=0)
    options = {
        "function": {"callback_on_step_end": lambda _p, _s, timestep, given: (ask(timestep), given)[1]},
        "object": {"callback_on_step_end": asking},
        "legacy": {"callback": lambda _step, timestep, _latents: ask(timestep), "callback_steps": 1},
    }[kind]
    with lavender.patch(pipe) as lens:
        plain = draw(pipe, SD)
        expected = lens.maps
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # diffusers' of the legacy callback
            assert (draw(pipe, SD, **options) == plain).all()
        assert torch.equal(lens.maps["cat"].values, expected["cat"].values)
        assert lens.maps.coverage.left_out == {"inside a callback": 2}
    assert kind != "object" or asking.seen == [0, 1]


def test_guidance_that_ends_halfway_leaves_the_prompt_alone():
    pipe = PIPELINES[SD]()
    log = log_of(pipe, layers_of(pipe))

    def end(pipe, step, timestep, given):
        pipe._guidance_scale = 0.0
        return {**given, "prompt_embeds": given["prompt_embeds"].chunk(2)[-1]}

    options = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    plain = plainly(pipe, SD, log, lambda: draw(pipe, SD, **options))
    with lavender.patch(pipe) as lens:
        assert (draw(pipe, SD, **options) == plain).all()
        agree(lens.maps, log.maps(1, [2]))


def test_an_embedding_that_is_changed_in_place_is_another_text():
    pipe = PIPELINES[SD]()

    def change(pipe, step, timestep, given):
        given["prompt_embeds"].mul_(1.5)
        return given

    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    for mode in (torch.no_grad, torch.inference_mode):
        with lavender.patch(pipe, steps=True) as lens, mode():
            draw(pipe, SD)
            first = lens.maps.heat_map("cat", step=0).values
            draw(pipe, SD, **options)
            assert {entry.step for entry in lens.maps.entries} == {0}
            assert torch.equal(lens.maps["cat"].values, first)
            assert lens.maps.coverage.left_out == {"without the prompt": 1}


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_of_self_attention_guidance_the_blurred_pass_is_left_out(guidance):
    plain_pipe = PIPELINES[SD]()
    pipe = diffusers.StableDiffusionSAGPipeline(**plain_pipe.components, requires_safety_checker=False)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    log = log_of(pipe, layers_of(pipe))

    def run():
        return draw(pipe, SD, guidance_scale=guidance, sag_scale=0.7)

    plain = plainly(pipe, SD, log, run)
    with lavender.patch(pipe) as lens:
        assert (run() == plain).all()
        # Each step: the picture's pass, then the blurred one.
        agree(lens.maps, log.maps(1, [2], wanted=lambda number: number % 2 == 0))
        if guidance == 1:
            assert lens.maps.coverage.left_out == {"further passes of a step": 2}


def test_of_skip_layer_guidance_the_pass_that_leaves_layers_out_is_left_out():
    pipe = PIPELINES[f"{SD3}/3.5"]()
    log = log_of(pipe, layers_of(pipe))
    options = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}

    def run():
        return draw(pipe, f"{SD3}/3.5", **options)

    plain = plainly(pipe, SD3, log, run)
    passes = [len(inputs["hidden_states"]) for _, inputs, _ in log.forwards]
    assert passes.count(1) > 0
    with lavender.patch(pipe) as lens:
        assert (run() == plain).all()
        agree(lens.maps, log.maps(1, [2, 17], wanted=lambda number: passes[number] == 2))
        assert lens.maps.coverage.left_out == {"further passes of a step": passes.count(1)}


def test_views_of_a_picture_are_refused_and_the_picture_is_kept():
    plain_pipe = PIPELINES[SD]()
    pipe = diffusers.StableDiffusionPanoramaPipeline(**plain_pipe.components, requires_safety_checker=False)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def run(**options):
        generator = torch.Generator().manual_seed(0)
        return pipe(
            PROMPT, height=256, width=640, num_inference_steps=1, generator=generator, output_type="latent", **options
        ).images

    for options in ({}, {"view_batch_size": 2}):
        plain = run(**options)
        with lavender.patch(pipe) as lens:
            with says("cannot be read"):
                assert torch.equal(run(**options), plain)
            with pytest.raises(CaptureError, match=r"capture\(word_weights\)"):
                lens.maps  # noqa: B018


def test_two_grids_of_one_layer_in_a_call_are_one_map():
    """As progressive sampling and deep shrink do: the first steps see a smaller picture."""
    pipe = PIPELINES[SD]()
    log = log_of(pipe, layers_of(pipe))

    def shrink(_pipe, step, timestep, given):
        return {**given, "latents": nn.functional.interpolate(given["latents"], scale_factor=0.5)} if step == 0 else given

    plain = plainly(pipe, SD, log, lambda: draw(pipe, SD, callback_on_step_end=shrink))
    for steps in (False, True):
        with lavender.patch(pipe, steps=steps) as lens:
            assert (draw(pipe, SD, callback_on_step_end=shrink) == plain).all()
            layer = lens.layers[0]
            first, second = (log.maps(1, [2], wanted=lambda number, n=n: number == n)[layer] for n in (0, 1))
            own = [entry.maps.mean(0)[1].double() for entry in lens.maps.entries if entry.layer == layer]
            torch.testing.assert_close(own[0].flatten(), first, rtol=0, atol=1e-6)
            torch.testing.assert_close(own[1].flatten(), second, rtol=0, atol=1e-6)
            assert own[0].shape == (8, 12)
            assert own[1].shape == (4, 6)
            large = lavender.kernels.map_loss.resample(second.reshape(1, 1, 4, 6).float(), (8, 12))[0, 0]
            expected = (first.reshape(8, 12) + large) / 2
            torch.testing.assert_close(lens.maps.heat_map("cat", layers=[layer]).values, expected.float(), rtol=0, atol=1e-6)


def test_deep_shrink_inside_the_denoiser_is_laid_out_on_the_grids_that_the_layers_have():
    pipe = PIPELINES[SD]()
    block = pipe.unet.down_blocks[0]

    handle = block.attentions[0].register_forward_pre_hook(
        lambda module, args: (nn.functional.interpolate(args[0], size=(5, 7)), *args[1:])
    )
    back = block.attentions[0].register_forward_hook(
        lambda module, args, output: (
            (nn.functional.interpolate(output[0], size=(8, 12)), *output[1:])
            if isinstance(output, tuple)
            else nn.functional.interpolate(output, size=(8, 12))
        )
    )
    plain = draw(pipe, SD)
    with lavender.patch(pipe) as lens:
        assert (draw(pipe, SD) == plain).all()
        shapes = {entry.layer: tuple(entry.maps.shape[-2:]) for entry in lens.maps.entries}
        assert (5, 7) in shapes.values()
    handle.remove()
    back.remove()


@pytest.mark.parametrize("kept", [24, 48])
def test_queries_that_are_no_places_are_refused_by_layer(kept):
    """Merged tokens, a quarter or half of them."""
    pipe = PIPELINES[SD]()
    name, module = next((n, m) for n, m in pipe.unet.named_modules() if n.endswith("attn2"))
    original = module.forward

    def merged(hidden_states, **kwargs):
        few = original(hidden_states[:, :kept], **kwargs)
        return torch.cat([few, hidden_states[:, kept:]], dim=1)

    module.forward = merged
    plain = draw(pipe, SD)
    with lavender.patch(pipe) as lens:
        with says("merges, drops or tiles"):
            assert (draw(pipe, SD) == plain).all()
        assert lens.maps.coverage.missing_layers == (name,)
        assert name not in lens.maps.layers
        assert lens.maps["cat"].values.min() > 0


def test_the_attention_backend_in_force_is_what_counts():
    from diffusers.models.attention_dispatch import attention_backend

    pipe = PIPELINES[FLUX]()
    with lavender.patch(pipe) as lens:
        with attention_backend("flex"), pytest.raises(CaptureError, match=r"in force is 'flex'.*attention_backend"):
            draw(pipe, FLUX)
        plain = draw(pipe, FLUX)
        entered = attention_backend("flex")

        def begin(_pipe, step, timestep, given):
            if step == 0:
                entered.__enter__()
            return given

        try:
            picture = draw(pipe, FLUX, callback_on_step_end=begin)
        finally:
            entered.__exit__(None, None, None)
        np.testing.assert_allclose(picture, plain, atol=1e-3)
        # The first step alone was read.
        assert lens.maps.coverage.forwards == 2
        assert "cat" in lens.maps


@pytest.mark.parametrize("name", [SD, SDXL, SD3, FLUX])
def test_a_call_with_the_embeddings_of_encode_prompt_is_that_texts(name):
    pipe = PIPELINES[name]()
    more = {"max_sequence_length": 24} if name in (SD3, FLUX) else {}
    with torch.no_grad(), lavender.patch(pipe) as lens:
        plain = draw(pipe, name, negative_prompt="two birds") if name != FLUX else draw(pipe, name)
        expected = lens.maps
        if name == SD:
            prompt, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, "two birds")
            given = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
        elif name == FLUX:
            prompt, pooled, _ = pipe.encode_prompt(PROMPT, PROMPT, device="cpu", **more)
            given = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
        else:
            texts = [PROMPT] * (2 if name == SDXL else 3)
            prompt, negative, pooled, negative_pooled = pipe.encode_prompt(
                *texts, device="cpu", negative_prompt="two birds", **more
            )
            given = {
                "prompt_embeds": prompt,
                "negative_prompt_embeds": negative,
                "pooled_prompt_embeds": pooled,
                "negative_pooled_prompt_embeds": negative_pooled,
            }
        pipe.encode_prompt(*["two birds"] * {SD: 1, SD3: 3}.get(name, 2), device="cpu", **_encoding(name))
        assert (draw(pipe, name, prompt=None, **given) == plain).all()
        assert lens.maps.text == PROMPT
        torch.testing.assert_close(lens.maps["cat"].values, expected["cat"].values)
        if name != FLUX:
            assert lens.negative_maps.text == "two birds"
        draw(pipe, name, prompt=None, **{key: value * 1.01 for key, value in given.items()})
        with pytest.raises(CaptureError, match="given as text"):
            lens.maps  # noqa: B018


def _encoding(name):
    return {"num_images_per_prompt": 1} if name != SD else {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}


@pytest.mark.parametrize("name", [*GUIDED, FLUX])
def test_words_of_the_negative_prompt_have_maps(name):
    pipe = PIPELINES[name]()
    log = log_of(pipe, layers_of(pipe))
    options = {"negative_prompt": "red hat", **({"true_cfg_scale": 4.0} if name == FLUX else {})}
    plain = plainly(pipe, name, log, lambda: draw(pipe, name, **options))
    with lavender.patch(pipe) as lens:
        assert (draw(pipe, name, **options) == plain).all()
        assert list(lens.negative_maps) == ["red", "hat"]
        columns = {SD3: [2, 17], f"{SD3}/3.5": [2, 17], FLUX: [1]}.get(name, [2])
        odd = (lambda number: number % 2) if name == FLUX else (lambda number: True)
        agree(lens.negative_maps, log.maps(0, columns, wanted=odd), "hat")
        draw(pipe, name)
        with pytest.raises(CaptureError, match="no negative prompt"):
            lens.negative_maps  # noqa: B018
    assert lens.maps.text == PROMPT


def test_a_negative_prompt_that_equals_the_prompt_shows_the_prompts_maps():
    pipe = PIPELINES[SD]()
    with lavender.patch(pipe) as lens:
        draw(pipe, SD, guidance_scale=1.0)
        alone = lens.maps["cat"].values
        draw(pipe, SD, negative_prompt=PROMPT)
        torch.testing.assert_close(lens.maps["cat"].values, alone)
        draw(pipe, SD, prompt=[PROMPT, PROMPT], negative_prompt=[PROMPT, "a"], num_images_per_prompt=2)
        assert [lens.maps_of(n).text for n in range(4)] == [PROMPT] * 4


def test_tokens_that_are_no_words_are_read_by_string_or_column():
    pipe = PIPELINES[SD]()
    log = log_of(pipe, layers_of(pipe))
    plainly(pipe, SD, log, lambda: draw(pipe, SD))
    with lavender.patch(pipe, tokens=("<|startoftext|>", 7, "<*>")) as lens:
        draw(pipe, SD)
        agree(lens.maps, log.maps(1, [0]), "<|startoftext|>")
        agree(lens.maps, log.maps(1, [7]), 7)
        agree(lens.maps, log.maps(1, [2]))
        with pytest.raises(CaptureError, match="no text column"):
            lens.maps["<*>"]
        with pytest.raises(KeyError, match=r"tokens=\(3,\)"):
            lens.maps[3]
        with pytest.raises(KeyError, match="tokens=\\('<\\|endoftext\\|>',\\)"):
            lens.maps["<|endoftext|>"]
        draw(pipe, SD, prompt=CAPTIONS)
        assert lens.maps_of(2)["<|startoftext|>"].values.min() > 0
        assert list(lens.maps_of(1)) == ["two", "birds", "over", "the", "blue", "house"]


class Wrapped(nn.Module):
    """A wrapper of one's own around a denoiser."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_what_wraps_a_denoiser_and_what_inherits_from_one_is_read():
    pipe = PIPELINES[SD]()
    with lavender.patch(pipe) as lens:
        plain = draw(pipe, SD)
        expected = lens.maps["cat"].values
    inner = pipe.unet

    class MyUNet(type(inner)):
        pass

    inner.__class__ = MyUNet
    with lavender.patch(pipe) as lens:
        draw(pipe, SD)
        assert torch.equal(lens.maps["cat"].values, expected)
    pipe.unet = Wrapped(inner)
    with lavender.patch(pipe) as lens:
        assert (draw(pipe, SD) == plain).all()
        assert lens.denoiser is inner
        assert torch.equal(lens.maps["cat"].values, expected)


def test_patched_pipelines_and_denoisers_pickle_as_others_do(tmp_path):
    for name in (SD, FLUX):
        pipe = PIPELINES[name]()
        plain, original = draw(pipe, name), type(pipe)
        with lavender.patch(pipe) as lens:
            draw(pipe, name)
            twin = pickle.loads(pickle.dumps(pipe))
            assert type(twin) is original
            assert (draw(twin, name) == plain).all()
            buffer = io.BytesIO()
            torch.save(lens.denoiser, buffer)
            buffer.seek(0)
            denoiser = torch.load(buffer, weights_only=False)
            assert not any(b"lavender" in part for part in (pickle.dumps(pipe), buffer.getvalue()))
            part = "unet" if name == SD else "transformer"
            setattr(twin, part, denoiser)
            assert (draw(twin, name) == plain).all()
            with lavender.patch(twin) as second:
                draw(twin, name)
                assert torch.equal(second.maps["cat"].values, lens.maps["cat"].values)
            copied = copy.deepcopy(pipe)
            assert type(copied) is original
            assert (draw(copied, name) == plain).all()


def test_what_is_no_whole_pipeline_gets_its_reason():
    pipe = PIPELINES[SD]()
    with pytest.raises(ModelError, match="part of a pipeline"):
        lavender.patch(pipe.unet)
    pipe.unet = None
    with pytest.raises(ModelError, match="loaded unet or transformer"):
        lavender.patch(pipe)


def test_a_denoiser_that_was_exchanged_after_the_patch_is_named():
    pipe = PIPELINES[SD]()
    with lavender.patch(pipe) as lens:
        pipe.unet = copy.deepcopy(pipe.unet)
        draw(pipe, SD)
        with pytest.raises(CaptureError, match="another denoiser after it was patched"):
            lens.maps  # noqa: B018


def test_an_error_of_our_own_keeps_the_picture(monkeypatch):
    from lavender.teachers import recording

    pipe = PIPELINES[SD]()
    plain = draw(pipe, SD)

    def broken(*args, **kwargs):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(recording, "column_maps", broken)
    with lavender.patch(pipe) as lens:
        with says("no memory left"):
            assert (draw(pipe, SD) == plain).all()
        with pytest.raises(CaptureError, match="no memory left"):
            lens.maps  # noqa: B018


def test_a_batch_of_several_timesteps_is_refused_and_the_picture_is_kept():
    plain_pipe = PIPELINES[SD]()
    parts = {name: part for name, part in plain_pipe.components.items() if name != "image_encoder"}
    pipe = diffusers.StableDiffusionParadigmsPipeline(**parts, requires_safety_checker=False)
    pipe.scheduler = diffusers.DDIMParallelScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe, SD, parallel=2)
    with lavender.patch(pipe) as lens:
        with says("several timesteps"):
            assert (draw(pipe, SD, parallel=2) == plain).all()
        with pytest.raises(CaptureError, match="several timesteps"):
            lens.maps  # noqa: B018
