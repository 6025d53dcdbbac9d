"""The Trainer of a student."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import get_worker_info
from transformers import Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..batches.collator import Collator
from ..errors import ConfigError, DataError, LavenderError, reading
from ..signals import Stop, Stopped, outlast
from ..students.patch import is_checkpoint
from ..types import WordBatch
from .arguments import REFUSAL, REMEDY
from .callback import LavenderCallback
from .checkpoints import ASIDE, publish, remove_old, writing
from .guard import of_all_processes

logger = logging.getLogger("lavender")

SAMPLE_IDS = "sample_ids"
"""The key of a batch that never reaches the model."""


SUMS = "sums_{}.pth"
"""The file of a checkpoint that has a process's sums since the last log."""


class Batches:
    """A collator's batches with the ids of their samples, and without lavender's keys where nothing is aligned.

    Samples that the collator skips are added to a file, if there is one: a line `{"id", "reason"}` for each.
    """

    def __init__(self, collator: Collator, skipped_file: Path | None = None) -> None:
        self.collator = collator
        self.skipped_file = skipped_file

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        if get_worker_info() is not None:
            outlast()
        num_skipped = len(self.collator.skipped)
        batch: dict[str, Any] = self.collator(samples)
        new = islice(self.collator.skipped.items(), num_skipped, None)
        lines = [json.dumps({"id": sample_id, "reason": reason}) + "\n" for sample_id, reason in new]
        if lines and self.skipped_file is not None:
            with suppress(OSError), open(self.skipped_file, "a") as file:  # the log has them, too
                file.writelines(lines)
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
        checkpoint: what the training continues from; None if it begins.
    """

    def __init__(self, *args: Any, aligner_learning_rate: float | None, **kwargs: Any) -> None:
        self.aligner_learning_rate = aligner_learning_rate
        self.sample_ids: list[list[str]] = []
        self.last_loss: torch.Tensor | None = None
        self.unlabelled: torch.Tensor | int = 0
        self.checkpoint: str | None = None
        self._aside: Path | None = None
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
        """The Trainer's, and beside it what this process has summed up since the last log, without which the next would be another
        than an undisturbed run's."""
        super()._save_rng_state(output_dir)
        if hasattr(self, "_tr_loss") and self.state.global_step > self._globalstep_last_logged:
            torch.save(self._sums(), Path(output_dir) / SUMS.format(self.args.process_index))

    def _sums(self) -> dict[str, Any]:
        callbacks = [vars(callback.sums) for callback in self.callback_handler.callbacks if isinstance(callback, LavenderCallback)]
        return {"loss": self._tr_loss, "logged": self._globalstep_last_logged, "callbacks": callbacks}

    def load_sums(self) -> None:
        """Goes on with the sums of the checkpoint that the training continues from, if it has some."""
        path = Path(self.checkpoint or "") / SUMS.format(self.args.process_index)
        if self.checkpoint is None or not path.exists():
            return
        callbacks = [callback for callback in self.callback_handler.callbacks if isinstance(callback, LavenderCallback)]
        with _continuing(self.checkpoint):
            sums = torch.load(path, map_location=self.args.device, weights_only=True)
            self._tr_loss, self._globalstep_last_logged = sums["loss"], sums["logged"]
            for callback, values in zip(callbacks, sums["callbacks"], strict=True):
                vars(callback.sums).update(values)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's, complete or absent: it has its name when all processes have written their parts, and before older
        ones go. Raises `DataError`, in all processes, where the disk is full."""
        folder, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        pushes, self.args.push_to_hub = self.args.push_to_hub, False
        self._aside = folder / ASIDE
        try:
            with self.all_writing(folder, exchanging=self.is_deepspeed_enabled or self.is_fsdp_enabled):
                super()._save_checkpoint(model, trial)
            with self.all_writing(folder):
                if self.args.should_save:
                    publish(self._aside / name, folder / name, self.args.world_size)
        finally:
            self._aside, self.args.push_to_hub = None, pushes
        if pushes:
            self._push_from_checkpoint(str(folder / name))
        if self.args.should_save:
            remove_old(folder, self.args.save_total_limit)

    @contextmanager
    def all_writing(self, folder: Path, exchanging: bool = False) -> Iterator[None]:
        """A block in which processes write to a folder, until all are through it.

        If the disk is full for one, `DataError` is raised in all, and what was written aside is removed. Where they exchange
        something in the block, for which the others wait, it is raised in this process alone, whose end ends the others.
        """
        errors = []
        try:
            with writing(folder):
                yield
        except DataError as error:
            if exchanging:
                raise
            errors = [error]
        for first in of_all_processes(errors, self.args):
            if self.args.should_save:
                shutil.rmtree(folder / ASIDE, ignore_errors=True)
            raise first
        self.accelerator.wait_for_everyone()

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


class Interruption(TrainerCallback):
    """Ends a training that a signal asked to end: after the step in hand, the same one in all processes, by a checkpoint."""

    def __init__(self, trainer: StudentTrainer, stop: Stop) -> None:
        self.trainer, self.stop = trainer, stop
        self.reason = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.load_sums()  # after the other callbacks have begun theirs
        self.raise_if_stopped()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps and self._is_requested():
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.reason and state.epoch % 1:  # which is not the epoch's end
            control.should_log = control.should_save = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.reason:  # not before, or the checkpoint would say that its training is over
            control.should_training_stop = True

    def raise_if_stopped(self) -> None:
        """Raises `Stopped`, in all processes, if one of them was asked to end."""
        state = self.trainer.state
        if self.reason:
            kept = f"checkpoint-{state.global_step} is written"
            raise Stopped(f"{self.reason} ended the training after step {state.global_step}: {kept}; the same command continues")
        if self._is_requested():
            raise Stopped(f"{self.reason} ended the training before step {state.global_step + 1}; the same command continues")

    def _is_requested(self) -> bool:
        self.reason = next(iter(of_all_processes([self.stop.named()] if self.stop.requested else [], self.trainer.args)), "")
        return bool(self.reason)
