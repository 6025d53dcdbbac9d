"""Stopping a training whose numbers are no longer finite: all processes alike, before anything of it is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import distributed as dist
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..errors import ModelError
from ..pretrained.weights import non_finite

MAX_NAMED = 8
"""Samples of a process, or weights, that an error names."""
MAX_SKIPPED = 50
"""Steps in a row that loss scaling may skip: it halves its scale in each, and has none left after so many."""

ADVICE = "Look at the samples and targets of this step, or lower the learning rate, and train into a new folder"


class FiniteGuard(TrainerCallback):
    """Raises `ModelError`, in all processes, at the first step whose loss, or whose weights after it, are not finite.

    The loss is looked at before the optimizer's step, so that the weights stay sound (DeepSpeed makes that step in the backward
    pass), and the trained weights after it, before a checkpoint is written. So no checkpoint has such weights. A step that loss
    scaling (fp16) skips, since the gradient overflowed, changes none, and training goes on; but not after `MAX_SKIPPED` of them.

    A Trainer with `last_loss` (a scalar, this process's latest) and `sample_ids` (the samples of each micro-batch of the step) has
    them looked at and named; `note_forward` says what a subclass knows beside them.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.losses: list[Mapping[str, torch.Tensor]] = []
        self.skipped = 0
        self.scale = 0.0

    def note_forward(self) -> dict[str, torch.Tensor]:
        """Called once per micro-batch: scalars by name, what the loss of its forward consists of."""
        return {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._require_finite_weights(f"before step {state.global_step + 1}", advice="Start from another model or adapter")
        scaler = self.trainer.accelerator.scaler
        self.skipped = 0
        self.scale = 0.0 if scaler is None else scaler.get_scale()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.losses = []

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note_loss()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note_loss()
        # A part may be a mean over processes: the process's own loss, where there is one, says whose samples are at fault.
        deciding = [[parts["loss"]] if "loss" in parts else parts.values() for parts in self.losses]
        bad = [n for n, values in enumerate(deciding) if not all(bool(value.isfinite().all()) for value in values)]
        found = [
            f"{', '.join(f'{name} {value.item():.4g}' for name, value in self.losses[n].items())}{self._samples([n])}" for n in bad
        ]
        self._stop_all(f"the loss of step {state.global_step + 1} is not finite", found)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        samples = self._samples(range(len(self.losses)))
        self.skipped = self.skipped + 1 if self._step_was_skipped() else 0
        in_vain = [f"however the loss was scaled{samples}"] if self.skipped >= MAX_SKIPPED else []
        self._stop_all(f"the gradient was not finite in the last {MAX_SKIPPED} steps, up to step {state.global_step}", in_vain)
        self._require_finite_weights(f"after step {state.global_step}", samples)

    def _step_was_skipped(self) -> bool:
        accelerator = self.trainer.accelerator
        if accelerator.scaler is None:
            return bool(accelerator.optimizer_step_was_skipped)
        # Fused optimizers skip a step themselves, which accelerate does not see; but the scale falls.
        before, self.scale = self.scale, accelerator.scaler.get_scale()
        return self.scale < before

    def _note_loss(self) -> None:
        last_loss = getattr(self.trainer, "last_loss", None)
        self.losses.append(({} if last_loss is None else {"loss": last_loss}) | self.note_forward())

    def _require_finite_weights(self, when: str, samples: str = "", advice: str = ADVICE) -> None:
        names = non_finite(trained_values(self.trainer.model))
        self._stop_all(f"weights are not finite {when}", [_listed(names) + samples] if names else [], advice)

    def _samples(self, micro_batches: Iterable[int]) -> str:
        ids: Sequence[Sequence[str]] = getattr(self.trainer, "sample_ids", ())
        names = [sample_id for n in micro_batches if n < len(ids) for sample_id in ids[n]]
        return f", with the samples {_listed(names)}" if names else ""

    def _stop_all(self, what: str, found: list[str], advice: str = ADVICE) -> None:
        """Raises in every process if one of them found something."""
        if self.trainer.args.world_size > 1:
            found = [f"process {self.trainer.args.process_index}: {one}" for one in found]
        found = of_all_processes(found, self.trainer.args)
        if found:
            folder = Path(self.trainer.args.output_dir or "")
            last = get_last_checkpoint(str(folder)) if folder.exists() else None
            kept = "no checkpoint was written" if last is None else f"the last checkpoint is {last}"
            raise ModelError(f"{what} ({'; '.join(found)}). Training stopped, and no such weights were written; {kept}. {advice}")


def of_all_processes(found: list[Any], args: TrainingArguments) -> list[Any]:
    """What the processes found, together. Every process calls it; while none finds anything, they exchange one number."""
    if args.world_size == 1:
        return found
    one_did = torch.tensor(float(bool(found)), device=args.device)
    dist.all_reduce(one_did, dist.ReduceOp.MAX)
    everything: list[Any] = gather_object(found) if one_did else []
    return everything


def trained_values(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """By name, what training changes of a model."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    for name, buffer in model.named_buffers():
        if "lavender." in name:  # an aligner's running means
            yield name, buffer


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(repr(name) for name in names[:MAX_NAMED]) + more
