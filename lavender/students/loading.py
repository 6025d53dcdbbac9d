"""Loading a student by its name: whole and sound, or not at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.utils import find_adapter_config_file

from ..config import Dtype
from ..errors import ModelError
from ..pretrained.names import loading, locate_model
from ..pretrained.weights import require_complete, require_finite


def load_student(model: str | Path, dtype: Dtype = "float32") -> tuple[PreTrainedModel, Any]:
    """Loads an image-text-to-text model and its processor, and makes sure that every weight came from the checkpoint and is finite.

    The look at the weights is one pass over them, some 0.07 s per GB on one CPU core. Weights of the checkpoint that the model has
    no place for are named in a warning; an aligner's, in checkpoints of patched models, are left out without one.

    Args:
        model: a folder that transformers saved, or a hub id, maybe as `NAME@REVISION`.
        dtype: of the weights.

    Raises:
        ModelError: there is no such model, it is an adapter, or it needs code of its own; weights are missing, have another shape
            than the config says, or hold NaN or infinity.
    """
    with loading("an image-text-to-text model", model, "give a folder that transformers saved, or a hub id"):
        name, revision = locate_model(model, "config.json", "adapter_config.json")
        # transformers would load the base model, put the adapter into it, and report on the adapter's weights alone.
        adapter = find_adapter_config_file(name, revision=revision)
        if adapter is not None:
            base = json.loads(Path(adapter).read_text()).get("base_model_name_or_path")
            raise ModelError(f"{str(model)!r} is an adapter of {base!r}; give that as the model, and {str(model)!r} as the adapter")
        processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
        with _without_report():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                name,
                revision=revision,
                trust_remote_code=False,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported, with the others, instead of raised without their names
            )
    student, report = loaded
    require_complete(student, report, f"the student {str(model)!r}")
    require_finite(student, f"the student {str(model)!r} in {dtype}")
    return student, processor


@contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of keys, of which `require_complete` says what matters."""
    library = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    library.addFilter(is_other)
    try:
        yield
    finally:
        library.removeFilter(is_other)
