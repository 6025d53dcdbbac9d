"""Reading word columns from a diffusers denoiser: hooks around attention modules, and a scoped look at the one call inside.

No attention processor is replaced, so LoRA, IP-Adapter, ControlNet, offloading and fused projections keep working and outputs
are bit-identical. While a module runs, a `TorchFunctionMode` sees its first `scaled_dot_product_attention` call and computes word
maps beside it; outside `capture` the hooks do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import CaptureError, ModelError
from ..kernels.column_maps import column_attention, column_maps
from ..kernels.map_loss import resample


@dataclass(frozen=True)
class LayerMaps:
    """Word maps of one cross-attention layer in one forward: `maps` is [B, H, W, y, x], `layer` the module's name."""

    layer: str
    maps: torch.Tensor


@dataclass(eq=False)
class Recording:
    """What the forwards inside one `capture` recorded, in the order in which the layers ran."""

    word_weights: torch.Tensor
    branch: slice
    fused: bool
    entries: list[LayerMaps] = field(default_factory=list)

    def mean(self, size: int) -> torch.Tensor:
        """Mean over heads, layers and forwards, each layer resampled to `size` x `size` first: [B, W, size, size]."""
        if not self.entries:
            raise CaptureError("nothing was recorded: run the denoiser inside `with patch.capture(...)`")
        resized = [resample(entry.maps.mean(dim=1), (size, size)) for entry in self.entries]
        return torch.stack(resized).mean(dim=0)


class _Spy(TorchFunctionMode):
    """Sees the attention call of one module; lives while that module runs."""

    def __init__(self, patch: TeacherPatch, name: str) -> None:
        super().__init__()
        self.patch, self.name, self.seen = patch, name, False

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # An IP-Adapter makes a second call with its picture's keys: the first one has the text's.
        if func is F.scaled_dot_product_attention and not self.seen:
            self.seen = True
            output = self.patch._record(self.name, _Attention(*args, **kwargs))
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


class TeacherPatch:
    """A patched text-to-image pipeline: what `lavender.patch(pipe)` returns for diffusers pipelines.

    Usable as a context manager. One patch serves one thread.

    Attributes:
        denoiser: the patched model, `pipe.unet`.
        layers: names of the cross-attention modules that are read.
    """

    def __init__(self, denoiser: nn.Module, family: Any, layers: tuple[str, ...] = ()) -> None:
        self.denoiser = denoiser
        modules = _chosen(family.attention_modules(denoiser), layers)
        self.layers = tuple(modules)
        self._recording: Recording | None = None
        self._spies: list[_Spy] = []
        self._grid: tuple[int, int] = (0, 0)
        self._handles: list[Any] = [denoiser.register_forward_pre_hook(self._before_denoiser, with_kwargs=True)]
        for name, module in modules.items():
            self._handles.append(module.register_forward_pre_hook(self._enter(name)))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    @property
    def is_patched(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    def unpatch(self) -> None:
        """Removes every hook. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> TeacherPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.unpatch()

    @contextmanager
    def capture(self, word_weights: torch.Tensor, branch: slice = slice(None), fused: bool = False) -> Iterator[Recording]:
        """Records the denoiser's forwards inside the `with` block.

        Args:
            word_weights: [B, W, N], each text token's share of each word (1 / tokens at a word's tokens for their mean).
            branch: the samples of the denoiser's batch that carry the caption; with classifier-free guidance the conditional
                half.
            fused: whether one pass gives the attention's output together with the map, in place of the model's own call. It is
                faster; the denoiser's output is then equal up to rounding instead of bit-identical.

        Raises:
            CaptureError: on leaving the block, when a layer recorded nothing in it.
        """
        recording = Recording(word_weights, branch, fused)
        self._recording = recording
        try:
            yield recording
        finally:
            self._recording = None
        missing = sorted(set(self.layers) - {entry.layer for entry in recording.entries})
        if missing:
            raise CaptureError(
                f"{len(missing)} of {len(self.layers)} cross-attention layers recorded nothing ({', '.join(missing[:3])}); "
                "switch off attention slicing and xformers, which do not call scaled_dot_product_attention"
            )

    def _before_denoiser(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        sample = kwargs["sample"] if "sample" in kwargs else args[0]
        self._grid = tuple(sample.shape[-2:])

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, args: tuple) -> None:
            if self._recording is not None:
                spy = _Spy(self, name)
                spy.__enter__()
                self._spies.append(spy)

        return enter

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._spies:
            self._spies.pop().__exit__(None, None, None)

    def _record(self, name: str, call: _Attention) -> torch.Tensor | None:
        """Records one layer's maps; the attention's output if it came with them."""
        recording = self._recording
        assert recording is not None
        branch, weights = recording.branch, recording.word_weights.to(call.query.device)
        output = None
        if recording.fused:
            if call.dropout_p or call.is_causal or call.enable_gqa:
                raise CaptureError(f"{name} attends with dropout, causally or with grouped heads; capture it with fused=False")
            everywhere = weights.new_zeros(call.query.shape[0], *weights.shape[1:])
            everywhere[branch] = weights
            output, maps = column_attention(call.query, call.key, call.value, everywhere, mask=call.attn_mask, scale=call.scale)
            maps = maps[branch]
        else:
            mask = call.attn_mask
            if mask is not None and mask.ndim == 4 and mask.shape[0] > 1:
                mask = mask[branch]
            maps = column_maps(call.query[branch], call.key[branch], weights, mask=mask, scale=call.scale)
        recording.entries.append(LayerMaps(name, maps.unflatten(-1, _layer_grid(self._grid, maps.shape[-1]))))
        return output


def _layer_grid(latent: tuple[int, int], num_queries: int) -> tuple[int, int]:
    """Height and width of a layer whose queries are the latent's places, halved some times (odd sides round up)."""
    height, width = latent
    while height * width > num_queries:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != num_queries:
        raise CaptureError(f"{num_queries} queries are no halving of a latent of {latent[0]}x{latent[1]}")
    return height, width


def _chosen(modules: dict[str, nn.Module], layers: tuple[str, ...]) -> dict[str, nn.Module]:
    if not modules:
        raise ModelError("the denoiser has no cross-attention module")
    if not layers:
        return modules
    chosen = {name: m for name, m in modules.items() if any(fragment in name for fragment in layers)}
    if not chosen:
        raise ModelError(f"no cross-attention layer is named like {', '.join(layers)}; there are: {', '.join(modules)}")
    return chosen
