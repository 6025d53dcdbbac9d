"""What attention capture costs: its time beside attention without capture and beside eager attention.

    python bench/attn_fusion.py [--shape NAME ...] [--repeats N] [--threads N] [--json OUT]

Every provider first passes a correctness gate against float64; numbers of a provider that fails are not printed. Providers take
turns within one run, and medians are compared. `sdpa` is attention without capture: what every ratio is relative to.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from lavender.kernels.column_maps import column_maps
from lavender.kernels.row_maps import row_maps
from lavender.report import environment
from lavender.words import collate_rows

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Provider = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
ERROR_BUDGET = 1e-5
"""Largest relative L2 error against float64 that passes the gate, in float32."""


@dataclass(frozen=True)
class Shape:
    """One attention call: B, H query and G key heads, T queries, N keys, D width, W words, and the picture's columns."""

    name: str
    orientation: str
    batch: int
    heads: int
    groups: int
    queries: int
    keys: int
    width: int
    words: int
    columns: int


SHAPES = [
    Shape("llava-self", "rows", 1, 8, 8, 1024, 1024, 128, 16, 576),
    Shape("mllama-cross", "rows", 1, 32, 8, 256, 6404, 128, 16, 6404),
    Shape("sd15-64", "columns", 2, 8, 8, 4096, 77, 40, 8, 77),
    Shape("sd15-32", "columns", 2, 8, 8, 1024, 77, 80, 8, 77),
    Shape("small-student", "rows", 16, 4, 2, 100, 100, 32, 8, 64),
    Shape("small-teacher", "columns", 1, 2, 2, 256, 32, 16, 12, 32),
]


