"""From a photograph's latent to the noisy latents at which word maps are recorded, and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from ..config import TeacherConfig
from ..errors import ConfigError
from .bound_denoiser import BoundDenoiser

Noise = Callable[[], torch.Tensor]
"""Gives standard normal noise like the latents, other noise at every call."""
Ends = tuple[torch.Tensor, torch.Tensor]
"""The noisiest latents, and those at the end: of every inversion but `noise`, what the denoising made of them."""
_ADAM_RATE = 1e-2
"""Learning rate of null-text inversion at the first timestep; it falls to half of that (Mokady et al. 2023, their code)."""


def require_inversion(config: TeacherConfig, scheduler: Any, flow_matching: bool, name: str) -> None:
    """Raises `ConfigError` if a model of this kind cannot be inverted as the config says."""
    kind = scheduler.config.get("prediction_type", "epsilon")
    if flow_matching and config.inversion in ("ddim", "null_text"):
        raise ConfigError(f"inversion is {config.inversion!r}, but {name} is a flow-matching model; choose flow or noise")
    if not flow_matching and config.inversion == "flow":
        raise ConfigError(f"inversion is 'flow', but {name} is no flow-matching model; choose ddim, null_text or noise")
    if not flow_matching and kind not in ("epsilon", "v_prediction"):
        raise ConfigError(f"{name} predicts {kind!r}; lavender inverts models that predict epsilon or v_prediction")


def read_maps(denoiser: BoundDenoiser, latents: torch.Tensor, config: TeacherConfig, noise: Noise) -> Ends:
    """Runs the denoiser along the chosen way and records every timestep whose attention is wanted.

    Args:
        denoiser: with its captions.
        latents: [B, C, h, w], the encoded pictures, scaled.
        config: which way, and its numbers of steps.
        noise: see `Noise`.
    """
    ways = {"noise": _add_noise, "ddim": _ddim, "null_text": _null_text, "flow": _flow_matching}
    return ways[config.inversion](denoiser, latents, config, noise)


def _add_noise(denoiser: BoundDenoiser, latents: torch.Tensor, config: TeacherConfig, noise: Noise) -> Ends:
    ddim = None if denoiser.flow_matching else _scheduler(DDIMScheduler, denoiser)
    noisiest = latents
    for number in config.timesteps:
        timestep = torch.tensor(number, device=latents.device)
        if ddim is None:
            noisy = latents + number / 1000 * (noise() - latents)
        else:
            noisy = ddim.add_noise(latents, noise(), timestep.expand(len(latents)))
        denoiser.record(noisy, timestep)
        if number == max(config.timesteps):
            noisiest = noisy
    return noisiest, latents


def _ddim(denoiser: BoundDenoiser, latents: torch.Tensor, config: TeacherConfig, noise: Noise) -> Ends:
    """DDIM inversion (Song et al. 2021, section 4.3), then DDIM denoising from the noise level that inversion reached."""
    path, reached = _invert(denoiser, latents, config.inversion_steps)
    noisiest = latents = path[-1]
    ddim = _scheduler(DDIMScheduler, denoiser)
    ddim.set_timesteps(config.diffusion_steps, device=latents.device)
    for timestep in ddim.timesteps:
        # Few inversion steps stop short of the noisiest level: denoising starts where they stopped.
        if int(timestep) <= reached:
            output = denoiser.predict_guided(latents, timestep, _is_recorded(config, timestep))
            latents = ddim.step(output, timestep, latents).prev_sample
    return noisiest, latents


def _null_text(denoiser: BoundDenoiser, latents: torch.Tensor, config: TeacherConfig, noise: Noise) -> Ends:
    """Null-text inversion (Mokady et al. 2023): the empty caption's embedding is fitted at every timestep, picture by picture."""
    path, _ = _invert(denoiser, latents, config.diffusion_steps)
    noisiest = latents = path.pop()
    ddim = _scheduler(DDIMScheduler, denoiser)
    ddim.set_timesteps(config.diffusion_steps, device=latents.device)
    empty = denoiser.empty().float()
    for step, timestep in enumerate(ddim.timesteps):
        goal = path.pop()
        conditional = (denoiser.record if _is_recorded(config, timestep) else denoiser.predict)(latents, timestep)

        def denoise(
            embeddings: torch.Tensor,
            latents: torch.Tensor = latents,
            timestep: torch.Tensor = timestep,
            conditional: torch.Tensor = conditional,
        ) -> torch.Tensor:
            output = denoiser.guide(denoiser.predict_for(embeddings, latents, timestep), conditional)
            return ddim.step(output, timestep, latents).prev_sample

        rate = _ADAM_RATE * (1 - step / (2 * config.diffusion_steps))
        empty = _fit_empty(denoise, empty, goal, rate, config.inner_steps, enough=1e-5 + 2e-5 * step)
        with torch.no_grad():
            latents = denoise(empty)
    return noisiest, latents


