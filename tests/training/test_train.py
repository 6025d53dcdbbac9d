from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import lavender
from lavender.batches.collator import Collator
from lavender.config import PUBLISHED, AlignmentConfig, TrainingConfig
from lavender.data.samples import Sample, read_samples
from lavender.errors import DataError, ModelError, TargetError
from lavender.images import image_sha256
from lavender.miniworld import write_dataset
from lavender.targets.manifest import StoreConfig
from lavender.targets.store import Target, TargetStore, TargetWriter
from lavender.training.train import fine_tune, load_aligner, load_student
from lavender.types import WordMaps
from lavender.words import words_of

from ..conftest import without_lavender

pytestmark = pytest.mark.usefixtures("no_pictures")
TRAINING = TrainingConfig(steps=4, batch_size=4, learning_rate=1e-3, save_steps=2)


def write_targets(folder, scenes, ids):
    """Exact masks as targets: no teacher is needed to train."""
    writer = TargetWriter(folder, {"model": "masks", "weights": "masks"}, StoreConfig(map_size=16))
    for scene, sample_id in zip(scenes, ids, strict=True):
        words = words_of(scene.caption)
        masks = {(r.start, r.end): scene.word_mask(r)[::4, ::4] for r in scene.referents}
        maps = torch.full((len(words), 16, 16), torch.nan).numpy()
        for w, word in enumerate(words):
            if (word.start, word.end) in masks:
                maps[w] = masks[word.start, word.end]
        writer.add(Target(sample_id, image_sha256(scene.image), WordMaps(scene.caption, words, maps)))
    writer.close()
    return TargetStore(folder)


@pytest.fixture
def data(scenes, tmp_path):
    return write_dataset(scenes[:8], tmp_path / "data")


@pytest.fixture
def targets(scenes, data, tmp_path):
    return write_targets(tmp_path / "targets", scenes[:8], [s.id for s in read_samples(data)])


def test_a_run_writes_what_it_promises(student_folder, data, targets, tmp_path, processor, samples):
    from peft import PeftModel

    out = tmp_path / "run"
    trained = fine_tune(
        student_folder, read_samples(data), out, TRAINING, targets=targets, alignment=PUBLISHED, progress=False
    ).eval()
    record = json.loads((out / "run.json").read_text())
    assert record["targets_fingerprint"] == [targets.fingerprint, targets.contents()]
    assert record["alignment"]["weight"] == 10.0
    assert record["training"]["steps"] == 4
    # The adapter is what plain PEFT expects: it loads into an unpatched model and gives the trained model's answers.
    adapter = load_file(out / "adapter/adapter_model.safetensors")
    assert adapter
    assert all("lora_" in name for name in adapter)
    plain, _ = load_student(student_folder)
    loaded = PeftModel.from_pretrained(plain, out / "adapter").eval()
    batch = Collator(processor)(samples[:3])
    inputs = without_lavender(batch)
    with torch.no_grad():
        expected = trained(**inputs).logits
        assert torch.equal(loaded(**inputs).logits, expected)
        assert not torch.equal(load_student(student_folder)[0].eval()(**inputs).logits, expected)
    # So is the aligner: its file brings the aligned maps back.
    handle = lavender.patch(trained)
    with torch.no_grad():
        aligned = handle.align(**batch)
    again = lavender.patch(loaded, AlignmentConfig(weight=10.0, aligner="sim"))
    load_aligner(again, out)
    with torch.no_grad():
        torch.testing.assert_close(again.align(**batch), aligned)
    again.unpatch()
    handle.unpatch()


def test_plain_transformers_trainer_with_two_added_lines(student, processor, scenes, targets, data, tmp_path):
    """`patch` and `Collator` are all that a user's own Trainer script needs, here with full fine-tuning."""
    from transformers import Trainer, TrainingArguments

    handle = lavender.patch(student, AlignmentConfig(weight=2.0, aligner="sim"))
    before = student.model.language_model.layers[0].self_attn.q_proj.weight.clone()
    aligner_before = [p.clone() for p in student.lavender.parameters()]
    arguments = TrainingArguments(
        tmp_path / "o", max_steps=3, per_device_train_batch_size=4, remove_unused_columns=False, report_to=[], disable_tqdm=True,
        save_strategy="no", learning_rate=1e-3,
    )  # fmt: skip
    trainer = Trainer(model=student, args=arguments, train_dataset=read_samples(data), data_collator=Collator(processor, targets))
    trainer.train()
    assert handle.last.loss > 0
    assert not torch.equal(student.model.language_model.layers[0].self_attn.q_proj.weight, before)
    assert all(not torch.equal(p, b) for p, b in zip(student.lavender.parameters(), aligner_before, strict=True) if p.dim() > 1)
    handle.unpatch()


