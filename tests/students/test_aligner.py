"""Aggregations and aligners against short formulas in float64, and what they learn from."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch.nn import functional as F

import lavender
from lavender.config import Activation, Aggregation, AlignerKind, AlignmentConfig, Norm
from lavender.kernels.map_loss import map_loss
from lavender.students.aligner import Aligner, Alignment, HiddenStates, attention_flow, keeps_heads
from lavender.types import WordRows

from ..conftest import without_lavender, words_of_batch

B, L, H, W, Y, X = 2, 3, 4, 5, 6, 7


def attention(seed: int = 0, layers: int = L) -> torch.Tensor:
    """Random attention [B, L, H, W, y, x]: each map sums to one."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(B, layers, H, W, Y * X, generator=generator, dtype=torch.float64)
    return scores.softmax(dim=-1).unflatten(-1, (Y, X))


def alignment(**settings) -> Alignment:
    torch.manual_seed(0)
    return Alignment(AlignmentConfig(**({"weight": 10.0, "aligner": "sim", "question_rows": None} | settings)), L, H, 16).double()


@pytest.mark.parametrize(("kind", "count"), [("light", 18_465), ("sim", 27_681), ("deep", 46_113)])
def test_the_published_numbers_of_weights(kind, count):
    assert sum(p.numel() for p in Aligner(AlignmentConfig(aligner=kind, weight=10.0), 32).parameters()) == count


def by_formula(name: str, maps: torch.Tensor, project, mixture: torch.Tensor) -> torch.Tensor:
    """The ten lines: A is [L, H, y, x] of one word, scaled to order one; `project` takes channels [C, y, x] to [y, x]."""
    a = maps * (Y * X)
    if name == "project_mean":
        return torch.stack([project(layer) for layer in a]).mean(0)
    if name == "project_max":
        return torch.stack([project(layer) for layer in a]).max(0).values
    if name == "mean_project":
        return project(a.mean(0))
    if name == "max_project":
        return project(a.max(0).values)
    if name == "flow":
        product = a.prod(0)
        return project(product / product.mean((1, 2), keepdim=True))
    shares = torch.exp(mixture) / torch.exp(mixture).sum()
    one = {"mean": a.mean((0, 1)), "max": a.flatten(0, 1).max(0).values, "learned": (a * shares[..., None, None]).sum((0, 1))}
    return project(one[name][None])


