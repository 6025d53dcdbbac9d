"""Launches through the driver's API, with a library in the driver's place that writes down what it was asked for."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import types

import pytest
import torch

from lavender.kernels.cuda import driver as cuda
from lavender.kernels.cuda.driver import Driver, DriverError, Launch, Program, kernels
from lavender.kernels.cuda.nvrtc import CompileError

FAKE = r"""
#include <cstdio>
#include <cstring>
static char log_text[4096];
static int refused = 0;
template <class... T> static void note(const char* format, T... values) {
  const size_t used = strlen(log_text);
  snprintf(log_text + used, sizeof(log_text) - used, format, values...);
}
extern "C" {
const char* taken() { return log_text; }
void refuse(int status) { refused = status; log_text[0] = 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  note("retain %d\n", device);
  *context = (void*)0x4444444444;
  return 0;
}
int cuCtxSetCurrent(void* context) {
  note("enter %p\n", context);
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  note("load %.3s\n", (const char*)image + 1);
  *module = (void*)0x1111111111;
  return refused;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  note("get %p %s\n", module, name);
  *function = (void*)0x2222222222;
  return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  note("set %p %d %d\n", function, attribute, value);
  return 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void* stream, void** parameters, void** extra) {
  note("launch %p %u %u %u %u %u %u %u %p %d\n", function, gx, gy, gz, bx, by, bz, shared, stream, extra == nullptr);
  note("first %p\n", *(void**)parameters[0]);
  return refused;
}
int cuGetErrorString(int status, const char** text) {
  *text = status == 209 ? "no kernel image is available for execution on the device" : nullptr;
  return 0;
}
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    (folder / "fake.cpp").write_text(FAKE)
    subprocess.run(["g++", "-shared", "-fPIC", str(folder / "fake.cpp"), "-o", str(folder / "fake.so")], check=True)
    loaded = ctypes.CDLL(str(folder / "fake.so"))
    loaded.taken.restype = ctypes.c_char_p
    return loaded


@pytest.fixture
def card(library, monkeypatch, tmp_path):
    """A V100, as far as torch and the driver's library say."""
    monkeypatch.setenv("LAVENDER_CACHE", str(tmp_path))
    library.refuse(0)
    stream = types.SimpleNamespace(cuda_stream=0x3333333333)
    monkeypatch.setattr(cuda, "_driver", lambda: library)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return library


PROGRAM = Program("row_maps", 64, True)
DEVICE = torch.device("cuda", 0)


def test_a_launch_as_the_driver_sees_it(card):
    driver, query = Driver(), torch.zeros(4)
    assert driver.why_not(PROGRAM, DEVICE) == []
    for _ in range(2):
        driver.launch(Launch(PROGRAM, "row_lse", (3, 2, 5), {"query": query, "num_heads": 7}, DEVICE))
    launch = f"launch 0x2222222222 3 2 5 256 1 1 {PROGRAM.shared_bytes} 0x3333333333 1\nfirst {hex(query.data_ptr())}\n"
    taken = card.taken().decode()
    assert taken.startswith("retain 0\nenter 0x4444444444\nload ELF\n")
    for kernel in kernels("row_maps"):  # a refusal must come before anything is launched
        assert taken.count(f"get 0x1111111111 {kernel}\nset 0x2222222222 8 {PROGRAM.shared_bytes}\nset 0x2222222222 9 100\n") == 1
    assert taken.count("load") == 1
    assert taken.endswith(2 * f"enter 0x4444444444\n{launch}")


def test_a_driver_that_refuses_gives_a_reason_once(card, caplog):
    driver = Driver()
    card.refuse(209)
    reason = "the CUDA driver refused cuModuleLoadData: no kernel image is available for execution on the device (status 209)"
    assert driver.why_not(PROGRAM, DEVICE) == [reason]
    assert driver.why_not(Program("row_maps", 128, True), DEVICE) == [reason]
    assert card.taken().decode().count("load") == 1  # not tried again
    assert [record.getMessage() for record in caplog.records] == [
        f"the CUDA C++ kernels of row_maps cannot run on cuda:0, and impl='auto' goes on without: {reason}"
    ]


def test_a_driver_without_memory_is_asked_again(card):
    driver = Driver()
    card.refuse(2)
    assert driver.why_not(PROGRAM, DEVICE) == ["the CUDA driver refused cuModuleLoadData: unknown error (status 2)"]
    card.refuse(0)
    assert driver.why_not(PROGRAM, DEVICE) == []


def test_a_launch_that_fails_raises(card):
    driver = Driver()
    assert driver.why_not(PROGRAM, DEVICE) == []
    card.refuse(1)
    with pytest.raises(DriverError, match=r"refused cuLaunchKernel: unknown error \(status 1\)"):
        driver.launch(Launch(PROGRAM, "row_lse", (1, 1, 1), {}, DEVICE))


def test_a_compiler_that_refuses_gives_a_reason(card, monkeypatch):
    def refuse(*arguments):
        raise CompileError("no NVRTC")

    monkeypatch.setattr(cuda, "cached_cubin", refuse)
    assert Driver().why_not(PROGRAM, DEVICE) == ["no NVRTC"]


def test_cards_without_tensor_cores_are_told(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (6, 1))
    assert Driver().why_not(PROGRAM, DEVICE) == ["compute capability 6.1 is below 7.0, where there are no tensor cores"]


def test_no_driver_at_all(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    cuda._driver.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(DriverError, match=r"the CUDA driver's library, does not load .*; install the card's driver"):
        cuda._driver()
