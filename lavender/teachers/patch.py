"""The patch of a diffusers pipeline: it knows the prompt that is drawn, and which of the denoiser's samples carry it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from types import MethodType
from typing import Any

import torch

from ..errors import CaptureError, ConfigError, ModelError
from ..handle import Handle
from ..maps import Maps, of_picture
from ..types import Word
from ..words import words_and
from .prompts import word_weights
from .recording import DenoiserHooks, Recording
from .turns import turn_of

_SEVERAL = object()
"""Stands for more than one thread."""


@dataclass(eq=False)
class _Drawing:
    """What a pipeline was asked to draw.

    Attributes:
        arguments: of the pipeline's call, or of `encode_prompt`, with defaults; forgotten when the call ends.
        prompts: P texts; None where embeddings were given instead.
        words: of each prompt.
        copies: pictures per prompt.
        whole: whether the pipeline's own call draws, and not a user's loop over its parts.
        closed: whether that call has ended: what the denoiser does later is not part of it.
        embeddings: what `encode_prompt` made of the prompts, [P * copies, N, C].
        owners: the prompt of every picture that was recorded.
        missing: of each prompt, the words that have no text column.
    """

    arguments: Mapping[str, Any]
    prompts: tuple[str, ...] | None
    words: tuple[tuple[Word, ...], ...]
    copies: int
    whole: bool
    closed: bool = False
    embeddings: torch.Tensor | None = None
    owners: list[int] = field(default_factory=list)
    missing: list[list[Word]] = field(default_factory=list)
    recording: Recording | None = None

    @classmethod
    def of(cls, arguments: dict[str, Any], more: tuple[str, ...], whole: bool) -> _Drawing:
        prompt = arguments.get("prompt")
        prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt) if isinstance(prompt, list | tuple) else None
        copies = arguments.get("num_images_per_prompt", arguments.get("num_videos_per_prompt", 1))
        words = tuple(words_and(text, more) for text in prompts or ())
        return cls(arguments, prompts, words, copies or 1, whole)

    def close(self) -> None:
        """The pipeline's call has ended: its maps stay, its tensors do not."""
        self.closed, self.arguments, self.embeddings = True, {}, None

    @property
    def num_pictures(self) -> int:
        return len(self.prompts or ()) * self.copies


class _State(threading.local):
    """What one thread draws: its latest drawing, and the branch that the denoiser computes, if it has a name."""

    def __init__(self) -> None:
        self.thread = object()  # the system gives the number of a thread that has ended to another one
        self.drawing: _Drawing | None = None
        self.context: str | None = None


