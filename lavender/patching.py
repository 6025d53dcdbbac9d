"""`patch`: the one verb. It hands a model to the side of the method that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

from torch import nn

from .config import AlignmentConfig
from .errors import ConfigError, ModelError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .students.patch import StudentPatch
    from .teachers.patch import TeacherPatch
    from .teachers.presets import Preset


@overload
def patch(model: nn.Module, config: AlignmentConfig | None = None, *, processor: Any = None) -> StudentPatch: ...
@overload
def patch(
    model: DiffusionPipeline,
    *,
    layers: str | Sequence[str] = (),
    heads: bool = False,
    steps: bool = False,
    words: str | Sequence[str] = (),
    tokens: str | int | Sequence[str | int] = (),
    preset: Preset | None = None,
) -> TeacherPatch: ...
def patch(
    model: Any,
    config: AlignmentConfig | None = None,
    *,
    processor: Any = None,
    layers: str | Sequence[str] = (),
    heads: bool = False,
    steps: bool = False,
    words: str | Sequence[str] = (),
    tokens: str | int | Sequence[str | int] = (),
    preset: Preset | None = None,
) -> Any:
    """Makes a model's attention readable, word by word, without changing what the model computes.

    Args:
        model: a transformers image-text-to-text model (maybe wrapped by PEFT), or a diffusers text-to-image pipeline.
        config: with a config, the model is prepared for training: it gains the aligner as `model.lavender`, and batches of a
            `lavender.Collator` that has targets add the alignment loss to `outputs.loss`. PEFT trains and saves the aligner
            if `get_peft_model` comes later, with `modules_to_save=["lavender"]`, or if the `PeftModel` is patched. Without a
            config attention can be captured, and nothing is added.
        processor: transformers models only: the model's processor, which `look` needs.
        layers: pipelines only: the attention modules to read, as fragments of their names; empty for all.
        heads: pipelines only: whether maps are kept per head. Memory grows by the number of heads.
        steps: pipelines only: whether maps are kept per denoising step. Memory grows by the number of steps.
        words: pipelines only: words to map beside those between spaces: parts of a Chinese or Thai run, which has no spaces.
        tokens: pipelines only: tokens to map that are no words: by their string ("<|startoftext|>", "<*>"), or by the number of
            their text column.
        preset: pipelines only: "daam" or "amd" for the maps of these two tools, numbers and all; `maps` is then a `DaamMaps` or
            `AmdMaps` of `lavender.teachers.presets`, which say how they are made. It chooses which heads and steps are kept.

    Returns:
        A handle. A pipeline's `maps` has the heat maps of the words of the prompt that was drawn last; a language model's, those
        of the latest answer of `look`. `capture(...)` reads raw maps, `unpatch()` undoes everything, and so does the end of a
        `with`. Patching a patched model again returns the handle that it has, and a `with` around that leaves the first patch in
        place; with other settings, the first patch is undone and the model patched anew, unless an aligner would be lost. Threads
        may share a pipeline: see `TeacherPatch`.

    Raises:
        ModelError: the model is of no kind, family or attention implementation that lavender can read, or trains with another
            config.
        ConfigError: a setting is of another type, or belongs to the other kind of model; the config's layers or heads are still to
            be chosen (`best:K`, see `lavender.choose_heads`), or those of questions and answers do not go together.
        CaptureError: another thread is inside a `with` of the pipeline's patch that has other settings.
    """
    if config is not None and not isinstance(config, AlignmentConfig):
        raise ConfigError(f"config is a {type(config).__name__}; expected an AlignmentConfig (processor= takes the processor)")
    if isinstance(model, nn.Module):
        if layers or heads or steps or words or tokens or preset:
            raise ConfigError(
                "layers, heads, steps, words, tokens and preset are settings of pipelines; AlignmentConfig(layers=...) is the "
                "models'"
            )
        from .students.patch import patch_student

        if any(kind.__module__.startswith("diffusers.") for kind in type(model).__mro__):
            raise ModelError(f"a {type(model).__name__} is a part of a pipeline, which knows the prompt: patch the pipeline")
        return patch_student(model, config, processor)
    if config is not None or processor is not None:
        raise ConfigError(
            "config and processor are settings of transformers models; a pipeline has layers, heads, steps, words and tokens"
        )
    from .teachers.patch import patch_teacher

    return patch_teacher(model, layers, heads, steps, words, tokens, preset)
