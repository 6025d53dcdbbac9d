"""Fine-tuning a student by `transformers.Trainer`, with the alignment loss or without: one run folder, resumable after a kill.

run.json          every setting, the data and the targets' fingerprint, written before step one
heads.json        where `best:K` was asked for: every head's score, and the layers and heads that were chosen by them
first_stage/      the run folder of a first stage that trains the aligner alone, if there is one
checkpoints/      the Trainer's own; a run that was killed continues from the last sound one, and keeps damaged ones in damaged/;
                  maps/ has pictures of the alignment
adapter/          the LoRA adapter (`PeftModel.from_pretrained`), or `model/` after full fine-tuning
aligner.safetensors   the aligner, for looking at aligned maps later
history.json      losses, matched words, lambda and learning rate by step; written last
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..batches.collator import Collator
from ..batches.outcomes import Unusable
from ..config import AlignmentConfig, TrainingConfig, WordsConfig, fingerprint, from_dict, to_dict
from ..data.conversations import with_sound_regions
from ..data.regions import has_places
from ..data.samples import Conversation, Sample, as_conversation
from ..errors import ConfigError, DataError, LavenderError, ModelError, TargetError, first_line, importing, reading
from ..files import FolderLock, name_full_disk, read_file, read_json, write_within
from ..patching import patch
from ..pretrained.names import split_revision
from ..pretrained.weights import non_finite
from ..signals import Stop, stopping
from ..students.channels import is_chosen, weighed_places
from ..students.discovery import attention_modules
from ..students.heads import choose_heads
from ..students.loading import load_processor, pin_adapter, pin_student, require_adapter
from ..students.loading import load_student as load_student  # importable from here
from ..students.patch import ALIGNER_FILE, StudentPatch
from .arguments import REFUSAL, REMEDY, make_arguments
from .callback import LavenderCallback
from .checkpoints import last_checkpoint as _last_checkpoint
from .checkpoints import remove_old
from .guard import FiniteGuard, of_all_processes
from .record import EARLIER, HEADS_FILE, began_with, begin, has_known_picture, is_begun, require_folder
from .results import write_results
from .samples import SKIPPED, RunSamples
from .samples import _paths as _paths  # importable from here
from .samples import _texts as _texts
from .trainer import Batches, Interruption, StudentTrainer

if TYPE_CHECKING:  # a run without targets needs no pyarrow
    from ..targets.store import TargetStore

logger = logging.getLogger("lavender")

LOG_EVERY = 10
SCORED_SAMPLES = 256
"""Samples, from all over the data, whose words the scores are means over."""


def fine_tune(
    model: str | Path,
    samples: Sequence[Sample | Conversation | Mapping[str, Any]],
    out: str | Path,
    training: TrainingConfig | None = None,
    *,
    targets: TargetStore | None = None,
    alignment: AlignmentConfig | None = None,
    words: WordsConfig | None = None,
    adapter: str | Path | None = None,
    aligner: str | Path | None = None,
    strict: bool = False,
    progress: bool = True,
) -> nn.Module:
    """Fine-tunes a student and writes the run folder `out`; continues a run that was killed, and loads one that is finished.

    Every sample is looked at first, as the collator does, and those that cannot be used are named, listed in the run's folder and
    skipped. SIGTERM and SIGUSR1 end the run after the step in hand, by a checkpoint. Under `torchrun`, `accelerate launch` or
    `deepspeed` every process calls it.

    Args:
        model: folder or hub id of the student; a hub id maybe as `NAME@REVISION`, a branch, tag or commit.
        samples: pictures with questions and answers, conversations, or mappings (`lavender.data.as_conversation`).
        out: run folder.
        training: optimizer, LoRA, schedule, precision and engine.
        targets: the teacher's maps, found by sample id or by picture; without them the run is plain fine-tuning. Samples without a
            target train the language loss alone.
        alignment: what is compared, with `targets`. Where it says `best:K`, layers and heads are chosen before the training by
            their scores on some of the samples (`lavender.choose_heads`); `run.json` has the chosen ones.
        words: which words are compared, with `targets`.
        adapter: folder or hub id of a LoRA adapter that the training starts from, in place of a new one; it says the rank and the
            modules.
        aligner: run folder whose aligner this one starts from.
        strict: whether one sample that cannot be used ends the run before its first step.
        progress: whether to show progress bars.

    Returns:
        The trained model (a `PeftModel` with LoRA), still patched if it was aligned.

    Raises:
        ModelError: the student or the adapter cannot be loaded, or the student not patched; or a loss or a weight is not finite.
            Then the checkpoints before that step are kept, and nothing is written after it.
        TargetError: `targets` have none of the samples, or `out` holds a run with other settings or samples.
        DataError: no sample can be used, or one cannot and `strict` is asked for; `out` has checkpoints, and all are damaged; the
            disk is full; or another process trains in `out`.
        Stopped: a signal asked to end: a `SystemExit` with code 143.
        ConfigError: `training.arguments` holds what `transformers.TrainingArguments` does not take, or settings do not go together.
    """
    training = training or TrainingConfig()
    out = Path(out)
    known = [_known(sample) for sample in samples]
    if not known:
        raise DataError("there are no samples to train on")
    if adapter is not None and not training.lora_rank:
        raise ConfigError(
            "an adapter was given, and lora_rank is 0; leave lora_rank as it is to train the adapter, or the adapter out"
        )
    if targets is not None:
        alignment, words = alignment or AlignmentConfig(), words or WordsConfig()
        _require_targets(known, targets)
        _warn_of_no_questions(known, alignment, words)
        if training.aligner_steps and training.freeze_student and not _has_weights(alignment):
            raise ConfigError(
                "aligner='identity' has no weights that a first stage could train; choose another, or aligner_steps=0"
            )
    elif training.aligner_steps or aligner is not None:
        raise ConfigError("an aligner is trained with targets only; give targets, or leave out aligner_steps and aligner")
    else:
        alignment = words = None
        if any(sample.regions for sample in known):
            logger.warning(
                "the samples have regions, and a run without targets aligns nothing: give targets, or a Trainer a Collator"
            )
    # The same commit in every process and stage, whatever becomes of the hub's branch.
    model, adapter = pin_student(model), None if adapter is None else pin_adapter(adapter)
    loaded = None if (out / "history.json").exists() else load_processor(model)  # before a folder is made for the run
    with stopping() as stop, name_full_disk(out), _alone(out, training):
        run = _Run(model, known, out, training, targets, alignment, words, adapter, aligner, progress, stop)
        return run.with_samples(loaded, strict).with_heads().all_stages()


def load_aligner(patch_handle: StudentPatch, run: str | Path) -> None:
    """Puts the aligner of a finished run into a model that was patched with the same `AlignmentConfig`.

    Raises `ModelError` if there is none, if it is damaged or holds NaN, or if it is one of another config: its weights have other
    shapes, or belong to other layers or heads.
    """
    path = Path(run) / ALIGNER_FILE
    if not path.exists():
        raise ModelError(f"there is no aligner at {path}; give the folder of a finished run that had targets")
    try:
        weights = load(read_file(path))
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged ({error}); train the aligner again") from error
    _require_finite(weights, path)
    _require_same_places(patch_handle, Path(run) / "run.json")
    aligner = patch_handle.model.lavender
    if hasattr(aligner, "modules_to_save"):  # beside an adapter PEFT trains a copy
        aligner = aligner.modules_to_save[aligner.active_adapters[0]]
    try:
        aligner.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(f"the aligner of {run} belongs to another AlignmentConfig or model ({first_line(error)})") from error


def _require_same_places(patch_handle: StudentPatch, record: Path) -> None:
    """Raises `ModelError` if the layers and heads that a run's aligner was trained for are not those of the patch."""
    if not record.is_file():
        return
    try:
        present = EARLIER["alignment"] | (read_json(record)["alignment"] or {})
        theirs = from_dict(AlignmentConfig, present)
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise ModelError(f"{record} is damaged ({first_line(error)}), and does not say which heads its aligner is of") from error
    config, num_layers = patch_handle.config, len(attention_modules(patch_handle.decoder))
    if weighed_places(config, num_layers) == weighed_places(theirs, num_layers):
        return
    for name in ("heads", "layers", "question_heads", "question_layers"):
        one, other = getattr(theirs, name), getattr(config, name)
        if one != other:
            what = f"{name} {one}" + " for channels" * ("heads" in name)
            raise ModelError(
                f"the aligner of {record.parent} has the {what}, and this alignment {other}; give {name}={one!r}, as {record} "
                "has it"
            )


