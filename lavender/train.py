"""Fine-tuning a student by `transformers.Trainer`, with the alignment loss or without: one run folder, resumable after a kill.

run.json          every setting, the data and the targets' fingerprint, written before step one
checkpoints/      the Trainer's own; a run that was killed continues from the last one
adapter/          the LoRA adapter (`PeftModel.from_pretrained`), or `model/` after full fine-tuning
aligner.safetensors   the aligner, for looking at aligned maps later
history.json      loss, alignment loss and learning rate by step
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from .collator import Collator
from .config import AlignmentConfig, TrainingConfig, to_dict
from .data import Sample
from .errors import DataError, ModelError, TargetError
from .hooks.discovery import base_model_of
from .hooks.transformers import StudentPatch
from .patching import patch
from .targets import TargetStore

LOG_EVERY = 10


def load_student(model: str | Path) -> tuple[PreTrainedModel, Any]:
    """Loads an image-text-to-text model in float32 and its processor. Raises `ModelError` when there is none."""
    try:
        processor = AutoProcessor.from_pretrained(str(model))
        return AutoModelForImageTextToText.from_pretrained(str(model), dtype=torch.float32), processor
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ModelError(
            f"cannot load an image-text-to-text model from {str(model)!r} ({first_line}); give a folder that transformers saved, "
            "or a hub id"
        ) from error


def fine_tune(
    model: str | Path,
    samples: Sequence[Sample],
    out: str | Path,
    training: TrainingConfig | None = None,
    *,
    targets: TargetStore | None = None,
    alignment: AlignmentConfig | None = None,
    progress: bool = True,
) -> nn.Module:
    """Fine-tunes a student and writes the run folder `out`; continues a run that was killed.

    Args:
        model: folder or hub id of the student.
        samples: pictures with questions and answers.
        out: run folder.
        training: optimizer, LoRA and schedule.
        targets: the teacher's maps by sample id; without them the run is plain fine-tuning.
        alignment: what is compared, with `targets`.
        progress: whether to show the Trainer's progress bar.

    Returns:
        The trained model (a `PeftModel` with LoRA), still patched if it was aligned.

    Raises:
        ModelError: the student cannot be loaded or patched.
        TargetError: `targets` lack a sample, or `out` holds a run with other settings.
    """
    training = training or TrainingConfig()
    if targets is not None:
        alignment = alignment or AlignmentConfig()
        _require_targets(samples, targets)
    out = Path(out)
    student, processor = load_student(model)
    set_seed(training.seed)
    handle = patch(student, alignment) if targets is not None else None
    trained: nn.Module = student
    if training.lora_rank:
        trained = _with_lora(student, training, aligned=handle is not None)
    _begin(out, _run_record(model, samples, training, targets, alignment))
    trainer = Trainer(
        model=trained,
        args=_arguments(out / "checkpoints", training, progress),
        train_dataset=list(samples),  # type: ignore[arg-type]
        data_collator=_collator(processor, targets, student.config),
        callbacks=[_AlignmentLog(handle)] if handle is not None else None,
    )
    _train(trainer, _last_checkpoint(out / "checkpoints"))
    _write_results(out, trainer, student, processor)
    return trained


def load_aligner(patch_handle: StudentPatch, run: str | Path) -> None:
    """Puts the aligner of a finished run into a model that was patched with the same `AlignmentConfig`."""
    alignment = patch_handle.model.lavender
    state = load_file(Path(run) / "aligner.safetensors")
    alignment.load_state_dict(state)


def _collator(processor: Any, targets: TargetStore | None, model_config: Any) -> Any:
    collator = Collator(processor, targets, model_config=model_config)
    if targets is not None:
        return collator

    def plain(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        return {key: value for key, value in collator(samples).items() if not key.startswith("lavender_")}

    return plain


def _with_lora(student: PreTrainedModel, training: TrainingConfig, aligned: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=training.lora_rank,
        lora_alpha=training.lora_alpha,
        lora_dropout=training.lora_dropout,
        target_modules=list(training.lora_targets),
        modules_to_save=["lavender"] if aligned and any(True for _ in student.lavender.parameters()) else None,
    )
    return get_peft_model(student, config)


def _arguments(folder: Path, training: TrainingConfig, progress: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=training.warmup_steps,
        weight_decay=0.0,
        save_steps=training.save_steps,
        save_total_limit=2,
        # What was summed up since the last log is not in a checkpoint: log whenever one is written.
        logging_steps=math.gcd(LOG_EVERY, training.save_steps),
        seed=training.seed,
        data_seed=training.seed,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=not progress,
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


class _AlignmentLog(TrainerCallback):
    """Adds the alignment loss of the latest batch to what the Trainer logs."""

    def __init__(self, handle: StudentPatch) -> None:
        self.handle = handle

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.handle.term is not None and "loss" in state.log_history[-1]:
            state.log_history[-1]["alignment_loss"] = round(float(self.handle.term), 5)


def _require_targets(samples: Sequence[Sample], targets: TargetStore) -> None:
    missing = [sample.id for sample in samples if sample.id not in targets]
    if missing:
        raise TargetError(
            f"{targets.folder} has no targets for {len(missing)} of {len(samples)} samples (first: {missing[0]!r}); "
            "extract them, or drop these samples"
        )


def _run_record(
    model: str | Path,
    samples: Sequence[Sample],
    training: TrainingConfig,
    targets: TargetStore | None,
    alignment: AlignmentConfig | None,
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.id, sample.question, sample.answer]).encode())
    return {
        "model": str(model),
        "samples": len(samples),
        "samples_sha256": digest.hexdigest(),
        "training": to_dict(training),
        "alignment": to_dict(alignment) if alignment is not None and targets is not None else None,
        "targets_fingerprint": targets.fingerprint if targets is not None else None,
    }


def _begin(out: Path, record: dict[str, Any]) -> None:
    """Writes `run.json`, or compares it with the run that `out` holds already."""
    path = out / "run.json"
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; give --out a folder")
    # A run that wrote no checkpoint may be begun anew with other settings.
    if path.exists() and any((out / "checkpoints").glob("checkpoint-*")):
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is damaged ({error}); give --out a new folder") from None
        changed = [key for key in record if found.get(key) != record[key]]
        if changed:
            raise TargetError(
                f"{out} holds a run with another {', '.join(changed)}; give a new folder, or the settings of that run (see {path})"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def _train(trainer: Trainer, checkpoint: str | None) -> None:
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if state.global_step >= trainer.args.max_steps:
            # Asked to continue a finished run in the middle of an epoch, the Trainer would take one step more.
            trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=checkpoint)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; unfinished ones, left by a kill while they were written, are removed."""
    while folder.exists() and (newest := get_last_checkpoint(str(folder))) is not None:
        try:
            json.loads((Path(newest) / "trainer_state.json").read_text())  # the Trainer writes it last
            return newest
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(newest)
    return None


