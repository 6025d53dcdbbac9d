"""`patch`: the one verb. It looks at what it is given and hands over to the library's hooks; it knows no model family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

from torch import nn

from .config import AlignmentConfig
from .errors import ModelError
from .families import student_family, teacher_family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .hooks.diffusers import TeacherPatch
    from .hooks.transformers import StudentPatch


@overload
def patch(model: nn.Module, config: AlignmentConfig | None = None) -> StudentPatch: ...
@overload
def patch(model: DiffusionPipeline, *, layers: tuple[str, ...] = ()) -> TeacherPatch: ...
def patch(model: Any, config: AlignmentConfig | None = None, *, layers: tuple[str, ...] = ()) -> Any:
    """Makes a model's attention readable, word by word, without changing what the model computes.

    Args:
        model: a transformers image-text-to-text model (maybe wrapped by PEFT), or a diffusers text-to-image pipeline.
        config: with a config, the model is prepared for training: it gains the aligner as `model.lavender`, and batches of a
            `lavender.Collator` that has targets add the alignment loss to `outputs.loss`. Patch before `get_peft_model`, which
            must be told to train and save the aligner: `modules_to_save=["lavender"]`. Without a config attention can be
            captured, and nothing is added.
        layers: pipelines only: the cross-attention modules to read, as fragments of their names; empty for all.

    Returns:
        A handle: `.capture(...)` reads maps, `.unpatch()` undoes everything, `with` does so at the end. Patching a patched
        transformers model again returns the handle that it has, and a `with` around that leaves the first patch in place; with
        another config, the model is patched anew.

    Raises:
        ModelError: the model is of no kind, family or attention implementation that lavender can read.
    """
    if isinstance(model, nn.Module):
        return _patch_student(model, config)
    denoiser = getattr(model, "unet", None) or getattr(model, "transformer", None)
    if denoiser is None:
        raise ModelError(
            f"cannot patch a {type(model).__name__}; expected a transformers image-text-to-text model or a diffusers pipeline"
        )
    from .hooks.diffusers import TeacherPatch

    return TeacherPatch(denoiser, teacher_family(denoiser), layers)


def _patch_student(model: nn.Module, config: AlignmentConfig | None) -> StudentPatch:
    from .hooks.transformers import StudentPatch, base_model_of

    base = base_model_of(model)
    present = getattr(base, "_lavender_patch", None)
    if present is not None:
        if config is None or (present.trains and config == present.config):
            return present.borrowed()
        present.unpatch()
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    if model_type is None:
        raise ModelError(f"cannot patch a {type(base).__name__}; expected a transformers image-text-to-text model")
    student_family(model_type)  # refuses a model whose image tokens nobody could place, before anything is attached
    return StudentPatch(base, config or AlignmentConfig(), train=config is not None)