def providers_of(shape: Shape) -> dict[str, Provider]:
    """Each provider maps q, k, v to the attention output and, but for `sdpa`, per-head word maps [B, H, W, M]."""
    causal = shape.orientation == "rows" and shape.queries == shape.keys
    grouped = shape.heads != shape.groups

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        repeat = shape.heads // shape.groups
        keys, values = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = q @ keys.mT * q.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(~torch.ones_like(scores[0, 0], dtype=torch.bool).tril(), -torch.inf)
        probabilities = scores.softmax(-1)
        return probabilities @ values, probabilities

    if shape.orientation == "rows":
        last = shape.queries - 1
        rows = collate_rows([[[last - w] for w in range(shape.words)]] * shape.batch)
        columns = torch.arange(shape.columns).expand(shape.batch, -1)

        def eager_maps(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            output, probabilities = eager(q, k, v)
            return output, rows.indicator(q.dtype)[:, None] @ probabilities[:, :, rows.rows[0], : shape.columns]

        def lavender_maps(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return attend(q, k, v), row_maps(q, k, rows, columns, causal=causal, impl="torch")

        return {"sdpa": lambda q, k, v: (attend(q, k, v), None), "eager": eager_maps, "torch": lavender_maps}

    weights = torch.zeros(shape.batch, shape.words, shape.keys)
    weights[:, torch.arange(shape.words), torch.arange(shape.words) + 1] = 1.0

    def eager_columns(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, probabilities = eager(q, k, v)
        return output, weights.to(q.dtype)[:, None] @ probabilities.mT

    def lavender_columns(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return attend(q, k, v), column_maps(q, k, weights, impl="torch")

    def extra_values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Words as extra columns of the values, everything padded to one width: output and maps in one SDPA call."""
        width = (q.shape[-1] + shape.words + 7) // 8 * 8
        indicator = weights.mT[:, None].expand(-1, shape.heads, -1, -1).to(v.dtype)
        padded = F.pad(torch.cat([v, indicator], -1), (0, width - q.shape[-1] - shape.words))
        pad = (0, width - q.shape[-1])
        both = F.scaled_dot_product_attention(F.pad(q, pad), F.pad(k, pad), padded, scale=q.shape[-1] ** -0.5)
        return both[..., : q.shape[-1]], both[..., q.shape[-1] : q.shape[-1] + shape.words].mT

    return {
        "sdpa": lambda q, k, v: (attend(q, k, v), None),
        "eager": eager_columns,
        "sdpa + extra values": extra_values,
        "torch": lavender_columns,
    }


def draw(shape: Shape, dtype: torch.dtype = torch.float32) -> Tensors:
    """Random q, k, v that need gradients."""
    generator = torch.Generator().manual_seed(0)
    sizes = (
        (shape.batch, shape.heads, shape.queries, shape.width),
        *((shape.batch, shape.groups, shape.keys, shape.width),) * 2,
    )
    q, k, v = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes)
    return q, k, v


def step(provider: Provider, tensors: Tensors, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        output, maps = provider(*tensors)
        if backward:
            loss = output.sum() if maps is None else output.sum() + maps.square().sum()
            torch.autograd.grad(loss, tensors)


def passes_gate(provider: Provider, shape: Shape) -> str | None:
    """Why a provider's output, maps or gradients are wrong; None when they are right."""
    exact, given = draw(shape, torch.float64), draw(shape)
    reference = providers_of(shape)["eager"]
    wanted, found = reference(*exact), provider(*given)
    pairs = [("output", found[0], wanted[0])]
    if found[1] is not None and wanted[1] is not None:
        pairs.append(("maps", found[1], wanted[1]))
        gradients = [torch.autograd.grad(m.square().sum(), t[:2]) for m, t in ((found[1], given), (wanted[1], exact))]
        pairs += [(f"gradient {i}", ours, theirs) for i, (ours, theirs) in enumerate(zip(*gradients, strict=True))]
    for name, ours, theirs in pairs:
        error = float((ours.detach().double() - theirs.detach()).norm() / theirs.detach().norm())
        if not error < ERROR_BUDGET:
            return f"{name} is wrong by {error:.1e}"
    return None


def measure(shape: Shape, repeats: int) -> list[dict[str, object]]:
    """Rows of one shape: provider, direction, milliseconds (median, p20, p80), ratio to `sdpa`."""
    usable: dict[str, Provider] = {}
    for name, provider in providers_of(shape).items():
        reason = passes_gate(provider, shape)
        if reason is None:
            usable[name] = provider
        else:
            print(f"{shape.name}: {name} fails the gate: {reason}")
    tensors, rows = draw(shape), []
    for backward in (False, True):
        times: dict[str, list[float]] = {name: [] for name in usable}
        for repeat in range(repeats + 1):
            for name, provider in usable.items():
                start = time.perf_counter()
                step(provider, tensors, backward)
                if repeat:
                    times[name].append((time.perf_counter() - start) * 1e3)
        for name in usable:
            ordered = sorted(times[name])
            ratios = [a / b for a, b in zip(times[name], times["sdpa"], strict=True)]
            rows.append(
                {
                    "shape": shape.name,
                    "provider": name,
                    "pass": "forward + backward" if backward else "forward",
                    "median_ms": round(statistics.median(ordered), 3),
                    "p20_ms": round(ordered[len(ordered) // 5], 3),
                    "p80_ms": round(ordered[-1 - len(ordered) // 5], 3),
                    "ratio": round(statistics.median(ratios), 3),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=[s.name for s in SHAPES], help="repeatable; every shape by default")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    print(f"{'shape':14} {'pass':18} {'provider':20} {'ms':>9} {'p20':>9} {'p80':>9} {'x sdpa':>7}")
    for shape in SHAPES:
        if arguments.shape and shape.name not in arguments.shape:
            continue
        for row in measure(shape, arguments.repeats):
            rows.append(row)
            print("{shape:14} {pass:18} {provider:20} {median_ms:9.3f} {p20_ms:9.3f} {p80_ms:9.3f} {ratio:7.3f}".format(**row))
    if arguments.json:
        record = {"environment": environment(), "device": "cpu", "threads": arguments.threads, "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
