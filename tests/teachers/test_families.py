"""What a teacher's autoencoder and denoiser are given: all that the pipeline itself gives them, or a refusal before the run."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from peft import LoraConfig, get_peft_model

from lavender.config import TeacherConfig
from lavender.doctor.teacher import examine
from lavender.errors import ConfigError, ModelError
from lavender.teachers.framing import frame
from lavender.teachers.loading import empty_pipeline
from lavender.teachers.model import Teacher

from .explicit import SIDE, built, forwards_of, picture

CAPTION = "a cat in a red hat"
NOISE = TeacherConfig(inversion="noise", timesteps=(51, 301), image_size=SIDE, map_size=8)
DDIM = replace(NOISE, inversion="ddim", inversion_steps=2, diffusion_steps=3)
THREE = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}

AUTOENCODERS = {
    "AutoencoderTiny": lambda: diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ),
    "AsymmetricAutoencoderKL": lambda: diffusers.AsymmetricAutoencoderKL(
        **THREE, down_block_out_channels=(4, 8, 8), up_block_out_channels=(4, 8, 8), norm_num_groups=4
    ),
    "ConsistencyDecoderVAE": lambda: diffusers.ConsistencyDecoderVAE(
        encoder_block_out_channels=(4, 8, 8),
        encoder_down_block_types=("DownEncoderBlock2D",) * 3,
        encoder_norm_num_groups=4,
        decoder_block_out_channels=(32, 32, 32),
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 3,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 3,
        decoder_layers_per_block=1,
    ),
    "VQModel": lambda: diffusers.VQModel(
        **THREE, block_out_channels=(4, 8, 8), latent_channels=4, num_vq_embeddings=16, norm_num_groups=4
    ),
    "AutoencoderKLTemporalDecoder": lambda: diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 3, block_out_channels=(32, 32, 32), latent_channels=4
    ),
}
"""Autoencoders of diffusers that take a picture by a quarter of its sides, with random weights."""


def with_autoencoder(name, vae):
    pipe = built(name)
    pipe.register_modules(vae=vae.eval())
    return pipe


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_every_autoencoder_encodes_as_diffusers_itself_does(kind):
    """Latents as an image-to-image pipeline makes them; the denoiser is given them with noise by the schedule."""
    torch.manual_seed(0)
    pipe = with_autoencoder("sd", AUTOENCODERS[kind]())
    teacher = Teacher(pipe, replace(NOISE, timesteps=(0,)))
    pixels = frame(picture(0), SIDE, "pad").pixels[None]
    with torch.no_grad():
        expected = retrieve_latents(pipe.vae.encode(pixels), sample_mode="argmax") * pipe.vae.config.scaling_factor
        latents = teacher.family.encode(pixels)
    torch.testing.assert_close(latents, expected, rtol=1e-6, atol=1e-7)
    with forwards_of(pipe.unet) as forwards:
        maps = teacher.word_maps(picture(0), CAPTION)
    assert np.isfinite(maps.maps).all()
    alpha = pipe.scheduler.alphas_cumprod[0]
    noise = (forwards[0].latents - alpha.sqrt() * expected) / (1 - alpha).sqrt()
    assert noise.std() == pytest.approx(1, abs=0.2)


def test_a_deeply_compressing_autoencoder_is_scaled_as_its_pipelines_do():
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41,
    )
    pipe = with_autoencoder("sd", vae)
    teacher = Teacher(pipe, NOISE)
    pixels = frame(picture(0), SIDE, "pad").pixels[None]
    with torch.no_grad():
        torch.testing.assert_close(teacher.family.encode(pixels), vae.encode(pixels).latent * 0.41)


@pytest.mark.parametrize(("name", "channels"), [("sd3", 4), ("flux", 4)])
def test_a_tiny_autoencoder_has_its_own_scale_and_shift(name, channels):
    pipe = with_autoencoder(name, AUTOENCODERS["AutoencoderTiny"]())
    pipe.vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    teacher = Teacher(pipe, NOISE)
    pixels = frame(picture(0), SIDE, "pad").pixels[None]
    with torch.no_grad():
        torch.testing.assert_close(teacher.family.encode(pixels), (pipe.vae.encode(pixels).latents - 0.25) * 0.5)


def other_autoencoders():
    kl = {**THREE, "block_out_channels": (4, 8, 8), "norm_num_groups": 4}
    yield diffusers.AutoencoderKL(**kl, latent_channels=16), r"takes 4 channels and its pictures have 16 by its AutoencoderKL"
    two = {name: types[:2] for name, types in THREE.items()}
    yield (
        diffusers.AutoencoderKL(**two, block_out_channels=(4, 8), norm_num_groups=4, latent_channels=4),
        r"AutoencoderKL of this StableDiffusionPipeline makes latents \[1, 4, 24, 24\].* takes \[1, 4, 12, 12\]",
    )
    yield (
        diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        "AutoencoderKLWan.*latent_channels",
    )
    yield (
        diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 3,
            up_block_types=("CogVideoXUpBlock3D",) * 3,
            block_out_channels=(8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        ),
        "AutoencoderKLCogVideoX of this StableDiffusionPipeline cannot encode a picture",
    )


@pytest.mark.parametrize("number", range(4))
def test_an_autoencoder_of_another_model_is_refused_before_the_run(number):
    vae, says = list(other_autoencoders())[number]
    with pytest.raises(ModelError, match=says) as caught:
        Teacher(with_autoencoder("sd", vae), NOISE)
    assert "\n" not in str(caught.value)


def test_the_doctor_says_what_the_autoencoder_cannot_do(tmp_path):
    pipe = built("sd")
    pipe.save_pretrained(tmp_path)
    empty = empty_pipeline(tmp_path)

    def extraction():
        return next(finding.result for finding in examine(empty, empty.unet) if finding.topic == "extraction")

    assert extraction() == "of target stores, by noise or ddim or null_text"
    with torch.device("meta"):
        empty.register_modules(vae=list(other_autoencoders())[1][0])
    assert "makes latents [1, 4, 16, 16]" in extraction()
    empty.register_modules(scheduler=diffusers.EDMEulerScheduler())
    with torch.device("meta"):
        empty.register_modules(vae=AUTOENCODERS["AutoencoderTiny"]())
    assert extraction() == "of target stores, by noise or ddim"
    empty.register_modules(scheduler=diffusers.IPNDMScheduler())
    assert "is a IPNDMScheduler, whose noise levels lavender cannot derive" in extraction()


def test_the_doctor_asks_for_timesteps_that_a_short_schedule_has(tmp_path):
    built("sd").save_pretrained(tmp_path)
    empty = empty_pipeline(tmp_path)
    for count in (1, 20, 100):
        empty.register_modules(scheduler=diffusers.DDPMScheduler(num_train_timesteps=count))
        found = next(finding.result for finding in examine(empty, empty.unet) if finding.topic == "extraction")
        assert found == "of target stores, by noise or ddim or null_text"


class Louder(torch.nn.Module):
    """A wrapper of one's own, which changes what is predicted."""

    def __init__(self, denoiser):
        super().__init__()
        self.inner, self.config, self.dtype = denoiser, denoiser.config, denoiser.dtype
        self.factor = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, sample, timestep, encoder_hidden_states, **more):
        return self.inner(sample, timestep, self.factor * encoder_hidden_states, **more)


