"""The patch of a diffusers pipeline: it knows the prompt that is drawn, and which of the denoiser's samples carry it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CaptureError, ModelError
from ..families.prompts import word_weights
from ..maps import Maps, of_picture
from ..types import Word
from ..words import words_and
from .diffusers import DenoiserHooks, Recording
from .handle import Handle


@dataclass(eq=False)
class _Drawing:
    """What a pipeline was asked to draw.

    Attributes:
        arguments: of the pipeline's call, or of `encode_prompt`, with defaults.
        prompts: P texts; None where embeddings were given instead.
        copies: pictures per prompt.
        whole: whether the pipeline's own call runs, and not a user's loop over its parts.
    """

    arguments: Mapping[str, Any]
    prompts: tuple[str, ...] | None
    copies: int
    whole: bool
    words: tuple[tuple[Word, ...], ...] = ()
    missing: list[list[Word]] = field(default_factory=list)
    recording: Recording | None = None
    timesteps: set[float] = field(default_factory=set)

    @classmethod
    def of(cls, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], more: tuple[str, ...], whole: bool) -> _Drawing:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        prompt = arguments.get("prompt")
        prompts = None if prompt is None else (prompt,) if isinstance(prompt, str) else tuple(prompt)
        copies = arguments.get("num_images_per_prompt", arguments.get("num_videos_per_prompt", 1))
        words = tuple(words_and(text, more) for text in prompts or ())
        return cls(arguments, prompts, copies or 1, whole, words)

    @property
    def num_pictures(self) -> int:
        return len(self.prompts or ()) * self.copies


class TeacherPatch(Handle):
    """A patched text-to-image pipeline: what `lavender.patch(pipe)` returns for diffusers pipelines.

    Whatever the pipeline draws while it is patched is recorded: `maps` has the heat maps of the latest prompt's words. Usable as
    a context manager. One patch serves one thread.

    Attributes:
        pipe: the patched pipeline.
        denoiser: its U-Net or transformer.
        layers: names of the attention modules that are read.
    """

    def __init__(
        self,
        pipe: Any,
        layers: tuple[str, ...] = (),
        heads: bool = False,
        steps: bool = False,
        words: tuple[str, ...] = (),
    ) -> None:
        self.pipe = pipe
        self.settings = (layers, heads, steps, words)
        self._more = words
        self._heads, self._steps = heads, steps
        self._drawing: _Drawing | None = None
        self._context: str | None = None
        # Wan 2.2 draws the late steps with a second transformer.
        self._hooks = [DenoiserHooks(denoiser, layers, self._open) for denoiser in _denoisers(pipe)]
        self.denoiser = self._hooks[0].denoiser
        self.layers = tuple(self._hooks[0].modules)
        self._class = type(pipe)
        if callable(pipe):
            pipe.__class__ = _watched(type(pipe), self)
        for hooks in self._hooks:
            named: Any = getattr(hooks.denoiser, "cache_context", None)
            if named is not None:
                vars(hooks.denoiser)["cache_context"] = self._named(named)

    @property
    def is_patched(self) -> bool:
        """Whether the hooks are in place."""
        return self._hooks[0].attached

    def unpatch(self) -> None:
        """Undoes everything; maps that were recorded stay. A second call does nothing."""
        if not self.is_patched:
            return
        for hooks in self._hooks:
            hooks.remove()
            vars(hooks.denoiser).pop("cache_context", None)
        if callable(self.pipe):
            self.pipe.__class__ = self._class

    @property
    def maps(self) -> Maps:
        """Heat maps of the words of the latest prompt, for its first picture; see `maps_of`."""
        return self.maps_of(0)

    def maps_of(self, picture: int) -> Maps:
        """Heat maps for one picture of the latest call, numbered as the pipeline returns them: prompt by prompt.

        Raises:
            CaptureError: nothing was drawn yet, or the prompt was given as embeddings.
        """
        drawing = self._drawing
        if drawing is None:
            raise CaptureError(
                "nothing was recorded: call the pipeline, or its encode_prompt and its denoiser, while it is patched"
            )
        if drawing.prompts is None:
            raise CaptureError(
                "the prompt was given as embeddings, whose words nobody knows; give it as text, or record with "
                "patch.capture(word_weights)"
            )
        if drawing.recording is None:
            raise CaptureError("nothing was recorded: the denoiser did not run after the prompt was encoded")
        if not 0 <= picture < drawing.num_pictures:
            raise CaptureError(f"there is no picture {picture}; {drawing.num_pictures} were drawn")
        prompt = picture // drawing.copies
        entries = of_picture(drawing.recording.entries, picture)
        own = drawing.words[prompt]
        return Maps(drawing.prompts[prompt], own, entries, drawing.missing[prompt])

    def capture(
        self, word_weights: torch.Tensor, branch: slice = slice(None), fused: bool = False
    ) -> AbstractContextManager[Recording]:
        """Records the denoiser's forwards with weights of the caller's own; see `DenoiserHooks.capture`."""
        return self._hooks[0].capture(word_weights, branch, fused)

    @contextmanager
    def _running(self, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
        """The pipeline's own call, from its arguments to its end."""
        drawing = self._drawing = _Drawing.of(self._class.__call__, (self.pipe, *args), kwargs, self._more, whole=True)
        try:
            yield
        finally:
            drawing.whole = False
        if drawing.recording is not None:
            drawing.recording.require_layers(self.denoiser, self._hooks[0].modules)

    def _encoding(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """`encode_prompt` was called: by a user it says what is drawn next; inside the pipeline's call that is known already."""
        if self._drawing is None or not self._drawing.whole:
            self._drawing = _Drawing.of(self._class.encode_prompt, (self.pipe, *args), kwargs, self._more, whole=False)

    def _named(self, original: Callable[..., AbstractContextManager[None]]) -> Callable[..., AbstractContextManager[None]]:
        """The denoiser's `cache_context`, by which a pipeline names the branch that it computes, noting the name."""

        @contextmanager
        def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
            before, self._context = self._context, name
            try:
                with original(name, **kwargs):
                    yield
            finally:
                self._context = before

        return cache_context

    def _open(self, inputs: Mapping[str, Any]) -> tuple[Recording, slice] | None:
        """Before a forward of the denoiser: where to record it, and which samples."""
        drawing = self._drawing
        if drawing is None or drawing.prompts is None:
            return None
        text = inputs["encoder_hidden_states"]
        branch = self._branch(drawing, text.shape[0], inputs["timestep"])
        if branch is None:
            return None
        if drawing.recording is None:
            weights, drawing.missing = word_weights(self.pipe, drawing.prompts, drawing.words, text.shape[1], drawing.arguments)
            weights = weights.repeat_interleave(drawing.copies, dim=0)
            drawing.recording = Recording(weights, heads=self._heads, steps=self._steps)
        return drawing.recording, branch

    def _branch(self, drawing: _Drawing, batch: int, timestep: Any) -> slice | None:
        """The samples that carry the prompt; None if this forward has none.

        A pipeline that computes its branches apart names them by `cache_context`, or begins each timestep with the prompt's. One
        that computes them together orders them [unconditional, conditional, perturbed].
        """
        size = drawing.num_pictures
        if self._context not in (None, "cond", "cond_uncond"):
            return None
        count, rest = divmod(batch, size)
        if rest or not 1 <= count <= 3:
            raise CaptureError(
                f"the denoiser got a batch of {batch} for {size} pictures; expected 1 to 3 times as many. If these are other "
                "pictures than the ones whose prompt was encoded last, encode their prompt, or use patch.capture(word_weights)"
            )
        if count == 1:
            if drawing.whole and self._context is None:
                now = float(torch.as_tensor(timestep).flatten()[0])
                if now in drawing.timesteps:
                    return None
                drawing.timesteps.add(now)
            return slice(0, batch)
        perturbed_only = (
            count == 2
            and getattr(self.pipe, "do_perturbed_attention_guidance", False)
            and not getattr(self.pipe, "do_classifier_free_guidance", True)
        )
        first = 0 if perturbed_only else size
        return slice(first, first + size)


def _denoisers(pipe: Any) -> list[torch.nn.Module]:
    found = [getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
    # torch.compile wraps a model whose own hooks run all the same.
    denoisers = [getattr(denoiser, "_orig_mod", denoiser) for denoiser in found if isinstance(denoiser, torch.nn.Module)]
    if not denoisers:
        raise ModelError(
            f"cannot patch a {type(pipe).__name__}; expected a transformers image-text-to-text model or a diffusers pipeline"
        )
    return denoisers


def _watched(original: type, patch: TeacherPatch) -> type:
    """A pipeline's class that tells the patch what is drawn: the same in everything else, its name included."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with patch._running(args, kwargs):
            return original.__call__(self, *args, **kwargs)

    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        patch._encoding(args, kwargs)
        return original.encode_prompt(self, *args, **kwargs)  # type: ignore[attr-defined]

    own: dict[str, Any] = {"__call__": call, "__module__": original.__module__, "__doc__": original.__doc__}
    own["_lavender_patch"] = patch
    if hasattr(original, "encode_prompt"):
        own["encode_prompt"] = encode_prompt
    for name in ("__call__", "encode_prompt"):
        if name in own:
            own[name].__signature__ = inspect.signature(getattr(original, name))
    watched = type(original.__name__, (original,), own)
    watched.__qualname__ = original.__qualname__
    return watched
