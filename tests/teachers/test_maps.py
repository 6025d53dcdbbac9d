"""Every kind of model as a teacher: its maps against an explicit computation, and the pipeline as it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lavender.config import TeacherConfig
from lavender.errors import CaptureError, ConfigError, ModelError
from lavender.images import Picture
from lavender.teachers.model import Teacher
from lavender.words import Caption

from .explicit import CROSS, NAMES, SIDE, built, explicit_maps, forwards_of, picture

CAPTIONS = ["a cat in a red hat", "two zebras, over the house"]
UNETS = ("sd", "sd v", "sdxl")
NOISE = TeacherConfig(inversion="noise", timesteps=(51, 301), image_size=SIDE, map_size=8)
DDIM = TeacherConfig(inversion="ddim", inversion_steps=2, diffusion_steps=4, image_size=SIDE, map_size=8)
FLOW = replace(DDIM, inversion="flow")
NULL_TEXT = replace(DDIM, inversion="null_text", diffusion_steps=3, inner_steps=2, guidance_scale=5.0)
BACK = {name: DDIM if name in CROSS else FLOW for name in NAMES}
"""A way that denoises, for each model."""
CASES = {
    **{f"{name} noise": (name, NOISE) for name in NAMES},
    **{f"{name} back": (name, BACK[name]) for name in NAMES},
    **{f"{name} guided": (name, replace(BACK[name], guidance_scale=5.0)) for name in NAMES},
    **{f"{name} null_text": (name, NULL_TEXT) for name in CROSS},
}
SETTINGS = {
    "max": {"head_reduction": "max"},
    "heads": {"heads": (1,)},
    "max of some heads": {"head_reduction": "max", "heads": (0,)},
    "larger maps": {"map_size": 32},
    # A flow begins at 1,000, above every timestep of the others.
    "timestep_weights": {"timestep_weights": (1.0, 0.0, 2.5), "last_timestep": 999},
    "first_timestep": {"first_timestep": 400},
    "last_timestep": {"last_timestep": 400},
    "renormalize": {"renormalize": True},
    "renormalize max": {"renormalize": True, "head_reduction": "max"},
}
LAYERS = {
    "sdxl": {
        "layers": {"layers": ("up_blocks.0", "mid_block")},
        "layer_weights": {"layers": ("up_blocks", "blocks.2", "mid_block"), "layer_weights": (0.5, 0.0, 3.0)},
        "resolutions": {"resolutions": (6,)},
    },
    "sd3": {"layers": {"layers": ("1.attn",)}, "layer_weights": {"layers": ("0.attn", "1.attn"), "layer_weights": (0.5, 3.0)}},
    "flux": {"layers": {"layers": ("single",)}, "layer_weights": {"layers": ("single", "blocks"), "layer_weights": (0.5, 3.0)}},
}


def compare(pipe, name, config):
    """Both pictures' maps, ours and the explicit ones."""
    teacher = Teacher(pipe, config)
    images = [picture(0), picture(1)]
    with forwards_of(teacher.family.denoiser) as forwards:
        ours = teacher.word_maps_of([*map(Picture.open, images)], [*map(Caption.of, CAPTIONS)])
    teacher.close()
    return [torch.from_numpy(own.maps).double() for own in ours], explicit_maps(pipe, name, forwards, config, CAPTIONS)


@pytest.mark.parametrize("case", CASES)
def test_maps_equal_an_explicit_softmax(case):
    name, config = CASES[case]
    ours, expected = compare(built(name), name, config)
    for own, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-5 * float(other.max()))
        for w in range(1, len(own)):
            assert not torch.equal(own[w], own[w - 1])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", LAYERS)
def test_settings_do_what_they_say(name, setting):
    """As above; and each of them changes the maps."""
    config = replace(BACK[name], **SETTINGS[setting])
    _equal_and_changed(name, config)


@pytest.mark.parametrize(("name", "setting"), [(name, setting) for name, own in LAYERS.items() for setting in own])
def test_chosen_layers(name, setting):
    _equal_and_changed(name, replace(BACK[name], **LAYERS[name][setting]))


