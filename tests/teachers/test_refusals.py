"""What a patched pipeline refuses, each time with the remedy."""

from __future__ import annotations

import pytest
import torch

import lavender
from lavender.errors import CaptureError, ConfigError, ModelError

from .pipeline_zoo import PIPELINES
from .said import says
from .test_pipelines import PROMPT, draw


def test_gradient_checkpointing_is_refused_where_gradients_would_be_wrong():
    pipe = PIPELINES["StableDiffusionPipeline"]()
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    with lavender.patch(pipe) as lens:
        prompt, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
        latents = torch.randn(1, 4, 4, 6, requires_grad=True)
        with pytest.raises(CaptureError, match="disable_gradient_checkpointing"):
            pipe.unet(latents, torch.tensor(500), prompt)
        with torch.no_grad():
            pipe.unet(latents, torch.tensor(500), prompt)
        assert lens.maps["cat"].values.min() > 0


def test_settings_of_the_other_side_and_names_that_are_nowhere_are_refused():
    name = "StableDiffusionPipeline"
    pipe = PIPELINES[name]()
    with pytest.raises(ConfigError, match="pipeline has layers"):
        lavender.patch(pipe, processor=3)
    with pytest.raises(ConfigError, match="expected an AlignmentConfig"):
        lavender.patch(pipe, object())
    with pytest.raises(ConfigError, match="settings of pipelines"):
        lavender.patch(pipe.unet, layers=("up",))
    with pytest.raises(ModelError, match="no attention layer is named like attic"):
        lavender.patch(pipe, layers=("mid_block", "attic"))
    with lavender.patch(pipe, layers="mid_block") as lens:
        assert len(lens.layers) == 1
    with lavender.patch(pipe, heads=True, steps=True) as lens:
        draw(pipe, name)
        maps = lens.maps
        draw(pipe, name, prompt="Cat and cat")
        twice = lens.maps
    assert torch.equal(maps.heat_map("cat", layers="mid_block").values, maps.heat_map("cat", layers=["mid_block"]).values)
    for options, said in (
        ({"head": 99}, "there is no head 99"),
        ({"step": 99}, "there is no step 99; there are 0 to 1"),
        ({"layers": [99]}, r"no layers \[99\]"),
        ({"frame": 3}, "there is no frame 3"),
    ):
        with pytest.raises(CaptureError, match=said):
            maps.heat_map("cat", **options)
    assert not torch.equal(twice["Cat"].values, twice["cat"].values)
    assert torch.equal(dict(twice)["cat"].values, twice["cat"].values)
    assert "dog" not in maps


def test_words_that_were_cut_off_are_no_keys():
    name = "StableDiffusionPipeline"
    pipe = PIPELINES[name]()
    with lavender.patch(pipe) as lens:
        draw(pipe, name, prompt="cat " * 30 + "house")
        assert "house" not in lens.maps
        assert list(dict(lens.maps)) == ["cat"] == list(lens.maps)
        assert len(lens.maps) == 1
        draw(pipe, name, prompt="")
        with pytest.raises(CaptureError, match="no word"):
            lens.maps.plot()


def test_processors_that_hide_their_attention_are_named_with_the_remedy():
    pipe = PIPELINES["StableDiffusionPipeline"]()
    pipe.enable_attention_slicing()
    with lavender.patch(pipe), pytest.raises(CaptureError, match="disable_attention_slicing"):
        draw(pipe, "StableDiffusionPipeline")

    class XFormersAttnProcessor:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
            return hidden_states

    pipe = PIPELINES["StableDiffusionPipeline"]()
    pipe.unet.set_attn_processor(XFormersAttnProcessor())
    with lavender.patch(pipe), pytest.raises(CaptureError, match="disable_xformers_memory_efficient_attention"):
        draw(pipe, "StableDiffusionPipeline")


def test_a_foreign_attention_backend_is_named_with_the_remedy():
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    pipe = PIPELINES["FluxPipeline"]()
    native = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]

    def hidden(query, key, value, **kwargs):
        return value

    name = AttentionBackendName._NATIVE_MATH
    before = _AttentionBackendRegistry._backends[name]
    assert native is not hidden
    try:
        _AttentionBackendRegistry._backends[name] = hidden
        pipe.transformer.set_attention_backend(name.value)
        with lavender.patch(pipe) as lens:
            with says(f"attention backend is '{name.value}'"):
                draw(pipe, "FluxPipeline")
            with pytest.raises(CaptureError, match=f"attention backend is '{name.value}'"):
                lens.maps  # noqa: B018
    finally:
        _AttentionBackendRegistry._backends[name] = before


def test_what_nobody_can_know_is_said():
    pipe = PIPELINES["StableDiffusionPipeline"]()
    embeddings, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    with lavender.patch(pipe) as lens:
        with pytest.raises(CaptureError, match="call the pipeline"):
            lens.maps  # noqa: B018
        draw(pipe, "StableDiffusionPipeline", prompt="cat " * 30 + "house")
        with pytest.raises(CaptureError, match="window ends before it"):
            lens.maps["house"]
        with pytest.raises(KeyError, match="its words: \\['cat', 'house'\\]"):
            lens.maps["dog"]
        with pytest.raises(CaptureError, match="heads=True"):
            lens.maps.heat_map("cat", head=1)
        with pytest.raises(CaptureError, match="steps=True"):
            lens.maps.heat_map("cat", step=1)
        draw(pipe, "StableDiffusionPipeline", prompt=None, prompt_embeds=embeddings, negative_prompt_embeds=negative)
        with pytest.raises(CaptureError, match="given as text"):
            lens.maps  # noqa: B018


def test_an_exception_while_drawing_leaves_nothing_behind():
    pipe = PIPELINES["StableDiffusionPipeline"]()
    before = type(pipe)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), lavender.patch(pipe):
        draw(pipe, "StableDiffusionPipeline", callback_on_step_end=stop)
    assert type(pipe) is before
    assert torch.overrides._len_torch_function_stack() == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


def test_a_pipeline_that_no_table_lists_is_read():
    pipe = PIPELINES["StableDiffusionPipeline"]()
    with lavender.patch(pipe) as lens:
        draw(pipe, "StableDiffusionPipeline")
        expected = lens.maps["cat"].values

    class NovelPipeline(type(pipe)):
        pass

    pipe.__class__ = NovelPipeline
    with lavender.patch(pipe) as lens:
        draw(pipe, "StableDiffusionPipeline")
        assert torch.equal(lens.maps["cat"].values, expected)


@pytest.mark.full
def test_a_denoiser_that_ran_compiled_before_is_named_with_the_remedy():
    pipe = PIPELINES["StableDiffusionPipeline"]()
    torch.compiler.reset()
    pipe.unet.compile(backend="eager")
    draw(pipe, "StableDiffusionPipeline")
    with lavender.patch(pipe) as lens:
        with says(r"patch it first, or call torch\.compiler\.reset"):
            draw(pipe, "StableDiffusionPipeline")
        with pytest.raises(CaptureError, match=r"patch it first, or call torch\.compiler\.reset"):
            lens.maps  # noqa: B018
        torch.compiler.reset()
        draw(pipe, "StableDiffusionPipeline")
        assert lens.maps["cat"].values.min() > 0
    torch.compiler.reset()
