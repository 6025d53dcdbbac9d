from __future__ import annotations

import collections.abc
import dataclasses
import itertools
import json
import math
import types
import typing
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavender.config import (
    Aggregation,
    AlignmentConfig,
    ExtractionConfig,
    Match,
    Norm,
    PartOfSpeech,
    Rows,
    Schedule,
    TeacherConfig,
    TrainingConfig,
    WordsConfig,
    fingerprint,
    from_dict,
    to_dict,
)
from lavender.errors import ConfigError
from lavender.extraction.extract import extract
from lavender.targets.manifest import StoreConfig
from lavender.targets.store import TargetWriter

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


layer_sets = st.lists(st.integers(0, 99), unique=True).map(tuple)
head_sets = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), unique=True, min_size=1, max_size=4)
heads = head_sets.map(lambda places: ",".join(f"{layer}.{head}" for layer, head in places))
best = st.integers(1, 999).map(lambda count: f"best:{count}")


def or_none(settings):
    try:
        return AlignmentConfig(**({"weight": 10.0, "aligner": "sim", "question_rows": None} | settings))
    except ConfigError:  # settings that do not go together
        return None


alignment_configs = (
    st.fixed_dictionaries(
        {
            "weight": st.floats(0, 1e6),
            "schedule": st.sampled_from(get_args(Schedule)),
            "decay": st.floats(0, 100),
            "layers": layer_sets | best,
            "aggregation": st.sampled_from(get_args(Aggregation)),
            "norm": st.sampled_from(get_args(Norm)),
        },
        optional={
            "until": st.floats(0.01, 1),
            "rows": st.sampled_from(get_args(Rows)),
            "heads": heads | best,
            "question_rows": st.sampled_from(get_args(Rows)),
            "question_layers": layer_sets | best,
            "question_heads": heads | best | st.just("mean"),
        },
    )
    .map(or_none)
    .filter(lambda config: config is not None)
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


@given(alignment_configs)
def test_settings_of_questions_are_the_answers_where_they_are_not_given(config):
    """Those of heads that are named are theirs alone: such heads name their layers."""
    of_answer, of_question = config.of_answer, config.of_question
    for reading in (of_answer, of_question):
        assert reading.of_question == reading.of_answer == reading
    for name in ("rows", "layers", "heads"):
        own = getattr(config, f"question_{name}")
        assert getattr(of_answer, name) == getattr(config, name)
        if own is not None:
            assert getattr(of_question, name) == own
        elif name != "layers" or "." not in (config.question_heads or ""):
            assert getattr(of_question, name) == getattr(config, name)
        else:
            assert of_question.layers == ()


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
        (AlignmentConfig, {"until": 0.0}, "until is 0.0"),
        (AlignmentConfig, {"until": 1.5}, "until is 1.5"),
        (AlignmentConfig, {"layers": "best:0"}, "layers is 'best:0'; give integers"),
        (AlignmentConfig, {"layers": "0,1"}, "layers is '0,1'; give integers"),
        (AlignmentConfig, {"question_layers": "best:"}, "question_layers is 'best:'"),
        (AlignmentConfig, {"question_layers": (1, 1)}, "question_layers is .*twice"),
        (AlignmentConfig, {"heads": "max"}, "heads is 'max'; give mean, best:K"),
        (AlignmentConfig, {"heads": "1"}, "heads is '1'; .*layer.head"),
        (AlignmentConfig, {"heads": "1.2,"}, "heads is '1.2,'"),
        (AlignmentConfig, {"heads": "-1.2"}, "heads is '-1.2'"),
        (AlignmentConfig, {"heads": "1.2, 01.2"}, "twice"),
        (AlignmentConfig, {"heads": 1.2}, "heads is 1.2; .*expected: str"),
        (AlignmentConfig, {"question_heads": "best:1.5"}, "question_heads is 'best:1.5'"),
        (AlignmentConfig, {"heads": "best:2", "aggregation": "flow"}, "heads is 'best:2' and aggregation 'flow'"),
        (
            AlignmentConfig,
            {"question_heads": "1.2", "aggregation": "parallel"},
            "question_heads is '1.2' and aggregation 'parallel'",
        ),
        (AlignmentConfig, {"heads": "1.2", "layers": "best:2"}, "the heads name their layers"),
        (AlignmentConfig, {"heads": "1.2,3.0", "layers": (1, 2)}, r"layers \(1, 2\) lacks \[3\]"),
        (AlignmentConfig, {"heads": "1.2", "question_layers": (0,)}, r"of questions' words.*lacks \[1\]"),
        (AlignmentConfig, {"question_rows": "writes"}, "predicts, reads, both, last"),
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


CONFIGS = [TeacherConfig, ExtractionConfig, AlignmentConfig, WordsConfig, TrainingConfig, StoreConfig]
VALUES = [
    "x", "", b"x", 0, 1, 3, -1, 10**400, 0.5, 1.5, 2.0, math.nan, math.inf, True, None, object(), Path("x"), {1}, iter([1]),
    [], [1], (1, 2), [1.5], ["a", "b"], ["a", 1], [True], [math.nan], [[1]], range(3), {}, {"a": 1}, {"a": object()}, {1: 2},
    np.int64(3), np.float32(1.5), np.bool_(True), np.arange(3), np.array(["a"]), torch.tensor(3), torch.tensor([1.5]),
]  # fmt: skip


def is_of_type(value, hint) -> bool:
    """Exactly: no subclass, and no number that is not finite."""
    origin, inner = typing.get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(is_of_type(value, option) for option in inner)
    if origin is tuple:
        return type(value) is tuple and all(is_of_type(item, inner[0]) for item in value)
    if origin is typing.Literal:
        return value in inner
    if origin is collections.abc.Mapping:
        return type(value) is dict and json.loads(json.dumps(value)) == value
    return type(value) is hint and (hint is not float or math.isfinite(value))


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_field_has_its_type_or_is_refused_by_name(cls):
    """Whatever is given: a config that exists can be written, read back, and compared."""
    hints = typing.get_type_hints(cls)
    for name, value in itertools.product(hints, VALUES):
        refusal = ""
        try:
            config = cls(**{name: value})
        except ConfigError as error:
            config, refusal = cls(), str(error)
        assert not refusal or (name in refusal and "\n" not in refusal), (name, value)
        assert all(is_of_type(getattr(config, field), own) for field, own in hints.items()), (name, value)
        assert from_dict(cls, to_dict(config)) == dataclasses.replace(config) == config


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (AlignmentConfig, {"weight": "x"}, "weight is 'x'; a value of another type was expected: float, finite"),
        (AlignmentConfig, {"weight": True}, "weight is True; .* expected: float"),
        (AlignmentConfig, {"weight": math.inf}, "weight is inf; .* expected: float, finite"),
        (AlignmentConfig, {"hidden_channels": 1.5}, r"hidden_channels is 1.5; .* expected: int$"),
        (AlignmentConfig, {"renormalize": 1}, "renormalize is 1; .* expected: bool"),
        (AlignmentConfig, {"layers": (0, True)}, r"layers is \(0, True\); .* expected: a list of int"),
        (AlignmentConfig, {"rows": None}, "rows is None; choose one of predicts, reads"),
        (WordsConfig, {"tagger": "x", "parts_of_speech": ["noun", "adverb"]}, "choose from noun, adjective, verb"),
        (TrainingConfig, {"aligner_learning_rate": "1e-4"}, "expected: float, finite or None"),
        (TrainingConfig, {"lora_targets": 5}, "lora_targets is 5; .* expected: a list of str or str"),
        (TrainingConfig, {"arguments": {"a": object()}}, "expected: Mapping of strings to JSON values"),
        (StoreConfig, {"map_size": "32"}, "map_size is '32'; .* expected: int"),
    ],
)
def test_a_value_of_another_type_is_named_with_the_one_expected(cls, values, message):
    with pytest.raises(ConfigError, match=message):
        cls(**values)
    with pytest.raises(ConfigError, match=message):
        from_dict(cls, values)


