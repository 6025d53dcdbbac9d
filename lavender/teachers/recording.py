"""Reading word columns from a diffusers denoiser: hooks around attention modules, and a mode that reads the one call inside.

No attention processor is replaced, so LoRA, IP-Adapter, ControlNet, offloading and fused projections keep working and outputs
are bit-identical. While a module runs, a `TorchFunctionMode` reads its first `scaled_dot_product_attention` call and computes word
maps beside it; outside a recording the hooks do nothing.
"""

from __future__ import annotations

import inspect
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import CaptureError, ModelError
from ..kernels.checks import as_attended
from ..kernels.column_maps import column_attention, column_maps
from ..kernels.map_loss import resample
from ..maps import LayerMaps, chosen_names, layer_shares
from .denoisers import Grid, Layout, Places, layout_of, places_of
from .processors import hides_attention, key_weight_of, remedy_of

Samples = slice | list[int]
"""Samples of a denoiser's batch."""
_PASSED_ON = (None, "ip_image_proj")
"""Ways in which a U-Net passes its text to its layers as it is."""
Wanted = tuple["Recording", Samples]
"""Where a forward is recorded, and which of its samples."""


@dataclass(eq=False)
class Recording:
    """What the denoiser's forwards recorded while it was open, in the order in which the layers ran.

    Attributes:
        word_weights: [B, W, N], each text token's share of each word.
        heads: whether heads are kept apart; else their mean is, or that of the heads with these numbers.
        steps: whether forwards are kept apart; else their mean is.
        fused: whether one pass gives the attention's output together with the map.
        resolutions: the longer sides of the grids, in places, whose layers are recorded; empty for all.
        lenient: whether an error is kept and the layer left out, and not raised: nobody's picture is lost for its maps.
        num_forwards: how many there were.
        grids: the longer sides that were met.
        errors: why layers could not be read, where that is kept.
        token_shares: [B, W, K], where K single tokens are recorded in place of words: each one's share of each word.
    """

    word_weights: torch.Tensor
    heads: bool | tuple[int, ...] = True
    steps: bool = True
    fused: bool = False
    resolutions: tuple[int, ...] = ()
    lenient: bool = False
    num_forwards: int = 0
    grids: set[int] = field(default_factory=set)
    errors: dict[str, Exception] = field(default_factory=dict)
    token_shares: torch.Tensor | None = None
    _passed: set[str] = field(default_factory=set)
    _sums: dict[tuple[str, int | None, torch.Size], tuple[torch.Tensor, int]] = field(default_factory=dict)

    @property
    def entries(self) -> list[LayerMaps]:
        """Maps [B, H or 1, W, y, x] (with F before y for videos) per layer and grid, and per forward if steps are kept."""
        return [LayerMaps(layer, total / count, step, count) for (layer, step, _), (total, count) in self._sums.items()]

    def add(self, layer: str, maps: torch.Tensor) -> None:
        """Adds one layer's maps of the current forward."""
        key = (layer, self.num_forwards - 1 if self.steps else None, maps.shape)
        total, count = self._sums.get(key, (None, 0))
        self._sums[key] = (maps if total is None else total + maps, count + 1)

    def give_up(self, layer: str, error: Exception) -> None:
        """Keeps why a layer could not be read in one of the forwards; its maps of the others would be taken for all."""
        self.errors.setdefault(layer, error)
        self._sums = {key: value for key, value in self._sums.items() if key[0] != layer}

    def passes(self, layer: str, grid: tuple[int, int, int]) -> bool:
        """Whether a layer with this grid is left out."""
        side = max(grid[1:])
        self.grids.add(side)
        if not self.resolutions or side in self.resolutions:
            return False
        self._passed.add(layer)
        return True

    def head_weights(self, layer: str, count: int, like: torch.Tensor) -> torch.Tensor | None:
        """Weights [H] of a layer's heads, or None where they are kept apart."""
        if self.heads is True:
            return None
        chosen = list(self.heads or range(count))
        if max(chosen) >= count:
            raise CaptureError(f"{layer} has {count} heads, counted from 0; there is no head {max(chosen)}")
        weights = like.new_zeros(count, dtype=torch.float32)
        weights[chosen] = 1 / len(chosen)
        return weights

    def mean(self, size: int) -> torch.Tensor:
        """Mean over heads, layers and forwards, each layer resampled to `size` x `size` first: [B, W, size, size]."""
        if not self._sums:
            raise CaptureError("nothing was recorded: run the denoiser inside `with patch.capture(...)`")
        entries = self.entries
        resized = [
            share * resample(entry.maps.mean(dim=1), (size, size))
            for share, entry in zip(layer_shares(entries), entries, strict=True)
        ]
        return torch.stack(resized).sum(dim=0)

    def require_layers(self, denoiser: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Raises `CaptureError` naming what kept layers of a denoiser from recording."""
        missing = self.missing_layers(layers)
        if not self.num_forwards and not self.errors:
            raise CaptureError("the attention layers recorded nothing: the denoiser did not run in this thread")
        if not self._sums and self._passed == set(layers):
            raise CaptureError(
                f"no layer's grid has a longer side of {', '.join(map(str, self.resolutions))} places; this picture's have "
                f"{', '.join(map(str, sorted(self.grids)))}"
            )
        if missing:
            compiled = getattr(denoiser, "_compiled_call_impl", None) is not None
            remedy = "the denoiser ran compiled before it was patched: patch it first, or call torch.compiler.reset()"
            error = next((error for name, error in self.errors.items() if name in missing), None)
            reason = str(error) if error is None or isinstance(error, CaptureError) else f"{type(error).__name__}: {error}"
            raise CaptureError(
                f"{len(missing)} of {len(layers)} attention layers recorded nothing ({', '.join(missing[:3])}); "
                f"{reason if error is not None else remedy if compiled else remedy_of(layers[missing[0]])}"
            )

    def partly_read(self) -> dict[str, int]:
        """The layers that were read in some of the forwards alone, and in how many."""
        counts: dict[str, int] = {}
        for (layer, _, _), (_, count) in self._sums.items():
            counts[layer] = counts.get(layer, 0) + count
        return {layer: count for layer, count in counts.items() if count < self.num_forwards}

    def missing_layers(self, layers: Iterable[str]) -> list[str]:
        """Those of the layers that recorded nothing, sorted."""
        return sorted(set(layers) - {layer for layer, _, _ in self._sums} - self._passed)


class _Hook:
    """A hook of a module. A copy of the module, or a pickle, has one in its place that does nothing, and knows nothing of us."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> None:
        self._function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


class _CallReader(TorchFunctionMode):
    """Reads the attention call of one module; lives while that module runs."""

    def __init__(
        self,
        record: Callable[[str, _Attention, torch.Tensor | None], torch.Tensor | None],
        name: str,
        key_weight: torch.Tensor | None,
    ) -> None:
        """`record` gets the call, and what was projected to its keys where `key_weight` does that."""
        super().__init__()
        self.record, self.name, self.is_read = record, name, False
        self.key_weight, self.text = key_weight, None

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # An IP-Adapter makes a second call with its picture's keys: the first one has the text's.
        if func is F.linear and len(args) > 1 and args[1] is self.key_weight and not self.is_read:
            self.text = args[0]
        if func is F.scaled_dot_product_attention and not self.is_read:
            self.is_read = True
            output = self.record(self.name, _Attention(*args, **kwargs), self.text)
            if output is not None:
                return output
        return func(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class _Attention:
    """The arguments of one `scaled_dot_product_attention` call."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def of_samples(self, branch: Samples) -> _Attention:
        """The same call for some samples of the batch, every query head with a key head of its own."""
        mask = self.attn_mask
        if mask is not None and mask.ndim == 4 and mask.shape[0] > 1:
            mask = mask[branch]
        key, value = self.key[branch], self.value[branch]
        if self.enable_gqa:
            share = self.query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
        return _Attention(self.query[branch], key, value, mask, scale=self.scale)


@dataclass(eq=False)
class _State:
    """What one thread records just now: `forwards` are those that run, one inside the other, None where nothing is recorded."""

    @property
    def current(self) -> _Forward | None:
        return self.forwards[-1] if self.forwards else None

    manual: Wanted | None = None
    forwards: list[_Forward | None] = field(default_factory=list)
    readers: list[_CallReader] = field(default_factory=list)


@dataclass(eq=False)
class _Forward:
    """One forward of the denoiser.

    Attributes:
        wanted: what is recorded of it.
        places: where text and picture stand.
        size: samples of its batch.
        text: what its text attention must get: the denoiser's, or what the first layer got where the denoiser projects it.
        grids: height and width of the U-Net's levels, by the module around their attention.
        read: the layers that have run.
    """

    wanted: list[Wanted]
    places: Places
    size: int
    text: torch.Tensor | None = None
    grids: dict[str, tuple[int, int]] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)


class _Threads(threading.local):
    """Each thread's state: an object of its own, since torch.compile loses what is assigned to a `threading.local` itself."""

    def __init__(self) -> None:
        self.state = _State()


class DenoiserHooks:
    """Hooks on one denoiser that record its forwards inside `capture`; outside of it those that `opened` asks for. A thread
    records its own forwards alone.

    Attributes:
        denoiser: the model.
        modules: the attention modules that are read, by name.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        layers: tuple[str, ...] = (),
        opened: Callable[[Mapping[str, Any]], list[Wanted]] | None = None,
        closed: Callable[[], None] | None = None,
    ) -> None:
        """`opened` gets the arguments of a forward and says what is recorded of it; `closed` is called after one that was recorded.

        Raises `ModelError` for a denoiser that lavender cannot read.
        """
        self.denoiser = denoiser
        self.layout: Layout = layout_of(denoiser)
        self.modules = _choose(_attention_modules(denoiser, self.layout), layers)
        self._opened, self._closed = opened, closed
        self._signature = _signature_of(type(denoiser))
        self._threads = _Threads()
        self._handles: list[Any] = [
            denoiser.register_forward_pre_hook(_Hook(self._before), with_kwargs=True),
            denoiser.register_forward_hook(_Hook(self._after), always_call=True),
        ]
        if self.layout.level is not None:
            around = dict.fromkeys(map(self.layout.level, self.modules))
            for name in around:
                hook = _Hook(self._level(name))
                self._handles.append(denoiser.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_pre_hook(_Hook(self._enter(name))))
            self._handles.append(module.register_forward_hook(_Hook(self._leave), always_call=True))

    @property
    def attached(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    def remove(self) -> None:
        """Removes every hook. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def capture(
        self,
        word_weights: torch.Tensor,
        branch: Samples = slice(None),
        fused: bool = False,
        heads: bool | tuple[int, ...] = True,
        resolutions: tuple[int, ...] = (),
    ) -> Iterator[Recording]:
        """Records every forward of the denoiser inside the `with` block, in its thread, with weights of the caller's own.

        Args:
            word_weights: [B, W, N], each text token's share of each word (1 / tokens at a word's tokens for their mean).
            branch: the samples of the denoiser's batch that carry the caption; with classifier-free guidance the conditional
                ones.
            fused: whether one pass gives the attention's output together with the map, in place of the model's own call. It is
                faster; the denoiser's output is then equal up to rounding instead of bit-identical. Cross-attention only.
            heads: True keeps heads apart; False takes their mean, a tuple the mean of the heads with these numbers.
            resolutions: the longer sides, in places, of the grids whose layers are recorded; empty for all.

        Yields:
            The recording: forwards are kept apart.

        Raises:
            CaptureError: on leaving the block, when a layer recorded nothing in it.
        """
        if not self.attached:
            raise CaptureError("the patch was undone; call lavender.patch again")
        recording = Recording(word_weights, heads, fused=fused, resolutions=resolutions)
        before, self._threads.state.manual = self._threads.state.manual, (recording, branch)
        try:
            with self.unwinding():
                yield recording
        finally:
            self._threads.state.manual = before
        recording.require_layers(self.denoiser, self.modules)

    @contextmanager
    def unwinding(self) -> Iterator[None]:
        """Leaves this thread's state as it was before: of a forward that an interrupt ends, torch calls no hook."""
        state = self._threads.state
        num_forwards, num_readers = len(state.forwards), len(state.readers)
        try:
            yield
        finally:
            self.unwind(num_forwards, num_readers)

    def unwind(self, num_forwards: int = 0, num_readers: int = 0) -> None:
        """Ends the forwards of this thread, and the layers in them, but for so many."""
        state = self._threads.state
        del state.forwards[num_forwards:]
        while len(state.readers) > num_readers:
            state.readers.pop().__exit__(None, None, None)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module is not self.denoiser:
            return
        state = self._threads.state
        inputs = self._inputs(module, args, kwargs)
        try:
            wanted = [] if self._opened is None or state.manual is not None else self._opened(inputs)
        finally:  # the hook behind the forward runs in any case
            state.forwards.append(None)
        if state.manual is not None:
            wanted = [state.manual]
        if not wanted:
            return
        try:
            places = self._places(module, inputs, wanted)
        except Exception as error:  # whatever it is, see `Recording.lenient`
            for recording, _ in wanted:
                if not recording.lenient:
                    raise
                for name in self.modules:
                    recording.give_up(name, error)
            return
        for recording, _ in wanted:
            recording.num_forwards += 1
        is_projected = self.layout.level is None or getattr(self.denoiser.config, "encoder_hid_dim_type", None) not in _PASSED_ON
        text = None if is_projected else inputs["encoder_hidden_states"]
        state.forwards[-1] = _Forward(wanted, places, len(places.image_start), text)

    def _inputs(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A forward's arguments by name; none where it was called as its class does not say."""
        try:
            inputs = self._signature.bind(module, *args, **kwargs).arguments
        except TypeError:
            return {}
        named = dict(inputs)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                named |= named.pop(name, {})
        return named

    @property
    def is_running(self) -> bool:
        """Whether a forward of the denoiser runs in this thread."""
        return bool(self._threads.state.forwards)

    def _places(self, module: Any, inputs: Mapping[str, Any], wanted: Sequence[Wanted]) -> Places:
        """Where things stand in this forward. Raises `CaptureError` where it is known now that they cannot be read."""
        if "encoder_hidden_states" not in inputs:
            raise CaptureError(
                f"{type(module).__name__} was called in another way than its class's forward says, or without a text"
            )
        if torch.is_grad_enabled() and module.training and getattr(module, "is_gradient_checkpointing", False):
            raise CaptureError(
                "the denoiser checkpoints its gradient, whose second pass records nothing; call disable_gradient_checkpointing() "
                "on it, or record under torch.no_grad()"
            )
        if any(not recording.num_forwards for recording, _ in wanted):
            self.require_readable()  # better now than when a whole picture is drawn
        return places_of(self.layout, module, inputs)

    def require_readable(self) -> None:
        """Raises `CaptureError` with the remedy if an attention module is known not to call what is read."""
        for attention in self.modules.values():
            if hides_attention(attention):
                raise CaptureError(f"the attention cannot be read: {remedy_of(attention)}")

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        state = self._threads.state
        if module is self.denoiser and state.forwards and state.forwards.pop() is not None and self._closed is not None:
            self._closed()

    def _level(self, name: str) -> Any:
        def note_grid(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            forward = self._threads.state.current
            if forward is not None:
                features = args[0] if args else kwargs.get("hidden_states")
                if isinstance(features, torch.Tensor) and features.ndim == 4:
                    forward.grids[name] = (features.shape[-2], features.shape[-1])

        return note_grid

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, args: tuple) -> None:
            if self._threads.state.current is not None:
                reader = _CallReader(self._record, name, key_weight_of(module))
                reader.__enter__()
                self._threads.state.readers.append(reader)

        return enter

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._threads.state.readers:
            self._threads.state.readers.pop().__exit__(None, None, None)

    def _record(self, name: str, call: _Attention, text: torch.Tensor | None) -> torch.Tensor | None:
        """Records one layer's maps; the attention's output if it came with them. `text` is what became its keys, if it is known."""
        forward = self._threads.state.current
        assert forward is not None
        output = None
        for recording, samples in forward.wanted:
            try:
                self._require_own(name, forward, text)
                output = self._read(name, call, forward, recording, samples)
            except Exception as error:  # whatever it is, see `Recording.lenient`
                if not recording.lenient:
                    raise
                recording.give_up(name, error)
        forward.read.add(name)
        return output

    def _require_own(self, name: str, forward: _Forward, text: torch.Tensor | None) -> None:
        """Raises `CaptureError` if a layer's attention is not the one of this forward over the text that the denoiser was given."""
        if name in forward.read:
            raise CaptureError(
                f"{name} ran twice in one forward of the denoiser; which of them the picture is made of is not known"
            )
        if self.layout.order != "cross" or text is None:
            return
        if forward.text is None:
            forward.text = text
        if text is not forward.text and not (text.shape == forward.text.shape and torch.equal(text, forward.text)):
            raise CaptureError(f"{name} attends to another text than the denoiser was given: a processor or a hook exchanges it")

    def _read(self, name: str, call: _Attention, forward: _Forward, recording: Recording, samples: Samples) -> torch.Tensor | None:
        cross, places = self.layout.order == "cross", forward.places
        if name in recording.errors:
            return None
        grid = self._grid(name, call, forward)
        if recording.passes(name, grid):
            return None
        weights = recording.word_weights = recording.word_weights.to(call.query.device)
        heads = recording.head_weights(name, call.query.shape[1], call.query)
        output = None
        if recording.fused:
            if call.dropout_p or call.is_causal or call.enable_gqa or not cross:
                raise CaptureError(
                    f"{name} attends with dropout, causally, with grouped heads or to text and picture at once; capture it with "
                    "fused=False"
                )
            _require_columns(name, weights, call.key.shape[2])
            everywhere = weights.new_zeros(call.query.shape[0], *weights.shape[1:])
            everywhere[samples] = weights
            query, key, value = (as_attended(tensor) for tensor in (call.query, call.key, call.value))
            output, maps = column_attention(
                query, key, value, everywhere, mask=call.attn_mask, scale=call.scale, head_weights=heads
            )
            maps = maps[samples]
        else:
            call = call.of_samples(samples)
            query, mask, weights = self._image_rows(name, call, weights, places, samples)
            query, key = as_attended(query), as_attended(call.key)
            maps = column_maps(query, key, weights, mask=mask, scale=call.scale, head_weights=heads)
        frames, height, width = grid
        recording.add(name, maps.unflatten(-1, (frames, height, width) if frames > 1 else (height, width)))
        return output

    def _grid(self, name: str, call: _Attention, forward: _Forward) -> Grid:
        """The grid of an attention call's image tokens. Raises `CaptureError` where its queries are not the places of one."""
        grid, num_queries = forward.places.grid, call.query.shape[2]
        if self.layout.level is not None:
            around = self.layout.level(name)
            if around not in forward.grids:
                raise CaptureError(f"{name} ran outside of {around}, whose input has the picture's places")
            grid = (1, *forward.grids[around])
        expected = math.prod(grid) if self.layout.order == "cross" else forward.places.num_tokens
        if call.query.shape[0] != forward.size or num_queries != expected:
            raise CaptureError(
                f"{name} attends with {num_queries} queries for {call.query.shape[0]} samples; expected {expected} for "
                f"{forward.size}, of a grid of {grid[1]}x{grid[2]} places: whatever merges, drops or tiles tokens hides where they "
                "stand; switch it off to look"
            )
        return grid

    def _image_rows(
        self, name: str, call: _Attention, weights: torch.Tensor, places: Places, branch: Samples
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Of a joint attention, the queries that are image tokens, their mask, and the words' weights over all keys."""
        query, mask = call.query, call.attn_mask
        num_keys = call.key.shape[2]
        if self.layout.order == "cross":
            _require_columns(name, weights, num_keys)
            return query, mask, weights
        num_tokens = places.grid[0] * places.grid[1] * places.grid[2]
        starts = places.image_start[branch].to(query.device)
        after = num_keys - places.text_start - weights.shape[2]
        if query.shape[2] != num_keys or (self.layout.order == "image first" and after < 0):
            raise CaptureError(
                f"{name} has {query.shape[2]} queries and {num_keys} keys; expected a joint sequence of {num_tokens} image tokens "
                f"and {weights.shape[2]} text tokens"
            )
        # Text that a ragged sequence has no room for is padding, whose weights are zero.
        weights = F.pad(weights, (places.text_start, after))
        rows = starts[:, None] + torch.arange(num_tokens, device=query.device)
        query = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[(None,) * (4 - mask.ndim)].expand(len(rows), -1, -1, -1)
            mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        return query, mask, weights


def _signature_of(kind: type[nn.Module]) -> inspect.Signature:
    """Of a class's forward, or of the one that it hands its arguments on to."""
    for base in kind.__mro__:
        if "forward" in vars(base) and "encoder_hidden_states" in inspect.signature(vars(base)["forward"]).parameters:
            return inspect.signature(vars(base)["forward"])
    return inspect.signature(kind.forward)


def _require_columns(name: str, weights: torch.Tensor, num_keys: int) -> None:
    if weights.shape[2] != num_keys:
        raise CaptureError(f"{name} attends to {num_keys} text tokens, but the words' weights are for {weights.shape[2]}")


def _attention_modules(denoiser: nn.Module, layout: Layout) -> dict[str, nn.Module]:
    pattern = re.compile(layout.modules)
    return {name: module for name, module in denoiser.named_modules() if pattern.fullmatch(name)}


def _choose(modules: dict[str, nn.Module], layers: tuple[str, ...]) -> dict[str, nn.Module]:
    if not modules:
        raise ModelError("the denoiser has no attention module that reads the text")
    return {name: modules[name] for name in chosen_names(list(modules), layers)} if layers else modules
