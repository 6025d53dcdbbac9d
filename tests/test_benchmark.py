"""The benchmark's own claims: that every provider is right, what memory they take, and that wrong ones are found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import attn_fusion
import pytest
import torch
from providers import CPU_SHAPES, CUDA_SHAPES, Case

from lavender.kernels.cuda import driver as cuda

from .kernels.emulator import Emulator

BENCH = Path(__file__).parents[1] / "bench"


def run(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, BENCH / "attn_fusion.py", *arguments], capture_output=True, text=True)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@pytest.mark.full
def test_every_provider_is_right_on_every_shape():
    pytest.importorskip("triton")
    lines = run("--dry-run", "--device", "cpu").stdout.splitlines()
    # They take tensors of a card: `test_the_cuda_kernels_pass_the_gate` has the emulator.
    lines = [line for line in lines if "cuda is left out: the tensors are on cpu" not in line]
    assert len(lines) == len({shape.name for shape in (*CPU_SHAPES, *CUDA_SHAPES)})
    for line in lines:
        assert "two flex calls, compiled eager, torch, triton" in line


@pytest.mark.parametrize("shape", [CPU_SHAPES[0], CUDA_SHAPES[0], CPU_SHAPES[2]], ids=lambda shape: shape.name)
def test_the_cuda_kernels_pass_the_gate(shape, monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setattr(cuda, "runner", Emulator())
    assert attn_fusion.failures(Case(shape.tiny(), device, torch.float16, compiled=False), ["cuda"]) == {}


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory can be asked on Linux only")
def test_the_memory_of_capture():
    """(1, 32/8, 512, 6404, 128), 16 words: eager adds more than 1 GB to attention alone, `torch` at most 64 MB."""
    code = """
import json, torch
from functools import partial
from attn_fusion import peak_bytes
from providers import CUDA_SHAPES, Case

torch.set_num_threads(1)
case = Case(CUDA_SHAPES[0], "cpu", torch.float32)
s = case.shape
assert (s.batch, s.heads, s.groups, s.queries, s.keys, s.width, s.words) == (1, 32, 8, 512, 6404, 128, 16)
found = {}
for name in ("torch", "sdpa", "torch", "eager"):  # the first call of all pays for what is loaded late
    for backward in (False, True):
        found[f"{name} {backward}"] = peak_bytes(partial(case.run, case.providers()[name], backward), case.device)
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCH, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for backward in (False, True):
        alone = found[f"sdpa {backward}"]
        assert alone > 8e6  # its output
        assert found[f"torch {backward}"] - alone <= 64e6
        assert found[f"eager {backward}"] - alone > 1e9


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory can be asked on Linux only")
def test_alignment_hardly_adds_to_a_training_steps_memory(tmp_path):
    """1,024 text tokens, 6,404 keys: within 15 % of plain fine-tuning, where eager attention weights take a multiple."""
    path = tmp_path / "memory.json"
    command = [sys.executable, "training_memory.py", "--rounds", "1", "--json", str(path)]
    subprocess.run(command, cwd=BENCH, capture_output=True, check=True)
    found = {row["way"]: row["x_plain"] for row in json.loads(path.read_text())["rows"]}
    assert found.keys() == {"plain", "aligned, identity", "aligned, sim", "eager output_attentions"}
    assert max(found["aligned, identity"], found["aligned, sim"]) <= 1.15
    assert found["eager output_attentions"] > 2


def test_timings_are_written_with_their_ratios(tmp_path):
    path = tmp_path / "new" / "cpu.json"
    run("--device", "cpu", "--shape", "small-teacher", "--repeats", "3", "--json", str(path), "--provider", "torch")
    record = json.loads(path.read_text())
    assert [(row["provider"], row["pass"]) for row in record["rows"]] == [
        (provider, label) for label in ("forward", "forward + backward") for provider in ("sdpa", "torch")
    ]
    for row in record["rows"]:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert (row["x_sdpa"] == 1) == (row["provider"] == "sdpa")
    assert record["failed_the_gate"] == 0
    assert record["ceilings"]["tflops"] > 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_gate_finds_wrong_maps_and_gradients_and_errors():
    case = Case(CPU_SHAPES[0].tiny(), "cpu", torch.float32)
    output_of, eager = case.attend, case.eager

    def raises(q, k, v):
        raise RuntimeError("no kernel here")

    wrong = {
        "output": lambda q, k, v: (output_of(q, k, v) * 1.01, eager(q, k, v)[1]),
        "maps": lambda q, k, v: (output_of(q, k, v), eager(q, k, v)[1] * 1.01),
        "gradient": lambda q, k, v: (output_of(q, k, v), eager(q, k.detach(), v)[1]),
        "raises": raises,
        "right": eager,
    }
    case.providers = lambda: wrong
    found = attn_fusion.failures(case, list(wrong))
    assert set(found) == set(wrong) - {"right"}
    assert "maps is wrong" in found["maps"]
    assert "gradient of k" in found["gradient"]
    assert "no kernel here" in found["raises"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--shape", "sd3"), "no shape sd3 on cpu; there are llava-self"), (("--repeats", "0"), "at least one round")],
)
def test_misuse_is_a_clear_error(arguments, message):
    assert message in run("--device", "cpu", *arguments, expect=2).stderr
