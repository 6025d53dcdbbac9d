"""From a photograph's latent to the noisy latents at which word maps are recorded, and back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from ..config import TeacherConfig
from .bound_denoiser import BoundDenoiser
from .schedules import EdmLevels, FlowLevels, Levels, ddim_of, kind_of

Noise = Callable[[], torch.Tensor]
"""Gives standard normal noise like the latents, other noise at every call."""
Ends = tuple[torch.Tensor, torch.Tensor]
"""The noisiest latents, and those at the end: of every inversion but `noise`, what the denoising made of them."""
_ADAM_RATE = 1e-2
"""Learning rate of null-text inversion at the first timestep; it falls to half of that (Mokady et al. 2023, their code)."""


def read_maps(denoiser: BoundDenoiser, latents: torch.Tensor, config: TeacherConfig, noise: Noise) -> Ends:
    """Runs the denoiser along the chosen way and records every timestep whose attention is wanted.

    Args:
        denoiser: with its captions.
        latents: [B, C, h, w], the encoded pictures, scaled.
        config: which way, and its numbers of steps.
        noise: see `Noise`.
    """
    ways = {"noise": _add_noise, "ddim": _ddim, "null_text": _null_text, "flow": _euler}
    way = ways[config.inversion]
    # Where latents have a sigma, DDIM's steps are Euler's (Karras et al. 2022, appendix B.3).
    return (_euler if way is _ddim and _levels(denoiser) is not None else way)(denoiser, latents, config, noise)


def noisy_at(
    denoiser: BoundDenoiser, latents: torch.Tensor, noise: torch.Tensor, number: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents with noise at what the config calls a timestep; what the denoiser is given for them; and the timestep it takes."""
    levels = _levels(denoiser)
    if levels is None:
        timestep = torch.tensor(number, device=latents.device)
        noisy = ddim_of(DDIMScheduler, denoiser.scheduler).add_noise(latents, noise, timestep.expand(len(latents)))
        return noisy, noisy, timestep
    sigma = levels.sigma(number)
    noisy = levels.noisy(latents, noise, sigma)
    return noisy, levels.given(noisy, sigma), levels.timestep(sigma).to(latents.device)


def _add_noise(denoiser: BoundDenoiser, latents: torch.Tensor, config: TeacherConfig, noise: Noise) -> Ends:
    noisiest = latents
    for number in config.timesteps:
        noisy, given, timestep = noisy_at(denoiser, latents, noise(), number)
        denoiser.record(given, timestep)
        if number == max(config.timesteps):
            noisiest = noisy
    return noisiest, latents


def _ddim(denoiser: BoundDenoiser, latents: torch.Tensor, config: TeacherConfig, noise: Noise) -> Ends:
    """DDIM inversion (Song et al. 2021, section 4.3), then DDIM denoising from the noise level that inversion reached."""
    path, reached = _invert(denoiser, latents, config.inversion_steps)
    noisiest = latents = path[-1]
    ddim = ddim_of(DDIMScheduler, denoiser.scheduler)
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
    ddim = ddim_of(DDIMScheduler, denoiser.scheduler)
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


def _euler(denoiser: BoundDenoiser, latents: torch.Tensor, config: TeacherConfig, noise: Noise) -> Ends:
    """Euler's method: from the picture to noise over the scheduler's noise levels, and back.

    As in DDIM inversion, the slope of a step is that at its noisier end, where the way back takes it too.
    """
    levels = _levels(denoiser)
    assert levels is not None
    for high, low in reversed(list(pairwise(denoiser.sigmas(config.inversion_steps, latents)))):
        output = denoiser.predict(levels.given(latents, high), levels.timestep(high).to(latents.device))
        latents = latents + (high - low) * levels.slope(latents, output, high)
    noisiest = latents
    for high, low in pairwise(denoiser.sigmas(config.diffusion_steps, latents)):
        output = denoiser.predict_guided(
            levels.given(latents, high), levels.timestep(high).to(latents.device), _is_recorded(config, levels.number(high))
        )
        latents = latents - (high - low) * levels.slope(latents, output, high)
    return noisiest, latents


def _levels(denoiser: BoundDenoiser) -> Levels | None:
    """The noise levels of a model that has sigmas; None of one that has timesteps alone."""
    if denoiser.flow_matching:
        return FlowLevels(denoiser.scheduler)
    return EdmLevels(denoiser.scheduler) if kind_of(denoiser.scheduler, "pipeline") == "edm" else None


def _invert(denoiser: BoundDenoiser, latents: torch.Tensor, num_steps: int) -> tuple[list[torch.Tensor], int]:
    """The latents on DDIM's way to noise, those of the picture first, and the last timestep."""
    inverse = ddim_of(DDIMInverseScheduler, denoiser.scheduler)
    inverse.set_timesteps(num_steps, device=latents.device)
    path = [latents]
    for timestep in inverse.timesteps:
        path.append(inverse.step(denoiser.predict(path[-1], timestep), timestep, path[-1]).prev_sample)
    return path, int(inverse.timesteps[-1])


def _is_recorded(config: TeacherConfig, timestep: float | torch.Tensor) -> bool:
    return config.first_timestep <= float(timestep) <= config.last_timestep
