"""Capture in a diffusers pipeline: exact, invisible, and gone when it is undone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

import lavender
from lavender.errors import CaptureError, ModelError
from lavender.teachers import recording as diffusers_hooks


@pytest.fixture
def inputs(pipe):
    torch.manual_seed(3)
    return {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor(151),
        "encoder_hidden_states": torch.randn(2, 32, pipe.unet.config.cross_attention_dim),
    }


WEIGHTS = torch.zeros(2, 3, 32)
WEIGHTS[:, 0, 2] = 1
WEIGHTS[:, 1, 3:5] = 0.5
WEIGHTS[1, 2, 7] = 1


def explicit_maps(unet, inputs, weights):
    """Per layer [B, H, W, Q], from attention scores that diffusers computes itself, in float64."""
    found = {}

    class Explicit:
        def __init__(self, name):
            self.name = name

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            query, key, value = (
                attn.head_to_batch_dim(p) for p in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
            )
            probabilities = attn.get_attention_scores(query, key)
            if encoder_hidden_states is not None:
                split = probabilities.unflatten(0, (len(hidden_states), attn.heads))
                found[self.name] = torch.einsum("bhqn,bwn->bhwq", split, weights)
            return attn.to_out[0](attn.batch_to_head_dim(probabilities @ value))

    before = dict(unet.attn_processors)
    unet.set_attn_processor({name: Explicit(name.removesuffix(".processor")) for name in before})
    unet(**inputs)
    unet.set_attn_processor(before)
    return found


def test_maps_equal_explicit_attention_in_float64(pipe, inputs):
    unet = pipe.unet.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        expected = explicit_maps(unet, inputs, WEIGHTS.double())
        with lavender.patch(pipe) as patch, patch.capture(WEIGHTS) as recording:
            unet(**inputs)
    assert {e.layer for e in recording.entries} == set(expected)
    for entry in recording.entries:
        torch.testing.assert_close(entry.maps.flatten(-2), expected[entry.layer], rtol=0, atol=1e-10)
        assert entry.maps.shape[-2:] in ((16, 16), (8, 8))


@pytest.mark.parametrize("fused", [False, True])
def test_under_autocast_maps_are_those_of_the_half_precision_attention(pipe, inputs, fused, monkeypatch):
    seen = set()

    def spy(query, key, *rest, original, **options):
        seen.update((query.dtype, key.dtype))
        return original(query, key, *rest, **options)

    for name in ("column_maps", "column_attention"):
        monkeypatch.setattr(diffusers_hooks, name, partial(spy, original=getattr(diffusers_hooks, name)))
    with torch.no_grad():
        expected = explicit_maps(pipe.unet, inputs, WEIGHTS)
        with torch.autocast("cpu", torch.bfloat16):
            plain = pipe.unet(**inputs).sample
            with lavender.patch(pipe) as patch, patch.capture(WEIGHTS, fused=fused) as recording:
                sample = pipe.unet(**inputs).sample
    assert seen == {torch.bfloat16}
    for entry in recording.entries:
        torch.testing.assert_close(entry.maps.flatten(-2), expected[entry.layer], rtol=0, atol=2e-2)
    assert sample.dtype == plain.dtype
    if not fused:
        assert torch.equal(sample, plain)


def test_outputs_are_bit_identical_and_idle_hooks_do_nothing(pipe, inputs):
    with torch.no_grad():
        plain = pipe.unet(**inputs).sample
        with lavender.patch(pipe) as patch:
            assert torch.equal(pipe.unet(**inputs).sample, plain)
            with patch.capture(WEIGHTS):
                assert torch.equal(pipe.unet(**inputs).sample, plain)
        assert torch.equal(pipe.unet(**inputs).sample, plain)


def test_a_whole_pipeline_run_is_unchanged(pipe):
    def draw():
        return pipe(
            "a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np", height=64, width=64
        ).images

    plain = draw()
    weights = torch.zeros(1, 1, 32)
    weights[0, 0, 2] = 1
    with lavender.patch(pipe) as patch, patch.capture(weights, branch=slice(1, 2)) as recording:
        captured = draw()
    assert (captured == plain).all()
    assert len(recording.entries) == 2 * len(patch.layers)
    mean = recording.mean(32)
    assert mean.shape == (1, 1, 32, 32)
    assert mean.min() > 0
    assert mean.max() < 1


@pytest.mark.parametrize("branch", [slice(None), slice(1, 2)])
def test_fused_capture_gives_the_same_maps_and_outputs_up_to_rounding(pipe, inputs, branch):
    with torch.no_grad(), lavender.patch(pipe) as patch:
        with patch.capture(WEIGHTS[branch], branch) as apart:
            plain = pipe.unet(**inputs).sample
        with patch.capture(WEIGHTS[branch], branch, fused=True) as fused:
            output = pipe.unet(**inputs).sample
    torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-5)
    assert [e.layer for e in fused.entries] == [e.layer for e in apart.entries]
    for one, other in zip(fused.entries, apart.entries, strict=True):
        torch.testing.assert_close(one.maps, other.maps, rtol=1e-4, atol=1e-6)


def test_fused_capture_refuses_an_attention_that_it_cannot_replace(pipe, inputs):
    class Dropping:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
            if encoder_hidden_states is None:
                return hidden_states
            query = attn.to_q(hidden_states)[:, None]
            return torch.nn.functional.scaled_dot_product_attention(query, query, query, dropout_p=0.5)[:, 0]

    pipe.unet.set_attn_processor(Dropping())
    with lavender.patch(pipe) as patch, pytest.raises(CaptureError, match="fused=False"), patch.capture(WEIGHTS, fused=True):
        pipe.unet(**inputs)


def test_the_branch_decides_whose_attention_is_read(pipe, inputs):
    with torch.no_grad(), lavender.patch(pipe) as patch:
        with patch.capture(WEIGHTS) as both:
            pipe.unet(**inputs)
        with patch.capture(WEIGHTS[1:], branch=slice(1, 2)) as second:
            pipe.unet(**inputs)
    for one, other in zip(both.entries, second.entries, strict=True):
        torch.testing.assert_close(one.maps[1:], other.maps, rtol=0, atol=1e-6)


def test_unpatch_removes_every_hook_even_after_an_exception(pipe, inputs):
    def hooks():
        return {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in pipe.unet.named_modules()}

    before, processors = hooks(), {n: id(p) for n, p in pipe.unet.attn_processors.items()}
    patch = lavender.patch(pipe)
    with pytest.raises(RuntimeError), patch.capture(WEIGHTS):
        pipe.unet(inputs["sample"], inputs["timestep"], torch.zeros(2, 32, 5))
    assert torch.overrides._len_torch_function_stack() == 0
    with torch.no_grad(), patch.capture(WEIGHTS) as recording:
        pipe.unet(**inputs)
    assert len(recording.entries) == len(patch.layers)
    patch.unpatch()
    patch.unpatch()
    assert hooks() == before
    assert {n: id(p) for n, p in pipe.unet.attn_processors.items()} == processors


def test_gradient_reaches_the_latents(pipe, inputs):
    inputs["sample"].requires_grad_()
    with lavender.patch(pipe) as patch, patch.capture(WEIGHTS) as recording:
        pipe.unet(**inputs)
    (gradient,) = torch.autograd.grad(recording.mean(16)[:, 0].mean(), inputs["sample"])
    assert gradient.abs().max() > 0


def test_chosen_layers(pipe, inputs):
    with torch.no_grad(), lavender.patch(pipe, layers=("mid_block",)) as patch, patch.capture(WEIGHTS) as recording:
        pipe.unet(**inputs)
    assert [e.layer for e in recording.entries] == ["mid_block.attentions.0.transformer_blocks.0.attn2"]
    with pytest.raises(ModelError, match=r"nowhere.*there are: down_blocks"):
        lavender.patch(pipe, layers=("nowhere",))


def test_a_non_square_latent_keeps_its_shape(pipe, inputs):
    inputs["sample"] = torch.randn(2, 4, 16, 24)
    with torch.no_grad(), lavender.patch(pipe) as patch, patch.capture(WEIGHTS) as recording:
        pipe.unet(**inputs)
    assert {tuple(e.maps.shape[-2:]) for e in recording.entries} == {(16, 24), (8, 12)}


def test_processors_that_hide_their_attention_are_noticed(pipe, inputs):
    pipe.unet.set_attn_processor(AttnProcessor())
    with (
        torch.no_grad(),
        lavender.patch(pipe) as patch,
        pytest.raises(CaptureError, match="scaled_dot_product_attention"),
        patch.capture(WEIGHTS),
    ):
        pipe.unet(**inputs)


def test_an_empty_recording_says_so(pipe):
    patch = lavender.patch(pipe)
    with pytest.raises(CaptureError, match="recorded nothing"), patch.capture(WEIGHTS):
        pass
    patch.unpatch()


def test_a_pipeline_without_a_known_denoiser_is_named():
    from types import SimpleNamespace

    with pytest.raises(ModelError, match=r"Linear.*UNet2DConditionModel"):
        lavender.patch(SimpleNamespace(unet=torch.nn.Linear(1, 1)))
