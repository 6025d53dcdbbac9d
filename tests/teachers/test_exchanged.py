"""Batches whose texts are each other's, and forwards, layers and texts that are exchanged around the denoiser."""

from __future__ import annotations

import pytest
import torch

import lavender
from lavender.errors import CaptureError

from .pipeline_zoo import CAPTIONS, PIPELINES
from .said import says
from .test_ownership import FLUX, SD, SD3, SDXL, agree, layers_of, log_of, plainly
from .test_pipelines import PROMPT, draw


def test_a_pipeline_made_by_the_class_of_a_patched_one_is_another_pipeline():
    pipe = PIPELINES[SD]()
    original = type(pipe)
    with lavender.patch(pipe) as lens:
        draw(pipe, SD)
        first = lens.maps["cat"].values
        parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
        twin = type(pipe)(**parts, requires_safety_checker=False)
        twin.set_progress_bar_config(disable=True)
        with lavender.patch(twin) as other:
            assert other is not lens
            draw(twin, SD, prompt="two birds")
            assert other.maps.text == "two birds"
        assert type(twin) is original
        assert lens.is_patched
        assert torch.equal(lens.maps["cat"].values, first)
    with lavender.patch(twin) as other:
        draw(twin, SD)
        assert torch.equal(other.maps["cat"].values, first)


def test_layers_that_run_twice_in_one_forward_are_refused():
    pipe = PIPELINES[SD]()
    original = pipe.unet.forward
    with torch.no_grad():
        other = pipe.encode_prompt("two birds", "cpu", 1, False)[0]

    def guided(sample, timestep, encoder_hidden_states, **kwargs):
        original(sample, timestep, other.expand(len(sample), -1, -1), **kwargs)
        return original(sample, timestep, encoder_hidden_states, **kwargs)

    pipe.unet.forward = guided
    plain = draw(pipe, SD)
    with lavender.patch(pipe) as lens:
        with says("ran twice|another text"):
            assert (draw(pipe, SD) == plain).all()
        with pytest.raises(CaptureError, match=r"ran twice|another text"):
            lens.maps  # noqa: B018


@pytest.mark.parametrize("part", ["mid_block", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"])
def test_an_interrupt_inside_a_forward_leaves_nothing_behind(part):
    """torch runs no hook of a module that it interrupts."""
    pipe = PIPELINES[SD]()
    with lavender.patch(pipe) as lens:
        plain = draw(pipe, SD)
        expected = lens.maps["cat"].values

        def interrupt(*_):
            raise KeyboardInterrupt

        handle = pipe.unet.get_submodule(part).register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, SD)
        assert torch.overrides._len_torch_function_stack() == 0
        with torch.no_grad():
            prompt = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):  # in a loop of the user's
            pipe.unet(torch.randn(1, 4, 8, 12), torch.tensor(7), prompt)
        handle.remove()
        assert (draw(pipe, SD) == plain).all()
        assert torch.overrides._len_torch_function_stack() == 0
        assert torch.equal(lens.maps["cat"].values, expected)
        assert lens.maps.coverage.left_out == {}


@pytest.mark.parametrize("place", ["unet", "mid_block"])
def test_a_forward_inside_a_forward_is_not_part_of_the_call(place):
    pipe = PIPELINES[SD]()
    with lavender.patch(pipe) as lens:
        plain = draw(pipe, SD)
        expected = lens.maps["cat"].values
        busy = []

        def ask(module, args, kwargs=None):
            if not busy:
                busy.append(1)
                text = pipe.unet.seen
                pipe.unet(torch.randn(2, 4, 8, 12), torch.tensor(7), text)
                busy.clear()

        def note(module, args, kwargs):
            module.seen = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]

        handles = [pipe.unet.register_forward_pre_hook(note, with_kwargs=True)]
        module = pipe.unet if place == "unet" else pipe.unet.mid_block
        handles.append(module.register_forward_pre_hook(ask))
        assert (draw(pipe, SD) == plain).all()
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(lens.maps["cat"].values, expected)
        assert lens.maps.coverage.left_out == {"inside another forward": 2}
        assert lens.maps.coverage.partly_read == {}


