"""What attention capture costs: time and memory beside attention without capture, and beside other ways to get the maps.

    python bench/attn_fusion.py [--device cuda|cpu] [--dtype DTYPE] [--shape NAME ...] [--provider NAME ...] [--json OUT.json]
    python bench/attn_fusion.py --dry-run      # every shape's kind and every provider once, small, without timing

Every provider first passes a correctness gate against float64: output, maps and the gradients of both together (attention without
capture: its output). One that fails is reported, is not timed, and makes the run end with status 1. Then providers take turns in
one run. `x sdpa` is the median of a round's ratios to `sdpa`, attention without capture by the fastest backend. Peak memory is what
one call adds. TFLOP/s and GB/s count the attention's own work (its matrix products; q, k, v, output and their gradients once),
whatever else a provider does.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from providers import CPU_SHAPES, CUDA_SHAPES, Case, Shape

from lavender.miniworld.report import environment

Row = dict[str, object]
PASSES = {"forward": False, "forward + backward": True}
SHORTEST_SAMPLE_S = 2e-3
"""A sample repeats its call until it lasts about this long: clocks and launches would drown a shorter one."""


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().double() - exact).norm() / exact.norm())


def failures(case: Case, names: list[str]) -> dict[str, str]:
    """Why a provider's results are wrong, of those whose are.

    Allowed is twice the error of eager attention in the same dtype, and one rounding.
    """
    exact_case = Case(case.shape, str(case.device), torch.float64, compiled=False)
    exact_case.tensors = tuple(t.detach().double().requires_grad_() for t in case.tensors)
    exact_case.output_gradient = case.output_gradient.double()
    exact = [t.detach() for t in exact_case.run(exact_case.eager, backward=True)]
    # Without capture only the output can be compared.
    allowed = [
        2 * relative_error(t, e) + torch.finfo(case.dtype).eps for t, e in zip(case.run(case.eager, True), exact, strict=True)
    ]
    labels = ("output", "maps", "gradient of q", "gradient of k", "gradient of v")
    found = {}
    for name in names:
        try:
            results = case.run(case.providers()[name], backward=name != "sdpa" and name not in case.forward_only)
        except Exception as error:  # whatever it is, the others are measured
            found[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            continue
        for label, ours, theirs, most in zip(labels, results, exact, allowed, strict=False):
            error = relative_error(ours, theirs)
            if not error <= most:
                found[name] = f"{label} is wrong by {error:.1e}, more than {most:.1e}"
    return found


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that a call takes on top of what was taken before it; None where it cannot be asked."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would hide the call's own
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def timer(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """A function that takes one sample, in milliseconds a call."""

    def sample(count: int) -> float:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(count):
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / count
        begin = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - begin) * 1e3 / count

    sample(2)  # warm-up
    count = max(1, round(SHORTEST_SAMPLE_S * 1e3 / sample(3)))
    return partial(sample, count)


def measure(case: Case, names: list[str], repeats: int) -> list[Row]:
    """Rows of one shape: provider and pass, times, ratio to `sdpa`, peak memory, achieved rates."""
    rows: list[Row] = []
    providers = case.providers()
    for label, backward in PASSES.items():
        calls = {name: partial(case.run, providers[name], backward) for name in names}
        samplers = {name: timer(call, case.device) for name, call in calls.items()}
        peaks = {name: peak_bytes(call, case.device) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(repeats):
            for name, sampler in samplers.items():
                times[name].append(sampler())
        flops, traffic = work(case, backward)
        for name in names:
            ordered = sorted(times[name])
            median = statistics.median(ordered)
            peak = peaks[name]
            rows.append(
                {
                    "shape": case.shape.name,
                    "pass": label,
                    "provider": name,
                    "median_ms": round(median, 4),
                    "p20_ms": round(ordered[len(ordered) // 5], 4),
                    "p80_ms": round(ordered[-1 - len(ordered) // 5], 4),
                    "x_sdpa": round(statistics.median(a / b for a, b in zip(times[name], times["sdpa"], strict=True)), 3),
                    "peak_mib": None if peak is None else round(peak / 2**20, 1),
                    "tflops": round(flops / median / 1e9, 3),
                    "gb_per_s": round(traffic / median / 1e6, 1),
                }
            )
    return rows


def work(case: Case, backward: bool) -> tuple[float, float]:
    """FLOPs and bytes of attention itself: two matrix products forward, five more backward."""
    s = case.shape
    products = (7 if backward else 2) * 2.0 * s.batch * s.heads * s.queries * s.keys * s.width * (0.5 if s.causal else 1.0)
    tensors = sum(t.numel() for t in case.tensors) + case.output_gradient.numel()
    return products, tensors * case.tensors[0].element_size() * (3.0 if backward else 1.0)


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the device reaches: TFLOP/s of a large matrix product, GB/s of a large copy."""
    size, numel = (8192, 2**28) if device.type == "cuda" else (1536, 2**25)
    matrix = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    source = torch.zeros(numel, device=device, dtype=dtype)
    product, target = torch.empty_like(matrix), torch.empty_like(source)
    multiply = timer(lambda: torch.mm(matrix, matrix, out=product), device)
    copy = timer(lambda: target.copy_(source), device)
    return {
        "tflops": round(2 * size**3 / min(multiply() for _ in range(5)) / 1e9, 3),
        "gb_per_s": round(2 * numel * source.element_size() / min(copy() for _ in range(5)) / 1e6, 1),
    }


