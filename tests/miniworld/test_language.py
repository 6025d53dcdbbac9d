from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import lavender
from lavender.batches.collator import Collator
from lavender.config import AlignmentConfig, WordsConfig
from lavender.errors import ConfigError, DataError, ModelError, TargetError
from lavender.evaluation.answers import generate
from lavender.miniworld import language
from lavender.miniworld.language import (
    LanguageStage,
    QuestionSet,
    conversation_of,
    features_of,
    pointing,
    right_answers,
    small_student,
    train_language,
)
from lavender.miniworld.packing import PackedPictures
from lavender.miniworld.scenes import ask_all, make_scenes
from lavender.miniworld.stores import exact_targets
from lavender.types import WordBatch

STAGE = LanguageStage(steps=10, pictures=2, questions=3, warmup_steps=2, falling=0.4, seed=5)
ALIGNMENT = AlignmentConfig(weight=1.0, rows="reads", aligner="identity")


@pytest.fixture(autouse=True)
def saves_often(monkeypatch):
    monkeypatch.setattr(language, "SAVE_EVERY", 3)


@pytest.fixture(scope="module")
def asked():
    return [(scene, ask_all(scene, 9)) for scene in make_scenes(9, 5)]


@pytest.fixture(scope="module")
def data(asked, tmp_path_factory):
    model, processor = small_student(0)
    scenes = [scene for scene, _ in asked]
    store = exact_targets(tmp_path_factory.mktemp("exact"), scenes, 8)
    collator = Collator(processor, store, WordsConfig(roles=("question", "answer")), on_error="raise")
    packed = PackedPictures(collator, (conversation_of(str(n), *each) for n, each in enumerate(asked)))
    kinds = [[question.type for question in questions] for _, questions in asked]
    return QuestionSet(packed, features_of(model, processor, scenes), kinds)


def train(data, folder, stage=STAGE, alignment=ALIGNMENT, **more):
    model, _ = small_student(1)
    history = train_language(model, data, stage, folder, alignment=alignment, measure_every=4, **more)
    return model.state_dict(), history


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def without_times(history):
    return [{name: value for name, value in entry.items() if name != "cpu_s"} for entry in history]


class Killed(Exception):
    pass


@pytest.mark.parametrize("alignment", [None, ALIGNMENT])
def test_a_run_that_was_killed_ends_as_one_that_was_not(data, tmp_path, alignment):
    def measure(model):
        return {"norm": round(float(model.get_output_embeddings().weight.detach().norm()), 6)}

    weights, history = train(data, tmp_path / "whole", alignment=alignment, measure=measure)
    for last in (1, 4, 7, 9):

        def dies(step, last=last):
            if step == last:
                raise Killed

        with pytest.raises(Killed):
            train(data, tmp_path / "killed", alignment=alignment, measure=measure, on_step=dies)
    again, history_again = train(data, tmp_path / "killed", alignment=alignment, measure=measure)
    assert same(weights, again)
    assert without_times(history) == without_times(history_again)
    assert [entry["step"] for entry in history] == [4, 8, 10]
    assert json.loads((tmp_path / "killed/history.json").read_text()) == history_again
    third, _ = train(data, tmp_path / "killed", alignment=alignment)
    assert same(weights, third), "a finished run is read"


def test_a_longer_run_may_begin_with_a_shorter_one(data, tmp_path):
    """The rate of both is the same up to the step from which that of the shorter one falls."""
    train(data, tmp_path / "short")
    longer = replace(STAGE, steps=15)
    assert STAGE.fall_from == 6 < longer.fall_from == 9
    expected, history = train(data, tmp_path / "scratch", longer)
    taken = []
    weights, continued = train(data, tmp_path / "longer", longer, start=tmp_path / "short", on_step=taken.append)
    assert taken == list(range(7, 16))
    assert same(expected, weights)
    assert without_times(history) == without_times(continued)


def test_a_folder_of_other_settings_is_refused(data, tmp_path):
    train(data, tmp_path / "run", replace(STAGE, steps=1), alignment=None)
    for stage, alignment in ((replace(STAGE, steps=2), None), (replace(STAGE, steps=1), ALIGNMENT)):
        with pytest.raises(TargetError, match="other settings"):
            train(data, tmp_path / "run", stage, alignment)


def packed_of(asked, store, processor):
    collator = Collator(processor, store, WordsConfig(roles=("question", "answer")), on_error="raise")
    return PackedPictures(collator, (conversation_of(str(n), *each) for n, each in enumerate(asked)))


