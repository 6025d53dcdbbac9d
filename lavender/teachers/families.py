"""How pipelines that can be teachers encode pictures and captions and predict one step: one class per family."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch

from ..errors import ModelError, warn_renamed
from .denoisers import unwrapped


@dataclass(frozen=True, eq=False)
class Text:
    """Encoded captions of a batch.

    Attributes:
        embeddings: [B, N, C].
        more: further inputs of the denoiser that belong to the samples, each [B, ...].
    """

    embeddings: torch.Tensor
    more: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.embeddings)

    def with_embeddings(self, embeddings: torch.Tensor) -> Text:
        """The same text with other embeddings."""
        return replace(self, embeddings=embeddings)

    def followed_by(self, other: Text) -> Text:
        """Both batches as one."""
        more = {name: torch.cat([value, other.more[name]]) for name, value in self.more.items()}
        return Text(torch.cat([self.embeddings, other.embeddings]), more)


def stripped(part: Any) -> Any:
    """A part of a pipeline without torch.compile and PEFT around it, by which it computes the same."""
    part = getattr(part, "_orig_mod", part)
    return unwrapped(part) if type(part).__module__.startswith("peft.") else part


class TeacherFamily(ABC):
    """A pipeline's parts, outside of its own loop.

    Attributes:
        pipe: the pipeline.
        denoiser: its U-Net or transformer, without what torch.compile, PEFT or a wrapper of one's own puts around it.
        flow_matching: whether models of this family are flow-matching ones; another family's are where their scheduler says so.
    """

    flow_matching = False
    denoiser_name = "transformer"
    patch_size = 1

    def __init_subclass__(cls) -> None:
        if "flows" in vars(cls):
            warn_renamed("TeacherFamily.flows", "TeacherFamily.flow_matching")
            cls.flow_matching = vars(cls)["flows"]

    def __init__(self, pipe: Any) -> None:
        """Raises `ModelError` if the denoiser takes what a caption and a picture do not give."""
        for part in (self.denoiser_name, "vae", "scheduler"):
            if getattr(pipe, part, None) is None:
                raise ModelError(f"this {type(pipe).__name__} has no {part}; load it with all of its parts")
        self.pipe = pipe
        around = getattr(pipe, self.denoiser_name)
        self.denoiser: Any = unwrapped(around)
        if not (hasattr(around, "dtype") and hasattr(around, "config")):  # DataParallel
            raise ModelError(
                f"the {self.denoiser_name} of this {type(pipe).__name__} is in a {type(around).__name__}, with which the pipeline "
                f"itself draws no picture; give the pipeline the {type(self.denoiser).__name__} that is inside"
            )
        self._predictor = stripped(around)  # a wrapper of one's own may change what is predicted
        latent_channels = getattr(pipe.vae.config, "latent_channels", None)
        if latent_channels is None:
            raise ModelError(
                f"the autoencoder of this {type(pipe).__name__} is a {type(pipe.vae).__name__}, which says no "
                "latent_channels; give the pipeline one that it draws with"
            )
        config: Any = self.denoiser.config
        channels, expected = config.in_channels, self.packed_channels(latent_channels)
        if channels != expected:
            raise ModelError(
                f"the denoiser of this {type(pipe).__name__} takes {channels} channels and its pictures have {expected} by its "
                f"{type(pipe.vae).__name__}; lavender takes plain text-to-image models with their own autoencoder, none for "
                "inpainting or editing"
            )

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale is an input of the denoiser."""
        return False

    def packed_channels(self, latent_channels: int) -> int:
        """Channels of the denoiser's input, for latents of so many."""
        return latent_channels

    @property
    def multiple(self) -> int:
        """What sides of pictures, in pixels, must be multiples of."""
        return int(self.pipe.vae_scale_factor) * self.patch_size

    @property
    def side(self) -> int:
        """The side in pixels of the pictures that the model was made for."""
        size = self.denoiser.config.sample_size
        if not isinstance(size, int) or size < 1:
            raise ModelError(
                f"the config of the {type(self.denoiser).__name__} says sample_size {size!r}, expected the side of its latents; "
                "give the config that belongs to its weights"
            )
        return size * int(self.pipe.vae_scale_factor)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scaled latents [B, C, h, w] of pictures [B, 3, y, x] in [-1, 1]: the mean of the encoder's distribution if it has one."""
        vae = self.autoencoder()
        return self.latents_of(vae.encode(pixels.to(vae.dtype)))

    def autoencoder(self) -> Any:
        """The pipeline's autoencoder, in a dtype in which it can encode."""
        return self.pipe.vae

    def latents_of(self, encoded: Any) -> torch.Tensor:
        """Scaled latents [B, C, h, w] from what the autoencoder's `encode` returned. Raises `ModelError`."""
        if hasattr(encoded, "latent_dist"):
            latents = encoded.latent_dist.mode()
        else:  # autoencoders without a distribution: tiny, quantized and deeply compressing ones
            latents = getattr(encoded, "latents", None)
            latents = getattr(encoded, "latent", None) if latents is None else latents
        if latents is None:
            raise ModelError(
                f"the autoencoder of this {type(self.pipe).__name__} is a {type(self.pipe.vae).__name__}, which encodes a picture "
                f"as a {type(encoded).__name__} without latents; give the pipeline one that it draws with"
            )
        shift, scale = self._moments(latents)
        return ((latents - shift) * scale).to(self.denoiser.dtype)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, y, x], about in [-1, 1], of scaled latents [B, C, h, w]."""
        vae = self.pipe.vae
        shift, scale = self._moments(latents)
        return vae.decode((latents / scale + shift).to(vae.dtype)).sample

    def _moments(self, latents: torch.Tensor) -> tuple[Any, Any]:
        config = self.pipe.vae.config
        if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
            mean, std = (latents.new_tensor(moment).view(1, -1, 1, 1) for moment in (config.latents_mean, config.latents_std))
            return mean, config.scaling_factor / std
        return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor

    @abstractmethod
    def encode_prompts(self, captions: Sequence[str], device: torch.device, side: int, guided: bool) -> tuple[Text, Text | None]:
        """The captions' text, and that of as many empty captions if `guided`; `side` is that of the pictures, in pixels."""

    @abstractmethod
    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, text: Text, guidance_scale: float) -> torch.Tensor:
        """The denoiser's output [B, C, h, w] for noisy latents at a timestep as the pipeline counts; `guidance_scale` if taken."""

    def sigmas(self, num_steps: int, latents: torch.Tensor) -> list[float]:
        """Of a scheduler with sigmas, those of a denoising in so many steps, from noise to picture: one more than steps."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        scheduler = copy.deepcopy(self.pipe.scheduler)  # the pipeline's own keeps its steps
        config, arguments = scheduler.config, {}
        if config.get("use_dynamic_shifting"):
            tokens = latents.shape[-2] * latents.shape[-1] // self.patch_size**2
            # The defaults are the pipelines', for schedulers that have no such settings.
            defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
            arguments["mu"] = calculate_shift(tokens, *(config.get(name, value) for name, value in defaults.items()))
            if not config.get("use_flow_sigmas"):
                arguments["sigmas"] = np.linspace(1.0, 1 / num_steps, num_steps)
        scheduler.set_timesteps(num_steps, **arguments)
        # Schedulers of second order have each level twice.
        return [sigma for sigma, _ in groupby(map(float, scheduler.sigmas))]


class _StableDiffusion(TeacherFamily):
    denoiser_name = "unet"
    additions: tuple[str | None, ...] = (None, "text")
    """Kinds of additional embeddings whose inputs the pipeline makes of a caption."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        config, name = self.denoiser.config, type(pipe).__name__
        further = {
            "class labels": config.class_embed_type is not None or config.num_class_embeds is not None,
            f"what an addition_embed_type {config.addition_embed_type!r} adds": config.addition_embed_type not in self.additions,
            "the picture of an IP-Adapter or image projection (call pipe.unload_ip_adapter() if one is loaded)": (
                config.encoder_hid_dim_type not in (None, "text_proj")
            ),
        }
        for what, is_taken in further.items():
            if is_taken:
                raise ModelError(f"the U-Net of this {name} also takes {what}, which a caption and a picture do not give it")
        channels, learned = config.out_channels, str(pipe.scheduler.config.get("variance_type")).startswith("learned")
        if channels != config.in_channels * (2 if learned else 1):
            raise ModelError(
                f"the U-Net of this {name} predicts {channels} channels for {config.in_channels}, and its scheduler a "
                f"{'learned' if learned else 'fixed'} variance; give it the scheduler that its model was trained for"
            )

    @property
    def takes_guidance(self) -> bool:
        return self.denoiser.config.time_cond_proj_dim is not None

    @property
    def multiple(self) -> int:
        # Latents of any side go through a U-Net whose levels halve it only where the halves are whole.
        return int(self.pipe.vae_scale_factor) * 2 ** (len(self.denoiser.config.block_out_channels) - 1)

    def encode_prompts(self, captions: Sequence[str], device: torch.device, side: int, guided: bool) -> tuple[Text, Text | None]:
        prompt, empty = self.pipe.encode_prompt(list(captions), device, 1, guided)
        return Text(prompt, {}), Text(empty, {}) if guided else None

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, text: Text, guidance_scale: float) -> torch.Tensor:
        more: dict[str, Any] = {"added_cond_kwargs": text.more} if text.more else {}
        if self.takes_guidance:  # the scale without 1 is what the pipeline embeds
            scales = torch.full((len(latents),), guidance_scale - 1)
            width = self.denoiser.config.time_cond_proj_dim
            more["timestep_cond"] = self.pipe.get_guidance_scale_embedding(scales, width).to(latents)
        output = self._predictor(latents, timestep, text.embeddings, **more).sample
        return output[:, : latents.shape[1]]  # the rest is the learned variance


