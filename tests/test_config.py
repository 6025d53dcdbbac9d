from __future__ import annotations

import dataclasses
import json
import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavender.config import (
    Aggregation,
    AlignmentConfig,
    Match,
    Norm,
    PartOfSpeech,
    Schedule,
    TeacherConfig,
    TrainingConfig,
    WordsConfig,
    fingerprint,
    from_dict,
    to_dict,
)
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


alignment_configs = st.builds(
    AlignmentConfig,
    weight=st.floats(0, 1e6),
    schedule=st.sampled_from(get_args(Schedule)),
    decay=st.floats(0, 100),
    layers=st.lists(st.integers(0, 99), unique=True).map(tuple),
    aggregation=st.sampled_from(get_args(Aggregation)),
    norm=st.sampled_from(get_args(Norm)),
)
words_configs = st.builds(
    WordsConfig,
    match=st.sampled_from(get_args(Match)),
    parts_of_speech=st.lists(st.sampled_from(get_args(PartOfSpeech))).map(tuple),
    tagger=st.just("en_core_web_sm"),
    exclude=st.lists(st.text()).map(tuple),
)


@given(st.one_of(teacher_configs, alignment_configs, words_configs))
def test_a_config_survives_json(config):
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


@given(teacher_configs, teacher_configs)
def test_fingerprints_differ_exactly_when_configs_do(one, other):
    assert (fingerprint(to_dict(one)) == fingerprint(to_dict(other))) == (one == other)


@pytest.mark.parametrize(
    ("cls", "values", "named"),
    [
        (TeacherConfig, {"inversion": "edict"}, "ddim, noise, null_text, flow"),
        (TeacherConfig, {"inversion_steps": 0}, "inversion_steps"),
        (TeacherConfig, {"timesteps": ()}, "timesteps"),
        (TeacherConfig, {"timesteps": (1000,)}, "timesteps"),
        (TeacherConfig, {"map_size": 0}, "map_size"),
        (TeacherConfig, {"guidance_scale": 0.5}, "guidance_scale"),
        (AlignmentConfig, {"weight": -1.0}, "weight"),
        (AlignmentConfig, {"rows": "writes"}, "predicts, reads"),
        (AlignmentConfig, {"aligner": "huge"}, "light, sim, deep, identity"),
        (AlignmentConfig, {"layers": (-1,)}, "layers"),
        (AlignmentConfig, {"layers": (2, 2)}, "twice"),
        (AlignmentConfig, {"aggregation": "product"}, "flow, learned, parallel"),
        (AlignmentConfig, {"norm": "layer"}, "instance, batch, group, identity"),
        (AlignmentConfig, {"norm": "group", "hidden_channels": 12}, "multiple of 8"),
        (AlignmentConfig, {"schedule": "cosine"}, "constant, linear, exponential, inverse"),
        (AlignmentConfig, {"weight": math.nan}, "weight"),
        (AlignmentConfig, {"decay": -1.0}, "decay"),
        (AlignmentConfig, {"distance": "kl"}, "normalization='sum'"),
        (AlignmentConfig, {"normalization": "softmax"}, "zscore, sum, minmax"),
        (WordsConfig, {"match": "stem"}, "exact, casefold, root"),
        (WordsConfig, {"match": "root"}, "spacy download"),
        (WordsConfig, {"parts_of_speech": ("noun",)}, "spacy download"),
        (WordsConfig, {"parts_of_speech": ("adverb",), "tagger": "x"}, "noun, adjective, verb"),
        (WordsConfig, {"min_coverage": 1.0}, "min_coverage"),
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


@pytest.mark.parametrize("cls", [TeacherConfig, AlignmentConfig, WordsConfig, TrainingConfig])
def test_configs_are_frozen(cls):
    config = cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
