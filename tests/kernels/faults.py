"""Faults planted in the CUDA C++ kernels, and the calls that must catch them when the emulator runs them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lavender.kernels.column_maps import column_attention
from lavender.kernels.cuda import driver
from lavender.kernels.row_maps import row_maps

from .budget import DEVICE, WORDS, check_columns, check_rows, collate, draw
from .emulator import Emulator, whole

HALF = torch.float16


def rows_probe() -> None:
    words = [[[w, w + 1] for w in range(35)]]
    check_rows("cuda", HALF, heads=(4, 2), length=40, keys=150, num_columns=140, width=16, weighted=True, words=words)


def columns_probe() -> None:
    check_columns("cuda", HALF, queries=70, width=16, weighted=True)
    check_columns("cuda", HALF, queries=70, keys=100, width=16)
    check_columns("cuda", HALF, queries=20, keys=200, width=16, has_value=False)


def large_logits_probe() -> None:
    """Scores of several hundred: what a softmax without its largest score taken off overflows at."""
    query, key, value = draw(1, (1, 2, 20, 40), (1, 2, 77, 40), (1, 2, 77, 40), dtype=HALF)
    weights = torch.rand(1, 3, 77, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = column_attention(query * 60, key, value, weights, impl="cuda")
    exact = column_attention((query * 60).double(), key.double(), value.double(), weights, impl="reference")
    for one, other in zip(results, exact, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=2e-3, atol=2e-3)
    columns = torch.arange(77, device=DEVICE)[None]
    rows = [row_maps(*pair, collate(WORDS[:1]), columns, impl=impl) for pair, impl in (
        ((query * 60, key), "cuda"), (((query * 60).double(), key.double()), "reference"))]  # fmt: skip
    torch.testing.assert_close(rows[0].double(), rows[1], rtol=2e-3, atol=2e-3)


@dataclass(frozen=True)
class Fault:
    """A change of a file's text, the call that must fail of it, and the order in which the emulator runs threads."""

    probe: Callable[[], None]
    change: Callable[[str], str]
    seed: int = 0


def replaced(old: str, new: str) -> Callable[[str], str]:
    """Every place of `old` in a file's text becomes `new`; there must be one."""

    def change(text: str) -> str:
        if old not in text:  # no AssertionError, which counts as a fault that was caught
            raise ValueError(f"there is no {old!r} to plant a fault in")
        return text.replace(old, new)

    return change


def without(span: tuple[int, int]) -> Callable[[str], str]:
    """The text without what stands at `span`."""
    return lambda text: text[: span[0]] + text[span[1] :]


PLANTED = {
    "rows: an unmasked key": Fault(rows_probe, replaced("n >= call.num_keys || ", "")),
    "columns: an unmasked key": Fault(columns_probe, replaced("query.exists && n < call.num_keys", "query.exists")),
    "rows: no head weight": Fault(rows_probe, replaced("call.head_weights[h] * entry.weight", "entry.weight")),
    "columns: no head weight": Fault(columns_probe, replaced("by_words[j] * head_weight", "by_words[j]")),
    "rows: no delta": Fault(rows_probe, replaced("(wanted - delta)", "wanted")),
    "rows: dS not transposed": Fault(rows_probe, replaced("add<true, false>", "add<false, false>")),
    "rows: keys of another head": Fault(rows_probe, replaced("h / group != loaded", "loaded < 0")),
    "rows: columns read behind their end": Fault(rows_probe, replaced("m < call.num_columns ?", "m < 100000 ?")),
    "columns: maps written behind their end": Fault(columns_probe, replaced("if (i >= call.num_queries) return;", "")),
    "columns: keys read behind their end": Fault(columns_probe, replaced("start + n < call.num_keys ?", "true ?")),
    "a softmax without its maximum": Fault(
        large_logits_probe,
        replaced("sum.add(scores);", "sum.row_max = 0; for (float s : scores) sum.total += exp2f(s);"),
    ),
}
BARRIERS = {
    f"{file}: without barrier {number}": Fault(probe, without(match.span()), seed=1)
    for file, probe in (("row_maps", rows_probe), ("column_maps", columns_probe))
    for number, match in enumerate(re.finditer(r"__sync(threads|warp)\(\);", whole(file)))
}
"""Every barrier of the kernels, left out."""
FAULTS = PLANTED | BARRIERS


def outcome(name: str) -> str:
    """`caught` or `missed`, on the emulator."""
    fault, runner = FAULTS[name], driver.runner
    driver.runner = Emulator(fault=fault.change, seed=fault.seed)
    try:
        fault.probe()
    except AssertionError:
        return "caught"
    finally:
        driver.runner = runner
    return "missed"
