"""The language stage of a small student: questions about pictures, plain or aligned, behind a frozen vision tower.

A plain loop around `lavender.patch`: AdamW, a rate that rises, stays and falls in the last part, learning curves on the way. A run
that was killed continues from its folder and ends with the same weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlavaConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..config import AlignmentConfig, check_fields, to_dict
from ..data.regions import Region
from ..data.samples import Conversation, Message
from ..errors import ConfigError, DataError, ModelError, TargetError, first_line
from ..files import read_json, replacing, write_within
from ..patching import patch
from ..students.discovery import attention_modules
from ..students.lambda_schedule import needs_progress
from ..students.loading import load_student
from ..students.patch import StudentPatch
from ..types import WordBatch
from . import STUDENT
from .packing import PackedPictures, digest_of
from .scenes import Question, Scene

STATE = "state.pt"
BEFORE_FALL = "before_fall.pt"
"""The state of the step from which the rate falls."""
HISTORY = "history.json"
SETTINGS = "settings.json"
CAPTION = "caption"
"""The kind of a turn that describes the picture, in place of a question's type."""
SAVE_EVERY = 200
"""Steps between two states."""
COVERED = 0.2
"""A place of a map is in an object that covers at least this share of it."""
_EVALUATED = 25
"""Pictures per forward that is measured."""


@dataclass(frozen=True)
class LanguageStage:
    """How the language stage is trained.

    Raises `ConfigError` when a value is out of range.
    """

    steps: int = 800
    """Optimizer steps."""
    pictures: int = 8
    """Pictures per step."""
    questions: int = 6
    """Questions of each picture per step."""
    learning_rate: float = 3e-3
    """AdamW's peak."""
    warmup_steps: int = 20
    """Steps over which the rate rises."""
    falling: float = 0.2
    """Share of the steps, the last ones, in which the rate falls to zero."""
    seed: int = 0
    """Of the order of pictures and questions."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, least in (("steps", 1), ("pictures", 1), ("questions", 1), ("warmup_steps", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}; it must be a positive number")
        if not 0 <= self.falling <= 1:
            raise ConfigError(f"falling is {self.falling}; it must be in [0, 1], a share of the steps")

    @property
    def fall_from(self) -> int:
        """The step from which the rate falls. Up to there, runs of other lengths are the same."""
        return round(self.steps * (1 - self.falling))

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        falls = (self.steps - step) / max(1, self.steps - self.fall_from)
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup_steps), falls)


@dataclass(eq=False)
class QuestionSet:
    """Questions about scenes, ready to be learned or asked.

    Attributes:
        packed: the pictures and their turns.
        features: float32 [pictures, places, D], what the frozen vision tower makes of each picture.
        kinds: per picture the type of each turn's question.

    Raises `DataError` unless they are of as many pictures and turns.
    """

    packed: PackedPictures
    features: torch.Tensor
    kinds: list[list[str]]

    def __post_init__(self) -> None:
        turns, kinds = [len(each) for each in self.packed.turns], [len(each) for each in self.kinds]
        if turns != kinds or len(self.features) != len(turns):
            raise DataError(
                f"there are {len(turns)} pictures of {sum(turns)} turns, the features of {len(self.features)} and kinds for "
                f"{len(kinds)} of {sum(kinds)} turns; expected the same of each"
            )

    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with the pictures, the questions and what is compared."""
        return digest_of({"packed": self.packed.digest(), "kinds": json.dumps(self.kinds)})

    def batch(self, model: Any, pictures: Sequence[int], turns: Sequence[Sequence[int]], *, with_words: bool) -> dict[str, Any]:
        """Inputs of a student for some turns of some pictures; the projector is the model's own."""
        image = BaseModelOutputWithPooling(pooler_output=list(model.model.multi_modal_projector(self.features[list(pictures)])))  # type: ignore[arg-type]
        return {**self.packed.batch(pictures, turns, with_words=with_words), "mm_encoder_outputs": {"image": image}}


def conversation_of(name: str, scene: Scene, questions: Sequence[Question], *, referents: bool = False) -> Conversation:
    """A scene's questions and answers as one conversation about its picture.

    With `referents`, an answer that names nothing and is about one object ("yes", "top left") lies where the caption's word for its
    shape does.
    """
    messages: list[Message] = []
    regions: list[Region] = []
    for n, question in enumerate(questions):
        messages += [Message("user", "<image>" * (n == 0) + question.text), Message("assistant", question.answer)]
        if referents and question.type in ("existence", "place") and question.object_index is not None:
            regions.append(Region(2 * n + 1, word=scene.objects[question.object_index].shape))
    # Targets are found by the picture.
    return Conversation(name, (scene.image,), tuple(messages), has_id=False, regions=tuple(regions))


