"""All samples of a run are looked at before its first step; it goes on whatever becomes of some of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lavender.batches.collator import Collator
from lavender.config import PUBLISHED, TrainingConfig
from lavender.data.regions import Region
from lavender.data.samples import Sample, read_samples
from lavender.errors import DataError, TargetError
from lavender.miniworld import write_dataset
from lavender.signals import Stopped
from lavender.training.train import fine_tune
from lavender.training.trainer import Interruption

from .test_train import assert_same_run, write_targets

pytestmark = pytest.mark.usefixtures("no_pictures")
TRAINING = TrainingConfig(steps=4, batch_size=2, learning_rate=1e-3, save_steps=2, arguments={"use_cpu": True})


@pytest.fixture
def samples(scenes, tmp_path):
    return read_samples(write_dataset(scenes[:8], tmp_path / "data"))


@pytest.fixture
def train(student_folder, scenes, samples, tmp_path):
    targets = write_targets(tmp_path / "targets", scenes[:8], [sample.id for sample in samples])

    def run(name, given=None, training=TRAINING, **settings):
        out = tmp_path / name
        defaults = {"targets": targets, "alignment": PUBLISHED, "progress": False}
        fine_tune(student_folder, samples if given is None else given, out, training, **defaults | settings)
        return out

    return run


@pytest.fixture
def stopped(train, monkeypatch, tmp_path):
    """A run that ended after its second step, as one that was asked to."""

    def stop(name, *args, **settings):
        asked = Interruption._is_requested

        def is_requested(self):
            if self.trainer.state.global_step == 2:
                self.stop.requested = 15
            return asked(self)

        with monkeypatch.context() as patch:
            patch.setattr(Interruption, "_is_requested", is_requested)
            with pytest.raises(Stopped):
                train(name, *args, **settings)
        return tmp_path / name

    return stop


def listed(out):
    path = out / "skipped.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["id"]: entry["reason"] for entry in map(json.loads, lines)}


def skipped_in(out):
    return [entry.get("samples_skipped", 0) for entry in json.loads((out / "history.json").read_text())]


def truncate(sample):
    sample.image.write_bytes(sample.image.read_bytes()[:-60])


def test_every_kind_of_bad_sample_is_skipped_counted_and_listed(train, samples, scenes, caplog, tmp_path):
    truncate(samples[0])
    samples[1].image.write_bytes(b"")
    samples[2].image.unlink()
    samples[3].image.write_text("no picture")
    scenes[9].image.save(samples[4].image)  # of which the target was not made
    given = [*samples, replace(samples[5], id="nowhere", regions=(Region(1, box=(0, 0, 0, 0)),))]
    given.append(Sample("talk", samples[6].image, "What? <image> <image>", "A cat."))
    out = train("run", given, replace(TRAINING, arguments={"use_cpu": True, "train_sampling_strategy": "sequential"}))
    reasons = {
        samples[0].id: "cannot read the image",
        samples[1].id: "is empty",
        samples[2].id: "no image at",
        samples[3].id: "cannot read the image",
        samples[4].id: "made from another picture",
        "nowhere": "region 1",
        "talk": "picture",
    }
    assert list(listed(out)) == list(reasons)
    for sample_id, reason in reasons.items():
        assert reason in listed(out)[sample_id]
        assert sum(record.message.startswith("skipped: ") and repr(sample_id) in record.message for record in caplog.records) == 1
    assert f"7 of 10 samples are skipped; {out / 'skipped.jsonl'} lists them" in caplog.messages
    assert sum(skipped_in(out)) == 5  # of the first eight


def test_a_sound_run_lists_nothing(train, caplog):
    out = train("run")
    assert not (out / "skipped.jsonl").exists()
    assert not any("skipped" in message for message in caplog.messages)


@pytest.mark.parametrize("aligned", [True, pytest.param(False, marks=pytest.mark.full)])
def test_the_others_are_batched_and_trained_on_as_if_the_collator_met_the_bad_one_alone(aligned, train, samples, monkeypatch):
    settings = {} if aligned else {"targets": None, "alignment": None}
    truncate(samples[3])
    looked = train("looked", **settings)
    monkeypatch.setattr(Collator, "fault_of", lambda *_: None)  # so that it is met in the training
    met = train("met", **settings)
    for name in ("adapter/adapter_model.safetensors", *["aligner.safetensors"] * aligned):
        ours, theirs = load_file(looked / name), load_file(met / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert (looked / "history.json").read_text() == (met / "history.json").read_text()
    assert listed(met).keys() == listed(looked).keys() == {samples[3].id}


def test_strict_ends_before_the_first_step_by_one_line(train, samples, caplog, tmp_path):
    truncate(samples[3])
    truncate(samples[5])
    with pytest.raises(
        DataError, match=r"^2 of 8 samples cannot be used, which .*skipped.jsonl lists; the first: .*00003.png"
    ) as raised:
        train("run", strict=True)
    assert "\n" not in str(raised.value)
    assert not caplog.messages
    assert listed(tmp_path / "run").keys() == {samples[3].id, samples[5].id}
    assert not (tmp_path / "run/run.json").exists()
    train("run")
    for n in (3, 5):
        samples[n].image.write_bytes(samples[4].image.read_bytes())
    train("strict", targets=None, alignment=None, strict=True)


def test_a_run_without_any_sound_sample_ends_by_the_reason(train, samples):
    for sample in samples:
        truncate(sample)
    with pytest.raises(DataError, match="cannot read the image"):
        train("run")


@pytest.fixture
def looks(monkeypatch):
    seen = []
    original = Collator.fault_of

    def fault_of(self, sample):
        seen.append(sample.id)
        return original(self, sample)

    monkeypatch.setattr(Collator, "require_usable", lambda *_: None)
    monkeypatch.setattr(Collator, "fault_of", fault_of)
    return seen


def test_a_second_start_looks_at_what_is_new_or_bad_alone(stopped, train, samples, looks):
    truncate(samples[2])
    out = stopped("run")
    assert looks == [sample.id for sample in samples]
    looks.clear()
    picture = samples[5].image.read_bytes()
    samples[5].image.write_bytes(picture)  # another time of its last change
    with open(out / ".sound-0", "a") as file:
        file.write("0123")  # as a kill leaves it
    train("run")
    assert looks == [samples[2].id, samples[5].id]
    assert listed(out).keys() == {samples[2].id}
    looks.clear()
    train("run")
    assert not looks, "a finished run is loaded"


def test_pictures_in_memory_are_looked_at_every_time(stopped, train, samples, looks):
    given = [replace(sample, image=Image.open(sample.image).convert("RGB")) for sample in samples]
    stopped("run", given)
    train("run", given)
    assert looks == [sample.id for sample in samples] * 2


@pytest.mark.full
def test_workers_find_what_one_process_finds(train, samples):
    truncate(samples[2])
    truncate(samples[6])
    arguments = {"use_cpu": True, "dataloader_num_workers": 2}
    assert listed(train("two", training=replace(TRAINING, arguments=arguments))) == listed(train("one"))


def test_a_picture_that_goes_bad_in_the_training_is_skipped_and_listed(train, samples, monkeypatch, caplog):
    original = Interruption.on_train_begin

    def spoil(self, *args, **kwargs):
        original(self, *args, **kwargs)
        truncate(samples[4])

    monkeypatch.setattr(Interruption, "on_train_begin", spoil)
    out = train("run")
    assert listed(out).keys() == {samples[4].id}
    assert sum(skipped_in(out)) == 1
    assert any(message.startswith("skipped: ") and samples[4].id in message for message in caplog.messages)


def test_a_run_goes_on_without_samples_that_are_gone_or_bad_since(stopped, train, samples, caplog):
    """In the order of its beginning: the end is that of one in which the same samples were bad from the third step on."""
    truncate(samples[1])
    for name in ("run", "other"):
        stopped(name)
    truncate(samples[6])
    left = [sample for n, sample in enumerate(samples) if n not in (1, 3)]
    caplog.clear()
    out = train("run", left)
    named = f"{samples[1].id!r}, {samples[3].id!r}"
    assert f"2 samples that the run began with are gone; it goes on without them: {named}" in caplog.messages
    assert listed(out).keys() == {samples[1].id, samples[3].id, samples[6].id}
    truncate(samples[3])
    assert_same_run(out, train("other"))


def test_a_run_goes_on_with_samples_that_were_mended(stopped, train, samples, caplog):
    sound = samples[1].image.read_bytes()
    truncate(samples[1])
    given = [*samples[:2], replace(samples[2], regions=(Region(1, box=(0, 0, 0, 0)),)), *samples[3:]]
    stopped("run", given)
    samples[1].image.write_bytes(sound)
    caplog.clear()
    out = train("run", [*samples[:2], replace(samples[2], answer="A red cross."), *samples[3:]])
    assert f"2 samples that were skipped are used from here on: {samples[1].id!r}, {samples[2].id!r}" in caplog.messages
    assert not (out / "skipped.jsonl").exists()
    assert sum(skipped_in(out)[1:]) == 0


@pytest.mark.parametrize("finished", [pytest.param(True, marks=pytest.mark.full), False])
def test_other_samples_are_refused(finished, stopped, train, samples, scenes, tmp_path):
    begin = train if finished else stopped
    plain = {"targets": None, "alignment": None}
    begin("run", **plain)
    before = (tmp_path / "run/samples.json").read_bytes()
    others = [
        [*samples, replace(samples[0], id="new")],
        samples[::-1],
        samples[:3],
        [replace(samples[0], answer="A red cross."), *samples[1:]],
    ]
    for given in others:
        with pytest.raises(TargetError, match=r"another (samples, )?samples_sha256"):
            train("run", given, **plain)
        assert (tmp_path / "run/samples.json").read_bytes() == before
    scenes[9].image.resize((80, 80)).save(samples[0].image)
    with pytest.raises(TargetError, match=rf"another samples_sha256 \(1 say something else or have .*: '{samples[0].id}'\)"):
        train("run", **plain)
    assert (tmp_path / "run/samples.json").read_bytes() == before


def test_a_run_of_an_older_version_goes_on_with_its_samples_alone(stopped, train, samples):
    out = stopped("run")
    whole = train("whole")
    (out / "samples.json").unlink()
    with pytest.raises(TargetError, match="another samples, samples_sha256"):
        train("run", samples[:7])
    assert not (out / "samples.json").exists()
    assert_same_run(whole, train("run"))
    assert (out / "samples.json").exists()
