"""What tells one teacher from another: digits of its weights and settings, and numbers that it makes of one picture and caption.

Weights do not say all: the scale of a LoRA, FreeU, an attention processor or another tokenizer changes maps and no weight. So the
teacher is asked once, with everything switched as it is, and the numbers are kept. They are compared up to rounding, which differs
from device to device, and so are no hash.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..config import TeacherConfig, fingerprint
from ..errors import ConfigError, LavenderError, ModelError, first_line
from ..words import words_of
from .bound_denoiser import BoundDenoiser
from .families import TeacherFamily, stripped
from .inversion import noisy_at
from .recording import DenoiserHooks

CAPTION = "two small birds over a Red house"
"""What the teacher is asked for."""
_TEXT = f"{CAPTION}, Ünïcode 'n 1234567 UPPER-case... <*> chairs_and zebras"
"""What the tokenizers are asked for: whatever they may treat in a way of their own."""
_NUMBERS = 48
"""Of the latents, the text and the prediction each, evenly spread."""
_TOLERANCES = {"float32": 4e-3, "float16": 1e-2, "bfloat16": 4e-2}
"""Relative distances that other devices and kernels may lead to: some roundings of each dtype, for float32 of TF32."""
_GRID = 4
"""Height and width of the maps."""


def modules_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """What shapes the maps: text encoders, autoencoder and denoiser."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module) and name != "safety_checker"}
    return {name: stripped(part) for name, part in parts.items()}


def digits_of_weights(pipe: Any) -> str:
    """Sixteen digits of the weights and settings, wherever the pipeline was loaded from."""
    # A teacher's autoencoder may have been brought to single precision, which changes none of its values.
    return _digest(_settings(pipe), modules_of(pipe), in_single=("vae",))


def digits_as_loaded(pipe: Any) -> str:
    """The digits that lavender took before, which change with the pipeline's folder too; older stores have them."""
    parts = modules_of(pipe)
    denoiser: Any = parts.get("unet", parts.get("transformer"))
    return _digest(json.dumps([dict(denoiser.config), dict(pipe.scheduler.config)], sort_keys=True, default=str), parts)