@pytest.mark.parametrize(
    ("prompts", "negatives"),
    [
        (CAPTIONS[:2], CAPTIONS[1::-1]),
        (CAPTIONS[:2], [CAPTIONS[1]] * 2),
        (["", CAPTIONS[0]], None),
        ([CAPTIONS[0], CAPTIONS[1], CAPTIONS[0]], [CAPTIONS[1], CAPTIONS[0], CAPTIONS[1]]),
        (["a cat", "A cat"], None),
        (["a cat", " a  cat "], ["a", "a"]),
    ],
)
@pytest.mark.parametrize("name", [SD, SDXL])
def test_batches_whose_texts_are_each_others(name, prompts, negatives):
    pipe = PIPELINES[name]()
    log = log_of(pipe, layers_of(pipe))

    def run():
        return draw(pipe, name, prompt=list(prompts), negative_prompt=negatives, num_images_per_prompt=2)

    plain = plainly(pipe, name, log, run)
    with lavender.patch(pipe) as lens:
        assert (run() == plain).all()
        for picture in range(2 * len(prompts)):
            maps = lens.maps_of(picture)
            assert maps.text == prompts[picture // 2]
            if "cat" in maps:
                agree(maps, log.maps(2 * len(prompts) + picture, [2]))
        if isinstance(negatives, list):
            for picture in range(2 * len(prompts)):
                assert lens.negative_maps_of(picture).text == negatives[picture // 2]


def test_another_pipeline_that_draws_the_same_prompt_in_the_schedulers_step_is_not_part_of_the_call():
    from diffusers import StableDiffusionImg2ImgPipeline
    from PIL import Image

    pipe = PIPELINES[SD]()
    other = StableDiffusionImg2ImgPipeline(**pipe.components)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    with lavender.patch(pipe) as lens:
        plain = draw(pipe, SD)
        expected = lens.maps["cat"].values
        step = pipe.scheduler.step

        def drawing_step(*args, **kwargs):
            other(PROMPT, image=Image.new("RGB", (48, 32), "red"), num_inference_steps=4, guidance_scale=5.0)
            return step(*args, **kwargs)

        pipe.scheduler.step = drawing_step
        assert (draw(pipe, SD) == plain).all()
        assert torch.equal(lens.maps["cat"].values, expected)
        assert lens.maps.coverage.left_out["by another pipeline"] > 2


def test_one_negative_prompt_serves_all_pictures():
    for name in (SDXL, SD3, FLUX):
        pipe = PIPELINES[name]()
        options = {"true_cfg_scale": 4.0} if name == FLUX else {}
        with lavender.patch(pipe) as lens:
            draw(pipe, name, prompt=CAPTIONS[:2], negative_prompt="red hat", **options)
            for picture in range(2):
                assert lens.maps_of(picture).text == CAPTIONS[picture]
                assert lens.negative_maps_of(picture).text == "red hat"
                assert lens.negative_maps_of(picture)["hat"].values.min() > 0


def test_callbacks_with_an_attribute_of_diffusers_own_are_called_as_they_are():
    pipe = PIPELINES[SD]()
    plain = draw(pipe, SD)

    def function(_pipe, step, timestep, given):
        return given

    function.tensor_inputs = ["latents"]

    class Slotted:
        __slots__ = ("tensor_inputs",)

        def __call__(self, _pipe, step, timestep, given):
            return given

    with lavender.patch(pipe) as lens:
        for callback in (function, Slotted()):
            assert (draw(pipe, SD, callback_on_step_end=callback) == plain).all()
            assert lens.maps.coverage.forwards == 2


def test_a_text_that_is_exchanged_behind_torch_is_another_text():
    pipe = PIPELINES[SD]()
    with torch.no_grad():
        other = pipe.encode_prompt("two birds", "cpu", 1, False)[0][0]

    def change(_pipe, step, timestep, given):
        given["prompt_embeds"].data[-1] = other
        return given

    with lavender.patch(pipe, steps=True) as lens:
        draw(pipe, SD, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
        assert {entry.step for entry in lens.maps.entries} == {0}


def test_a_denoiser_that_hands_its_arguments_on_is_read():
    pipe = PIPELINES[SD]()
    with lavender.patch(pipe) as lens:
        draw(pipe, SD)
        expected = lens.maps["cat"].values

    class MyUNet(type(pipe.unet)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    pipe.unet.__class__ = MyUNet
    with lavender.patch(pipe) as lens:
        draw(pipe, SD)
        assert torch.equal(lens.maps["cat"].values, expected)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_layer_that_attends_to_another_text_is_left_out(adapter):
    from peft import LoraConfig

    pipe = PIPELINES[SD]()
    if adapter:
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    with torch.no_grad():
        other = pipe.encode_prompt("two birds", "cpu", 1, False)[0]
    name, module = next((n, m) for n, m in pipe.unet.named_modules() if n.endswith("attn2"))
    with lavender.patch(pipe) as lens:
        handle = module.register_forward_pre_hook(
            lambda _m, args, kwargs: (args, {**kwargs, "encoder_hidden_states": other.expand(2, -1, -1)}), with_kwargs=True
        )
        with says("attends to another text"):
            draw(pipe, SD)
        assert lens.maps.coverage.missing_layers == (name,)
        handle.remove()
        draw(pipe, SD)
        assert lens.maps.coverage.missing_layers == ()


def test_what_the_text_encoders_received_is_said_where_nothing_belongs():
    pipe = PIPELINES[SD]()

    class StableDiffusionStyledPipeline(type(pipe)):
        def encode_prompt(self, prompt, *args, **kwargs):
            return super().encode_prompt(f"{prompt} over the blue house", *args, **kwargs)

    pipe.__class__ = StableDiffusionStyledPipeline
    with lavender.patch(pipe) as lens:
        draw(pipe, SD)
        with pytest.raises(CaptureError, match="received 'a cat in a red hat over the blue house'"):
            lens.maps  # noqa: B018


def test_in_ones_own_loop_the_empty_text_may_be_encoded_last():
    pipe = PIPELINES[SD]()
    with torch.no_grad(), lavender.patch(pipe) as lens:
        prompt = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
        empty = pipe.encode_prompt("", "cpu", 1, False)[0]
        pipe.unet(torch.randn(2, 4, 8, 12), torch.tensor(7), torch.cat([empty, prompt]))
        assert lens.maps.text == PROMPT
        assert lens.maps["cat"].values.min() > 0


def test_a_patched_pipeline_can_be_a_teacher(tmp_path):
    from lavender.config import TeacherConfig
    from lavender.teachers.model import Teacher

    from .explicit import picture

    pipe = PIPELINES[SD]()
    config = TeacherConfig(inversion="noise", map_size=6, image_size=48)
    expected = Teacher(pipe, config).word_maps(picture(1), "a cat in a red hat")
    with lavender.patch(pipe):
        draw(pipe, SD)
        assert (Teacher(pipe, config).word_maps(picture(1), "a cat in a red hat").maps == expected.maps).all()
