"""Presets, and settings changed by texts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lavender.cli.presets import PRESETS, preset
from lavender.cli.settings import override
from lavender.config import AlignmentConfig, TeacherConfig, TrainingConfig, WordsConfig
from lavender.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_sound_in_both_precisions(name):
    found = preset(name)
    for precision, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        training = found.in_precision(precision).training
        assert training.dtype == (dtype if training.lora_rank else "float32")
        assert training.arguments[precision] is True
        assert not (training.arguments["bf16"] and training.arguments["fp16"])
        assert training.arguments.items() >= found.training.arguments.items()
    assert found.in_precision("bf16").alignment == found.alignment


def test_the_published_preset_has_the_published_settings():
    found = preset("llama-3.2-11b-vision-lora")
    training = found.training
    assert (training.lora_rank, training.lora_alpha, training.lora_dropout) == (8, 32, 0.05)
    assert training.lora_targets == ("q_proj", "v_proj")
    assert (training.learning_rate, found.alignment.weight, found.alignment.aligner) == (1e-4, 10, "sim")
    assert found.alignment.aggregation == "project_mean"


def test_settings_are_changed_by_texts():
    found = preset("small-world").with_settings(
        [
            "alignment.schedule=linear",
            "alignment.layers=[1, 3]",
            "words.match=exact",
            "training.arguments.bf16=true",
            "training.steps=7",
        ]
    )
    assert found.alignment == replace(preset("small-world").alignment, schedule="linear", layers=(1, 3))
    assert found.words == WordsConfig(match="exact")
    assert (found.training.steps, found.training.arguments) == (7, {"bf16": True})
    assert override(TrainingConfig(), ["learning_rate=2e-5"]).learning_rate == 2e-5
    assert override(TrainingConfig(), ["freeze_student=false"]).freeze_student is False
    assert override(TrainingConfig(), ["lora_targets=.*q_proj"]).lora_targets == ".*q_proj"
    assert override(TrainingConfig(), ['lora_targets=["q_proj"]']).lora_targets == ("q_proj",)
    assert override(WordsConfig(), ["exclude=red"]).exclude == ("red",)
    assert override(WordsConfig(), ['exclude=["red", "blue"]']).exclude == ("red", "blue")
    assert override(WordsConfig(), ["exclude=red, blue", "roles=question,answer"]) == WordsConfig(
        exclude=("red", "blue"), roles=("question", "answer")
    )
    assert override(AlignmentConfig(), ["layers=1,3"]).layers == (1, 3)
    assert override(TrainingConfig(), ["lora_targets=.*(q|v){1,2}_proj"]).lora_targets == ".*(q|v){1,2}_proj"
    assert override(WordsConfig(), ["exclude=red, blue"]).exclude == ("red", "blue")
    assert override(WordsConfig(), ["roles=question,answer"]).roles == ("question", "answer")
    assert override(TrainingConfig(), ["lora_targets=.*q.{1,2}"]).lora_targets == ".*q.{1,2}"
    lists = preset("small-world").with_settings(["alignment.question_layers=1,2", "alignment.layers= 3, 1", "words.roles=question"])
    assert (lists.alignment.question_layers, lists.alignment.layers, lists.words.roles) == ((1, 2), (3, 1), ("question",))
    assert preset("small-world").with_settings(["alignment.heads=3.1,0.2"]).alignment.heads == "3.1,0.2"
    assert override(TeacherConfig(layers=("a", "b")), ["layer_weights=0.5,1"]).layer_weights == (0.5, 1.0)
    chosen = preset("small-world").with_settings(["alignment.heads=best:8", "alignment.layers=best:2", "alignment.until=0.5"])
    assert (chosen.alignment.heads, chosen.alignment.layers, chosen.alignment.until) == ("best:8", "best:2", 0.5)
    one = preset("small-world").with_settings(["alignment.heads=3.10", "alignment.question_heads= 1.0", "alignment.layers=3"])
    assert (one.alignment.heads, one.alignment.question_heads, one.alignment.layers) == ("3.10", "1.0", (3,))
    for wrong, message in (
        ("alignment.heads=310", "heads is '310'; give mean, best:K"),
        ("alignment.heads=null", "heads is None"),
        ("steps=7", "expected alignment, training, words"),
        ("training.stepz=7", "stepz"),
        ("training.steps", "'training.steps' changes nothing"),
        ("training.steps=many", "steps is 'many'.*expected: int"),
        ("training.steps=1.5", "steps is 1.5.*expected: int"),
        ("training.freeze_student=False", "freeze_student is 'False'.*expected: bool"),
        ("training.arguments=5", "arguments is 5.*expected: Mapping"),
        ("training.arguments.a.b=5", "sets nothing"),
        ("alignment.layers=[1.5]", "layers is"),
        ("alignment.question_layers=1,last", "question_layers is '1,last'; give integers"),
        ("words.roles=question,user", "roles is .*choose from question, answer"),
        ("training.steps.x=1", "no settings below 'steps'"),
    ):
        with pytest.raises(ConfigError, match=message):
            preset("small-world").with_settings([wrong])
    with pytest.raises(ConfigError, match="small-world"):
        preset("large-world")
