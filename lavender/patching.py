"""`patch`: the one verb. It looks at what it is given and hands over to the library's hooks; it knows no model family."""

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
) -> Any:
    """Makes a model's attention readable, word by word, without changing what the model computes.

    Args:
        model: a transformers image-text-to-text model (maybe wrapped by PEFT), or a diffusers text-to-image pipeline.
        config: with a config, the model is prepared for training: it gains the aligner as `model.lavender`, and batches of a
            `lavender.Collator` that has targets add the alignment loss to `outputs.loss`. Patch before `get_peft_model`, which
            must be told to train and save the aligner: `modules_to_save=["lavender"]`. Without a config attention can be
            captured, and nothing is added.
        processor: transformers models only: the model's processor, with which `look` shows it pictures.
        layers: pipelines only: the attention modules to read, as fragments of their names; empty for all.
        heads: pipelines only: whether heads are kept apart. It takes memory times their number.
        steps: pipelines only: whether denoising steps are kept apart. It takes memory times their number.
        words: pipelines only: words to look for beside those that stand apart in a prompt: parts of a Chinese or Thai run, which
            has no spaces.

    Returns:
        A handle. Of a pipeline, `maps` has the heat maps of the words of whatever was drawn last; of a language model, those of
        the answer that it gave when it was asked to `look`. `capture(...)` reads raw maps, `unpatch()` undoes everything, `with`
        does so at the end. Patching a patched model again returns the handle that it has, and a `with` around that leaves the
        first patch in place; with other settings, the first patch is undone and the model patched anew, unless an
        aligner would be lost.

    Raises:
        ModelError: the model is of no kind, family or attention implementation that lavender can read, or trains with another
            config.
        ConfigError: a setting belongs to the other kind of model.
    """
    if config is not None and not isinstance(config, AlignmentConfig):
        raise ConfigError(f"config is a {type(config).__name__}; expected an AlignmentConfig (processor= takes the processor)")
    layers, words = _as_tuple(layers), _as_tuple(words)
    if isinstance(model, nn.Module):
        if layers or heads or steps or words:
            raise ConfigError(
                "layers, heads, steps and words are settings of pipelines; AlignmentConfig(layers=...) is the models'"
            )
        return _patch_student(model, config, processor)
    if config is not None or processor is not None:
        raise ConfigError("config and processor are settings of transformers models; a pipeline has layers, heads, steps and words")
    from .teachers.patch import TeacherPatch

    present = getattr(model, "_lavender_patch", None)
    if present is not None and present.pipe is not model:  # a copy of a patched pipeline
        model.__class__, present = present._class, None
    if present is not None:
        if present.settings == (layers, heads, steps, words):
            return present.borrowed()
        present.unpatch()
    return TeacherPatch(model, layers, heads, steps, words)


def _patch_student(model: nn.Module, config: AlignmentConfig | None, processor: Any) -> StudentPatch:
    from .students.discovery import base_model_of
    from .students.patch import StudentPatch

    base = base_model_of(model)
    present = getattr(base, "_lavender_patch", None)
    if present is not None:
        if config is None or (present.trains and config == present.config):
            present.processor = processor or present.processor
            return present.borrowed()
        if present.trains:
            raise ModelError(
                "the model is patched for training with another AlignmentConfig; its aligner would be lost. Call unpatch() on the "
                "first patch if that is meant"
            )
        present.unpatch()
    if getattr(getattr(base, "config", None), "model_type", None) is None:
        raise ModelError(f"cannot patch a {type(base).__name__}; expected a transformers image-text-to-text model")
    return StudentPatch(base, config or AlignmentConfig(), train=config is not None, processor=processor)


def _as_tuple(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