def _has_weights(alignment: AlignmentConfig) -> bool:
    return alignment.aligner != "identity" or alignment.aggregation in ("learned", "parallel")


def _require_finite(weights: Mapping[str, torch.Tensor], source: str | Path) -> None:
    bad = non_finite(weights.items())
    if bad:
        raise ModelError(
            f"{len(bad)} weights in {source} are not finite, such as {bad[0]}: it is damaged, or its training diverged"
        )


@dataclass(frozen=True, eq=False)
class _Run:
    """One stage of training, in one run folder."""

    model: str | Path
    samples: Sequence[Sample | Conversation | Unusable]
    out: Path
    training: TrainingConfig
    targets: TargetStore | None
    alignment: AlignmentConfig | None
    words: WordsConfig | None
    adapter: str | Path | None
    aligner: str | Path | None
    progress: bool
    stop: Stop
    frozen: bool = False
    identity: Mapping[str, Any] = field(default_factory=dict)
    skipped_file: Path | None = None

    def all_stages(self) -> nn.Module:
        """Trains the aligner alone first, if that is asked for."""
        run, training = self, self.training
        if training.aligner_steps and run.alignment is not None:
            rate = training.aligner_learning_rate or training.learning_rate
            out = self.out / "first_stage"
            # Lambda is constant there, unless an older version began it.
            constant = replace(run.alignment, schedule="constant", until=1.0)
            first = replace(
                run,
                out=out,
                alignment=run.alignment if began_with(out, run.alignment) else constant,
                training=replace(training, steps=training.aligner_steps, aligner_steps=0, aligner_learning_rate=rate),
                frozen=training.freeze_student,
            )
            first.execute()
            run = replace(run, aligner=first.out)
            if not training.freeze_student:
                run = replace(run, adapter=out / "adapter") if training.lora_rank else replace(run, model=out / "model")
        return run.execute()

    def with_samples(self, loaded: tuple[Any, Any] | None, strict: bool) -> _Run:
        """This run with its samples in the order that it began with, all of them looked at, by the student's processor and config.
        Those of a run that is finished need not be."""
        given = [sample for sample in self.samples if not isinstance(sample, Unusable)]
        finished = loaded is None
        begun = finished or any(is_begun(out) for out in (self.out, self.out / "first_stage"))
        samples = RunSamples.recognize(self.out, given, begun, finished)
        run = replace(self, samples=samples.samples, identity=samples.identity, skipped_file=self.out / SKIPPED)
        if loaded is None:
            return run
        processor, config = loaded
        arguments = _arguments(self.out / "checkpoints", self.training, self.progress)
        if not self.training.aligner_steps and (self.alignment is None or is_chosen(self.alignment)):  # before the work
            begin(self.out, run.record(), run.samples, self.targets, writes=False)
        what = ("model", "model_commit", "words", "targets_fingerprint")
        settings = [*(run.record()[name] for name in what), self.training.max_length, processor.chat_template]
        samples = samples.look(
            self.out,
            self.collator(processor, config),
            fingerprint(settings),
            arguments,
            strict=strict,
            progress=self.progress,
            stop=self.stop,
        )
        return replace(run, samples=samples.samples)

    def with_heads(self) -> _Run:
        """This run with layers and heads in place of `best:K`: those that it was begun with, or else chosen now, by one process."""
        if self.alignment is None or is_chosen(self.alignment):
            return self
        arguments = _arguments(self.out / "checkpoints", self.training, self.progress)
        unset_hf_deepspeed_config()  # ZeRO-3 would share out the copy of the student that one process loads
        chosen: list[AlignmentConfig] = []
        errors: list[LavenderError] = []
        if arguments.process_index == 0:
            try:
                chosen = [self._heads_of_before() or self._choose_heads(arguments.device)]
            except LavenderError as error:
                errors = [error]
        for first in of_all_processes(errors, arguments):
            raise first
        return replace(self, alignment=of_all_processes(chosen, arguments)[0])

    def _heads_of_before(self) -> AlignmentConfig | None:
        """What `heads.json` says, if the run was begun. Raises `TargetError` if other layers and heads were asked for then."""
        if not any(is_begun(out) for out in (self.out, self.out / "first_stage")):
            return None
        path = self.out / HEADS_FILE
        try:
            present: dict[str, Any] = read_json(path) if path.exists() else {"asked": None}
            if present["asked"] == to_dict(self.alignment):
                config = from_dict(AlignmentConfig, present["config"])
                if not is_chosen(config):
                    raise ValueError("its config chooses nothing")
                return config
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise DataError(f"{path} is damaged ({error}); give --out a new folder") from None
        raise TargetError(
            f"{self.out} holds a run with another alignment; give a new folder, or the settings of that run (see {path})"
        )

    def _choose_heads(self, device: torch.device) -> AlignmentConfig:
        assert self.alignment is not None
        begin(
            self.out, self.record(), self.samples, self.targets, writes=False
        )  # a folder that cannot be written to is named before the work
        student, processor = load_student(self.model, self.training.dtype)
        scored: Any = student
        if self.adapter is not None:
            scored = _with_lora(student, self.training, self.adapter, aligned=False)
        collator, size = self.collator(processor, student.config), self.training.batch_size
        usable = [sample for sample in self.samples if not isinstance(sample, Unusable)]
        samples = usable[:: -(-len(usable) // SCORED_SAMPLES)]
        batches = (collator(samples[start : start + size]) for start in range(0, len(samples), size))
        found = choose_heads(scored.to(device), self.alignment, batches)
        self.out.mkdir(parents=True, exist_ok=True)
        record = {"asked": to_dict(self.alignment), **found.to_dict()}
        write_within(self.out, HEADS_FILE, json.dumps(record, indent=2) + "\n")
        return found.config

    def execute(self) -> nn.Module:
        out = self.out
        # First of all: they start the process group, and from_pretrained asks whether ZeRO-3 shards what it loads.
        arguments = _arguments(out / "checkpoints", self.training, self.progress)
        with arguments.main_process_first():
            finished = begin(out, self.record(), self.samples, self.targets, writes=False)
        if finished:
            return replace(self, **self.saved()).build()[0]
        trained, student, processor = self.build()
        begin(out, self.record(), self.samples, self.targets, writes=arguments.process_index == 0)
        collator = Batches(self.collator(processor, student.config), self.skipped_file)
        rate, samples = self.training.aligner_learning_rate, list(self.samples)
        with reading(f"transformers.Trainer {REFUSAL}", REMEDY, ConfigError):
            trainer = StudentTrainer(
                model=trained, args=arguments, train_dataset=samples, data_collator=collator, aligner_learning_rate=rate
            )
        aligned = self.targets is not None
        trainer.add_callback(LavenderCallback(trainer, processor=processor) if aligned else FiniteGuard(trainer))
        interruption = Interruption(trainer, self.stop)
        trainer.add_callback(interruption)
        checkpoint = _last_checkpoint(out / "checkpoints", trainer)
        if checkpoint is not None and trainer.args.should_save:
            remove_old(out / "checkpoints", trainer.args.save_total_limit)  # the run may have ended before it could
        _train(trainer, checkpoint)
        if trainer.state.global_step < trainer.state.max_steps:
            interruption.raise_if_stopped()
        if not aligned:  # the callback counts them by outcome
            trainer.warn_of_unlabelled()
        write_results(out, trainer, processor, self.frozen)
        return trained

    def saved(self) -> dict[str, Any]:
        """What this run, which is finished, is loaded from, as settings of a run. Raises `DataError` where that is gone."""
        places = (
            {} if self.frozen else {"adapter": self.out / "adapter"} if self.training.lora_rank else {"model": self.out / "model"}
        )
        files = [*places.values()]
        if self.alignment is not None and _has_weights(self.alignment):
            places["aligner"] = self.out
            files.append(self.out / ALIGNER_FILE)
        for path in files:
            if not path.exists():
                raise DataError(
                    f"the run in {self.out} is finished, and {path} is gone; put it back, or remove history.json: then the same "
                    "command writes it again, from the last checkpoint if there is one"
                )
        return places

    def build(self) -> tuple[nn.Module, PreTrainedModel, Any]:
        """The model to train, the student in it, and its processor."""
        student, processor = load_student(self.model, self.training.dtype)
        set_seed(self.training.seed)
        handle = patch(student, self.alignment) if self.alignment is not None else None
        if handle is not None and self.aligner is not None:
            load_aligner(handle, self.aligner)
        if handle is not None and not self.training.lora_rank:
            # What ZeRO-3 loads in half precision, it trains in half precision: all of it.
            student.lavender.to(student.dtype)
        trained: Any = student
        if self.training.lora_rank:
            trained = _with_lora(student, self.training, self.adapter, aligned=handle is not None)
            if self.adapter is None:  # by which PEFT finds the same base model again
                trained.peft_config["default"].revision = split_revision(self.model)[1]
        if self.frozen:
            for name, parameter in trained.named_parameters():
                parameter.requires_grad_("lavender." in name and parameter.requires_grad)
        return trained, student, processor

    def collator(self, processor: Any, model_config: Any) -> Collator:
        length = self.training.max_length
        return Collator(processor, self.targets, self.words, model_config=model_config, max_length=length, on_error="skip")

    def record(self) -> dict[str, Any]:
        model, model_commit = split_revision(self.model)
        adapter, adapter_commit = (None, None) if self.adapter is None else split_revision(self.adapter)
        return {
            "model": model,
            "model_commit": model_commit,
            "adapter": adapter,
            "adapter_commit": adapter_commit,
            "aligner": None if self.aligner is None else str(self.aligner),
            "frozen_student": self.frozen,
            **self.identity,
            "training": to_dict(self.training),
            "alignment": None if self.alignment is None else to_dict(self.alignment),
            "words": None if self.words is None else to_dict(self.words),
            "targets_fingerprint": None if self.targets is None else [self.targets.fingerprint, self.targets.contents()],
        }


def _with_lora(student: Any, training: TrainingConfig, adapter: str | Path | None, aligned: bool) -> nn.Module:
    """The student with a new LoRA adapter, or with one that a folder or hub id holds; the aligner is trained beside it."""
    with importing():
        from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
        from peft.utils.save_and_load import load_peft_weights

    beside = ["lavender"] if aligned and any(True for _ in student.lavender.parameters()) else None
    if adapter is None:
        targets = training.lora_targets
        with reading(f"LoRA cannot be added to the student's {targets}", "give other lora_targets", ModelError):
            config = LoraConfig(
                r=training.lora_rank,
                lora_alpha=training.lora_alpha,
                lora_dropout=training.lora_dropout,
                target_modules=targets if isinstance(targets, str) else list(targets),
                modules_to_save=beside,
            )
            return get_peft_model(student, config)
    with reading(f"cannot load a LoRA adapter for this student from {adapter}", "give a whole copy of one", ModelError):
        name, revision = split_revision(adapter)
        require_adapter(adapter)
        peft_config = PeftConfig.from_pretrained(name, revision=revision)
        kept = [module for module in getattr(peft_config, "modules_to_save", None) or () if module != "lavender"]
        peft_config.inference_mode, peft_config.modules_to_save = False, [*kept, *(beside or ())] or None
        trained = get_peft_model(student, peft_config)
        # PEFT wants the weights of everything that it saves, the aligner's too.
        aligner = {name: value for name, value in get_peft_model_state_dict(trained).items() if "lavender." in name}
        loaded = load_peft_weights(name, device="cpu", revision=revision)
        if not aligned:  # one that lies in the adapter of a Trainer of the user's own
            loaded = {name: value for name, value in loaded.items() if "lavender." not in name}
        expected = get_peft_model_state_dict(trained)
        lacking = sorted(name for name in expected if "lavender." not in name and name not in loaded)
        _require_finite(loaded, adapter)
        report: Any = set_peft_model_state_dict(trained, aligner | loaded)
    if lacking:
        raise ModelError(f"the adapter at {adapter} is damaged: it lacks {len(lacking)} weights, such as {lacking[0]}")
    if report.unexpected_keys:
        raise ModelError(
            f"the adapter at {adapter} has weights for modules that the student lacks, such as {report.unexpected_keys[0]}"
        )
    return trained


@contextmanager
def _alone(out: Path, training: TrainingConfig) -> Iterator[None]:
    """One training at a time in a folder, whose lock the first process holds for all. One that is finished may be read by many."""
    if (out / "history.json").exists():
        yield
        return
    arguments = _arguments(out / "checkpoints", training, progress=False)
    is_new, locks = not out.exists(), list[FolderLock]()
    errors: list[Exception] = []
    if arguments.process_index == 0:
        try:
            require_folder(out)
            out.mkdir(parents=True, exist_ok=True)
            locks = [FolderLock(out, "training in", "wait until it has finished, or give --out another folder")]
        except (LavenderError, OSError) as error:
            errors = [error]
    try:
        for first in of_all_processes(errors, arguments):
            raise first
        yield
    finally:
        for lock in locks:
            lock.withdraw() if is_new else lock.release()


def _arguments(folder: Path, training: TrainingConfig, progress: bool) -> TrainingArguments:
    required: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": training.steps,
        "per_device_train_batch_size": training.batch_size,
        "learning_rate": training.learning_rate,
        "warmup_steps": training.warmup_steps,
        "save_steps": training.save_steps,
        "seed": training.seed,
        "data_seed": training.seed,
        "remove_unused_columns": False,
    }
    if training.gradient_checkpointing:
        required |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    preset: dict[str, Any] = {
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "save_total_limit": 2,
        # Whenever a checkpoint is written, too: what was logged by then is in it.
        "logging_steps": math.gcd(LOG_EVERY, training.save_steps),
        "report_to": [],
        "disable_tqdm": not progress,
        # Not every weight need be used: the last layer of Llava's vision tower is not.
        "ddp_find_unused_parameters": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision in ("bf16", "fp16"):  # `accelerate launch` says it to DeepSpeed, which wants the Trainer to say the same
        preset[precision] = True
    return make_arguments(preset | dict(training.arguments) | required)


def _known(sample: Sample | Conversation | Mapping[str, Any]) -> Sample | Conversation:
    if not isinstance(sample, Sample | Conversation):
        return as_conversation(sample)
    with suppress(DataError):  # the collator names it, and skips it
        return with_sound_regions(sample)
    return sample


def _warn_of_no_questions(samples: Sequence[Sample | Conversation], alignment: AlignmentConfig, words: WordsConfig) -> None:
    given = [name for name in ("question_layers", "question_heads") if getattr(alignment, name) is not None]
    if given and "question" not in words.roles and not any(sample.regions for sample in samples):
        logger.warning(
            "%s: no word that the user says is compared; give WordsConfig(roles=('question', 'answer')), or leave it out",
            ", ".join(f"{name}={getattr(alignment, name)!r}" for name in given),
        )


def _require_targets(samples: Sequence[Sample | Conversation], targets: TargetStore) -> None:
    missing = [sample for sample in samples if sample.id not in targets]
    if not missing:
        return
    count = f"{len(missing)} of {len(samples)} samples"
    message = f"{targets.folder} has no targets for {count} by their ids (first: {missing[0].id!r})"
    if len(missing) == len(samples) and not any(
        has_places(sample.regions) or has_known_picture(sample, targets) for sample in missing
    ):
        raise TargetError(f"{message} or pictures; extract them, or give the samples the ids that they were extracted by")
    logger.warning("%s; these train the language loss alone, but for those whose picture it has, and for regions", message)


def _train(trainer: StudentTrainer, checkpoint: str | None) -> None:
    trainer.checkpoint = checkpoint
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if state.global_step >= trainer.args.max_steps:
            # Asked to continue a finished run in the middle of an epoch, the Trainer would take one step more.
            if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
                trainer._prepare_for_training(state.max_steps, trainer.get_train_dataloader(), checkpoint)
            else:
                trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=checkpoint)
