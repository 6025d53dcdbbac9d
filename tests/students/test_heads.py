"""Layers and heads that localize before the training: their scores against the definition, and what is chosen by them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import lavender
from lavender.batches.collator import Collator
from lavender.config import AlignmentConfig
from lavender.errors import ConfigError, ModelError
from lavender.students.heads import _Sums, _unit
from lavender.types import ROLES

from ..conftest import changed, words_of_batch
from .test_reading import QUESTION, eager_attention, maps_of, with_roles


@pytest.fixture
def batches(processor, samples):
    torch.manual_seed(0)
    return [with_roles(Collator(processor)(samples[n : n + 4])) for n in (0, 4)]


def scores_by_definition(student, batches, rows, role):
    """[L, H] and [L]: the mean over words of the correlation with their own target, less the mean of those with all others'."""
    eager = copy.deepcopy(student).double()
    eager.set_attn_implementation("eager")
    maps, targets = [], []
    for batch in batches:
        words = words_of_batch(batch)
        attention = eager_attention(eager, batch).detach()
        for b, w in words.present.nonzero().tolist():
            if role is None or (words.roles[b, w] == QUESTION) == (role == "question"):
                maps.append([one.numpy() for one in maps_of(attention, words, b, w, rows)])
                targets.append(words.targets[b, w].double().numpy())

    def score(of_word):
        correlations = np.array(
            [[np.mean([np.corrcoef(of_word(m).ravel(), t.ravel())[0, 1] for m in own]) for t in targets] for own in maps]
        )
        n = len(targets)
        return (np.trace(correlations) - (correlations.sum() - np.trace(correlations)) / (n - 1)) / n

    num_layers, num_heads = maps[0][0].shape[:2]
    heads = [[score(lambda m, a=a, h=h: m[a, h]) for h in range(num_heads)] for a in range(num_layers)]
    return np.array(heads), np.array([score(lambda m, a=a: m[a].mean(0)) for a in range(num_layers)])


@pytest.mark.parametrize("rows", ["predicts", "both", "last"])
def test_scores_are_their_definition(student, batches, rows):
    found = lavender.choose_heads(
        student, AlignmentConfig(rows=rows, heads="best:3", weight=10.0, aligner="sim", question_rows=None), batches
    )
    heads, layers = scores_by_definition(student, batches, rows, None)
    assert found.scores.keys() == {"answer"}
    np.testing.assert_allclose(found.scores["answer"].heads, heads, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.scores["answer"].layers, layers, rtol=1e-4, atol=1e-6)
    assert found.scores["answer"].num_words == sum(int(words_of_batch(b).present.sum()) for b in batches)
    best = sorted(((-s, *np.unravel_index(n, heads.shape)) for n, s in enumerate(heads.ravel())))[:3]
    assert found.config.heads == ",".join(f"{layer}.{head}" for layer, head in sorted(place for _, *place in best))
    assert found.config.layers == ()


def test_questions_are_scored_apart_where_their_settings_differ(student, batches):
    config = AlignmentConfig(
        rows="predicts",
        question_rows="reads",
        layers="best:2",
        heads="best:2",
        question_layers="best:1",
        weight=10.0,
        aligner="sim",
    )
    found = lavender.choose_heads(student, config, batches)
    for role, rows, count in (("answer", "predicts", 2), ("question", "reads", 1)):
        heads, layers = scores_by_definition(student, batches, rows, role)
        np.testing.assert_allclose(found.scores[role].heads, heads, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.scores[role].layers, layers, rtol=1e-4, atol=1e-6)
        prefix = "question_" if role == "question" else ""
        chosen = getattr(found.config, f"{prefix}layers")
        assert set(chosen) == set(np.argsort(-layers)[:count].tolist())
        among = [(layer, head) for layer in chosen for head in range(4)]
        best = sorted(sorted(among, key=lambda place: -heads[place])[:2])
        assert getattr(found.config, f"{prefix}heads") == ",".join(f"{layer}.{head}" for layer, head in best)
    assert found.config.rows == "predicts"
    assert found.config.question_rows == "reads"
    patch = lavender.patch(student, found.config)  # which it takes
    student(**batches[0])
    assert patch.last.loss > 0


