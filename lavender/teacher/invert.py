"""From a photograph's latent to the noisy latents at which a diffusion model is asked where each word lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from ..config import TeacherConfig

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`(latents, timestep) -> model output` of one denoiser forward."""


def look_at(
    scheduler: Any,
    latents: torch.Tensor,
    config: TeacherConfig,
    invert_by: Denoise,
    look_by: Denoise,
    generator: torch.Generator,
) -> None:
    """Runs the denoiser along the chosen way; `look_by` is called at every timestep whose attention is wanted.

    Args:
        scheduler: the pipeline's scheduler; its noise schedule and prediction type are used.
        latents: [B, C, h, w], the encoded pictures, scaled.
        config: which way, and its numbers of steps.
        invert_by: forward used on the way to the noise; nobody looks.
        look_by: forward whose attention is read.
        generator: source of the noise for `inversion="noise"`.
    """
    if config.inversion == "noise":
        _look_after_noising(scheduler, latents, config, look_by, generator)
    else:
        _look_while_denoising(scheduler, latents, config, invert_by, look_by)


def _look_after_noising(
    scheduler: Any, latents: torch.Tensor, config: TeacherConfig, look_by: Denoise, generator: torch.Generator
) -> None:
    ddim = DDIMScheduler.from_config(scheduler.config)
    for timestep in config.timesteps:
        noise = torch.randn(latents.shape, generator=generator, dtype=torch.float32).to(latents)
        when = torch.tensor(timestep, device=latents.device)
        look_by(ddim.add_noise(latents, noise, when.expand(len(latents))), when)


def _look_while_denoising(
    scheduler: Any, latents: torch.Tensor, config: TeacherConfig, invert_by: Denoise, look_by: Denoise
) -> None:
    """DDIM inversion (Song et al. 2021, section 4.3), then DDIM denoising from the noise level that inversion reached."""
    inverse = DDIMInverseScheduler.from_config(scheduler.config)
    inverse.set_timesteps(config.inversion_steps, device=latents.device)
    for timestep in inverse.timesteps:
        latents = inverse.step(invert_by(latents, timestep), timestep, latents).prev_sample
    reached = int(inverse.timesteps[-1])
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(config.diffusion_steps, device=latents.device)
    for timestep in ddim.timesteps:
        # Few inversion steps stop short of the noisiest level: denoising starts where they stopped.
        if int(timestep) > reached:
            continue
        read = int(timestep) < config.last_timestep
        output = (look_by if read else invert_by)(latents, timestep)
        latents = ddim.step(output, timestep, latents).prev_sample