def _write_results(out: Path, trainer: Trainer, student: Any, processor: Any) -> None:
    trained = trainer.model
    # The aligner has a file of its own, so that the adapter is what plain PEFT expects, and nothing more.
    if hasattr(student, "lavender"):
        alignment = student.lavender
        alignment = alignment.modules_to_save["default"] if hasattr(alignment, "modules_to_save") else alignment
        save_file({k: v.contiguous() for k, v in alignment.state_dict().items()}, out / "aligner.safetensors")
    if hasattr(trained, "peft_config"):
        _save_adapter(trained, out / "adapter")
    else:
        state = {k: v for k, v in base_model_of(trained).state_dict().items() if not k.startswith("lavender.")}
        base_model_of(trained).save_pretrained(out / "model", state_dict=state)
        processor.save_pretrained(out / "model")
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    (out / "history.json").write_text(json.dumps(history, indent=2) + "\n")


def _save_adapter(trained: Any, folder: Path) -> None:
    config = trained.peft_config["default"]
    kept, config.modules_to_save = config.modules_to_save, None
    try:
        trained.save_pretrained(folder)
    finally:
        config.modules_to_save = kept
    # PEFT writes the aligner into the adapter as well, where a model without one would not know what to do with it.
    path = folder / "adapter_model.safetensors"
    adapter = {name: value for name, value in load_file(path).items() if ".lavender." not in name}
    save_file(adapter, path, metadata={"format": "pt"})
