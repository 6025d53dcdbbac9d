"""A diffusion pipeline that is asked where the words of given captions lie in given pictures."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..config import Offload, TeacherConfig
from ..data.samples import require_unicode
from ..errors import ConfigError, DataError, ModelError
from ..images import load_image
from ..kernels.map_loss import normalize
from ..targets.shards import image_sha256
from ..types import Box, Word, WordMaps
from ..words import words_of
from .families import TEACHERS, TeacherFamily, Text, teacher_family_of
from .framing import frame, on_picture
from .inversion import read_maps, require_inversion
from .prompts import word_weights
from .recording import DenoiserHooks, Recording

_SENTENCE_END = re.compile(r"[.!?。！？]|\n")


@dataclass(frozen=True)
class _Passage:
    """A part of a caption that the text encoder reads at once.

    Attributes:
        picture: which picture of the batch it belongs to.
        text: what is read.
        words: its words, counted in `text`.
        weights: [W, N], each text column's share of each word.
        missing: of each word, whether no column stands for it.
    """

    picture: int
    text: str
    words: tuple[Word, ...]
    weights: torch.Tensor
    missing: tuple[bool, ...]


class Teacher:
    """A text-to-image pipeline of diffusers that is asked for word maps of given pictures.

    Attributes:
        pipe: the pipeline.
        family: how it is asked.
        hooks: on its denoiser.
        identity: its name, and sixteen digits that change with its weights.
        side: of the square that pictures are brought to, in pixels.
    """

    def __init__(
        self,
        model: str | Path | Any,
        config: TeacherConfig,
        device: str | torch.device = "cpu",
        *,
        offload: Offload = "none",
        vae_slicing: bool = False,
    ) -> None:
        """`model` is a folder, a hub id or a loaded pipeline.

        Raises:
            ModelError: `model` cannot be loaded, or is no text-to-image pipeline that lavender knows.
            ConfigError: the config does not fit this model.
        """
        self.config = config
        self.device = torch.device(device)
        self.pipe = load_pipeline(model, config) if isinstance(model, str | Path) else model
        self.family: TeacherFamily = teacher_family_of(type(self.pipe))(self.pipe)
        denoiser = self.family.denoiser
        name = type(self.pipe).__name__
        if denoiser.dtype != getattr(torch, config.dtype):
            raise ConfigError(
                f"dtype is {config.dtype!r}, but this {name} is in {denoiser.dtype}; give its own, or load it in that"
            )
        require_inversion(config, self.pipe.scheduler, self.family.flows, name)
        self.side = config.image_size or self.family.side
        if self.side % self.family.multiple:
            raise ConfigError(f"image_size is {self.side}; for this model it must be a multiple of {self.family.multiple}")
        self.hooks = DenoiserHooks(denoiser, config.layers)
        self._layer_weights = _layer_weights(self.hooks, config)
        # Before anything is offloaded: weights that are away cannot be read.
        self.identity = {"model": str(model) if isinstance(model, str | Path) else name, "weights": _weights_fingerprint(self.pipe)}
        self.pipe.set_progress_bar_config(disable=True)
        self._place(offload, vae_slicing)
        self._guided = config.guidance_scale > 1 and config.inversion != "noise" and not self.family.takes_guidance
        with torch.no_grad():
            self._num_columns = self.family.encode_prompts([""], self.device, self.side, False)[0].embeddings.shape[1]

    def _place(self, offload: Offload, vae_slicing: bool) -> None:
        if offload != "none" and self.device.type == "cpu":
            raise ConfigError(f"offload is {offload!r}, but the device is the CPU, where everything is already; leave it out")
        if offload == "model":
            self.pipe.enable_model_cpu_offload(device=self.device)
        elif offload == "sequential":
            self.pipe.enable_sequential_cpu_offload(device=self.device)
        else:
            self.pipe.to(self.device)
        if self.config.vae_tiling:
            self.pipe.vae.enable_tiling()
        if vae_slicing:
            self.pipe.vae.enable_slicing()

    def close(self) -> None:
        """Takes the hooks away: the pipeline is what it was."""
        self.hooks.remove()

    def word_maps(self, image: Image.Image, caption: str) -> WordMaps:
        """Maps of every word of a caption, float32 [W, map_size, map_size]; NaN for words that the text encoder does not read.

        Raises `DataError` if `refusal` has a reason to, or the model's numbers overflow.
        """
        reason = self.refusal(caption)
        if reason is not None:
            raise DataError(reason)
        maps = self.word_maps_of([image], [caption])[0]
        self.require_finite(maps)
        return maps

    def require_finite(self, maps: WordMaps) -> None:
        """Raises `DataError` for maps that came from numbers which are none."""
        if np.isinf(maps.maps).any():
            raise DataError(f"the teacher's attention is not finite in {self.config.dtype}; choose dtype bfloat16 or float32")

    def refusal(self, caption: str) -> str | None:
        """Why a caption cannot be read, or None."""
        if not words_of(caption):
            return f"the caption {caption[:200]!r} has no words"
        try:
            require_unicode(caption, "the caption")
        except DataError as error:
            return str(error)
        if self.config.long_captions == "error":
            read = self._passage(0, caption, words_of(caption))
            if read.missing[-1]:
                count = len(read.missing) - _trailing(read.missing)
                return f"the caption has {len(read.missing)} words, and the text encoder reads the first {count}"
        return None

    def word_maps_of(self, images: Sequence[Image.Image], captions: Sequence[str]) -> list[WordMaps]:
        """Maps of several pictures' words, as `word_maps` gives them, computed together.

        As many passages of text are read at a time as there are pictures. The captions are such that `refusal` has nothing against
        them. Where the model's numbers overflow, maps are infinite.
        """
        upright = [load_image(image) for image in images]
        frames = [frame(image, self.side, self.config.fit) for image in upright]
        with torch.no_grad():
            latents = self.family.encode(torch.stack([own.pixels for own in frames]).to(self.device)).float()
        # The noise of a picture follows from the picture: neither the order of samples nor a restart changes it.
        seeds = [int(image_sha256(image)[:15], 16) ^ self.config.seed for image in upright]
        passages = [passage for n, caption in enumerate(captions) for passage in self._passages(n, caption)]
        maps: list[list[np.ndarray]] = [[] for _ in images]
        for start in range(0, len(passages), len(images)):
            chosen = passages[start : start + len(images)]
            own = [passage.picture for passage in chosen]
            read = self._read(latents[own], chosen, [seeds[n] for n in own], [frames[n].inside for n in own])
            for n, passage, values in zip(own, chosen, read, strict=True):
                maps[n].append(values[: len(passage.words)])
        return [
            WordMaps(caption, words_of(caption), np.concatenate(values), own.crop)
            for caption, values, own in zip(captions, maps, frames, strict=True)
        ]

    def _read(
        self, latents: torch.Tensor, passages: Sequence[_Passage], seeds: Sequence[int], inside: Sequence[Box]
    ) -> list[np.ndarray]:
        """Maps [W, map_size, map_size] of each passage's words."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def noise() -> torch.Tensor:
            return torch.stack([torch.randn(latents.shape[1:], generator=own) for own in generators]).to(latents)

        # Fitting the empty caption needs no gradient of the weights.
        with torch.no_grad(), _frozen(self.family.denoiser):
            asked = _Asked(self, passages)
            read_maps(asked, latents, self.config, noise)
            maps = normalize(asked.maps(inside), self.config.normalization).cpu().numpy()
        for values, passage in zip(maps, passages, strict=True):
            own, missing = values[: len(passage.words)], np.array(passage.missing)
            own[:] = own if np.isfinite(own[~missing]).all() else np.inf
            own[missing] = np.nan
        return list(maps)

    def _passages(self, picture: int, caption: str) -> Iterator[_Passage]:
        """A caption, in as many parts as the text encoder needs; one, if long captions are not to be divided."""
        words = words_of(caption)
        if self.config.long_captions != "chunks":
            yield self._passage(picture, caption, words)
            return
        first = 0
        while first < len(words):
            # A word has one token at least: what lies beyond the window need not be looked at.
            last = min(first + self._num_columns, len(words))
            passage = self._cut(picture, caption, words, first, last)
            read = last - _trailing(passage.missing)
            if first < read < len(words):
                last = _sentence_end(caption, words, first, read)
                passage = self._cut(picture, caption, words, first, last)
            yield passage
            first = last

    def _cut(self, picture: int, caption: str, words: Sequence[Word], first: int, last: int) -> _Passage:
        """The words from `first` to below `last`, with what stands between them and behind."""
        start = words[first].start if first else 0
        end = words[last].start if last < len(words) else len(caption)
        return self._passage(picture, caption[start:end], _moved(words[first:last], -start))

    def _passage(self, picture: int, text: str, words: Sequence[Word]) -> _Passage:
        # A word has one token at least: what lies beyond the window need not be looked at.
        near, num_beyond = words[: self._num_columns], max(0, len(words) - self._num_columns)
        read = text[: near[-1].end] if num_beyond else text
        weights, missing = word_weights(self.pipe, [read], [near], self._num_columns, {})
        return _Passage(
            picture,
            text,
            tuple(words),
            torch.nn.functional.pad(weights[0], (0, 0, 0, num_beyond)),
            (*(word in missing[0] for word in near), *[True] * num_beyond),
        )


