"""Rows, layers and heads by the role of a word: loss and gradients against a short definition over transformers' own attention."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
import torch

import lavender
from lavender.config import Aggregation, AlignmentConfig, Rows
from lavender.errors import CaptureError, ConfigError, ModelError
from lavender.students.capture import Forward
from lavender.types import ROLES, WordBatch

from ..conftest import changed, with_targets, without_lavender, words_of_batch

QUESTION, ANSWER, END = (ROLES.index(name) for name in ("question", "answer", "prompt end"))


def with_roles(batch, size=8):
    """The batch with five words per row of its text: two questions' (of three and one tokens), the end of the prompt, two answers'
    (of two and one tokens), in another order in every other row; targets of `size`."""
    words = words_of_batch(batch)
    tokens, token_words, roles = [], [], []
    for b, labels in enumerate(batch["labels"]):
        start = int((labels != -100).nonzero()[0])
        order = [0, 1, 2, 3, 4] if b % 2 == 0 else [3, 0, 4, 2, 1]
        spans = [range(start - 6, start - 3), [start - 2], [start - 1], range(start, start + 2), [start + 3]]
        tokens.append([t for w in order for t in spans[w]] + [-1])
        token_words.append([place for place, w in enumerate(order) for _ in spans[w]] + [-1])
        roles.append([[QUESTION, QUESTION, END, ANSWER, ANSWER][w] for w in order])
    token_words = torch.tensor(token_words)
    lengths = torch.stack([(token_words == w).sum(1) for w in range(5)], dim=1)
    shares = (1 / lengths.gather(1, token_words.clamp_min(0))).where(token_words >= 0, 0)
    present = torch.ones(len(tokens), 5, dtype=torch.bool)
    present[1, 3] = present[2, 0] = False
    words = replace(words, tokens=torch.tensor(tokens), token_words=token_words, token_weights=shares, present=present)
    inputs = WordBatch.split(batch)[0]
    torch.manual_seed(3)
    return with_targets({**inputs, **replace(words, roles=torch.tensor(roles), targets=None).to_batch()}, size)


@pytest.fixture
def role_batch(batch):
    return with_roles(batch)


def zscore(a):
    return (a - a.mean()) / (a.var(unbiased=False) + 1e-6).sqrt()


def maps_of(attentions, words, b, w, rows):
    """What one word compares: a list of [L, H, 8, 8]."""
    tokens = words.tokens[b][words.token_words[b] == w]
    rows = "reads" if words.roles is not None and words.roles[b, w] == END else rows
    chosen = {"reads": [tokens], "predicts": [tokens - 1], "both": [tokens, tokens - 1], "last": [tokens.max()[None]]}[rows]
    return [attentions[b][:, :, at][..., words.image_positions[b]].mean(2).unflatten(-1, (8, 8)) * 64 for at in chosen]


def by_definition(attentions, words, settings, project):
    """The mean over comparisons, and each word's aligned map; `settings` by role, `project` from [L, H, 8, 8] to [8, 8]."""
    losses, aligned = [], {}
    for b, w in words.present.nonzero().tolist():
        role = ANSWER if words.roles is None else int(words.roles[b, w])
        own = settings["question" if role == QUESTION else "answer"]
        seen = [project(own, maps) for maps in maps_of(attentions, words, b, w, own["rows"])]
        losses += [(zscore(one) - zscore(words.targets[b, w].double())).square().mean() for one in seen]
        aligned[b, w] = torch.stack(seen).mean(0)
    return torch.stack(losses).mean(), aligned


def eager_attention(model, batch):
    """[B, L, H, T, N], with its graph. transformers' eager softmax runs in float32 whatever the model's dtype."""
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in without_lavender(batch).items() if k != "labels"}
    return torch.stack(model(**inputs, output_attentions=True).attentions, dim=1)


def plain_mean(alignment):
    """Without an aligner: the mean over what is picked."""
    return lambda own, maps: pick(own, maps).mean((0, 1))


