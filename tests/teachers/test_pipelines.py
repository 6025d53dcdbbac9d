"""Whole pipelines of diffusers: pictures unchanged, words found, the prompt's branch read, maps against an explicit softmax."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

import lavender
from lavender.errors import CaptureError, DataError
from lavender.maps import HeatMap
from lavender.teachers.denoisers import places_of
from lavender.teachers.patch import TeacherPatch

from .pipeline_zoo import CAPTIONS, PIPELINES
from .test_denoisers import calls_of
from .zoo import HEIGHT_PIXELS, WIDTH_PIXELS

PROMPT = "a cat in a red hat"


STEPS = 2


OPTIONS = {
    "FluxPipeline": {"max_sequence_length": 24, "guidance_scale": 3.5},
    "StableDiffusion3Pipeline": {"max_sequence_length": 24, "guidance_scale": 5.0},
    "StableDiffusion3Pipeline/3.5": {"max_sequence_length": 24, "guidance_scale": 5.0},
    "StableDiffusionPAGPipeline": {"guidance_scale": 5.0, "pag_scale": 2.0},
}


NAMES = sorted(PIPELINES)


GUIDED = [name for name in NAMES if name != "FluxPipeline"]


@pytest.fixture
def pipe(name):
    return PIPELINES[name]()


def draw(pipe, name, prompt=PROMPT, **options):
    return pipe(
        prompt,
        num_inference_steps=STEPS,
        height=HEIGHT_PIXELS,
        width=WIDTH_PIXELS,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        **{"guidance_scale": 5.0, **OPTIONS.get(name, {}), **options},
    ).images


@pytest.mark.parametrize("name", NAMES)
def test_pictures_keep_every_bit_and_the_pipeline_its_class(pipe, name):
    plain, before = draw(pipe, name), type(pipe)
    with lavender.patch(pipe) as lens:
        assert isinstance(pipe, before)
        assert type(pipe).__name__ == before.__name__
        assert (draw(pipe, name) == plain).all()
        assert list(lens.maps) == ["a", "cat", "in", "red", "hat"]
    assert type(pipe) is before
    assert "cache_context" not in vars(lens.denoiser)
    assert (draw(pipe, name) == plain).all()
    with pytest.raises(CaptureError, match="patch was undone"), lens:
        pass
    with pytest.raises(CaptureError, match="patch was undone"), lens.capture(torch.zeros(1, 1, 1)):
        pass


def expected_maps(pipe, name, patch, word_tokens):
    """{layer: mean over heads, steps of [y * x]} of one word, from every attention call's own query and key, explicitly."""
    denoiser, inputs = patch.denoiser, []
    modules = {n: m for n, m in denoiser.named_modules() if n in patch.layers}
    spy = denoiser.register_forward_pre_hook(lambda _m, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
    with calls_of(modules) as calls:
        draw(pipe, name)
    spy.remove()
    hooks = patch._hooks[0]
    bound = [hooks._signature.bind(denoiser, *args, **kwargs).arguments for args, kwargs in inputs]
    per_forward = len(calls) // len(bound)
    found: dict[str, list[torch.Tensor]] = {}
    for i, (layer, query, key, mask, scale) in enumerate(calls):
        assert mask is None
        places = places_of(hooks.layout, denoiser, bound[i // per_forward])
        # One prompt: the second sample of [unconditional, conditional, ...], or the only one.
        b = 0 if len(query) == 1 else 1
        scores = query[b].double() @ key[b].double().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        probabilities = scores.softmax(-1).mean(0)
        if hooks.layout.order != "cross":
            start = places.image_start[b]
            probabilities = probabilities[start : start + math.prod(places.grid)]
        columns = torch.tensor(word_tokens) + places.text_start
        found.setdefault(layer, []).append(probabilities[:, columns].mean(-1))
    return {layer: torch.stack(maps).mean(0) for layer, maps in found.items()}


# "a cat in a red hat": a token each in both tokenizers, behind CLIP's start token; SD 3 has them in both stretches.
TOKENS = {"StableDiffusion3Pipeline": [2, 16 + 1], "StableDiffusion3Pipeline/3.5": [2, 16 + 1], "FluxPipeline": [1]}


@pytest.mark.parametrize("name", NAMES)
def test_maps_equal_an_explicit_softmax_over_a_whole_run(pipe, name):
    with lavender.patch(pipe) as lens:
        draw(pipe, name)
        maps = lens.maps
    expected = expected_maps(pipe, name, lens, TOKENS.get(name, [2]))
    assert set(maps.layers) == set(expected)
    for layer, own in expected.items():
        heat = maps.heat_map("cat", layers=[layer]).values
        torch.testing.assert_close(heat.flatten().double(), own, rtol=0, atol=1e-4 * own.max().item())
    assert maps["cat"].values.shape[0] / maps["cat"].values.shape[1] == HEIGHT_PIXELS / WIDTH_PIXELS
    assert not torch.equal(maps["cat"].values, maps["hat"].values)


@pytest.mark.parametrize("name", NAMES)
def test_heads_and_steps_kept_apart_have_the_default_as_their_mean(pipe, name):
    with lavender.patch(pipe) as lens:
        draw(pipe, name)
        mean = lens.maps["hat"].values
    with lavender.patch(pipe, heads=True, steps=True) as lens:
        draw(pipe, name)
        maps = lens.maps
    torch.testing.assert_close(maps["hat"].values, mean)
    steps = [maps.heat_map("hat", step=s).values for s in range(STEPS)]
    torch.testing.assert_close(sum(steps) / STEPS, mean)
    assert not torch.equal(steps[0], steps[1])
    heads = [maps.heat_map("hat", head=h).values for h in range(2)]
    torch.testing.assert_close(sum(heads) / 2, mean)


@pytest.mark.parametrize("name", NAMES)
def test_several_prompts_and_pictures_have_their_own_maps(pipe, name):
    with lavender.patch(pipe) as lens:
        draw(pipe, name, prompt=CAPTIONS[:2], num_images_per_prompt=2)
        four = [lens.maps_of(i) for i in range(4)]
        with pytest.raises(CaptureError, match="4 were drawn"):
            lens.maps_of(4)
    assert [m.text for m in four] == [CAPTIONS[0]] * 2 + [CAPTIONS[1]] * 2
    assert not torch.equal(four[0]["cat"].values, four[1]["cat"].values)
    assert "birds" in four[3]
    assert four[3]["birds"].values.min() > 0


@pytest.mark.parametrize("name", GUIDED)
def test_the_unconditional_branch_does_not_show(pipe, name):
    """A negative prompt changes later latents, but not what the first step's prompt branch sees."""
    first = []
    for negative in ("a house", "two birds"):
        with lavender.patch(pipe, steps=True) as lens:
            draw(pipe, name, negative_prompt=negative)
            first.append(lens.maps.heat_map("cat", step=0).values)
    torch.testing.assert_close(first[0], first[1])


def test_branches_that_are_computed_apart_are_told_by_name():
    pipe = PIPELINES["FluxPipeline"]()
    with lavender.patch(pipe, steps=True) as lens:
        plain = draw(pipe, "FluxPipeline")
        alone = lens.maps.heat_map("cat", step=0).values
        guided = draw(pipe, "FluxPipeline", negative_prompt="two birds", true_cfg_scale=4.0)
        assert not np.array_equal(plain, guided)
        assert {e.step for e in lens.maps.entries} == set(range(STEPS))
        torch.testing.assert_close(lens.maps.heat_map("cat", step=0).values, alone)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline"])
def test_without_guidance_there_is_one_branch(pipe, name):
    with lavender.patch(pipe) as lens:
        draw(pipe, name, guidance_scale=1.0)
        alone = lens.maps["cat"].values
    assert alone.min() > 0


def test_perturbed_guidance_alone_puts_the_prompt_first():
    pipe = PIPELINES["StableDiffusionPAGPipeline"]()
    with lavender.patch(pipe, steps=True) as lens:
        draw(pipe, "StableDiffusionPAGPipeline", guidance_scale=5.0)
        both = lens.maps.heat_map("cat", step=0).values
        draw(pipe, "StableDiffusionPAGPipeline", guidance_scale=0.0)
        torch.testing.assert_close(lens.maps.heat_map("cat", step=0).values, both)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline"])
def test_fused_projections_change_nothing(pipe, name):
    with lavender.patch(pipe) as lens:
        plain = draw(pipe, name)
        maps = lens.maps["cat"].values
        lens.denoiser.fuse_qkv_projections()
        fused = draw(pipe, name)
        np.testing.assert_allclose(fused, plain, atol=1e-4)
        torch.testing.assert_close(lens.maps["cat"].values, maps, rtol=1e-3, atol=1e-6)


def test_a_lora_is_seen():
    from peft import LoraConfig

    pipe = PIPELINES["StableDiffusionPipeline"]()
    with lavender.patch(pipe) as lens:
        draw(pipe, "StableDiffusionPipeline")
        before = lens.maps["cat"].values
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
        draw(pipe, "StableDiffusionPipeline")
        assert not torch.allclose(lens.maps["cat"].values, before)


def test_a_users_own_loop_gives_gradients_to_the_latents():
    pipe = PIPELINES["StableDiffusionPipeline"]()
    latents = torch.randn(1, 4, 4, 6, requires_grad=True)
    gradients = []
    with lavender.patch(pipe) as lens:
        with torch.no_grad():
            prompt, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
        for timestep in (500, 400):
            lens.clear()
            pipe.unet(latents, torch.tensor(timestep), prompt)
            (gradient,) = torch.autograd.grad(lens.maps["cat"].mean(), latents)
            gradients.append(gradient)
    assert gradients[0].abs().max() > 0
    assert not torch.equal(*gradients)


def test_in_ones_own_loop_the_prompts_embedding_tells_whose_attention_is_read():
    pipe = PIPELINES["StableDiffusionPipeline"]()
    latents = torch.randn(2, 4, 4, 6)
    timestep = torch.tensor(500)
    with torch.no_grad(), lavender.patch(pipe) as lens:
        prompt, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)

        def alone(i):
            lens.clear()
            pipe.unet(latents[i : i + 1], timestep, prompt)
            return lens.maps["cat"].values

        expected = [alone(0), alone(1)]
        lens.clear()
        pipe.unet(latents[:1], timestep, prompt)
        pipe.unet(latents[:1], timestep, negative)
        torch.testing.assert_close(lens.maps["cat"].values, expected[0])
        for order in ([negative, prompt], [prompt, negative]):
            lens.clear()
            pipe.unet(latents[:1].repeat(2, 1, 1, 1), timestep, torch.cat(order))
            torch.testing.assert_close(lens.maps["cat"].values, expected[0])
        lens.clear()
        pipe.unet(latents, timestep, prompt.repeat(2, 1, 1))
        for i in range(2):
            torch.testing.assert_close(lens.maps_of(i)["cat"].values, expected[i])
        with pytest.raises(CaptureError, match="call clear"):
            pipe.unet(latents[:1], timestep, prompt)
        lens.clear()
        pipe.unet(latents[:1], timestep, negative)
        with pytest.raises(CaptureError, match="embedding of the prompt"):
            lens.maps  # noqa: B018


def test_what_the_denoiser_does_after_the_call_is_not_part_of_it():
    from diffusers import StableDiffusionImg2ImgPipeline
    from PIL import Image

    name = "StableDiffusionPipeline"
    pipe = PIPELINES[name]()
    other = StableDiffusionImg2ImgPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    source = Image.new("RGB", (WIDTH_PIXELS, HEIGHT_PIXELS), "red")
    with lavender.patch(pipe) as lens:
        draw(pipe, name, num_images_per_prompt=2)
        before = lens.maps["cat"].values.clone()
        other("two birds", image=source, num_inference_steps=4, guidance_scale=1.0)
        assert torch.equal(lens.maps["cat"].values, before)
        with lavender.patch(other) as second:
            other("two birds over the blue house", image=source, num_inference_steps=4)
            assert "birds" in second.maps
            assert torch.equal(lens.maps["cat"].values, before)


def test_solvers_that_visit_a_timestep_twice_are_recorded_as_often():
    from diffusers import HeunDiscreteScheduler

    pipe = PIPELINES["StableDiffusionPipeline"]()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    for guidance in (1.0, 5.0):
        calls = []
        handle = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))  # noqa: B023
        with lavender.patch(pipe, steps=True) as lens:
            draw(pipe, "StableDiffusionPipeline", guidance_scale=guidance)
            assert len({entry.step for entry in lens.maps.entries}) == len(calls) == 2 * STEPS - 1
        handle.remove()


