"""Reading word rows from a transformers model: a tap on the attention registry, and the patch that asks it to listen.

The model keeps the attention implementation that it has. The registry's entry for it is wrapped by a pass-through that computes
word maps beside the call only if the call carries a request; a hook before each decoder layer adds the request to the layer's
keyword arguments. So outputs are bit-identical, vision towers are untouched, and nothing is remembered between forwards.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..boxes import lattice_of, rasterize
from ..config import AlignmentConfig
from ..errors import CaptureError, ModelError
from ..kernels.row_maps import row_maps
from ..types import WordRows

REQUEST = "lavender_request"
"""Keyword by which a request travels from a decoder layer to the attention function."""

KEYS = (
    "lavender_rows",
    "lavender_row_words",
    "lavender_row_weights",
    "lavender_columns",
    "lavender_boxes",
    "lavender_present",
    "lavender_targets",
)
"""What `lavender.Collator` adds to a batch; the last one only in training. See its docstring for shapes."""

SUPPORTED_ATTENTION = ("sdpa",)


@dataclass(eq=False)
class Request:
    """What one forward is asked to record, and what it recorded: layer number -> [B, H or 1, W, M]."""

    rows: WordRows
    columns: torch.Tensor
    layers: dict[nn.Module, int]
    renormalize: bool
    keep_heads: bool
    length: int
    recorded: dict[int, torch.Tensor] = field(default_factory=dict)

    def record(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
        is_causal: bool | None,
    ) -> None:
        layer = self.layers.get(module)
        if layer is None:
            return
        if query.shape[2] != self.length or key.shape[2] != self.length:
            raise CaptureError(
                f"layer {layer} received {query.shape[2]} queries and {key.shape[2]} keys where {self.length} of both were "
                "expected; capture one forward over prompt and answer with use_cache=False, not a decoding step"
            )
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        heads = query.shape[1]
        maps = row_maps(
            query,
            key,
            self.rows,
            self.columns,
            mask=mask,
            causal=bool(causal) and mask is None and self.length > 1,
            scale=scaling,
            renormalize=self.renormalize,
            head_weights=None if self.keep_heads else query.new_full((heads,), 1 / heads, dtype=torch.float32),
        )
        # Gradient checkpointing runs the layer again in the backward pass: the same operations, whose result is not needed.
        self.recorded.setdefault(layer, maps)


class _Tap:
    """The pass-through around one entry of the attention registry: process-wide, counted by its users."""

    _active: ClassVar[dict[str, _Tap]] = {}

    def __init__(self, name: str) -> None:
        self.name = name
        self.users = 0
        self.original: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
        self.was_local = name in ALL_ATTENTION_FUNCTIONS._local_mapping

        original = self.original

        # The parameter names are the registry's: vision towers pass `attention_mask` by keyword.
        def attention(module, query, key, value, attention_mask=None, **kwargs):  # type: ignore[no-untyped-def]
            request = kwargs.pop(REQUEST, None)
            output = original(module, query, key, value, attention_mask, **kwargs)
            if request is not None:
                request.record(module, query, key, attention_mask, kwargs.get("scaling"), kwargs.get("is_causal"))
            return output

        self.wrapper = attention

    @classmethod
    def acquire(cls, name: str) -> None:
        tap = cls._active.get(name)
        if tap is None:
            tap = cls._active[name] = cls(name)
            ALL_ATTENTION_FUNCTIONS[name] = tap.wrapper
        tap.users += 1

    @classmethod
    def release(cls, name: str) -> None:
        tap = cls._active[name]
        tap.users -= 1
        if tap.users:
            return
        del cls._active[name]
        # Somebody may have registered another function since: theirs stays.
        if ALL_ATTENTION_FUNCTIONS._local_mapping.get(name) is tap.wrapper:
            if tap.was_local:
                ALL_ATTENTION_FUNCTIONS[name] = tap.original
            else:
                del ALL_ATTENTION_FUNCTIONS[name]


class StudentPatch:
    """A patched vision-language model: what `lavender.patch(model)` returns for transformers models.

    Forwards whose batch carries the keys of `lavender.Collator` are captured; every other forward is what it was. Usable as a
    context manager. One patch serves one thread.

    Attributes:
        model: the patched model, below any PEFT wrapper.
        config: what is captured and, in training, compared.
        trains: whether the model was prepared for training.
        num_layers: L, the number of captured layers.
        term: the unweighted alignment loss of the latest training forward, detached; None before the first.
    """

    def __init__(self, model: Any, config: AlignmentConfig, train: bool) -> None:
        self.model = model
        self.config = config
        self.trains = train
        self._borrowers = 0
        self.term: torch.Tensor | None = None
        self._decoder = _text_tower(model)
        self._attention_name = _attention_name(self._decoder)
        every = _attention_modules(self._decoder)
        _require_layers(config.layers, every)
        chosen = [every[i] for i in config.layers] if config.layers else every
        self._layers = {module: place for place, module in enumerate(chosen)}
        self.num_layers = len(chosen)
        self._active: _Forward | None = None
        self._captured: list[torch.Tensor] | None = None
        self._handles: list[Any] = []
        self._attach(train)

    def _attach(self, train: bool) -> None:
        if train:
            from ..aligner import Alignment

            reference = next(self._decoder.parameters())
            alignment = Alignment(self.config, self._decoder.config.num_attention_heads)
            self.model.add_module("lavender", alignment.to(reference.device))
        for layer in _layers_around(self._decoder, self._layers):
            self._handles.append(layer.register_forward_pre_hook(self._before_layer, with_kwargs=True))
        self._handles.append(self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True))
        self._hold_tap()
        self.model._lavender_patch = self

    def _hold_tap(self) -> None:
        _Tap.acquire(self._attention_name)
        # A model that is dropped without unpatch() lets go of the registry as well.
        self._release_tap = weakref.finalize(self, _Tap.release, self._attention_name)

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

    def borrowed(self) -> StudentPatch:
        """This handle for one more user, whose `with` must not take the patch from the first one."""
        self._borrowers += 1
        return self

    def __enter__(self) -> StudentPatch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._borrowers:
            self._borrowers -= 1
        else:
            self.unpatch()

    def capture(self, **batch: Any) -> torch.Tensor:
        """One forward over a batch of `lavender.Collator`; gradients flow if autograd is on.

        Returns:
            Raw maps [B, L, H, W, y, x]: the attention from each word's rows to the picture, on the grid of the image tokens.

        Raises:
            CaptureError: the batch carries no lavender keys, or a layer did not record.
        """
        if "lavender_rows" not in batch:
            raise CaptureError("the batch carries no lavender keys; make it with lavender.Collator")
        wanted = {k: v for k, v in batch.items() if k not in ("lavender_targets", "labels")}
        self._captured = []
        try:
            self.model(**wanted, use_cache=False)
            (maps,) = self._captured
            return maps
        finally:
            self._captured = None

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        given = {key: kwargs.pop(key) for key in KEYS if key in kwargs}
        self._active = None
        if given:
            self._active = _Forward(self, given, kwargs)
        return args, kwargs

    def _before_layer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if self._active is None:
            return None
        return args, {**kwargs, REQUEST: self._active.request}

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        active, self._active = self._active, None
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
        missing = [key for key in KEYS[:-1] if key not in given]
        if missing:
            raise CaptureError(f"the batch lacks {', '.join(missing)}; make it with lavender.Collator")
        ids = kwargs.get("input_ids")
        if ids is None:
            raise CaptureError("a captured forward needs input_ids by keyword; it got none")
        self.present = given["lavender_present"]
        self.targets = given.get("lavender_targets")
        self.boxes = given["lavender_boxes"]
        self.num_layers = patch.num_layers
        rows = WordRows(given["lavender_rows"], given["lavender_row_words"], given["lavender_row_weights"], self.present.shape[1])
        # The identity aligner sees the mean over heads alone: then no map per head is made.
        keep_heads = patch._captured is not None or patch.config.aligner != "identity"
        self.request = Request(rows, given["lavender_columns"], patch._layers, patch.config.renormalize, keep_heads, ids.shape[1])
        self.share = _token_share(kwargs)

    def maps(self) -> torch.Tensor:
        recorded = self.request.recorded
        missing = [layer for layer in range(self.num_layers) if layer not in recorded]
        if missing:
            raise CaptureError(
                f"{len(missing)} of {self.num_layers} attention layers recorded nothing (numbers {missing}); was the attention "
                "implementation changed after lavender.patch? Unpatch, set it, patch again"
            )
        stacked = torch.stack([recorded[layer] for layer in range(self.num_layers)], dim=1)
        return rasterize(stacked, self.boxes, lattice_of(self.boxes))


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


def base_model_of(model: Any) -> Any:
    """The transformers model below a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _text_tower(model: Any) -> Any:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model:
        raise ModelError(
            f"{type(model).__name__} has no text decoder that lavender can find; expected an image-text-to-text model of "
            "transformers, or a diffusers pipeline"
        )
    return decoder