def require_equal(student, batch, config, settings, project=plain_mean):
    """The patched student's step against the definition's; returns what it compared. `project` takes the patch's aligner."""
    student = student.double()
    eager = copy.deepcopy(student)
    eager.set_attn_implementation("eager")
    words = words_of_batch(batch)
    given = {k: v.double() if v.is_floating_point() else v for k, v in batch.items() if k != "labels"}
    with lavender.patch(student, replace(config, weight=1.0)) as patch:
        alignment = student.lavender.double()
        loss = student(**given).loss
        named = {n: p for n, p in student.named_parameters() if not n.startswith("lavender")}
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        expected, aligned = by_definition(eager_attention(eager, batch), words, settings, project(alignment))
        others = dict(eager.named_parameters())
        wanted = torch.autograd.grad(expected, [others[n] for n in named], allow_unused=True)
        with torch.no_grad():
            reached = patch.align(**given)
        last = patch.last
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    assert last.words == words.present.sum()
    assert reached.shape == last.aligned.shape == (*words.present.shape, 8, 8)
    for (b, w), one in aligned.items():
        torch.testing.assert_close(last.aligned[b, w], one.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(reached[b, w], one.detach(), rtol=1e-4, atol=1e-5)
    whole = sum(g.square().sum() for g in wanted if g is not None).sqrt()
    assert whole > 1e-4
    for name, a, b in zip(named, found, wanted, strict=True):
        none = torch.zeros_like(named[name])
        assert ((none if a is None else a) - (none if b is None else b)).norm() <= 1e-5 * whole, name
    return last


def pick(own, maps):
    """[L, H, 8, 8] of the layers and heads of one role; the K chosen heads are [1, K, 8, 8]."""
    if own.get("heads"):
        return torch.stack([maps[layer, head] for layer, head in own["heads"]])[None]
    return maps[list(own["layers"])] if own.get("layers") else maps


def some(cases, count):
    """Every `count`-th of the cases in the quick tests, all in the full ones."""
    return [case if n % count == 0 else pytest.param(*case, marks=pytest.mark.full) for n, case in enumerate(cases)]


@pytest.mark.parametrize(("answer", "question"), some(product(get_args(Rows), get_args(Rows)), 5))
def test_rows_are_those_of_a_words_role(student, role_batch, answer, question):
    config = AlignmentConfig(aligner="identity", rows=answer, question_rows=None if question == answer else question, weight=10.0)
    require_equal(student, role_batch, config, {"answer": {"rows": answer}, "question": {"rows": question}})


def aggregated(name):
    """The aggregations' formulas over what is picked, by the patch's own aligner and mixtures."""

    def project(alignment):
        def of_one(own, maps):
            picked = pick(own, maps)
            through = lambda channels: alignment.aligner(channels[None])[0]  # noqa: E731
            if name in ("project_mean", "project_max"):
                by_layer = torch.stack([through(layer) for layer in picked])
                return by_layer.mean(0) if name == "project_mean" else by_layer.amax(0)
            if name in ("mean_project", "max_project"):
                return through(picked.mean(0) if name == "mean_project" else picked.amax(0))
            flat = picked.flatten(0, 1)
            mixture = own.get("mixture", "mixture")
            shares = getattr(alignment, mixture).flatten().softmax(0) if name == "learned" else torch.ones(len(flat)) / len(flat)
            one = flat.amax(0) if name == "max" else (flat * shares[:, None, None]).sum(0)
            return through(one[None])

        return of_one

    return project


CHOICES = {
    "layers": ({"layers": (3, 1)}, {"question_layers": (0, 1, 2)}, {"layers": (3, 1)}, {"layers": (0, 1, 2)}),
    "all layers of questions": ({"layers": (2,)}, {"question_layers": ()}, {"layers": (2,)}, {}),
    "one choice of heads": ({"heads": "3.1,0.2,3.0"}, {}, {"heads": [(3, 1), (0, 2), (3, 0)]}, {"heads": [(3, 1), (0, 2), (3, 0)]}),
    "heads": ({"heads": "3.1,0.2"}, {"question_heads": "1.3,3.1"}, {"heads": [(3, 1), (0, 2)]}, {"heads": [(1, 3), (3, 1)]}),
    "heads and all": ({"heads": "2.1,2.0,2.3,0.2"}, {"question_heads": "mean"}, {"heads": [(2, 1), (2, 0), (2, 3), (0, 2)]}, {}),
    "all and heads": ({}, {"question_heads": "2.1,2.0,2.3,0.2"}, {}, {"heads": [(2, 1), (2, 0), (2, 3), (0, 2)]}),
}
"""Name -> settings of the answer's words and of questions', and what a definition picks for each."""


@pytest.mark.parametrize(
    ("choice", "aligner", "aggregation"),
    some(product(CHOICES, ["identity", "light"], [a for a in get_args(Aggregation) if a not in ("flow", "parallel")]), 9),
)
def test_layers_and_heads_are_those_of_a_words_role(student, role_batch, choice, aligner, aggregation):
    of_answer, of_question, answer, question = CHOICES[choice]
    settings = {"aligner": aligner, "aggregation": aggregation, "hidden_channels": 4, "activation": "leaky_relu"}
    config = AlignmentConfig(rows="both", question_rows="reads", **settings, **of_answer, **of_question)
    apart = {"mixture": "question_mixture"} if answer != question else {}
    require_equal(
        student,
        role_batch,
        config,
        {"answer": {"rows": "both", **answer}, "question": {"rows": "reads", **question, **apart}},
        aggregated(aggregation),
    )


def test_captured_words_of_both_rows_have_the_mean_of_their_maps(student, role_batch):
    """Each word by its role; the end of a prompt by its own row, whatever is asked for."""
    words = words_of_batch(role_batch)
    with torch.no_grad(), lavender.patch(student) as patch:
        maps = {rows: patch.capture(rows, **role_batch) for rows in get_args(Rows)}
    torch.testing.assert_close(maps["both"], (maps["reads"] + maps["predicts"]) / 2, rtol=1e-5, atol=1e-8)
    ends = (words.roles == END)[:, None, None, :, None, None].expand_as(maps["both"])
    for rows in get_args(Rows):
        assert torch.equal(maps[rows][ends], maps["reads"][ends])
    config = AlignmentConfig(rows="both", question_rows="last", heads="3.1,0.2", aligner="identity", weight=10.0)
    with torch.no_grad(), lavender.patch(student, config) as patch:
        by_role = patch.capture(**role_batch)
        asked = patch.capture("reads", **role_batch)
    assert patch.layer_names() == [f"layers.{n}.self_attn" for n in (3, 0)]
    questions = (words.roles == QUESTION)[:, None, None, :, None, None]
    expected = torch.where(questions, maps["last"], torch.where(ends, maps["reads"], maps["both"]))
    torch.testing.assert_close(by_role, expected[:, [3, 0]], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(asked, maps["reads"][:, [3, 0]], rtol=1e-5, atol=1e-8)


def test_without_roles_all_words_are_answers(student, role_batch):
    config = AlignmentConfig(rows="last", question_rows="reads", question_heads="0.0", aligner="identity", weight=10.0)
    with lavender.patch(student, config) as patch:
        student(**changed(role_batch, roles=None))
        alone = patch.last.loss
        student(**changed(role_batch, roles=torch.full((4, 5), ANSWER)))
        assert torch.equal(patch.last.loss, alone)
        student(**role_batch)
        assert not torch.equal(patch.last.loss, alone)


@pytest.mark.parametrize(("aligner", "aggregation"), [("light", "project_mean"), ("identity", "learned"), ("light", "learned")])
def test_roles_that_a_batch_lacks_use_their_weights_all_the_same(student, role_batch, aligner, aggregation):
    """Processes of a distributed run must not differ in which weights they use; and without any word nothing is added."""
    of_role = {"rows": "both", "question_rows": "last", "heads": "3.1,0.2", "question_heads": "1.0,3.1"}
    nothing = changed(role_batch, present=torch.zeros(4, 5, dtype=torch.bool))
    student.train()
    with lavender.patch(student, AlignmentConfig(aligner=aligner, aggregation=aggregation, **of_role)):
        loss = student(**nothing).loss
        assert torch.equal(loss, student(**without_lavender(nothing)).loss)
        loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in student.lavender.parameters())
        student.zero_grad()
        student(**changed(role_batch, roles=None)).loss.backward()
        assert all(p.grad is not None for p in student.lavender.parameters())


def test_parallel_attention_has_layers_by_role(student, role_batch):
    """A question's words read the projections of their layers alone: the others get no gradient of theirs."""
    settings = {"aggregation": "parallel", "aligner": "identity", "parallel_heads": 2, "parallel_width": 4}
    student.train()
    with lavender.patch(
        student, AlignmentConfig(rows="both", question_rows=None, layers=(1,), question_layers=(3, 1), **settings)
    ) as patch:
        of_one = changed(role_batch, roles=torch.full((4, 5), ANSWER))
        student(**{k: v for k, v in of_one.items() if k != "labels"}).loss.backward()
        grads = [p.weight.grad for p in student.lavender.parallel.queries]
        assert grads[0].any()
        assert not grads[1].any()
        assert patch.num_layers == 2
        student(**{k: v for k, v in role_batch.items() if k != "labels"}).loss.backward()
        assert student.lavender.parallel.queries[1].weight.grad.any()


@pytest.mark.parametrize(
    ("roles", "match"),
    [
        (torch.ones(4, 4).long(), r"lavender_roles is \(4, 4\).*\(4, 5\)"),
        (torch.ones(4, 5), "float32"),
        (torch.full((4, 5), 3), "lavender_roles is 3 at word 0 of row 0"),
        (torch.full((4, 5), -1), "lavender_roles is -1"),
    ],
)
def test_roles_that_are_none_are_refused(student, role_batch, roles, match):
    with (
        lavender.patch(student, AlignmentConfig(weight=10.0, aligner="sim", question_rows=None)),
        pytest.raises(CaptureError, match=match),
    ):
        student(**changed(role_batch, roles=roles))


def test_absent_words_may_have_no_role(student, role_batch):
    words = words_of_batch(role_batch)
    with lavender.patch(student, AlignmentConfig(question_rows="both", weight=10.0, aligner="sim")) as patch:
        student(**role_batch)
        loss = patch.last.loss
        student(**changed(role_batch, roles=words.roles.where(words.present, -1)))
        assert torch.equal(patch.last.loss, loss)


@pytest.mark.parametrize("rows", get_args(Rows))
def test_a_token_beyond_the_text_can_only_be_predicted(student, role_batch, rows):
    """By the role of its word: the others, whose tokens are there, are read as ever."""
    words = words_of_batch(role_batch)
    length = role_batch["input_ids"].shape[1]
    tokens = torch.where(words.token_words == 4, length, words.tokens)  # one of an answer's in row 0, of a question's in row 1
    beyond = changed(role_batch, tokens=tokens, input_ids=role_batch["input_ids"])
    of_answers = {"rows": rows, "question_rows": "predicts"}
    with lavender.patch(student, AlignmentConfig(aligner="identity", **of_answers)):
        if rows == "predicts":
            assert student(**beyond).loss > 0
        else:
            with pytest.raises(CaptureError, match="hold other tokens"):
                student(**beyond)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"heads": "4.0,0.1"}, ModelError, r"heads 4\.0 .*layers 0 to 3 of 4 heads"),
        ({"question_heads": "0.4", "aligner": "identity"}, ModelError, r"heads 0\.4 "),
        ({"question_layers": (1, 4)}, ModelError, r"layers \[4\]"),
        ({"heads": "0.1,0.2"}, None, ""),
        ({"heads": "0.1,0.2", "question_heads": "0.1"}, ConfigError, "2 heads and questions' 1.*identity"),
        ({"question_heads": "0.1"}, ConfigError, "4 heads and questions' 1"),
        ({"question_heads": "0.1,0.2,0.3,1.0"}, None, ""),
        ({"heads": "0.1,0.2", "question_heads": "0.1", "aggregation": "mean"}, None, ""),
        ({"heads": "0.1,0.2", "question_heads": "0.1", "aggregation": "learned"}, None, ""),
    ],
)
def test_heads_that_a_model_does_not_have_are_named(student, settings, error, match):
    if error is None:
        with lavender.patch(
            student, AlignmentConfig(**({"weight": 10.0, "aligner": "sim", "question_rows": None} | settings))
        ) as patch:
            first = next(student.lavender.aligner.parameters())
            kept_apart = settings.get("aggregation") is None
            assert first.shape[1] == (len(settings.get("heads", "0,0,0,0").split(",")) if kept_apart else 1)
            assert patch.trains
        return
    with pytest.raises(error, match=match):
        lavender.patch(student, AlignmentConfig(**({"weight": 10.0, "aligner": "sim", "question_rows": None} | settings)))
    assert not hasattr(student, "_lavender_patch")
    assert not any(m._forward_pre_hooks for m in student.modules())


