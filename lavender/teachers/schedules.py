"""The noise levels of a pipeline's scheduler, and what its denoiser is given at each: derived, or refused by name."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, Literal

import torch

from ..config import TeacherConfig
from ..errors import ConfigError, ModelError, reading

Kind = Literal["ddpm", "edm", "flow"]
"""How noise levels are given to a denoiser.

- `ddpm`: sqrt(a) x + sqrt(1 - a) e, where a is the scheduler's `alphas_cumprod` at a whole timestep (Ho et al. 2020);
- `edm`: c_in (x + sigma e) at the timestep c_noise(sigma), as the scheduler's preconditioning says (Karras et al. 2022);
- `flow`: (1 - sigma) x + sigma e at the timestep sigma times the number of training timesteps.
"""
INVERSIONS: dict[Kind, tuple[str, ...]] = {
    "ddpm": ("ddim", "null_text", "noise"),
    "edm": ("ddim", "noise"),
    "flow": ("flow", "noise"),
}
"""How latents of each kind can be inverted."""

_DDPM = frozenset(
    {
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
        "DDIMInverseScheduler",
        "DDIMParallelScheduler",
        "DDIMScheduler",
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepInverseScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "SASolverScheduler",
        "TCDScheduler",
        "UnCLIPScheduler",
        "UniPCMultistepScheduler",
    }
)
"""Schedulers of diffusers that differ in their steps alone: at a timestep, all give the denoiser what `alphas_cumprod` says."""
_EDM = frozenset({"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"})
_FLOW = frozenset({"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"})
_FLOW_SOLVERS = frozenset(
    {"DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"}
)
"""Those of `_DDPM` that are of `_FLOW` with `use_flow_sigmas`."""
_GIVES = {"scale_model_input", "precondition_inputs", "precondition_noise", "precondition_outputs"}
"""What schedulers decide by what the denoiser is given."""
_LEAST_SIGNAL = 1e-6
"""Of `alphas_cumprod`: schedules that end in pure noise have 0 there, or 2 ** -24 to divide by it; Stable Diffusion has 5e-3."""


def kind_of(scheduler: Any, name: str) -> Kind:
    """How a pipeline's scheduler gives noise levels to the denoiser; `name` is the pipeline's. Raises `ModelError`."""
    bases = type(scheduler).__mro__
    names = {base.__name__ for base in bases if base.__module__.startswith("diffusers.")}
    # A class of one's own may take other steps, if the denoiser is given the same.
    if any(vars(base).keys() & _GIVES for base in bases if not base.__module__.startswith("diffusers.")):
        names = set()
    kind: Kind
    if names & _FLOW or (names & _FLOW_SOLVERS and scheduler.config.get("use_flow_sigmas")):
        kind = "flow"
    elif names & _EDM:
        kind = "edm"
    elif names & _DDPM:
        kind = "ddpm"
    else:
        raise ModelError(
            f"the scheduler of this {name} is a {type(scheduler).__name__}, whose noise levels lavender cannot derive; give the "
            "pipeline the one that its model was trained for, such as a DDIMScheduler, EDMEulerScheduler or "
            "FlowMatchEulerDiscreteScheduler"
        )
    for setting, value, meaning in _unlike(scheduler, kind):
        raise ModelError(
            f"the {type(scheduler).__name__} of this {name} has {setting}={value!r}, {meaning}; lavender cannot derive what its "
            f"denoiser is given: set another {setting}, if the model was trained so"
        )
    return kind


def _unlike(scheduler: Any, kind: Kind) -> list[tuple[str, Any, str]]:
    """Settings, their values and meanings, by which a scheduler is not of the kind that its class is."""
    config = scheduler.config
    predicts = config.get("prediction_type", "flow_prediction" if kind == "flow" else "epsilon")
    continuous = config.get("timestep_type") == "continuous" and predicts == "v_prediction"
    return [
        (setting, config.get(setting), meaning)
        for setting, unlike, meaning in (
            ("prediction_type", (predicts == "flow_prediction") != (kind == "flow"), f"of noise levels of the kind {kind}"),
            ("timestep_type", continuous, "by which timesteps are logarithms of noise levels"),
            (
                "interpolation_type",
                config.get("interpolation_type", "linear") != "linear",
                "by which timesteps have other noise levels",
            ),
            (
                "use_flow_sigmas",
                bool(config.get("use_flow_sigmas")) and kind != "flow",
                "which is not carried through in that class",
            ),
            ("invert_sigmas", bool(config.get("invert_sigmas")), "by which pictures have the noise level 1"),
            ("scale_factors", bool(config.get("scale_factors")), "by which noisy latents are smaller than pictures"),
        )
        if unlike
    ]


def require_inversion(config: TeacherConfig, scheduler: Any, flow_matching: bool, name: str) -> None:
    """Raises if a model cannot be inverted as the config says.

    Args:
        config: says how.
        scheduler: the pipeline's.
        flow_matching: whether models of its family are flow-matching ones, whatever the scheduler.
        name: the pipeline's.

    Raises:
        ModelError: no inversion is possible: see `kind_of`.
        ConfigError: another one is.
    """
    with reading(f"the settings of the {type(scheduler).__name__} of this {name} cannot be used", "give a whole copy", ModelError):
        _require_inversion(config, scheduler, flow_matching, name)


def _require_inversion(config: TeacherConfig, scheduler: Any, flow_matching: bool, name: str) -> None:
    kind = kind_of(scheduler, name)
    if flow_matching and kind != "flow":
        raise ModelError(
            f"{name} is a flow-matching model, and its scheduler a {type(scheduler).__name__}; give the pipeline a "
            "FlowMatchEulerDiscreteScheduler"
        )
    if kind == "flow" and not flow_matching and not hasattr(scheduler, "scale_model_input"):
        raise ModelError(
            f"{name} cannot draw with a {type(scheduler).__name__}; give the pipeline the scheduler that its model was trained for"
        )
    if config.inversion not in INVERSIONS[kind]:
        is_flow = "is a flow-matching model" if kind == "flow" else "is no flow-matching model"
        is_what = "has an EDM scheduler" if kind == "edm" and config.inversion == "null_text" else is_flow
        *others, last = INVERSIONS[kind]
        raise ConfigError(f"inversion is {config.inversion!r}, but {name} {is_what}; choose {', '.join(others)} or {last}")
    predicts, num_timesteps = scheduler.config.get("prediction_type", "epsilon"), int(scheduler.config.num_train_timesteps)
    if config.inversion == "noise":
        beyond = [number for number in config.timesteps if number >= num_timesteps]
        if kind != "flow" and beyond:
            raise ConfigError(
                f"timesteps is {config.timesteps}, but {name} has {num_timesteps} training timesteps; give numbers from 0 to "
                f"{num_timesteps - 1}"
            )
        return
    if kind != "flow" and predicts not in ("epsilon", "v_prediction"):
        raise ConfigError(f"{name} predicts {predicts!r}; lavender inverts models that predict epsilon or v_prediction")
    if kind == "ddpm":
        _require_steps(config, scheduler, num_timesteps, predicts, name)


def _require_steps(config: TeacherConfig, scheduler: Any, num_timesteps: int, predicts: str, name: str) -> None:
    """Raises `ConfigError` where DDIM has no such steps, or cannot take one of them."""
    from diffusers import DDIMInverseScheduler, DDIMScheduler

    reached = math.inf
    way_there = "diffusion_steps" if config.inversion == "null_text" else "inversion_steps"
    for setting, ddim in ((way_there, DDIMInverseScheduler), ("diffusion_steps", DDIMScheduler)):
        steps = getattr(config, setting)
        # Denoising starts where inversion stopped: what is noisier is not asked for.
        timesteps = [timestep for timestep in _timesteps(ddim, scheduler, steps) if timestep <= reached]
        if not _are_of(timesteps, num_timesteps):
            possible = range(min(steps, num_timesteps), 0, -1)
            most = next((n for n in possible if _are_of(_timesteps(ddim, scheduler, n), num_timesteps)), None)
            offset = scheduler.config.get("steps_offset", 0)
            raise ConfigError(
                f"{setting} is {steps}, but {name} has {num_timesteps} training timesteps and steps_offset={offset}; "
                + ("set a smaller steps_offset" if most is None else f"the most that can be given is {most}")
            )
        reached = max(timesteps)
        if predicts == "epsilon" and scheduler.alphas_cumprod[reached] < _LEAST_SIGNAL:
            raise ConfigError(
                f"{setting} is {steps}, which begins at timestep {reached} of {name}: its schedule ends in pure noise there "
                "(rescale_betas_zero_snr, or a cosine), and a prediction of the noise says nothing about the picture; choose the "
                "inversion noise, or give the scheduler timestep_spacing='leading'"
            )


def _timesteps(kind: Any, scheduler: Any, steps: int) -> list[int]:
    """Those of DDIM or its inverse in so many steps; -1 where there are not so many."""
    if steps > scheduler.config.num_train_timesteps:
        return [-1]
    ddim = ddim_of(kind, scheduler)
    ddim.set_timesteps(steps)
    timesteps: list[int] = ddim.timesteps.tolist()
    return timesteps


def _are_of(timesteps: list[int], num_timesteps: int) -> bool:
    return all(0 <= timestep < num_timesteps for timestep in timesteps)


def ddim_of(kind: Any, scheduler: Any) -> Any:
    """DDIM or its inverse, with the noise schedule of a pipeline's scheduler."""
    config = scheduler.config
    names = ("num_train_timesteps", "set_alpha_to_one", "steps_offset", "prediction_type", "timestep_spacing")
    settings = {name: config[name] for name in names if name in config}
    # With "linspace" (usual for Euler and DPM-Solver) the steps there and back would not be the same.
    if settings.get("timestep_spacing") == "linspace":
        settings["timestep_spacing"] = "leading"
    made = kind(**settings, clip_sample=False)
    # Whatever betas, formulas and rescaling they come from.
    made.alphas_cumprod = scheduler.alphas_cumprod.detach().float().cpu()
    of_picture = torch.tensor(1.0) if made.config.set_alpha_to_one else made.alphas_cumprod[0]
    made.final_alpha_cumprod = made.initial_alpha_cumprod = of_picture  # as DDIM and as its inverse call it
    return made


