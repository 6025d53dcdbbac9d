"""Runs of several stages, runs that start from something, and the settings they start from."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lavender.config import PUBLISHED, AlignmentConfig, TrainingConfig
from lavender.data.samples import read_samples
from lavender.errors import ConfigError, DataError, ModelError, TargetError
from lavender.miniworld import write_dataset
from lavender.training.train import fine_tune, load_student

from .test_train import write_targets

pytestmark = pytest.mark.usefixtures("no_pictures")
TRAINING = TrainingConfig(steps=2, batch_size=4, learning_rate=1e-3, save_steps=2, warmup_steps=0, lora_dropout=0.0)


@pytest.fixture
def samples(scenes, tmp_path):
    return read_samples(write_dataset(scenes[:4], tmp_path / "data"))


@pytest.fixture
def targets(scenes, samples, tmp_path):
    return write_targets(tmp_path / "targets", scenes[:4], [s.id for s in samples])


@pytest.fixture
def train(student_folder, samples, targets, tmp_path):
    """Trains into a folder of the given name; returns the folder."""

    def run(name, training, **settings):
        settings = {"alignment": PUBLISHED} | settings
        fine_tune(student_folder, samples, tmp_path / name, training, targets=targets, progress=False, **settings)
        return tmp_path / name

    return run


def aligner_of(run):
    return load_file(run / "aligner.safetensors")


def adapter_of(run):
    return load_file(run / "adapter/adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_first_stage_trains_the_aligner_alone(train):
    """The second stage begins where the first one's aligner ended: without steps to speak of, it ends there too."""
    still = replace(TRAINING, learning_rate=1e-30)
    fresh = aligner_of(train("fresh", still))
    out = train("run", replace(still, aligner_steps=3, aligner_learning_rate=1e-2))
    first = aligner_of(out / "first_stage")
    assert not same(first, fresh)
    assert all(value.abs().max() < 1e-20 for name, value in adapter_of(out).items() if "lora_B" in name)
    assert not (out / "first_stage/adapter").exists()
    assert [entry["step"] for entry in json.loads((out / "first_stage/history.json").read_text())] == [2, 3]
    # The second stage trains it too, at its own rate.
    assert not same(aligner_of(out), first)
    alone = train("alone", replace(still, aligner_learning_rate=1e-30), aligner=out / "first_stage")
    for name, value in aligner_of(alone).items():
        torch.testing.assert_close(value, first[name], rtol=0, atol=1e-7)


def test_the_student_may_move_in_the_first_stage(train):
    training = replace(TRAINING, aligner_steps=2, freeze_student=False)
    out = train("run", training)
    first = adapter_of(out / "first_stage")
    assert any(value.any() for name, value in first.items() if "lora_B" in name)
    # What the second stage would be from this adapter and aligner.
    alone = train("alone", TRAINING, adapter=out / "first_stage/adapter", aligner=out / "first_stage")
    assert same(adapter_of(alone), adapter_of(out))
    assert same(aligner_of(alone), aligner_of(out))


def test_the_aligner_has_a_learning_rate_of_its_own(train):
    rates = {"both": None, "slow": 1e-30}
    runs = {name: train(name, replace(TRAINING, aligner_learning_rate=rate)) for name, rate in rates.items()}
    fresh = aligner_of(train("fresh", replace(TRAINING, learning_rate=1e-30)))
    moved = {name: sum(float((aligner_of(run)[key] - fresh[key]).abs().sum()) for key in fresh) for name, run in runs.items()}
    assert moved["both"] > 0.1
    assert moved["slow"] < 1e-6
    assert not same(adapter_of(runs["slow"]), adapter_of(runs["both"]))


def test_a_killed_second_stage_does_not_repeat_the_first(train, monkeypatch):
    training = replace(TRAINING, steps=4, aligner_steps=2)
    whole = train("whole", training)
    out = train("run", replace(training))
    for name in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(out / name)
    for name in ("history.json", "aligner.safetensors"):
        (out / name).unlink()
    stamp = (out / "first_stage/aligner.safetensors").stat().st_mtime_ns
    train("run", training)
    assert (out / "first_stage/aligner.safetensors").stat().st_mtime_ns == stamp
    assert same(adapter_of(out), adapter_of(whole))
    assert json.loads((out / "history.json").read_text()) == json.loads((whole / "history.json").read_text())


def test_full_fine_tuning_has_a_first_stage_too(student_folder, train):
    training = replace(TRAINING, lora_rank=0, aligner_steps=2, learning_rate=1e-4)
    out = train("run", training)
    assert not any("lavender" in name for name in load_file(out / "model/model.safetensors"))
    before, after = (load_student(folder)[0].state_dict() for folder in (student_folder, out / "model"))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert sum("language_model" in name and "self_attn.q_proj" in name for name in moved) == 4
    assert not (out / "first_stage/model").exists()


def test_a_run_starts_from_an_adapter_as_published(student_folder, train, tmp_path):
    """Rank 8 on q_proj and v_proj of text and vision, made by plain PEFT: without steps to speak of, the same comes out."""
    from peft import LoraConfig, get_peft_model

    student, _ = load_student(student_folder)
    torch.manual_seed(3)
    published = get_peft_model(student, LoraConfig(r=8, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "v_proj"]))
    for name, parameter in published.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    published.save_pretrained(tmp_path / "published")
    given = load_file(tmp_path / "published/adapter_model.safetensors")
    assert {"vision_tower" in name for name in given} == {True, False}
    out = train("run", replace(TRAINING, learning_rate=1e-30, lora_rank=4), adapter=tmp_path / "published")
    for name, value in adapter_of(out).items():
        torch.testing.assert_close(value, given[name], rtol=0, atol=1e-7)
    assert adapter_of(out).keys() == given.keys()
    assert json.loads((out / "adapter/adapter_config.json").read_text())["r"] == 8
    moved = train("moved", TRAINING, adapter=tmp_path / "published")
    assert not same(adapter_of(moved), given)


