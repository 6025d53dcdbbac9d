"""Rows, layers and heads by the role of a word: loss and gradients against a short definition over transformers' own attention."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import lavender
from lavender.config import AlignmentConfig
from lavender.types import ROLES, WordBatch

from ..conftest import with_targets, without_lavender, words_of_batch

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


@pytest.mark.parametrize("question", ["predicts", "reads", "both", "last"])
@pytest.mark.parametrize("answer", ["predicts", "reads", "both", "last"])
def test_rows_are_those_of_a_words_role(student, role_batch, answer, question):
    config = AlignmentConfig(aligner="identity", rows=answer, question_rows=None if question == answer else question)
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


@pytest.mark.parametrize("aggregation", ["project_mean", "project_max", "mean_project", "max_project", "mean", "max", "learned"])
@pytest.mark.parametrize("aligner", ["identity", "light"])
@pytest.mark.parametrize("choice", CHOICES)
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