def _equal_and_changed(name, config):
    pipe = built(name)
    ours, expected = compare(pipe, name, config)
    plain, _ = compare(pipe, name, replace(BACK[name], map_size=config.map_size))
    for own, other, default in zip(ours, expected, plain, strict=True):
        # `max` takes the largest of numbers that are rounded apart.
        torch.testing.assert_close(own, other, rtol=0, atol=1e-5 * float(other.max()))
        if config.map_size == BACK[name].map_size and not (config.renormalize and name in CROSS):
            assert (own - default).abs().max() > 1e-4 * default.max()


def test_renormalizing_changes_nothing_where_only_text_is_attended_to():
    plain, _ = compare(built("sd"), "sd", NOISE)
    renormalized, _ = compare(built("sd"), "sd", replace(NOISE, renormalize=True))
    torch.testing.assert_close(plain, renormalized, rtol=1e-5, atol=0)


@pytest.mark.parametrize("normalization", ["zscore", "sum", "minmax", "max"])
def test_finished_maps_are_normalized(normalization):
    config = replace(NOISE, normalization=normalization)
    ours, expected = compare(built("sd3"), "sd3", config)
    for own, raw in zip(ours, expected, strict=True):
        flat = raw.flatten(1).numpy()
        low, high = flat.min(1, keepdims=True), flat.max(1, keepdims=True)
        by_hand = {
            "zscore": (flat - flat.mean(1, keepdims=True)) / np.sqrt(flat.var(1, keepdims=True) + 1e-6),
            "sum": flat / (flat.sum(1, keepdims=True) + 1e-6),
            "minmax": (flat - low) / (high - low + 1e-6),
            "max": flat / (high + 1e-6),
        }[normalization]
        np.testing.assert_allclose(own.flatten(1).numpy(), by_hand, rtol=0, atol=1e-3 if normalization != "sum" else 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_denoiser_is_asked_as_its_own_pipeline_asks_it(name):
    """The conditional samples of a run of the pipeline: same text, pooled text, sizes, places, guidance, mask."""
    pipe, caption = built(name), CAPTIONS[0]
    options = {"use_resolution_binning": False} if name == "pixart" else {}
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    with forwards_of(denoiser) as own:
        pipe(caption, num_inference_steps=2, height=SIDE, width=SIDE, guidance_scale=5.0, output_type="latent", **options)
    with forwards_of(denoiser) as ours:
        Teacher(pipe, replace(BACK[name], guidance_scale=5.0)).word_maps(picture(0), caption)
    first, second = own[0], ours[-1]
    for key in first.inputs.keys() | second.inputs.keys():
        if key not in ("self", "timestep", "sample", "hidden_states", "return_dict"):
            _same(key, first.inputs.get(key), second.inputs.get(key))
    assert first.latents.shape == second.latents.shape
    assert first.latents.dtype == second.latents.dtype
    assert first.timestep > 400, "in units of a thousandth of the schedule, as ours"
    assert max(forward.timestep for forward in ours) > 400
    assert max(forward.timestep for forward in ours) <= 1000


def _same(key, theirs, ours):
    if isinstance(theirs, dict):
        for own, value in theirs.items():
            _same(f"{key}.{own}", value, ours[own])
    elif isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=lambda text: f"{key}: {text}", check_dtype=False)
    else:
        assert (theirs or None) == (ours or None), key


@pytest.mark.parametrize("name", NAMES)
def test_generation_keeps_every_bit(name):
    pipe = built(name)
    options = {"use_resolution_binning": False} if name == "pixart" else {}

    def draw():
        generator = torch.Generator().manual_seed(0)
        size = {"height": SIDE, "width": SIDE}
        return pipe(
            CAPTIONS[0], num_inference_steps=2, guidance_scale=5.0, output_type="np", generator=generator, **size, **options
        ).images

    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer

    def state():
        hooks = {own: (len(m._forward_hooks), len(m._forward_pre_hooks)) for own, m in pipe_modules(pipe)}
        return hooks, {own: p.requires_grad for own, p in denoiser.named_parameters()}

    next(denoiser.parameters()).requires_grad_(False)
    plain, before = draw(), state()
    weights = {own: p.clone() for own, p in denoiser.named_parameters()}
    teacher = Teacher(pipe, NULL_TEXT if name in UNETS else replace(BACK[name], guidance_scale=5.0))
    assert (draw() == plain).all()
    maps = teacher.word_maps(picture(0), CAPTIONS[0])
    assert np.isfinite(maps.maps).all()
    assert state()[1] == before[1]
    assert (draw() == plain).all()
    again = teacher.word_maps(picture(0), CAPTIONS[0])
    np.testing.assert_array_equal(again.maps, maps.maps)
    teacher.close()
    assert (draw() == plain).all()
    assert state() == before
    assert all(torch.equal(weights[own], p) for own, p in denoiser.named_parameters())
    assert all(p.grad is None for p in denoiser.parameters())
    with pytest.raises(CaptureError, match="undone"):
        teacher.word_maps(picture(0), CAPTIONS[0])


