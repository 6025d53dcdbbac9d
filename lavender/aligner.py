"""From the student's attention to one map per word: the aligner, trained with the student and thrown away at inference."""

from __future__ import annotations

import torch
from torch import nn

from .config import AlignmentConfig
from .kernels.map_loss import map_loss


class Aligner(nn.Module):
    """The published `sim` aligner with `project_mean`: per layer three 3x3 convolutions and a 1x1, then the mean over layers.

    Heads are channels. Each 3x3 convolution (no bias) is followed by an instance norm (not affine) and ReLU6; the last 1x1
    convolution has a bias and a linear output, which `map_loss` normalizes. 27,681 parameters for 32 heads.
    """

    def __init__(self, num_heads: int, hidden_channels: int = 32) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = num_heads
        for _ in range(3):
            blocks += [
                nn.Conv2d(channels, hidden_channels, 3, padding=1, bias=False),
                nn.InstanceNorm2d(hidden_channels),
                nn.ReLU6(),
            ]
            channels = hidden_channels
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(channels, 1, 1))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """[K, L, H, y, x] to [K, y, x], for K words at once."""
        words, layers = maps.shape[:2]
        return self.blocks(maps.flatten(0, 1)).unflatten(0, (words, layers)).mean(dim=1).squeeze(1)


class Identity(nn.Module):
    """The plain mean over layers and heads: the alignment term then acts on the raw attention."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """[K, L, H, y, x] to [K, y, x]."""
        return maps.mean(dim=(1, 2))


class Alignment(nn.Module):
    """Aligner and alignment loss of one patched student; it lives in the model as `model.lavender`."""

    def __init__(self, config: AlignmentConfig, num_heads: int) -> None:
        super().__init__()
        self.config = config
        self.aligner: nn.Module
        if config.aligner == "identity":
            self.aligner = Identity()
        else:
            self.aligner = Aligner(num_heads, config.hidden_channels)

    def align(self, maps: torch.Tensor) -> torch.Tensor:
        """Raw maps [B, L, H, W, y, x] to one aligned map per word, [B, W, y, x], on the same grid."""
        batch, _, _, words, height, width = maps.shape
        # Attention sums to at most one over the grid: times its size, values are of order one and no epsilon dominates them.
        scaled = maps.permute(0, 3, 1, 2, 4, 5).flatten(0, 1) * (height * width)
        first = next(self.parameters(), scaled)
        return self.aligner(scaled.to(first.dtype)).unflatten(0, (batch, words))

    def forward(self, maps: torch.Tensor, targets: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """The unweighted alignment loss, a scalar.

        Args:
            maps: [B, L, H, W, y, x], the student's attention; for the identity aligner, H may be 1: their mean.
            targets: [B, W, y', x'], the teacher's maps on their own grid, to which the aligned ones are resampled.
            present: bool [B, W], which words have a target.
        """
        return map_loss(self.align(maps), targets, present, normalization=self.config.normalization)