def test_accumulated_micro_batches_equal_one_batch(student_folder, processor, targets, data, tmp_path):
    """Two micro-batches of four give the gradient of one batch of eight, up to the words that each holds."""
    from transformers import Trainer, TrainingArguments

    losses = []
    for size, accumulation in ((8, 1), (4, 2)):
        student, _ = load_student(student_folder)
        handle = lavender.patch(student, AlignmentConfig(weight=2.0, aligner="identity"))
        arguments = TrainingArguments(
            tmp_path / f"o{size}", max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            remove_unused_columns=False, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(
            model=student, args=arguments, train_dataset=read_samples(data), data_collator=Collator(processor, targets)
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        handle.unpatch()
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


def test_alignment_falls_and_plain_training_does_not_align(student_folder, scenes, data, targets, tmp_path):
    """Overfit four pictures: the alignment loss falls with the term, and stays where it was without it."""
    training = TrainingConfig(steps=30, batch_size=4, learning_rate=5e-3, lora_targets=("q_proj", "k_proj", "v_proj"))
    losses = {}
    for name, weight in (("on", 1.0), ("off", 0.0)):
        alignment = AlignmentConfig(weight=weight, aligner="identity", rows="reads")
        fine_tune(
            student_folder, read_samples(data), tmp_path / name, training, targets=targets, alignment=alignment, progress=False
        )
        history = json.loads((tmp_path / name / "history.json").read_text())
        losses[name] = [entry["alignment_loss"] for entry in history]
    assert losses["on"][-1] < 0.8 * losses["off"][-1]


def test_gradient_checkpointing_trains_the_same(student_folder, data, targets, tmp_path):
    adapters = []
    for checkpointing in (False, True):
        out = tmp_path / str(checkpointing)
        training = TrainingConfig(steps=2, batch_size=4, lora_dropout=0.0, gradient_checkpointing=checkpointing)
        fine_tune(student_folder, read_samples(data), out, training, targets=targets, alignment=PUBLISHED, progress=False)
        adapters.append(load_file(out / "adapter/adapter_model.safetensors"))
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, rtol=1e-4, atol=1e-6)


def test_full_fine_tuning_saves_a_plain_model(student_folder, data, targets, tmp_path):
    training = TrainingConfig(steps=2, batch_size=4, lora_rank=0)
    trained = fine_tune(
        student_folder, read_samples(data), tmp_path / "run", training, targets=targets, alignment=PUBLISHED, progress=False
    )
    assert not any(name.startswith("lavender") for name in load_file(tmp_path / "run/model/model.safetensors"))
    model, own_processor = load_student(tmp_path / "run/model")
    assert own_processor.chat_template
    expected = {name: value for name, value in trained.state_dict().items() if not name.startswith("lavender.")}
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    untrained = load_student(student_folder)[0].state_dict()
    assert any(not torch.equal(value, untrained[name]) for name, value in expected.items())
    assert (tmp_path / "run/aligner.safetensors").exists()


def test_resuming_by_hand_equals_an_undisturbed_run(student_folder, data, targets, tmp_path):
    """Stop after the first checkpoint, as a kill would, then continue: same losses, same weights, same aligner."""
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    fine_tune(student_folder, read_samples(data), whole, TRAINING, targets=targets, alignment=PUBLISHED, progress=False)
    fine_tune(student_folder, read_samples(data), halved, TRAINING, targets=targets, alignment=PUBLISHED, progress=False)
    import shutil

    for name in ("adapter", "aligner.safetensors", "history.json", "checkpoints/checkpoint-4"):
        path = halved / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    fine_tune(student_folder, read_samples(data), halved, TRAINING, targets=targets, alignment=PUBLISHED, progress=False)
    assert_same_run(whole, halved)


def test_a_finished_run_stays_as_it_is(student_folder, data, targets, tmp_path):
    """Three steps of four end within an epoch of eight; the same call again must not train on."""
    training = TrainingConfig(steps=3, batch_size=4, learning_rate=1e-3)
    once, twice = tmp_path / "once", tmp_path / "twice"
    for out in (once, twice, twice):
        trained = fine_tune(student_folder, read_samples(data), out, training, targets=targets, alignment=PUBLISHED, progress=False)
    assert_same_run(once, twice)
    adapter = load_file(once / "adapter/adapter_model.safetensors")
    for name, parameter in trained.named_parameters():
        if name.replace(".default", "") in adapter:
            assert torch.equal(parameter, adapter[name.replace(".default", "")])


def assert_same_run(one, other):
    for name in ("adapter/adapter_model.safetensors", "aligner.safetensors"):
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), (name, key)
    assert json.loads((one / "history.json").read_text()) == json.loads((other / "history.json").read_text())


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    from lavender.training.train import _last_checkpoint

    assert _last_checkpoint(tmp_path / "checkpoints") is None
    for step, state in ((5, "{}"), (10, '{"half'), (15, None)):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert _last_checkpoint(tmp_path / "checkpoints") == str(tmp_path / "checkpoints/checkpoint-5")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-5"]