@pytest.mark.parametrize("kind", ["sim", "identity"])
@pytest.mark.parametrize("name", [name for name in get_args(Aggregation) if name != "parallel"])
def test_an_aggregation_is_its_formula(name, kind):
    module = alignment(aggregation=name, aligner=kind)
    mixture = torch.randn(L, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if name == "learned":
        module.mixture.data = mixture.clone()
    maps = attention()
    expected = [
        [by_formula(name, maps[b, :, :, w], lambda channels: module.aligner(channels[None])[0], mixture) for w in range(W)]
        for b in range(B)
    ]
    torch.testing.assert_close(module.align(maps), torch.stack([torch.stack(row) for row in expected]), rtol=1e-9, atol=1e-11)


def test_the_identity_is_the_mean_over_channels_and_learned_weights_start_even():
    maps = attention()
    plain = maps.mean((1, 2)) * (Y * X)
    for name in ("project_mean", "mean_project", "mean", "learned"):
        torch.testing.assert_close(alignment(aggregation=name, aligner="identity").align(maps), plain)


@pytest.mark.parametrize("norm", get_args(Norm))
@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("kind", [kind for kind in get_args(AlignerKind) if kind != "identity"])
def test_an_aligner_is_its_layers(kind, norm, activation):
    module = alignment(aligner=kind, norm=norm, activation=activation, aggregation="mean_project").train()
    maps = attention()
    seen = maps.mean(1).transpose(1, 2).flatten(0, 1) * (Y * X)
    weights = list(module.aligner.parameters())
    for weight in weights[:-2]:
        seen = F.conv2d(seen, weight, padding=1)
        if norm != "identity":
            groups = {"instance": seen, "group": seen.unflatten(1, (8, -1)), "batch": seen.transpose(0, 1)}[norm]
            axes = {"instance": (2, 3), "group": (2, 3, 4), "batch": (1, 2, 3)}[norm]
            centered = groups - groups.mean(axes, keepdim=True)
            normed = centered / (centered.square().mean(axes, keepdim=True) + 1e-5).sqrt()
            seen = normed.transpose(0, 1) if norm == "batch" else normed.reshape(seen.shape)
        seen = seen.clamp(0, 6) if activation == "relu6" else torch.where(seen > 0, seen, 0.1 * seen)
    expected = F.conv2d(seen, weights[-2], weights[-1]).unflatten(0, (B, W))[:, :, 0]
    torch.testing.assert_close(module.align(maps), expected)


@pytest.mark.parametrize("norm", get_args(Norm))
def test_a_grid_of_one_place_is_aligned(norm):
    """That of a tiny picture, or of a batch without any: a norm of one value is zero."""
    module = alignment(norm=norm).train()
    maps = attention()[..., :1, :1].requires_grad_()
    one_word = torch.arange(B * W).view(B, W) == 3
    for present in (None, one_word, torch.zeros_like(one_word)):
        aligned = module.align(maps, present)
        assert aligned.shape == (B, W, 1, 1)
        assert aligned.isfinite().all()
        aligned.sum().backward()
        assert all(p.grad is not None for p in module.parameters())
    if norm == "instance":
        torch.testing.assert_close(module.align(maps), module.aligner.blocks[-1].bias.expand(B, W, 1, 1))


def test_flow_keeps_a_gradient_where_the_product_is_zero():
    """Eight layers of attention over 1,600 places, in float32: the plain product underflows everywhere."""
    scores = torch.randn(1, 8, 2, 40 * 40, generator=torch.Generator().manual_seed(0)) * 3
    maps = (scores.softmax(dim=-1) * 1e-3).unflatten(-1, (40, 40)).requires_grad_()
    assert not maps.detach().prod(dim=1).any()
    found = attention_flow(maps)
    torch.testing.assert_close(found.mean((-2, -1)), torch.ones(1, 2))
    found[..., 7, 9].sum().backward()
    exact = maps.detach().double().requires_grad_()
    product = exact.log().sum(1).flatten(-2).softmax(-1).unflatten(-1, (40, 40)) * 1600
    product[..., 7, 9].sum().backward()
    assert maps.grad[..., 7, 9].min() > 0
    torch.testing.assert_close(maps.grad.double(), exact.grad, rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm", get_args(Norm))
def test_absent_words_take_no_part(norm):
    """Maps of absent words change nothing: neither the others' nor, with a batch norm, its statistics. They have no gradient."""
    present = torch.rand(B, W, generator=torch.Generator().manual_seed(2)) > 0.4
    maps = attention()
    other = torch.where(present[:, None, None, :, None, None], maps, attention(seed=1)).requires_grad_()
    one, two = (alignment(norm=norm).train() for _ in range(2))
    aligned = two.align(other, present)
    assert torch.equal(one.align(maps, present), aligned)
    assert not aligned[~present].any()
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), two.buffers(), strict=True))
    aligned.square().sum().backward()
    per_word = other.grad.abs().sum((1, 2, 4, 5))
    assert ((per_word > 0) == present).all()


def test_a_batch_without_lavender_uses_every_weight_all_the_same():
    """Processes of a distributed run must not differ in which weights they use."""
    for name in ("project_mean", "learned"):
        module = alignment(aggregation=name)
        maps, nothing = attention().requires_grad_(), torch.zeros(B, W, dtype=torch.bool)
        per_word, _ = module(maps, lambda m: m, torch.rand(B, W, Y, X, dtype=torch.float64), nothing)
        per_word.sum().backward()
        assert not per_word.any()
        assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize(("normalization", "distance"), [("sum", "mse"), ("sum", "kl"), ("max", "mse"), ("none", "mse")])
def test_the_loss_is_the_chosen_one(normalization, distance):
    """Where the normalization needs maps that are not negative, the aligner's are positive."""
    module = alignment(normalization=normalization, distance=distance)
    targets, present = torch.rand(B, W, Y, X, dtype=torch.float64), torch.ones(B, W, dtype=torch.bool)
    per_word, aligned = module(attention(), lambda maps: maps, targets, present)
    expected = map_loss(
        aligned, targets, present, normalization=normalization, distance=distance, reduction="none", impl="reference"
    )
    torch.testing.assert_close(per_word, expected)
    assert (aligned > 0).all() == (normalization != "none")


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_means_over_heads_are_taken_early_only_where_that_is_the_same(aggregation):
    config = AlignmentConfig(aggregation=aggregation, aligner="identity", weight=10.0)
    if aggregation == "parallel":
        assert keeps_heads(config)
        return
    module, maps = alignment(aggregation=aggregation, aligner="identity"), attention()
    # The last one also differs in its weights' shape; it must keep heads whatever the values are.
    same = aggregation != "learned" and torch.allclose(module.align(maps), module.align(maps.mean(2, keepdim=True)))
    assert keeps_heads(config) == (not same)


