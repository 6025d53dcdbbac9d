"""The tap on transformers' attention registry: a pass-through that computes word maps beside a call that carries a request.

The model keeps the attention implementation that it has, so its outputs are bit-identical. Implementations whose functions are in
the registry (sdpa, the flash attentions, flex attention) are tapped there; eager attention, which each model file defines for
itself, gives its weights as a second output, which is read by a hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import CaptureError, ModelError
from ..kernels.checks import as_attended
from ..kernels.row_maps import row_maps
from ..types import WordRows

REQUEST = "lavender_request"
"""Keyword by which a request travels from a decoder layer to the attention function."""

_ALTERING = ("softcap", "s_aux", "sinks", "position_bias", "cu_seq_lens_q", "cache")
"""Arguments of an attention call that change its probabilities in ways that the kernels do not compute."""


@dataclass(eq=False)
class Request:
    """What one forward is asked to record, and what it recorded.

    Attributes:
        rows: the words' query rows.
        columns: int64 [B, M], the keys to keep; -1 is padding.
        layers: the attention modules that take part, numbered.
        cross: whether those attend to keys of their own instead of the text.
        renormalize: whether a row's softmax runs over the columns alone.
        keep_heads: whether heads are kept apart.
        length: T, the length of the text.
        recorded: layer number -> [B, H or 1, W, M].
    """

    rows: WordRows
    columns: torch.Tensor
    layers: dict[nn.Module, int]
    cross: bool
    renormalize: bool
    keep_heads: bool
    length: int
    recorded: dict[int, torch.Tensor] = field(default_factory=dict)

    def record_call(
        self, name: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, arguments: dict[str, Any]
    ) -> None:
        """Computes the maps of one call of the registry's attention function `name`, with its other keyword `arguments`."""
        layer = self.layers.get(module)
        if layer is None:
            return
        self._require_lengths(layer, query.shape[2], key.shape[2])
        for argument in _ALTERING:
            if arguments.get(argument) is not None:
                raise CaptureError(
                    f"layer {layer} attends by {name!r} with {argument}, which lavender cannot follow; call "
                    "model.set_attn_implementation('eager') before lavender.patch"
                )
        mask, causal = mask_of(name, module, query, key, mask, arguments)
        if causal and self.cross:
            raise CaptureError(
                f"the cross-attention of layer {layer} got no mask, so {name!r} takes it for causal and cuts the picture off; pass "
                "the processor's cross_attention_mask"
            )
        maps = row_maps(
            as_attended(query),
            as_attended(key),
            self.rows,
            self.columns,
            mask=mask,
            causal=causal,
            scale=arguments.get("scaling"),
            renormalize=self.renormalize,
            head_weights=None if self.keep_heads else query.new_full((query.shape[1],), 1 / query.shape[1], dtype=torch.float32),
        )
        self._keep(layer, maps)

    def record_weights(self, module: nn.Module, weights: torch.Tensor | None) -> None:
        """Takes the maps out of the probabilities [B, H, T, N] that eager attention returned."""
        layer = self.layers[module]
        if weights is None:
            raise CaptureError(f"layer {layer} ({type(module).__name__}) attends eagerly and returned no attention weights")
        self._require_lengths(layer, weights.shape[2], weights.shape[3])
        dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
        index = self.rows.rows.clamp_min(0)[:, None, :, None].expand(-1, weights.shape[1], -1, weights.shape[3])
        picked = self.columns.clamp_min(0)[:, None, None].expand(-1, weights.shape[1], index.shape[2], -1)
        kept = weights.gather(2, index).gather(3, picked).to(dtype) * (self.columns >= 0)[:, None, None].to(dtype)
        if self.renormalize:
            kept = kept / kept.sum(dim=3, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        maps = self.rows.indicator(dtype)[:, None] @ kept
        self._keep(layer, maps if self.keep_heads else maps.mean(dim=1, keepdim=True))

    def _require_lengths(self, layer: int, num_queries: int, num_keys: int) -> None:
        if num_queries != self.length or (num_keys != self.length and not self.cross):
            raise CaptureError(
                f"layer {layer} received {num_queries} queries and {num_keys} keys where {self.length} of both were "
                "expected; capture one forward over prompt and answer with use_cache=False and every logit kept, not a decoding "
                "step"
            )
        if self.cross and num_keys < self.columns.shape[1]:
            raise CaptureError(
                f"layer {layer} attends to {num_keys} keys of the picture, but {self.columns.shape[1]} places were given for them"
            )

    def _keep(self, layer: int, maps: torch.Tensor) -> None:
        # Gradient checkpointing runs the layer again in the backward pass: the same operations, whose result is not needed.
        self.recorded.setdefault(layer, maps)


def mask_of(
    name: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, arguments: dict[str, Any]
) -> tuple[torch.Tensor | None, bool]:
    """The mask that a registry function applies, broadcastable to [B, H, T, N], and whether it is causal beside it.

    Every function reads what it receives in its own way: sdpa a mask of four axes, or none and a flag; the flash attentions
    [B, N] of what is no padding, a flag and a window; flex attention a function of places.
    """
    is_causal = arguments.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and query.shape[2] > 1
    if name == "sdpa":
        return mask, causal and mask is None
    if name == "flex_attention":
        if mask is None or isinstance(mask, torch.Tensor):
            return (None if mask is None else mask[..., : key.shape[2]]), False
        from torch.nn.attention.flex_attention import create_mask

        return create_mask(mask.mask_mod, query.shape[0], 1, query.shape[2], key.shape[2], device=query.device), False
    window = arguments.get("sliding_window")
    if mask is None and window is None:
        return None, causal
    rows = torch.arange(query.shape[2], device=query.device)[:, None]
    keys = torch.arange(key.shape[2], device=query.device)
    seen = keys <= rows if causal else torch.ones_like(keys <= rows)
    if window is not None:
        seen = seen & (rows - keys < window) & (keys - rows < window)
    return (seen[None, None] if mask is None else seen & mask.bool()[:, None, None, :]), False


def require_supported(name: str) -> None:
    """Raises `ModelError` unless the attention implementation `name` can be read."""
    if name in ("eager", "sdpa", "flex_attention") or ("flash" in name and "|" not in name):
        return
    raise ModelError(
        f"the model's text attention is {name!r}; lavender reads sdpa, eager, flash and flex attention. Call "
        "model.set_attn_implementation('sdpa') before lavender.patch"
    )


class Tap:
    """The pass-through around one entry of the attention registry: process-wide, counted by its users."""

    _active: ClassVar[dict[str, Tap]] = {}

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
                request.record_call(name, module, query, key, attention_mask, kwargs)
            return output

        self.wrapper = attention

    @classmethod
    def acquire(cls, names: Iterable[str]) -> None:
        """Taps entries for one more user. Eager attention has none: its weights are read from its modules' outputs."""
        for name in names:
            if name == "eager":
                continue
            tap = cls._active.get(name)
            if tap is None:
                tap = cls._active[name] = cls(name)
                ALL_ATTENTION_FUNCTIONS[name] = tap.wrapper
            tap.users += 1

    @classmethod
    def release(cls, names: Iterable[str]) -> None:
        """Counts one user of each entry less; the last one restores it."""
        for name in names:
            if name == "eager":
                continue
            tap = cls._active[name]
            tap.users -= 1
            if tap.users:
                continue
            del cls._active[name]
            # Somebody may have registered another function since: theirs stays.
            if ALL_ATTENTION_FUNCTIONS._local_mapping.get(name) is tap.wrapper:
                if tap.was_local:
                    ALL_ATTENTION_FUNCTIONS[name] = tap.original
                else:
                    del ALL_ATTENTION_FUNCTIONS[name]