def test_branches_that_are_computed_apart_without_a_name_are_told_by_their_embedding():
    """Lumina 2 and Chroma call their denoiser once per branch and name neither."""
    pipe = PIPELINES["StableDiffusionPipeline"]()
    timestep, latents = torch.tensor(500), torch.randn(1, 4, 4, 6)
    original = type(pipe)

    class StableDiffusionApart(original):
        def __call__(self, prompt):
            prompt, negative = self.encode_prompt(prompt, "cpu", 1, True)
            self.unet(latents, timestep, prompt)
            self.unet(latents, timestep, negative)

    pipe.__class__ = StableDiffusionApart
    with torch.no_grad(), lavender.patch(pipe, steps=True) as lens:
        pipe(PROMPT)
        assert {entry.step for entry in lens.maps.entries} == {0}


def test_a_copied_pipeline_draws_alone_and_can_be_patched_itself():
    name = "StableDiffusionPipeline"
    pipe = PIPELINES[name]()
    original, plain = type(pipe), draw(pipe, name)
    with lavender.patch(pipe) as lens:
        draw(pipe, name)
        maps = lens.maps["cat"].values
        twin = copy.deepcopy(pipe)
        assert (draw(twin, name, prompt="two birds") != plain).any()
        assert torch.equal(lens.maps["cat"].values, maps)
        with lavender.patch(twin) as own:
            assert own is not lens
            draw(twin, name)
            torch.testing.assert_close(own.maps["cat"].values, maps)
        assert type(twin) is original
    assert (draw(twin, name) == plain).all()


