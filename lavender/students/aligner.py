"""From the student's attention to one map per word: aggregation and aligner, trained with the student, thrown away at inference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..config import NORM_GROUPS, AlignmentConfig
from ..kernels.map_loss import map_loss
from ..kernels.row_maps import row_maps
from ..types import WordRows
from .channels import channels_of, num_channels
from .channels import keeps_heads as keeps_heads  # importable from here

NUM_CONVOLUTIONS = {"light": 2, "sim": 3, "deep": 5}
_POSITIVE = ("sum", "max")
"""Normalizations of maps that are not negative."""


class Aligner(nn.Module):
    """The published aligner G: 3x3 convolutions without bias, each followed by a norm and an activation, then a 1x1 with bias.

    Its output is linear, for `map_loss` to normalize; positive where the normalization needs that.
    """

    def __init__(self, config: AlignmentConfig, channels: int) -> None:
        super().__init__()
        hidden = config.hidden_channels
        norms: dict[str, Callable[[], nn.Module]] = {
            "instance": lambda: nn.InstanceNorm2d(hidden),
            "batch": lambda: nn.BatchNorm2d(hidden, affine=False),
            "group": lambda: nn.GroupNorm(NORM_GROUPS, hidden, affine=False),
            "identity": nn.Identity,
        }
        blocks: list[nn.Module] = []
        for _ in range(NUM_CONVOLUTIONS[config.aligner]):
            activation = nn.ReLU6(inplace=True) if config.activation == "relu6" else nn.LeakyReLU(0.1, inplace=True)
            blocks += [nn.Conv2d(channels, hidden, 3, padding=1, bias=False), norms[config.norm](), activation]
            channels = hidden
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(channels, 1, 1))
        if config.normalization in _POSITIVE:
            self.blocks.append(nn.Softplus())

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """[K, C, y, x] to [K, y, x]."""
        for block in self.blocks:
            maps = maps - maps if _norms_one_value(block, maps) else block(maps)
        return maps.squeeze(1)


def _norms_one_value(block: nn.Module, maps: torch.Tensor) -> bool:
    """Whether a block takes mean and variance of single values, which PyTorch refuses: what is left of one is zero."""
    if isinstance(block, nn.InstanceNorm2d):
        return maps[0, 0].numel() == 1
    return isinstance(block, nn.BatchNorm2d) and block.training and maps[:, 0].numel() == 1


class Identity(nn.Module):
    """The plain mean over channels: the alignment term then acts on the attention itself."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """[K, C, y, x] to [K, y, x]."""
        return maps.mean(dim=1)


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """What the parallel attention reads: the captured layers' inputs at the words' tokens and at the image tokens.

    Attributes:
        queries: [B, L, R, D].
        keys: [B, L, M, D].
        rows: the rows of `queries`, and the words that they speak for.
        columns: int64 [B, M], the rows of `keys`; -1 is padding.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    rows: WordRows
    columns: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Where they all are."""
        return self.queries.device


class ParallelAttention(nn.Module):
    """An auxiliary cross-attention from words to image tokens: per layer its own projections of the normalized hidden states."""

    def __init__(self, hidden_size: int, num_layers: int, num_heads: int, width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(hidden_size)
        self.queries, self.keys = (
            nn.ModuleList(nn.Linear(hidden_size, num_heads * width, bias=False) for _ in range(num_layers)) for _ in range(2)
        )

    def forward(self, states: HiddenStates) -> torch.Tensor:
        """Maps [B, L, H, W, M]; each row's softmax runs over its sample's image tokens."""
        dtype = self.norm.weight.dtype
        maps = []
        for layer, (to_query, to_key) in enumerate(zip(self.queries, self.keys, strict=True)):
            query, key = (
                project(self.norm(hidden[:, layer].to(dtype))).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for project, hidden in ((to_query, states.queries), (to_key, states.keys))
            )
            maps.append(row_maps(query, key, states.rows, states.columns, causal=False, renormalize=True))
        return torch.stack(maps, dim=1)


class Alignment(nn.Module):
    """Aggregation, aligner and alignment loss of one patched student; it lives in the model as `model.lavender`.

    Args:
        config: what is compared.
        num_layers: L, the number of captured layers.
        num_heads: H of the student's attention.
        hidden_size: width of its hidden states.
    """

    def __init__(self, config: AlignmentConfig, num_layers: int, num_heads: int, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        channels = channels_of(config, num_layers, num_heads)
        self.answer, self.question = channels.answer, channels.question
        self.aligner: nn.Module = Identity() if config.aligner == "identity" else Aligner(config, num_channels(config, num_heads))
        if config.aggregation == "learned":
            shapes = [
                (1, len(role.heads)) if role.heads else (num_layers if role.layers is None else len(role.layers), num_heads)
                for role in (self.answer, self.question)
            ]
            self.mixture = nn.Parameter(torch.zeros(shapes[0]))
            if self.question != self.answer:
                self.question_mixture = nn.Parameter(torch.zeros(shapes[1]))
        if config.aggregation == "parallel":
            self.parallel = ParallelAttention(hidden_size, num_layers, config.parallel_heads, config.parallel_width)

    def align(self, maps: torch.Tensor, present: torch.Tensor | None = None, questions: torch.Tensor | None = None) -> torch.Tensor:
        """Raw maps [B, L, H, W, y, x] to one aligned map per word, [B, W, y, x], on the same grid.

        Where words are not `present` (bool [B, W]), there are zeros, and they take no part in the norms' statistics. Words of
        `questions` (bool [B, W]) are read by the layers and heads of questions; the others, or all, by those of answers.
        """
        batch, _, _, words, height, width = maps.shape
        # Attention sums to at most one over the grid: times its size, values are of order one and no epsilon dominates them.
        scaled = maps.permute(0, 3, 1, 2, 4, 5).flatten(0, 1) * (height * width)
        apart = self.question != self.answer
        chosen = torch.ones(batch * words, dtype=torch.bool, device=maps.device) if present is None else present.flatten()
        asked = torch.zeros_like(chosen) if questions is None or not apart else questions.flatten() & chosen
        kept = (chosen & ~asked).nonzero().flatten()
        by_question = asked.nonzero().flatten()
        if not len(kept) + len(by_question):  # one map all the same: every process of a distributed run must use every weight
            kept = torch.zeros(1, dtype=torch.long, device=maps.device)
        groups = [self._aggregate(self.answer.of(scaled[kept]), getattr(self, "mixture", None))]
        if apart:  # also where there are none: their weights are used all the same
            groups.append(self._aggregate(self.question.of(scaled[by_question]), getattr(self, "question_mixture", None)))
        aligned = self._project(groups)
        places = torch.cat([kept, by_question])
        return aligned.new_zeros(batch * words, height, width).index_copy(0, places, aligned).unflatten(0, (batch, words))

    def _project(self, groups: list[torch.Tensor]) -> torch.Tensor:
        """Groups [K, L, C, y, x] to [sum of K, y, x]: by layer, or of all at once, then the mean or maximum over what is left.

        In one call of the aligner: its norms' statistics are those of all maps.
        """
        weight = next(self.aligner.parameters(), groups[0])
        flat = [group.flatten(0, 1).to(weight.dtype) for group in groups]
        # Attention is small and its differences smaller: no half precision but the weights' own.
        with torch.autocast(weight.device.type, enabled=False):
            if isinstance(self.aligner, Identity):  # of any number of channels
                projected = [self.aligner(maps) for maps in flat]
            else:
                projected = list(self.aligner(torch.cat(flat)).split([len(maps) for maps in flat]))
        by_layer = [maps.view(len(group), group.shape[1], *maps.shape[1:]) for maps, group in zip(projected, groups, strict=True)]
        largest = self.config.aggregation == "project_max"
        return torch.cat([maps.amax(dim=1) if largest else maps.mean(dim=1) for maps in by_layer])

    def _aggregate(self, maps: torch.Tensor, mixture: torch.Tensor | None) -> torch.Tensor:
        """[K, L, H, y, x] to what the aligner projects, [K, L or 1, C, y, x]."""
        match self.config.aggregation:
            case "mean_project":
                return maps.mean(dim=1, keepdim=True)
            case "max_project":
                return maps.amax(dim=1, keepdim=True)
            case "mean":
                return maps.mean(dim=(1, 2), keepdim=True)
            case "max":
                return maps.amax(dim=(1, 2), keepdim=True)
            case "flow":
                return attention_flow(maps)[:, None]
            case "learned":
                assert mixture is not None
                shares = mixture.flatten().softmax(dim=0).view_as(mixture).to(maps.dtype)
                return (maps * shares[..., None, None]).sum(dim=(1, 2), keepdim=True)
            case _:
                return maps

    def forward(
        self,
        source: torch.Tensor | HiddenStates,
        place: Callable[[torch.Tensor], torch.Tensor],
        targets: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
        questions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The alignment loss of every word, and the aligned maps.

        Args:
            source: the student's attention [B, L, H, W, M] as `Channels` records it, or for `parallel` its hidden states. Where
                heads are not needed, H may be 1: their mean.
            place: from attention by image token, [B, L, H, W, M], to maps [B, L, H, W, y, x]. It is called in here since sharded
                engines gather this module's weights at one `__call__`, and `parallel` needs them before attention is placed.
            targets: [B, W, y', x'], the teacher's maps on their own grid, to which the aligned ones are resampled.
            present: bool [B, W], which words have a target; with `targets`.
            questions: bool [B, W], which words are read by the layers and heads of questions; None for no word.

        Returns:
            [B, W], zero for absent words, or None without `targets`; and [B, W, y, x].
        """
        maps = place(self.parallel(source) if isinstance(source, HiddenStates) else source)
        aligned = self.align(maps, present, questions)
        if targets is None or present is None:
            return None, aligned
        config = self.config
        per_word = map_loss(
            aligned, targets, present, normalization=config.normalization, distance=config.distance, reduction="none"
        )
        return per_word, aligned


def attention_flow(maps: torch.Tensor) -> torch.Tensor:
    """The product over layers of [K, L, H, y, x], scaled to the mean 1: [K, H, y, x].

    Eight layers of small attention underflow; their logarithms do not: y x softmax over places of the sum of logarithms.
    """
    logarithms = maps.clamp_min(torch.finfo(maps.dtype).tiny).log().sum(dim=1)
    places = maps.shape[-2] * maps.shape[-1]
    return places * F.softmax(logarithms.flatten(-2), dim=-1).unflatten(-1, maps.shape[-2:])
