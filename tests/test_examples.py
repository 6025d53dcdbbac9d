"""The scripts in `examples/`, run as they are: on the small world and on tiny random models, with and without the term."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.video_processing_utils import BaseVideoProcessor
from trl import SFTConfig, SFTTrainer

import lavender
from lavender.config import AlignmentConfig
from lavender.data.samples import read_samples
from lavender.images import image_sha256
from lavender.miniworld import STUDENT, write_dataset
from lavender.targets.manifest import StoreConfig
from lavender.targets.store import Target, TargetStore, TargetWriter
from lavender.testing.student import noise_image
from lavender.types import ROLES, WordMaps
from lavender.words import FUNCTION_WORDS, words_of

from .conftest import without_lavender
from .students.zoo import students

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = ("trainer", "trl_sft", "plain_loop")
TINY = ("mllama", "qwen2_5_vl", "llava")
FAST = {("trl_sft", "small_world"), ("trainer", "mllama"), *(("plain_loop", name) for name in ("small_world", *TINY))}
CASES = [
    (script, name) if (script, name) in FAST else pytest.param(script, name, marks=pytest.mark.full)
    for script in SCRIPTS
    for name in ("small_world", *TINY)
]
PICTURES = [(60, 90, "what is this ?", "a red cat in the house"), (96, 48, "what is in the picture ?", "dog"),
            (64, 64, "what is in the picture ?", "a blue hat and a tree ."), (48, 80, "what is this ?", "green dog")]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What a script is given: a model's folder, data and targets."""

    model: Path
    data: Path
    targets: Path

    def load(self) -> Any:
        return AutoModelForImageTextToText.from_pretrained(self.model, dtype=torch.float32).eval()

    def collator(self) -> lavender.Collator:
        processor = AutoProcessor.from_pretrained(self.model)
        return lavender.Collator(processor, TargetStore(self.targets), model_config=self.load().config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


@pytest.fixture
def case_of(folder, scenes, monkeypatch) -> Callable[[str], Case]:
    """By name: the small world's student with its pictures, or a tiny random model of a family."""

    def case(name: str) -> Case:
        if name == "qwen2_5_vl":
            # Its video processor needs torchvision, which no picture does.
            monkeypatch.setattr(AutoVideoProcessor, "from_pretrained", lambda *_, **__: BaseVideoProcessor())
            monkeypatch.setattr(Qwen2_5_VLProcessor, "check_argument_for_proper_class", lambda *_: None)
        own = folder / name
        made = Case(STUDENT if name == "small_world" else own / "model", own / "captions.jsonl", own / "targets")
        if own.exists():
            return made
        if name == "small_world":
            write_dataset(scenes[:8], own)
        else:
            _write_student(name, made.model)
            _write_noise(own)
        _write_targets(made)
        return made

    return case


def _write_student(name: str, folder: Path) -> None:
    student = students()[name]()
    student.processor.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + student.placeholder
        + " {% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    )
    student.model.save_pretrained(folder)
    student.processor.save_pretrained(folder)


def _write_noise(folder: Path) -> None:
    lines = []
    for number, (height, width, question, answer) in enumerate(PICTURES):
        noise_image(height, width, seed=number).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": question, "answer": answer}))
    (folder / "captions.jsonl").write_text("\n".join(lines))


def _write_targets(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    writer = TargetWriter(case.targets, {"model": "random", "weights": "random"}, StoreConfig(map_size=8))
    for sample in read_samples(case.data):
        words = words_of(sample.answer)
        maps = torch.rand(len(words), 8, 8, generator=generator).numpy()
        with lavender.images.load_image(sample.image) as image:
            writer.add(Target(sample.id, image_sha256(image), WordMaps(sample.answer, words, maps)))
    writer.close()


def run(script: str, monkeypatch, *arguments: Any, pictures: bool = False) -> Any:
    """Runs a script as a command does, and returns the handle of the model that it trained."""
    handles = []
    patch, callback = lavender.patch, lavender.LavenderCallback

    def noted(*given: Any, **settings: Any) -> Any:
        handles.append(patch(*given, **settings))
        return handles[-1]

    with monkeypatch.context() as patched:
        patched.setattr(lavender, "patch", noted)
        patched.setattr(lavender, "LavenderCallback", callback if pictures else partial(callback, picture_steps=0))
        patched.setattr(sys, "argv", [script, *map(str, arguments)])
        patched.syspath_prepend(EXAMPLES)
        torch.manual_seed(0)
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    (handle,) = handles
    return handle


@pytest.mark.parametrize(("script", "name"), CASES)
def test_a_script_aligns_and_saves_what_loads_without_lavender(script, name, case_of, tmp_path, monkeypatch):
    case = case_of(name)
    rate = 1e-3 if script == "plain_loop" else 1e-2
    found = {}
    for weight in (0, 10):
        out = tmp_path / str(weight)
        given = {"model": case.model, "data": case.data, "targets": case.targets, "out": out, "weight": weight, "steps": 3}
        settings = given | {"batch-size": 2, "learning-rate": rate}
        found[weight] = run(script, monkeypatch, *(f"--{key}={value}" for key, value in settings.items()))
    # The term is the runs' only difference, and it reached the student's queries.
    plain, aligned = (_queries(found[weight].model) for weight in found)
    assert plain
    for key, value in plain.items():
        assert (aligned[key] - value).norm() > 1e-3 * value.norm()
    # What was saved loads without lavender, and answers as the trained model does.
    saved = tmp_path / "10"
    assert not any("lavender" in key for key in load_file(next(saved.glob("*model.safetensors"))))
    before = case.load()
    if script == "plain_loop":
        loaded = AutoModelForImageTextToText.from_pretrained(saved).eval()
    else:
        loaded = PeftModel.from_pretrained(case.load(), saved).eval()
    batch = without_lavender(case.collator()(read_samples(case.data)[:2]))
    with torch.no_grad():
        answers = found[10].model.eval()(**batch).logits
        assert torch.equal(loaded(**batch).logits, answers)
        assert not torch.allclose(before(**batch).logits, answers, atol=1e-3)


def _queries(model: Any) -> dict[str, torch.Tensor]:
    """The trained weights of the text's queries."""
    return {
        name: p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad and "language_model" in name and ".q_proj." in name
    }


def test_scripts_run_without_arguments(tmp_path, monkeypatch):
    """They make data of the small world for themselves, once."""
    monkeypatch.chdir(tmp_path)
    for script in SCRIPTS:
        assert run(script, monkeypatch, "--steps=1", pictures=True).last.words > 0
        assert len(list((tmp_path / "runs" / script).glob("*model.safetensors"))) == 1
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted([*SCRIPTS, "small_world"])


def test_questions_share_the_targets_of_their_picture(case_of, tmp_path, monkeypatch, capsys):
    """Each question is another sample; answers that name nothing lie where their regions say. The term reaches the student."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from small_world import make_questions

    data, targets = make_questions(tmp_path / "small_world")
    samples, store = read_samples(data), TargetStore(targets)
    assert len({sample.id for sample in samples}) == len(samples) > 3 * len(store)
    assert not any(sample.id in store for sample in samples)
    found = {}
    for weight in (0, 10):
        given = {"data": data, "targets": targets, "out": tmp_path / str(weight), "weight": weight, "steps": 2, "batch-size": 16}
        found[weight] = run("question_answering", monkeypatch, *(f"--{key}={value}" for key, value in given.items()))
        matched, no_target, *_ = found[weight].last.outcomes.tolist()
        assert matched >= 8, "how many there are names nothing"
        assert no_target == 0
        roles = found[weight].last.batch.roles[found[weight].last.batch.present]
        assert {*roles.tolist()} == {ROLES.index("question"), ROLES.index("answer")}
    plain, aligned = (_queries(found[weight].model) for weight in found)
    assert any(not torch.equal(aligned[key], value) for key, value in plain.items())
    assert len(list((tmp_path / "10").glob("*model.safetensors"))) == 1
    asked = samples[0]
    picture = next(target for sample in store if (target := store[sample]).image_sha256 == _digest_of(asked.image))
    content = [word.text for word in words_of(asked.question) if word.text.casefold() not in FUNCTION_WORDS]
    named = {word.text.casefold() for word in picture.word_maps.words} - {*lavender.WordsConfig().exclude}
    words = [word for word in content if word.casefold() in named]
    assert 0 < len(words) < len(content)
    told = capsys.readouterr().out.splitlines()
    assert [f"question: {word}" for word in words] + [f"answer: {asked.answer}"] == told[: len(words) + 1]
    batch = lavender.Collator(AutoProcessor.from_pretrained(STUDENT), store)([asked])
    (region,) = asked.regions
    assert np.array_equal(batch["lavender_targets"][0, 0].numpy(), picture.word_maps[region.word])


def _digest_of(path: Path) -> str:
    return image_sha256(lavender.images.load_image(path))


class _Gradients(TrainerCallback):
    """Keeps the gradients of an optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("library", "name", "loss_type", "lora"),
    [
        ("transformers", "llava", "nll", True),
        ("transformers", "qwen2_5_vl", "nll", False),
        ("trl", "llava", "nll", False),
        ("trl", "llava", "dft", False),
        ("trl", "mllama", "nll", True),
        ("trl", "qwen2_5_vl", "nll", False),
    ],
)
def test_trainers_follow_the_gradient_of_the_whole_loss(library, name, loss_type, lora, case_of, tmp_path):
    """Against the definition, with two micro-batches of different length. TRL makes a loss of its own from log-probabilities."""
    case, weight = case_of(name), 3.0
    collator, batches, gradients = case.collator(), [], _Gradients()

    def noted(samples):
        batches.append(collator(samples))
        return dict(batches[-1])

    model = case.load()
    lavender.patch(model, AlignmentConfig(weight=weight, aligner="sim"))
    config = LoraConfig(target_modules=["q_proj", "k_proj"], modules_to_save=["lavender"], task_type="CAUSAL_LM") if lora else None
    settings = {
        "output_dir": tmp_path, "max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "max_grad_norm": 0, "logging_steps": 1, "remove_unused_columns": False, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    samples = read_samples(case.data)
    if library == "trl":
        rows = Dataset.from_list([{**vars(sample), "image": str(sample.image)} for sample in samples])
        arguments = SFTConfig(**settings, loss_type=loss_type, bf16=False)
        trainer = SFTTrainer(
            model, arguments, noted, rows, processing_class=collator.processor, callbacks=[gradients], peft_config=config
        )
    else:
        wrapped = get_peft_model(model, config) if lora else model
        trainer = Trainer(wrapped, TrainingArguments(**settings), noted, samples, callbacks=[gradients])
    trainer.add_callback(lavender.LavenderCallback(trainer, picture_steps=0))
    weights = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()

    plain = case.load()
    handle = lavender.patch(plain, AlignmentConfig(weight=weight, aligner="sim"))
    trained = get_peft_model(plain, config) if lora else plain
    trained.load_state_dict(weights)
    trained.train()
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    assert len(counts) == 2
    assert counts[0] != counts[1]
    counted = getattr(plain, "accepts_loss_kwargs", True)
    assert counted == (name != "qwen2_5_vl")
    language, alignment = 0.0, 0.0
    for batch, count in zip(batches, counts, strict=True):
        share = count / sum(counts) if counted else 0.5
        # Without labels, the loss is the term alone.
        output = trained(**{key: value for key, value in batch.items() if key != "labels"})
        labels = batch["labels"][:, 1:]
        log_probs = output.logits[:, :-1].log_softmax(dim=-1).gather(2, labels.clamp_min(0)[..., None])[..., 0][labels != -100]
        each = -log_probs * (log_probs.exp().detach() if loss_type == "dft" else 1)
        (share * (each.mean() + output.loss)).backward()
        language, alignment = language + share * each.mean().item(), alignment + share * handle.last.loss.item()
    expected = {key: p.grad for key, p in trained.named_parameters() if p.grad is not None}
    assert any("lavender" in key for key in expected)
    assert {key for key, grad in gradients.found.items() if grad.abs().max() > 0} == {
        key for key, grad in expected.items() if grad.abs().max() > 0
    }
    for key, grad in expected.items():
        torch.testing.assert_close(gradients.found[key], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()) + 1e-7)
    logged = trainer.state.log_history[0]
    if loss_type == "nll":
        assert logged["loss"] == pytest.approx(language + weight * alignment, rel=1e-3)
    if library == "transformers":
        assert logged["language_loss"] == pytest.approx(language, rel=1e-3)
        assert logged["alignment_loss"] == pytest.approx(alignment, rel=1e-3)
