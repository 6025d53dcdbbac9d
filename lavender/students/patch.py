"""The patch of a transformers model: it reads word rows from its attention.

A hook before each decoder layer adds a request to the layer's keyword arguments; it travels to the attention function, where
`registry` answers it. So outputs are bit-identical, vision towers are untouched, and no state is kept between forwards.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from ..config import AlignmentConfig, Rows
from ..errors import CaptureError, ModelError
from ..handle import Handle
from ..images import ImageSource
from ..maps import LayerMaps, Maps
from ..types import WordBatch
from .aligner import Alignment
from .capture import Forward
from .discovery import attention_modules, base_model_of, is_cross, layers_around, text_tower
from .families import known_family
from .look import ask
from .loss import Comparison, add_to_loss, compare, require_gradient, require_image_tokens, require_whole_sequences
from .registry import REQUEST, Tap, require_supported
from .resamplers import Resamplers


class StudentPatch(Handle):
    """A patched vision-language model: what `lavender.patch(model)` returns for transformers models.

    Forwards whose batch carries the keys of `lavender.Collator` are captured; every other forward is what it was. Usable as a
    context manager. One patch serves one thread.

    Attributes:
        model: the patched model, below any PEFT wrapper.
        config: what is captured and, in training, compared.
        processor: the model's processor, if it was given.
        trains: whether the model was prepared for training.
        num_layers: L, the number of captured layers.
        crosses: whether the text reads the picture by cross-attention.
        family: what places the model's image tokens; None where the family is unknown, and maps have no grid.
        decoder: the text tower.
        progress: how far the training is, 0 to 1, for a lambda that falls; `lavender.LavenderCallback` sets it.
        last: what the latest forward with targets compared; None before the first.
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
        self.decoder = text_tower(model)
        self._attention_name: str = self.decoder.config._attn_implementation
        require_supported(self._attention_name)
        self.family = known_family(model.config.model_type)
        resamplers = self.family.resamplers if self.family is not None else None
        self._resamplers = Resamplers(resamplers(model)) if resamplers is not None else None
        every = attention_modules(self.decoder)
        _require_layers(config.layers, every)
        chosen = [every[i] for i in config.layers] if config.layers else every
        self._layers = {module: place for place, module in enumerate(chosen)}
        names = {module: name for name, module in self.decoder.named_modules()}
        self.crosses = any(is_cross(names[module], module) for module in chosen)
        self.num_layers = len(chosen)
        if config.aggregation == "parallel" and self.crosses:
            raise ModelError(
                f"{type(model).__name__} reads the picture by cross-attention, and has no need of aggregation='parallel'; choose "
                "another one"
            )
        self._active: Forward | None = None
        # What `capture` or `align` wants of the forward that they run, and what it gave.
        self._wanted: Literal["maps", "aligned"] | None = None
        self._result: torch.Tensor | None = None
        self._rows: Rows | None = None
        self._checked_batch = False
        self._maps: Maps | None = None
        self._handles: list[Any] = []
        self._attach(train)

    def _attach(self, train: bool) -> None:
        if train:
            text = self.decoder.config
            alignment = Alignment(self.config, self.num_layers, text.num_attention_heads, text.hidden_size)
            self.model.add_module("lavender", alignment.to(next(self.decoder.parameters()).device))
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
        self._hold_tap()
        self.model._lavender_patch = self

    def _hold_tap(self) -> None:
        names = {self._attention_name, *(self._resamplers.names if self._resamplers is not None else ())}
        Tap.acquire(names)
        # A model that is dropped without unpatch() lets go of the registry as well.
        self._release_tap = weakref.finalize(self, Tap.release, names)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_release_tap"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The patch of a copied model is one more user of the tap."""
        self.__dict__.update(state)
        if self._handles:
            self._hold_tap()

    @property
    def is_patched(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    def unpatch(self) -> None:
        """Takes everything away again, the aligner included. A second call does nothing."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._release_tap()
        if hasattr(self.model, "lavender"):
            del self.model.lavender
            # An adapter that PEFT saves from here on must not name what is gone.
            for config in getattr(self.model, "peft_config", {}).values():
                kept = [name for name in getattr(config, "modules_to_save", None) or () if name != "lavender"]
                config.modules_to_save = kept or None
        del self.model._lavender_patch

    def capture(self, rows: Rows | None = None, **batch: Any) -> torch.Tensor:
        """One forward over a batch of `lavender.Collator`; gradients flow if autograd is on.

        Args:
            rows: which row of the attention speaks for a token, in place of the config's choice.
            batch: the batch.

        Returns:
            Raw maps [B, L, H, W, y, x]: the attention from each word's rows to the picture, on the grid of the image tokens;
            without `lavender_boxes` in the batch, [B, L, H, W, M], one value for each of `lavender_columns`.

        Raises:
            CaptureError: the batch carries no lavender keys, or a layer did not record.
        """
        return self._forward("maps", rows, batch)

    def align(self, **batch: Any) -> torch.Tensor:
        """One forward over a batch of `lavender.Collator`: the aligner's maps [B, W, y, x], not normalized.

        Raises:
            CaptureError: the model was patched without a config, so that it has no aligner; or as `capture`.
        """
        if not self.trains:
            raise CaptureError("the model has no aligner; patch it with a config: lavender.patch(model, AlignmentConfig(...))")
        return self._forward("aligned", None, batch)

    def _forward(self, wanted: Literal["maps", "aligned"], rows: Rows | None, batch: dict[str, Any]) -> torch.Tensor:
        if not self.is_patched:
            raise CaptureError("the patch was undone; call lavender.patch(model) again")
        unused = {WordBatch.KEYS["targets"], WordBatch.KEYS["outcomes"], "labels"}
        inputs, words = WordBatch.split({key: value for key, value in batch.items() if key not in unused})
        if words is None:
            raise CaptureError("the batch carries no lavender keys; make it with lavender.Collator")
        self._wanted, self._rows = wanted, rows
        try:
            self.model(**inputs, **words.to_batch(), use_cache=False)
            assert self._result is not None
            return self._result
        finally:
            self._wanted, self._rows, self._result = None, None, None

    @property
    def maps(self) -> Maps:
        """Heat maps of the words of the answer that `look` gave last. Raises `CaptureError` before the first."""
        if self._maps is None:
            raise CaptureError("nothing was recorded: let the model look at a picture first, patch.look(image, question)")
        return self._maps

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
        self._maps = None
        reply = ask(self.model, self.processor, image, question, answer, prompt, words, options)
        with torch.no_grad():
            maps = self.capture(**reply.batch)[0]
        if not maps.any():
            raise CaptureError("no word of the answer sees the picture; does the picture come before the text in the prompt?")
        layers = [LayerMaps(name, values) for name, values in zip(self.layer_names(), maps, strict=True)]
        self._maps = Maps(reply.text, reply.words, layers)
        return self._maps

    def layer_names(self) -> list[str]:
        """Dotted names of the captured attention modules in the text tower, in order."""
        names = {module: name for name, module in self.decoder.named_modules()}
        return [names[module] for module in self._layers]

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        self._active = None
        kwargs, words = WordBatch.split(kwargs)
        if words is None:
            return args, kwargs
        require_whole_sequences(module, kwargs)
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        inputs = _flat({**dict(zip(names, args, strict=False)), **kwargs})
        if words.targets is not None and not self._checked_batch:
            if not self.crosses:
                require_image_tokens(self.model, words.image_positions, inputs.get("input_ids"))
            self._checked_batch = True
        resamplers = self._resamplers if words.boxes is not None else None
        active = Forward(
            words,
            inputs,
            self.config if self._rows is None else replace(self.config, rows=self._rows),
            self._layers,
            crosses=self.crosses,
            aligns=self.trains and self._wanted != "maps",
            length=_text_length(self.model, inputs),
            resamplers=resamplers,
        )
        if resamplers is not None:
            resamplers.start()
        self._active = active
        return args, kwargs

    def _before_layer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if self._active is None:
            return None
        if self._active.request is None:
            self._active.record_hidden(self._outer[module], args[0] if args else kwargs["hidden_states"])
            return None
        return args, {**kwargs, REQUEST: self._active.request}

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        active, self._active = self._active, None
        if self._resamplers is not None:
            self._resamplers.listening = False
        if active is None or output is None:  # no request, or the forward raised
            return None
        if self._wanted == "maps":
            self._result = active.place(active.attention())
            return None
        source = active.source()
        if self._wanted == "aligned":
            self._result = self.model.lavender(source, active.place)[1]
        if active.words.targets is None or not self.trains:
            return None
        require_gradient(self.model, self.decoder, source)
        self.last, term = compare(self.model, active, source, self.progress, output)
        return add_to_loss(output, term)


def patch_student(model: nn.Module, config: AlignmentConfig | None, processor: Any = None) -> StudentPatch:
    """The handle of a transformers model; see `lavender.patch`."""
    base = base_model_of(model)
    present: StudentPatch | None = getattr(base, "_lavender_patch", None)
    if present is not None:
        if config is None or (present.trains and config == present.config):
            present.processor = processor or present.processor
            return present.borrowed()
        if present.trains:
            raise ModelError(
                "the model is patched for training with another AlignmentConfig; its aligner would be lost. Call unpatch() on the "
                "first patch if that is meant"
            )
        present.unpatch()
    if getattr(getattr(base, "config", None), "model_type", None) is None:
        raise ModelError(f"cannot patch a {type(base).__name__}; expected a transformers image-text-to-text model")
    return StudentPatch(base, config or AlignmentConfig(), train=config is not None, processor=processor)


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


def _require_layers(layers: tuple[int, ...], modules: list[nn.Module]) -> None:
    beyond = [layer for layer in layers if layer >= len(modules)]
    if beyond:
        raise ModelError(f"layers {beyond} were asked for; the model has attention layers 0 to {len(modules) - 1}")
