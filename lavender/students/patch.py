"""The patch of a transformers model: it reads word rows from its attention.

A hook before each decoder layer adds a request to the layer's keyword arguments; it travels to the attention function, where
`registry` answers it. So outputs are bit-identical, vision towers are untouched, and no state is kept between forwards.
"""

from __future__ import annotations

import inspect
import logging
import re
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import AlignmentConfig, Rows
from ..errors import CaptureError, ModelError
from ..handle import Handle, PerThread
from ..images import ImageSource
from ..maps import LayerMaps, Maps
from ..types import WordBatch
from .aligner import Alignment
from .capture import Forward
from .channels import channels_of, require_chosen, require_places, tapped_layers
from .discovery import attention_modules, base_model_of, is_cross, layers_around, text_tower
from .families import known_family
from .guards import (
    StepWatch,
    require_gradient,
    require_no_reentrant_checkpointing,
    require_whole_sequences,
    tokens_before_text,
    watch_term,
)
from .lambda_schedule import has_ended
from .look import ask
from .loss import Comparison, add_to_loss, compare
from .reading import read_words
from .registry import REQUEST, Tap, require_supported
from .resamplers import Resamplers

logger = logging.getLogger("lavender")

ALIGNER_FILE = "aligner.safetensors"
"""Where `save_pretrained` of a model in training leaves its aligner."""


@dataclass(eq=False)
class _Call:
    """What `capture` or `align` wants of the forward that it runs, and what it got: maps, or aligned maps."""

    wanted: Literal["maps", "aligned"]
    config: AlignmentConfig
    result: torch.Tensor | None = None