def _fit_empty(
    denoise: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, goal: torch.Tensor, rate: float, steps: int, enough: float
) -> torch.Tensor:
    """Embeddings [B, N, C] that lead to the goal: Adam, until each picture's error is small enough."""
    embeddings = start.clone().requires_grad_()
    adam = torch.optim.Adam([embeddings], lr=rate)
    unfinished = torch.ones(len(goal), dtype=torch.bool, device=goal.device)
    for _ in range(steps):
        with torch.enable_grad():
            errors = (denoise(embeddings) - goal).square().mean(dim=(1, 2, 3))
            # The pictures' errors are added, not averaged: each one is fitted as if it were alone.
            (embeddings.grad,) = torch.autograd.grad(errors.sum(), embeddings)
        before = embeddings.detach().clone()
        adam.step()
        with torch.no_grad():
            embeddings.copy_(torch.where(unfinished[:, None, None], embeddings, before))
        unfinished &= errors.detach() >= enough
        if not unfinished.any():
            break
    return embeddings.detach()


def _flow_matching(denoiser: BoundDenoiser, latents: torch.Tensor, config: TeacherConfig, noise: Noise) -> Ends:
    """Euler's method: from the picture to noise over the scheduler's noise levels, and back.

    As in DDIM inversion, the velocity of a step is that at its noisier end, where the way back takes it too.
    """

    def at(sigma: float) -> torch.Tensor:
        return torch.tensor(1000 * sigma, device=latents.device)

    for high, low in reversed(list(pairwise(denoiser.sigmas(config.inversion_steps, latents)))):
        latents = latents + (high - low) * denoiser.predict(latents, at(high))
    noisiest = latents
    for high, low in pairwise(denoiser.sigmas(config.diffusion_steps, latents)):
        latents = latents - (high - low) * denoiser.predict_guided(latents, at(high), _is_recorded(config, at(high)))
    return noisiest, latents


def _invert(denoiser: BoundDenoiser, latents: torch.Tensor, num_steps: int) -> tuple[list[torch.Tensor], int]:
    """The latents on DDIM's way to noise, those of the picture first, and the last timestep."""
    inverse = _scheduler(DDIMInverseScheduler, denoiser)
    inverse.set_timesteps(num_steps, device=latents.device)
    path = [latents]
    for timestep in inverse.timesteps:
        path.append(inverse.step(denoiser.predict(path[-1], timestep), timestep, path[-1]).prev_sample)
    return path, int(inverse.timesteps[-1])


def _scheduler(kind: Any, denoiser: BoundDenoiser) -> Any:
    """One of diffusers' schedulers with the pipeline's noise schedule."""
    # Not by `from_config`: it leaves out what the pipeline's scheduler has by default, and defaults differ from kind to kind.
    known = inspect.signature(kind).parameters
    settings = {name: value for name, value in denoiser.scheduler.config.items() if name in known}
    # With "linspace" (usual for Euler and DPM-Solver) the steps there and back would not be the same.
    if settings.get("timestep_spacing") == "linspace":
        settings["timestep_spacing"] = "leading"
    # Schedulers of other kinds do not say in their configs that latents are not clipped.
    return kind(**{**settings, "clip_sample": False})


def _is_recorded(config: TeacherConfig, timestep: torch.Tensor) -> bool:
    return config.first_timestep <= float(timestep) <= config.last_timestep
