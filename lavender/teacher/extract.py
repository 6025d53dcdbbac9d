"""`extract`: photographs and captions in, a target store out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from ..config import TeacherConfig
from ..data import Pair, require_unicode
from ..errors import ConfigError, DataError, ModelError
from ..families.prompts import word_weights
from ..hooks.diffusers import DenoiserHooks
from ..images import load_image
from ..targets import Target, TargetWriter, image_sha256
from ..types import WordMaps
from ..words import words_of
from .invert import look_at


@dataclass(frozen=True)
class Summary:
    """What one run of `extract` did, in samples."""

    written: int
    present: int
    failed: int


class Teacher:
    """A Stable Diffusion 1.x or 2.x pipeline that is asked for word maps of given pictures.

    Raises `ModelError` if `model` is no such pipeline.
    """

    def __init__(self, model: str | Path | Any, config: TeacherConfig, device: str | torch.device = "cpu") -> None:
        """`model` is a folder, a hub id or a loaded pipeline."""
        self.pipe = load_pipeline(model) if isinstance(model, str | Path) else model
        self.pipe.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.config = config
        self.device = torch.device(device)
        self._side = config.image_size or self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        if self._side % self.pipe.vae_scale_factor:
            raise ConfigError(f"image_size is {self._side}; for this model it must be a multiple of {self.pipe.vae_scale_factor}")
        self.hooks = DenoiserHooks(self.pipe.unet, config.layers)
        self.identity = {"model": str(model) if isinstance(model, str | Path) else type(model).__name__}
        self.identity["weights"] = _weights_fingerprint(self.pipe)

    def word_maps(self, image: Image.Image, caption: str) -> WordMaps:
        """Maps of every word of a caption, float32 [W, map_size, map_size], raw attention; NaN for words beyond the window.

        Raises `DataError` when the caption has no words.
        """
        words = words_of(caption)
        if not words:
            raise DataError(f"the caption {caption!r} has no words")
        require_unicode(caption, "the caption")
        weights, missing = word_weights(self.pipe, [caption], [words], self.pipe.tokenizer.model_max_length, {})
        weights = weights.to(self.device)
        latents = self._encode(image)
        # The noise of a picture follows from the picture: neither the order of samples nor a restart changes it.
        generator = torch.Generator().manual_seed(int(image_sha256(image)[:15], 16) ^ self.config.seed)
        guided = self.config.inversion == "ddim" and self.config.guidance_scale > 1
        kept: list[torch.Tensor] = []
        with torch.no_grad():
            prompt, empty = self.pipe.encode_prompt(caption, self.device, 1, guided, negative_prompt="" if guided else None)

            def invert_by(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
                return self.pipe.unet(noisy, timestep, prompt).sample

            def look_by(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
                # diffusers' order: unconditional first, conditional last.
                with self.hooks.capture(weights, branch=slice(-1, None), fused=True) as recording:
                    if guided:
                        both = self.pipe.unet(noisy.repeat(2, 1, 1, 1), timestep, torch.cat([empty, prompt])).sample
                        unconditional, conditional = both.chunk(2)
                        output = unconditional + self.config.guidance_scale * (conditional - unconditional)
                    else:
                        output = invert_by(noisy, timestep)
                kept.append(recording.mean(self.config.map_size)[0])
                return output

            look_at(self.pipe.scheduler, latents, self.config, invert_by, look_by, generator)
        if not kept:
            raise ConfigError(f"no denoising step lies below last_timestep={self.config.last_timestep}; raise it")
        maps = torch.stack(kept).mean(dim=0).float().cpu().numpy()
        maps[[word in missing[0] for word in words]] = np.nan
        return WordMaps(caption, words, maps)

    def _encode(self, image: Image.Image) -> torch.Tensor:
        """The picture's latent [1, C, h, w], the mean of the encoder's distribution, scaled; the whole picture, not cropped."""
        vae = self.pipe.vae
        upright = ImageOps.exif_transpose(image).convert("RGB")
        resized = upright.resize((self._side, self._side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)[None]
        pixels = (pixels.to(self.device, torch.float32) / 127.5 - 1).to(vae.dtype)
        with torch.no_grad():
            return vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor


def load_pipeline(model: str | Path) -> Any:
    """Loads a Stable Diffusion pipeline from a folder or a hub id in float32. Raises `ModelError` if it is none."""
    from diffusers import StableDiffusionPipeline

    try:
        pipe = StableDiffusionPipeline.from_pretrained(str(model), safety_checker=None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ModelError(
            f"cannot load a Stable Diffusion pipeline from {str(model)!r} ({first_line}); give a folder that diffusers saved, or "
            "a hub id"
        ) from error
    # diffusers loads its own parts in float32; transformers loads the text encoder as it was saved.
    pipe.text_encoder.float()
    return pipe


def _weights_fingerprint(pipe: Any) -> str:
    """Sixteen digits of what shapes the maps: the weights of text encoder, autoencoder and U-Net, and the noise schedule."""
    configs = [dict(pipe.unet.config), dict(pipe.scheduler.config)]
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode())
    for part in (pipe.text_encoder, pipe.vae, pipe.unet):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def extract(
    model: str | Path | Any,
    pairs: Iterable[Pair],
    out: str | Path,
    config: TeacherConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Summary:
    """Writes a target store of word maps for pictures with captions.

    A store that was begun with the same teacher and config is continued. A picture or caption that cannot be used is reported,
    listed in `failed.jsonl` and skipped.

    Args:
        model: folder or hub id of a Stable Diffusion 1.x or 2.x pipeline, or a loaded pipeline.
        pairs: pictures with captions; see `lavender.data.read_pairs`.
        out: folder of the store.
        config: how the maps are read.
        device: where the teacher runs.
        progress: whether to show a progress bar.

    Raises:
        ModelError: `model` cannot be loaded or read.
        TargetError: `out` holds something else.
    """
    config = config or TeacherConfig()
    teacher = Teacher(model, config, device)
    writer = TargetWriter(Path(out), config, teacher.identity)
    writer.begin_run()
    pairs = list(pairs)
    written = present = failed = 0
    try:
        for pair in tqdm(pairs, desc="word maps", unit="picture", disable=not progress):
            try:
                image = load_image(pair.image)
                if writer.has(pair.id, image, pair.caption):
                    present += 1
                    continue
                maps = teacher.word_maps(image, pair.caption)
            except DataError as error:
                failed += 1
                writer.fail(pair.id, str(error))
                tqdm.write(f"skipped {pair.id}: {error}")
                continue
            writer.add(Target(pair.id, image_sha256(image), maps))
            written += 1
    finally:
        teacher.hooks.remove()
    writer.close()
    return Summary(written, present, failed)