def pipe_modules(pipe):
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            yield from ((f"{part}.{own}", child) for own, child in module.named_modules())


def test_an_error_restores_what_asks_for_gradients():
    pipe = built("sd")
    teacher = Teacher(pipe, NOISE)
    pipe.unet.conv_out.register_forward_pre_hook(lambda _m, _a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        teacher.word_maps(picture(0), CAPTIONS[0])
    assert all(p.requires_grad for p in pipe.unet.parameters())


def test_half_precision_is_close_to_single(tmp_path):
    folder = tmp_path / "teacher"
    built("sd").save_pretrained(folder)
    maps = {}
    for dtype in ("float32", "bfloat16"):
        teacher = Teacher(folder, replace(DDIM, dtype=dtype, map_size=12))
        assert {part.dtype for part in teacher.pipe.components.values() if isinstance(part, torch.nn.Module)} == {
            getattr(torch, dtype)
        }
        maps[dtype] = teacher.word_maps(picture(0), CAPTIONS[0]).maps
        assert maps[dtype].dtype == np.float32
    assert not np.array_equal(maps["float32"], maps["bfloat16"])
    np.testing.assert_allclose(maps["bfloat16"], maps["float32"], rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        ("sd", {"dtype": "bfloat16"}, r"dtype is 'bfloat16'.*StableDiffusionPipeline.*torch\.float32"),
        ("sd", {"image_size": 36}, "image_size is 36.*multiple of 8"),
        ("sdxl", {"image_size": 40}, "image_size is 40.*multiple of 16"),
        ("sd3", {"image_size": 44}, "image_size is 44.*multiple of 8"),
        ("flux", {"image_size": 44}, "image_size is 44.*multiple of 8"),
        ("sd", {"inversion": "flow"}, "'flow'.*no flow-matching.*ddim"),
        ("pixart", {"inversion": "flow"}, "'flow'.*no flow-matching.*ddim"),
        ("sd3", {"inversion": "ddim"}, "'ddim'.*flow-matching.*choose flow"),
        ("flux", {"inversion": "null_text", "guidance_scale": 2.0}, "'null_text'.*flow-matching"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(name, changed, says):
    with pytest.raises(ConfigError, match=says):
        Teacher(built(name), replace(NOISE, **changed))


def test_offload_needs_a_device_to_leave():
    for offload in ("model", "sequential"):
        with pytest.raises(ConfigError, match=f"offload is '{offload}'.*CPU"):
            Teacher(built("sd"), NOISE, offload=offload)


def test_other_predictions_are_refused():
    pipe = built("sd")
    pipe.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ConfigError, match="predicts 'sample'"):
        Teacher(pipe, DDIM)


def test_models_that_take_pictures_are_refused():
    import diffusers

    parts = built("sd").components
    for kind in (diffusers.StableDiffusionImg2ImgPipeline, diffusers.StableDiffusionInpaintPipeline):
        with pytest.raises(ModelError, match=rf"{kind.__name__} cannot be a teacher.*StableDiffusionPipeline.*FluxPipeline"):
            Teacher(kind(**parts, requires_safety_checker=False), NOISE)
    wide = diffusers.UNet2DConditionModel.from_config({**parts["unet"].config, "in_channels": 9})
    inpainting = diffusers.StableDiffusionPipeline(**{**parts, "unet": wide}, requires_safety_checker=False)
    with pytest.raises(ModelError, match=r"9 channels.*4.*inpainting"):
        Teacher(inpainting, NOISE)
    with pytest.raises(ModelError, match="Linear cannot be a teacher"):
        Teacher(torch.nn.Linear(1, 1), NOISE)