def test_patching_twice_is_one_patch_and_other_settings_patch_anew():
    pipe = PIPELINES["StableDiffusionPipeline"]()
    original = type(pipe)
    first = lavender.patch(pipe)
    with lavender.patch(pipe) as again:
        assert again is first
    assert first.is_patched
    other = lavender.patch(pipe, heads=True)
    assert not first.is_patched
    other.unpatch()
    assert type(pipe) is original


def test_a_copied_denoiser_draws_alone():
    pipe = PIPELINES["StableDiffusionPipeline"]()
    plain = draw(pipe, "StableDiffusionPipeline")
    with lavender.patch(pipe):
        twin = copy.deepcopy(pipe.unet)
    pipe.unet = twin
    assert (draw(pipe, "StableDiffusionPipeline") == plain).all()


def test_the_heat_map_lies_on_the_picture():
    from PIL import Image

    pipe = PIPELINES["StableDiffusionXLPipeline"]()
    with lavender.patch(pipe) as lens:
        images = draw(pipe, "StableDiffusionXLPipeline")
    image = Image.fromarray((images[0] * 255).astype(np.uint8))
    heat = lens.maps["red hat"]
    assert heat.word == "red hat"
    torch.testing.assert_close(heat.values, (lens.maps["red"].values + lens.maps["hat"].values) / 2)
    over = heat.overlay(image)
    assert over.size == image.size
    # Where the map is brighter, more of the colormap's bright end shows.
    values = heat.to_numpy((image.height, image.width))
    painted = np.asarray(heat.overlay(Image.new("RGB", image.size), opacity=1.0)).astype(float).sum(-1)
    assert np.corrcoef(values.ravel(), painted.ravel())[0, 1] > 0.9
    assert heat.to_numpy().shape == tuple(heat.values.shape)
    np.testing.assert_allclose(lens.maps.to_numpy()[1], lens.maps["cat"].to_numpy(), rtol=1e-5)
    assert lens.maps.to_word_maps()["hat"].shape == tuple(heat.values.shape)
    figure = lens.maps.plot(image)
    assert [a.get_title() for a in figure.axes if a.get_title()] == [w.text for w in lens.maps.words]


