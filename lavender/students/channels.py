"""Which layers and heads the words of each role are compared by, and what of them is recorded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import AlignmentConfig, num_best, parse_heads
from ..errors import ConfigError, ModelError

Place = tuple[int, int]
"""Layer and head."""

OVER_HEADS = ("mean", "max", "learned")
"""Aggregations that leave one channel, however many heads there are."""


@dataclass(frozen=True)
class Selection:
    """What one role's words are compared by, of recorded attention [K, L, H, y, x].

    Attributes:
        layers: places on its axis of layers; None for all of it.
        heads: layers' places and heads, which become the channels of one map; empty where none are chosen.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[Place, ...] = ()

    def of(self, maps: torch.Tensor) -> torch.Tensor:
        """[K, L, H, y, x] to [K, L', H', y, x]."""
        if self.heads:
            return torch.stack([maps[:, layer, head] for layer, head in self.heads], dim=1)[:, None]
        return maps if self.layers is None else torch.stack([maps[:, layer] for layer in self.layers], dim=1)


@dataclass(frozen=True)
class Channels:
    """What the layers of a forward that is aligned record, and what each role takes of it.

    Attributes:
        weights: per layer what each of its heads adds to one map, where the aligner sees a mean over heads alone.
        heads: per layer the heads that are recorded; None for all.
        joins: whether what the layers recorded is one map, of all their heads or the sum of theirs, and not a map per layer.
        answer: what the answer's words are compared by.
        question: what the question's are.
    """

    weights: tuple[tuple[float, ...], ...] | None
    heads: tuple[tuple[int, ...], ...] | None
    joins: bool
    answer: Selection
    question: Selection


def tapped_layers(config: AlignmentConfig, num_layers: int) -> tuple[int, ...]:
    """The layers that some role needs, the answer's first."""
    return tuple(dict.fromkeys([*_layers_of(config.of_answer, num_layers), *_layers_of(config.of_question, num_layers)]))


def is_chosen(config: AlignmentConfig) -> bool:
    """Whether it says which layers and heads are aligned: none is `best:K`."""
    settings = (config.layers, config.heads, config.question_layers, config.question_heads)
    return not any(num_best(value) for value in settings)


def require_chosen(config: AlignmentConfig) -> None:
    """Raises `ConfigError` if layers or heads are still to be chosen."""
    if is_chosen(config):
        return
    names = ("layers", "heads", "question_layers", "question_heads")
    still = ", ".join(f"{name}={value!r}" for name in names if num_best(value := getattr(config, name)))
    raise ConfigError(
        f"{still}: layers and heads are chosen by their scores before the model is patched for training. Call "
        "lavender.choose_heads(model, config, batches) with some batches of a lavender.Collator that has targets, and patch with "
        "the config of what it returns; lavender.fine_tune does so itself"
    )


def require_places(config: AlignmentConfig, num_layers: int, num_heads: int) -> None:
    """Raises `ModelError` for layers and heads that a model of `num_layers` attention layers does not have."""
    for reading in (config.of_answer, config.of_question):
        layers = [] if isinstance(reading.layers, str) else [layer for layer in reading.layers if layer >= num_layers]
        if layers:
            raise ModelError(f"layers {layers} were asked for; the model has attention layers 0 to {num_layers - 1}")
        heads = [f"{layer}.{head}" for layer, head in _chosen(reading) if layer >= num_layers or head >= num_heads]
        if heads:
            raise ModelError(
                f"heads {', '.join(heads)} were asked for, as layer.head; the model has attention layers 0 to {num_layers - 1} of "
                f"{num_heads} heads"
            )


def channels_of(config: AlignmentConfig, num_layers: int, num_heads: int) -> Channels:
    """What is recorded for a config's alignment: of the `num_layers` tapped layers, in the order of `tapped_layers`."""
    tapped = tapped_layers(config, num_layers)
    answer, question = config.of_answer, config.of_question
    chosen = _chosen(answer), _chosen(question)
    if all(chosen):
        places = list(dict.fromkeys([*chosen[0], *chosen[1]]))
        heads = tuple(tuple(head for layer, head in places if layer == tap) for tap in tapped)
        if not keeps_heads(config) and chosen[0] == chosen[1]:
            shares = tuple(tuple((head in own) / len(places) for head in range(num_heads)) for own in heads)
            return Channels(shares, None, True, Selection(), Selection())
        order = [(layer, head) for layer, own in zip(tapped, heads, strict=True) for head in own]
        return Channels(None, heads, True, *(Selection(heads=tuple((0, order.index(p)) for p in own)) for own in chosen))

    def selection(reading: AlignmentConfig, own: tuple[Place, ...]) -> Selection:
        if own:
            return Selection(heads=tuple((tapped.index(layer), head) for layer, head in own))
        layers = _layers_of(reading, num_layers)
        return Selection() if layers == tapped else Selection(tuple(tapped.index(layer) for layer in layers))

    mean = None if keeps_heads(config) or any(chosen) else ((1 / num_heads,) * num_heads,) * len(tapped)
    return Channels(mean, None, False, selection(answer, chosen[0]), selection(question, chosen[1]))


def num_channels(config: AlignmentConfig, num_heads: int) -> int:
    """Channels of the aligner's input.

    Raises `ConfigError` if they are of another number for words of questions than of answers, and the aligner has weights.
    """
    if config.aggregation in OVER_HEADS:
        return 1
    if config.aggregation == "parallel":
        return config.parallel_heads
    answer, question = (
        num_best(reading.heads) or len(_chosen(reading)) or num_heads for reading in (config.of_answer, config.of_question)
    )
    if answer != question and config.aligner != "identity":
        raise ConfigError(
            f"answers' words have {answer} heads and questions' {question}, and aligner={config.aligner!r} with "
            f"aggregation={config.aggregation!r} has one number of channels; choose as many, or aligner='identity'"
        )
    return answer


def weighed_places(config: AlignmentConfig, num_layers: int) -> list[tuple[tuple[int, ...], tuple[Place, ...]]]:
    """The layers and heads that the aligner's weights belong to, in their order; per role, the answer's first.

    Weights of one channel belong to none, but for the shares of `learned`; `parallel` has projections of every layer, and
    convolutions have channels of heads.
    """
    roles = (config.of_answer, config.of_question)
    if config.aggregation == "parallel":
        return [(tapped_layers(config, num_layers), ())]
    if config.aggregation == "learned":
        return [(_layers_of(reading, num_layers), _chosen(reading)) for reading in roles]
    return [((), () if config.aggregation in OVER_HEADS else _chosen(reading)) for reading in roles]


def keeps_heads(config: AlignmentConfig) -> bool:
    """Whether the alignment needs attention per head, or a mean over heads will do."""
    linear = config.aligner == "identity" and config.aggregation in ("project_mean", "project_max", "mean_project")
    return not linear and config.aggregation != "mean"


def _chosen(reading: AlignmentConfig) -> tuple[Place, ...]:
    return () if reading.heads == "mean" or num_best(reading.heads) else parse_heads("heads", reading.heads)


def _layers_of(reading: AlignmentConfig, num_layers: int) -> tuple[int, ...]:
    """The layers that one role's words are read in."""
    chosen = _chosen(reading)
    if chosen:
        return tuple(dict.fromkeys(layer for layer, _ in chosen))
    layers = reading.layers
    assert not isinstance(layers, str)
    return layers or tuple(range(num_layers))