def test_a_run_is_of_its_questions_targets_and_first_weights(asked, data, tmp_path):
    """What would be another training is refused by name; to the last bit of a target, a label, a picture or a weight."""
    stage, (_, processor) = replace(STAGE, steps=1), small_student(0)
    train(data, tmp_path / "run", stage)
    scenes = [scene for scene, _ in asked]
    plain = replace(data, packed=packed_of(asked, None, processor))
    moved = [replace(scene, masks=scene.masks[:, ::-1]) for scene in scenes]
    shifted = replace(data, packed=packed_of(asked, exact_targets(tmp_path / "moved", moved, 8), processor))
    noisy = [(replace(scene, pixels=scene.pixels ^ 1), questions) for scene, questions in asked]
    pictured = replace(data, packed=packed_of(noisy, None, processor))
    renamed = replace(data, kinds=[kinds[::-1] for kinds in data.kinds])
    digests = {each.digest() for each in (data, plain, shifted, pictured, renamed)}
    assert len(digests) == 5
    again = replace(data, packed=packed_of(asked, exact_targets(tmp_path / "again", scenes, 8), processor))
    assert again.digest() == data.digest()
    with pytest.raises(TargetError, match=rf"other settings \(data='{data.digest()}', now '{shifted.digest()}'\)"):
        train(shifted, tmp_path / "run", stage)
    model, _ = small_student(2)
    with pytest.raises(TargetError, match=r"other settings \(first weights='\w+', now '\w+'\)"):
        train_language(model, data, stage, tmp_path / "run", alignment=ALIGNMENT, measure_every=4)
    model, _ = small_student(1)
    with pytest.raises(TargetError, match=r"measure_every=4, now 5"):
        train_language(model, data, stage, tmp_path / "run", alignment=ALIGNMENT, measure_every=5)
    with pytest.raises(TargetError, match="no word of the questions has a target"):
        train(plain, tmp_path / "other", stage)
    with pytest.raises(ConfigError, match="no targets to point at"):
        pointing(lavender.patch(model), plain)
    (tmp_path / "run/settings.json").unlink()
    with pytest.raises(TargetError, match=r"settings\.json is damaged"):
        train(data, tmp_path / "run", stage)


def test_a_start_is_the_same_training(data, tmp_path):
    short = tmp_path / "short"
    train(data, short)
    longer = replace(STAGE, steps=15)
    with pytest.raises(TargetError, match=r"no training in .*nowhere"):
        train(data, tmp_path / "new", longer, start=tmp_path / "nowhere")
    for stage, alignment, name in (
        (replace(longer, seed=1), ALIGNMENT, r"stage\.seed=5, now 1"),
        (longer, None, r"alignment\.weight=1\.0, now None"),
    ):
        with pytest.raises(TargetError, match=rf"short holds a training with other settings \(.*{name}"):
            train(data, tmp_path / "new", stage, alignment, start=short)
    with pytest.raises(TargetError, match=r"is of step 6, and the rate of this training falls from step 5"):
        train(data, tmp_path / "new", replace(STAGE, steps=8), start=short)
    for changes in ({"until": 0.5}, {"schedule": "linear"}):
        with pytest.raises(ConfigError, match="leave start out"):
            train(data, tmp_path / "new", longer, replace(ALIGNMENT, **changes), start=short)
    assert not (tmp_path / "new").exists()
    train(data, tmp_path / "new", longer, start=short)
    with pytest.raises(TargetError, match=r"other settings \(start=10, now None\)"):
        train(data, tmp_path / "new", longer)


def test_an_error_leaves_no_patch(data, tmp_path):
    def dies(step):
        raise Killed

    model, _ = small_student(1)
    names = model.state_dict().keys()
    with pytest.raises(Killed):
        train_language(model, data, STAGE, tmp_path, alignment=replace(ALIGNMENT, aligner="light"), on_step=dies)
    assert model.state_dict().keys() == names
    assert not hasattr(model, "_lavender_patch")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"pictures": 0}, "pictures is 0"),
        ({"questions": -1}, "questions is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"falling": 1.5}, "falling is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"steps": "10"}, "steps is '10'"),
    ],
)
def test_a_stage_that_cannot_be_is_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        LanguageStage(**settings)
    assert LanguageStage(warmup_steps=0).rate(0) == LanguageStage().learning_rate


