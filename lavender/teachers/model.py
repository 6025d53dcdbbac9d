"""A diffusion pipeline as a teacher: where the words of a caption lie in a photograph."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import Offload, TeacherConfig
from ..data.samples import require_unicode
from ..errors import ConfigError, DataError, ModelError
from ..images import ImageSource, Picture
from ..kernels.map_loss import normalize
from ..pretrained.names import split_revision
from ..pretrained.weights import require_finite
from ..types import Box, Word, WordMaps
from ..words import Caption, words_of
from .bound_denoiser import BoundDenoiser
from .encoding import TextReader
from .families import TeacherFamily, teacher_family_of
from .framing import frame
from .identity import (
    CAPTION,
    asking,
    behavior_of,
    digits_as_loaded,
    digits_of_behavior,
    digits_of_weights,
    modules_of,
    remedy_of_overflow,
)
from .inversion import read_maps
from .loading import load_pipeline, pin_pipeline
from .prompts import word_weights
from .recording import DenoiserHooks
from .schedules import require_inversion
from .turns import turn_of

_PROBE = "a (red:1.3) cat, [two] birds and a half-open door"
"""A caption with what pipelines of others take out of theirs."""

_SENTENCE_END = re.compile(r"[.!?。！？]|\n")


@dataclass(frozen=True)
class _Passage:
    """A part of a caption that the text encoder reads at once.

    Attributes:
        image: which picture of the batch it belongs to.
        text: what is read.
        words: its words, counted in `text`.
        weights: [W, N], each text column's share of each word.
        missing: of each word, whether no column stands for it.
    """

    image: int
    text: str
    words: tuple[Word, ...]
    weights: torch.Tensor
    missing: tuple[bool, ...]


class Teacher:
    """A text-to-image pipeline of diffusers that gives word maps of photographs.

    Attributes:
        pipe: the pipeline.
        family: how its parts are called.
        hooks: on its denoiser.
        identity: its name; the commit that it was loaded from if it is of the hub; `weights`, sixteen digits that change with its
            weights and settings, and `weights_as_loaded`, those that lavender took before; and `behavior`: see
            `lavender.teachers.identity`. Of a pipeline that was handed in, `behavior` has `digits` too: anything may be switched.
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
        """`model` is a folder, a hub id, maybe as `NAME@REVISION`, or a loaded pipeline.

        Raises:
            ModelError: `model` cannot be loaded, is no text-to-image pipeline that lavender knows, has weights that are missing,
                NaN or infinite, or parts that cannot be asked for maps.
            ConfigError: the config does not fit this model.
        """
        self.config = config
        self.device = torch.device(device)
        if isinstance(model, str | Path):
            model = pin_pipeline(model)
            self.pipe = load_pipeline(model, config)
        else:
            self.pipe = model
        self.family = require_teacher(self.pipe, config)
        self.side = config.image_size or self.family.side
        # Before anything is offloaded: weights that are away cannot be read.
        for part, module in modules_of(self.pipe).items():
            if any(parameter.is_meta for parameter in module.parameters()):
                raise ModelError(
                    f"the weights of the {part} are away, as enable_sequential_cpu_offload() leaves them; give the pipeline before "
                    "that, and offload='sequential'"
                )
            require_finite(module, f"the {part} of {repr(model) if isinstance(model, str) else f'this {type(model).__name__}'}")
        self.hooks = DenoiserHooks(self.family.denoiser, config.layers)
        try:
            self.identity: dict[str, Any] = {**_name_of(model), **_weights_of(self.pipe)}
            self.pipe.set_progress_bar_config(disable=True)
            self._place(offload, vae_slicing)
            with turn_of(self.pipe), _evaluated(self.pipe):
                self.identity["behavior"] = self._behavior()
        except BaseException:
            self.close()
            raise
        if not isinstance(model, str):
            self.identity["behavior"]["digits"] = digits_of_behavior(self.identity["behavior"])

    def _place(self, offload: Offload, vae_slicing: bool) -> None:
        if offload != "none" and self.device.type == "cpu":
            raise ConfigError(f"offload is {offload!r}, but the device is the CPU, where everything is already; leave it out")
        if offload == "model":
            self.pipe.enable_model_cpu_offload(device=self.device)
        elif offload == "sequential":
            self.pipe.enable_sequential_cpu_offload(device=self.device)
        else:
            self.pipe.to(self.device)
        for setting, is_set in (("tiling", self.config.vae_tiling), ("slicing", vae_slicing)):
            if is_set:
                try:
                    getattr(self.pipe.vae, f"enable_{setting}")()
                except (AttributeError, NotImplementedError):
                    raise ConfigError(
                        f"vae_{setting} is true, which the autoencoder, a {type(self.pipe.vae).__name__}, cannot do; leave it out"
                    ) from None

    def _behavior(self) -> dict[str, Any]:
        with torch.no_grad(), asking(f"this {type(self.pipe).__name__} cannot encode a caption"):
            self._num_columns = self.family.encode_prompts([""], self.device, self.side, False)[0].embeddings.shape[1]
            self._require_columns()
        weights = self._passage(0, CAPTION, words_of(CAPTION)).weights[None].to(self.device)
        return behavior_of(self.family, self.hooks, self.config, self.side, weights)

    def _require_columns(self) -> None:
        """Raises `ModelError` where words cannot be found among the tokens that the text encoders receive."""
        with TextReader(self.pipe).reading() as texts:
            embeddings = self.family.encode_prompts([_PROBE], self.device, self.side, False)[0].embeddings
        if texts.identify(embeddings[0], [_PROBE]) is None:
            raise ModelError(
                f"the text columns of this {type(self.pipe).__name__} cannot be traced to the words of a caption: its "
                f"encode_prompt made {_PROBE!r} into {texts.received}; give the pipeline of diffusers that it is made from"
            )

    def close(self) -> None:
        """Takes the hooks away: the pipeline is what it was."""
        self.hooks.remove()

    def word_maps(self, image: ImageSource, caption: str) -> WordMaps:
        """Maps of every word of a caption, float32 [W, map_size, map_size]; NaN for words that the text encoder does not read.

        Raises `DataError` if the picture cannot be read, `refusal` has a reason, or the model's numbers overflow.
        """
        text = Caption.of(caption)
        reason = self.refusal(text)
        if reason is not None:
            raise DataError(reason)
        maps = self.word_maps_of([Picture.open(image)], [text])[0]
        self.require_finite(maps)
        return maps

    def require_finite(self, maps: WordMaps) -> None:
        """Raises `DataError` for maps with infinite values, since the model's numbers overflowed, or without any word."""
        if np.isnan(maps.maps).all():
            raise DataError(
                f"no word of the caption {maps.caption[:200]!r} is found among the tokens that the text encoder received"
            )
        if np.isinf(maps.maps).any():
            raise DataError(
                f"the teacher's attention is not finite in {self.config.dtype}; {remedy_of_overflow(self.config.dtype)}"
            )

    def refusal(self, caption: Caption) -> str | None:
        """Why a caption cannot be read, or None."""
        if not caption.words:
            return f"the caption {caption.text[:200]!r} has no words"
        try:
            require_unicode(caption.text, "the caption")
        except DataError as error:
            return str(error)
        if self.config.long_captions == "error":
            read = self._passage(0, caption.text, caption.words)
            if read.missing[-1]:
                count = len(read.missing) - _trailing(read.missing)
                return f"the caption has {len(read.missing)} words, and the text encoder reads the first {count}"
        return None

    def word_maps_of(self, pictures: Sequence[Picture], captions: Sequence[Caption]) -> list[WordMaps]:
        """Maps of several pictures' words, as `word_maps` gives them, computed together.

        As many passages of text are read at a time as there are pictures. `refusal` must have no reason against any of the
        captions. Where the model's numbers overflow, maps are infinite. Threads that use one pipeline wait for each other.
        """
        with turn_of(self.pipe), _evaluated(self.pipe):
            frames = [frame(picture.image, self.side, self.config.fit) for picture in pictures]
            with torch.no_grad():
                latents = self.family.encode(torch.stack([square.pixels for square in frames]).to(self.device)).float()
            # The noise of a picture follows from the picture: neither the order of samples nor a restart changes it.
            seeds = [int(picture.sha256[:15], 16) ^ self.config.seed for picture in pictures]
            passages = [passage for n, caption in enumerate(captions) for passage in self._passages(n, caption)]
            maps: list[list[np.ndarray]] = [[] for _ in pictures]
            for start in range(0, len(passages), len(pictures)):
                together = passages[start : start + len(pictures)]
                images = [passage.image for passage in together]
                read = self._read(latents[images], together, [seeds[n] for n in images], [frames[n].inside for n in images])
                for n, passage, values in zip(images, together, read, strict=True):
                    maps[n].append(values[: len(passage.words)])
        return [
            WordMaps(caption.text, caption.words, np.concatenate(values), square.crop)
            for caption, values, square in zip(captions, maps, frames, strict=True)
        ]

    def _read(
        self, latents: torch.Tensor, passages: Sequence[_Passage], seeds: Sequence[int], inside: Sequence[Box]
    ) -> list[np.ndarray]:
        """Maps [W, map_size, map_size] of each passage's words."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def noise() -> torch.Tensor:
            return torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators]).to(latents)

        # Fitting the empty caption needs no gradient of the weights.
        with torch.no_grad(), _frozen(self.family.denoiser):
            denoiser = self.bind(passages)
            read_maps(denoiser, latents, self.config, noise)
            maps = normalize(denoiser.maps(inside), self.config.normalization).cpu().numpy()
        for padded, passage, lacking in zip(maps, passages, denoiser.missing, strict=True):
            values, missing = padded[: len(passage.words)], np.array(passage.missing) | np.array(lacking)
            if not np.isfinite(values[~missing]).all():
                values[:] = np.inf
            values[missing] = np.nan
        return list(maps)

    def bind(self, passages: Sequence[_Passage]) -> BoundDenoiser:
        """The denoiser with the passages of one batch."""
        weights = torch.zeros(len(passages), max(len(passage.words) for passage in passages), self._num_columns)
        for padded, passage in zip(weights, passages, strict=True):
            padded[: len(passage.words)] = passage.weights
        texts = [passage.text for passage in passages]
        words = [passage.words for passage in passages]
        return BoundDenoiser(self.family, self.hooks, self.config, texts, weights.to(self.device), self.side, words)

    def _passages(self, image: int, caption: Caption) -> Iterator[_Passage]:
        """A caption, in as many parts as the text encoder needs; one, if long captions are not to be divided."""
        text, words = caption.text, caption.words
        if self.config.long_captions != "chunks":
            yield self._passage(image, text, words)
            return
        first = 0
        while first < len(words):
            # A word has one token at least: what lies beyond the window need not be looked at.
            last = min(first + self._num_columns, len(words))
            passage = self._cut(image, caption, first, last)
            read = last - _trailing(passage.missing)
            if first < read < len(words):
                last = _sentence_end(caption, first, read)
                passage = self._cut(image, caption, first, last)
            yield passage
            first = last

    def _cut(self, image: int, caption: Caption, first: int, last: int) -> _Passage:
        """The words from `first` to below `last`, with what stands between them and behind."""
        words = caption.words
        start = words[first].start if first else 0
        end = words[last].start if last < len(words) else len(caption.text)
        return self._passage(image, caption.text[start:end], _moved(words[first:last], -start))

    def _passage(self, image: int, text: str, words: Sequence[Word]) -> _Passage:
        # A word has one token at least: what lies beyond the window need not be looked at.
        near, num_beyond = words[: self._num_columns], max(0, len(words) - self._num_columns)
        read = text[: near[-1].end] if num_beyond else text
        weights, missing = word_weights(self.pipe, [read], [near], self._num_columns, {})
        return _Passage(
            image,
            text,
            tuple(words),
            torch.nn.functional.pad(weights[0], (0, 0, 0, num_beyond)),
            (*(word in missing[0] for word in near), *[True] * num_beyond),
        )


def require_teacher(pipe: Any, config: TeacherConfig) -> TeacherFamily:
    """A pipeline's family, if maps can be extracted with it as the config says; its weights are not looked at.

    Raises:
        ModelError: it is no text-to-image pipeline that lavender knows.
        ConfigError: the config does not fit it.
    """
    family = teacher_family_of(type(pipe))(pipe)
    name, dtype = type(pipe).__name__, family.denoiser.dtype
    if dtype != getattr(torch, config.dtype):
        raise ConfigError(f"dtype is {config.dtype!r}, but this {name} is in {dtype}; give its own, or load it in that")
    require_inversion(config, pipe.scheduler, family.flow_matching, name)
    _require_plain(family.denoiser, config, name)
    if config.inversion == "null_text" and family.takes_guidance:
        raise ConfigError(f"inversion is 'null_text', but {name} takes the guidance scale as an input; choose ddim or noise")
    if (config.image_size or family.side) % family.multiple:
        raise ConfigError(
            f"image_size is {config.image_size or family.side}; for this model it must be a multiple of {family.multiple}"
        )
    return family


def _require_plain(denoiser: Any, config: TeacherConfig, name: str) -> None:
    """Raises `ConfigError` where diffusers' hooks would keep forwards of a denoiser from being what they are read as."""
    registries = [vars(module)["_diffusers_hook"] for module in denoiser.modules() if "_diffusers_hook" in vars(module)]
    kinds = {type(hook).__module__.rpartition(".")[2] for registry in registries for hook in registry.hooks.values()}
    caches = sorted(kind for kind in kinds if kind.endswith("_cache") or kind == "pyramid_attention_broadcast")
    if caches:
        remedy = "call disable_cache() on the denoiser" if getattr(denoiser, "is_cache_enabled", False) else "load it without"
        raise ConfigError(
            f"the denoiser of this {name} has a cache of diffusers, {', '.join(caches)}, by which layers give what they computed "
            f"for another timestep or caption; {remedy}"
        )
    if config.inversion == "null_text" and "layerwise_casting" in kinds:
        raise ConfigError(
            f"inversion is 'null_text', but the denoiser of this {name} casts its weights layer by layer, through which no "
            "gradient leads; choose ddim or noise, or load it without enable_layerwise_casting()"
        )