class _StableDiffusionXL(_StableDiffusion):
    additions = (None, "text", "text_time")

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        if self.denoiser.config.addition_embed_type != "text_time" or pipe.text_encoder_2 is None:
            return
        width, encoder = self.denoiser.config.addition_time_embed_dim, self.pipe.text_encoder_2
        rest = self.denoiser.add_embedding.linear_1.in_features - encoder.config.projection_dim
        if rest != 6 * width:
            raise ModelError(
                f"the U-Net of this {type(pipe).__name__} takes {rest / width:g} numbers of sizes and scores beside the pooled "
                "text, and the pipeline gives it 6; a refiner, which takes an aesthetic score, or another text encoder's U-Net "
                "cannot be a teacher"
            )

    def autoencoder(self) -> Any:
        # Its first autoencoder overflows in half precision, as its config says.
        if getattr(self.pipe.vae.config, "force_upcast", False) and self.pipe.vae.dtype == torch.float16:
            self.pipe.vae.to(torch.float32)
        return self.pipe.vae

    def encode_prompts(self, captions: Sequence[str], device: torch.device, side: int, guided: bool) -> tuple[Text, Text | None]:
        prompt, empty, pooled, empty_pooled = self.pipe.encode_prompt(
            list(captions), device=device, num_images_per_prompt=1, do_classifier_free_guidance=guided
        )
        width = pooled.shape[-1] if self.pipe.text_encoder_2 is None else self.pipe.text_encoder_2.config.projection_dim
        times = self.pipe._get_add_time_ids((side, side), (0, 0), (side, side), prompt.dtype, width)
        times = times.to(device).expand(len(captions), -1)
        text = Text(prompt, {"text_embeds": pooled, "time_ids": times})
        return text, Text(empty, {"text_embeds": empty_pooled, "time_ids": times}) if guided else None


