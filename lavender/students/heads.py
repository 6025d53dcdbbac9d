r"""Localization heads: which layers and heads of a student look at what words name, before it is trained to.

    score(head) = mean over words i of [corr(A_i, T_i) - mean over other words j of corr(A_i, T_j)]

A_i is the head's map of word i on its target's grid, T_i the target, corr Pearson's correlation over places; a word that is read by
both rows has the mean of its two. The targets of the other words are the control: a head that looks at the same place whatever the
word, at the middle or at a sink, has a score of zero, and so has one that sees nothing. A layer's score is that of its heads' mean.
The score is a sample covariance, of maps and targets at unit norm: it needs sums over words alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..config import AlignmentConfig, num_best, require_kind, to_dict
from ..errors import ConfigError, ModelError
from ..kernels.map_loss.normalization import resample
from ..types import ROLES, WordBatch
from .channels import num_channels, require_places, tapped_layers
from .discovery import attention_modules
from .patch import StudentPatch, patch_student

_QUESTION, _PROMPT_END = ROLES.index("question"), ROLES.index("prompt end")


@dataclass(frozen=True, eq=False)
class RoleScores:
    """How well layers and heads localize the words of one role.

    Attributes:
        heads: float64 [L, H], of all attention layers.
        layers: float64 [L], of the mean over each layer's heads.
        num_words: how many words they are means over.
    """

    heads: torch.Tensor
    layers: torch.Tensor
    num_words: int


@dataclass(frozen=True, eq=False)
class LocalizationHeads:
    """What `choose_heads` chose, and why.

    Attributes:
        config: the config, with layers and heads in place of every `best:K`.
        scores: by role, "answer" and "question"; by "answer" alone where both roles have the same rows, layers and heads, and are
            scored together, and by "question" alone where there are no words of answers and questions' take what is chosen for
            these. A role with fewer than two words has none.
    """

    config: AlignmentConfig
    scores: dict[str, RoleScores]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        scores = {
            role: {"num_words": each.num_words, "layers": each.layers.tolist(), "heads": each.heads.tolist()}
            for role, each in self.scores.items()
        }
        return {"config": to_dict(self.config), "scores": scores}


def choose_heads(model: nn.Module, config: AlignmentConfig, batches: Iterable[Mapping[str, Any]]) -> LocalizationHeads:
    """Scores the layers and heads of a student, and resolves every `best:K` of a config: `lavender.patch` takes the config then.

    Where a config's question words have other rows, layers or heads than the answers', each role's words are scored apart. Where
    the batches have words of one role alone, the other takes what is chosen by these, if questions have no layers or heads of their
    own. Of equal scores the first layer and head is the better one. Some hundred words are enough. The model computes without
    gradient, as in evaluation, and is left as it was.

    Args:
        model: a student, maybe wrapped by PEFT, before it is patched for training.
        config: with `best:K` in `layers`, `heads`, `question_layers` or `question_heads`; without any the scores are all there is.
        batches: several of a `lavender.Collator` that has targets.

    Raises:
        ConfigError: a batch has no targets, or is none; there are fewer than two words to score; K is more than there are; or
            numbers of heads do not go together.
        ModelError: the model cannot be read, has no such layers or heads, or is patched for training with some of its layers.
        CaptureError: a batch was made for another model, or a layer did not record.
    """
    require_kind("config", config, AlignmentConfig)
    if isinstance(batches, Mapping):
        raise ConfigError("batches is one batch; give a list of batches")
    apart = config.of_question != config.of_answer
    readings = {"answer": config.of_answer} | ({"question": config.of_question} if apart else {})
    with patch_student(model, None) as patch, _in_evaluation(model):
        num_layers, num_heads = len(attention_modules(patch.decoder)), patch.decoder.config.num_attention_heads
        if patch.num_layers < num_layers:
            raise ModelError("the model is patched for training with some of its layers; choose among all of them before that")
        require_places(config, num_layers, num_heads)
        num_channels(config, num_heads)
        for role in readings:
            _require_enough(config, role, num_layers, num_heads)
        # A patch for training has them in the order of its config.
        recorded = tapped_layers(patch.config, num_layers)
        order = [recorded.index(layer) for layer in range(num_layers)]
        sums = {role: _Sums() for role in readings}
        with torch.no_grad():
            for batch in batches:
                _add(patch, config, readings, order, batch, sums)
    # Where nobody asked for a choice of its own, a role without words takes the other's.
    if apart and config.question_layers is None and config.question_heads is None:
        if not sums["question"].num_words:
            del readings["question"]
        elif not sums["answer"].num_words:
            del readings["answer"]
    chosen: dict[str, Any] = {}
    scores = {}
    for role, reading in readings.items():
        is_open = num_best(reading.layers) or num_best(reading.heads)
        if is_open or sums[role].num_words > 1:
            scores[role] = sums[role].scores(role)
        layers, heads = _best(reading, scores[role]) if is_open else (reading.layers, reading.heads)
        prefix = "question_" if "answer" in readings and role == "question" else ""
        chosen |= {f"{prefix}layers": layers, f"{prefix}heads": heads}
    return LocalizationHeads(replace(config, **chosen), scores)


@dataclass(eq=False)
class _Sums:
    """Sums over the words of one role; of each layer its heads, and last their mean."""

    num_words: int = 0
    agreement: torch.Tensor | float = 0.0
    maps: torch.Tensor | float = 0.0
    target: torch.Tensor | float = 0.0
    sizes: set[tuple[int, ...]] = field(default_factory=set)

    def add(self, maps: torch.Tensor, target: torch.Tensor) -> None:
        """One word: its unit maps [L, H + 1, y, x], and its unit target [y, x]."""
        self.num_words += 1
        self.sizes.add(tuple(target.shape))
        if len(self.sizes) > 1:
            raise ConfigError(f"the targets are of {len(self.sizes)} sizes, {sorted(self.sizes)}; expected one store's")
        self.agreement = self.agreement + (maps * target).sum((-2, -1))
        self.maps = self.maps + maps
        self.target = self.target + target

    def scores(self, role: str) -> RoleScores:
        """Raises `ConfigError` for fewer than two words."""
        if self.num_words < 2:
            raise ConfigError(
                f"the batches have {self.num_words} words with targets to choose the {role}s' layers and heads by; expected some "
                "hundred. Give more batches of a lavender.Collator with targets whose WordsConfig aligns such words"
            )
        assert isinstance(self.maps, torch.Tensor)
        by_chance = (self.maps * self.target).sum((-2, -1)) / self.num_words
        scores = (self.agreement - by_chance) / (self.num_words - 1)
        return RoleScores(scores[:, :-1], scores[:, -1], self.num_words)


def _add(
    patch: StudentPatch,
    config: AlignmentConfig,
    readings: Mapping[str, AlignmentConfig],
    order: list[int],
    batch: Mapping[str, Any],
    sums: Mapping[str, _Sums],
) -> None:
    """Adds the words of one batch. `order` has the place of each layer among the patch's."""
    if not isinstance(batch, Mapping):
        raise ConfigError(f"batches has a {type(batch).__name__}; expected batches of a lavender.Collator")
    device = patch.model.device
    batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    _, words = WordBatch.split(batch)
    if words is None or words.targets is None or words.boxes is None:
        raise ConfigError("a batch has no targets to score heads by; make it with lavender.Collator(processor, targets)")
    rows = {role: ("reads", "predicts") if own.rows == "both" else (own.rows,) for role, own in readings.items()}
    captured = {
        kind: patch._forward("maps", replace(config, rows=kind, question_rows=None), dict(batch))[:, order]  # type: ignore[arg-type]
        for kind in dict.fromkeys(kind for kinds in rows.values() for kind in kinds)
    }
    for b, w in words.present.nonzero().tolist():
        role = -1 if words.roles is None else int(words.roles[b, w])
        name = "question" if role == _QUESTION and "question" in readings else "answer"
        # The end of a prompt has its own row, whatever the config's are.
        seen = [captured[kind][b, :, :, w].cpu().double() for kind in rows[name][: 1 if role == _PROMPT_END else None]]
        size = words.targets.shape[-2:]
        unit = [_unit(resample(torch.cat([one, one.mean(1, keepdim=True)], dim=1), size)) for one in seen]
        sums[name].add(torch.stack(unit).mean(0), _unit(words.targets[b, w].cpu().double()))


