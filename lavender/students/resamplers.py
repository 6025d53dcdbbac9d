"""Image tokens made of many patches by learned queries: reading which patches each of them was made from."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ..errors import CaptureError, ModelError
from ..handle import PerThread
from ..kernels.checks import as_attended
from ..kernels.row_maps import row_maps
from ..types import WordRows
from .discovery import is_attention
from .registry import REQUEST, mask_of, require_supported


class Resamplers:
    """The resampler attention of one model: while one listens, every module's probabilities are kept, without gradient.

    Attributes:
        names: attention implementations whose registry entries must be tapped.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        if not modules:
            raise ModelError("the family names a resampler, but the model has none of its attention modules")
        self.modules = modules
        self.names = sorted({_implementation(module) for module in modules if is_attention(type(module))})
        self._shares: PerThread[dict[int, torch.Tensor] | None] = PerThread()

    def attach(self) -> list[Any]:
        """Adds the hooks and returns their handles."""
        handles: list[Any] = []
        for module in self.modules:
            if isinstance(module, nn.MultiheadAttention):
                handles.append(module.register_forward_hook(self._after_torch_attention, with_kwargs=True))
            elif is_attention(type(module)):
                handles.append(module.register_forward_pre_hook(self._before_attention, with_kwargs=True))
                if _implementation(module) == "eager":
                    handles.append(module.register_forward_hook(self._after_eager_attention))
            else:
                raise ModelError(
                    f"the resampler's {type(module).__name__} neither goes through transformers' attention registry nor is a "
                    "torch.nn.MultiheadAttention; lavender cannot read it"
                )
        return handles

    def start(self, listening: bool) -> None:
        """Begins a forward of this thread, whose recordings are kept if `listening`."""
        self._shares.put({} if listening else None)

    def stop(self) -> dict[int, torch.Tensor]:
        """Ends this thread's forward, and returns what was recorded: module number -> probabilities [P, Q, K]."""
        return self._shares.take() or {}

    def compose(self, maps: torch.Tensor, recorded: dict[int, torch.Tensor]) -> torch.Tensor:
        """Carries attention to image tokens [B, L, C, W, M] on to the patches that they were made from: [B, L, C, W, K].

        An image token's share of each patch is the mean over the resampler's heads and layers; its attention is divided by those
        shares.

        Raises `CaptureError` when a module recorded nothing, or there is not one picture per sample.
        """
        missing = [i for i in range(len(self.modules)) if i not in recorded]
        if missing:
            raise CaptureError(f"{len(missing)} of {len(self.modules)} resampler layers recorded nothing (numbers {missing})")
        shares = torch.stack([recorded[i] for i in range(len(self.modules))]).mean(dim=0)
        if shares.shape[0] != maps.shape[0] or shares.shape[1] != maps.shape[-1]:
            raise CaptureError(
                f"the resampler made {shares.shape[1]} tokens of each of {shares.shape[0]} pictures; the batch has {maps.shape[0]} "
                f"samples with {maps.shape[-1]} image tokens. Give one picture per sample"
            )
        return maps @ shares[:, None, None].to(maps)

    def record_call(
        self, name: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, arguments: dict[str, Any]
    ) -> None:
        """Answers the tap: probabilities [P, Q, K] of one call, the mean over heads."""
        num_images, heads, queries = query.shape[:3]
        every = torch.arange(queries, device=query.device).expand(num_images, -1)
        rows = WordRows(every, every, torch.ones(num_images, queries, device=query.device), queries)
        columns = torch.arange(key.shape[2], device=query.device).expand(num_images, -1)
        mask, causal = mask_of(name, module, query, key, mask, arguments)
        with torch.no_grad():
            shares = row_maps(
                as_attended(query),
                as_attended(key),
                rows,
                columns,
                mask=mask,
                causal=causal,
                scale=arguments.get("scaling"),
                head_weights=query.new_full((heads,), 1 / heads, dtype=torch.float32),
            )
        self._keep(module, shares[:, 0])

    def _keep(self, module: nn.Module, shares: torch.Tensor) -> None:
        kept = self._shares.get_at_work()
        if kept is not None:
            kept.setdefault(self.modules.index(module), shares)

    def _before_attention(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        return (args, {**kwargs, REQUEST: self}) if self._shares.get_at_work() is not None else None

    def _after_eager_attention(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._shares.get_at_work() is not None:
            self._keep(module, output[1].detach().float().mean(dim=1))

    def _after_torch_attention(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self._shares.get_at_work() is None:
            return
        bound = inspect.signature(nn.MultiheadAttention.forward).bind(module, *args, **kwargs).arguments
        bound = {name: value for name, value in bound.items() if name != "self"}
        # Once more, for the weights: the model's own call is left alone. Dropout would draw random numbers.
        dropout, module.dropout = module.dropout, 0.0
        try:
            with torch.no_grad():
                weights = type(module).forward(module, **{**bound, "need_weights": True, "average_attn_weights": True})[1]
        finally:
            module.dropout = dropout
        self._keep(module, weights.float())


def _implementation(module: Any) -> str:
    name: str = module.config._attn_implementation
    require_supported(name)
    return name
