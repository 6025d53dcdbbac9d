from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavender.config import AlignmentConfig, TeacherConfig, TrainingConfig, fingerprint, from_dict, to_dict
from lavender.errors import ConfigError

teacher_configs = st.builds(
    TeacherConfig,
    inversion=st.sampled_from(["ddim", "noise"]),
    inversion_steps=st.integers(1, 50),
    timesteps=st.lists(st.integers(0, 999), min_size=1, max_size=4).map(tuple),
    layers=st.lists(st.text(max_size=5), max_size=2).map(tuple),
    guidance_scale=st.floats(1, 20),
    map_size=st.integers(1, 256),
    seed=st.integers(0, 2**31),
)


@given(teacher_configs)
def test_a_config_survives_json(config):
    assert from_dict(TeacherConfig, json.loads(json.dumps(to_dict(config)))) == config


@given(teacher_configs, teacher_configs)
def test_fingerprints_differ_exactly_when_configs_do(one, other):
    assert (fingerprint(to_dict(one)) == fingerprint(to_dict(other))) == (one == other)


@pytest.mark.parametrize(
    ("cls", "values", "named"),
    [
        (TeacherConfig, {"inversion": "null_text"}, "ddim, noise"),
        (TeacherConfig, {"inversion_steps": 0}, "inversion_steps"),
        (TeacherConfig, {"timesteps": ()}, "timesteps"),
        (TeacherConfig, {"timesteps": (1000,)}, "timesteps"),
        (TeacherConfig, {"map_size": 0}, "map_size"),
        (TeacherConfig, {"guidance_scale": 0.5}, "guidance_scale"),
        (AlignmentConfig, {"weight": -1.0}, "weight"),
        (AlignmentConfig, {"rows": "writes"}, "predicts, reads"),
        (AlignmentConfig, {"aligner": "huge"}, "sim, identity"),
        (AlignmentConfig, {"layers": (-1,)}, "layers"),
        (AlignmentConfig, {"normalization": "softmax"}, "zscore, minmax"),
        (TrainingConfig, {"steps": 0}, "steps"),
        (TrainingConfig, {"learning_rate": 0.0}, "learning_rate"),
        (TrainingConfig, {"lora_dropout": 1.0}, "lora_dropout"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_right(cls, values, named):
    with pytest.raises(ConfigError, match=named):
        cls(**values)


def test_an_unknown_setting_is_named():
    with pytest.raises(ConfigError, match="stepz"):
        from_dict(TrainingConfig, {"stepz": 3})


@pytest.mark.parametrize("cls", [TeacherConfig, AlignmentConfig, TrainingConfig])
def test_configs_are_frozen(cls):
    config = cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
