"""A teacher is known by its weights and by what it does with them; a store is continued by the same teacher alone."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig

from lavender.config import ExtractionConfig, TeacherConfig, from_dict
from lavender.data.samples import Pair
from lavender.errors import ConfigError, ModelError, TargetError
from lavender.extraction.engines import _require_same
from lavender.extraction.extract import extract
from lavender.targets.maintenance import merge
from lavender.targets.manifest import StoreConfig, different_teacher, new_manifest, read_manifest
from lavender.targets.store import TargetStore
from lavender.teachers.identity import digits_as_loaded, digits_of_weights
from lavender.teachers.model import Teacher
from lavender.teachers.recording import DenoiserHooks

from .explicit import NAMES, SIDE, built, picture

NOISE = TeacherConfig(inversion="noise", timesteps=(51,), image_size=SIDE, map_size=8)
CAPTION = "a cat in a red hat"


def identity(pipe, config=NOISE):
    teacher = Teacher(pipe, config)
    teacher.close()
    return teacher.identity


def with_lora(name, targets=("to_q", "to_k", "to_v")):
    pipe = built(name)
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    torch.manual_seed(0)
    denoiser.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=list(targets)), "style")
    return pipe, denoiser


def pairs(tmp_path, count=2):
    for n in range(count):
        picture(n).save(tmp_path / f"{n}.png")
    return [Pair(str(n), tmp_path / f"{n}.png", CAPTION) for n in range(count)]


def store(pipe, tmp_path, name, count=2, config=NOISE):
    return extract(pipe, pairs(tmp_path, count), tmp_path / name, config, ExtractionConfig(batch_size=1), progress=False)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("sd", 0.0),
        ("sd", 0.999),
        ("sd3", 0.5),
        *(pytest.param(name, scale, marks=pytest.mark.full) for name in ("sdxl", "flux") for scale in (0.0, 0.999)),
    ],
)
def test_a_store_is_not_continued_at_another_lora_scale(name, scale, tmp_path):
    pipe, denoiser = with_lora(name)
    store(pipe, tmp_path, "store", 1)
    before = TargetStore(tmp_path / "store").fingerprint
    denoiser.set_adapters(["style"], [scale])
    with pytest.raises(TargetError, match=r"the weights are the same, and the teacher behaves otherwise in .*scale of a LoRA"):
        store(pipe, tmp_path, "store")
    store(pipe, tmp_path, "other")
    assert TargetStore(tmp_path / "other").fingerprint != before
    with pytest.raises(TargetError, match="behaves otherwise"):
        merge([tmp_path / "store", tmp_path / "other"], tmp_path / "both")
    denoiser.set_adapters(["style"], [1.0])
    assert store(pipe, tmp_path, "store").written == 1
    assert TargetStore(tmp_path / "store").fingerprint == before


def otherwise_scaled(pipe):
    scaled = diffusers.models.attention_processor.AttnProcessor2_0()
    call = scaled.__call__

    class Louder:
        def __call__(self, attn, hidden_states, *arguments, **options):
            return 1.2 * call(attn, hidden_states, *arguments, **options)

    pipe.unet.set_attn_processor(Louder())


def longer_words(pipe):
    pipe.tokenizer.add_tokens(["bird"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer) + 1)


def other_merges(pipe):
    """The same vocabulary, read otherwise: no token has it in a caption of the small words."""
    from .pipeline_zoo import clip_tokenizer

    pipe.tokenizer = clip_tokenizer()
    pipe.tokenizer.model_max_length = 12


def hooked(pipe):
    pipe.text_encoder.register_forward_hook(lambda _m, _a, output: type(output)(last_hidden_state=1.1 * output.last_hidden_state))


def other_scaling(pipe):
    pipe.vae.register_to_config(scaling_factor=0.5)


def other_alphas(pipe):
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod * 0.98


def other_vae(pipe):
    torch.manual_seed(1)
    pipe.register_modules(vae=type(pipe.vae).from_config(pipe.vae.config).eval())


SWITCHES = {
    "FreeU": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "attention processor": otherwise_scaled,
    "tokenizer": longer_words,
    "tokenizer's length": other_merges,
    "hook": hooked,
    "vae's scale": other_scaling,
    "vae": other_vae,
    "schedule": other_alphas,
    "scheduler": lambda pipe: pipe.register_modules(scheduler=diffusers.DDIMScheduler()),
    "weight": lambda pipe: pipe.unet.conv_in.weight.data.mul_(1.01),
    "text encoder's weight": lambda pipe: pipe.text_encoder.get_input_embeddings().weight.data.mul_(1.01),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_whatever_shapes_the_maps_makes_another_teacher(switch, tmp_path):
    pipe = built("sd")
    store(pipe, tmp_path, "store", 1)
    one = TargetStore(tmp_path / "store")
    SWITCHES[switch](pipe)
    with pytest.raises(TargetError, match="holds targets of another teacher"):
        store(pipe, tmp_path, "store")
    store(pipe, tmp_path, "other")
    assert TargetStore(tmp_path / "other").fingerprint != one.fingerprint


def hooked_attention(pipe):
    module = pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_q")
    module.register_forward_hook(lambda _m, _a, output: 1.0001 * output)


def louder_when_clear(pipe):
    def scale(_module, arguments, options):
        return ((arguments[0] * (0.5 if float(arguments[1]) < 200 else 1), *arguments[1:]), options)

    pipe.unet.register_forward_pre_hook(scale, with_kwargs=True)


def dimmed(pipe):
    encode = pipe.vae.encode
    pipe.vae.encode = lambda pixels, *more, **options: encode(0.2 * pixels, *more, **options)


def own_processor(pipe):
    class Same(diffusers.models.attention_processor.AttnProcessor2_0):
        pass

    pipe.unet.set_attn_processor(Same())


@pytest.mark.parametrize(
    ("switch", "where"),
    [
        (lambda pipe: pipe.enable_freeu(1.0, 1.0, 1.0001, 1.0), "switches"),
        (hooked_attention, "switches"),
        (own_processor, "switches"),
        (louder_when_clear, "lowest maps, lowest prediction"),
        (dimmed, "picture"),
    ],
    ids=["FreeU", "hook in attention", "processor", "hook by the timestep", "the object's own encode"],
)
def test_what_would_pass_for_rounding_or_shows_elsewhere_is_known(switch, where):
    pipe = built("sd")
    before = identity(pipe, replace(NOISE, timesteps=(51, 701)))
    switch(pipe)
    after = identity(pipe, replace(NOISE, timesteps=(51, 701)))
    assert where in different_teacher(before, after)
    assert before["behavior"]["digits"] != after["behavior"]["digits"]


def test_what_is_switched_off_again_is_as_before():
    pipe = built("sd")
    before = identity(pipe)
    pipe.enable_freeu(0.9, 0.2, 1.1, 1.2)
    pipe.disable_freeu()
    pipe.enable_attention_slicing()
    pipe.disable_attention_slicing()
    pipe.unet.register_forward_pre_hook(lambda *_: None)  # no hook of an attention's
    hooks = DenoiserHooks(pipe.unet)
    assert identity(pipe) == before
    hooks.remove()
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    assert identity(pipe) == before


@pytest.mark.parametrize(
    "name", [name if name in ("sdxl", "flux") else pytest.param(name, marks=pytest.mark.full) for name in NAMES]
)
def test_the_same_teacher_is_the_same_wherever_it_lies(name, tmp_path):
    """In memory, in two folders, and after a forward of the pipeline's own."""
    pipe = built(name)
    pipe.save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    here, again = identity(pipe), identity(pipe)
    one, two = (identity(tmp_path / folder) for folder in ("one", "two"))
    assert here == again
    assert one["weights"] == two["weights"]
    assert one["weights_as_loaded"] != two["weights_as_loaded"]
    assert {**one["behavior"]} == {**two["behavior"]}
    assert "digits" not in one["behavior"]
    assert not different_teacher(one, two)
    assert not different_teacher(here, one)
    assert digits_of_weights(pipe) == one["weights"]