def _attention_name(decoder: Any) -> str:
    name = decoder.config._attn_implementation
    if name not in SUPPORTED_ATTENTION:
        raise ModelError(
            f"the model's text attention is {name!r}; lavender reads {', '.join(SUPPORTED_ATTENTION)}. Call "
            "model.set_attn_implementation('sdpa') before lavender.patch"
        )
    return name


def _attention_modules(decoder: nn.Module) -> list[nn.Module]:
    """The attention modules of the text tower, in order: those whose forward asks the attention registry."""
    found = [m for m in decoder.modules() if _asks_registry(type(m))]
    if not found:
        raise ModelError(f"no attention module of {type(decoder).__name__} goes through transformers' attention registry")
    return found


def _asks_registry(module_class: Any) -> bool:
    code = getattr(inspect.unwrap(module_class.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _require_layers(layers: tuple[int, ...], modules: list[nn.Module]) -> None:
    beyond = [layer for layer in layers if layer >= len(modules)]
    if beyond:
        raise ModelError(f"layers {beyond} were asked for; the model has attention layers 0 to {len(modules) - 1}")


def _layers_around(decoder: nn.Module, attentions: dict[nn.Module, int]) -> list[nn.Module]:
    """The decoder layers that hold the captured attention modules: checkpointing wraps their forward, inside their hooks."""
    found: list[nn.Module] = []
    for module in decoder.modules():
        if isinstance(module, GradientCheckpointingLayer) and any(m in attentions for m in module.modules()):
            parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters.values()
            if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
                raise ModelError(f"{type(module).__name__}.forward takes no **kwargs; lavender cannot reach its attention")
            found.append(module)
    if not found:
        raise ModelError(f"{type(decoder).__name__} has no decoder layers that lavender can hook")
    return found