def test_a_denoiser_is_read_below_what_is_around_it():
    """torch.compile's and PEFT's wrappers change nothing, and a wrapper of one's own is called."""
    maps, identities = [], []
    for wrap in (
        lambda denoiser: denoiser,
        lambda denoiser: torch.compile(denoiser, backend="eager"),
        lambda denoiser: get_peft_model(denoiser, LoraConfig(target_modules=["to_q"])),  # which begins as zero
        Louder,
        lambda denoiser: torch.compile(Louder(denoiser), backend="eager"),
    ):
        pipe = built("sd")
        pipe.unet = wrap(pipe.unet)
        teacher = Teacher(pipe, DDIM)
        maps.append(teacher.word_maps(picture(0), CAPTION).maps)
        identities.append(teacher.identity)
        teacher.close()
    plain, compiled, peft, louder, both = maps
    np.testing.assert_array_equal(both, louder)
    np.testing.assert_array_equal(compiled, plain)
    np.testing.assert_array_equal(peft, plain)
    assert abs(louder - plain).max() > 0.01 * plain.max()
    assert identities[1] == identities[0]
    assert identities[0]["weights"] != identities[3]["weights"] == identities[4]["weights"]
    assert identities[2]["behavior"]["maps"] == identities[0]["behavior"]["maps"] != identities[3]["behavior"]["maps"]
    pipe = built("sd")
    pipe.unet = torch.nn.DataParallel(pipe.unet)
    with pytest.raises(ModelError, match=r"the unet of this .* is in a DataParallel.*give the pipeline the UNet2DConditionModel"):
        Teacher(pipe, DDIM)


@pytest.mark.parametrize(
    "cache",
    [
        FirstBlockCacheConfig(),
        TaylorSeerCacheConfig(),
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 0),
    ],
)
def test_a_cache_is_refused_until_it_is_disabled(cache):
    pipe = built("flux")
    pipe.transformer.enable_cache(cache)
    with pytest.raises(ConfigError, match=r"has a cache of diffusers, \w+.*call disable_cache\(\) on the denoiser"):
        Teacher(pipe, NOISE)
    pipe.transformer.disable_cache()
    assert np.isfinite(Teacher(pipe, NOISE).word_maps(picture(0), CAPTION).maps).all()


def test_weights_that_are_cast_layer_by_layer_are_not_fitted_through():
    pipe = built("sd")
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"null_text.*layer by layer.*choose ddim or noise"):
        Teacher(pipe, replace(DDIM, inversion="null_text", guidance_scale=2.0))
    assert np.isfinite(Teacher(pipe, NOISE).word_maps(picture(0), CAPTION).maps).all()