def usable(case: Case, wanted: list[str] | None) -> list[str]:
    """The providers to compare, `sdpa` first; what is left out is said."""
    names = [name for name in case.providers() if not wanted or name in wanted or name == "sdpa"]
    for name in names:
        if reason := case.why_not(name):
            print(f"{case.shape.name}: {name} is left out: {reason}")
    names = [name for name in names if not case.why_not(name)]
    return names


def drop_failures(case: Case, names: list[str]) -> tuple[list[str], int]:
    wrong = failures(case, names)
    for name, reason in wrong.items():
        print(f"{case.shape.name}: {name} FAILS the gate: {reason}")
    return [name for name in names if name not in wrong], len(wrong)


def dry_run(shapes: list[Shape], wanted: list[str] | None) -> int:
    """Puts small versions of the shapes through every provider and the gate, on the CPU; how many failed."""
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    failed = 0
    for shape in shapes:
        case = Case(shape.tiny(), "cpu", torch.float16, compiled=False)
        right, wrong = drop_failures(case, usable(case, wanted))
        failed += wrong
        print(f"{shape.name}: right are {', '.join(right)}", flush=True)
    return failed


def draw(rows: list[Row], title: str, path: Path) -> None:
    """A bar for each provider and shape: its time relative to attention without capture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != "sdpa"))
    figure, axes = plt.subplots(2, 1, figsize=(max(8, 1.1 * len(shapes)), 8), sharex=True, layout="constrained")
    for ax, label in zip(axes, PASSES, strict=True):
        for place, name in enumerate(names):
            found = {row["shape"]: row["x_sdpa"] for row in rows if row["provider"] == name and row["pass"] == label}
            at = [i + (place - (len(names) - 1) / 2) * 0.8 / len(names) for i, shape in enumerate(shapes) if shape in found]
            ax.bar(at, [found[shape] for shape in shapes if shape in found], 0.8 / len(names), label=name)
        ax.axhline(1, color="black", linewidth=1)
        ax.set_yscale("log")
        ticks = (1, 1.5, 2, 3, 5, 10, 20)
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set_ylabel("time / attention without capture")
        ax.set_title(label, loc="left")
    axes[1].set_xticks(range(len(shapes)), shapes, rotation=25, ha="right")
    axes[0].legend(ncols=3, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="by default float32 on the CPU, and on cuda bfloat16, or float16 where the card has no bfloat16",
    )
    parser.add_argument("--shape", action="append", metavar="NAME", help="repeatable; every shape of the device by default")
    parser.add_argument("--provider", action="append", metavar="NAME", help="repeatable; every provider by default")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that are timed")
    parser.add_argument("--threads", type=int, default=1, help="threads on the CPU")
    parser.add_argument("--json", type=Path, help="where the figures go; a plot goes beside them as .png")
    parser.add_argument("--dry-run", action="store_true", help="check every provider on small shapes of both devices; time nothing")
    arguments = parser.parse_args()
    everything = {shape.name: shape for shape in (CUDA_SHAPES if arguments.device == "cuda" else CPU_SHAPES)}
    if arguments.dry_run:
        everything = {shape.name: shape for shape in (*CPU_SHAPES, *CUDA_SHAPES)}
    unknown = set(arguments.shape or ()) - set(everything)
    if unknown:
        parser.error(f"no shape {', '.join(sorted(unknown))} on {arguments.device}; there are {', '.join(everything)}")
    if arguments.repeats < 1:
        parser.error(f"--repeats is {arguments.repeats}; at least one round must be timed")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda was asked for, but torch sees no CUDA device")
    arguments.shape = [shape for name, shape in everything.items() if not arguments.shape or name in arguments.shape]
    return arguments


def default_dtype(device: torch.device) -> str:
    """What the device trains in."""
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"


def main() -> int:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.dry_run:
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            # Kernels then run on the CPU. Triton reads this when it is imported, which torch has done by now.
            os.environ["TRITON_INTERPRET"] = "1"
            os.execv(sys.executable, [sys.executable, *sys.argv])
        return 1 if dry_run(arguments.shape, arguments.provider) else 0
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or default_dtype(device))
    threads = f"{arguments.threads} thread" + ("s" if arguments.threads > 1 else "")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {threads}"
    reached = ceilings(device, dtype)
    print(
        f"{name}, {str(dtype)[6:]}: reaches {reached['tflops']} TFLOP/s in a matrix product, {reached['gb_per_s']} GB/s in a copy"
    )
    head = ("shape", "pass", "provider", "ms", "p20", "p80", "x sdpa", "MiB", "TFLOP/s", "GB/s")
    print("{:20} {:18} {:19} {:>9} {:>9} {:>9} {:>7} {:>8} {:>8} {:>7}".format(*head))
    rows: list[Row] = []
    failed = 0
    for shape in arguments.shape:
        case = Case(shape, arguments.device, dtype)
        names, wrong = drop_failures(case, usable(case, arguments.provider))
        failed += wrong
        for row in measure(case, names, arguments.repeats) if "sdpa" in names else []:
            rows.append(row)
            print("{:20} {:18} {:19} {:9.3f} {:9.3f} {:9.3f} {:7.3f} {!s:>8} {:8.3f} {:7.1f}".format(*row.values()), flush=True)
        del case
        torch.compiler.reset()
    if arguments.json:
        record = {
            "environment": environment(),
            "device": name,
            "dtype": str(dtype)[6:],
            "repeats": arguments.repeats,
            "ceilings": reached,
            "failed_the_gate": failed,
            "rows": rows,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
        draw(rows, f"Attention with word maps on {name}, {record['dtype']}", arguments.json.with_suffix(".png"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
