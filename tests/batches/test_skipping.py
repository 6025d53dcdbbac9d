"""A sample that cannot be used is skipped where a training must go on: named, counted, replaced; and raised everywhere else."""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import lavender
from lavender.batches.collator import MOST_SKIPPED, Collator
from lavender.config import AlignmentConfig, TrainingConfig, WordsConfig
from lavender.data.samples import Conversation, Message, Sample
from lavender.errors import ConfigError, DataError, TargetError
from lavender.training.train import fine_tune
from lavender.types import OUTCOMES, WordBatch

from ..conftest import with_targets, without_lavender
from ..students.zoo import built, sampled
from .test_conversations import ANSWER, QUESTION, RED, store_of, with_template
from .test_families import COLLATED, SAMPLES, collator_of, targets, three_pictures  # noqa: F401 (a fixture)

BLUE = Image.new("RGB", (64, 64), "blue")
SKIPPED = OUTCOMES.index("skipped")


def encoded(image: Image.Image, length: int | None = None) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()[:length]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
ASKED = Message("user", QUESTION)
BAD: dict[str, tuple[Any, str]] = {
    "no file": (Sample("bad", "nowhere.png", QUESTION, ANSWER), "there is no image at nowhere.png"),
    "cut file": (Sample("bad", encoded(NOISE, 5000), QUESTION, ANSWER), "truncated"),
    "cut file, open": (Sample("bad", Image.open(io.BytesIO(encoded(NOISE, 5000))), QUESTION, ANSWER), "truncated"),
    "no picture": (Sample("bad", [1], QUESTION, ANSWER), "an image is a list"),
    "placeholder": (Sample("bad", RED, "What is <image>?", ANSWER), "stands for the picture"),
    "no answer": ({"id": "bad", "image": RED, "messages": [{"role": "user", "content": QUESTION}]}, "no message of the assistant"),
    "empty answer": (Sample("bad", RED, QUESTION, " "), "has an empty answer"),
    "another picture": (Sample("bad", BLUE, QUESTION, ANSWER), "were made from another picture"),
    "refused": (Conversation("bad", (RED,), (ASKED, ASKED, Message("assistant", ANSWER))), "refuses the conversation"),
    "changed": (Sample("bad", RED, QUESTION, "A loud cat."), "changes the answer"),
    "long": (Conversation("bad", (RED,), (Message("user", "very " * 150 + "<image>"), Message("assistant", ANSWER))), "max_length"),
}


@pytest.fixture
def strict(processor):
    """Its template refuses two questions in a row, and is loud."""
    refuse = "{% if loop.previtem and loop.previtem['role'] == message['role'] %}{{ raise_exception('two questions') }}{% endif %}"
    own = with_template(processor, lambda template: template.replace("{% for part in", refuse + "{% for part in", 1))
    return with_template(own, lambda template: template.replace("part['text']", "part['text'] | replace('loud', 'LOUD')"))


@pytest.fixture
def store(tmp_path):
    return store_of(tmp_path / "t", dict.fromkeys(("good", "also", "bad"), (RED, "A zebra and a violin, loud.")))


GOOD = [Sample("good", RED, QUESTION, ANSWER), Sample("also", RED, QUESTION, "A zebra.")]


@pytest.mark.parametrize(("bad", "reason"), BAD.values(), ids=BAD.keys())
def test_one_bad_sample_leaves_the_others_as_they_are(strict, store, bad, reason, caplog):
    collator = Collator(strict, store, max_length=160)
    alone = collator(GOOD)
    batch = collator([GOOD[0], bad, GOOD[1]])
    assert batch["lavender_outcomes"].tolist() == [0, SKIPPED, 0]
    assert batch.keys() == alone.keys()
    assert (batch["labels"][1] == -100).all()
    assert not batch["lavender_present"][1].any()
    assert (batch["lavender_tokens"][1] == -1).all()
    assert not batch["lavender_targets"][1].any()
    real = batch["attention_mask"].bool()
    for key in ("input_ids", "labels", "lavender_targets", "lavender_present", "lavender_boxes", "pixel_values"):
        for b in range(2):
            row, expected = batch[key][2 * b], alone[key][b]
            if key in ("input_ids", "labels"):
                row, expected = row[real[2 * b]], expected[alone["attention_mask"][b].bool()]
            torch.testing.assert_close(row, expected, rtol=0, atol=0, equal_nan=True)
    assert [*collator.skipped] == ["bad"]
    assert reason in collator.skipped["bad"]
    collator([bad, *GOOD])
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("skipped: ")]
    assert len(told) == 1
    assert "'bad'" in told[0]
    assert reason in told[0]
    with pytest.raises((DataError, TargetError), match=reason):
        Collator(strict, store, max_length=160, on_error="raise")([*GOOD, bad])