def test_what_means_the_same_is_the_same_config():
    assert AlignmentConfig(weight=np.float32(5), layers=range(3), renormalize=np.bool_(True)) == AlignmentConfig(
        weight=5.0, layers=(0, 1, 2), renormalize=True
    )
    assert type(AlignmentConfig(weight=5).weight) is float
    assert fingerprint(to_dict(AlignmentConfig(weight=5))) == fingerprint(to_dict(AlignmentConfig(weight=5.0)))
    assert TeacherConfig(layers="up_blocks", heads=3, timesteps=[51]) == TeacherConfig(
        layers=("up_blocks",), heads=(3,), timesteps=(51,)
    )
    assert ExtractionConfig(devices="cuda:0").devices == ("cuda:0",)
    assert TrainingConfig(lora_targets="q_proj").lora_targets == "q_proj"
    assert TrainingConfig(lora_targets=["q_proj"]).lora_targets == ("q_proj",)
    given = {"bf16": True}
    config = TrainingConfig(arguments=given)
    given["bf16"] = False
    assert config.arguments == {"bf16": True}


@pytest.mark.parametrize("wrong", [{"map_size": 8}, "noise", AlignmentConfig(weight=10.0, aligner="sim")])
def test_what_is_no_config_is_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match=f"config is a {type(wrong).__name__}; expected one of lavender's StoreConfig"):
        TargetWriter(tmp_path / "store", {"model": "m"}, wrong)
    with pytest.raises(ConfigError, match=r"config is a .*; expected one of lavender's TeacherConfig"):
        extract("no model is needed", [], tmp_path / "targets", wrong)
    with pytest.raises(ConfigError, match=r"work is a .*; expected one of lavender's ExtractionConfig"):
        extract("no model is needed", [], tmp_path / "targets", work=wrong)
