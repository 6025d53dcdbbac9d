"""The maps of two other tools, against what these tools gave for the same pipelines; see `other_tools`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lavender
from lavender.errors import CaptureError, ConfigError, ModelError
from lavender.teachers.presets import AmdMaps, DaamMaps

from .other_tools import COLUMNS, PROMPT, RECORDED, SIDES, STRIDE, WORDS, ZOOS, build, draw, draw_zoos
from .pipeline_zoo import PIPELINES
from .said import says

TOLERANCE = 3e-5
"""Of a map's maximum. The tools multiply queries and keys with other functions, in float32; attention here is sharp."""


@pytest.fixture(scope="module")
def recorded():
    return np.load(RECORDED)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def drawn(request, recorded):
    """The name of a pipeline, the pipeline itself, and its maps by each preset, and as they are without one."""
    pipe, maps = build(request.param), {}
    plain = draw(pipe)
    np.testing.assert_allclose(plain[::8, ::8], recorded[f"{request.param}/image"], atol=1e-4, err_msg="record the tools anew")
    for preset in (None, "daam", "amd"):
        with lavender.patch(pipe, preset=preset) as lens:
            np.testing.assert_array_equal(draw(pipe), plain)
            maps[preset] = lens.maps
    return request.param, pipe, maps


def require_equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * theirs.max())


def test_daam(drawn, recorded):
    name, _, maps = drawn
    found = maps["daam"]
    for word in WORDS:
        theirs = recorded[f"{name}/daam/{word}"]
        require_equal(found[word].to_numpy()[::STRIDE, ::STRIDE], theirs)
        assert found[word].word == word
        others = maps[None][word].to_numpy(found[word].values.shape)[::STRIDE, ::STRIDE] * 3
        assert np.abs(others - theirs).max() > 100 * TOLERANCE * theirs.max()  # this is another map than the usual one
    require_equal(found.heat_map("CAT", head=1).to_numpy()[::STRIDE, ::STRIDE], recorded[f"{name}/daam/cat, head 1"])
    require_equal(found.heat_map("red", occurrence=1).to_numpy()[::STRIDE, ::STRIDE], recorded[f"{name}/daam/red, second"])
    require_equal(found.to_word_maps().maps[8][::STRIDE, ::STRIDE], recorded[f"{name}/daam/red, second"])


def test_daam_clamps_each_token_before_it_averages(drawn, recorded, monkeypatch):
    name, _, maps = drawn
    monkeypatch.setattr(torch.Tensor, "clamp_min", lambda tensor, low: tensor)
    theirs = recorded[f"{name}/daam/cat"]
    assert np.abs(maps["daam"]["cat"].to_numpy()[::STRIDE, ::STRIDE] - theirs).max() > 10 * TOLERANCE * theirs.max()


@pytest.mark.parametrize("timesteps", ["last", "all"])
def test_amd(drawn, recorded, timesteps):
    name, _, maps = drawn
    theirs, step = recorded[f"{name}/amd/{timesteps}"], None if timesteps == "last" else "all"
    found = maps["amd"]
    for word, tokens in (("cat", [3]), ("hats", [6, 7, 8]), ("two", [5])):
        require_equal(found.heat_map(word, step=step).to_numpy(), theirs[tokens].mean(axis=0))
    if timesteps == "last":
        assert np.abs(maps[None]["cat"].to_numpy() - theirs[3]).max() > 100 * TOLERANCE * theirs[3].max()


@pytest.mark.parametrize("name", ZOOS)
def test_amd_of_transformers(name, recorded):
    pipe = PIPELINES[name]()
    with lavender.patch(pipe, preset="amd", tokens=tuple(range(COLUMNS))) as lens:
        np.testing.assert_allclose(draw_zoos(pipe), recorded[f"{name}/image"], atol=1e-4, err_msg="record the tools anew")
    for timesteps, step in (("last", None), ("all", "all")):
        for column, theirs in enumerate(recorded[f"{name}/amd/{timesteps}"]):
            require_equal(lens.maps.heat_map(column, step=step).to_numpy(), theirs)