@torch.no_grad()
def features_of(model: Any, processor: Any, scenes: Sequence[Scene]) -> torch.Tensor:
    """What the student's vision tower makes of scenes, [scenes, places, D]."""
    parts = []
    for first in range(0, len(scenes), 100):
        images = [scene.image for scene in scenes[first : first + 100]]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        parts.append(
            model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer][:, 1:]
        )
    return torch.cat(parts)


def small_student(seed: int, width: int = 64, layers: int = 3) -> tuple[Any, Any]:
    """A student whose language stage has random weights of `seed`, behind the embedded student's trained vision tower."""
    trained, processor = load_student(STUDENT)
    known = trained.config
    text = known.text_config
    torch.manual_seed(seed)
    model = type(trained)(
        LlavaConfig(
            vision_config=known.vision_config,
            text_config=LlamaConfig(
                vocab_size=text.vocab_size,
                hidden_size=width,
                intermediate_size=width * 5 // 2,
                num_hidden_layers=layers,
                num_attention_heads=text.num_attention_heads,
                num_key_value_heads=text.num_key_value_heads,
                max_position_embeddings=text.max_position_embeddings,
                bos_token_id=text.bos_token_id,
                eos_token_id=text.eos_token_id,
                pad_token_id=text.pad_token_id,
            ),
            image_token_index=known.image_token_index,
            vision_feature_layer=known.vision_feature_layer,
            vision_feature_select_strategy=known.vision_feature_select_strategy,
            image_seq_length=known.image_seq_length,
            tie_word_embeddings=True,
        )
    )
    model.model.vision_tower.load_state_dict(trained.model.vision_tower.state_dict())
    return model, processor


