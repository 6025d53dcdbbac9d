"""Configs are read before a library takes them: whatever is wrong with one is one line that names the file and its model."""

from __future__ import annotations

import json
import os

import pytest

from lavender.errors import ModelError
from lavender.pretrained.configs import MOST_LAYERS, read_config
from lavender.pretrained.folders import require_regular_files


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is damaged"),
        (b'{"a": ', "is damaged"),
        (b"[]", "holds a list"),
        (b"7", "holds a int"),
        (b"null", "holds a NoneType"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (json.dumps({"text_config": {"num_hidden_layers": 10**9}}).encode(), "says num_hidden_layers 1e[+]09"),
        (json.dumps({"encoder_layers": -1}).encode(), "says encoder_layers -1"),
        (b'{"depth": 1' + b"0" * 5000 + b"}", "is damaged"),
    ],
)
def test_what_is_no_config(content, why, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"^the config.json of 'm' {why}.*; give ") as raised:
        read_config(path, "'m'")
    assert "\n" not in str(raised.value)


def test_a_config(tmp_path):
    path = tmp_path / "config.json"
    values = {"num_hidden_layers": MOST_LAYERS, "layer_types": ["full"], "hidden_size": 10**9, "use_layers": True}
    path.write_text(json.dumps(values))
    assert read_config(path, "'m'") == values
    path.unlink()
    path.mkdir()
    with pytest.raises(ModelError, match="cannot be read"):
        read_config(path, "'m'")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_in_a_model_are_refused_and_not_opened(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "linked").symlink_to("config.json")
    (tmp_path / "gone").symlink_to("nothing")
    require_regular_files(tmp_path)
    os.mkfifo(tmp_path / "vae" / "config.json")
    with pytest.raises(ModelError, match=r"vae/config\.json is a pipe"):
        require_regular_files(tmp_path)
