"""Compiling without a GPU, and the disk cache: NVRTC itself is real throughout."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lavender.errors import LavenderError
from lavender.kernels.cuda import nvrtc as module
from lavender.kernels.cuda.nvrtc import CompileError, Nvrtc, cache_folder, cached_cubin, find_nvrtc

SOURCE = """#include "factor.cuh"
extern "C" __global__ void scale(float* values) {
    values[threadIdx.x] *= FACTOR;
}
"""
HEADERS = {"factor.cuh": "#define FACTOR 3.0f\n"}
ROOT = Path(__file__).parents[2]

CHILD = f"""
import hashlib, logging, resource, signal, sys
from lavender.kernels.cuda import nvrtc
logging.basicConfig(format="WARNED %(message)s", level=logging.WARNING)
if sys.argv[1] == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
print("ready", flush=True)
sys.stdin.readline()
for name in sys.argv[2:]:
    print(hashlib.sha256(nvrtc.cached_cubin(name, {SOURCE!r}, {HEADERS!r}, [], 80)).hexdigest())
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Nothing found, nothing warned of, and an own cache."""
    monkeypatch.setattr(module, "_warned", False)
    monkeypatch.setenv("LAVENDER_CACHE", str(tmp_path / "cache"))
    find_nvrtc.cache_clear()
    yield
    find_nvrtc.cache_clear()


@pytest.fixture
def compiled(monkeypatch):
    """The architectures that were compiled for, in order."""
    calls = []
    original = Nvrtc.compile

    def counted(self, source, headers, options, architecture):
        calls.append(architecture)
        return original(self, source, headers, options, architecture)

    monkeypatch.setattr(Nvrtc, "compile", counted)
    return calls


def cubin(name="scale", source=SOURCE, headers=HEADERS, options=(), architecture=80):
    return cached_cubin(name, source, headers, options, architecture)


def entries():
    return sorted(cache_folder().iterdir())


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def touch(folder, *names):
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    return [str(folder / name) for name in names]


class Fake:
    def __init__(self, version, architectures):
        self.path, self.version, self.architectures = "/lib/libnvrtc.so", version, architectures

    def __str__(self):
        return f"NVRTC {self.version[0]}.{self.version[1]} ({self.path})"


# Compiling


@pytest.mark.parametrize("architecture", [70, 75, 80, 90])
def test_compiles_for_every_architecture(architecture):
    nvrtc = find_nvrtc(architecture)
    assert nvrtc.version >= (12, 0)
    assert architecture in nvrtc.architectures
    assert list(nvrtc.architectures) == sorted(nvrtc.architectures)
    code, log = nvrtc.compile(SOURCE, HEADERS, ["--ptxas-options=-v"], architecture)
    assert code[:4] == b"\x7fELF"
    # What the driver compares with its device: the low byte of e_flags, or the second in newer files.
    flags = int.from_bytes(code[48:52], "little")
    assert architecture in (flags & 0xFF, flags >> 8 & 0xFF)
    assert b"scale" in code
    assert f"sm_{architecture}" in log
    assert "registers" in log
    assert "spill" in log
    assert "\0" not in log


def test_the_log_is_empty_without_options():
    assert find_nvrtc(80).compile(SOURCE, HEADERS, [], 80)[1].strip() == ""


def test_options_and_headers_decide():
    nvrtc = find_nvrtc(80)
    plain = 'extern "C" __global__ void scale(float* values) { values[0] = FACTOR; }'
    assert nvrtc.compile(plain, {}, ["-DFACTOR=3.0f"], 80)[0] != nvrtc.compile(plain, {}, ["-DFACTOR=5.0f"], 80)[0]
    three, five = (nvrtc.compile(SOURCE, {"factor.cuh": f"#define FACTOR {n}.0f"}, [], 80)[0] for n in (3, 5))
    assert three != five
    with pytest.raises(CompileError, match="FACTOR"):
        nvrtc.compile(plain, {}, [], 80)


def test_headers_include_each_other():
    headers = {"outer.cuh": '#include "inner/most.cuh"', "inner/most.cuh": "using Real = float;"}
    source = '#include "outer.cuh"\nstatic_assert(sizeof(Real) == 4 && __cplusplus == 201703L);\n__global__ void kernel(Real*) {}'
    assert find_nvrtc(80).compile(source, headers, [], 80)[0][:4] == b"\x7fELF"


def test_a_syntax_error_is_told_with_its_line():
    source = "__device__ int unused() { int x; return 1; }\n\n\n__global__ void kernel(float* x) { x[0] = nonsense; }\n"
    with pytest.raises(CompileError) as caught:
        find_nvrtc(80).compile(source, {}, [], 80)
    assert isinstance(caught.value, LavenderError)
    first, second, *rest = str(caught.value).splitlines()
    assert "sm_80" in first
    assert "NVRTC_ERROR_COMPILATION" in first
    assert second.startswith("kernel.cu(4): error:")
    assert "nonsense" in second
    assert len(rest) < module.LOG_LINES


def test_a_long_log_is_cut_and_a_missing_header_named():
    with pytest.raises(CompileError) as caught:
        find_nvrtc(80).compile("\n".join(f"wrong{n} x{n};" for n in range(60)), {}, [], 80)
    assert len(str(caught.value).splitlines()) == 1 + module.LOG_LINES
    with pytest.raises(CompileError, match=r"kernel\.cu\(1\).*factor\.cuh"):
        find_nvrtc(80).compile(SOURCE, {}, [], 80)


def test_unknown_options_and_architectures_are_refused():
    with pytest.raises(CompileError, match="--no-such-option"):
        find_nvrtc(80).compile(SOURCE, HEADERS, ["--no-such-option"], 80)
    with pytest.raises(CompileError, match="sm_20"):
        find_nvrtc(80).compile(SOURCE, HEADERS, [], 20)


def test_programs_are_destroyed(monkeypatch):
    nvrtc = Nvrtc(find_nvrtc(80).path)
    library = nvrtc._library
    counts = {"nvrtcCreateProgram": 0, "nvrtcDestroyProgram": 0}

    class Counting:
        def __getattr__(self, name):
            if name in counts:
                counts[name] += 1
            return getattr(library, name)

    monkeypatch.setattr(nvrtc, "_library", Counting())
    nvrtc.compile(SOURCE, HEADERS, [], 80)
    with pytest.raises(CompileError):
        nvrtc.compile("wrong", {}, [], 80)
    assert counts == {"nvrtcCreateProgram": 2, "nvrtcDestroyProgram": 2}


# Finding


def test_an_unsupported_architecture_names_what_is_found():
    path = find_nvrtc().path
    with pytest.raises(CompileError, match="there is no NVRTC that compiles for sm_20") as caught:
        find_nvrtc(20)
    assert str(caught.value).count(f"({path}) compiles for") == 1
    assert "(libnvrtc.so.12) compiles for" not in str(caught.value)  # the same one again
    assert path in str(caught.value)
    assert "sm_80" in str(caught.value)
    assert "pip install" in str(caught.value)


def test_no_library_at_all_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "_candidates", lambda: [])
    for architecture in (None, 70, 80):
        with pytest.raises(CompileError, match="found: nothing; pip install nvidia-cuda-nvrtc-cu12"):
            find_nvrtc(architecture)


def test_volta_is_spoken_of_if_only_nvrtc_13_is_there(monkeypatch):
    monkeypatch.setattr(module, "_candidates", lambda: ["/lib/libnvrtc.so"])
    monkeypatch.setattr(module, "_opened", lambda path: Fake((13, 0), (75, 80, 90)))
    with pytest.raises(CompileError, match=r"NVRTC 13\.0 \(/lib/libnvrtc\.so\) compiles for sm_75, sm_80, sm_90") as caught:
        find_nvrtc(70)
    assert "Volta" in str(caught.value)
    assert "pip install nvidia-cuda-nvrtc-cu12" in str(caught.value)
    assert "CUDA 12.6" in str(caught.value)
    with pytest.raises(CompileError) as caught:
        find_nvrtc(120)
    assert "Volta" not in str(caught.value)
    assert "--upgrade" in str(caught.value)


def test_the_next_library_is_taken_if_the_first_will_not_do(monkeypatch):
    libraries = {"13": Fake((13, 0), (75, 80)), "12": Fake((12, 6), (70, 75, 80))}
    monkeypatch.setattr(module, "_candidates", lambda: ["13", "12"])
    monkeypatch.setattr(module, "_opened", libraries.__getitem__)
    assert find_nvrtc() is find_nvrtc(80) is libraries["13"]
    assert find_nvrtc(70) is libraries["12"]


def test_what_is_no_nvrtc_is_passed_over(monkeypatch, tmp_path):
    real = find_nvrtc(80).path
    find_nvrtc.cache_clear()
    broken = tmp_path / "libnvrtc.so.12"
    broken.write_text("no library")
    other = str(next(p for p in (Path(torch.__file__).parent / "lib").iterdir() if p.name.startswith("libc10.")))
    monkeypatch.setattr(module, "_candidates", lambda: [str(tmp_path / "absent"), str(broken), other, real])
    assert find_nvrtc(80).path == real
    with pytest.raises(CompileError) as caught:
        find_nvrtc(20)
    assert f"{broken} cannot be loaded" in str(caught.value)
    assert f"{other} cannot be loaded" in str(caught.value)


def test_candidates_are_searched_in_order(monkeypatch, tmp_path):
    site, home = tmp_path / "site", tmp_path / "cuda"
    (old,) = touch(site / "nvidia/cuda_nvrtc/lib", "libnvrtc.so.12")
    (new,) = touch(site / "nvidia/cu13/lib", "libnvrtc.so.13")
    touch(site / "nvidia/cublas/lib", "libcublas.so.12", "libnvrtc-builtins.so.12.6")
    for package in ("cu13", "cuda_nvrtc"):
        for name in ("libnvrtc.alt.so.13", "libnvrtc-builtins.so.13.0", "libnvrtc-builtins.alt.so.13.0", "libnvrtc_static.a"):
            (site / "nvidia" / package / "lib" / name).touch()
    (bundled,) = touch(site / "torch/lib", "libnvrtc-1ea278b5.so.12.2")
    (toolkit,) = touch(home / "lib64", "libnvrtc.so.12.8.93")
    for link in ("libnvrtc.so", "libnvrtc.so.12"):
        (home / "lib64" / link).symlink_to(toolkit)
    toolkit = str(home / "lib64/libnvrtc.so")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "absent"), str(tmp_path / "some.zip"), str(site)])
    monkeypatch.setattr(torch, "__file__", str(site / "torch/__init__.py"))
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("CUDA_PATH", str(home))

    monkeypatch.setattr(torch.version, "cuda", None)
    bare = ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so"]
    assert module._candidates() == [new, old, bundled, toolkit, *bare]
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert module._candidates() == [old, bundled, toolkit, new, *bare]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert module._candidates() == [new, old, bundled, toolkit, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    # Beside torch, even where sys.path does not lead.
    monkeypatch.setattr(sys, "path", [])
    assert module._candidates()[:2] == [new, old]


def test_builtins_of_the_same_folder_are_loaded_first(monkeypatch):
    path = Path(find_nvrtc(80).path)
    calls = []
    load = ctypes.CDLL

    def recorded(name, mode=ctypes.DEFAULT_MODE):
        calls.append((name, mode))
        return load(name, mode=mode)

    monkeypatch.setattr(ctypes, "CDLL", recorded)
    Nvrtc(str(path))
    builtins = [str(p) for p in sorted(path.parent.glob("libnvrtc-builtins.so*"))]
    assert builtins
    assert calls == [*((name, ctypes.RTLD_GLOBAL) for name in builtins), (str(path), ctypes.DEFAULT_MODE)]


# The cache


def test_the_folder(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache/cubins"
    monkeypatch.delenv("LAVENDER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/lavender/cubins"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home/.cache/lavender/cubins"


def test_a_hit_compiles_nothing(compiled, caplog):
    first = cubin()
    (entry,) = entries()
    assert entry.name.startswith("scale-sm80-")
    assert entry.suffix == ".cubin"
    assert len(entry.stem) == len("scale-sm80-") + 32
    assert entry.read_bytes() == hashlib.sha256(first).digest() + first
    before = entry.stat()
    assert cubin() == first
    assert compiled == [80]
    assert entries() == [entry]
    assert (entry.stat().st_ino, entry.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert warnings(caplog) == []


def test_what_changes_the_code_changes_the_key(compiled, monkeypatch):
    cubin()
    cubin(source=SOURCE + " ")
    cubin(headers={"factor.cuh": "#define FACTOR 4.0f\n"})
    cubin(headers={**HEADERS, "other.cuh": ""})
    cubin(options=["-DX"])
    cubin(options=["-DX", "-DY"])
    cubin(architecture=90)
    monkeypatch.setattr(find_nvrtc(80), "version", (12, 99))
    cubin()
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    cubin()
    assert len(compiled) == 9
    assert len(entries()) == 9
    cubin(headers=dict(reversed({**HEADERS, "z.cuh": ""}.items())))
    cubin(headers={**HEADERS, "z.cuh": ""})
    assert len(compiled) == 10


@pytest.mark.parametrize("damage", ["flipped", "truncated", "headless", "empty"])
def test_a_damaged_entry_is_replaced(damage, compiled, caplog):
    first = cubin()
    (entry,) = entries()
    data = entry.read_bytes()
    damaged = {
        "flipped": data[:100] + bytes([data[100] ^ 1]) + data[101:],
        "truncated": data[:-1],
        "headless": hashlib.sha256(b"").digest(),
        "empty": b"",
    }
    entry.write_bytes(damaged[damage])
    assert cubin() == first
    assert compiled == [80, 80]
    assert entries() == [entry]
    assert entry.read_bytes() == data
    (message,) = warnings(caplog)
    assert str(entry) in message
    assert "damaged" in message
    assert cubin() == first
    assert compiled == [80, 80]
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("place", ["parent is a file", "folder is a file", "proc", "folder is a dangling link"])
def test_a_folder_that_cannot_be_made_costs_one_warning(place, compiled, caplog, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    if place == "parent is a file":
        cache.write_text("mine")
    elif place == "folder is a file":
        touch(cache, "cubins")
    elif place == "proc":
        monkeypatch.setenv("LAVENDER_CACHE", "/proc/nothing")
    else:
        cache.mkdir()
        (cache / "cubins").symlink_to(tmp_path / "absent")
    before = sorted(tmp_path.rglob("*"))
    first = cubin()
    assert first[:4] == b"\x7fELF"
    assert cubin() == first
    assert cubin("other", architecture=90) != first
    assert compiled == [80, 80, 90]
    (message,) = warnings(caplog)
    assert str(cache_folder()) in message
    assert "LAVENDER_CACHE" in message
    assert any(reason in message for reason in ("Not a directory", "No such file", "File exists"))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_entry_that_cannot_be_read_or_replaced_costs_one_warning(compiled, caplog):
    first = cubin()
    (entry,) = entries()
    entry.unlink()
    entry.mkdir()
    assert cubin() == cubin() == first
    (message,) = warnings(caplog)
    assert "Is a directory" in message
    assert entries() == [entry]


def test_no_home_folder_costs_one_warning(compiled, caplog, monkeypatch, tmp_path):
    monkeypatch.delenv("LAVENDER_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.chdir(tmp_path)
    assert cubin() == cubin()
    assert compiled == [80, 80]
    (message,) = warnings(caplog)
    assert message.startswith("~/.cache/lavender/cubins cannot keep compiled kernels (there is no home folder)")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cubin()
    assert entries() == []
    cubin()
    assert len(entries()) == 1


def test_a_refused_source_leaves_nothing():
    with pytest.raises(CompileError):
        cubin(source="wrong")
    assert not cache_folder().exists()


def started(mode, *names):
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, mode, *names],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_full_disk_costs_one_warning():
    """A limit on files' sizes makes the write fail as a full disk does, after its first bytes."""
    process = started("full", "scale", "scale", "other")
    output, errors = process.communicate("\n")
    assert process.returncode == 0, errors
    assert output.split() == [hashlib.sha256(cubin()).hexdigest()] * 3
    (message,) = [line for line in errors.splitlines() if line.startswith("WARNED")]
    assert str(cache_folder()) in message
    assert "File too large" in message
    assert "LAVENDER_CACHE" in message
    assert [entry.name[:11] for entry in entries()] == ["scale-sm80-"]  # this process's own


def test_processes_share_a_fresh_cache():
    processes = [started("shared", "scale") for _ in range(2)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    (entry,) = entries()
    assert {output.strip() for output, _ in results} == {hashlib.sha256(entry.read_bytes()[32:]).hexdigest()}
    assert not any("WARNED" in errors for _, errors in results)
    assert entry.read_bytes()[32:] == cubin()
