"""From a photograph's latent to the noisy latents at which a diffusion model is asked where each word lies, and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from ..config import TeacherConfig
from ..errors import ConfigError

_ADAM_RATE = 1e-2
"""Learning rate of null-text inversion at the first timestep; it falls to half of that (Mokady et al. 2023, their code)."""


class Asked(Protocol):
    """A teacher with the captions of one batch; latents are float32 [B, C, h, w], timesteps scalars from 0 to 1000."""

    scheduler: Any
    """The pipeline's scheduler, of which the noise schedule and the kind of prediction are used."""
    flows: bool
    """Whether the model is a flow-matching one."""

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The prediction for the captions; nobody looks."""

    def predict_guided(self, latents: torch.Tensor, timestep: torch.Tensor, look: bool) -> torch.Tensor:
        """The prediction with classifier-free guidance if there is any; `look` reads the maps of the captions' part."""

    def look(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The prediction for the captions, whose maps are read."""

    def empty(self) -> torch.Tensor:
        """Embeddings [B, N, C] of empty captions."""

    def guide(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
        """Classifier-free guidance (Ho and Salimans 2022)."""

    def predict_for(self, embeddings: torch.Tensor, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The prediction for embeddings in place of the empty captions'; differentiable."""

    def sigmas(self, num_steps: int, latents: torch.Tensor) -> list[float]:
        """Noise levels of a flow-matching model's denoising, from noise to 0."""


def require_inversion(config: TeacherConfig, scheduler: Any, flows: bool, name: str) -> None:
    """Raises `ConfigError` if a model of this kind cannot be inverted in the way that is asked for."""
    kind = scheduler.config.get("prediction_type", "epsilon")
    if flows and config.inversion in ("ddim", "null_text"):
        raise ConfigError(f"inversion is {config.inversion!r}, but {name} is a flow-matching model; choose flow or noise")
    if not flows and config.inversion == "flow":
        raise ConfigError(f"inversion is 'flow', but {name} is no flow-matching model; choose ddim, null_text or noise")
    if not flows and kind not in ("epsilon", "v_prediction"):
        raise ConfigError(f"{name} predicts {kind!r}; lavender inverts models that predict epsilon or v_prediction")


def read_maps(
    asked: Asked, latents: torch.Tensor, config: TeacherConfig, noise: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the denoiser along the chosen way and looks at every timestep whose attention is wanted.

    Args:
        asked: the teacher with its captions.
        latents: [B, C, h, w], the encoded pictures, scaled.
        config: which way, and its numbers of steps.
        noise: gives standard normal noise like the latents, other noise at every call.

    Returns:
        The noisiest latents, and those at the end: of every way but `noise`, what the denoising made of them.
    """
    ways = {"noise": _noised, "ddim": _ddim, "null_text": _null_text, "flow": _flow}
    return ways[config.inversion](asked, latents, config, noise)


def _noised(
    asked: Asked, latents: torch.Tensor, config: TeacherConfig, noise: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    ddim = None if asked.flows else _scheduler(DDIMScheduler, asked)
    noisiest = latents
    for number in config.timesteps:
        timestep = torch.tensor(number, device=latents.device)
        if ddim is None:
            noisy = latents + number / 1000 * (noise() - latents)
        else:
            noisy = ddim.add_noise(latents, noise(), timestep.expand(len(latents)))
        asked.look(noisy, timestep)
        if number == max(config.timesteps):
            noisiest = noisy
    return noisiest, latents


def _ddim(
    asked: Asked, latents: torch.Tensor, config: TeacherConfig, noise: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """DDIM inversion (Song et al. 2021, section 4.3), then DDIM denoising from the noise level that inversion reached."""
    path, reached = _inverted(asked, latents, config.inversion_steps)
    noisiest = latents = path[-1]
    ddim = _scheduler(DDIMScheduler, asked)
    ddim.set_timesteps(config.diffusion_steps, device=latents.device)
    for timestep in ddim.timesteps:
        # Few inversion steps stop short of the noisiest level: denoising starts where they stopped.
        if int(timestep) <= reached:
            output = asked.predict_guided(latents, timestep, _is_read(config, timestep))
            latents = ddim.step(output, timestep, latents).prev_sample
    return noisiest, latents


def _null_text(
    asked: Asked, latents: torch.Tensor, config: TeacherConfig, noise: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Null-text inversion (Mokady et al. 2023): the empty caption's embedding is fitted at every timestep, picture by picture."""
    path, _ = _inverted(asked, latents, config.diffusion_steps)
    noisiest = latents = path.pop()
    ddim = _scheduler(DDIMScheduler, asked)
    ddim.set_timesteps(config.diffusion_steps, device=latents.device)
    empty = asked.empty().float()
    for step, timestep in enumerate(ddim.timesteps):
        goal = path.pop()
        conditional = (asked.look if _is_read(config, timestep) else asked.predict)(latents, timestep)

        def denoise(
            embeddings: torch.Tensor,
            latents: torch.Tensor = latents,
            timestep: torch.Tensor = timestep,
            conditional: torch.Tensor = conditional,
        ) -> torch.Tensor:
            output = asked.guide(asked.predict_for(embeddings, latents, timestep), conditional)
            return ddim.step(output, timestep, latents).prev_sample

        rate = _ADAM_RATE * (1 - step / (2 * config.diffusion_steps))
        empty = _fitted(denoise, empty, goal, rate, config.inner_steps, enough=1e-5 + 2e-5 * step)
        with torch.no_grad():
            latents = denoise(empty)
    return noisiest, latents


def _fitted(
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


def _flow(
    asked: Asked, latents: torch.Tensor, config: TeacherConfig, noise: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Euler's method along the flow: from the picture to noise over the scheduler's noise levels, and back.

    As in DDIM inversion, the velocity of a step is that at its noisier end, which is where the way back asks for it.
    """

    def at(sigma: float) -> torch.Tensor:
        return torch.tensor(1000 * sigma, device=latents.device)

    for high, low in reversed(list(pairwise(asked.sigmas(config.inversion_steps, latents)))):
        latents = latents + (high - low) * asked.predict(latents, at(high))
    noisiest = latents
    for high, low in pairwise(asked.sigmas(config.diffusion_steps, latents)):
        latents = latents - (high - low) * asked.predict_guided(latents, at(high), _is_read(config, at(high)))
    return noisiest, latents


def _inverted(asked: Asked, latents: torch.Tensor, num_steps: int) -> tuple[list[torch.Tensor], int]:
    """The latents on DDIM's way to noise, the given ones first, and the last timestep."""
    inverse = _scheduler(DDIMInverseScheduler, asked)
    inverse.set_timesteps(num_steps, device=latents.device)
    path = [latents]
    for timestep in inverse.timesteps:
        path.append(inverse.step(asked.predict(path[-1], timestep), timestep, path[-1]).prev_sample)
    return path, int(inverse.timesteps[-1])


def _scheduler(kind: Any, asked: Asked) -> Any:
    """One of diffusers' schedulers with the pipeline's noise schedule."""
    # Not by `from_config`: it leaves out what the pipeline's scheduler has by default, and defaults differ from kind to kind.
    known = inspect.signature(kind).parameters
    settings = {name: value for name, value in asked.scheduler.config.items() if name in known}
    # With "linspace" (usual for Euler and DPM-Solver) the steps there and back would not be the same.
    if settings.get("timestep_spacing") == "linspace":
        settings["timestep_spacing"] = "leading"
    # Schedulers of other kinds do not say in their configs that latents are not clipped.
    return kind(**{**settings, "clip_sample": False})


def _is_read(config: TeacherConfig, timestep: torch.Tensor) -> bool:
    return config.first_timestep <= float(timestep) <= config.last_timestep