def test_kill_9_and_the_same_command_end_as_an_undisturbed_run(student_folder, data, targets, tmp_path):
    command = [
        *(sys.executable, "-m", "lavender", "train", "--model", str(student_folder), "--data", str(data)),
        *("--targets", str(targets.folder), "--weight", "10", "--aligner", "sim"),
        *("--steps", "30", "--batch-size", "4", "--save-steps", "5", "--out"),
    ]
    training = TrainingConfig(steps=30, batch_size=4, save_steps=5)
    fine_tune(
        student_folder, read_samples(data), tmp_path / "whole", training, targets=targets, alignment=PUBLISHED, progress=False
    )
    process = subprocess.Popen([*command, str(tmp_path / "run")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "run/checkpoints/checkpoint-10").exists():
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run/adapter").exists()
    subprocess.run([*command, str(tmp_path / "run")], check=True, capture_output=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_another_config_or_other_targets_are_refused(student_folder, scenes, data, targets, tmp_path):
    samples = read_samples(data)
    fine_tune(student_folder, samples, tmp_path / "run", TRAINING, targets=targets, alignment=PUBLISHED, progress=False)
    with pytest.raises(TargetError, match="another training"):
        fine_tune(
            student_folder, samples, tmp_path / "run", TrainingConfig(steps=5), targets=targets, alignment=PUBLISHED, progress=False
        )
    with pytest.raises(TargetError, match="another alignment, words, targets_fingerprint"):
        fine_tune(student_folder, samples, tmp_path / "run", TRAINING, progress=False)
    with pytest.raises(TargetError, match="another alignment"):
        fine_tune(
            student_folder,
            samples,
            tmp_path / "run",
            TRAINING,
            targets=targets,
            alignment=AlignmentConfig(weight=1, aligner="sim"),
            progress=False,
        )


def test_a_run_that_failed_at_once_does_not_lock_its_folder(student_folder, data, targets, tmp_path):
    samples = read_samples(data)
    with pytest.raises(ModelError, match="layers 0 to 3"):
        fine_tune(
            student_folder,
            samples,
            tmp_path / "run",
            TRAINING,
            targets=targets,
            alignment=AlignmentConfig(layers=(99,), weight=10.0, aligner="sim"),
        )
    broken = [Sample(s.id, b"no picture", s.question, s.answer) for s in samples]
    with pytest.raises(DataError, match="cannot read the image"):
        fine_tune(student_folder, broken, tmp_path / "run", TRAINING, targets=targets, alignment=PUBLISHED, progress=False)
    fine_tune(student_folder, samples, tmp_path / "run", TrainingConfig(steps=1, batch_size=2), progress=False)


@pytest.mark.parametrize("spoil", [{"question": 5}, {"question": ""}, {"answer": 3}, {"answer": None}, {"answer": "\ud83d"}])
def test_wrong_texts_in_samples_are_named(tmp_path, spoil):
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"image": "a.png", "question": "What?", "answer": "A cat."} | spoil))
    with pytest.raises(DataError, match=f"line 1: .*{next(iter(spoil))}"):
        read_samples(path)