class _PixArt(TeacherFamily):
    @property
    def patch_size(self) -> int:  # type: ignore[override]
        return int(self.denoiser.config.patch_size)

    def encode_prompts(self, captions: Sequence[str], device: torch.device, side: int, guided: bool) -> tuple[Text, Text | None]:
        prompt, mask, empty, empty_mask = self.pipe.encode_prompt(list(captions), guided, device=device)
        sizes: dict[str, torch.Tensor] = {}
        if self.denoiser.config.sample_size == 128 and self.denoiser.config.use_additional_conditions is not False:
            sides = torch.full((len(captions), 2), float(side), device=device, dtype=prompt.dtype)
            sizes = {"resolution": sides, "aspect_ratio": sides[:, :1] / sides[:, 1:]}
        text = Text(prompt, {"mask": mask, **sizes})
        return text, Text(empty, {"mask": empty_mask, **sizes}) if guided else None

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, text: Text, guidance_scale: float) -> torch.Tensor:
        sizes = {name: text.more.get(name) for name in ("resolution", "aspect_ratio")}
        output = self._predictor(
            latents,
            encoder_hidden_states=text.embeddings,
            encoder_attention_mask=text.more["mask"],
            timestep=timestep.expand(len(latents)),
            added_cond_kwargs=sizes,
        ).sample
        return output[:, : latents.shape[1]]  # the rest is the learned variance