def train_language(
    model: Any,
    data: QuestionSet,
    stage: LanguageStage,
    folder: Path,
    *,
    alignment: AlignmentConfig | None = None,
    measure: Callable[[Any], dict[str, Any]] | None = None,
    measure_every: int = 100,
    start: Path | None = None,
    on_step: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Trains a student's projector and language model in place; returns its history, which `folder/history.json` keeps.

    Args:
        model: the student; its vision tower stays as it is.
        data: the training's questions, with the targets if it is aligned.
        stage: steps, rates, order.
        folder: where the training leaves its state, every 200 steps and before the rate falls.
        alignment: what is compared; None trains plainly.
        measure: looked at every `measure_every` steps and at the end; its result stands in the history.
        start: the folder of a run that differs in its number of steps alone, of which it has fewer: begins with its state from
            before its rate falls. The result is that of a run from the first step on.
        on_step: called after every step with its number.

    The model is unpatched at the end, and after an error.

    Raises:
        TargetError: the folder, or `start`, holds a run with other settings, questions, targets or first weights, or a damaged
            one; `start` is none, or has gone beyond the step from which this one's rate falls; or no word has a target to be
            aligned with.
        ConfigError: `start` was given, and a lambda that follows the share of the steps that are done: it is another one in a run
            of another length.
    """
    if measure_every < 1:
        raise ConfigError(f"measure_every is {measure_every}; it must be at least 1")
    settings: dict[str, Any] = {
        "stage": asdict(stage),
        "measure_every": measure_every,
        "alignment": None if alignment is None else to_dict(alignment),
        "data": data.digest(),
        "first weights": digest_of(model.state_dict()),
        "start": None,
    }
    if start is not None:
        settings["start"] = _require_start(start, settings, alignment)
    kept = _settings_of(folder)
    if kept is not None and (others := differing_settings(kept, settings)):
        raise TargetError(f"{folder} holds a training with other settings ({others}); choose another folder")
    if alignment is not None and not data.packed.has_targets:
        raise TargetError(
            "an alignment was given, and no word of the questions has a target; give their Collator a target store of their "
            "pictures, or leave the alignment out"
        )
    source = folder / STATE
    if not source.exists() and start is not None:
        source = start / BEFORE_FALL
    state = _load(source) if source.exists() else None
    if state is not None and source.parent == start and state["step"] > stage.fall_from:
        raise TargetError(
            f"{source} is of step {state['step']}, and the rate of this training falls from step {stage.fall_from}; give a start "
            "of fewer steps"
        )
    with ExitStack() as stack:
        handle = None if alignment is None else stack.enter_context(patch(model, alignment))
        folder.mkdir(parents=True, exist_ok=True)
        write_within(folder, SETTINGS, json.dumps(settings, indent=2) + "\n")
        return _train(model, handle, data, stage, folder, state, measure, measure_every, on_step)


def _train(
    model: Any,
    handle: StudentPatch | None,
    data: QuestionSet,
    stage: LanguageStage,
    folder: Path,
    state: dict[str, Any] | None,
    measure: Callable[[Any], dict[str, Any]] | None,
    measure_every: int,
    on_step: Callable[[int], None] | None,
) -> list[dict[str, Any]]:
    """The training of `train_language` from a state on."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=stage.learning_rate, weight_decay=0.01, betas=(0.9, 0.99))
    step, cpu_s = 0, 0.0
    history: list[dict[str, Any]] = []
    sums: dict[str, float] = {}
    if state is not None:
        with torch.no_grad():
            for name, value in state["weights"].items():
                trained[name].copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        step, cpu_s, (history, sums) = state["step"], state["cpu_s"], json.loads(state["history"])
    model.train()
    while step < stage.steps:
        began = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(step)
        pictures, turns = _drawn(data, stage, step)
        batch = data.batch(model, pictures, turns, with_words=handle is not None)
        if handle is not None:
            handle.progress = step / stage.steps
        loss = model(**batch, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        step += 1
        cpu_s += time.process_time() - began
        sums["loss"] = sums.get("loss", 0.0) + float(loss.detach())
        if handle is not None and handle.last is not None:
            sums["alignment_loss"] = sums.get("alignment_loss", 0.0) + float(handle.last.loss)
        if step % measure_every == 0 or step == stage.steps:
            count = (step - 1) % measure_every + 1
            entry: dict[str, Any] = {"step": step, "cpu_s": round(cpu_s, 2)}
            entry |= {name: round(value / count, 5) for name, value in sums.items()}
            sums = {}
            if measure is not None:
                model.eval()
                entry |= measure(model)
                model.train()
            history.append(entry)
        if step % SAVE_EVERY == 0 or step in (stage.fall_from, stage.steps):
            state = {
                "weights": {name: p.detach() for name, p in trained.items()},
                "optimizer": optimizer.state_dict(),
                "step": step,
                "cpu_s": cpu_s,
                "history": json.dumps([history, sums]),
            }
            for name in (STATE, BEFORE_FALL) if step == stage.fall_from else (STATE,):
                _save(state, folder / name)
        if on_step is not None:
            on_step(step)
    model.eval()
    write_within(folder, HISTORY, json.dumps(history, indent=1) + "\n")
    return history


def _require_start(start: Path, settings: dict[str, Any], alignment: AlignmentConfig | None) -> int:
    """The steps of a run whose first ones are those of a run of other settings. Raises as `train_language`."""
    if alignment is not None and needs_progress(alignment):
        raise ConfigError(
            f"start was given, and schedule={alignment.schedule!r} and until={alignment.until}: lambda falls with the share of the "
            "steps that are done, which is another one in a run of another length; leave start out"
        )
    theirs = _settings_of(start)
    if theirs is None or not (start / BEFORE_FALL).exists():
        raise TargetError(
            f"there is no training in {start} that has come to the fall of its rate; give the folder of one, or no start"
        )
    steps: int = theirs["stage"]["steps"]
    same = settings | {"stage": settings["stage"] | {"steps": steps}, "start": theirs.get("start")}
    if others := differing_settings(theirs, same):
        raise TargetError(f"{start} holds a training with other settings ({others}); a start differs in its steps alone")
    return steps


def _settings_of(folder: Path) -> dict[str, Any] | None:
    """The settings that a folder's training has; None if there is no training. Raises `TargetError` if they are damaged."""
    path = folder / SETTINGS
    if not path.exists() and not (folder / STATE).exists():
        return None
    try:
        known = read_json(path)
        known["stage"]["steps"] + 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{path} is damaged ({first_line(error)}); choose another folder") from None
    return dict(known)


def differing_settings(known: dict[str, Any], given: dict[str, Any]) -> str:
    """What differs between nested settings, by whole names: `stage.steps=10, now 20`; empty where nothing does."""
    one, other = dict(_flat(known)), dict(_flat(json.loads(json.dumps(given))))
    names = [name for name in other | one if one.get(name) != other.get(name)]
    return ", ".join(f"{name}={one.get(name)!r}, now {other.get(name)!r}" for name in names)


def _flat(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{name}.{key}".lstrip("."))
    else:
        yield name, values


def _save(state: dict[str, Any], path: Path) -> None:
    with replacing(path) as file:
        torch.save(state, file)


def _load(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise TargetError(f"{path} is damaged ({first_line(error)}); remove it, and the training begins again") from None
    return state


def _drawn(data: QuestionSet, stage: LanguageStage, step: int) -> tuple[list[int], list[list[int]]]:
    """The pictures of a step, and the turns of each: every picture once before one comes again. Captions are always there."""
    count = len(data.packed)
    pictures = []
    for place in range(step * stage.pictures, (step + 1) * stage.pictures):
        order = np.random.default_rng([stage.seed, 1, place // count]).permutation(count)
        pictures.append(int(order[place % count]))
    rng = np.random.default_rng([stage.seed, 2, step])
    turns = []
    for picture in pictures:
        kinds = data.kinds[picture]
        questions = [n for n, kind in enumerate(kinds) if kind != CAPTION]
        drawn = rng.permutation(len(questions))[: stage.questions].tolist()
        turns.append([*(questions[n] for n in drawn), *(n for n, kind in enumerate(kinds) if kind == CAPTION)])
    return pictures, turns


@torch.no_grad()
def right_answers(model: Any, data: QuestionSet, count: int | None = None) -> dict[str, list[bool]]:
    """Which answers to the questions about the first `count` pictures are right, by type of question, picture by picture.

    An answer is right if each of its tokens, and the end, is the likeliest one behind those before it: what greedy decoding says.
    Raises `ConfigError` if there are fewer pictures.
    """
    right: dict[str, list[bool]] = {}
    for pictures in _split(data, count):
        turns = [list(range(len(data.kinds[picture]))) for picture in pictures]
        batch = data.batch(model, pictures, turns, with_words=False)
        labels = batch.pop("labels")[:, 1:]
        guesses = model(**batch, use_cache=False).logits[:, :-1].argmax(dim=-1)
        wrong = ((guesses != labels) & (labels != -100)).cumsum(dim=1)
        first = len(data.packed.prefix)
        for b, picture in enumerate(pictures):
            at = first
            for kind, turn in zip(data.kinds[picture], data.packed.turns[picture], strict=True):
                end = at + len(turn.ids)
                # The guess before a token stands one place before it.
                right.setdefault(kind, []).append(bool(wrong[b, end - 2] == wrong[b, at - 1]))
                at = end
    return right


@torch.no_grad()
def pointing(handle: StudentPatch, data: QuestionSet, count: int | None = None) -> dict[str, float]:
    """How often a word's attention, the mean over all layers and heads, is highest in its object: `{"question", "answer"}`.

    The targets of `data` are the objects' exact masks, as shares of the places. The rows are the patch's. The first
    `count` pictures are looked at.

    Raises:
        ModelError: the patch reads some of the layers alone.
        ConfigError: there are fewer pictures, or the questions have no targets.
    """
    require_all_layers(handle)
    if not data.packed.has_targets:
        raise ConfigError("the questions have no targets to point at; give their Collator a target store of exact masks")
    hits: dict[int, list[bool]] = {0: [], 1: []}
    for pictures in _split(data, count):
        turns = [list(range(len(data.kinds[picture]))) for picture in pictures]
        batch = data.batch(handle.model, pictures, turns, with_words=True)
        maps = handle.capture(**batch).mean(dim=(1, 2)).flatten(2)
        roles, present, targets = (batch[WordBatch.KEYS[name]] for name in ("roles", "present", "targets"))
        inside = targets.flatten(2).gather(2, maps.argmax(dim=2, keepdim=True)).squeeze(2) >= COVERED
        for role, found in zip(roles[present].tolist(), inside[present].tolist(), strict=True):
            hits[min(role, 1)].append(found)
    return {name: float(np.mean(hits[role])) for role, name in enumerate(("question", "answer")) if hits[role]}


def require_all_layers(handle: StudentPatch) -> None:
    """Raises `ModelError` if a patch reads some of its model's layers alone: a mean over these is another measure."""
    num_layers = len(attention_modules(handle.decoder))
    if handle.num_layers < num_layers:
        raise ModelError(
            f"the patch reads {handle.num_layers} of the model's {num_layers} layers, and attention is measured over all; unpatch "
            "it, and measure by lavender.patch(model), without a config or with one of all layers"
        )


def _split(data: QuestionSet, count: int | None) -> list[list[int]]:
    """The numbers of the first `count` pictures, or of all, in parts."""
    number = len(data.packed) if count is None else count
    if not 1 <= number <= len(data.packed):
        raise ConfigError(f"count is {number}; there are {len(data.packed)} pictures")
    return [list(range(first, min(first + _EVALUATED, number))) for first in range(0, number, _EVALUATED)]
