"""One process of a training on the CPU: `fine_tune` for every run that the settings name, one after another.

    accelerate launch --config_file examples/engines/zero3.yaml ... worker.py settings.json

It fails unless the engine really does what its name says. `words.RANK.json` in a run's folder has the process's own matched words.
A run with `kill_after` is killed after so many steps, in processes that every worker forks for it; then the workers call the same
`fine_tune`. In one with `die_at` the first of these processes is killed where it would synchronize a file for the so many-th time,
and the others end with it. In one with `signal_after` the last worker gets SIGTERM in that step, and all call it again. In a run
with `poison` the loss of every batch with that sample is NaN; one with `refuse` refuses that sample. A run that ends in an error
leaves it in `error.RANK`. A run with `lose` loses the files that it names, and its results, when it is over, and is called again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_TORCH_DEVICE="cpu")

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, training_args

from lavender.batches.collator import Collator
from lavender.config import AlignmentConfig, TrainingConfig
from lavender.data.samples import read_samples
from lavender.errors import DataError, LavenderError
from lavender.signals import Stopped
from lavender.students.discovery import base_model_of
from lavender.targets.store import TargetStore
from lavender.training import train
from lavender.training.callback import LavenderCallback


class Witness(TrainerCallback):
    """Asserts that the engine is at work, counts words, and kills the process at the end of step `kill_after`."""

    def __init__(self, engine, trainer, out, kill_after, signal_after):
        self.engine, self.trainer, self.out, self.kill_after = engine, trainer, out, kill_after
        self.signal_after = signal_after
        self.patch = base_model_of(trainer.model)._lavender_patch
        self.words = []

    def on_train_begin(self, args, state, control, **kwargs):
        accelerator, wrapped = self.trainer.accelerator, self.trainer.model_wrapped
        processes = 1 if self.engine == "one" else 2
        assert (accelerator.num_processes, accelerator.process_index) == (processes, int(os.environ.get("RANK", "0")))
        parameters = dict(wrapped.named_parameters())
        aligner = [p for name, p in parameters.items() if "lavender." in name and p.requires_grad]
        assert aligner
        match self.engine:
            case "one":
                assert accelerator.distributed_type == DistributedType.NO
            case "ddp":
                assert accelerator.distributed_type == DistributedType.MULTI_CPU
                assert isinstance(wrapped, DistributedDataParallel)
            case "zero2":
                assert accelerator.distributed_type == DistributedType.DEEPSPEED
                assert wrapped.zero_optimization_stage() == 2
                trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
                own = sum(p.numel() for group in self.trainer.optimizer.param_groups for p in group["params"])
                assert own < 0.6 * trained
            case "zero3":
                assert accelerator.distributed_type == DistributedType.DEEPSPEED
                assert wrapped.zero_optimization_stage() == 3
                assert all(p.ds_tensor.ds_numel < p.ds_numel or p.ds_numel == 1 for p in parameters.values())
            case "fsdp2":
                assert accelerator.is_fsdp2
                assert all(isinstance(p, DTensor) for p in parameters.values())
                assert sum(p.to_local().numel() for p in aligner) < sum(p.numel() for p in aligner)

    def on_step_end(self, args, state, control, **kwargs):
        self.words.append(int(self.patch.last.batch.present.sum()))
        if state.global_step == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if state.global_step == self.signal_after and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_end(self, args, state, control, **kwargs):
        (self.out / f"words.{args.process_index}.json").write_text(json.dumps(self.words))


def go_without_gpus(engine):
    """What the CPU needs beyond the engine's config file; returns arguments for the Trainer."""
    if engine in ("one", "ddp"):
        return {"use_cpu": True} | ({"ddp_backend": "gloo"} if engine == "ddp" else {})
    if engine != "fsdp2":
        import deepspeed

        # In place of gloo it would take an extension for shared memory, which is compiled for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Both libraries offer these engines for GPUs alone; on a CPU accelerate would silently train something else.
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
    training_args.is_torch_bf16_gpu_available = lambda: True
    return {}


def train_until_killed(run, settings, arguments):
    """Trains in a process of its own, which SIGKILL ends in the middle of the run."""
    child, is_first = os.fork(), os.environ.get("RANK", "0") == "0"
    if not child:
        try:
            if "die_at" in run and is_first:
                die_at(run["die_at"])
            fine_tune(run, settings, arguments, kill_after=run.get("kill_after"))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == -signal.SIGKILL or ("die_at" in run and not is_first)
    # The launcher's store still has the addresses of the processes that died: meet at another one.
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(int(os.environ["MASTER_PORT"]) + 1))


def train_until_stopped(run, settings, arguments):
    fit = train._train
    try:
        fine_tune(run, settings, arguments, signal_after=run["signal_after"])
    except Stopped as stopped:
        train._train = fit
        (Path(run["out"]) / f"stopped.{os.environ.get('RANK', '0')}").write_text(str(stopped))


def die_at(count):
    fsync, passed = os.fsync, iter(range(count))

    def synchronize(descriptor):
        if next(passed, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = synchronize


def fine_tune(run, settings, arguments, kill_after=None, signal_after=None):
    fit = train._train

    def witnessed(trainer, checkpoint):
        out = Path(trainer.args.output_dir).parent
        trainer.add_callback(Witness(settings["engine"], trainer, out, kill_after, signal_after))
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, LavenderCallback):
                callback.picture_steps = 0  # drawing takes longer than a step of this student
        fit(trainer, checkpoint)

    train._train = witnessed
    train.fine_tune(
        settings["model"],
        read_samples(run["data"]),
        run["out"],
        TrainingConfig(**run["training"] | {"arguments": arguments | run["training"].get("arguments", {})}),
        targets=TargetStore(run["targets"]),
        alignment=AlignmentConfig(weight=2.0, hidden_channels=8, **({"aligner": "sim", "question_rows": None} | run["alignment"])),
        progress=False,
    )
    train._train = fit


class Poisoned(Collator):
    poison = refused = None

    def __call__(self, samples):
        batch = super().__call__(samples)
        ids = [sample.id for sample in samples]
        if self.refused in ids:
            raise DataError(f"sample {self.refused!r} is refused")
        if self.poison in ids:
            batch["pixel_values"][0] = torch.nan
        return batch


def attempt(run, settings, arguments):
    Poisoned.poison, Poisoned.refused = run.get("poison"), run.get("refuse")
    try:
        fine_tune(run, settings, arguments)
    except LavenderError as error:
        (Path(run["out"]) / f"error.{os.environ.get('RANK', '0')}").write_text(f"{type(error).__name__}: {error}")


def lose(out, patterns):
    for pattern in ("history.json", "aligner.safetensors", "model", *patterns):
        (found,) = out.glob(pattern)
        shutil.rmtree(found) if found.is_dir() else found.unlink()


def main(settings):
    arguments = {"logging_steps": 1} | go_without_gpus(settings["engine"])
    train.Collator = Poisoned
    for run in settings["runs"]:
        if "kill_after" in run or "die_at" in run:
            train_until_killed(run, settings, arguments)
        if "signal_after" in run:
            train_until_stopped(run, settings, arguments)
        attempt(run, settings, arguments)
        if "lose" in run:
            with PartialState().main_process_first():
                if PartialState().is_main_process:
                    lose(Path(run["out"]), run["lose"])
            attempt(run, settings, arguments)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by the end of the interpreter: threads of gloo that still run then abort the process, now and then.
    os._exit(0)