def _name_of(model: Any) -> dict[str, str]:
    """What the identity says of a model's name: of a loaded pipeline, its class."""
    if not isinstance(model, str):
        return {"model": type(model).__name__}
    name, commit = split_revision(model)
    return {"model": name} if commit is None else {"model": name, "model_commit": commit}


def _weights_of(pipe: Any) -> dict[str, str]:
    """What the identity says of weights."""
    with ThreadPoolExecutor(2) as pool:  # hashing takes the time, and leaves Python free meanwhile
        digits, before = pool.submit(_weights_fingerprint, pipe), pool.submit(digits_as_loaded, pipe)
        return {"weights": digits.result(), "weights_as_loaded": before.result()}


_weights_fingerprint = digits_of_weights


@contextmanager
def _evaluated(pipe: Any) -> Iterator[None]:
    """No module of the pipeline trains: the dropout that PEFT adds to a LoRA does, also in a denoiser that does not."""
    training = [module for part in modules_of(pipe).values() for module in part.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """No parameter of the model requires a gradient."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _trailing(missing: Sequence[bool]) -> int:
    """How many words at the end are missing."""
    return next((n for n, is_missing in enumerate(reversed(missing)) if not is_missing), len(missing))


def _moved(words: Sequence[Word], by: int) -> tuple[Word, ...]:
    return tuple(replace(word, start=word.start + by, end=word.end + by) for word in words)


def _sentence_end(caption: Caption, first: int, last: int) -> int:
    """The word before which a part is cut: behind the last sentence that ends in its second half, or else `last`."""
    for n in range(last, first + (last - first) // 2, -1):
        if _SENTENCE_END.search(caption.text, caption.words[n - 1].end, caption.words[n].start):
            return n
    return last
