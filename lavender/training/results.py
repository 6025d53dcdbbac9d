"""What a run leaves: adapter or model, the aligner, and the history, which is written last and says that the run is finished."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save, save_file

from ..files import replace_folder, write_within
from ..students.patch import ALIGNER_FILE
from .checkpoints import ASIDE
from .trainer import StudentTrainer


def write_results(out: Path, trainer: StudentTrainer, processor: Any, frozen: bool) -> None:
    """Every process calls it: a sharded model is gathered by all. A frozen student is not written.

    Raises `DataError`, in all processes, where the disk is full.
    """
    folder = out / ("adapter" if hasattr(trainer.model, "peft_config") else "model")
    made = out / ASIDE / folder.name
    if trainer.is_world_process_zero():
        shutil.rmtree(made.parent, ignore_errors=True)  # left by a kill
    if trainer.is_fsdp_enabled:  # checkpoints may be sharded; a model that is saved is whole
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    with trainer.all_writing(out, exchanging=trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        trainer.save_model(str(made))
    with trainer.all_writing(out):
        if trainer.is_world_process_zero():
            _move_aligner(made, out)
            (made / "training_args.bin").unlink(missing_ok=True)
            if folder.name == "model":
                processor.save_pretrained(made)
            if not frozen:
                replace_folder(made, folder)
            shutil.rmtree(made.parent)
            history = [entry for entry in trainer.state.log_history if "loss" in entry]
            write_within(out, "history.json", json.dumps(history, indent=2) + "\n")


def _move_aligner(folder: Path, out: Path) -> None:
    """Moves the aligner out of what the Trainer saved, which is what plain PEFT or transformers expect then."""
    beside = folder / ALIGNER_FILE
    if beside.exists():  # of a model
        write_within(out, ALIGNER_FILE, beside.read_bytes())
        beside.unlink()
    for path in folder.glob("adapter_model.safetensors"):
        weights = load_file(path)
        aligner = {name.split("lavender.", 1)[1]: value for name, value in weights.items() if "lavender." in name}
        if aligner:
            write_within(out, ALIGNER_FILE, save(aligner))
            save_file({name: value for name, value in weights.items() if "lavender." not in name}, path, metadata={"format": "pt"})
    config = folder / "adapter_config.json"
    if config.exists():
        config.write_text(json.dumps(_without_aligner(json.loads(config.read_text())), indent=2))


def _without_aligner(config: dict[str, Any]) -> dict[str, Any]:
    kept = [module for module in config.get("modules_to_save") or () if module != "lavender"]
    return config | {"modules_to_save": kept or None}
