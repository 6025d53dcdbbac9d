"""Reading word rows from a transformers model: the patch that asks its attention to listen.

A hook before each decoder layer adds a request to the layer's keyword arguments; it travels to the attention function, where
`registry` answers it. So outputs are bit-identical, vision towers are untouched, and nothing is remembered between forwards.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import nn

from ..boxes import lattice_of, rasterize
from ..config import AlignmentConfig, Rows
from ..errors import CaptureError, ModelError
from ..families import known_family
from ..images import ImageSource
from ..maps import Maps
from ..types import WordRows
from .discovery import attention_modules, is_cross, layers_around, text_tower
from .handle import Handle
from .looking import look
from .registry import REQUEST, Request, Tap, require_supported
from .resamplers import Resamplers

KEYS = (
    "lavender_tokens",
    "lavender_token_words",
    "lavender_token_weights",
    "lavender_columns",
    "lavender_boxes",
    "lavender_present",
    "lavender_targets",
)
"""What `lavender.Collator` adds to a batch; the last one only in training. See its docstring for shapes."""


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
        family: what places the model's image tokens; None where nobody knows, and maps have no grid.
        term: the unweighted alignment loss of the latest training forward, detached; None before the first.
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
        self.term: torch.Tensor | None = None
        self._decoder = text_tower(model)
        self._attention_name = _attention_name(self._decoder)
        self.family = known_family(model.config.model_type)
        resamplers = self.family.resamplers if self.family is not None else None
        self._resamplers = Resamplers(resamplers(model)) if resamplers is not None else None
        every = attention_modules(self._decoder)
        _require_layers(config.layers, every)
        chosen = [every[i] for i in config.layers] if config.layers else every
        self._layers = {module: place for place, module in enumerate(chosen)}
        names = {module: name for name, module in self._decoder.named_modules()}
        self.crosses = any(is_cross(names[module], module) for module in chosen)
        self.num_layers = len(chosen)
        self._active: _Forward | None = None
        self._captured: list[torch.Tensor] | None = None
        self._rows: Rows | None = None
        self._maps: Maps | None = None
        self._handles: list[Any] = []
        self._attach(train)

    def _attach(self, train: bool) -> None:
        if train:
            from ..aligner import Alignment

            reference = next(self._decoder.parameters())
            alignment = Alignment(self.config, self._decoder.config.num_attention_heads)
            self.model.add_module("lavender", alignment.to(reference.device))
        for layer in layers_around(self._decoder, self._layers):
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
        if not self.is_patched:
            raise CaptureError("the patch was undone; call lavender.patch(model) again")
        if "lavender_tokens" not in batch:
            raise CaptureError("the batch carries no lavender keys; make it with lavender.Collator")
        wanted = {k: v for k, v in batch.items() if k not in ("lavender_targets", "labels")}
        self._captured, self._rows = [], rows
        try:
            self.model(**wanted, use_cache=False)
            (maps,) = self._captured
            return maps
        finally:
            self._captured = self._rows = None

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
        """Lets the model answer a question about a picture, and reads where each word of the answer looked.

        The model generates undisturbed; then one forward over prompt and answer is captured, without gradient.

        Args:
            image: a path, encoded bytes or a PIL image; read upright, as the Collator reads it.
            question: what the user asks, put into the processor's chat template; "Describe the picture." by default.
            answer: a text to read in place of the model's own answer.
            prompt: the whole prompt as the processor takes it, placeholder included, in place of `question` and template.
            words: words to look for beside those that stand apart in the answer: parts of a Chinese or Thai run, which has no
                spaces.
            options: arguments of `model.generate`, such as `max_new_tokens`.

        Returns:
            The answer's heat maps, heads kept apart, on the grid of the model's image tokens; `patch.maps` gives them again.

        Raises:
            ConfigError: the patch has no processor, or the processor no chat template and there is no `prompt`.
            ModelError: nobody knows where this model's image tokens lie.
            CaptureError: the answer has no words.
        """
        if not self.is_patched:
            raise CaptureError("the patch was undone; call lavender.patch(model, processor=processor) again")
        self._maps = None
        self._maps = look(self, image, question, answer, prompt, words, options)
        return self._maps

    def layer_names(self) -> list[str]:
        """Dotted names of the captured attention modules in the text tower, in order."""
        names = {module: name for name, module in self._decoder.named_modules()}
        return [names[module] for module in self._layers]

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        given = {key: kwargs.pop(key) for key in KEYS if key in kwargs}
        self._active = None
        if given:
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            self._active = _Forward(self, given, {**dict(zip(names, args, strict=False)), **kwargs})
            if self._active.resamplers is not None:
                self._active.resamplers.start()
        return args, kwargs

    def _before_layer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if self._active is None:
            return None
        return args, {**kwargs, REQUEST: self._active.request}

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        active, self._active = self._active, None
        if self._resamplers is not None:
            self._resamplers.listening = False
        if active is None or output is None:  # no request, or the forward raised
            return None
        maps = active.maps()
        if self._captured is not None:
            self._captured.append(maps)
        if active.targets is None or not hasattr(self.model, "lavender"):
            return None
        self._require_gradient(maps)
        term = self.model.lavender(maps, active.targets, active.present)
        self.term = term.detach()
        return _add_to_loss(output, self.config.weight * active.share * term)

    def _require_gradient(self, maps: torch.Tensor) -> None:
        if not (torch.is_grad_enabled() and self.model.training):
            return
        aligner = [p for p in self.model.lavender.parameters() if p.is_floating_point()]
        if aligner and not any(p.requires_grad for p in aligner):
            raise CaptureError(
                "every weight of the aligner is frozen; with PEFT, name it: LoraConfig(..., modules_to_save=['lavender'])"
            )
        checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in self._decoder.modules())
        trainable = any(p.requires_grad for p in self._decoder.parameters())
        if checkpointed and trainable and not maps.requires_grad:
            raise CaptureError(
                "the captured attention carries no gradient: the model uses re-entrant gradient checkpointing. Enable it with "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )


class _Forward:
    """One captured forward: the request made of the batch's lavender keys, and what becomes of its recordings."""

    def __init__(self, patch: StudentPatch, given: dict[str, torch.Tensor], kwargs: dict[str, Any]) -> None:
        self.present = given.get("lavender_present")
        self.targets = given.get("lavender_targets")
        self.boxes = given.get("lavender_boxes")
        self.resamplers = patch._resamplers if self.boxes is not None else None
        needed = [key for key in KEYS[:-1] if key != "lavender_boxes" or self.targets is not None]
        missing = [key for key in needed if key not in given]
        if missing:
            raise CaptureError(f"the batch lacks {', '.join(missing)}; make it with lavender.Collator")
        assert self.present is not None
        self.num_layers = patch.num_layers
        self.attention = type(next(iter(patch._layers))).__name__
        tokens = given["lavender_tokens"]
        rows = tokens if (patch._rows or patch.config.rows) == "reads" else (tokens - 1).clamp_min(-1)
        self.request = Request(
            WordRows(rows, given["lavender_token_words"], given["lavender_token_weights"], self.present.shape[1]),
            given["lavender_columns"],
            patch._layers,
            cross=patch.crosses,
            renormalize=patch.config.renormalize,
            # The identity aligner sees the mean over heads alone: then no map per head is made.
            keep_heads=patch._captured is not None or patch.config.aligner != "identity",
            length=_text_length(patch.model, kwargs),
        )
        self.share = _token_share(kwargs)

    def maps(self) -> torch.Tensor:
        recorded = self.request.recorded
        missing = [layer for layer in range(self.num_layers) if layer not in recorded]
        if missing:
            raise CaptureError(
                f"{len(missing)} of {self.num_layers} attention layers recorded nothing (numbers {missing}). Was the attention "
                "implementation changed after lavender.patch? Then unpatch, set it, patch again. Or does the layer around "
                f"{self.attention} keep its keyword arguments to itself? Then lavender cannot reach it"
            )
        stacked = torch.stack([recorded[layer] for layer in range(self.num_layers)], dim=1)
        if self.boxes is None:
            return stacked
        if self.resamplers is not None:
            stacked = self.resamplers.compose(stacked)
        return rasterize(stacked, self.boxes, lattice_of(self.boxes))


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


def _token_share(kwargs: dict[str, Any]) -> torch.Tensor | float:
    """This micro-batch's share of the optimizer step's label tokens, by which the Trainer expects losses to be scaled."""
    total, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if total is None or labels is None:
        return 1.0
    return (labels[:, 1:] != -100).sum() / total


def _add_to_loss(output: Any, term: torch.Tensor) -> Any:
    if isinstance(output, tuple):
        return (output[0] + term, *output[1:])
    output["loss"] = term if output.get("loss") is None else output["loss"] + term.to(output["loss"].dtype)
    return output


def _attention_name(decoder: Any) -> str:
    name: str = decoder.config._attn_implementation
    require_supported(name)
    return name


def _require_layers(layers: tuple[int, ...], modules: list[nn.Module]) -> None:
    beyond = [layer for layer in layers if layer >= len(modules)]
    if beyond:
        raise ModelError(f"layers {beyond} were asked for; the model has attention layers 0 to {len(modules) - 1}")