def test_a_head_that_looks_at_one_place_scores_nothing():
    """Whatever the targets are, and however well it agrees with most of them."""
    targets = torch.rand(9, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    middle = torch.zeros(8, 8, dtype=torch.float64)
    middle[3:5, 3:5] = 1
    targets[:6] += 5 * middle
    sums = _Sums()
    for target in targets:
        sums.add(_unit(torch.stack([middle, target, torch.full_like(middle, 0.1), middle])[None]), _unit(target))
    scores = sums.scores("answer")
    assert scores.heads[0, [0, 2]].abs().max() < 1e-12
    assert scores.heads[0, 1] > 0.3


def test_a_planted_head_is_found(student, batches):
    """Targets are what one head of one layer sees: its score is the best one, and training may be by it alone."""
    planted = []
    with torch.no_grad(), lavender.patch(student) as patch:
        for batch in batches:
            planted.append(changed(batch, targets=patch.capture("both", **batch)[:, 2, 1]))
    found = lavender.choose_heads(
        student, AlignmentConfig(rows="both", heads="best:1", weight=10.0, aligner="sim", question_rows=None), planted
    )
    assert found.config.heads == "2.1"
    assert lavender.choose_heads(
        student, AlignmentConfig(rows="both", layers="best:1", weight=10.0, aligner="sim", question_rows=None), planted
    ).config.layers == (2,)


def test_of_equal_scores_the_first_is_better(student, batches):
    """Heads that look everywhere alike score nothing, all of them."""
    for layer in student.model.language_model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    found = lavender.choose_heads(
        student, AlignmentConfig(heads="best:5", layers="best:3", weight=10.0, aligner="sim", question_rows=None), batches
    )
    assert not found.scores["answer"].heads.any()
    assert (found.config.layers, found.config.heads) == ((0, 1, 2), "0.0,0.1,0.2,0.3,1.0")


def test_the_model_is_left_as_it_was(student, batches):
    student.train()
    student.model.vision_tower.eval()
    modes = [module.training for module in student.modules()]
    config = AlignmentConfig(heads="best:2", renormalize=True, weight=10.0, aligner="sim", question_rows=None)
    alone = lavender.choose_heads(student, config, batches)
    assert not hasattr(student, "_lavender_patch")
    assert [module.training for module in student.modules()] == modes
    assert all(p.grad is None for p in student.parameters())
    with lavender.patch(student) as patch:  # one that looks may stay
        again = lavender.choose_heads(student, config, iter(batches))
        assert patch.is_patched
        assert patch.config.heads == "mean"
    assert again.config == alone.config
    assert again.to_dict() == alone.to_dict()


def test_what_is_not_chosen_does_not_train(student, batches):
    for settings in ({"heads": "best:2"}, {"layers": "best:1"}, {"question_layers": "best:1"}, {"question_heads": "best:4"}):
        name, value = next(iter(settings.items()))
        with pytest.raises(ConfigError, match=rf"{name}='{value}'.*lavender\.choose_heads"):
            lavender.patch(student, AlignmentConfig(aligner="identity", **settings))
    assert not hasattr(student, "lavender")


@pytest.mark.parametrize(
    ("settings", "change", "match"),
    [
        ({"heads": "best:17"}, {}, r"best:17.*16 heads"),
        ({"heads": "best:5", "layers": "best:1"}, {}, r"best:5.*4 heads"),
        ({"heads": "best:5", "layers": (3,)}, {}, r"best:5.*4 heads"),
        ({"layers": "best:5"}, {}, r"best:5.*4 attention layers"),
        ({"heads": "best:2", "question_heads": "best:3"}, {}, r"2 heads and questions' 3.*identity"),
        ({"heads": "best:2"}, {"targets": None}, "no targets"),
        ({"heads": "best:2"}, {"present": torch.zeros(4, 5, dtype=torch.bool)}, r"0 words with targets.*answers'"),
        (
            {"heads": "best:2", "question_heads": "best:2", "question_rows": "reads"},
            {"roles": torch.ones(4, 5).long()},
            "questions'",
        ),
    ],
)
def test_choices_that_cannot_be_made_are_refused(student, batches, settings, change, match):
    with pytest.raises(ConfigError, match=match):
        lavender.choose_heads(
            student,
            AlignmentConfig(**({"weight": 10.0, "aligner": "sim", "question_rows": None} | settings)),
            [changed(batch, **change) for batch in batches],
        )


def test_layers_of_a_patch_in_training_are_no_choice(student, batches):
    with (
        lavender.patch(student, AlignmentConfig(layers=(1,), weight=10.0, aligner="sim", question_rows=None)),
        pytest.raises(ModelError, match="some of its layers"),
    ):
        lavender.choose_heads(student, AlignmentConfig(heads="best:2", weight=10.0, aligner="sim", question_rows=None), batches)


def test_answers_choice_is_the_questions_where_there_are_none(student, batches):
    """With rows of their own alone; who asks for a choice by name gets one, or an error."""
    config = AlignmentConfig(heads="best:2", question_rows="reads", weight=10.0, aligner="sim")
    answers = [changed(batch, roles=torch.full((4, 5), ROLES.index("answer"))) for batch in batches]
    found = lavender.choose_heads(student, config, answers)
    assert found.scores.keys() == {"answer"}
    assert found.config.question_heads is None
    assert found.config.of_question.heads == found.config.heads


@pytest.mark.parametrize("settings", [{"layers": (3, 2, 1, 0)}, {"heads": "3.1,0.2,1.0,2.2"}])
def test_layers_keep_their_numbers_in_a_patch_of_another_order(student, batches, settings):
    config = AlignmentConfig(heads="best:3", layers="best:2", question_rows=None)
    alone = lavender.choose_heads(student, config, batches)
    with lavender.patch(student, AlignmentConfig(**settings)):
        found = lavender.choose_heads(student, config, batches)
    assert found.to_dict() == alone.to_dict()


def test_questions_alone_are_chosen_by(student, batches):
    """For answers, of which there are none, it is their choice too; rows of their own are no choice."""
    asked = [changed(batch, roles=torch.full((4, 5), QUESTION)) for batch in batches]
    found = lavender.choose_heads(student, AlignmentConfig(heads="best:2", question_rows="reads"), asked)
    heads, _ = scores_by_definition(student, asked, "reads", "question")
    assert found.scores.keys() == {"question"}
    np.testing.assert_allclose(found.scores["question"].heads, heads, rtol=1e-4, atol=1e-6)
    best = sorted(np.argsort(-heads.ravel())[:2].tolist())
    assert found.config.of_question.heads == ",".join(f"{n // 4}.{n % 4}" for n in best)
    assert found.config.question_heads is None


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"layers": (9,), "heads": "best:1"}, ModelError, r"layers \[9\] were asked for.*0 to 3"),
        ({"heads": "best:1", "question_heads": "9.0"}, ModelError, r"heads 9\.0 were asked for"),
        ({"layers": "best:1", "question_layers": (9,)}, ModelError, r"layers \[9\]"),
        ({"question_layers": "best:5"}, ConfigError, r"^question_layers is 'best:5'"),
        ({"question_heads": "best:17"}, ConfigError, r"^question_heads is 'best:17'"),
    ],
)
def test_places_that_there_are_not_are_named(student, batches, settings, error, match):
    with pytest.raises(error, match=match):
        lavender.choose_heads(student, AlignmentConfig(**settings), batches)


def test_what_is_no_batches_is_named(student, batches, samples):
    config = AlignmentConfig(heads="best:2")
    for given, match in ((batches[0], "is one batch"), (samples, "has a Sample"), ([], "0 words")):
        with pytest.raises(ConfigError, match=match):
            lavender.choose_heads(student, config, given)
    with pytest.raises(ConfigError, match="config is a dict"):
        lavender.choose_heads(student, {"heads": "best:2"}, batches)