def test_the_parallel_attention_is_a_softmax_over_image_tokens():
    module = alignment(aggregation="parallel", parallel_heads=2, parallel_width=8)
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(B, L, 4, 16, dtype=torch.float64, generator=generator)
    keys = torch.randn(B, L, 9, 16, dtype=torch.float64, generator=generator)
    rows = WordRows(
        torch.tensor([[0, 1, 2, -1], [0, 1, 2, 3]]),
        torch.tensor([[0, 0, 1, -1], [0, 1, 1, 1]]),
        torch.tensor([[0.5, 0.5, 1, 0], [1, 1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64),
        2,
    )
    columns = torch.arange(9).repeat(B, 1)
    columns[1, 7:] = -1
    found = module.parallel(HiddenStates(queries, keys, rows, columns))
    assert found.shape == (B, L, 2, 2, 9)
    for b, valid in ((0, 9), (1, 7)):
        for layer in range(L):
            q, k = (F.layer_norm(h[b, layer], (16,)) for h in (queries, keys))
            q, k = module.parallel.queries[layer](q), module.parallel.keys[layer](k[:valid])
            for head in range(2):
                part = slice(8 * head, 8 * head + 8)
                weights = (q[:, part] @ k[:, part].T / 8**0.5).softmax(-1)
                for word in range(2):
                    own = rows.words[b] == word
                    expected = (weights[own] * rows.weights[b][own][:, None]).sum(0)
                    torch.testing.assert_close(found[b, layer, head, word, :valid], expected)
    assert not found[1, ..., 7:].any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_student_trains_by_parallel_attention(student, training_batch, checkpointing):
    """The gradient reaches the hidden states of every captured layer, and the projections; nothing else is compared."""
    student.train()
    batch = {k: v for k, v in training_batch.items() if k != "labels"}
    if checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = AlignmentConfig(aggregation="parallel", parallel_heads=2, parallel_width=8, weight=1.0, layers=(1, 3), aligner="sim")
    with lavender.patch(student, config) as patch:
        student(**batch).loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in student.lavender.parameters())
        layers = student.model.language_model.layers
        assert layers[2].mlp.down_proj.weight.grad.any()
        assert layers[3].self_attn.q_proj.weight.grad is None or not layers[3].self_attn.q_proj.weight.grad.any()
        with torch.no_grad():
            aligned, own = patch.align(**batch), patch.capture(**batch)
        torch.testing.assert_close(aligned[batch["lavender_present"]], patch.last.aligned[batch["lavender_present"]])
        assert own.shape[1:3] == (2, 4)


def test_parallel_attention_reads_the_layers_inputs(student, training_batch):
    """Against the hidden states that transformers itself gives out."""
    config = AlignmentConfig(aggregation="parallel", parallel_heads=2, parallel_width=8, rows="reads", weight=10.0, aligner="sim")
    inputs = {k: v for k, v in without_lavender(training_batch).items() if k != "labels"}
    words = words_of_batch(training_batch)
    with lavender.patch(student, config) as patch, torch.no_grad():
        aligned = patch.align(**training_batch)
        hidden = torch.stack(student(**inputs, output_hidden_states=True).hidden_states[:-1], dim=1)
        b = 1
        tokens, columns = words.tokens[b], words.image_positions[b]
        rows = WordRows(
            torch.arange(len(tokens)).where(tokens >= 0, -1)[None],
            words.token_words[b : b + 1],
            words.token_weights[b : b + 1],
            aligned.shape[1],
        )
        states = HiddenStates(
            hidden[b : b + 1, :, tokens.clamp_min(0)], hidden[b : b + 1, :, columns], rows, torch.arange(64)[None]
        )
        maps = student.lavender.parallel(states).unflatten(-1, (8, 8))
        expected = student.lavender.align(maps)[0]
    torch.testing.assert_close(aligned[b], expected, rtol=1e-4, atol=1e-5)
