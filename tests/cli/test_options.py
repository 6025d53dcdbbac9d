"""Options come from the configs: their choices, defaults and help, and what is left out keeps the default or the preset's."""

from __future__ import annotations

import inspect
import typing
from dataclasses import fields
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from lavender.cli import app
from lavender.cli.extract import _EXTRACTION, _TEACHER
from lavender.cli.options import PairOptions, flag_of, help_of, make_option, with_options
from lavender.cli.presets import preset
from lavender.config import AlignmentConfig, ExtractionConfig, TeacherConfig, TrainingConfig, WordsConfig
from lavender.data.sources import open_pairs
from lavender.errors import ConfigError

CONFIGS = [TeacherConfig, ExtractionConfig, AlignmentConfig, TrainingConfig, WordsConfig, PairOptions]


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_setting_has_a_sentence_of_help(cls):
    texts = help_of(cls)
    assert list(texts) == [field.name for field in fields(cls)]
    for name, text in texts.items():
        assert text.endswith("."), name
        assert len(text) <= 160, name


@pytest.fixture
def calls(monkeypatch):
    """What the commands call in place of the long runs, by name: the arguments."""
    calls = {}

    def record(name, result=None):
        return lambda *args, **kwargs: calls.setdefault(name, (args, kwargs)) and result

    summary = SimpleNamespace(written=1, present=0, failed=0)
    monkeypatch.setattr("lavender.data.sources.open_pairs", record("pairs", "pairs"))
    monkeypatch.setattr("lavender.extraction.extract.extract", record("extract", summary))
    monkeypatch.setattr("lavender.data.samples.read_samples", record("samples", []))
    monkeypatch.setattr("lavender.training.train.fine_tune", record("train"))
    return calls


def run(*arguments):
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


EXTRACT = ("extract", "--model", "m", "--data", "d", "--out", "o")
TRAIN = ("train", "--data", "d", "--out", "o")


def test_without_options_a_config_has_its_defaults(calls):
    run(*EXTRACT)
    assert calls["extract"][0][3:] == (TeacherConfig(), ExtractionConfig())
    assert calls["pairs"] == (("d",), {})
    run(*TRAIN, "--model", "m")
    (model, _, _, training), settings = calls["train"]
    assert (model, training) == ("m", TrainingConfig())
    assert (settings["alignment"], settings["words"]) == (AlignmentConfig(), WordsConfig())


def test_options_become_settings(calls):
    run(
        *(*EXTRACT, "--inversion", "noise", "--timesteps", "51, 7", "--layers", "a,b.c", "--heads", "0", "--image-size", "64"),
        *("--device", "cpu,cpu", "--engine", "local", "--set", "head_reduction=max", "--set", "threads=4"),
        *("--captions", "all", "--image-column", "photo"),
    )
    teacher, extraction = calls["extract"][0][3:]
    expected = {"inversion": "noise", "timesteps": (51, 7), "layers": ("a", "b.c"), "heads": (0,), "image_size": 64}
    assert teacher == TeacherConfig(**expected, head_reduction="max")
    assert extraction == ExtractionConfig(devices=("cpu", "cpu"), threads=4)
    assert calls["pairs"] == (("d",), {"captions": "all", "image_column": "photo"})


def test_a_preset_is_changed_only_by_options_that_were_given(calls):
    start = preset("small-world")
    assert start.training.learning_rate != TrainingConfig.learning_rate
    run(*TRAIN, "--preset", "small-world", "--rows", AlignmentConfig.rows, "--lora-rank", "4", "--no-gradient-checkpointing")
    (model, _, _, training), settings = calls["train"]
    assert model == start.model
    assert training.learning_rate == start.training.learning_rate
    assert (training.lora_rank, training.gradient_checkpointing) == (4, False)
    assert start.alignment.rows != settings["alignment"].rows == AlignmentConfig.rows  # a default that was given counts
    assert settings["alignment"].aligner == start.alignment.aligner


def test_settings_come_after_options(calls):
    run(*TRAIN, "--model", "m", "--steps", "3", "--layers", "0,2", "--set", "training.steps=4", "--set", "words.match=exact")
    (_, _, _, training), settings = calls["train"]
    assert training.steps == 4
    assert settings["alignment"].layers == (0, 2)
    assert settings["words"].match == "exact"


def test_layers_may_be_the_best_ones(calls):
    run(*TRAIN, "--model", "m", "--layers", "best:2", "--heads", "best:8", "--set", "alignment.question_layers=[]")
    alignment = calls["train"][1]["alignment"]
    assert (alignment.layers, alignment.heads, alignment.question_layers) == ("best:2", "best:8", ())
    with pytest.raises(ConfigError, match="layers is '1-3'; give integers"):
        run(*TRAIN, "--model", "m", "--layers", "1-3")


@pytest.mark.parametrize(
    ("command", "cls", "names"),
    [
        ("extract", TeacherConfig, _TEACHER),
        ("extract", ExtractionConfig, _EXTRACTION),
        ("extract", PairOptions, tuple(field.name for field in fields(PairOptions))),
        ("train", AlignmentConfig, ("weight", "rows", "layers", "heads", "aligner")),
        ("train", TrainingConfig, ("steps", "learning_rate", "gradient_checkpointing")),
        ("evaluate", AlignmentConfig, ("rows",)),
    ],
)
def test_help_shows_choices_defaults_and_sentences(command, cls, names):
    shown = " ".join(run(command, "--help").split())
    for name in names:
        assert f"{flag_of(name)} " in shown
        assert help_of(cls)[name] in shown
        hint, default = typing.get_type_hints(cls)[name], getattr(cls, name)
        if typing.get_origin(hint) is typing.Literal:
            assert f"<{'|'.join(typing.get_args(hint))}>" in shown
        if isinstance(default, int | float | str) and not isinstance(default, bool):
            assert f"{help_of(cls)[name]} [default: {default}]" in shown


def test_the_options_of_pairs_are_arguments_of_open_pairs():
    parameters = inspect.signature(open_pairs).parameters
    assert {name: parameters[name].default for name in list(parameters)[1:]} == {
        field.name: field.default for field in fields(PairOptions)
    }


def test_lists_of_integers():
    @with_options(teacher=(TeacherConfig, ("heads",)))
    def command(*, teacher):
        return teacher

    with pytest.raises(ConfigError, match="--heads is '0;1'; give integers separated by commas"):
        command(heads="0;1")
    option = make_option(ExtractionConfig, "devices")
    assert option.default is None
    assert flag_of("devices") == "--device"
