"""What a captured forward adds to the loss, and what it reports of that."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist

from ..config import AlignmentConfig
from ..errors import CaptureError, ConfigError
from ..types import OUTCOMES, WordBatch
from .aligner import HiddenStates
from .capture import Forward
from .lambda_schedule import lambda_at, needs_progress


@dataclass(frozen=True, eq=False)
class Comparison:
    """What the latest forward with targets compared. Sums run over all processes while the model trains.

    Attributes:
        loss: the unweighted alignment loss, the mean over what is compared: matched words, those that are read by both rows twice;
            a scalar, detached. Zero where lambda has ended, and nothing was compared.
        weight: lambda.
        share: this micro-batch's share of its optimizer step, as the Trainer scales losses; 1 where it does not.
        words: the number of matched words, a scalar; zero where nothing was compared.
        outcomes: [5], samples by `lavender.types.OUTCOMES`.
        aligned: [B, W, y, x], the aligned maps of this process's batch, detached; of a word that is compared twice their mean.
            None where nothing was compared.
        batch: this process's batch, with its targets [B, W, y', x'].
        input_ids: int64 [B, T], or None if neither the forward nor the batch has them.
        tokens: the number of label tokens of this process's batch, a scalar; None without labels.
        language: the model's own loss of this process's batch, without the alignment; a scalar, detached, zero for a batch without
            label tokens. None where the model returned no loss.
    """

    loss: torch.Tensor
    weight: float
    share: torch.Tensor | float
    words: torch.Tensor
    outcomes: torch.Tensor
    aligned: torch.Tensor | None
    batch: WordBatch
    input_ids: torch.Tensor | None
    tokens: torch.Tensor | None
    language: torch.Tensor | None


def compare(
    model: Any, forward: Forward, source: torch.Tensor | HiddenStates | None, progress: float | None, output: Any
) -> tuple[Comparison, torch.Tensor]:
    """The alignment loss of one forward: a report of it, and the term that is added to the loss in its `output`.

    The mean runs over the comparisons of all processes: a word is one, or two where both its rows are read. Engines average
    gradients over processes, so each adds the sum over its comparisons times the number of processes. `num_items_in_batch` counts
    an optimizer step's label tokens, over all processes or over one: this micro-batch's share of them is taken from the mean over
    processes, which serves both. A micro-batch without matched words keeps its share, since it does not know how many words the
    others have. TRL's `SFTTrainer` takes sums and divides them itself: by the step's tokens where the model accepts their number,
    else by this forward's.

    Without a `source` nothing is compared, and the term is zero: lambda has ended, and the report says so.
    """
    trains = model.training and torch.is_grad_enabled()
    words, inputs, reading = forward.words, forward.inputs, forward.reading
    aligned, present, total = None, torch.zeros_like(words.present), torch.zeros((), device=words.present.device)
    if source is not None and reading is not None:
        words = words.to(source.device)
        assert words.targets is not None
        present, targets = reading.compared(words.present), reading.compared(words.targets)
        per_comparison, aligned = model.lavender(source, forward.place, targets, present, reading.questions)
        total, aligned = per_comparison.sum(), reading.by_word(aligned.detach())
    labels, step_tokens = inputs.get("labels"), inputs.get("num_items_in_batch")
    tokens = total.new_zeros(()) if labels is None else (labels[:, 1:] != -100).sum().to(total.device)
    outcomes = words.tokens.new_zeros(len(words.tokens)) if words.outcomes is None else words.outcomes
    counts = torch.bincount(outcomes, minlength=len(OUTCOMES)).to(total.dtype)
    matched = present[:, : words.present.shape[1]].sum()
    sums = torch.cat([torch.stack([total.detach(), present.sum(), tokens, matched]), counts])
    processes = 1
    if trains and dist.is_available() and dist.is_initialized():
        processes = dist.get_world_size()
        dist.all_reduce(sums)
    comparisons = sums[1].clamp_min(1)
    # A step that was cut off entirely has no label token.
    share: torch.Tensor | float = 1.0
    if labels is not None and step_tokens is not None:
        share = sums[2] / processes / torch.as_tensor(step_tokens, device=sums.device).clamp_min(1)
    weight = _weight(forward.config, progress, torch.is_grad_enabled())
    comparison = Comparison(
        loss=sums[0] / comparisons,
        weight=weight,
        share=share,
        words=sums[3],
        outcomes=sums[4:],
        aligned=aligned,
        batch=words,
        input_ids=inputs.get("input_ids") if words.input_ids is None else words.input_ids,
        tokens=None if labels is None else tokens,
        language=None if labels is None else _language_loss(output, tokens),
    )
    term = weight * processes * share * total / comparisons
    if inputs.get("fused_lm_head"):
        term = term * (sums[2] / processes if getattr(model, "accepts_loss_kwargs", True) else tokens)
    return comparison, term


def _language_loss(output: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    values = {"loss": output[0]} if isinstance(output, tuple) else output
    loss = values.get("loss") if isinstance(values, MutableMapping) else None
    return None if loss is None else loss.detach().where(tokens.to(loss.device) > 0, 0.0)


def _weight(config: AlignmentConfig, progress: float | None, trains: bool) -> float:
    if progress is None and trains and needs_progress(config):
        raise ConfigError(
            f"lambda falls by schedule={config.schedule!r} and until={config.until}, and the patch does not know the training's "
            "progress: call trainer.add_callback(lavender.LavenderCallback(trainer)), or set the patch's progress (0 to 1) before "
            "each step"
        )
    return lambda_at(config, progress or 0.0)


def add_to_loss(output: Any, term: torch.Tensor, tokens: torch.Tensor | None) -> Any:
    """A model's output with `term` added to its loss; `tokens` counts its label tokens, None if it got no labels.

    A mapping without a loss gets the term as its loss; a tuple without labels has none, and stays as it is. Of no label tokens the
    language loss, 0 / 0, is zero.

    TRL's `SFTTrainer` makes its loss of minus the sum of `log_probs`, perhaps after weighting each by its exponential (`dft`): two
    positions more per row hold the term, one its gradient, at the value zero, the other its value, without gradient.

    Raises `CaptureError` if the output is of another kind, or its loss no single number.
    """
    if isinstance(output, tuple):
        return output if tokens is None else (_joined(output[0], term, tokens), *output[1:])
    if not isinstance(output, MutableMapping):
        raise CaptureError(f"the model returned a {type(output).__name__}; expected a transformers output, or a tuple")
    if "log_probs" in output:
        per_row = -term.to(output["log_probs"].device) / len(output["log_probs"])
        more = torch.stack([per_row - per_row.detach(), per_row.detach()]).expand(len(output["log_probs"]), 2)
        output["log_probs"] = torch.cat([output["log_probs"], more], dim=1)
        return output
    output["loss"] = term if output.get("loss") is None else _joined(output["loss"], term, tokens)
    return output


def _joined(loss: torch.Tensor, term: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    if loss.numel() != 1:
        raise CaptureError(
            f"the model's loss is of shape {tuple(loss.shape)}; expected one number, to which lavender can add the alignment. Let "
            "the model take the mean, or pass no labels and add patch.term to a loss of your own"
        )
    if tokens is not None:
        loss = loss.where(tokens.to(loss.device) > 0, 0.0)
    return loss + term.to(loss.device, loss.dtype)