def test_adapters_and_aligners_that_do_not_fit_are_named(train, tmp_path):
    with pytest.raises(ModelError, match="cannot load a LoRA adapter"):
        train("a", TRAINING, adapter=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="lora_rank is 0"):
        train("a", replace(TRAINING, lora_rank=0), adapter=tmp_path / "nowhere")
    with pytest.raises(ModelError, match="LoRA cannot be added"):
        train("a", replace(TRAINING, lora_targets=("nope",)))
    with pytest.raises(ModelError, match="no aligner at"):
        train("b", TRAINING, aligner=tmp_path / "nowhere")
    out = train("c", TRAINING)
    with pytest.raises(ModelError, match="another AlignmentConfig"):
        train("d", TRAINING, aligner=out, alignment=AlignmentConfig(aligner="deep", weight=10.0))
    weights = adapter_of(out)
    weights.pop(min(weights))
    save_file(weights, out / "adapter/adapter_model.safetensors")
    with pytest.raises(ModelError, match="is damaged: it lacks 1 weights"):
        train("e", TRAINING, adapter=out / "adapter")


def test_a_first_stage_needs_something_to_train(train):
    with pytest.raises(ConfigError, match="has no weights that a first stage could train"):
        train("run", replace(TRAINING, aligner_steps=2), alignment=AlignmentConfig(aligner="identity", weight=10.0))


def test_samples_that_cannot_be_trained_on_are_named_first(student_folder, samples, tmp_path):
    with pytest.raises(DataError, match="no samples"):
        fine_tune(student_folder, [], tmp_path / "run", TRAINING)
    gone = [replace(sample, image=tmp_path / f"{n}.png") for n, sample in enumerate(samples)]
    with pytest.raises(DataError, match=r"no image at .*\.png"):
        fine_tune(student_folder, gone, tmp_path / "run", TRAINING)


def test_a_run_notices_other_pictures(train, samples, scenes, tmp_path):
    train("run", TRAINING)
    scenes[9].image.resize((80, 80)).save(samples[0].image)
    with pytest.raises(TargetError, match="another samples_sha256"):
        train("run", TRAINING)


def test_batches_that_are_cut_off_entirely_harm_no_weight(train):
    """Not even under the Trainer, which divides by the step's number of label tokens: none."""
    out = train("run", replace(TRAINING, max_length=72))
    assert all(value.isfinite().all() for value in (*adapter_of(out).values(), *aligner_of(out).values()))
    assert [entry["samples_cut_off"] for entry in json.loads((out / "history.json").read_text())] == [8]


def test_the_last_steps_are_logged_too(train):
    out = train("run", replace(TRAINING, steps=3, save_steps=10))
    assert [entry["step"] for entry in json.loads((out / "history.json").read_text())] == [3]


def test_a_first_stage_needs_targets(student_folder, samples, tmp_path):
    with pytest.raises(ConfigError, match="with targets only"):
        fine_tune(student_folder, samples, tmp_path / "run", replace(TRAINING, aligner_steps=2), progress=False)


def test_arguments_reach_transformers(train, tmp_path):
    arguments = {"save_total_limit": 1, "gradient_accumulation_steps": 2, "report_to": "tensorboard", "bf16": True, "use_cpu": True}
    out = train("run", replace(TRAINING, save_steps=1, arguments=arguments))
    assert [path.name for path in (out / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    assert list((out / "checkpoints").rglob("events.out.tfevents.*"))
    assert json.loads((out / "run.json").read_text())["training"]["arguments"] == arguments
    with pytest.raises(ConfigError, match=r"refuses the training's arguments.*no_such"):
        train("b", replace(TRAINING, arguments={"no_such": 1}))
    with pytest.raises(ConfigError, match="max_steps, set elsewhere: steps"):
        TrainingConfig(arguments={"max_steps": 3})


def test_lambda_is_constant_in_the_first_stage(train):
    """The schedule, and the end, are of the main one; a first stage that an older version began keeps its own."""
    alignment = AlignmentConfig(aligner="light", schedule="linear", until=0.5)
    training = replace(TRAINING, steps=4, aligner_steps=2, arguments={"logging_steps": 1}, save_steps=1)
    out = train("run", training, alignment=alignment)

    def weights(folder):
        return [entry["alignment_weight"] for entry in json.loads((folder / "history.json").read_text())]

    assert weights(out / "first_stage") == [1, 1]
    assert weights(out) == [1, 0.5, 0, 0]
    assert json.loads((out / "first_stage/run.json").read_text())["alignment"]["schedule"] == "constant"
    record = json.loads((out / "first_stage/run.json").read_text())
    record["alignment"] = json.loads((out / "run.json").read_text())["alignment"]
    (out / "first_stage/run.json").write_text(json.dumps(record))
    train("run", training, alignment=alignment)
    (out / "first_stage/history.json").unlink()
    train("run", training, alignment=alignment)
    assert json.loads((out / "first_stage/run.json").read_text()) == record