class _StableDiffusion3(TeacherFamily):
    flow_matching = True

    @property
    def patch_size(self) -> int:  # type: ignore[override]
        return int(self.denoiser.config.patch_size)

    def encode_prompts(self, captions: Sequence[str], device: torch.device, side: int, guided: bool) -> tuple[Text, Text | None]:
        prompts = [list(captions)] * 3
        prompt, empty, pooled, empty_pooled = self.pipe.encode_prompt(*prompts, device=device, do_classifier_free_guidance=guided)
        text = Text(prompt, {"pooled_projections": pooled})
        return text, Text(empty, {"pooled_projections": empty_pooled}) if guided else None

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, text: Text, guidance_scale: float) -> torch.Tensor:
        return self._predictor(
            latents, timestep=timestep.expand(len(latents)), encoder_hidden_states=text.embeddings, **text.more
        ).sample


class _Flux(TeacherFamily):
    flow_matching = True
    patch_size = 2

    @property
    def takes_guidance(self) -> bool:
        return True

    def packed_channels(self, latent_channels: int) -> int:
        return latent_channels * 4

    @property
    def side(self) -> int:
        return int(self.pipe.default_sample_size) * int(self.pipe.vae_scale_factor)

    def encode_prompts(self, captions: Sequence[str], device: torch.device, side: int, guided: bool) -> tuple[Text, Text | None]:
        prompt, pooled, _ = self.pipe.encode_prompt(list(captions), list(captions), device=device)
        return Text(prompt, {"pooled_projections": pooled}), None

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, text: Text, guidance_scale: float) -> torch.Tensor:
        batch, channels, height, width = latents.shape
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = latents.new_full((batch,), guidance_scale, dtype=torch.float32)
        output = self._predictor(
            hidden_states=self.pipe._pack_latents(latents, batch, channels, height, width),
            timestep=timestep.expand(batch).to(latents.dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=text.embeddings,
            txt_ids=latents.new_zeros(text.embeddings.shape[1], 3),
            img_ids=self.pipe._prepare_latent_image_ids(batch, height // 2, width // 2, latents.device, latents.dtype),
            **text.more,
        ).sample
        scale = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(output, height * scale, width * scale, scale)


TEACHERS: dict[str, type[TeacherFamily]] = {
    "StableDiffusionPipeline": _StableDiffusion,
    "StableDiffusionXLPipeline": _StableDiffusionXL,
    "StableDiffusion3Pipeline": _StableDiffusion3,
    "FluxPipeline": _Flux,
    "PixArtAlphaPipeline": _PixArt,
    "PixArtSigmaPipeline": _PixArt,
}
"""Class name of a text-to-image pipeline of diffusers -> its family. Classes that inherit from it have the same."""


def teacher_family_of(pipeline: type) -> type[TeacherFamily]:
    """The family of a class of pipelines. Raises `ModelError` naming the known ones."""
    for base in pipeline.__mro__:
        if base.__name__ in TEACHERS and base.__module__.startswith("diffusers."):
            return TEACHERS[base.__name__]
    raise ModelError(f"a {pipeline.__name__} cannot be a teacher; lavender extracts word maps with {', '.join(TEACHERS)}")