class StudentPatch(Handle):
    """A patched vision-language model: what `lavender.patch(model)` returns for transformers models.

    Forwards whose batch carries the keys of `lavender.Collator` are captured; every other forward is what it was. Usable as a
    context manager. Threads may share a patch: `look`, `capture` and `align` wait for each other; a thread has its own `maps`.

    Attributes:
        model: the patched model, below any PEFT wrapper.
        entry: what `capture`, `align` and `look` call: the PEFT wrapper that was patched, or else the model.
        config: what is captured and, in training, compared.
        processor: the model's processor, if it was given.
        trains: whether the model was prepared for training.
        num_layers: L, the number of captured layers: those that the words of some role need, the answer's first.
        crosses: whether the text reads the picture by cross-attention.
        family: what places the model's image tokens; None where the family is unknown, and maps have no grid.
        decoder: the text tower.
        progress: how far the training is, 0 to 1, for a lambda that falls; `lavender.LavenderCallback` sets it.
        last: what the latest forward with targets compared; None before the first.
        term: what that forward added to the loss, with its graph: for a loss of your own, made without the model's. None before the
            first.
    """

    def __init__(self, model: Any, config: AlignmentConfig, train: bool, processor: Any = None) -> None:
        if train and model.config.is_encoder_decoder:
            raise ModelError(
                f"{type(model).__name__} is an encoder-decoder; lavender trains decoder-only models, and captures both"
            )
        self.model = model
        self.processor = processor
        self.config = config
        self.trains = train
        self.progress: float | None = None
        self.last: Comparison | None = None
        self.term: torch.Tensor | None = None
        self.decoder = text_tower(model)
        self._attention_name: str = self.decoder.config._attn_implementation
        require_supported(self._attention_name)
        self.family = known_family(model.config.model_type)
        resamplers = self.family.resamplers if self.family is not None else None
        self._resamplers = Resamplers(resamplers(model)) if resamplers is not None else None
        every = attention_modules(self.decoder)
        num_heads = getattr(self.decoder.config, "num_attention_heads", 0)
        require_chosen(config)
        require_places(config, len(every), num_heads)
        chosen = [every[i] for i in tapped_layers(config, len(every))]
        self._layers = {module: place for place, module in enumerate(chosen)}
        names = {module: name for name, module in self.decoder.named_modules()}
        self.crosses = any(is_cross(names[module], module) for module in chosen)
        self.num_layers = len(chosen)
        self._channels = channels_of(config, self.num_layers, num_heads) if train else None
        if config.aggregation == "parallel" and self.crosses:
            raise ModelError(
                f"{type(model).__name__} reads the picture by cross-attention, and has no need of aggregation='parallel'; choose "
                "another one"
            )
        self._forwards: PerThread[Forward | None] = PerThread()
        self._calls: PerThread[_Call] = PerThread()
        self._maps = threading.local()
        self._queue = threading.RLock()
        self._steps: StepWatch | None = None
        self._steps_seen = False
        self._warned = False
        # What `capture` and `look` call: PEFT's wrapper, if it is known, may put virtual tokens before the text.
        self.entry = model
        self._handles: list[Any] = []
        self._adapters: list[Any] = []
        self._attach(train)

    def _attach(self, train: bool) -> None:
        self._hold_tap()
        if train:
            text = self.decoder.config
            alignment = Alignment(self.config, self.num_layers, text.num_attention_heads, text.hidden_size)
            self.model.add_module("lavender", alignment.to(_device_of(self.decoder)))
            self._handles.append(self.decoder.register_forward_hook(self._after_decoder))
            self.model.save_pretrained = partial(_save_pretrained, self.model)
        if hasattr(self.model, "generate"):
            self.model.generate = partial(_generate, self.model)
        self._outer: dict[nn.Module, int] = {}
        for layer in layers_around(self.decoder, self._layers):
            self._outer[layer] = min(self._layers[module] for module in layer.modules() if module in self._layers)
            self._handles.append(layer.register_forward_pre_hook(self._before_layer, with_kwargs=True))
        if self._attention_name == "eager":
            for module in self._layers:
                self._handles.append(module.register_forward_hook(_after_eager_attention, with_kwargs=True))
        if self._resamplers is not None:
            self._handles.extend(self._resamplers.attach())
        self._handles.append(self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True))
        self.model._lavender_patch = self

    def _hold_tap(self) -> None:
        names = {self._attention_name, *(self._resamplers.names if self._resamplers is not None else ())}
        Tap.acquire(names)
        # A model that is dropped without unpatch() lets go of the registry as well.
        self._release_tap = weakref.finalize(self, Tap.release, names)

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key not in ("_release_tap", "_queue", "_maps")}
        return state | {"term": None, "_steps": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The patch of a copied model is one more user of the tap."""
        self.__dict__.update(state)
        self._queue, self._maps = threading.RLock(), threading.local()
        if self._handles:
            self._hold_tap()

    @property
    def is_patched(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    def unpatch(self) -> None:
        """Takes everything away again, the aligner included. A second call does nothing."""
        with self._queue:  # what other threads look at ends first
            self._undo()

    def _undo(self) -> None:
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._release_tap()
        for name in ("generate", "save_pretrained"):
            vars(self.model).pop(name, None)
        if hasattr(self.model, "lavender"):
            del self.model.lavender
            # An adapter that PEFT saves from here on must not name what is gone.
            for config in [*getattr(self.model, "peft_config", {}).values(), *self._adapters]:
                kept = [name for name in getattr(config, "modules_to_save", None) or () if name != "lavender"]
                config.modules_to_save = kept or None
        del self.model._lavender_patch

    def save_with_adapter(self) -> None:
        """Makes PEFT train and save the aligner beside an adapter that the model has already.

        Raises `ModelError` where it would not.
        """
        adapters = getattr(self.entry, "peft_config", None)
        if not adapters:
            return
        if self.entry is self.model:
            raise ModelError(
                "the model holds an adapter already, and the adapter's folder would lack the aligner; pass the PeftModel to "
                "lavender.patch, or patch before get_peft_model or add_adapter with modules_to_save=['lavender']"
            )
        from peft.utils import ModulesToSaveWrapper

        active = self.entry.active_adapters
        if any("lavender" in (getattr(adapters[name], "modules_to_save", None) or ()) for name in active):
            raise ModelError(
                "the adapter names an aligner in its modules_to_save, and was made or loaded before the model had one: its "
                "weights are not in place; patch the model before get_peft_model or PeftModel.from_pretrained"
            )
        if len(active) != 1 or not hasattr(adapters[active[0]], "modules_to_save"):
            kinds = ", ".join(f"{name!r} ({adapters[name].peft_type.value})" for name in active) or "none"
            raise ModelError(
                f"the active adapters are {kinds}, beside which PEFT saves no aligner; expected one that has modules_to_save, "
                "such as LoRA. Give one, or an AlignmentConfig without weights: aligner='identity'"
            )
        self.model.lavender = ModulesToSaveWrapper(self.model.lavender, active[0])
        self.model.lavender.set_adapter(active[0])
        adapter = adapters[active[0]]
        adapter.modules_to_save = [*(adapter.modules_to_save or ()), "lavender"]
        self._adapters.append(adapter)

    def capture(self, rows: Rows | None = None, **batch: Any) -> torch.Tensor:
        """One forward over a batch of `lavender.Collator`; gradients flow if autograd is on.

        Args:
            rows: which rows of the attention speak for a word, in place of the config's choice for each role.
            batch: the batch.

        Returns:
            Raw maps [B, L, H, W, y, x]: the attention from each word's rows to the picture, on the grid of the image tokens;
            without `lavender_boxes` in the batch, [B, L, H, W, M], one value for each of `lavender_columns`. A word that is read
            by `both` rows has the mean of its two maps. All heads are there, whichever the config aligns.

        Raises:
            CaptureError: the batch carries no lavender keys, or a layer did not record.
        """
        config = self.config if rows is None else replace(self.config, rows=rows, question_rows=None)
        return self._forward("maps", config, batch)

    def align(self, **batch: Any) -> torch.Tensor:
        """One forward over a batch of `lavender.Collator`: the aligner's maps [B, W, y, x], not normalized.

        A word that is read by `both` rows has the mean of its two maps.

        Raises:
            CaptureError: the model was patched without a config, so that it has no aligner; or as `capture`.
        """
        if not self.trains:
            raise CaptureError("the model has no aligner; patch it with a config: lavender.patch(model, AlignmentConfig(...))")
        return self._forward("aligned", self.config, batch)

    def _forward(self, wanted: Literal["maps", "aligned"], config: AlignmentConfig, batch: dict[str, Any]) -> torch.Tensor:
        if not self.is_patched:
            raise CaptureError("the patch was undone; call lavender.patch(model) again")
        unused = {WordBatch.KEYS["targets"], WordBatch.KEYS["outcomes"], "labels"}
        inputs, words = WordBatch.split({key: value for key, value in batch.items() if key not in unused})
        if words is None:
            raise CaptureError("the batch carries no lavender keys; make it with lavender.Collator")
        call = _Call(wanted, config)
        with self._queue:
            self._calls.put(call)
            try:
                self.entry(**inputs, **words.to_batch(), use_cache=False)
            finally:
                self._calls.take()
                self._forwards.take()  # where an interrupt kept the hook from it
        if call.result is None:
            raise CaptureError("the forward recorded nothing: another forward of the model ran within it, or it was unpatched")
        return call.result

    @property
    def maps(self) -> Maps:
        """Heat maps of the words of the answer that `look` gave last in this thread. Raises `CaptureError` before the first."""
        latest: Maps | None = getattr(self._maps, "latest", None)
        if latest is None:
            raise CaptureError("nothing was recorded: let the model look at a picture first, patch.look(image, question)")
        return latest

    def look(
        self,
        image: ImageSource,
        question: str | None = None,
        answer: str | None = None,
        *,
        prompt: str | None = None,
        words: tuple[str, ...] = (),
        **options: Any,
    ) -> Maps:
        """Lets the model answer a question about a picture, and maps the attention of each word of the answer.

        The model generates as without lavender; then one forward over prompt and answer is captured, without gradient.

        Args:
            image: a path, encoded bytes or a PIL image; read upright, as the Collator reads it.
            question: what the user asks, put into the processor's chat template; "Describe the picture." by default.
            answer: a text to read in place of the model's own answer.
            prompt: the whole prompt as the processor takes it, placeholder included, in place of `question` and template.
            words: words to map beside those between spaces: parts of a Chinese or Thai run, which has no spaces.
            options: arguments of `model.generate`, such as `max_new_tokens`.

        Returns:
            The answer's heat maps, heads kept apart, on the grid of the model's image tokens; `patch.maps` gives them again.

        Raises:
            ConfigError: the patch has no processor, or the processor no chat template and there is no `prompt`.
            ModelError: the model's family, and so the places of its image tokens, is unknown.
            CaptureError: the answer has no words.
        """
        if not self.is_patched:
            raise CaptureError("the patch was undone; call lavender.patch(model, processor=processor) again")
        self._maps.latest = None
        # Models keep what they know of a prompt's positions from one decoding step to the next.
        with self._queue:
            reply = ask(self.entry, self.processor, image, question, answer, prompt, words, options)
            with torch.no_grad():
                maps = self.capture(**reply.batch)[0]
        if not maps.any():
            raise CaptureError("no word of the answer sees the picture; does the picture come before the text in the prompt?")
        layers = [LayerMaps(name, values) for name, values in zip(self.layer_names(), maps, strict=True)]
        self._maps.latest = Maps(reply.text, reply.words, layers)
        return self.maps

    def layer_names(self) -> list[str]:
        """Dotted names of the captured attention modules in the text tower, in order."""
        names = {module: name for name, module in self.decoder.named_modules()}
        return [names[module] for module in self._layers]

    @property
    def _active(self) -> Forward | None:
        return self._forwards.get()

    @torch.compiler.disable
    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        call = self._calls.get()
        # Every forward is at work from here on, captured or not: no thread's takes another's request.
        self._forwards.put(None)
        if self._resamplers is not None:
            self._resamplers.start(listening=False)
        kwargs, words = WordBatch.split(kwargs)
        trains = self.trains and torch.is_grad_enabled() and call is None
        if trains and module.training and (words is None or words.targets is None):
            self._warn_of_no_targets(words is not None)
        if words is None:
            return args, kwargs
        require_whole_sequences(module, kwargs)
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        inputs = _flat({**dict(zip(names, args, strict=False)), **kwargs})
        length = _text_length(self.model, inputs)
        if trains:
            self.term = None
            if self._steps is not None:
                self._steps_seen = self._steps.require_steps()
                self._steps = None
        config = self.config if call is None else call.config
        channels = self._channels if call is None or call.wanted != "maps" else None
        ended = trains and words.targets is not None and has_ended(config, self.progress) and not self._has_weights
        reading = None if ended else read_words(words, config, apart=channels is not None)
        resamplers = self._resamplers if words.boxes is not None and reading is not None else None
        forward = Forward(
            words,
            reading,
            inputs,
            config,
            self._layers,
            crosses=self.crosses,
            channels=channels,
            length=length,
            resamplers=resamplers,
            before=0
            if reading is None
            else tokens_before_text(self.model, words, inputs, length, crosses=self.crosses, reads=reading.own),
            device=_device_of(self.model.lavender) if self.trains and _is_spread(self.model) else None,
        )
        if resamplers is not None:
            resamplers.start(listening=True)
        self._forwards.put(forward)
        return args, kwargs

    def _warn_of_no_targets(self, has_words: bool) -> None:
        """Once, and not where other batches are aligned."""
        if self._warned or self.last is not None:
            return
        self._warned = True
        missing = WordBatch.KEYS["targets"] if has_words else "lavender's keys"
        logger.warning(
            "a batch without %s trains the language model alone: no alignment is added. Make batches with "
            "lavender.Collator(processor, targets), pass all of a batch to the model, and set remove_unused_columns=False in a "
            "Trainer's arguments",
            missing,
        )

    def _before_layer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        forward = self._forwards.get_at_work()
        if forward is None:
            if WordBatch.KEYS["tokens"] in kwargs:
                raise CaptureError(
                    f"a batch with lavender's keys went around the patched {type(self.model).__name__}, whose loss the alignment "
                    "is added to; call the model itself, not its forward or a part of it, or leave lavender's keys out"
                )
            return None
        if forward.reading is None:
            return None
        if forward.request is None:
            forward.record_hidden(self._outer[module], args[0] if args else kwargs["hidden_states"])
            return None
        return args, {**kwargs, REQUEST: forward.request}

    def _after_decoder(self, module: nn.Module, args: tuple, output: Any) -> None:
        forward = self._forwards.get_at_work()
        if forward is not None and isinstance(output[0], torch.Tensor) and output[0].requires_grad:
            forward.tower_output = output[0]

    @torch.compiler.disable
    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        call, forward = self._calls.get(), self._forwards.take()
        shares = {} if self._resamplers is None else self._resamplers.stop()
        if forward is None or output is None:  # no request, or the forward raised
            return None
        forward.shares = shares
        if forward.request is not None and (call is not None or forward.words.targets is not None):
            require_no_reentrant_checkpointing(forward.request.lost_gradient)
        if call is not None and call.wanted == "maps":
            call.result = forward.place(forward.attention())
            return None
        reading = forward.reading
        source = None if reading is None else forward.source()
        if call is not None and reading is not None:
            aligned = self.model.lavender(source, forward.place, questions=reading.questions)[1]
            call.result = reading.by_word(aligned)
        if forward.words.targets is None or not self.trains:
            return None
        if source is not None:
            require_gradient(self.model, self.decoder, source)
        self.last, term = compare(self.model, forward, source, self.progress, output)
        if torch.is_grad_enabled():
            self.term = term
        if torch.is_grad_enabled() and term.requires_grad:
            # Of a frozen text tower no loss carries a gradient but by what comes after it.
            reached = forward.tower_output if forward.tower_output is not None else getattr(output, "logits", None)
            if reached is not None and reached.requires_grad:
                watch_term(term, reached, self._after_backward)
        return add_to_loss(output, term, self.last.tokens)

    @property
    def _has_weights(self) -> bool:
        """Whether the aligner has any, which engines want to be used in every step."""
        return any(True for _ in self.model.lavender.parameters())

    def _after_backward(self) -> None:
        if not self._steps_seen:
            self._steps = StepWatch(self.model)


def patch_student(model: nn.Module, config: AlignmentConfig | None, processor: Any = None) -> StudentPatch:
    """The handle of a transformers model; see `lavender.patch`."""
    with Handle._lock:  # of threads that patch one model at once, the others get the first one's handle
        return _patch_student(model, config, processor)


def _patch_student(model: Any, config: AlignmentConfig | None, processor: Any) -> StudentPatch:
    base = base_model_of(model)
    entry = getattr(model, "_orig_mod", model)
    present: StudentPatch | None = getattr(base, "_lavender_patch", None)
    if present is not None:
        if config is None or (present.trains and config == present.config):
            present.processor = processor or present.processor
            present.entry = entry if entry is not base else present.entry
            return present.borrowed()
        if present.trains:
            raise ModelError(
                "the model is patched for training with another AlignmentConfig; its aligner would be lost. Call unpatch() on the "
                "first patch if that is meant"
            )
        present.unpatch()
    if getattr(getattr(base, "config", None), "model_type", None) is None:
        raise ModelError(f"cannot patch a {type(base).__name__}; expected a transformers image-text-to-text model")
    # Who looks, looks at all layers, whatever is best to align.
    everything = AlignmentConfig(layers=(), heads="mean")
    handle = StudentPatch(base, config or everything, train=config is not None, processor=processor)
    handle.entry = entry
    try:
        if config is not None and any(True for _ in base.lavender.parameters()):
            handle.save_with_adapter()
    except ModelError:
        handle.unpatch()
        raise
    folder = Path(str(getattr(base.config, "_name_or_path", "")))
    if config is not None and (folder / ALIGNER_FILE).is_file():
        logger.warning("the aligner is a new one; lavender.training.train.load_aligner puts back the one in %s", folder)
    return handle


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's `generate`, which takes batches of `lavender.Collator` as well: their labels and lavender's keys are left out."""
    inputs, words = WordBatch.split(kwargs)
    if words is not None:
        inputs.pop("labels", None)
    return type(model).generate(model, *args, **inputs)


def _save_pretrained(model: Any, save_directory: Any, *args: Any, state_dict: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """The model's `save_pretrained`, with the aligner in a file of its own: the folder is plain transformers'.

    A Trainer's checkpoint keeps the aligner among the model's weights, and all of them under their own names: the Trainer loads it
    without renaming (transformers issue 43701).
    """
    if is_checkpoint(save_directory):
        kwargs.setdefault("save_original_format", False)
        return type(model).save_pretrained(model, save_directory, *args, state_dict=state_dict, **kwargs)
    weights = model.state_dict() if state_dict is None else state_dict
    aligner = {name.removeprefix("lavender."): value for name, value in weights.items() if name.startswith("lavender.")}
    if hasattr(model.lavender, "modules_to_save"):  # beside an adapter, which has it already
        aligner = {}
    ignored = model._keys_to_ignore_on_save
    model._keys_to_ignore_on_save = {*(ignored or ()), *(f"lavender.{name}" for name in aligner)}
    try:
        result = type(model).save_pretrained(model, save_directory, *args, state_dict=state_dict, **kwargs)
    finally:
        model._keys_to_ignore_on_save = ignored
    if aligner and kwargs.get("is_main_process", True):
        save_file({name: value.contiguous() for name, value in aligner.items()}, Path(save_directory) / ALIGNER_FILE)
    return result


def is_checkpoint(folder: Any) -> bool:
    """Whether a folder is called as a Trainer calls its checkpoints."""
    return re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(folder).name) is not None


def _device_of(module: nn.Module) -> torch.device:
    """Where a module computes: accelerate leaves weights that it offloads on the device `meta`."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))


def _is_spread(model: Any) -> bool:
    """Whether `device_map` put the model on several devices."""
    return len({str(device) for device in getattr(model, "hf_device_map", {}).values()}) > 1


def _flat(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments and those in its mappings, side by side."""
    inner = [value for value in kwargs.values() if isinstance(value, Mapping)]
    return {key: value for mapping in (*inner, kwargs) for key, value in mapping.items()}


def _text_length(model: Any, kwargs: dict[str, Any]) -> int:
    """T, the length of what the decoder reads: of an encoder-decoder, the answer's alone."""
    names: tuple[str, ...] = ("input_ids", "inputs_embeds")
    if model.config.is_encoder_decoder:
        names = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
    for name in names:
        if kwargs.get(name) is not None:
            length: int = kwargs[name].shape[1]
            return length
    raise CaptureError(f"a captured forward needs {names[0]}; it got none")


def _after_eager_attention(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    request = kwargs.get(REQUEST)
    if request is not None:
        request.record_weights(module, output[1])