def test_a_map_is_plotted_without_its_picture(tmp_path):
    from matplotlib import pyplot as plt

    pipe = PIPELINES["StableDiffusionPipeline"]()
    with lavender.patch(pipe) as lens:
        draw(pipe, "StableDiffusionPipeline")
    axes = lens.maps["cat"].plot()
    assert axes.get_title() == "cat"
    axes.figure.savefig(tmp_path / "cat.png")
    assert (tmp_path / "cat.png").stat().st_size > 0
    plt.close("all")


def test_a_controlnet_changes_the_picture_and_not_how_maps_are_read():
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
    from PIL import Image

    plain = PIPELINES["StableDiffusionPipeline"]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        controlnet = ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=(8, 16, 16))
        for parameter in controlnet.parameters():
            parameter.data.normal_(0, 0.1)
    pipe = StableDiffusionControlNetPipeline(**plain.components, controlnet=controlnet.eval())
    pipe.set_progress_bar_config(disable=True)
    control = Image.new("RGB", (WIDTH_PIXELS, HEIGHT_PIXELS), "white")
    before = draw(pipe, "", image=control)
    assert not np.array_equal(before, draw(plain, ""))
    with lavender.patch(pipe) as lens:
        assert (draw(pipe, "", image=control) == before).all()
        assert len(lens.maps.layers) == len(lens.layers)
        assert lens.maps["cat"].values.min() > 0