def test_tiling_that_an_autoencoder_has_not_is_refused():
    for config, options, setting in ((replace(NOISE, vae_tiling=True), {}, "tiling"), (NOISE, {"vae_slicing": True}, "slicing")):
        with pytest.raises(ConfigError, match=f"vae_{setting} is true.*ConsistencyDecoderVAE|vae_{setting} is true.*VQModel"):
            Teacher(with_autoencoder("sd", AUTOENCODERS["VQModel"]()), config, **options)


def unet_like(pipe, **changed):
    config = {name: value for name, value in pipe.unet.config.items() if not name.startswith("_")}
    return diffusers.UNet2DConditionModel(**{**config, **changed}).eval()


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_distilled_model_is_given_its_guidance_as_the_pipeline_gives_it(name):
    pipe = built(name)
    torch.manual_seed(0)
    pipe.register_modules(unet=unet_like(pipe, time_cond_proj_dim=8), scheduler=diffusers.LCMScheduler())
    with forwards_of(pipe.unet) as own:
        pipe(CAPTION, num_inference_steps=2, height=SIDE, width=SIDE, guidance_scale=5.0, output_type="latent")
    teacher = Teacher(pipe, replace(DDIM, guidance_scale=5.0))
    with forwards_of(pipe.unet) as ours:
        teacher.word_maps(picture(0), CAPTION)
    assert all(len(forward.latents) == 1 for forward in ours)
    torch.testing.assert_close(ours[-1].inputs["timestep_cond"], own[0].inputs["timestep_cond"])
    assert not torch.equal(ours[0].inputs["timestep_cond"], ours[-1].inputs["timestep_cond"])
    with pytest.raises(ConfigError, match=r"null_text.*takes the guidance scale as an input"):
        Teacher(pipe, replace(DDIM, inversion="null_text", guidance_scale=5.0))


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        ("sd", {"num_class_embeds": 4}, "also takes class labels"),
        ("sd", {"class_embed_type": "timestep"}, "also takes class labels"),
        ("sd", {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 8}, "the picture of an IP-Adapter or image projection"),
        ("sd", {"addition_embed_type": "image", "encoder_hid_dim": 8}, "what an addition_embed_type 'image' adds"),
        ("sdxl", {"projection_class_embeddings_input_dim": 16 + 5 * 8}, "takes 5 numbers of sizes and scores.*refiner"),
        ("sd", {"out_channels": 8}, "predicts 8 channels for 4.*fixed variance"),
    ],
)
def test_a_denoiser_that_takes_more_is_refused(name, changed, says):
    pipe = built(name)
    pipe.register_modules(unet=unet_like(pipe, **changed))
    with pytest.raises(ModelError, match=says):
        Teacher(pipe, NOISE)


def test_a_learned_variance_is_cut_off():
    pipe = built("sd")
    torch.manual_seed(0)
    pipe.register_modules(unet=unet_like(pipe, out_channels=8), scheduler=diffusers.DDPMScheduler(variance_type="learned_range"))
    teacher = Teacher(pipe, DDIM)
    assert np.isfinite(teacher.word_maps(picture(0), CAPTION).maps).all()


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler"])
def test_a_pipeline_without_a_part_is_refused(part):
    pipe = built("sd")
    pipe.register_modules(**{part: None})
    with pytest.raises(ModelError, match=f"this StableDiffusionPipeline has no {part}"):
        Teacher(pipe, NOISE)


def test_what_fails_in_the_first_forward_fails_before_the_run():
    pipe = built("sd")
    pipe.register_modules(unet=unet_like(pipe, cross_attention_dim=24))
    with pytest.raises(
        ModelError, match="denoiser of this StableDiffusionPipeline cannot be asked for a picture and a caption alone"
    ):
        Teacher(pipe, NOISE)
    pipe = built("sd")
    pipe.text_encoder = None
    with pytest.raises(ModelError, match="this StableDiffusionPipeline cannot encode a caption"):
        Teacher(pipe, NOISE)


def test_a_denoiser_with_an_ip_adapter_is_refused_until_it_is_unloaded():
    pipe = built("sd")
    width, layers = pipe.unet.config.cross_attention_dim, {}
    for n, module in enumerate(module for name, module in pipe.unet.named_modules() if name.endswith("attn2")):
        for part in ("k", "v"):
            layers[f"{2 * n + 1}.to_{part}_ip.weight"] = torch.randn(module.to_k.out_features, width)
    projection = {"proj.weight": torch.randn(4 * width, 16), "proj.bias": torch.zeros(4 * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    with pytest.raises(ModelError, match=r"also takes the picture of an IP-Adapter.*pipe\.unload_ip_adapter\(\)"):
        Teacher(pipe, NOISE)
    pipe.unload_ip_adapter()
    assert np.isfinite(Teacher(pipe, NOISE).word_maps(picture(0), CAPTION).maps).all()
