"""U-Nets of Stable Diffusion 1.x and 2.x: text enters by the cross-attentions named `attn2`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class UNetFamily:
    """Where a U-Net keeps its cross-attention."""

    def attention_modules(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """Cross-attention modules by name, in the order in which they run."""
        return {name: module for name, module in denoiser.named_modules() if name.endswith(".attn2")}


FAMILY = UNetFamily()
