"""What `attn_fusion.py` compares: shapes of attention calls, and ways to get word maps out of them.

Every provider does the same work: attention's output, and one map per word, the mean over heads. Those of plain PyTorch are the
opponents: eager probabilities, the two tricks that come close (word rows recomputed, words as extra values), and FlexAttention.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from lavender.kernels.column_maps import api as column_module
from lavender.kernels.column_maps import column_attention
from lavender.kernels.dispatch import cuda_reasons, triton_reasons
from lavender.kernels.map_loss import map_loss
from lavender.kernels.map_loss.api import LONGEST_SIDE
from lavender.kernels.row_maps import api as row_module
from lavender.kernels.row_maps import row_maps
from lavender.types import WordRows
from lavender.words import collate_rows


@dataclass(frozen=True)
class Shape:
    """One attention call: B, H query and G key heads, T queries, N keys, D width.

    `words` W own `rows` query rows in all (rows orientation), or one key each (columns orientation). `grid` is the map's height and
    width: the first y * x keys (rows), or the queries (columns).
    """

    name: str
    orientation: str
    batch: int
    heads: int
    groups: int
    queries: int
    keys: int
    width: int
    words: int
    grid: tuple[int, int]
    rows: int = 0
    causal: bool = False

    def tiny(self) -> Shape:
        """The same kind of call, small enough for Triton's interpreter."""
        heads = max(1, 2 * self.groups // self.heads) if self.groups < self.heads else 2
        grid = (4, 4) if self.orientation == "rows" else (3, 6)
        queries, keys = (24, 24 if self.causal else 29) if self.orientation == "rows" else (18, min(self.keys, 33))
        rows = max(2, self.rows * queries // self.queries)
        words = max(1, min(self.words, rows, 4)) if self.rows else min(self.words, 4)
        return replace(self, batch=1, heads=2, groups=heads, queries=queries, keys=keys, words=words, grid=grid, rows=rows)


def self_attention(name: str, heads: int, groups: int, length: int, rows: int = 16, words: int = 16) -> Shape:
    return Shape(name, "rows", 1, heads, groups, length, length, 128, words, (24, 24), rows, causal=True)


def cross_attention(name: str, queries: int, keys: int, grid: tuple[int, int], rows: int = 16) -> Shape:
    return Shape(name, "rows", 1, 32, 8, queries, keys, 128, 16, grid, rows)


def text_attention(name: str, heads: int, side: int, width: int) -> Shape:
    return Shape(name, "columns", 2, heads, heads, side * side, 77, width, 8, (side, side))


CUDA_SHAPES = [
    cross_attention("mllama-cross", 512, 6404, (80, 80)),
    cross_attention("mllama-cross-tile", 512, 1601, (40, 40)),
    cross_attention("mllama-cross-2048", 2048, 6404, (80, 80), rows=128),
    self_attention("llama-self", 32, 8, 4096),
    self_attention("llava-self", 32, 32, 1024, rows=64),
    self_attention("llava-self-quarter", 32, 32, 1024, rows=256, words=64),
    self_attention("llava-self-every-row", 32, 32, 1024, rows=1024, words=64),
    text_attention("sd15-64", 8, 64, 40),
    text_attention("sd15-32", 8, 32, 80),
    text_attention("sd15-16", 8, 16, 160),
    text_attention("sd15-8", 8, 8, 160),
    text_attention("sdxl-64", 10, 64, 64),
    text_attention("sdxl-32", 20, 32, 64),
]
CPU_SHAPES = [
    self_attention("llava-self", 8, 8, 1024),
    cross_attention("mllama-cross", 256, 6404, (80, 80)),
    text_attention("sd15-64", 8, 64, 40),
    text_attention("sd15-32", 8, 32, 80),
    text_attention("sd15-16", 8, 16, 160),
    Shape("small-student", "rows", 16, 4, 2, 100, 100, 32, 8, (8, 8), 8, causal=True),
    Shape("small-teacher", "columns", 1, 2, 2, 256, 32, 16, 12, (16, 16)),
]

Result = tuple[torch.Tensor, torch.Tensor | None]
Provider = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Result]
"""q, k, v to attention's output [B, H, T, D] and the words' maps [B, 1, W, M]; without capture, None."""


class Case:
    """A shape with its inputs on a device, and its providers."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype, compiled: bool = True) -> None:
        self.shape, self.device, self.dtype = shape, torch.device(device), dtype
        self.maybe_compile = torch.compile if compiled else lambda function: function
        self.flex = self.maybe_compile(flex_attention)
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(device, dtype)

        s = shape
        self.tensors = (
            draw(s.batch, s.heads, s.queries, s.width).requires_grad_(),
            draw(s.batch, s.groups, s.keys, s.width).requires_grad_(),
            draw(s.batch, s.groups, s.keys, s.width).requires_grad_(),
        )
        self.output_gradient = draw(s.batch, s.heads, s.queries, s.width)
        self.target = torch.rand(s.batch, s.words, *s.grid, generator=generator).to(device)
        self.present = torch.ones(s.batch, s.words, dtype=torch.bool, device=device)
        self.head_weights = torch.full((s.heads,), 1 / s.heads, device=device)
        if s.orientation == "rows":
            # The last rows, dealt out to the words in runs of equal length.
            runs = torch.arange(s.queries - s.rows, s.queries).tensor_split(s.words)
            rows = collate_rows([[run.tolist() for run in runs]] * s.batch)
            self.rows = WordRows(rows.rows.to(device), rows.words.to(device), rows.weights.to(device), rows.num_words)
            self.indicator = self.rows.indicator(torch.float32)  # [B, W, R]
            self.columns = torch.arange(s.grid[0] * s.grid[1], device=device).expand(s.batch, -1)
        else:
            self.word_weights = torch.zeros(s.batch, s.words, s.keys, device=device)
            self.word_weights[:, torch.arange(s.words), torch.arange(s.words) + 1] = 1.0

    def run(self, provider: Provider, backward: bool) -> list[torch.Tensor]:
        """Output and maps; with `backward` also the gradients by q, k and v of output and alignment loss together."""
        with torch.set_grad_enabled(backward):
            output, maps = provider(*(self.tensors if backward else (t.detach() for t in self.tensors)))
            results = [output] if maps is None else [output, maps]
            if not backward:
                return results
            if maps is None:
                return [*results, *torch.autograd.grad(output, self.tensors, self.output_gradient)]
            loss = self.loss(provider, maps[:, 0].unflatten(-1, self.shape.grid))
            return [*results, *torch.autograd.grad((output, loss), self.tensors, (self.output_gradient, None))]

    def loss(self, provider: Provider, maps: torch.Tensor) -> torch.Tensor:
        """The normalized MSE: by `lavender` for its own providers (without a kernel for it by `torch`), plain for the others."""
        maps = maps * (maps.shape[-2] * maps.shape[-1])
        if getattr(provider, "impl", None):
            impl = "triton" if provider.impl == "triton" and max(self.shape.grid) <= LONGEST_SIDE else "torch"
            return map_loss(maps, self.target, self.present, impl=impl)
        centered = maps - maps.mean((-2, -1), keepdim=True)
        target = self.target - self.target.mean((-2, -1), keepdim=True)
        scaled = [m * (m.square().mean((-2, -1), keepdim=True) + 1e-6).rsqrt() for m in (centered, target)]
        return (scaled[0] - scaled[1]).square().mean()

    def providers(self) -> dict[str, Provider]:
        """Every provider that fits the shape, by name; `sdpa` is attention without capture."""
        rows = self.shape.orientation == "rows"
        found: dict[str, Provider] = {"sdpa": lambda q, k, v: (self.attend(q, k, v), None), "eager": self.eager}
        if rows:
            found["sdpa + rows again"] = self.rows_again
        elif self.fastest_backend() is None or self.shape.width % 8 == 0:
            found["sdpa + extra values"] = self.extra_values
        found["two flex calls"] = self.two_flex_rows if rows else self.two_flex_columns
        found["compiled eager"] = self.maybe_compile(self.eager)
        for impl in ("torch", "triton", "cuda"):
            found[impl] = self.lavender(impl)
        return found

    @property
    def forward_only(self) -> tuple[str, ...]:
        """Providers without a backward pass on this device."""
        return ("two flex calls",) if self.device.type == "cpu" else ()

    def why_not(self, name: str) -> str | None:
        """Why a provider cannot run on this device; None if it can."""
        if name == "triton":
            by_name = os.environ.get("TRITON_INTERPRET") == "1"
            widest = (row_module if self.shape.orientation == "rows" else column_module).WIDEST_FLOAT32
            reasons = triton_reasons(self.tensors[0], self.shape.width, widest, by_name)
            return "; ".join(reasons) or None
        if name == "cuda":
            file = "row_maps" if self.shape.orientation == "rows" else "column_maps"
            return "; ".join(cuda_reasons(file, self.tensors[0], self.shape.width, 1, by_name=False)) or None
        if name == "two flex calls" and self.device.type == "cpu" and self.maybe_compile is torch.compile:
            return "on the CPU FlexAttention has no backward pass and returns no log-sum-exp"
        return None

    def lavender(self, impl: str) -> Provider:
        options = {"head_weights": self.head_weights, "impl": impl}

        def rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Result:
            return self.attend(q, k, v), row_maps(q, k, self.rows, self.columns, causal=self.shape.causal, **options)

        def columns(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Result:
            return column_attention(q, k, v, self.word_weights, **options)

        provider = rows if self.shape.orientation == "rows" else columns
        provider.impl = impl  # type: ignore[attr-defined]
        return provider

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        options = {"is_causal": self.shape.causal, "enable_gqa": self.shape.heads != self.shape.groups}
        backend = self.fastest_backend()
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, **options)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    @cache  # noqa: B019 - a case lives as long as its measurements
    def fastest_backend(self) -> SDPBackend | None:
        """The SDPA backend that is fastest forward and backward here; None on the CPU, which has one."""
        if self.device.type != "cuda":
            return None
        times = {}
        options = {"is_causal": self.shape.causal, "enable_gqa": self.shape.heads != self.shape.groups}
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            try:
                with sdpa_kernel(backend):
                    for repeat in range(8):
                        if repeat == 3:
                            start.record()
                        output = F.scaled_dot_product_attention(*self.tensors, **options)
                        torch.autograd.grad(output, self.tensors, self.output_gradient)
                    end.record()
                end.synchronize()
                times[backend] = start.elapsed_time(end)
            except RuntimeError:  # "No available kernel" for this dtype, width or mask
                continue
        return min(times, key=times.__getitem__) if times else SDPBackend.MATH

    def eager(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Result:
        """Every probability, in the precision of the softmax that transformers' eager attention uses."""
        repeat = self.shape.heads // self.shape.groups
        keys, values = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = q @ keys.mT * q.shape[-1] ** -0.5
        if self.shape.causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
            scores = scores.masked_fill(~allowed, -torch.inf)
        wide = torch.promote_types(q.dtype, torch.float32)
        probabilities = scores.softmax(-1, dtype=wide).to(q.dtype)
        if self.shape.orientation == "rows":
            chosen = probabilities[:, :, self.rows.rows[0], : self.columns.shape[1]].to(wide).mean(1, keepdim=True)
            return probabilities @ values, self.indicator.to(wide)[:, None] @ chosen
        maps = self.word_weights.to(wide)[:, None] @ probabilities.to(wide).mean(1, keepdim=True).mT
        return probabilities @ values, maps

    def rows_again(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Result:
        """SDPA untouched; the words' rows once more, by plain operations."""
        groups = self.shape.groups
        rows = q[:, :, self.rows.rows[0]].unflatten(1, (groups, -1)).flatten(2, 3)  # [B, G, H / G * R, D]
        scores = (rows @ k.mT).float() * q.shape[-1] ** -0.5
        if self.shape.causal:
            allowed = torch.arange(k.shape[2], device=q.device) <= self.rows.rows[0][:, None]
            scores = scores.masked_fill(~allowed.repeat(self.shape.heads // groups, 1), -torch.inf)
        probabilities = scores.softmax(-1)[..., : self.columns.shape[1]]
        share = (self.indicator / self.shape.heads).repeat(1, 1, self.shape.heads // groups)
        return self.attend(q, k, v), (share[:, None] @ probabilities).sum(1, keepdim=True)

    def extra_values(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Result:
        """Words as extra columns of the values, everything padded to one width: output and maps from one SDPA call."""
        width, words = self.shape.width, self.shape.words
        pad = (width + words + 7) // 8 * 8 - width
        indicator = self.word_weights.mT[:, None].expand(-1, self.shape.heads, -1, -1).to(v.dtype)
        values = F.pad(torch.cat([v, indicator], -1), (0, pad - words))
        both = F.scaled_dot_product_attention(F.pad(q, (0, pad)), F.pad(k, (0, pad)), values, scale=width**-0.5)
        return both[..., :width], both[..., width : width + words].float().mT.mean(1, keepdim=True)

    def two_flex_rows(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Result:
        """The second call exchanges the roles: keys ask, word rows answer with their words, less the rows' own LSE.

        Its softmax runs over rows; its own log-sum-exp takes that normalization away again.
        """
        s = self.shape
        mask = _causal_block_mask(s.queries, str(self.device)) if s.causal else None
        wanted = AuxRequest(lse=True)
        output, more = self.flex(q, k, v, block_mask=mask, enable_gqa=s.heads != s.groups, return_aux=wanted)
        stacked = (s.batch, s.groups, s.heads // s.groups * s.rows)
        rows = q[:, :, self.rows.rows[0]].reshape(*stacked, s.width)
        row_lse = more.lse[:, :, self.rows.rows[0]].reshape(stacked)
        words = self.indicator.mT[:, None].repeat(1, s.groups, s.heads // s.groups, 1) / s.heads
        words = F.pad(words, (0, max(16, 1 << (s.words - 1).bit_length()) - s.words)).to(q.dtype)
        first = self.rows.rows[0]

        def less_lse(score, b, h, i, j):  # type: ignore[no-untyped-def]
            score = score - row_lse[b, h, j]
            return torch.where(i <= first[j % s.rows], score, -float("inf")) if s.causal else score

        shares, more = self.flex(k[:, :, : self.columns.shape[1]], rows, words, score_mod=less_lse, return_aux=wanted)
        maps = shares.float()[..., : s.words] * more.lse.exp()[..., None]
        return output, maps.sum(1, keepdim=True).mT

    def two_flex_columns(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Result:
        """The second call has the words for values."""
        s = self.shape
        words = self.word_weights.mT[:, None].expand(-1, s.heads, -1, -1).to(q.dtype)
        words = F.pad(words, (0, max(16, 1 << (s.words - 1).bit_length()) - s.words))
        return self.flex(q, k, v), self.flex(q, k, words)[..., : s.words].float().mT.mean(1, keepdim=True)


@cache
def _causal_block_mask(length: int, device: str) -> object:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)
