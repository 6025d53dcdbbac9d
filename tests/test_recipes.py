"""The recipes, shortened: one seed in, the same weights out, and an interrupted training ends like an undisturbed one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipes import fitting
from recipes.student import StudentRecipe, _pack, _patch_labels, make_processor, train_student
from recipes.teacher import TeacherRecipe, train_teacher


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TEACHER = TeacherRecipe(num_scenes=24, autoencoder_steps=2, autoencoder_batch=2, unet_steps=2, unet_batch=2)
STUDENT = StudentRecipe(num_scenes=24, vision_steps=2, vision_batch=2, language_steps=2, language_batch=2)


def weights(folder):
    return {
        f"{path.relative_to(folder)}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize(("train", "recipe"), [(train_teacher, TEACHER), (train_student, STUDENT)], ids=["teacher", "student"])
def test_a_recipe_gives_the_same_weights_twice(train, recipe, tmp_path):
    train(tmp_path / "a", recipe)
    train(tmp_path / "b", recipe)
    ours, theirs = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert len(ours) > 50
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert all(value.dtype == torch.float16 for value in ours.values() if value.is_floating_point())
    record = json.loads((tmp_path / "a/recipe.json").read_text())
    assert record["recipe"]["seed"] == recipe.seed
    assert all(cost["steps"] == 2 for cost in record["cost"].values())


def test_an_interrupted_fit_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "SAVE_EVERY", 5)

    def run(folder, stop_at=None):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)
        calls = 0

        def loss_of(generator):
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise KeyboardInterrupt
            inputs = torch.randn(8, 3, generator=generator)
            return (module(inputs) - inputs.sum(1, keepdim=True)).square().mean()

        fitting.fit("line", module, loss_of, steps=63, learning_rate=0.2, seed=4, folder=folder)
        return module

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop_at=33)
    resumed = run(tmp_path / "killed")
    assert torch.equal(whole.weight, resumed.weight)
    torch.manual_seed(0)
    start = torch.nn.Linear(3, 1).weight
    assert (whole.weight - 1).norm() < (start - 1).norm() / 2, "it learned"


def test_patch_labels_name_what_is_under_a_patch(scenes):
    labels = _patch_labels(scenes[:20], covered_share=0.2)
    for scene, (forms, paints) in zip(scenes[:20], labels, strict=True):
        share = scene.masks.reshape(-1, 8, 8, 8, 8).mean(axis=(2, 4)).max(axis=0).ravel()
        assert ((forms > 0).numpy() == (share >= 0.2)).all()
        assert torch.equal(forms > 0, paints > 0)


def test_packed_turns_read_as_separate_conversations(scenes):
    """Each turn's tokens, behind the shared prefix, are those of the conversation that a user would have."""
    processor = make_processor(scenes)
    packed = _pack(processor, scenes[:3])
    for row, scene in enumerate(scenes[:3]):
        for turn, question in enumerate(scene.questions, start=2):
            chosen = (packed.turns[row] == 0) | (packed.turns[row] == turn)
            messages = [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
                {"role": "assistant", "content": question.answer},
            ]
            text = processor.apply_chat_template(messages)
            expected = processor(images=[scene.image], text=[text], add_special_tokens=False, return_tensors="pt").input_ids[0]
            assert torch.equal(packed.ids[row][chosen], expected)
            assert torch.equal(packed.positions[row][chosen], torch.arange(len(expected)))
            labels = packed.labels[row][chosen]
            assert processor.tokenizer.decode(labels[labels != -100]) == question.answer + "</s>"


def test_the_commands_earlier_name_works_and_says_the_new_one():
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "lavender.miniworld", "train", "--help"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m recipes train")
    assert "use python -m recipes" in done.stderr


def test_the_package_does_not_know_its_recipes():
    for path in (Path(__file__).parents[1] / "lavender").rglob("*.py"):
        assert "import recipes" not in path.read_text(), path
        assert "from recipes" not in path.read_text(), path