class TeacherPatch(Handle):
    """A patched text-to-image pipeline: what `lavender.patch(pipe)` returns for diffusers pipelines.

    Whatever the pipeline draws while it is patched is recorded: `maps` has the heat maps of the latest prompt's words. Usable as
    a context manager.

    Threads may share it. Calls of pipelines that have a part in common wait for each other, since diffusers keeps the state of a
    drawing in the pipeline and its scheduler. Each thread has the maps of what it drew itself; one that drew nothing has the
    latest ones, if they are all of one other thread.

    Attributes:
        pipe: the patched pipeline.
        denoiser: its U-Net or transformer.
        layers: names of the attention modules that are read.
    """

    def __init__(
        self, pipe: Any, layers: tuple[str, ...] = (), heads: bool = False, steps: bool = False, words: tuple[str, ...] = ()
    ) -> None:
        self.pipe = pipe
        self.settings = (layers, heads, steps, words)
        self._more = words
        self._heads, self._steps = heads, steps
        self._state = _State()
        # The latest drawing while one thread alone has drawn, and which.
        self._latest: _Drawing | None = None
        self._author: object = None
        # Wan 2.2 draws the late steps with a second transformer.
        self._hooks = [DenoiserHooks(denoiser, layers, self._open) for denoiser in denoisers_of(pipe)]
        self.denoiser = self._hooks[0].denoiser
        self.layers = tuple(self._hooks[0].modules)
        self._class = type(pipe)
        if callable(pipe):
            pipe.__class__ = _watch_class(type(pipe), self)
        self._names = [_NamedContext(hooks.denoiser, self) for hooks in self._hooks if hasattr(hooks.denoiser, "cache_context")]

    @property
    def is_patched(self) -> bool:
        """Whether the hooks are in place."""
        return self._hooks[0].attached

    def unpatch(self) -> None:
        """Undoes everything, when no other thread is drawing; maps that were recorded stay. A second call does nothing."""
        with turn_of(self.pipe):
            if not self.is_patched:
                return
            for hooks in self._hooks:
                hooks.remove()
            for named in self._names:
                named.remove()
            if self._drawing is not None:
                self._drawing.close()
            if callable(self.pipe):
                self.pipe.__class__ = self._class

    def __exit__(self, *error: object) -> None:
        with turn_of(self.pipe):  # so that nobody borrows the handle in between
            super().__exit__(*error)

    @property
    def maps(self) -> Maps:
        """Heat maps of the words of the latest prompt, for its first picture; see `maps_of`."""
        return self.maps_of(0)

    def maps_of(self, picture: int) -> Maps:
        """Heat maps for one picture of the latest call, numbered as the pipeline returns them: prompt by prompt.

        Raises:
            CaptureError: nothing was drawn yet, or not by this thread but by several others; or the prompt was given as
                embeddings.
        """
        drawing = self._drawing or self._latest
        if drawing is None and self._author is not None:
            raise CaptureError(
                "several threads drew with this pipeline, and this one did not: read the maps in the thread that drew the picture"
            )
        if drawing is None:
            raise CaptureError(
                "nothing was recorded: call the pipeline, or its encode_prompt and its denoiser, while it is patched"
            )
        if drawing.prompts is None:
            raise CaptureError(
                "no prompt was given as text (the words of embeddings are nobody's); give it as text, or record with "
                "patch.capture(word_weights)"
            )
        if drawing.recording is None:
            raise CaptureError(
                "nothing was recorded: the denoiser did not run with the embedding of the prompt that was encoded last"
            )
        if not 0 <= picture < len(drawing.owners):
            raise CaptureError(f"there is no picture {picture}; {len(drawing.owners)} were drawn")
        prompt = drawing.owners[picture]
        entries = of_picture(drawing.recording.entries, picture)
        return Maps(drawing.prompts[prompt], drawing.words[prompt], entries, drawing.missing[prompt])

    def clear(self) -> None:
        """Forgets what was recorded of the prompt, graphs included: a loop that takes a gradient at every step begins each so."""
        if self._drawing is not None:
            self._drawing.recording = None

    def capture(
        self, word_weights: torch.Tensor, branch: slice = slice(None), fused: bool = False
    ) -> AbstractContextManager[Recording]:
        """Records the forwards of `denoiser` (not of a second one) with weights of one's own; see `DenoiserHooks.capture`."""
        return self._hooks[0].capture(word_weights, branch, fused)

    @property
    def _drawing(self) -> _Drawing | None:
        """This thread's."""
        return self._state.drawing

    @_drawing.setter
    def _drawing(self, drawing: _Drawing) -> None:
        self._state.drawing = drawing
        is_alone = self._author in (None, self._state.thread)
        self._latest, self._author = (drawing, self._state.thread) if is_alone else (None, _SEVERAL)

    @contextmanager
    def _running(self, arguments: dict[str, Any]) -> Iterator[None]:
        """The pipeline's own call, from its arguments to its end."""
        outer = self._drawing
        drawing = self._drawing = _Drawing.of(arguments, self._more, whole=True)
        try:
            yield
        finally:
            drawing.close()
            if outer is not None and outer.whole and not outer.closed:  # this call was made by a callback of another
                self._drawing = outer
        if drawing.recording is not None:
            drawing.recording.require_layers(self.denoiser, self._hooks[0].modules)

    def _encoded(self, arguments: dict[str, Any], output: Any) -> None:
        """`encode_prompt` ran: by a user it says what is drawn next; inside the pipeline's call its first run has the prompt."""
        drawing = self._drawing
        if drawing is None or not drawing.whole or drawing.closed:
            self._drawing = drawing = _Drawing.of(arguments, self._more, whole=False)
        elif drawing.prompts is None and drawing.embeddings is None:
            # A subclass's call that hands all its arguments on does not say which of them is the prompt.
            encoded = _Drawing.of(arguments, self._more, whole=True)
            drawing.arguments = {**arguments, **drawing.arguments}
            drawing.prompts, drawing.words, drawing.copies = encoded.prompts, encoded.words, encoded.copies
        first = output[0] if isinstance(output, tuple) else output
        if drawing.embeddings is None and isinstance(first, torch.Tensor):
            drawing.embeddings = first.detach()

    def _open(self, inputs: Mapping[str, Any]) -> tuple[Recording, list[int]] | None:
        """Before a forward of the denoiser: where to record it, and which samples."""
        drawing = self._drawing
        if drawing is None or drawing.prompts is None or drawing.closed:
            return None
        text = inputs["encoder_hidden_states"]
        samples, owners = self._samples(drawing, text, inputs)
        if not samples:
            return None
        if drawing.recording is None:
            weights, drawing.missing = word_weights(self.pipe, drawing.prompts, drawing.words, text.shape[1], drawing.arguments)
            drawing.recording, drawing.owners = Recording(weights[owners], heads=self._heads, steps=self._steps), owners
        elif owners != drawing.owners:
            raise CaptureError(
                f"the denoiser ran for the prompts {owners} of those that were encoded, and for {drawing.owners} before; call "
                "clear() between the two"
            )
        return drawing.recording, samples

    def _samples(self, drawing: _Drawing, text: torch.Tensor, inputs: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """The samples of the denoiser's batch that carry a prompt, and each one's prompt.

        In a loop of the user's own they are those whose embedding is the prompt's. A pipeline that computes its branches apart
        names them by `cache_context`, or gives the prompt's embedding to one of them; one that computes them together orders them
        [unconditional, conditional, perturbed].
        """
        if not drawing.whole:
            return _find_carriers(drawing, text)
        size, batch = drawing.num_pictures, text.shape[0]
        # Stable Diffusion 3 can compute the prompt's branch once more with layers left out.
        if self._state.context not in (None, "cond", "cond_uncond") or inputs.get("skip_layers") is not None:
            return [], []
        count, rest = divmod(batch, size)
        if rest or not 1 <= count <= 3:
            raise CaptureError(
                f"the denoiser got a batch of {batch} for {size} pictures; expected 1 to 3 times as many. Record with "
                "patch.capture(word_weights)"
            )
        first = 0 if count == 1 else size
        if count == 1 and self._state.context is None and drawing.embeddings is not None and drawing.embeddings.shape == text.shape:
            first = 0 if torch.equal(drawing.embeddings.to(text), text) else batch
        elif count == 2 and getattr(self.pipe, "do_perturbed_attention_guidance", False):
            first = size if getattr(self.pipe, "do_classifier_free_guidance", True) else 0
        if first == batch:
            return [], []
        return list(range(first, first + size)), [picture // drawing.copies for picture in range(size)]


class _NamedContext:
    """Stands in for a denoiser's `cache_context`, by which a pipeline names the branch that it computes, and notes the name."""

    def __init__(self, denoiser: Any, patch: TeacherPatch) -> None:
        self.denoiser, self.patch = denoiser, patch
        self.removed = False
        self.inner: Any = vars(denoiser).get("cache_context")  # another patch's, of a pipeline that shares the denoiser
        vars(denoiser)["cache_context"] = self

    @contextmanager
    def __call__(self, name: str, **kwargs: Any) -> Iterator[None]:
        patch = self.patch
        state = patch._state
        before, state.context = state.context, name
        try:
            original = self.inner or MethodType(type(self.denoiser).cache_context, self.denoiser)
            with original(name, **kwargs):
                yield
        finally:
            state.context = before

    def remove(self) -> None:
        """Takes this away, and whatever is left below it; where another patch stands above it, that one does so later."""
        self.removed = True
        top = vars(self.denoiser).pop("cache_context", None)
        while isinstance(top, _NamedContext) and top.removed:
            top = top.inner
        if top is not None:
            vars(self.denoiser)["cache_context"] = top

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied denoiser's own method."""
        twin = memo[id(self.denoiser)]
        return MethodType(type(twin).cache_context, twin)


def _find_carriers(drawing: _Drawing, text: torch.Tensor) -> tuple[list[int], list[int]]:
    """The samples whose embedding [N, C] is one of the prompts', and those prompts."""
    known = drawing.embeddings
    if known is None or known.shape[1:] != text.shape[1:]:
        return [], []
    same = (text.detach()[:, None] == known.to(text)[None]).flatten(2).all(dim=2)
    samples = same.any(dim=1).nonzero().flatten().tolist()
    return samples, [int(same[b].int().argmax()) // drawing.copies for b in samples]


def denoisers_of(pipe: Any) -> list[torch.nn.Module]:
    """What draws in a pipeline, below torch.compile's wrapper. Raises `ModelError` if nothing does."""
    modules = [getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
    # torch.compile wraps a model whose own hooks run all the same.
    denoisers = [getattr(denoiser, "_orig_mod", denoiser) for denoiser in modules if isinstance(denoiser, torch.nn.Module)]
    if not denoisers:
        raise ModelError(
            f"cannot patch a {type(pipe).__name__}; expected a transformers image-text-to-text model or a diffusers pipeline"
        )
    return denoisers


def _watch_class(original: type, patch: TeacherPatch) -> type:
    """A pipeline's class that reports to the patch what is drawn: the same in everything else, its name included.

    The class is swapped because Python looks `__call__` up on the type. `encode_prompt` goes the same way: bound to the pipeline
    it would lie in its `__dict__`, and every copy of the pipeline would encode with the original's text encoders. A copy has this
    class too, but is not the patch's pipeline, and draws as if nothing were there.
    """

    def bound(function: Callable[..., Any], self: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        if self is not patch.pipe or not patch.is_patched:
            return None
        try:
            call_arguments = inspect.signature(function).bind(self, *args, **kwargs)
        except TypeError:  # the pipeline will say so itself
            return None
        call_arguments.apply_defaults()
        return dict(call_arguments.arguments)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not patch.pipe:
            return original.__call__(self, *args, **kwargs)
        with turn_of(self):
            arguments = bound(original.__call__, self, args, kwargs)
            with nullcontext() if arguments is None else patch._running(arguments):
                return original.__call__(self, *args, **kwargs)

    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = bound(original.encode_prompt, self, args, kwargs)  # type: ignore[attr-defined]
        output = original.encode_prompt(self, *args, **kwargs)  # type: ignore[attr-defined]
        if arguments is not None:
            patch._encoded(arguments, output)
        return output

    attributes: dict[str, Any] = {"_lavender_patch": patch, "__module__": original.__module__, "__doc__": original.__doc__}
    for name, function in (("__call__", call), ("encode_prompt", encode_prompt)):
        if hasattr(original, name):
            attributes[name] = wraps(getattr(original, name))(function)
    watched = type(original.__name__, (original,), attributes)
    watched.__qualname__ = original.__qualname__
    return watched


def patch_teacher(
    pipe: Any, layers: str | Sequence[str] = (), heads: bool = False, steps: bool = False, words: str | Sequence[str] = ()
) -> TeacherPatch:
    """The handle of a diffusers pipeline; see `lavender.patch`."""
    layers, words = _names("layers", layers), _names("words", words)
    for name, value in (("heads", heads), ("steps", steps)):
        if not isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}; expected True or False")
    denoisers_of(pipe)  # so that what is no pipeline is named
    with turn_of(pipe):
        present: TeacherPatch | None = getattr(pipe, "_lavender_patch", None)
        if present is not None and present.pipe is not pipe:  # a copy of a patched pipeline
            pipe.__class__, present = present._class, None
        if present is not None:
            if present.settings == (layers, heads, steps, words):
                return present.borrowed()
            if present.is_used_elsewhere:
                raise CaptureError(
                    "another thread uses this pipeline's patch, with other settings; give the same, or wait until it has finished"
                )
            present.unpatch()
        return TeacherPatch(pipe, layers, heads, steps, words)


def _names(name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not all(isinstance(each, str) for each in names):
        raise ConfigError(f"{name} is {value!r}; expected a text or a list of texts")
    return tuple(names)
