"""The patch of a diffusers pipeline: it knows the texts that a call encoded, and which of the denoiser's samples carry them."""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..errors import CaptureError, ConfigError, LavenderError, ModelError, first_line
from ..handle import Handle
from ..maps import Coverage, Maps, of_picture
from .denoisers import unwrapped
from .drawing import Branch, Drawing, Row, branch_of
from .encoding import TextReader, Texts, TokenName
from .presets import AmdMaps, DaamMaps, Preset, by_token, daam_side, require_preset
from .recording import DenoiserHooks, Recording, Wanted
from .turns import turn_of
from .watching import watched_class

logger = logging.getLogger("lavender")

_SEVERAL = object()
"""Stands for more than one thread."""
_FIRST_SHOWS = {"StableDiffusionSAGPipeline"}
"""Classes of pipelines that ask the denoiser about other latents too in a step, after those of the picture."""
_KEPT = 64
"""Embeddings that are remembered for calls that are given them in place of their text."""


class _State(threading.local):
    """What one thread draws: its latest drawing."""

    def __init__(self) -> None:
        self.thread = object()  # the system gives the number of a thread that has ended to another one
        self.drawing: Drawing | None = None


class TeacherPatch(Handle):
    """A patched text-to-image pipeline: what `lavender.patch(pipe)` returns for diffusers pipelines.

    Whatever the pipeline draws while it is patched is recorded: `maps` has the heat maps of the latest prompt's words. Usable as
    a context manager. The pipeline's pictures are what they are without it: where maps cannot be read, it is `maps` that says so.

    A forward of the denoiser is recorded if it got an embedding that the text encoders made of the prompt in this call, and once
    in a step: what callbacks, other pipelines and further passes ask the denoiser is left out, and counted in `maps.coverage`.

    Threads may share it. Calls of pipelines that have a part in common wait for each other, since diffusers keeps the state of a
    drawing in the pipeline and its scheduler. Each thread has the maps of what it drew itself; one that drew nothing has the
    latest ones, if they are all of one other thread.

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
        tokens: tuple[TokenName, ...] = (),
        preset: Preset | None = None,
    ) -> None:
        self.pipe = pipe
        self.settings = (layers, heads, steps, words, tokens, preset)
        self._words, self._tokens = words, tokens
        self._heads, self._steps, self._preset = heads, steps or preset == "amd", preset
        self._state = _State()
        # The latest drawing while one thread alone has drawn, and which.
        self._latest: Drawing | None = None
        self._author: object = None
        # Texts that were encoded apart from a call, for calls that are given embeddings.
        self._encoded: deque[Row] = deque(maxlen=_KEPT)
        # Wan 2.2 draws the late steps with a second transformer.
        self._hooks = [DenoiserHooks(denoiser, layers, self._open, self._after) for denoiser in denoisers_of(pipe)]
        self._reader = TextReader(pipe)
        self.denoiser = self._hooks[0].denoiser
        self.layers = tuple(self._hooks[0].modules)
        self._class = type(pipe)
        if callable(pipe):
            pipe.__class__ = watched_class(type(pipe), self)

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

    @property
    def negative_maps(self) -> Maps:
        """Heat maps of the words of the latest negative prompt, for the first picture; see `negative_maps_of`."""
        return self.negative_maps_of(0)

    def maps_of(self, picture: int) -> Maps:
        """Heat maps for one picture of the latest call, numbered as the pipeline returns them: prompt by prompt.

        Raises:
            CaptureError: nothing was drawn yet, or not by this thread but by several others; the prompt was given as embeddings
                that `encode_prompt` did not make while the pipeline was patched; or its maps could not be read, and why.
        """
        drawing = self._shown()
        return self._maps_of(drawing, drawing.prompts, picture)

    def negative_maps_of(self, picture: int) -> Maps:
        """Heat maps of the negative prompt's words, read where guidance runs the denoiser with it; like `maps_of`."""
        drawing = self._shown()
        return self._maps_of(drawing, drawing.negatives, picture)

    def _shown(self) -> Drawing:
        """This thread's drawing, or the one there is. Raises `CaptureError`."""
        drawing = self._drawing or self._latest
        if drawing is None and self._author is not None:
            raise CaptureError(
                "several threads drew with this pipeline, and this one did not: read the maps in the thread that drew the picture"
            )
        if drawing is None:
            raise CaptureError(
                "nothing was recorded: call the pipeline, or its encode_prompt and its denoiser, while it is patched"
            )
        return drawing

    def _maps_of(self, drawing: Drawing, branch: Branch, picture: int) -> Maps:
        if error := drawing.error or branch.error:
            kind = type(error) if isinstance(error, LavenderError) else CaptureError
            raise kind(str(error) if kind is type(error) else f"the maps could not be read ({first_line(error)})") from error
        if not branch.texts:
            raise CaptureError(
                f"no {branch.name} was given as text, nor as an embedding that this pipeline's encode_prompt made while it was "
                "patched (the words of others are nobody's); give it as text, encode it so, or record with "
                "patch.capture(word_weights)"
            )
        if branch.recording is None and [hooks.denoiser for hooks in self._hooks] != denoisers_of(self.pipe):
            raise CaptureError("nothing was recorded: the pipeline was given another denoiser after it was patched; patch it again")
        if branch.recording is None:
            unseen = ", ".join(f"{count} {reason}" for reason, count in drawing.left_out.items())
            received = ", ".join(repr(text[:200]) for text in drawing.received)
            raise CaptureError(
                f"nothing was recorded: the denoiser did not run with the embedding of the {branch.name} that was encoded last"
                + (f"; its forwards: {unseen}" if unseen else "")
                + (f"; its text encoders received {received}" if received else "")
                + ("" if branch is drawing.prompts else ". Without guidance the denoiser does not get it")
            )
        if not 0 <= picture < len(branch.owners):
            raise CaptureError(f"there is no picture {picture}; {len(branch.owners)} were drawn")
        modules = self._hooks[0].modules
        missing_layers = branch.recording.missing_layers(modules)
        if len(missing_layers) == len(modules) or (missing_layers and self._preset is not None):  # a tool's map has every layer
            branch.recording.require_layers(self.denoiser, modules)
        number = branch.owners[picture]
        found = (
            branch.texts[number],
            branch.words[number],
            of_picture(branch.recording.entries, picture),
            branch.missing[number],
            self._tokens,
            Coverage(
                branch.recording.num_forwards,
                dict(drawing.left_out),
                tuple(missing_layers),
                branch.recording.partly_read(),
            ),
        )
        if self._preset == "daam":
            assert branch.recording.token_shares is not None
            return DaamMaps(*found, shares=branch.recording.token_shares[picture], side=daam_side(self.pipe, self.denoiser))
        return AmdMaps(*found) if self._preset == "amd" else Maps(*found)

    def clear(self) -> None:
        """Forgets what was recorded of the prompt, graphs included: a loop that takes a gradient at every step begins each so."""
        if self._drawing is not None:
            for branch in self._drawing.branches:
                branch.clear()

    def capture(
        self, word_weights: torch.Tensor, branch: slice = slice(None), fused: bool = False
    ) -> AbstractContextManager[Recording]:
        """Records the forwards of `denoiser` (not of a second one) with weights of one's own; see `DenoiserHooks.capture`."""
        return self._hooks[0].capture(word_weights, branch, fused)

    @property
    def _drawing(self) -> Drawing | None:
        """This thread's."""
        return self._state.drawing

    @_drawing.setter
    def _drawing(self, drawing: Drawing) -> None:
        self._state.drawing = drawing
        is_alone = self._author in (None, self._state.thread)
        self._latest, self._author = (drawing, self._state.thread) if is_alone else (None, _SEVERAL)

    @contextmanager
    def running(self, arguments: dict[str, Any]) -> Iterator[Drawing]:
        """The pipeline's own call, from its arguments to its end. Raises `CaptureError` where nothing could be read of it."""
        for hooks in self._hooks:
            hooks.require_readable()
        outer = self._drawing
        drawing = Drawing.of(arguments, self._words, whole=True)
        for branch, name in ((drawing.prompts, "prompt_embeds"), (drawing.negatives, "negative_prompt_embeds")):
            if isinstance(arguments.get(name), torch.Tensor):
                self._take_up(drawing, branch, arguments[name])
        self._drawing = drawing
        try:
            with ExitStack() as stack:
                for hooks in self._hooks:
                    if outer is None or not outer.whole or outer.is_closed:  # a loop of the user's may have been interrupted
                        hooks.unwind()
                    stack.enter_context(hooks.unwinding())
                drawing.texts = stack.enter_context(self._reader.reading())
                yield drawing
        finally:
            drawing.close()
            if outer is not None and outer.whole and not outer.is_closed:  # this call was made by a callback of another
                self._drawing = outer

    def _take_up(self, drawing: Drawing, branch: Branch, embeddings: torch.Tensor) -> None:
        """Embeddings [P, N, C] that a call was given: texts that were encoded before, if they all are."""
        known = [
            next((row for row in reversed(self._encoded) if row.is_of(embedding)), Row(embedding))
            for embedding in embeddings.detach()
        ]
        texts = [row.carried.text for row in known if row.carried is not None]
        if len(texts) == len(known):
            fresh = branch_of(branch.name, texts, self._words, branch.copies)
            branch.texts, branch.words = fresh.texts, fresh.words
            drawing.rows += known

    def begun(self) -> AbstractContextManager[Any]:
        """Around `encode_prompt`: inside the pipeline's call, or where a teacher encodes a caption, all is read already."""
        return nullcontext() if self._reader.is_reading else self._reader.reading()

    def finished(self, arguments: dict[str, Any], texts: Texts | None, output: Any) -> None:
        """`encode_prompt` ran: by a user it says what is drawn next; inside the pipeline's call its first run has the prompt."""
        drawing = self._drawing
        if texts is None:
            if drawing is not None and drawing.whole and not (drawing.is_closed or drawing.prompts.texts or drawing.rows):
                # A subclass's call that hands all its arguments on does not say which of them is the prompt.
                inner = Drawing.of(arguments, self._words, whole=True)
                drawing.arguments = {**arguments, **drawing.arguments}
                drawing.prompts, drawing.negatives = inner.prompts, inner.negatives
            return
        earlier, drawing = drawing, Drawing.of(arguments, self._words, whole=False)
        drawing.texts = texts
        if earlier is None or earlier.whole or earlier.has_recordings or any(drawing.prompts.words):
            self._drawing = drawing  # else the empty text of guidance was encoded after the prompt
        try:
            for embedding in _embeddings_in(output):
                row = drawing.row_of(embedding.detach())
                if row.carried is not None:
                    self._encoded.append(Row(row.embedding.cpu(), row.carried))
        except CaptureError as error:
            drawing.error = error
        drawing.texts, drawing.arguments = None, {}
        drawing.others.clear()

    def _open(self, inputs: Mapping[str, Any]) -> list[Wanted]:
        """Before a forward of the denoiser: where to record it, and which samples."""
        drawing = self._drawing
        if drawing is None or drawing.is_closed or drawing.error is not None:
            return []
        if drawing.is_suspended:
            drawing.left_out["inside a callback"] += 1
            return []
        if drawing.whole and _is_drawn_by_another(self.pipe):
            drawing.left_out["by another pipeline"] += 1
            return []
        if drawing.whole and any(hooks.is_running for hooks in self._hooks):
            drawing.left_out["inside another forward"] += 1
            return []
        if not drawing.whole:
            return self._wanted(drawing, inputs)
        try:
            return self._wanted(drawing, inputs)
        except Exception as error:  # whatever it is: nobody's picture is lost for its maps, which say so
            drawing.error = error
            self._say(error)
            return []

    def _wanted(self, drawing: Drawing, inputs: Mapping[str, Any]) -> list[Wanted]:
        embeddings, latents = inputs.get("encoder_hidden_states"), inputs.get("sample", inputs.get("hidden_states"))
        if not isinstance(embeddings, torch.Tensor) or embeddings.ndim != 3 or not isinstance(latents, torch.Tensor):
            raise CaptureError(
                f"{type(self.denoiser).__name__} got {type(embeddings).__name__} as text and {type(latents).__name__} as latents; "
                "lavender reads one text [N, C] for each sample of a batch"
            )
        scheduler = getattr(self.pipe, "scheduler", None)
        step = (
            _time_of(inputs.get("timestep"), len(embeddings)),
            getattr(scheduler, "_step_index", None),
            getattr(scheduler, "counter", None),
        )
        if drawing.whole:
            drawing.begin_step(step)
        rows = drawing.rows_of(embeddings)
        if len(rows) == 1:  # one text for all samples
            rows *= len(latents)
        if all(row.carried is None for row in rows):
            drawing.left_out["without the prompt"] += 1
            return []
        wanted: list[Wanted] = []
        for branch in drawing.branches:
            try:
                recording, samples = self._of_branch(drawing, branch, rows, latents, step)
            except Exception as error:  # see `_open`
                if not drawing.whole:
                    raise
                branch.error = error
                if branch is drawing.prompts:
                    self._say(error)
            else:
                wanted += [(recording, samples)] if recording is not None else []
        return wanted

    def _of_branch(
        self, drawing: Drawing, branch: Branch, rows: Sequence[Row], latents: torch.Tensor, step: tuple[Any, ...]
    ) -> tuple[Recording | None, list[int]]:
        """Where a forward is recorded for a branch, if it is, and its samples."""
        samples = [sample for sample, row in enumerate(rows) if set(row.texts) & set(branch.texts)]
        if not samples or branch.error is not None:
            return None, []
        if drawing.whole:  # else they are the user's own choice
            _require_one_time(step[0], samples, len(rows))
            samples = branch.pictures(rows, latents)
            if branch.is_further_pass(latents[samples], step, self._first_shows):
                drawing.left_out["further passes of a step"] += branch is drawing.prompts
                return None, []
            owners = [picture // branch.copies for picture in range(len(samples))]
        else:
            owners = [next(n for n, text in enumerate(branch.texts) if text in rows[sample].texts) for sample in samples]
        if branch.recording is None:
            branch.recording = self._recording(drawing, branch, owners, [rows[sample] for sample in samples])
            branch.owners = owners
        elif owners != branch.owners:
            raise CaptureError(
                f"the denoiser ran for the {branch.name}s {owners} of those that were encoded, and for {branch.owners} before; "
                "call clear() between the two"
            )
        return branch.recording, samples

    def _recording(self, drawing: Drawing, branch: Branch, owners: Sequence[int], rows: Sequence[Row]) -> Recording:
        """A recording of the samples that carry these texts."""
        weights = []
        for number, row in zip(owners, rows, strict=True):
            assert row.carried is not None
            carried = row.carried.as_text(branch.texts[number])
            own, branch.missing[number] = carried.weights(branch.words[number], self._tokens)
            weights.append(own)
        # Every sample's words, then the tokens that all have.
        num_tokens, num_words = len(self._tokens), max(1, max(len(own) for own in weights) - len(self._tokens))
        padded = torch.zeros(len(rows), num_words + num_tokens, weights[0].shape[1])
        for into, own in zip(padded, weights, strict=True):
            into[: len(own) - num_tokens] = own[: len(own) - num_tokens]
            into[num_words:] = own[len(own) - num_tokens :]
        if self._preset == "daam":
            tokens, shares = by_token(padded)
            return Recording(tokens, heads=True, steps=False, lenient=drawing.whole, token_shares=shares)
        return Recording(padded, heads=self._heads, steps=self._steps, lenient=drawing.whole)

    @property
    def _first_shows(self) -> bool:
        return any(kind.__name__ in _FIRST_SHOWS for kind in self._class.__mro__)

    def _after(self) -> None:
        """After the first forward that was recorded: what it did not record is said now, and the picture goes on."""
        drawing = self._drawing
        recording = None if drawing is None or not drawing.whole else drawing.prompts.recording
        if recording is not None and recording.num_forwards == 1:
            try:
                recording.require_layers(self.denoiser, self._hooks[0].modules)
            except CaptureError as error:
                self._say(error)

    def _say(self, error: Exception) -> None:
        # No Python warning: where these are errors, they would end the call.
        logger.warning("this picture's maps cannot be read, or not all: %s", first_line(error))


def _is_drawn_by_another(pipe: Any) -> bool:
    """Whether the call of another pipeline, inside the one of this, asks the denoiser: in a scheduler or a hook of the user's."""
    if torch.compiler.is_compiling():
        return False
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            caller = frame.f_locals.get("self")
            if caller is pipe:
                return False
            if isinstance(caller, DiffusionPipeline):
                return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _time_of(timestep: Any, size: int) -> Any:
    """A denoiser's timestep as a scalar, where all samples of the batch have the same."""
    if isinstance(timestep, torch.Tensor) and timestep.numel() == 1:
        return timestep.reshape(())
    if isinstance(timestep, torch.Tensor) and timestep.ndim and len(timestep) == size and (timestep == timestep[0]).all():
        return timestep[0]
    return timestep


def _require_one_time(timestep: Any, samples: Sequence[int], size: int) -> None:
    """Raises `CaptureError` where some samples of a batch are at several timesteps, as in sampling that is parallel in time."""
    are_apart = isinstance(timestep, torch.Tensor) and timestep.ndim > 0 and len(timestep) == size
    if are_apart and (timestep[list(samples)] != timestep[samples[0]]).any():
        raise CaptureError(
            "one batch of the denoiser holds a picture at several timesteps; record the forwards that you mean with "
            "patch.capture(word_weights)"
        )


def _embeddings_in(output: Any) -> Iterator[torch.Tensor]:
    """The embeddings [N, C] in what `encode_prompt` returned: of tensors [B, N, C], or of lists of them."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point() and output.ndim in (2, 3):
            yield from output if output.ndim == 3 else ()
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _embeddings_in(part)


def denoisers_of(pipe: Any) -> list[torch.nn.Module]:
    """What draws in a pipeline, below whatever wraps it. Raises `ModelError` if nothing does."""
    modules = [getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
    denoisers = [unwrapped(denoiser) for denoiser in modules if isinstance(denoiser, torch.nn.Module)]
    if not denoisers:
        parts = ", ".join(sorted(getattr(pipe, "components", {})))
        raise ModelError(
            f"cannot patch a {type(pipe).__name__}"
            + (f": none of its parts ({parts}) is a loaded unet or transformer. Load it, then patch the pipeline" if parts else "")
            + "; expected a transformers image-text-to-text model or a diffusers pipeline with its denoiser"
        )
    return denoisers


def patch_teacher(
    pipe: Any,
    layers: str | Sequence[str] = (),
    heads: bool = False,
    steps: bool = False,
    words: str | Sequence[str] = (),
    tokens: TokenName | Sequence[TokenName] = (),
    preset: Preset | None = None,
) -> TeacherPatch:
    """The handle of a diffusers pipeline; see `lavender.patch`."""
    layers, words = _names("layers", layers, (str,)), _names("words", words, (str,))
    tokens = _names("tokens", tokens, (str, int))
    for name, value in (("heads", heads), ("steps", steps)):
        if not isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}; expected True or False")
    require_preset(preset, heads, steps, denoisers_of(pipe)[0])  # what is no pipeline is named, too
    with turn_of(pipe):
        present: TeacherPatch | None = vars(type(pipe)).get("_lavender_patch")
        if present is not None and present.pipe is not pipe:  # it was made by the class that a patched pipeline has
            pipe.__class__, present = present._class, None
        if present is not None:
            if present.settings == (layers, heads, steps, words, tokens, preset):
                return present.borrowed()
            if present.is_used_elsewhere:
                raise CaptureError(
                    "another thread uses this pipeline's patch, with other settings; give the same, or wait until it has finished"
                )
            present.unpatch()
        return TeacherPatch(pipe, layers, heads, steps, words, tokens, preset)


def _names(name: str, value: Any, kinds: tuple[type, ...]) -> tuple[Any, ...]:
    names = (value,) if isinstance(value, kinds) else value
    if not isinstance(names, Sequence) or not all(isinstance(each, kinds) and not isinstance(each, bool) for each in names):
        raise ConfigError(
            f"{name} is {value!r}; expected a text or a list of texts" + (", or numbers of columns" if int in kinds else "")
        )
    return tuple(names)