def test_of_an_ip_adapter_the_texts_attention_is_read():
    name = "StableDiffusionPipeline"
    pipe = PIPELINES[name]()
    unet, generator = pipe.unet, torch.Generator().manual_seed(0)
    width = unet.config.cross_attention_dim
    weights = {}
    for number, key in enumerate(unet.attn_processors):
        if "attn2" in key:
            hidden = unet.get_submodule(key.removesuffix(".processor")).to_k.out_features
            for part in ("to_k_ip", "to_v_ip"):
                weights[f"{number}.{part}.weight"] = torch.randn(hidden, width, generator=generator) * 0.3
    projection = {
        "proj.weight": torch.randn(4 * width, 24, generator=generator),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    with lavender.patch(pipe, steps=True) as lens:
        without = draw(pipe, name)
        alone = lens.maps.heat_map("cat", step=0, layers=[0]).values
        unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
        picture = [torch.randn(2, 1, 24, generator=generator)]
        adapted = draw(pipe, name, ip_adapter_image_embeds=picture)
        assert not np.array_equal(adapted, without)
        # The first layer of the first step: its queries know nothing of the picture yet.
        torch.testing.assert_close(lens.maps.heat_map("cat", step=0, layers=[0]).values, alone)
    assert (draw(pipe, name, ip_adapter_image_embeds=picture) == adapted).all()


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_group_offloading_changes_nothing(pipe, name):
    plain = draw(pipe, name)
    with lavender.patch(pipe) as lens:
        draw(pipe, name)
        maps = lens.maps["cat"].values
        cpu = torch.device("cpu")
        lens.denoiser.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        assert (draw(pipe, name) == plain).all()
        assert torch.equal(lens.maps["cat"].values, maps)


def test_parts_of_a_run_without_spaces_are_found_and_can_have_maps_of_their_own():
    pipe = PIPELINES["StableDiffusionPipeline"]()
    with lavender.patch(pipe, words=("红色",)) as lens:
        draw(pipe, "StableDiffusionPipeline", prompt="红色的猫 cat")
        assert [w.text for w in lens.maps.words] == ["红色的猫", "cat", "红色"]
        run, part = lens.maps["红色的猫"].values, lens.maps["红色"].values
        assert not torch.equal(run, part)
        # Not asked for beforehand: the run that it is part of.
        assert torch.equal(lens.maps["的猫"].values, run)
        with pytest.raises(KeyError):
            lens.maps["cat 红色"]  # no such phrase stands in the text


@pytest.mark.parametrize(
    ("name", "wrapped"), [("StableDiffusionPipeline", False), pytest.param("FluxPipeline", True, marks=pytest.mark.full)]
)
def test_a_compiled_denoiser_is_read(pipe, name, wrapped):
    part = "transformer" if wrapped else "unet"
    with lavender.patch(pipe) as lens:
        draw(pipe, name)
        expected = lens.maps["cat"].values
    torch.compiler.reset()
    if wrapped:
        setattr(pipe, part, torch.compile(getattr(pipe, part), backend="aot_eager"))
    with lavender.patch(pipe) as lens:
        if not wrapped:
            getattr(pipe, part).compile(backend="aot_eager")
        draw(pipe, name)
        torch.testing.assert_close(lens.maps["cat"].values, expected, rtol=0, atol=1e-6)
    torch.compiler.reset()


def test_copies_of_a_transformer_name_their_own_branches_and_keep_nothing_of_the_patch():
    from diffusers import FirstBlockCacheConfig, FluxImg2ImgPipeline

    pipe = PIPELINES["FluxPipeline"]()
    plain = draw(pipe, "FluxPipeline")
    with lavender.patch(pipe) as lens:
        twin = copy.deepcopy(pipe)
        twin.transformer.enable_cache(FirstBlockCacheConfig(0.05))
        draw(twin, "FluxPipeline", negative_prompt="two birds", true_cfg_scale=4.0)
        assert not any(isinstance(value, TeacherPatch) for value in vars(twin.transformer).values())
        sibling = FluxImg2ImgPipeline(**pipe.components)
        second = lavender.patch(sibling)
        assert (draw(pipe, "FluxPipeline") == plain).all()
        assert lens.maps["cat"].values.min() > 0
    second.unpatch()
    assert "cache_context" not in vars(pipe.transformer)


def test_a_call_inside_a_callback_leaves_the_outer_call_its_maps():
    name = "StableDiffusionPipeline"
    pipe = PIPELINES[name]()

    def inside(pipe, step, timestep, given):
        if step == 0:
            scheduler, pipe.scheduler = pipe.scheduler, copy.deepcopy(pipe.scheduler)
            draw(pipe, name, prompt="two birds")
            pipe.scheduler = scheduler
        return given

    with lavender.patch(pipe, steps=True) as lens:
        draw(pipe, name)
        expected = [lens.maps.heat_map("cat", step=step).values for step in range(STEPS)]
        draw(pipe, name, callback_on_step_end=inside)
        assert lens.maps.text == PROMPT
        for step in range(STEPS):
            torch.testing.assert_close(lens.maps.heat_map("cat", step=step).values, expected[step])


def test_a_subclass_that_hands_its_arguments_on_is_read():
    name = "StableDiffusionPipeline"
    pipe = PIPELINES[name]()
    with lavender.patch(pipe) as lens:
        draw(pipe, name)
        expected = lens.maps["cat"].values

    class StableDiffusionMinePipeline(type(pipe)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    pipe.__class__ = StableDiffusionMinePipeline
    with lavender.patch(pipe) as lens:
        draw(pipe, name)
        torch.testing.assert_close(lens.maps["cat"].values, expected)


def test_every_kind_of_picture_gets_the_same_overlay(tmp_path):
    from PIL import Image

    heat = HeatMap("cat", torch.rand(4, 6))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = np.asarray(heat.overlay(image))
    for given in (pixels, pixels / 255, (pixels / 255).astype(np.float32)):
        assert np.abs(np.asarray(heat.overlay(given)).astype(int) - expected).max() <= 1
    turned = image.getexif()
    turned[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=turned)
    assert heat.overlay(tmp_path / "turned.png").size == (32, 48)
    for wrong in (pixels.transpose(2, 0, 1), pixels.astype(np.int64), torch.rand(32, 48, 3)):
        with pytest.raises(DataError):
            heat.overlay(wrong)
