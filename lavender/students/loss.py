"""What a captured forward adds to the loss, and what it reports of that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from ..config import AlignmentConfig
from ..errors import CaptureError, ConfigError
from ..types import OUTCOMES, WordBatch
from .aligner import HiddenStates
from .capture import Forward
from .lambda_schedule import lambda_at


@dataclass(frozen=True, eq=False)
class Comparison:
    """What the latest forward with targets compared. Sums run over all processes while the model trains.

    Attributes:
        loss: the unweighted alignment loss, the mean over matched words; a scalar, detached.
        weight: lambda.
        share: this micro-batch's share of its optimizer step, as the Trainer scales losses; 1 where it does not.
        words: the number of matched words, a scalar.
        outcomes: [4], samples by `lavender.types.OUTCOMES`.
        aligned: [B, W, y, x], the aligned maps of this process's batch, detached.
        batch: this process's batch, with its targets [B, W, y', x'].
        input_ids: int64 [B, T], or None if the forward got embeddings.
        language: the model's own loss of this process's batch, without the alignment; a scalar, detached, zero for a batch without
            label tokens. None where the model returned no loss.
    """

    loss: torch.Tensor
    weight: float
    share: torch.Tensor | float
    words: torch.Tensor
    outcomes: torch.Tensor
    aligned: torch.Tensor
    batch: WordBatch
    input_ids: torch.Tensor | None
    language: torch.Tensor | None


def compare(
    model: Any, forward: Forward, source: torch.Tensor | HiddenStates, progress: float | None, output: Any
) -> tuple[Comparison, torch.Tensor]:
    """The alignment loss of one forward: a report of it, and the term that is added to the loss in its `output`.

    The mean runs over the words of all processes. Engines average gradients over processes, so each adds the sum over its words
    times the number of processes. `num_items_in_batch` counts an optimizer step's label tokens, over all processes or over one:
    this micro-batch's share of them is taken from the mean over processes, which serves both. A micro-batch without matched words
    keeps its share, since it does not know how many words the others have. TRL's `SFTTrainer` takes sums and divides them itself:
    by the step's tokens where the model accepts their number, else by this forward's.
    """
    trains = model.training and torch.is_grad_enabled()
    words, inputs = forward.words, forward.inputs
    per_word, aligned = model.lavender(source, forward.place, words.targets, words.present)
    total = per_word.sum()
    labels, step_tokens = inputs.get("labels"), inputs.get("num_items_in_batch")
    tokens = total.new_zeros(()) if labels is None else (labels[:, 1:] != -100).sum()
    outcomes = words.tokens.new_zeros(len(words.tokens)) if words.outcomes is None else words.outcomes
    counts = torch.bincount(outcomes, minlength=len(OUTCOMES)).to(total.dtype)
    sums = torch.cat([torch.stack([total.detach(), words.present.sum(), tokens]), counts])
    processes = 1
    if trains and dist.is_available() and dist.is_initialized():
        processes = dist.get_world_size()
        dist.all_reduce(sums)
    all_words = sums[1].clamp_min(1)
    # A step that was cut off entirely has no label token.
    share = 1.0 if labels is None or step_tokens is None else sums[2] / processes / max(step_tokens, 1)
    weight = _weight(forward.config, progress, trains)
    comparison = Comparison(
        loss=sums[0] / all_words,
        weight=weight,
        share=share,
        words=sums[1],
        outcomes=sums[3:],
        aligned=aligned.detach(),
        batch=words,
        input_ids=inputs.get("input_ids"),
        language=_language_loss(output, labels, tokens),
    )
    term = weight * processes * share * total / all_words
    if inputs.get("fused_lm_head"):
        term = term * (sums[2] / processes if getattr(model, "accepts_loss_kwargs", True) else tokens)
    return comparison, term


def _language_loss(output: Any, labels: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor | None:
    if labels is None:
        return None
    loss = output[0] if isinstance(output, tuple) else output.get("loss")
    # The mean over no label token is 0 / 0, without gradient.
    return None if loss is None else torch.where(tokens > 0, loss.detach(), 0.0)


def _weight(config: AlignmentConfig, progress: float | None, trains: bool) -> float:
    if progress is None and trains and config.schedule != "constant":
        raise ConfigError(
            f"lambda falls by schedule={config.schedule!r}, and the patch does not know the training's progress: call "
            "trainer.add_callback(lavender.LavenderCallback(trainer)), or set the patch's progress (0 to 1) before each step"
        )
    return lambda_at(config, progress or 0.0)


def add_to_loss(output: Any, term: torch.Tensor) -> Any:
    """A model's output with `term` added to its loss.

    TRL's `SFTTrainer` makes its loss of minus the sum of `log_probs`, perhaps after weighting each by its exponential (`dft`): two
    positions more per row hold the term, one its gradient, at the value zero, the other its value, without gradient.
    """
    if isinstance(output, tuple):
        return (output[0] + term, *output[1:])
    if "log_probs" in output:
        per_row = -term / len(output["log_probs"])
        more = torch.stack([per_row - per_row.detach(), per_row.detach()]).expand(len(output["log_probs"]), 2)
        output["log_probs"] = torch.cat([output["log_probs"], more], dim=1)
        return output
    output["loss"] = term if output.get("loss") is None else output["loss"] + term.to(output["loss"].dtype)
    return output


def require_whole_sequences(module: nn.Module, inputs: dict[str, Any]) -> None:
    """Raises `CaptureError` in a replica of `nn.DataParallel`, and where a sequence is split over processes."""
    if getattr(module, "_is_replica", False):
        raise CaptureError(
            "the model runs under nn.DataParallel, whose copies lavender cannot follow; start one process per GPU (torchrun, "
            "accelerate launch), or show the script one GPU only (CUDA_VISIBLE_DEVICES=0)"
        )
    if "shift_labels" in inputs:
        raise CaptureError(
            "the sequence is split over processes (context or sequence parallelism); lavender reads rows of whole sequences: "
            "switch it off"
        )


def require_image_tokens(model: Any, image_positions: torch.Tensor, input_ids: torch.Tensor | None) -> None:
    """Raises `CaptureError` if the batch's image positions [B, M] hold other tokens than the model's image tokens."""
    token = getattr(model.config, "image_token_id", None)
    if token is None or input_ids is None:
        return
    tokens = input_ids.gather(1, image_positions.clamp(0, input_ids.shape[1] - 1))
    others = tokens[(image_positions >= 0) & (tokens != token)]
    if len(others):
        raise CaptureError(
            f"the batch was made for another model: {len(others)} of its image positions hold other tokens (such as "
            f"{others[0].item()}) than {type(model).__name__}'s image token {token}. Make it with this model's own "
            "processor: lavender.Collator(AutoProcessor.from_pretrained(...), model_config=model.config)"
        )


def require_gradient(model: Any, decoder: nn.Module, source: torch.Tensor | HiddenStates) -> None:
    """Raises `CaptureError` if a training forward's attention, or the aligner, cannot learn."""
    if not (torch.is_grad_enabled() and model.training):
        return
    aligner = [p for p in model.lavender.parameters() if p.is_floating_point()]
    if aligner and not any(p.requires_grad for p in aligner):
        raise CaptureError(
            "every weight of the aligner is frozen; with PEFT, name it: LoraConfig(..., modules_to_save=['lavender'])"
        )
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in decoder.modules())
    trainable = any(p.requires_grad for p in decoder.parameters())
    captured = source if isinstance(source, torch.Tensor) else source.queries
    if checkpointed and trainable and not captured.requires_grad:
        raise CaptureError(
            "the captured attention carries no gradient: the model uses re-entrant gradient checkpointing. Enable it with "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
