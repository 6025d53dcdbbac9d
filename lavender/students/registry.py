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
from torch.nn import functional as F
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import CaptureError, ModelError
from ..kernels.checks import as_attended
from ..kernels.row_maps import row_maps
from ..types import WordRows

REQUEST = "lavender_request"
"""Keyword by which a request travels from a decoder layer to the attention function."""

_ALTERING = ("softcap", "s_aux", "sinks", "position_bias", "cache", "block_table", "k_cache", "v_cache")
"""Arguments of an attention call that change its probabilities in ways that the kernels do not compute."""
_FUNCTIONS = (sdpa_attention_forward, flex_attention_forward, flash_attention_forward)
"""What `mask_of` reads the calls of. The flash attentions, kernels of the hub too, are all called by one function."""
_VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Arguments by which a flash attention reads several sequences in one row; it does if it gets all four."""
_DROPOUTS = ("attention_dropout", "attn_dropout", "dropout", "dropout_p")
"""Attributes by which transformers' attention modules know the dropout of their probabilities."""


@dataclass(eq=False)
class Request:
    """What one forward is asked to record, and what it recorded.

    Attributes:
        rows: the words' query rows.
        columns: int64 [B, M], the keys to keep; -1 is padding.
        layers: the attention modules that take part, numbered.
        cross: whether those attend to keys of their own instead of the text.
        renormalize: whether a row's softmax runs over the columns alone.
        length: T, the length of the text.
        weights: per layer what each head adds to one map; None keeps heads apart.
        heads: per layer the heads that are kept; None for all.
        recorded: layer number -> [B, H' or 1, W, M], on the layer's device.
        wants_gradient: whether the forward was started with autograd on.
        lost_gradient: whether a layer ran with autograd off all the same, as re-entrant gradient checkpointing runs it.
    """

    rows: WordRows
    columns: torch.Tensor
    layers: dict[nn.Module, int]
    cross: bool
    renormalize: bool
    length: int
    weights: tuple[tuple[float, ...], ...] | None = None
    heads: tuple[tuple[int, ...], ...] | None = None
    recorded: dict[int, torch.Tensor] = field(default_factory=dict)
    wants_gradient: bool = field(default_factory=torch.is_grad_enabled)
    lost_gradient: bool = False
    _places: dict[torch.device, tuple[WordRows, torch.Tensor]] = field(default_factory=dict)
    _masks: list[tuple[tuple[Any, ...], tuple[Any, ...], tuple[torch.Tensor | None, bool]]] = field(default_factory=list)

    def record_call(
        self, name: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, arguments: dict[str, Any]
    ) -> None:
        """Computes the maps of one call of the registry's attention function `name`, with its other keyword `arguments`."""
        layer = self.layers.get(module)
        if layer is None:
            return
        self._require_lengths(layer, query.shape[2], key.shape[2])
        for argument in _ALTERING if _reads_varlen(name) else (*_ALTERING, *_VARLEN[:2]):
            if arguments.get(argument) is not None:
                raise CaptureError(
                    f"layer {layer} attends by {name!r} with {argument}, which lavender cannot follow; call "
                    "model.set_attn_implementation('eager') before lavender.patch"
                )
        mask, causal = self._mask_of(name, module, query, key, mask, arguments)
        if causal and self.cross:
            raise CaptureError(
                f"the cross-attention of layer {layer} got no mask, so {name!r} takes it for causal and cuts the picture off; pass "
                "the processor's cross_attention_mask"
            )
        rows, columns = self._on(query.device)
        maps = row_maps(
            as_attended(query),
            as_attended(key),
            rows,
            columns,
            mask=mask,
            causal=causal,
            scale=arguments.get("scaling"),
            renormalize=self.renormalize,
            head_weights=self._weights_of(layer, query),
        )
        self._keep(layer, maps)

    def record_weights(self, module: nn.Module, weights: torch.Tensor | None) -> None:
        """Takes the maps out of the probabilities [B, H, T, N] that eager attention returned."""
        layer = self.layers[module]
        if weights is None:
            raise CaptureError(f"layer {layer} ({type(module).__name__}) attends eagerly and returned no attention weights")
        if module.training and dropout_of(module):
            raise CaptureError(
                f"layer {layer} attends eagerly with a dropout of {dropout_of(module)}, which is in the weights that it returns; "
                "train with attention_dropout=0, or call model.set_attn_implementation('sdpa') before lavender.patch"
            )
        self._require_lengths(layer, weights.shape[2], weights.shape[3])
        rows, columns = self._on(weights.device)
        dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
        index = rows.rows.clamp_min(0)[:, None, :, None].expand(-1, weights.shape[1], -1, weights.shape[3])
        picked = columns.clamp_min(0)[:, None, None].expand(-1, weights.shape[1], index.shape[2], -1)
        kept = weights.gather(2, index).gather(3, picked).to(dtype) * (columns >= 0)[:, None, None].to(dtype)
        if self.renormalize:
            kept = kept / kept.sum(dim=3, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        maps = rows.indicator(dtype)[:, None] @ kept
        shares = self._weights_of(layer, maps)
        self._keep(layer, maps if shares is None else (maps * shares.to(dtype)[:, None, None]).sum(dim=1, keepdim=True))

    def _weights_of(self, layer: int, by_head: torch.Tensor) -> torch.Tensor | None:
        """What each head of a layer's [B, H, ...] adds to one map; None where heads are kept apart."""
        if self.weights is None:
            return None
        own, dtype = self.weights[layer], torch.float64 if by_head.dtype == torch.float64 else torch.float32
        if len(set(own)) == 1:  # of a mean: made on the device
            return by_head.new_full((len(own),), own[0], dtype=dtype)
        return by_head.new_tensor(own, dtype=dtype)

    def _on(self, device: torch.device) -> tuple[WordRows, torch.Tensor]:
        """Rows and columns on a layer's device: a model may be spread over several."""
        if device not in self._places:
            self._places[device] = (self.rows.to(device), self.columns.to(device))
        return self._places[device]

    def _mask_of(
        self, name: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, arguments: dict[str, Any]
    ) -> tuple[torch.Tensor | None, bool]:
        """`mask_of`, computed once for all layers that receive the same objects."""
        received = (mask, *(arguments.get(argument) for argument in ("position_ids", "sliding_window", "is_causal", *_VARLEN)))
        signature = (name, getattr(module, "is_causal", None), query.shape, key.shape, query.device)
        for known, objects, result in self._masks:
            if known == signature and all(one is other for one, other in zip(objects, received, strict=True)):
                return result
        result = mask_of(name, module, query, key, mask, arguments)
        self._masks.append((signature, received, result))
        return result

    def _require_lengths(self, layer: int, num_queries: int, num_keys: int) -> None:
        if num_queries != self.length or (num_keys != self.length and not self.cross):
            raise CaptureError(
                f"layer {layer} received {num_queries} queries and {num_keys} keys where {self.length} of both were "
                "expected; capture one forward over prompt and answer with use_cache=False and every logit kept, not a decoding "
                "step, and without a prefix of keys (PEFT's prefix tuning)"
            )
        if self.cross and num_keys < self.columns.shape[1]:
            raise CaptureError(
                f"layer {layer} attends to {num_keys} keys of the picture, but {self.columns.shape[1]} places were given for them"
            )

    def _keep(self, layer: int, maps: torch.Tensor) -> None:
        # Gradient checkpointing runs the layer again in the backward pass: the same operations, whose result is not needed.
        if layer not in self.recorded:
            if self.heads is not None:
                maps = torch.stack([maps[:, head] for head in self.heads[layer]], dim=1)
            self.recorded[layer] = maps
            self.lost_gradient |= self.wants_gradient and not torch.is_grad_enabled()


def mask_of(
    name: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, arguments: dict[str, Any]
) -> tuple[torch.Tensor | None, bool]:
    """The mask that a registry function applies, broadcastable to [B, H, T, N], and whether it is causal beside it.

    Every function reads what it receives in its own way: sdpa a mask of four axes, or none and a flag; flex attention a function
    of places, or scores to add; the flash attentions [B, N] of what is no padding, the borders of packed sequences, a flag and a
    window. Rows that are padding see nothing, or are nobody's.

    Raises `CaptureError` where what a call receives cannot be read for certain.
    """
    is_causal = arguments.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and query.shape[2] > 1
    if _reads_varlen(name):
        return _flash_mask(query, key, mask, arguments, causal)
    if name == "sdpa":
        return mask, causal and mask is None
    if isinstance(mask, torch.Tensor):
        # Added to the scores, whatever its dtype, of the first head for every head.
        return mask[:, :1, :, : key.shape[2]].to(query.dtype), False
    if mask is None:
        return None, False
    from torch.nn.attention.flex_attention import create_mask

    heads = mask.kv_num_blocks.shape[1]
    return create_mask(mask.mask_mod, query.shape[0], heads, query.shape[2], key.shape[2], device=query.device), False


def _flash_mask(
    query: torch.Tensor, key: torch.Tensor, mask: Any, arguments: dict[str, Any], causal: bool
) -> tuple[torch.Tensor | None, bool]:
    """What `transformers.modeling_flash_attention_utils._flash_attention_forward` lets each row see.

    It takes the first that is there: a mask of what is no padding, borders of sequences, positions that restart. Within a sequence
    places are counted without padding, and causality and window are aligned to its end, as flash attention does.
    """
    length, num_keys = query.shape[2], key.shape[2]
    window = arguments.get("sliding_window")
    window = None if window is None or num_keys <= window else window
    row_sequences, key_sequences = _sequences(query, key, mask, arguments)
    if row_sequences is None or key_sequences is None:
        if window is None and (length == num_keys or not causal):
            return None, causal
        row_sequences, key_sequences = (torch.zeros(1, n, dtype=torch.long, device=query.device) for n in (length, num_keys))
    rows, keys = _places_in(row_sequences), _places_in(key_sequences)
    if row_sequences is not key_sequences:  # a sequence's last row stands over its last key
        sizes = [(row_sequences[:, :, None] == each[:, None]).sum(dim=2) for each in (key_sequences, row_sequences)]
        rows = rows + sizes[0] - sizes[1]
    seen = (row_sequences[:, :, None] == key_sequences[:, None]) & (row_sequences >= 0)[:, :, None]
    distance = rows[:, :, None] - keys[:, None]
    if causal:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & (distance.abs() < window)
    return seen[:, None], False


def _sequences(
    query: torch.Tensor, key: torch.Tensor, mask: Any, arguments: dict[str, Any]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The number of the sequence that each row [B or 1, T] and key [B or 1, N] belongs to, -1 for none; None for one sequence."""
    batch, length, num_keys = len(query), query.shape[2], key.shape[2]
    if mask is not None:
        if mask.ndim != 2 or mask.shape[1] > num_keys or not ((mask == 0) | (mask == 1)).all():
            raise CaptureError(
                f"a flash attention got a mask {tuple(mask.shape)} of {mask.dtype} for {num_keys} keys; expected [B, N] of 0 and "
                "1, which tells padding apart. Give packed sequences by position_ids that restart; with PEFT prefix tuning, switch "
                "gradient checkpointing off, which drops the prefix; or call model.set_attn_implementation('sdpa')"
            )
        keys = F.pad(mask.long(), (0, num_keys - mask.shape[1])) - 1
        if length == mask.shape[1]:
            return (keys if length == num_keys else keys[:, :length]), keys
        return (keys[:, -length:] if length > 1 else torch.zeros_like(keys[:, :1])), keys
    if all(arguments.get(argument) is not None for argument in _VARLEN):
        row_borders, key_borders = arguments["cu_seq_lens_q"], arguments["cu_seq_lens_k"]
        return _between(row_borders, batch, length), _between(key_borders, batch, num_keys)
    positions = arguments.get("position_ids")
    if positions is None or batch != 1 or positions.shape[-1] == 1:
        return None, None
    if positions.numel() != length or length != num_keys:
        raise CaptureError(
            f"a flash attention got position_ids {tuple(positions.shape)} for {length} rows and {num_keys} keys; expected one "
            "position for each of both"
        )
    positions = positions.reshape(1, -1)
    if (positions == positions.min() + torch.arange(length, device=positions.device)).all():
        return None, None
    sequences = (positions == positions.min()).cumsum(dim=1) - 1
    return sequences, sequences


def _between(borders: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Sequences [B, length] between the borders [S + 1] in a batch laid end to end."""
    places = torch.arange(batch * length, device=borders.device)
    if borders[0] != 0 or borders[-1] != len(places):
        raise CaptureError(
            f"the borders of packed sequences (cu_seq_lens) go from {int(borders[0])} to {int(borders[-1])}, and the batch has "
            f"{len(places)} places: what a flash attention gives the others is undefined. Do virtual tokens (PEFT's prompt tuning) "
            "or padding come on top of the sequences? Count them, or leave them out"
        )
    sequences = (torch.bucketize(places, borders.long(), right=True) - 1).view(batch, length)
    if batch > 1 and (sequences[1:, 0] == sequences[:-1, -1]).any():
        raise CaptureError("a packed sequence runs from one sample of the batch into the next one; lavender reads samples apart")
    return sequences


def _places_in(sequences: torch.Tensor) -> torch.Tensor:
    """Every entry's place among those of its sequence [B, N]; sequences follow each other, and entries of -1 count for none."""
    counted = (sequences >= 0).cumsum(dim=1) - 1
    before = F.pad(sequences.cummax(dim=1).values[:, :-1], (1, 0), value=-1)
    first: torch.Tensor = counted.where(sequences > before, 0).cummax(dim=1).values
    return counted - first


def _reads_varlen(name: str) -> bool:
    """Whether an attention implementation goes through transformers' flash attention, which reads several sequences in one row."""
    return name not in ("sdpa", "flex_attention")


def dropout_of(module: nn.Module) -> float:
    """The dropout of an attention module's probabilities; 0 where it has none."""
    values = [getattr(module, name) for name in _DROPOUTS if hasattr(module, name)]
    return float(getattr(values[0], "p", values[0])) if values else 0.0


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
        """Taps entries for one more user. Eager attention has none: its weights are read from its modules' outputs.

        Raises `ModelError`, and taps nothing, where an entry is not transformers' own function.
        """
        names = [name for name in names if name != "eager"]
        for name in names:
            function = ALL_ATTENTION_FUNCTIONS[name]
            if name not in cls._active and function not in _FUNCTIONS:
                raise ModelError(
                    f"the attention that is registered as {name!r} is {getattr(function, '__qualname__', function)}, and not "
                    "transformers' own, so that lavender does not know what it attends to. Call "
                    "model.set_attn_implementation('eager') before lavender.patch"
                )
        for name in names:
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