class _Asked:
    """A teacher with the passages of one batch; see `lavender.teachers.inversion.Asked`."""

    def __init__(self, teacher: Teacher, passages: Sequence[_Passage]) -> None:
        self.scheduler, self.flows = teacher.pipe.scheduler, teacher.family.flows
        self._teacher, self._config, self._family = teacher, teacher.config, teacher.family
        texts = [passage.text for passage in passages]
        self._text, self._empty = teacher.family.encode_prompts(texts, teacher.device, teacher.side, teacher._guided)
        most = max(len(passage.words) for passage in passages)
        weights = torch.zeros(len(passages), most + 1, teacher._num_columns)
        for own, passage in zip(weights, passages, strict=True):
            own[: len(passage.words)] = passage.weights
        weights[:, -1] = 1  # the whole text
        self._weights = (weights if self._config.renormalize else weights[:, :-1]).to(teacher.device)
        self._sums: dict[tuple[int, ...], torch.Tensor] = {}
        self._total = 0.0
        self._num_looks = 0

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self._predict(latents, timestep, self._text, 1.0)

    def predict_guided(self, latents: torch.Tensor, timestep: torch.Tensor, look: bool) -> torch.Tensor:
        if not look:
            return self._guided(latents, timestep)
        with self._looking() as recording:
            output = self._guided(latents, timestep)
        self._add(recording)
        return output

    def look(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        with self._looking() as recording:
            output = self.predict(latents, timestep)
        self._add(recording)
        return output

    def empty(self) -> torch.Tensor:
        assert self._empty is not None
        return self._empty.embeddings

    def guide(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
        return unconditional + self._config.guidance_scale * (conditional - unconditional)

    def predict_for(self, embeddings: torch.Tensor, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        assert self._empty is not None
        return self._predict(latents, timestep, self._empty.with_embeddings(embeddings.to(self._empty.embeddings)), 1.0)

    def sigmas(self, num_steps: int, latents: torch.Tensor) -> list[float]:
        return self._family.sigmas(num_steps, latents)

    def maps(self, inside: Sequence[Box]) -> torch.Tensor:
        """Weighted mean of all that was read, float32 [B, W, map_size, map_size]."""
        config = self._config
        if not self._num_looks:
            raise ConfigError(
                f"no denoising step lies between first_timestep={config.first_timestep} and last_timestep={config.last_timestep}; "
                "widen them"
            )
        if len(config.timestep_weights) not in (0, self._num_looks):
            raise ConfigError(
                f"timestep_weights has {len(config.timestep_weights)} numbers, but {self._num_looks} forwards are read"
            )
        resized = [on_picture(total, inside, config.map_size) for total in self._sums.values()]
        return torch.stack(resized).sum(dim=0).float() / self._total

    def _guided(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if not self._teacher._guided:
            return self._predict(latents, timestep, self._text, self._config.guidance_scale)
        assert self._empty is not None
        # diffusers' order: unconditional first, conditional last.
        both = self._predict(torch.cat([latents, latents]), timestep, self._empty.followed_by(self._text), 1.0)
        return self.guide(*both.chunk(2))

    def _predict(self, latents: torch.Tensor, timestep: torch.Tensor, text: Text, guidance_scale: float) -> torch.Tensor:
        return self._family.predict(latents.to(self._family.denoiser.dtype), timestep, text, guidance_scale).float()

    @contextmanager
    def _looking(self) -> Iterator[Recording]:
        config = self._config
        heads = config.heads if config.head_reduction == "mean" else True
        with self._teacher.hooks.capture(
            self._weights,
            branch=slice(-len(self._text), None),
            fused=self._teacher.hooks.layout.order == "cross",
            heads=heads,
            resolutions=config.resolutions,
        ) as recording:
            yield recording

    def _add(self, recording: Recording) -> None:
        """Adds one forward's maps to the sums, which are kept by grid: resampling them is left to the end."""
        config, number = self._config, self._num_looks
        self._num_looks += 1
        weight = 1.0
        if config.timestep_weights:
            weight = config.timestep_weights[number] if number < len(config.timestep_weights) else 0.0
        for entry in recording.entries:
            share = weight * self._teacher._layer_weights[entry.layer]
            maps = entry.maps
            if config.head_reduction == "max":
                maps = (maps[:, list(config.heads)] if config.heads else maps).amax(dim=1, keepdim=True)
            maps = maps[:, 0].float()
            if config.renormalize:
                maps = maps[:, :-1] / maps[:, -1:]
            grid = tuple(maps.shape[-2:])
            self._sums[grid] = self._sums[grid] + share * maps if grid in self._sums else share * maps
            self._total += share


def load_pipeline(model: str | Path, config: TeacherConfig | None = None) -> Any:
    """Loads a text-to-image pipeline from a folder or a hub id, in the config's `dtype`. Raises `ModelError` if it is none."""
    from diffusers import DiffusionPipeline

    dtype = getattr(torch, (config or TeacherConfig()).dtype)
    try:
        known = DiffusionPipeline.load_config(str(model))
        # Stable Diffusion's checker would be loaded for pictures that nobody draws.
        options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in known else {}
        if dtype != torch.float32:
            options["torch_dtype"] = dtype
        pipe = DiffusionPipeline.from_pretrained(str(model), **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ModelError(
            f"cannot load a text-to-image pipeline from {str(model)!r} ({first_line}); give a folder that diffusers saved "
            f"({', '.join(TEACHERS)}), or a hub id"
        ) from error
    # transformers may load a text encoder as it was saved.
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module) and part.dtype != dtype:
            part.to(dtype)
    return pipe


def _weights_fingerprint(pipe: Any) -> str:
    """Sixteen digits of what shapes the maps: the weights of text encoders, autoencoder and denoiser, and the noise schedule."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module) and name != "safety_checker"}
    denoiser: Any = parts.get("unet", parts.get("transformer"))
    configs = [dict(denoiser.config), dict(pipe.scheduler.config)]
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode())
    for part in sorted(parts):
        for name, tensor in sorted(parts[part].state_dict().items()):
            digest.update(f"{part}.{name}".encode())
            digest.update(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """No parameter of the model asks for a gradient."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _layer_weights(hooks: DenoiserHooks, config: TeacherConfig) -> dict[str, float]:
    """The weight of every module that is read."""
    weights = dict(zip(config.layers, config.layer_weights, strict=True)) if config.layer_weights else {}
    return {name: next((weight for part, weight in weights.items() if part in name), 1.0) for name in hooks.modules}


def _trailing(missing: Sequence[bool]) -> int:
    """How many words at the end are missing."""
    return next((n for n, is_missing in enumerate(reversed(missing)) if not is_missing), len(missing))


def _moved(words: Sequence[Word], by: int) -> tuple[Word, ...]:
    return tuple(replace(word, start=word.start + by, end=word.end + by) for word in words)


def _sentence_end(caption: str, words: Sequence[Word], first: int, last: int) -> int:
    """The word before which a part is cut: behind the last sentence that ends in its second half, or else `last`."""
    for n in range(last, first + (last - first) // 2, -1):
        if _SENTENCE_END.search(caption, words[n - 1].end, words[n].start):
            return n
    return last
