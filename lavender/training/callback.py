"""Reporting an aligned training: loss parts, matched words and map pictures, to whatever tracker the Trainer reports to."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from ..errors import ConfigError, MissingPackageError, ModelError, importing, warn_renamed
from ..files import write_within
from ..students.discovery import base_model_of
from ..students.loss import Comparison
from ..students.patch import StudentPatch
from ..types import OUTCOMES
from .guard import FiniteGuard

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("lavender")

TINY = 1e-12
"""Below every sum of shares: a quotient of zeros is zero."""
NUM_PICTURED = 6
"""Words whose maps are drawn."""


class LavenderCallback(FiniteGuard):
    """Makes a Trainer, or a TRL trainer, report the alignment: `trainer.add_callback(lavender.LavenderCallback(trainer))`.

    Whatever the Trainer logs - to the terminal, to `report_to`, to its history - gains `language_loss`, `alignment_loss` (the
    unweighted mean over matched words), `alignment_weight` (lambda), `matched_words` (per batch, over all processes) and, where
    there are any, the samples without a match since the last log, by reason. A lambda that falls follows the training's progress.
    Where it has ended, no word is matched (`alignment_loss` and `matched_words` are zero), unless the aligner has weights. Maps of
    the first words of a batch, the target's above the student's aligned ones, are drawn to `maps/` in the Trainer's folder, and to
    TensorBoard and Weights & Biases.

    A training whose loss or weights become NaN or infinite ends in a `ModelError`, before a checkpoint of such weights is written.
    """

    def __init__(self, trainer: Trainer, *, processor: Any = None, picture_steps: int | None = None) -> None:
        """
        Args:
            trainer: a Trainer of a patched model, before `train()`.
            processor: names the drawn words; the Trainer's `processing_class` by default.
            picture_steps: steps between pictures; a tenth of the training by default, 0 for none.

        Raises:
            ModelError: the Trainer's model is not patched for training.
            ConfigError: the Trainer would not train by the model's loss, to which the alignment is added.
        """
        patch = getattr(base_model_of(trainer.model), "_lavender_patch", None)
        if patch is None or not patch.trains:
            raise ModelError(
                "the Trainer's model is not patched for training; call lavender.patch(model, AlignmentConfig(...)) first"
            )
        if trainer.args.label_smoothing_factor or trainer.compute_loss_func is not None:
            raise ConfigError(
                "with label_smoothing_factor or compute_loss_func the Trainer drops the model's loss, and the alignment with it; "
                "leave them out"
            )
        super().__init__(trainer)
        self.patch: StudentPatch = patch
        self.processor = processor or trainer.processing_class
        self.picture_steps = picture_steps
        self.last: Comparison | None = None
        self.sums = _Sums()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        handler = self.trainer.callback_handler
        # In front of the trackers, which get what it adds to the log. The handler is iterating over its list: make another.
        handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]
        try:
            if self.picture_steps != 0:
                with importing():
                    import matplotlib.figure  # noqa: F401  # and not at the first picture, in the middle of the run
        except MissingPackageError as error:
            if self.picture_steps is not None:
                raise
            logger.warning("no pictures of the alignment are drawn: %s", error)
            self.picture_steps = 0
        if self.picture_steps is None:
            self.picture_steps = max(1, state.max_steps // 10)
        self.last, self.sums = self.patch.last, _Sums()
        super().on_train_begin(args, state, control)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_begin(args, state, control)
        self.patch.progress = state.global_step / max(1, state.max_steps)

    def note_forward(self) -> dict[str, torch.Tensor]:
        if self.patch.last is None or self.patch.last is self.last:
            return {}
        self.last = self.patch.last
        self.sums.add(self.last)
        language = {} if self.last.language is None else {"language loss": self.last.language}
        return language | {"alignment loss": self.last.loss}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control)
        self.sums.end_step()
        if state.global_step >= state.max_steps:
            control.should_log = True  # or what came since the last log would be lost
        pictured = self.picture_steps and state.global_step % self.picture_steps == 0
        if state.is_world_process_zero and pictured and self.last is not None and self.last.aligned is not None:
            self._draw(self.last, args, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs or not self.sums.count:
            return
        parts = self.sums.parts(logs["loss"])
        self.sums = _Sums()
        logs.update(parts)
        state.log_history[-1].update(parts)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        entries = [entry for entry in state.log_history if "matched_words" in entry]
        totals = {name: sum(int(entry.get(_key(name), 0)) for entry in entries) for name in OUTCOMES[1:]}
        if state.is_world_process_zero and any(totals.values()):
            counts = ", ".join(f"{name}: {count}" for name, count in totals.items() if count)
            logger.warning("samples that were not aligned (counted each time they came up): %s", counts)

    def _draw(self, comparison: Comparison, args: Any, state: Any) -> None:
        figure = draw(comparison, self.processor)
        folder = Path(args.output_dir) / "maps"
        folder.mkdir(parents=True, exist_ok=True)
        drawing = io.BytesIO()
        figure.savefig(drawing, format="png")
        write_within(folder, f"step-{state.global_step:06d}.png", drawing.getvalue())
        for callback in self.trainer.callback_handler.callbacks:
            if getattr(callback, "tb_writer", None) is not None:
                callback.tb_writer.add_figure("alignment/maps", figure, state.global_step)
            elif getattr(callback, "_wandb", None) is not None:
                callback._wandb.log({"alignment/maps": callback._wandb.Image(figure), "train/global_step": state.global_step})


def _key(outcome: str) -> str:
    return f"samples_{outcome.replace(' ', '_')}"


class _Sums:
    """Sums over the forwards since the last log, left on their device. Micro-batches count by their share of the optimizer step, as
    they do in the loss."""

    def __init__(self) -> None:
        self.count = 0
        self.steps = 0
        self.labelled: Any = 0
        self.share: Any = 0.0
        self.share_before: Any = 0.0
        self.matched: Any = 0.0
        self.loss: Any = 0.0
        self.weighted: Any = 0.0
        self.words: Any = 0.0
        self.outcomes: Any = 0.0
        self.weight = 0.0

    def add(self, comparison: Comparison) -> None:
        self.count += 1
        self.share = self.share + comparison.share
        self.matched = self.matched + comparison.share * (comparison.words > 0)
        self.loss = self.loss + comparison.share * comparison.loss
        self.weighted = self.weighted + comparison.weight * comparison.share * comparison.loss
        self.words = self.words + comparison.words
        self.outcomes = self.outcomes + comparison.outcomes
        self.weight = comparison.weight

    def end_step(self) -> None:
        self.steps += 1
        self.labelled = self.labelled + (self.share > self.share_before)
        self.share_before = self.share

    def parts(self, loss: float) -> dict[str, float]:
        """What a log entry of the whole `loss` gains."""
        counts = {_key(name): int(count) for name, count in zip(OUTCOMES, self.outcomes.tolist(), strict=True)}
        parts = {
            # The logged loss is the mean over steps, those without label tokens too, whose share is zero.
            "language_loss": loss - float(self.weighted / max(self.share, TINY) * self.labelled / max(self.steps, 1)),
            # Of the micro-batches that have matched words.
            "alignment_loss": float(self.loss / max(self.matched, TINY)),
            "alignment_weight": self.weight,
            "matched_words": float(self.words / self.count),
        }
        parts |= {name: count for name, count in counts.items() if count and name != _key(OUTCOMES[0])}
        return {name: round(value, 6) for name, value in parts.items()}


def draw(comparison: Comparison, processor: Any = None) -> Figure:
    """The first words of a batch that have a target: its map above the student's aligned one, each by its own range.

    With a processor, or a tokenizer, words are named by their tokens.
    """
    from matplotlib.figure import Figure

    batch = comparison.batch
    assert batch.targets is not None
    assert comparison.aligned is not None
    chosen = batch.present.nonzero()[:NUM_PICTURED].tolist()
    figure = Figure(figsize=(1.6 * max(1, len(chosen)), 3.6), layout="constrained")
    axes = figure.subplots(2, max(1, len(chosen)), squeeze=False)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    for column, (b, w) in enumerate(chosen):
        for ax, maps in zip(axes[:, column], (batch.targets, comparison.aligned), strict=True):
            ax.imshow(maps[b, w].float().cpu(), cmap="magma")
        axes[0, column].set_title(_word(comparison, b, w, processor), fontsize=9)
    axes[0, 0].set_ylabel("target")
    axes[1, 0].set_ylabel("student, aligned")
    return figure


def _word(comparison: Comparison, b: int, w: int, processor: Any) -> str:
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is None or comparison.input_ids is None:
        return f"sample {b}, word {w}"
    at = comparison.batch.tokens[b][comparison.batch.token_words[b] == w]
    return str(tokenizer.decode(comparison.input_ids[b][at])).strip()


def watch(trainer: Trainer, *, processor: Any = None, picture_steps: int | None = None) -> None:
    """Deprecated: adds a `LavenderCallback`."""
    warn_renamed("lavender.watch(trainer)", "trainer.add_callback(lavender.LavenderCallback(trainer))")
    trainer.add_callback(LavenderCallback(trainer, processor=processor, picture_steps=picture_steps))
