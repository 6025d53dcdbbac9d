"""The Trainer of a student."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..batches.collator import Collator
from ..errors import ConfigError, DataError, LavenderError, reading
from ..students.patch import is_checkpoint
from ..types import WordBatch
from .arguments import REFUSAL, REMEDY
from .checkpoints import write_record
from .guard import of_all_processes

logger = logging.getLogger("lavender")

SAMPLE_IDS = "sample_ids"
"""The key of a batch that never reaches the model."""


class Batches:
    """A collator's batches with the ids of their samples, and without lavender's keys where nothing is aligned."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collator(samples)
        if self.collator.targets is None:
            batch, _ = WordBatch.split(batch)
        return batch | {SAMPLE_IDS: [sample.id for sample in samples]}


def _continuing(checkpoint: str | None) -> AbstractContextManager[None]:
    """Around the Trainer's reading of a checkpoint, which executes no pickle."""
    remedy = "remove it, to continue from the one before, or put back what it was"
    return reading(f"{checkpoint} cannot be continued from", remedy, DataError)


class StudentTrainer(Trainer):
    """A Trainer whose aligner may have a learning rate of its own, and which knows what it is at.

    Attributes:
        sample_ids: by micro-batch of the step in hand, the ids of this process's samples.
        last_loss: this process's latest loss, a scalar; None before the first.
        unlabelled: how many samples had no label token, each counted every time it came up.
    """

    def __init__(self, *args: Any, aligner_learning_rate: float | None, **kwargs: Any) -> None:
        self.aligner_learning_rate = aligner_learning_rate
        self.sample_ids: list[list[str]] = []
        self.last_loss: torch.Tensor | None = None
        self.unlabelled: torch.Tensor | int = 0
        super().__init__(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The Trainer's. The error of one process's collator is raised in all: the others would wait for it."""
        batches, errors = [], []
        try:
            batches = list(islice(epoch_iterator, num_batches))
        except LavenderError as error:
            # From a DataLoader's worker it comes with a traceback, whose last line it is.
            last_line = str(error).splitlines()[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
            errors = [type(error)(last_line)]
        for first in of_all_processes(errors, self.args):
            raise first
        self.sample_ids = [batch.pop(SAMPLE_IDS) for batch in batches]
        for batch in batches:
            self.unlabelled = self.unlabelled + (batch["labels"][:, 1:] == -100).all(1).sum()
        return super().get_batch_samples(iter(batches), num_batches, device)

    def warn_of_unlabelled(self) -> None:
        """Logs how many samples taught nothing. Every process calls it."""
        count = sum(of_all_processes([int(self.unlabelled)] if self.unlabelled else [], self.args))
        if count and self.is_world_process_zero():
            logger.warning("samples without label tokens, skipped or cut off (counted each time they came up): %d", count)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; zero for a batch without label tokens, all of whose samples were skipped or cut off: it would be 0 / 0.

        The backward pass of this zero is one as any other, for the engines that exchange gradients in it.
        """
        has_labels = (inputs["labels"][:, 1:] != -100).any()
        loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
        return torch.where(has_labels, loss, 0.0)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the aligner's weights in groups of their own."""
        made_before = self.optimizer is not None
        with reading(f"the optimizer {REFUSAL}", REMEDY, ConfigError):
            optimizer = super().create_optimizer(model)
        if made_before or self.aligner_learning_rate is None:
            return optimizer
        trained: Any = self.model if model is None else model
        aligner_ids = {id(p) for name, p in trained.named_parameters() if "lavender." in name}
        groups = list(optimizer.param_groups)
        for group in groups:
            aligner = [p for p in group["params"] if id(p) in aligner_ids]
            group["params"] = [p for p in group["params"] if id(p) not in aligner_ids]
            if aligner:
                optimizer.add_param_group({**group, "params": aligner, "lr": self.aligner_learning_rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The Trainer's."""
        with reading(f"the learning rate's schedule {REFUSAL}", REMEDY, ConfigError):
            return super().create_scheduler(num_training_steps, optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with _continuing(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _continuing(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _continuing(checkpoint):
            super()._load_rng_state(checkpoint)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The Trainer's. FSDP2 resumes an optimizer only if it has a state of every weight, unused ones too."""
        loss, model = super().training_step(*args, **kwargs), self.model
        self.last_loss = loss
        if self.is_fsdp_enabled and model is not None:
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return loss

    def _save_rng_state(self, output_dir: str) -> None:
        """The Trainer's. It comes before the Trainer's state, which says that a checkpoint is complete: for all processes."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            write_record(
                Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", self.args.world_size
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """The Trainer's, with the weights' own names in checkpoints, which it loads without renaming (transformers issue 43701),
        and under ZeRO-3, where nobody knows the names that they were loaded by."""
        model: Any = self.model
        bound = vars(model).get("save_pretrained")
        if is_deepspeed_zero3_enabled() or is_checkpoint(output_dir or ""):
            model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            vars(model).pop("save_pretrained", None)
            if bound is not None:  # by lavender.patch
                model.save_pretrained = bound