def test_pictures_that_there_are_not_are_refused(data):
    model, _ = small_student(1)
    for count in (0, 6, -1):
        with pytest.raises(ConfigError, match=rf"count is {count}; there are 5 pictures"):
            right_answers(model, data, count)
    for pictures, turns in (([], []), ([5], [[0]]), ([-1], [[0]]), ([0], [[]]), ([0], [[99]]), ([0, 1], [[0]])):
        with pytest.raises(ConfigError, match=r"asked for|were given"):
            data.packed.batch(pictures, turns, with_words=True)
    with pytest.raises(DataError, match=r"5 pictures of \d+ turns"):
        replace(data, kinds=data.kinds[1:])
    with (
        lavender.patch(model, replace(ALIGNMENT, layers=(2,))) as handle,
        pytest.raises(ModelError, match=r"reads 1 of the model's 3 layers"),
    ):
        pointing(handle, data)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"x" * 100])
def test_a_damaged_state_is_named(data, tmp_path, damage):
    train(data, tmp_path, replace(STAGE, steps=1), alignment=None)
    state = tmp_path / "state.pt"
    state.write_bytes(damage(state.read_bytes()))
    with pytest.raises(TargetError, match=r"state\.pt is damaged"):
        train(data, tmp_path, replace(STAGE, steps=1), alignment=None)


def test_the_rate_rises_stays_and_falls():
    stage = LanguageStage(steps=100, learning_rate=2.0, warmup_steps=10, falling=0.2)
    assert [stage.rate(step) for step in (0, 4, 9, 50, 80, 90, 99)] == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0, 1.0, 0.1])


def test_every_picture_comes_once_before_one_comes_again(data):
    pictures, turns = zip(*(language._drawn(data, replace(STAGE, pictures=3), step) for step in range(10)), strict=True)
    order = [picture for drawn in pictures for picture in drawn]
    for first in range(0, 30, 5):
        assert sorted(order[first : first + 5]) == list(range(5))
    for drawn, chosen in zip(pictures, turns, strict=True):
        for picture, questions in zip(drawn, chosen, strict=True):
            assert len(set(questions)) == len(questions) == 3
            assert max(questions) < len(data.kinds[picture])


def test_the_vision_tower_stays_and_the_patch_goes(data, tmp_path):
    before = small_student(1)[0].state_dict()
    model, _ = small_student(1)
    train_language(model, data, replace(STAGE, steps=2), tmp_path, alignment=ALIGNMENT)
    after = model.state_dict()
    assert after.keys() == before.keys(), "nothing of lavender stays in the model"
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "vision_tower" not in name}


def test_right_answers_are_those_of_greedy_decoding(asked, data, tmp_path):
    """Questions one by one, by `generate`: on a student that has learned enough to be right now and then."""
    model, processor = small_student(2)
    train_language(model, data, replace(STAGE, steps=60, pictures=4, questions=8), tmp_path)
    right = {kind: iter(hits) for kind, hits in right_answers(model, data).items()}
    found, said = [], []
    for scene, questions in asked:
        answers = generate(model, processor, [scene.image] * len(questions), [q.text for q in questions], max_new_tokens=8)
        said += [answer.strip() == question.answer for answer, question in zip(answers, questions, strict=True)]
        found += [next(right[question.type]) for question in questions]
    assert found == said
    assert 0.2 < sum(found) / len(found) < 1
    assert not any(list(rest) for rest in right.values())
    one = right_answers(model, data, 1)
    assert sum(map(len, one.values())) == len(asked[0][1])


def test_pointing_is_that_of_eager_attention(asked, data):
    """The mean of eager attention over layers and heads, at the words' own rows."""
    model, _ = small_student(2)
    model.eval()
    with lavender.patch(model, ALIGNMENT) as handle:
        found = pointing(handle, data)
    model.set_attn_implementation("eager")
    hits = {"question": [], "answer": []}
    for picture in range(len(data.packed)):
        batch = data.batch(model, [picture], [list(range(len(data.kinds[picture])))], with_words=True)
        inputs, words = WordBatch.split(batch)
        # Eager attention adds its mask.
        inputs["attention_mask"] = torch.zeros(inputs["attention_mask"].shape).masked_fill(~inputs["attention_mask"], -math.inf)
        with torch.no_grad():
            attention = torch.stack(model(**inputs, use_cache=False, output_attentions=True).attentions).mean(dim=(0, 2))[0]
        for w in words.present[0].nonzero().flatten().tolist():
            row = attention[words.tokens[0][words.token_words[0] == w]][:, words.image_positions[0]].mean(dim=0)
            share = float(words.targets[0, w].flatten()[row.argmax()])
            hits["question" if words.roles[0, w] == 0 else "answer"].append(share >= language.COVERED)
    assert found == pytest.approx({name: sum(values) / len(values) for name, values in hits.items()})