def test_a_caption_serves_as_answer(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"image": "a.png", "answer": None, "caption": "A cat.", "id": None}))
    (sample,) = read_samples(path)
    assert (sample.id, sample.question, sample.answer) == ("a.png", "Describe the picture.", "A cat.")


def test_placeholders_and_templates_that_change_the_answer_are_named(processor, samples):
    import copy

    with pytest.raises(DataError, match="stands for the picture"):
        Collator(processor)([Sample("x", samples[0].image, "What is <image>?", "A cat.")])
    trimming = copy.deepcopy(processor)
    trimming.chat_template = trimming.chat_template.replace("part['text']", "part['text'] | trim")
    trimmed, plain = Collator(trimming), Collator(processor)
    batch = trimmed([Sample("x", samples[0].image, "What?", " A cat. ")])
    for key, expected in plain([Sample("x", samples[0].image, "What?", "A cat.")]).items():
        torch.testing.assert_close(batch[key], expected, rtol=0, atol=0, equal_nan=True)
    trimming.chat_template = trimming.chat_template.replace("| trim", "| upper")
    with pytest.raises(DataError, match=r"the chat template changes the answer 'A cat.' to 'A CAT.'"):
        trimmed([Sample("x", samples[0].image, "What?", "A cat.")])


def test_targets_of_other_pictures_are_refused(student_folder, scenes, data, tmp_path):
    samples = read_samples(data)
    wrong = write_targets(tmp_path / "wrong", scenes[8:16], [s.id for s in samples])
    with pytest.raises(TargetError, match=r"images/0000\d.png.*another picture"):
        fine_tune(student_folder, samples, tmp_path / "run", TRAINING, targets=wrong, progress=False)


def test_targets_of_other_samples_are_refused_before_anything_is_loaded(scenes, data, tmp_path):
    samples = read_samples(data)
    others = write_targets(tmp_path / "others", scenes[8:10], ["a", "b"])
    with pytest.raises(TargetError, match=r"8 of 8 samples by their ids \(first: 'images/00000.png'\) or pictures"):
        fine_tune("no model is needed", samples, tmp_path / "run", TRAINING, targets=others, progress=False)
    assert not (tmp_path / "run").exists()


def test_training_goes_on_without_some_targets_and_counts_them(student_folder, scenes, data, tmp_path, caplog):
    samples = read_samples(data)
    few = write_targets(tmp_path / "few", scenes[:2], [s.id for s in samples[:2]])
    training = TrainingConfig(steps=2, batch_size=8, save_steps=1)
    fine_tune(student_folder, samples, tmp_path / "run", training, targets=few, progress=False)
    told = [record.message for record in caplog.records if record.name == "lavender"]
    assert any(
        "6 of 8 samples by their ids (first: 'images/00002.png'); these train the language loss alone" in line for line in told
    )
    assert any("no target: 12" in line for line in told)
    history = json.loads((tmp_path / "run/history.json").read_text())
    assert [entry["samples_no_target"] for entry in history] == [6, 6]
    assert all(entry["matched_words"] > 0 for entry in history)


def test_models_that_are_no_student_are_named(teacher_folder, tmp_path):
    for folder in (tmp_path / "nowhere", teacher_folder):
        with pytest.raises(ModelError, match="image-text-to-text"):
            load_student(folder)


def test_answers_that_are_not_the_caption_match_by_word(processor, scenes, tmp_path):
    """A question's one-word answer takes the caption's map of that word; words that the caption lacks have none."""
    scene = next(s for s in scenes if len(s.objects) == 2)
    store = write_targets(tmp_path / "t", [scene], ["x"])
    color = scene.objects[0].color
    batch = Collator(processor, store)([Sample("x", scene.image, "What color?", f"{color} zebra")])
    assert batch["lavender_present"].tolist() == [[True, False]]
    target = batch["lavender_targets"][0, 0]
    referent = next(r for r in scene.referents if scene.caption[r.start : r.end] == color)
    torch.testing.assert_close(target, torch.from_numpy(scene.word_mask(referent)[::4, ::4]).float())


def test_labels_cover_the_answer_and_its_end_only(processor, samples):
    batch = Collator(processor)(samples[:3])
    for b, sample in enumerate(samples[:3]):
        kept = batch["labels"][b][batch["labels"][b] != -100]
        assert processor.tokenizer.decode(kept) == sample.answer + processor.tokenizer.eos_token