class Levels(ABC):
    """Noise levels that have a sigma, and Euler's way through them.

    Latents are [B, C, h, w] as the scheduler steps them; those of a picture are at sigma 0.
    """

    @abstractmethod
    def sigma(self, number: int) -> float:
        """Of what the config calls a timestep."""

    @abstractmethod
    def number(self, sigma: float) -> float:
        """What the config calls the timestep of a sigma."""

    @abstractmethod
    def timestep(self, sigma: float) -> torch.Tensor:
        """What the denoiser is told, a scalar."""

    @abstractmethod
    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        """Latents of a picture, brought to a sigma."""

    @abstractmethod
    def given(self, latents: torch.Tensor, sigma: float) -> torch.Tensor:
        """What the denoiser is given for latents."""

    @abstractmethod
    def slope(self, latents: torch.Tensor, output: torch.Tensor, sigma: float) -> torch.Tensor:
        """By how much latents change with sigma, from the denoiser's output."""


class FlowLevels(Levels):
    """Of a flow-matching model, which predicts the slope. The config counts thousandths of sigma."""

    def __init__(self, scheduler: Any) -> None:
        self._num_timesteps = scheduler.config.num_train_timesteps
        # Solvers that were made for whole timesteps cut off the rest.
        self._is_whole = bool(scheduler.config.get("use_flow_sigmas"))

    def sigma(self, number: int) -> float:
        return number / 1000

    def number(self, sigma: float) -> float:
        return 1000 * sigma

    def timestep(self, sigma: float) -> torch.Tensor:
        timestep = sigma * self._num_timesteps
        return torch.tensor(int(timestep + 1e-3) if self._is_whole else timestep)  # single precision sigmas may be a little less

    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        return latents + sigma * (noise - latents)

    def given(self, latents: torch.Tensor, sigma: float) -> torch.Tensor:
        return latents

    def slope(self, latents: torch.Tensor, output: torch.Tensor, sigma: float) -> torch.Tensor:
        return output


class EdmLevels(Levels):
    """Of an EDM scheduler. The config counts the sigmas of a denoising in all of its training timesteps, the least first."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = copy.deepcopy(scheduler)

    @cached_property
    def _sigmas(self) -> torch.Tensor:
        self._scheduler.set_timesteps(self._scheduler.config.num_train_timesteps)
        return self._scheduler.sigmas[:-1].flip(0)

    def sigma(self, number: int) -> float:
        return float(self._sigmas[number])

    def number(self, sigma: float) -> float:
        return float((self._sigmas - sigma).abs().argmin())

    def timestep(self, sigma: float) -> torch.Tensor:
        return self._scheduler.precondition_noise(torch.tensor(sigma))

    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        return latents + sigma * noise

    def given(self, latents: torch.Tensor, sigma: float) -> torch.Tensor:
        return self._scheduler.precondition_inputs(latents, sigma)

    def slope(self, latents: torch.Tensor, output: torch.Tensor, sigma: float) -> torch.Tensor:
        return (latents - self._scheduler.precondition_outputs(latents, output, sigma)) / sigma