def test_a_capture_never_shows_a_stand_in(strict):
    bad, reason = BAD["no file"]
    with pytest.raises(DataError, match=reason):
        Collator(strict)([*GOOD, bad])
    assert Collator(strict, on_error="skip")([*GOOD, bad])["lavender_outcomes"].tolist() == [0, 0, SKIPPED]


@pytest.mark.parametrize("sample", [7, {"image": RED}, None], ids=type)
def test_what_is_no_sample_is_skipped_by_its_type(processor, sample):
    collator = Collator(processor, on_error="skip")
    assert collator([sample, *GOOD])["lavender_outcomes"].tolist() == [SKIPPED, 0, 0]
    assert [*collator.skipped] == [f"a {type(sample).__name__} without an id"]


@pytest.mark.parametrize("name", sampled(COLLATED))
def test_every_family_has_a_stand_in(name):
    """The model reads it, and learns nothing from it."""
    collator = collator_of(name, "left", closes=True, on_error="skip")
    batch = collator([Sample("bad", b"", "what ?", "red"), SAMPLES[0]])
    assert batch["lavender_outcomes"].tolist() == [SKIPPED, 0]
    kept = batch["labels"] >= 0
    assert not kept[0].any()
    model = copy.deepcopy(built(name).model)
    with lavender.patch(model, AlignmentConfig(aligner="identity", weight=1.0)) as patch:
        loss = model(**with_targets(batch, 8)).loss
        assert patch.last.outcomes.tolist() == [1, 0, 0, 0, 1]
    assert loss.isfinite()
    wide = {key: batch[key] for key in without_lavender(batch)}
    alone = Collator(collator.processor, model_config=built(name).model.config)([SAMPLES[0]])
    with torch.no_grad():
        expected = model(**without_lavender(alone)).loss
        torch.testing.assert_close(model(**wide).loss, expected, rtol=1e-4, atol=1e-5)


def test_what_a_processor_refuses_is_laid_to_the_sample_at_fault():
    """Qwen's takes no picture that is 200 times as wide as high, and says so of the whole list."""
    thin = Sample("thin", Image.new("RGB", (900, 1)), "what is this ?", "a cat")
    with pytest.raises(DataError, match=r"^sample 'thin': Qwen2VLProcessor does not take them .absolute aspect ratio"):
        collator_of("qwen2_vl", "left")([SAMPLES[0], thin, SAMPLES[1]])
    collator = collator_of("qwen2_vl", "left", on_error="skip")
    assert collator([SAMPLES[0], thin, SAMPLES[1]])["lavender_outcomes"].tolist() == [0, SKIPPED, 0]
    assert [*collator.skipped] == ["thin"]


def test_samples_that_do_not_go_together_are_not_at_fault(targets):  # noqa: F811
    """A batch of texts alone would leave the cross-attention out. One beside a picture is fine, whatever else is wrong there."""
    text = Conversation("text", (), (Message("user", "what is red ?"), Message("assistant", "a cat")))
    more = Conversation("more", (), (Message("user", "what is red ?"), Message("assistant", "a cat")))
    thin = Sample("bad", b"", "what ?", "red")
    collator = collator_of("mllama", "left", targets=targets)
    assert collator([text, thin, three_pictures("2")])["lavender_outcomes"].tolist() == [1, SKIPPED, 0]
    late = Sample("late", Image.new("RGB", (48, 48)), " ".join(["what"] * 400), "red <|image|>")
    assert collator([text, late, three_pictures("2")])["lavender_outcomes"].tolist() == [1, SKIPPED, 0]
    assert collator([text, more])["lavender_outcomes"].tolist() == [1, SKIPPED]
    assert "put a sample with a picture into every batch" in collator.skipped["more"]
    assert collator([more])["lavender_outcomes"].tolist() == [SKIPPED]


def test_a_series_without_a_sound_sample_ends(processor):
    bad = [Sample(f"bad{n}", b"", QUESTION, ANSWER) for n in range(MOST_SKIPPED)]
    collator = Collator(processor, on_error="skip")
    for _ in range(3):  # a sound sample in between, in a batch or by itself
        assert collator([*bad[:-1], GOOD[0], *bad[:-1]])["lavender_outcomes"].tolist().count(SKIPPED) == 2 * (MOST_SKIPPED - 1)
        collator(GOOD)
    for sample in bad[:-1]:
        collator([sample])
    last = f"'bad{MOST_SKIPPED - 1}': .*It is the last of {MOST_SKIPPED} samples in a row that had to be skipped"
    with pytest.raises(DataError, match=last):
        collator([bad[-1]])
    with pytest.raises(DataError, match=r"'bad0'.*It is the last of 16"):
        Collator(processor, on_error="skip")([*bad[1:], bad[0]])