def test_numbers_that_differ_by_rounding_are_the_same_teacher():
    pipe = built("sd")
    here = identity(pipe)
    rounded = json.loads(json.dumps(here))
    rng = np.random.default_rng(0)
    for name in ("picture", "text", "prediction", "maps", "levels"):
        values = np.array(here["behavior"][name])
        rounded["behavior"][name] = (values + rng.normal(0, 1e-3, values.shape) * np.sqrt((values**2).mean())).tolist()
    assert not different_teacher(here, rounded)
    _require_same(here, rounded)
    for name in ("picture", "text", "prediction", "maps", "levels"):
        other = json.loads(json.dumps(here))
        other["behavior"][name] = [1.02 * value for value in other["behavior"][name]]
        assert f"otherwise in {name}:" in different_teacher(here, other)
        with pytest.raises(ModelError, match=rf"loaded different teachers, .*otherwise in {name}"):
            _require_same(here, other)
    with pytest.raises(ModelError, match=r"loaded different teachers.*other names or weights"):
        _require_same(here, {**here, "weights": "0"})


def rewrite(folder, manifest):
    """Writes a store's manifest with the fingerprint that its source and config have."""
    config = from_dict(StoreConfig, manifest["config"])
    manifest["fingerprint"] = new_manifest(manifest["source"], config)["fingerprint"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def older(folder):
    """Makes a store what lavender wrote before it kept what teachers do."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["source"]["behavior"]
    manifest["source"]["weights"] = manifest["source"].pop("weights_as_loaded")
    rewrite(folder, manifest)


def test_an_older_store_goes_on_by_its_weights(tmp_path, caplog):
    pipe = built("sd")
    pipe.save_pretrained(tmp_path / "model")
    store(tmp_path / "model", tmp_path, "store", 1)
    older(tmp_path / "store")
    fingerprint = TargetStore(tmp_path / "store").fingerprint
    with caplog.at_level(logging.WARNING, logger="lavender"):
        assert store(tmp_path / "model", tmp_path, "store").present == 1
    (line,) = [record.getMessage() for record in caplog.records if record.name == "lavender"]
    assert "continued by its weights alone" in line
    assert TargetStore(tmp_path / "store").fingerprint == fingerprint
    assert "behavior" not in read_manifest(tmp_path / "store")["source"], "nobody knows what it was before"
    with torch.no_grad():
        pipe.unet.conv_in.weight *= 1.01
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(TargetError, match="other weights"):
        store(tmp_path / "model", tmp_path, "store")


def test_stores_are_merged_by_what_all_of_them_know(tmp_path):
    """One that says nothing is no bridge between two that differ."""
    pipe, denoiser = with_lora("sd")
    for n, scale in enumerate((1.0, 1.0, 0.0)):
        denoiser.set_adapters(["style"], [scale])
        extract(pipe, pairs(tmp_path, 3)[n : n + 1], tmp_path / str(n), NOISE, progress=False)
    manifest = json.loads((tmp_path / "0" / "manifest.json").read_text())
    behavior = manifest["source"].pop("behavior")
    rewrite(tmp_path / "0", manifest)
    with pytest.raises(TargetError, match="behaves otherwise"):
        merge([tmp_path / "0", tmp_path / "1", tmp_path / "2"], tmp_path / "all")
    assert merge([tmp_path / "1", tmp_path / "0"], tmp_path / "two") == 2
    assert "behavior" not in read_manifest(tmp_path / "two")["source"]
    manifest["source"]["behavior"] = behavior
    rewrite(tmp_path / "0", manifest)
    assert merge([tmp_path / "1", tmp_path / "0"], tmp_path / "known") == 2
    assert read_manifest(tmp_path / "known")["source"]["behavior"]["maps"] == behavior["maps"]


def test_settings_by_another_name_are_the_same_digits():
    """Tuples and lists, 1 and 1.0, defaults that are written down; arrays by every value."""
    pipe = built("sd")
    before, as_loaded = digits_of_weights(pipe), digits_as_loaded(pipe)
    pipe.unet.register_to_config(_name_or_path="/elsewhere", _diffusers_version="9.9", block_out_channels=[8, 16], dropout=0)
    assert digits_of_weights(pipe) == before
    assert digits_as_loaded(pipe) != as_loaded
    betas = np.linspace(1e-4, 2e-2, 1000)
    seen = {before}
    for n in (0, 500, 999):
        betas[n] *= 1.1
        pipe.scheduler.register_to_config(trained_betas=betas.copy())
        seen.add(digits_of_weights(pipe))
    assert len(seen) == 4


def test_asking_once_changes_nothing(tmp_path):
    """Neither the pipeline's pictures nor torch's random state nor its own scheduler."""
    pipe = built("sdxl")

    def draw():
        return pipe(
            CAPTION, num_inference_steps=2, height=SIDE, width=SIDE, generator=torch.manual_seed(0), output_type="np"
        ).images

    first = draw()
    state, steps = torch.get_rng_state(), pipe.scheduler.timesteps.clone()
    identity(pipe)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pipe.scheduler.timesteps, steps)
    assert (draw() == first).all()
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


def test_numbers_that_overflow_are_named_before_the_run():
    pipe = built("sd")
    with torch.no_grad():
        pipe.unet.conv_norm_out.weight *= 1e30
        pipe.unet.conv_out.weight *= 1e30
    with pytest.raises(
        ConfigError, match="the prediction of this StableDiffusionPipeline is not finite in float32; no wider dtype"
    ):
        Teacher(pipe, NOISE)
    pipe = built("sd").to(torch.float16)
    pipe.vae.register_to_config(scaling_factor=1e9)
    with pytest.raises(ConfigError, match=r"the picture of this .* is not finite in float16; choose dtype bfloat16 or float32"):
        Teacher(pipe, replace(NOISE, dtype="float16"))


def test_a_run_goes_on_with_targets_that_are_extracted_again(tmp_path):
    """It recorded the fingerprint by the digits of before; the same model gives it again, and another does not."""
    from lavender.training.record import begin

    pipe = built("sd")
    pipe.save_pretrained(tmp_path / "model")
    store(tmp_path / "model", tmp_path, "store")
    targets = TargetStore(tmp_path / "store")
    record = {"model_commit": None, "adapter_commit": None, "targets_fingerprint": [targets.fingerprint, targets.contents()]}
    manifest = read_manifest(tmp_path / "store")
    before = new_manifest({**targets.source, "weights": manifest["source"]["weights_as_loaded"]}, targets.config)["fingerprint"]
    assert targets.fingerprint != before == targets.earlier_fingerprint
    (tmp_path / "run" / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    for fingerprint in (before, targets.fingerprint):
        (tmp_path / "run" / "run.json").write_text(json.dumps({"targets_fingerprint": [fingerprint, targets.contents()]}))
        assert not begin(tmp_path / "run", record, (), targets, writes=False)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"targets_fingerprint": ["0" * 16, targets.contents()]}))
    with pytest.raises(TargetError, match="another targets_fingerprint"):
        begin(tmp_path / "run", record, (), targets, writes=False)


def test_weights_that_are_away_are_named():
    pipe = built("sd")
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ModelError, match=r"weights of the \w+ are away.*offload='sequential'"):
        Teacher(pipe, NOISE)


def test_an_autoencoder_that_overflows_in_half_precision_is_asked_in_single():
    """As Stable Diffusion XL's first one: by `force_upcast`."""
    pipe = built("sdxl").to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    seen = []
    pipe.vae.encoder.register_forward_pre_hook(lambda _m, arguments: seen.append(arguments[0].dtype))
    teacher = Teacher(pipe, replace(NOISE, dtype="float16"))
    teacher.word_maps(picture(0), CAPTION)
    assert seen == [torch.float32] * 2
    teacher.close()
    assert identity(pipe, replace(NOISE, dtype="float16"))["weights"] == teacher.identity["weights"]