def _unit(maps: torch.Tensor) -> torch.Tensor:
    """Maps [..., y, x] of mean zero and norm one; zeros for a map without differences."""
    centered = maps - maps.mean((-2, -1), keepdim=True)
    norm = centered.square().sum((-2, -1), keepdim=True).sqrt()
    # What is left of a constant is rounding.
    least = 1e-6 * maps.abs().amax((-2, -1), keepdim=True)
    return torch.where(norm > least, centered / norm.clamp_min(torch.finfo(maps.dtype).tiny), 0.0)


def _require_enough(config: AlignmentConfig, role: str, num_layers: int, num_heads: int) -> None:
    reading = config.of_answer if role == "answer" else config.of_question

    def named(setting: str) -> str:
        own = role == "question" and getattr(config, f"question_{setting}") is not None
        return f"{'question_' if own else ''}{setting} is {getattr(reading, setting)!r}"

    layers = num_best(reading.layers)
    if layers is not None and layers > num_layers:
        raise ConfigError(f"{named('layers')}; the model has {num_layers} attention layers")
    available = (layers or len(reading.layers) or num_layers) * num_heads
    heads = num_best(reading.heads)
    if heads is not None and heads > available:
        raise ConfigError(f"{named('heads')}; there are {available} heads in the layers to choose from")


def _best(reading: AlignmentConfig, scores: RoleScores) -> tuple[tuple[int, ...], str]:
    """Layers and heads of one role, in their order in the model."""
    layers, heads = reading.layers, reading.heads
    if isinstance(layers, str):
        layers = tuple(sorted(_first(num_best(layers), dict(enumerate(scores.layers.tolist())))))
    if num_best(heads):
        among = layers or range(len(scores.layers))
        candidates = {(layer, head): s for layer in among for head, s in enumerate(scores.heads[layer].tolist())}
        heads = ",".join(f"{layer}.{head}" for layer, head in sorted(_first(num_best(heads), candidates)))
    return layers, heads


def _first(count: int | None, scores: Mapping[Any, float]) -> list[Any]:
    """The keys of the highest scores; of equal ones the smallest key."""
    return sorted(scores, key=lambda key: (-scores[key], key))[:count]


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Within, a model computes as in evaluation; afterwards each of its modules is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
