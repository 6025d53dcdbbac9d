"""A teacher's denoiser bound to the captions of one batch: predictions for them, and the word maps of those that are recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..config import TeacherConfig
from ..errors import CaptureError, ConfigError
from ..types import Box, Word
from .encoding import TextReader, Texts
from .families import TeacherFamily, Text
from .framing import on_picture
from .recording import DenoiserHooks, Recording
from .schedules import kind_of


class BoundDenoiser:
    """A denoiser with the captions of one batch. Latents are float32 [B, C, h, w], timesteps scalars, as the denoiser
    takes them.

    Attributes:
        scheduler: the pipeline's, of which the noise schedule and the kind of prediction are used.
        flow_matching: whether the model is a flow-matching one.
        missing: of each caption, whether no text column stands for each word; empty where no words were given.
    """

    def __init__(
        self,
        family: TeacherFamily,
        hooks: DenoiserHooks,
        config: TeacherConfig,
        texts: Sequence[str],
        word_weights: torch.Tensor,
        side: int,
        words: Sequence[Sequence[Word]] = (),
    ) -> None:
        """
        Args:
            family: how the pipeline's parts are called.
            hooks: on its denoiser.
            config: which forwards, layers and heads are recorded, and how they are weighted.
            texts: B captions.
            word_weights: float32 [B, W, N], each text column's share of each word, on the teacher's device.
            side: of the pictures, in pixels.
            words: of every caption; the columns are then those of the tokens that the text encoders receive, whatever
                `word_weights` says. A caption that is not found among these has no words.
        """
        self.scheduler = family.pipe.scheduler
        self.flow_matching = kind_of(self.scheduler, type(family.pipe).__name__) == "flow"
        self._family, self._hooks, self._config = family, hooks, config
        # Whether classifier-free guidance takes a second forward, for empty captions.
        self._guided = config.guidance_scale > 1 and config.inversion != "noise" and not family.takes_guidance
        with TextReader(family.pipe).reading() as received:
            self._text, self._empty = family.encode_prompts(texts, word_weights.device, side, self._guided)
        self.missing: list[list[bool]] = []
        if words:
            word_weights = self._weights(received, texts, words).to(word_weights.device)
        if config.renormalize:  # by the attention to the whole text, as if it were a word more
            word_weights = torch.cat([word_weights, torch.ones_like(word_weights[:, :1])], dim=1)
        self._word_weights = word_weights
        self._layer_weights = _layer_weights(hooks, config)
        self._sums: dict[tuple[int, ...], torch.Tensor]
        self.forget()

    def _weights(self, received: Texts, texts: Sequence[str], words: Sequence[Sequence[Word]]) -> torch.Tensor:
        """Each column's share of each word, [B, W, N], as the text encoders received them."""
        embeddings = self._text.embeddings
        weights = torch.zeros(len(texts), max(1, *map(len, words)), embeddings.shape[1])
        for padded, embedding, text, caption_words in zip(weights, embeddings, texts, words, strict=True):
            try:
                carried = received.identify(embedding, [text])
            except CaptureError:  # it is not clear where the caption stands
                carried = None
            if carried is not None:
                padded[: len(caption_words)] = carried.weights(caption_words)[0][: len(caption_words)]
            self.missing.append([not own.any() for own in padded[: len(caption_words)]])
        return weights

    def forget(self) -> None:
        """Leaves out what was recorded so far."""
        self._sums, self._total, self._num_recorded = {}, 0.0, 0

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The prediction for the captions; nothing is recorded."""
        return self._predict(latents, timestep, self._text, 1.0)

    def record(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The prediction for the captions, whose maps are recorded."""
        with self._recorded():
            return self.predict(latents, timestep)

    def predict_guided(self, latents: torch.Tensor, timestep: torch.Tensor, record: bool) -> torch.Tensor:
        """The prediction with classifier-free guidance if there is any; `record` keeps the maps of the captions' part."""
        if not record:
            return self._predict_guided(latents, timestep)
        with self._recorded():
            return self._predict_guided(latents, timestep)

    @property
    def text(self) -> torch.Tensor:
        """Embeddings [B, N, C] of the captions."""
        return self._text.embeddings

    def empty(self) -> torch.Tensor:
        """Embeddings [B, N, C] of empty captions."""
        assert self._empty is not None
        return self._empty.embeddings

    def guide(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
        """Classifier-free guidance (Ho and Salimans 2022)."""
        return unconditional + self._config.guidance_scale * (conditional - unconditional)

    def predict_for(self, embeddings: torch.Tensor, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The prediction for embeddings in place of the empty captions'; differentiable."""
        assert self._empty is not None
        return self._predict(latents, timestep, self._empty.with_embeddings(embeddings.to(self._empty.embeddings)), 1.0)

    def sigmas(self, num_steps: int, latents: torch.Tensor) -> list[float]:
        """Noise levels of a denoising by a scheduler that has sigmas, from noise to picture."""
        return self._family.sigmas(num_steps, latents)

    def maps(self, inside: Sequence[Box]) -> torch.Tensor:
        """Weighted mean of all that was recorded, float32 [B, W, map_size, map_size].

        `inside` is the part of its square that each picture fills. Raises `ConfigError` if no forward was recorded, or not as
        many as `timestep_weights` has numbers.
        """
        config = self._config
        if not self._num_recorded:
            raise ConfigError(
                f"no denoising step lies between first_timestep={config.first_timestep} and last_timestep={config.last_timestep}; "
                "widen them"
            )
        if len(config.timestep_weights) not in (0, self._num_recorded):
            raise ConfigError(
                f"timestep_weights has {len(config.timestep_weights)} numbers, but {self._num_recorded} forwards are read"
            )
        resized = [on_picture(total, inside, config.map_size) for total in self._sums.values()]
        return torch.stack(resized).sum(dim=0).float() / self._total

    def _predict_guided(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if not self._guided:
            return self._predict(latents, timestep, self._text, self._config.guidance_scale)
        assert self._empty is not None
        # diffusers' order: unconditional first, conditional last.
        both = self._predict(torch.cat([latents, latents]), timestep, self._empty.followed_by(self._text), 1.0)
        return self.guide(*both.chunk(2))

    def _predict(self, latents: torch.Tensor, timestep: torch.Tensor, text: Text, guidance_scale: float) -> torch.Tensor:
        return self._family.predict(latents.to(self._family.denoiser.dtype), timestep, text, guidance_scale).float()

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        config = self._config
        with self._hooks.capture(
            self._word_weights,
            branch=slice(-len(self._text), None),
            fused=self._hooks.layout.order == "cross",
            heads=config.heads if config.head_reduction == "mean" else True,
            resolutions=config.resolutions,
        ) as recording:
            yield
        self._add(recording)

    def _add(self, recording: Recording) -> None:
        """Adds one forward's maps to the sums, which are kept by grid: resampling them is left to the end."""
        config, number = self._config, self._num_recorded
        self._num_recorded += 1
        weight = 1.0
        if config.timestep_weights:
            weight = config.timestep_weights[number] if number < len(config.timestep_weights) else 0.0
        for entry in recording.entries:
            share = weight * self._layer_weights[entry.layer]
            maps = entry.maps
            if config.head_reduction == "max":
                maps = (maps[:, list(config.heads)] if config.heads else maps).amax(dim=1, keepdim=True)
            maps = maps[:, 0].float()
            if config.renormalize:
                maps = maps[:, :-1] / maps[:, -1:]
            grid = tuple(maps.shape[-2:])
            self._sums[grid] = self._sums[grid] + share * maps if grid in self._sums else share * maps
            self._total += share


def _layer_weights(hooks: DenoiserHooks, config: TeacherConfig) -> dict[str, float]:
    """The weight of every module that is recorded."""
    weights = dict(zip(config.layers, config.layer_weights, strict=True)) if config.layer_weights else {}
    return {name: next((weight for part, weight in weights.items() if part in name), 1.0) for name in hooks.modules}