def test_the_maps_say_whose_they_are(drawn):
    _, pipe, maps = drawn
    assert [type(maps[preset]) for preset in ("daam", "amd")] == [DaamMaps, AmdMaps]
    assert maps["daam"].text == maps["amd"].text == PROMPT
    assert maps["daam"].coverage == maps[None].coverage
    with pytest.raises(KeyError, match="no word 'dog'"):
        maps["daam"]["dog"]
    with pytest.raises(CaptureError, match=r"DAAM leaves out all of these layers: it reads down and up blocks, .*; here are none"):
        maps["daam"].heat_map("cat", layers="mid_block")
    with pytest.raises(CaptureError, match="steps were not kept apart"):
        maps["daam"].heat_map("cat", step=1)
    with pytest.raises(CaptureError, match="heads were not kept apart"):
        maps["amd"].heat_map("cat", head=1)
    for settings, message in (
        ({"preset": "dam"}, "preset is 'dam'; choose daam or amd"),
        ({"preset": "daam", "heads": True}, "leave heads"),
    ):
        with pytest.raises(ConfigError, match=message):
            lavender.patch(pipe, **settings)


def test_several_pictures_of_several_prompts(drawn):
    """A picture's tokens are its own prompt's."""
    name, pipe, _ = drawn
    prompts, side = ["a cat in two hats", "the red chair"], SIDES[name]
    alone = []
    with lavender.patch(pipe, preset="daam") as lens:
        options = {"height": side, "width": side, "num_inference_steps": 1, "guidance_scale": 5.0, "output_type": "latent"}
        latents = torch.randn(2, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
        for prompt, own in zip(prompts, latents, strict=True):
            pipe(prompt, latents=own[None], **options)
            alone.append({word: lens.maps[word].to_numpy() for word in lens.maps})
        pipe(prompts, latents=latents, **options)
        for picture, maps in enumerate(alone):
            for word, theirs in maps.items():
                require_equal(lens.maps_of(picture)[word].to_numpy(), theirs)


def test_a_word_of_several_cases_is_one_word_to_daam(drawn):
    name, pipe, _ = drawn
    options = {"height": SIDES[name], "width": SIDES[name], "num_inference_steps": 1, "output_type": "latent"}
    with lavender.patch(pipe, preset="daam") as lens:
        pipe("Red cat in red hats", negative_prompt="a chair", **options)
        maps, negative = lens.maps, lens.negative_maps
    each = maps.to_word_maps().maps
    for word in ("red", "Red"):
        require_equal(maps[word].to_numpy(), (each[0] + each[3]) / 2)
        require_equal(maps.heat_map(word, occurrence=0).to_numpy(), each[0 if word == "Red" else 3])
    assert np.abs(each[0] - each[3]).max() > 100 * TOLERANCE * each[0].max()
    assert negative["chair"].values.shape == maps["cat"].values.shape


def test_a_tools_map_has_all_of_its_layers(drawn):
    from diffusers.models.attention_processor import AttnProcessor

    name, pipe, _ = drawn
    options = {"height": SIDES[name], "width": SIDES[name], "num_inference_steps": 1, "output_type": "latent"}
    attention = next(
        module
        for layer, module in pipe.unet.named_modules()
        if layer.endswith("up_blocks.1.attentions.0.transformer_blocks.0.attn2")
    )
    before = attention.processor

    class Hidden(AttnProcessor):
        """Multiplies matrices itself."""

    with lavender.patch(pipe, preset="amd") as lens:
        attention.set_processor(Hidden())
        try:
            with says("maps cannot be read, or not all"):
                pipe("a cat", **options)
        finally:
            attention.set_processor(before)
        with pytest.raises(CaptureError, match=r"1 of .* attention layers recorded nothing"):
            _ = lens.maps


def test_what_a_tool_does_not_read_is_refused(drawn):
    _, pipe, _ = drawn
    with lavender.patch(pipe, preset="daam") as lens:
        pipe("a cat", height=192, width=256, num_inference_steps=1, output_type="latent")
        with pytest.raises(CaptureError, match="DAAM has maps of square pictures alone"):
            lens.maps["cat"]
    flux = PIPELINES["FluxPipeline"]()
    with pytest.raises(ModelError, match=r"preset='daam' .* of UNet2DConditionModel, not of FluxTransformer2DModel; leave it out"):
        lavender.patch(flux, preset="daam")
    with lavender.patch(flux, preset="amd") as lens:
        draw_zoos(flux)
        with pytest.raises(CaptureError, match="leaves out all of these layers"):
            lens.maps.heat_map("cat", layers="single")
    with pytest.raises(ConfigError, match="preset"):
        lavender.patch(torch.nn.Linear(1, 1), preset="daam")
