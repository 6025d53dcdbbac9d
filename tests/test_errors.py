"""The border with third parties: what they raise about what a user gave is one line, a bug of lavender's is none."""

from __future__ import annotations

import json
import linecache
import mmap

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

import lavender.errors
from lavender.errors import DataError, ModelError, first_line, lacks_memory, reading


def test_what_libraries_raise_is_one_line_with_its_cause(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * 99)
    with (
        pytest.raises(ModelError, match=r"^cannot read it \(.+\); give another$") as raised,
        reading("cannot read it", "give another", ModelError),
    ):
        safe_open(path, framework="pt")
    assert isinstance(raised.value.__cause__, SafetensorError)
    for read in (
        lambda: json.loads("{"),
        lambda: json.loads("[" * 100_000),
        lambda: Tokenizer.from_str("{}"),
        lambda: torch.load(path, weights_only=True),
        lambda: np.load(path),
        lambda: mmap.mmap(-1, 0),
    ):
        with pytest.raises(DataError) as raised, reading("cannot read it", "give another"):
            read()
        assert raised.value.__cause__ is not None
        assert "\n" not in str(raised.value)


def test_bugs_and_ends_pass():
    code = "def bug(values):\n    return values['a']['b'] + 1\n"
    name = lavender.errors.__file__.replace("errors.py", "pretended.py")
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)
    space: dict = {}
    exec(compile(code, name, "exec"), space)
    for values in ({}, {"a": 7}, {"a": {"b": "x"}}):
        with pytest.raises((KeyError, TypeError)), reading("cannot read it", "give another"):
            space["bug"](values)
    for end in (KeyboardInterrupt, SystemExit, DataError("mine")):
        with pytest.raises(end if isinstance(end, type) else DataError) as raised, reading("cannot read it", "give another"):
            raise end
        assert "cannot read it" not in str(raised.value)


def test_lack_of_memory_is_told_as_such():
    for allocate in (
        lambda: torch.empty(10**15, dtype=torch.uint8),
        lambda: np.empty(10**15, np.uint8),
        lambda: bytearray(10**17),
    ):
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            allocate()
        assert lacks_memory(raised.value), raised.value
    assert lacks_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not lacks_memory(RuntimeError("shape '[2, 3]' is invalid for input of size 7"))
    with pytest.raises(DataError, match="not enough memory"), reading("cannot read it", "give another"):
        torch.empty(10**15, dtype=torch.uint8)


def test_first_lines():
    assert first_line(KeyError("nonsense")) == "KeyError: 'nonsense'"
    assert first_line(ValueError("a:\n  b\nc")) == "a: b"
    assert first_line(ValueError()) == "ValueError"