def _digest(settings: str, modules: Mapping[str, torch.nn.Module], in_single: tuple[str, ...] = ()) -> str:
    digest = hashlib.sha256(settings.encode())
    for part in sorted(modules):
        for name, tensor in sorted(modules[part].state_dict().items()):
            digest.update(f"{part}.{name}".encode())
            tensor = tensor.float() if part in in_single and tensor.is_floating_point() else tensor
            digest.update(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _settings(pipe: Any) -> str:
    """What was set of denoiser, autoencoder and scheduler; no names of folders and versions, and no defaults."""
    parts = {name: stripped(getattr(pipe, name, None)) for name in ("unet", "transformer", "vae", "scheduler")}
    return json.dumps({name: _set(part) for name, part in parts.items() if part is not None}, sort_keys=True, default=str)


def _set(part: Any) -> dict[str, Any]:
    defaults = {name: parameter.default for name, parameter in inspect.signature(type(part).__init__).parameters.items()}
    values = {name: _plain(value) for name, value in part.config.items() if not name.startswith("_") and "dtype" not in name}
    changed = {name: value for name, value in values.items() if name not in defaults or value != _plain(defaults[name])}
    return {"class": type(part).__name__, **changed}


def _plain(value: Any) -> Any:
    """The same for a tuple, a list and an array, and for 1 and 1.0."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def behavior_of(
    family: TeacherFamily, hooks: DenoiserHooks, config: TeacherConfig, side: int, word_weights: torch.Tensor
) -> dict[str, Any]:
    """Numbers that a teacher makes of one picture, noise and caption, with everything switched as it is; plain JSON values.

    Args:
        family: of the teacher.
        hooks: on its denoiser.
        config: the teacher's.
        side: of its pictures, in pixels.
        word_weights: float32 [1, W, N], each text column's share of each word of `CAPTION`.

    Returns:
        `tolerance`, the relative distance up to which lists of numbers are the same; `tokens`, `adapters` and `switches`, digits
        of the tokenizers, of how PEFT's adapters are switched and of what else is switched in the denoiser; and the lists
        `levels` (of noise), `picture` (latents), `text` (embeddings), `prediction` (the denoiser's) and `maps`. With the
        inversion `noise`, `prediction` and `maps` at the config's `lowest` and `highest` timestep too.

    Raises:
        ModelError: a part of the pipeline cannot do what it is there for.
        ConfigError: the numbers are not finite in the config's dtype.
    """
    pipe = family.pipe
    kind = f"this {type(pipe).__name__}"
    generator = torch.Generator().manual_seed(0)
    device = word_weights.device
    with torch.no_grad():
        latents = encode_once(family, _picture(side).to(device)).float()
        once = replace(config, inversion="noise", timesteps=(0,), timestep_weights=(), map_size=_GRID)
        with asking(f"{kind} cannot encode a caption"):
            denoiser = BoundDenoiser(family, hooks, once, [CAPTION], word_weights, side, [words_of(CAPTION)])
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        numbers = {"levels": _levels(family, latents), "picture": _spread(latents), "text": _spread(denoiser.text)}
        places = {"": 300 if denoiser.flow_matching else int(denoiser.scheduler.config.num_train_timesteps) * 3 // 10}
        if config.inversion == "noise":  # what is switched by the timestep shows at those of the run
            places |= {"lowest ": min(config.timesteps), "highest ": max(config.timesteps)}
        for place, number in places.items():
            _, given, timestep = noisy_at(denoiser, latents, noise, number)
            denoiser.forget()
            with asking(f"the denoiser of {kind} cannot be asked for a picture and a caption alone"):
                numbers[f"{place}prediction"] = _spread(denoiser.record(given, timestep))
            maps = denoiser.maps([(0.0, 0.0, 1.0, 1.0)])
            numbers[f"{place}maps"] = [float(f"{value:.4g}") for value in maps.flatten().tolist()]
    overflown = [name for name, values in numbers.items() if not torch.tensor(values).isfinite().all()]
    if overflown:
        raise ConfigError(f"the {overflown[0]} of {kind} is not finite in {config.dtype}; {remedy_of_overflow(config.dtype)}")
    return {
        "tolerance": _TOLERANCES[config.dtype],
        "tokens": _tokens(pipe),
        "adapters": _adapters(pipe),
        "switches": _switches(family.denoiser),
        **numbers,
    }


def encode_once(family: TeacherFamily, pixels: torch.Tensor) -> torch.Tensor:
    """The latents of one picture [1, 3, y, x], maybe on the meta device. Raises `ModelError` if they are none for the denoiser."""
    pipe, vae = family.pipe, family.autoencoder()
    who = f"the {type(vae).__name__} of this {type(pipe).__name__}"
    with asking(f"{who} cannot encode a picture"):
        latents = family.encode(pixels)
    expected = (1, vae.config.latent_channels, *(size // int(pipe.vae_scale_factor) for size in pixels.shape[2:]))
    if latents.shape != expected:
        raise ModelError(
            f"{who} makes latents {list(latents.shape)} of {list(pixels.shape)} pixels, and its denoiser takes {list(expected)}; "
            "give the pipeline the autoencoder that its model was trained with"
        )
    return latents


def remedy_of_overflow(dtype: str) -> str:
    """What to do about numbers that are not finite."""
    if dtype == "float32":
        return "no wider dtype is left: look at its weights, LoRA scales, attention processors and scheduler"
    return "choose dtype bfloat16 or float32" if dtype == "float16" else "choose dtype float32"


def digits_of_behavior(behavior: Mapping[str, Any]) -> str:
    """Sixteen digits of the numbers, rounded to tenths of the root mean square of their list."""
    coarse = {
        name: [round(10 * value / max(sum(v * v for v in values) / len(values), 1e-30) ** 0.5) for value in values]
        for name, values in behavior.items()
        if isinstance(values, list)
    }
    return fingerprint([behavior["tokens"], behavior["adapters"], behavior["switches"], coarse])


def _picture(side: int) -> torch.Tensor:
    """Waves and edges in three colors, [1, 3, side, side] in [-1, 1]."""
    places = torch.arange(side) / side
    y, x = places[:, None], places[None]
    red, green = torch.sin(9 * x + 2 * y), torch.cos(5 * y * y - 7 * x)
    blue = torch.where((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.06, 0.8, -0.6) + 0 * x
    return torch.stack([red, green, blue])[None]


def _levels(family: TeacherFamily, latents: torch.Tensor) -> list[float]:
    """Noise levels of the scheduler as it is now."""
    scheduler = family.pipe.scheduler
    if hasattr(scheduler, "alphas_cumprod") and not scheduler.config.get("use_flow_sigmas"):
        return _spread(scheduler.alphas_cumprod)
    return [float(f"{sigma:.4g}") for sigma in family.sigmas(8, latents)]


def _spread(values: torch.Tensor) -> list[float]:
    flat = values.detach().float().flatten()
    chosen = flat[torch.linspace(0, len(flat) - 1, min(_NUMBERS, len(flat)), dtype=torch.float64).long()]
    return [float(f"{value:.4g}") for value in chosen.tolist()]


def _adapters(pipe: Any) -> str:
    """Sixteen digits of how PEFT's adapters are switched: a small change of a scale would pass for rounding."""
    states = [
        [part, name, sorted(layer.scaling.items()), list(layer.active_adapters), layer.disable_adapters, layer.merged_adapters]
        for part, module in sorted(modules_of(pipe).items())
        for name, layer in module.named_modules()
        if isinstance(getattr(layer, "scaling", None), dict) and hasattr(layer, "active_adapters")
    ]
    return fingerprint(states)


def _switches(denoiser: torch.nn.Module) -> str:
    """Sixteen digits of what is switched in a denoiser beside its weights, for what would pass for rounding: FreeU's factors,
    attention processors by their classes, and the number of others' hooks in attention."""
    states: list[Any] = []
    for name, module in denoiser.named_modules():
        factors = {factor: getattr(module, factor, None) for factor in ("s1", "s2", "b1", "b2")}
        if any(isinstance(factor, int | float) for factor in factors.values()):
            states.append([name, {factor: float(value) for factor, value in factors.items() if value is not None}])
        if hasattr(module, "processor"):
            num_hooks = sum(
                not str(getattr(hook, "__module__", "")).startswith("lavender.")
                for part in module.modules()
                for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
            )
            # Newer versions of diffusers leave the ending out.
            states.append([name, type(module.processor).__name__.removesuffix("2_0"), num_hooks])
    return fingerprint(states)


def _tokens(pipe: Any) -> str:
    """Sixteen digits of what the tokenizers know, and of what they make of a text."""
    names = [name for name in sorted(pipe.components) if name.startswith("tokenizer") and getattr(pipe, name) is not None]
    tokenizers = {name: getattr(pipe, name) for name in names}
    return fingerprint(
        [
            [name, sorted(tokenizer.get_vocab().items()), tokenizer(_TEXT, verbose=False).input_ids, tokenizer.model_max_length]
            for name, tokenizer in tokenizers.items()
        ]
    )


@contextmanager
def asking(what: str) -> Iterator[None]:
    """What a library says of parts that do not belong together is a `ModelError`; `what` cannot be done."""
    try:
        yield
    except (LavenderError, torch.OutOfMemoryError):
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ModelError(f"{what} ({first_line(error)}); see that the pipeline draws a picture as it is") from error