def test_where_no_stand_in_fits_the_error_is_the_samples_own(processor):
    with pytest.raises(DataError, match=r"^sample 'bad': the image"):
        Collator(processor, max_length=3, on_error="skip")([Sample("bad", b"", QUESTION, ANSWER)])
    with pytest.raises(DataError, match=r"^sample 'good' has \d+ tokens, its pictures reach to the"):
        Collator(processor, max_length=3, on_error="skip")([GOOD[0]])


def test_a_run_is_told_before_it_starts_that_no_sample_can_be_used(processor):
    collator = Collator(processor, on_error="skip")
    bad = [Sample(f"bad{n}", b"", QUESTION, ANSWER) for n in range(40)]
    with pytest.raises(DataError, match="'bad39'"):
        collator.require_usable(bad)
    collator.require_usable([*bad[:39], GOOD[0]])
    collator.require_usable([])
    assert not collator.skipped


def test_a_pickled_collator_skips_the_same(strict, store):
    collator = Collator(strict, store, max_length=160)
    samples = [GOOD[0], BAD["no file"][0], GOOD[1]]
    batch, again = collator(samples), pickle.loads(pickle.dumps(collator))(samples)
    for key in batch:
        torch.testing.assert_close(again[key], batch[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.full
def test_spawned_workers_count_what_they_skip(processor, store):
    """By the batches' outcomes: a worker's `skipped` is its own."""
    collator = Collator(processor, store)
    samples = [GOOD[0], Sample("bad", b"", QUESTION, ANSWER)] * 2
    loader = DataLoader(samples, batch_size=2, num_workers=2, multiprocessing_context="spawn", collate_fn=collator)
    assert [batch["lavender_outcomes"].tolist() for batch in loader] == [[0, SKIPPED]] * 2
    assert not collator.skipped


@pytest.mark.parametrize("aligned", [True, False])
def test_a_run_goes_on_without_a_bad_sample(student_folder, scenes, samples, tmp_path, aligned):
    from ..training.test_train import write_targets

    chosen = [*samples[:3], Sample("bad", b"no picture", QUESTION, ANSWER)]
    store = write_targets(tmp_path / "targets", scenes[:3], [sample.id for sample in chosen[:3]]) if aligned else None
    training = TrainingConfig(steps=2, batch_size=4, learning_rate=1e-3, save_steps=2)
    fine_tune(student_folder, chosen, tmp_path / "run", training, targets=store, progress=False)
    history = json.loads((tmp_path / "run/history.json").read_text())
    assert sum(entry.get("samples_skipped", 0) for entry in history) == 2 * aligned
    assert all(np.isfinite(entry["loss"]) for entry in history)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"processor": "tokenizer"}, r"^the processor is a \w+; expected one of pictures and texts: AutoProcessor"),
        ({"processor": None}, "^the processor is a NoneType"),
        ({"targets": "store"}, r"^targets is a str; expected a store: lavender.TargetStore\(folder\)"),
        ({"targets": {}}, "^targets is a dict"),
        ({"words": {"match": "root"}}, "^words is a dict; expected a lavender.WordsConfig"),
        ({"words": WordsConfig}, "^words is a type"),
        ({"model_config": {"model_type": "llava"}}, "^model_config is a dict; expected the student's model.config"),
        ({"max_length": 1.5}, r"^max_length is 1\.5; expected a whole number"),
        ({"max_length": True}, "^max_length is True; expected a whole number"),
        ({"max_length": "9"}, "^max_length is '9'; expected a whole number"),
        ({"on_error": "ignore"}, "^on_error is 'ignore'; expected 'skip', 'raise' or None"),
        ({"on_error": True}, "^on_error is True"),
    ],
)
def test_arguments_of_another_type_are_refused(processor, arguments, message):
    if arguments.get("processor") == "tokenizer":
        arguments = {"processor": processor.tokenizer}
    with pytest.raises(ConfigError, match=message) as caught:
        Collator(**({"processor": processor} | arguments))
    assert "\n" not in str(caught.value)


def test_outcomes_keep_their_numbers():
    assert OUTCOMES == ("matched", "no target", "no word matched", "cut off", "skipped")
    assert WordBatch.KEYS["outcomes"] == "lavender_outcomes"