@pytest.mark.parametrize(
    ("settings", "recorded"),
    [
        ({"heads": "3.1,0.2,3.0", "aligner": "identity"}, [1, 1]),
        ({"heads": "3.1,0.2,3.0", "aligner": "light", "aggregation": "mean"}, [1, 1]),
        ({"heads": "3.1,0.2,3.0", "aligner": "light"}, [2, 1]),
        ({"heads": "3.1,0.2", "question_heads": "3.0,3.1", "aligner": "light"}, [2, 1]),
        ({"aligner": "identity", "layers": (1,), "question_layers": (2,)}, [1, 1]),
        ({"aligner": "light", "layers": (1,)}, [4]),
    ],
)
def test_no_heads_are_kept_that_nobody_needs(student, role_batch, monkeypatch, settings, recorded):
    kept = []
    attention = Forward.attention

    def noted(self):
        kept.extend(self.request.recorded[layer].shape[1] for layer in sorted(self.request.recorded))
        return attention(self)

    monkeypatch.setattr(Forward, "attention", noted)
    with lavender.patch(student, AlignmentConfig(**({"weight": 10.0, "aligner": "sim", "question_rows": None} | settings))):
        student(**role_batch)
    assert kept == recorded


@pytest.mark.full
@pytest.mark.parametrize("aligner", ["identity", "light"])
def test_what_differs_by_role_compiles(student, role_batch, aligner):
    config = AlignmentConfig(
        aligner=aligner, rows="both", question_rows="last", heads="3.1,0.2", question_heads="1.0,3.0", weight=2.0
    )
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        twin = copy.deepcopy(student).train()
        torch.manual_seed(0)
        lavender.patch(twin, config)
        run = torch.compile(twin, backend="aot_eager") if compiled else twin
        loss = run(**role_batch).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1][0], found[0][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()
