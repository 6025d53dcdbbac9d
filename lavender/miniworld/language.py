"""The language stage of a small student: questions about pictures, plain or aligned, behind a frozen vision tower.

A plain loop around `lavender.patch`: AdamW, a rate that rises, stays and falls in the last part, learning curves on the way. A run
that was killed continues from its folder and ends with the same weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlavaConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..config import AlignmentConfig, to_dict
from ..data.regions import Region
from ..data.samples import Conversation, Message
from ..errors import TargetError, first_line
from ..files import read_file, replacing, write_within
from ..patching import patch
from ..students.loading import load_student
from ..students.patch import StudentPatch
from ..types import WordBatch
from . import STUDENT
from .packing import PackedPictures
from .scenes import Question, Scene

STATE = "state.pt"
BEFORE_FALL = "before_fall.pt"
"""The state of the step from which the rate falls."""
HISTORY = "history.json"
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
    """How the language stage is trained."""

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

    @property
    def fall_from(self) -> int:
        """The step from which the rate falls. Up to there, runs of other lengths are the same."""
        return round(self.steps * (1 - self.falling))

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        falls = (self.steps - step) / max(1, self.steps - self.fall_from)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps, falls)


@dataclass(eq=False)
class QuestionSet:
    """Questions about scenes, ready to be learned or asked.

    Attributes:
        packed: the pictures and their turns.
        features: float32 [pictures, places, D], what the frozen vision tower makes of each picture.
        kinds: per picture the type of each turn's question.
    """

    packed: PackedPictures
    features: torch.Tensor
    kinds: list[list[str]]

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
        start: the folder of a run that differs in its number of steps alone, and is beyond the step from which this one's rate
            falls, or of which this is the continuation: begins with its state from before the fall.
        on_step: called after every step with its number.

    Raises `TargetError` if the folder holds a run with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"stage": asdict(stage), "alignment": None if alignment is None else to_dict(alignment)}
    kept = folder / "settings.json"
    if kept.exists() and json.loads(read_file(kept)) != json.loads(json.dumps(settings)):
        raise TargetError(f"{folder} holds a training with other settings; choose another folder")
    write_within(folder, kept.name, json.dumps(settings, indent=2) + "\n")
    handle = None if alignment is None else patch(model, alignment)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=stage.learning_rate, weight_decay=0.01, betas=(0.9, 0.99))
    step, cpu_s = 0, 0.0
    history: list[dict[str, Any]] = []
    sums: dict[str, float] = {}
    source = folder / STATE
    if not source.exists() and start is not None:
        source = start / BEFORE_FALL
    if source.exists():
        state = _load(source)
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
    if handle is not None:
        handle.unpatch()
    write_within(folder, HISTORY, json.dumps(history, indent=1) + "\n")
    return history


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
    """
    right: dict[str, list[bool]] = {}
    for pictures in _split(count or len(data.packed)):
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
    """How often a word's attention, the mean over layers and heads, is highest in its object: `{"question", "answer"}`.

    The targets of `data` are the objects' exact masks, as shares of the places. The rows are the patch's.
    """
    hits: dict[int, list[bool]] = {0: [], 1: []}
    for pictures in _split(count or len(data.packed)):
        turns = [list(range(len(data.kinds[picture]))) for picture in pictures]
        batch = data.batch(handle.model, pictures, turns, with_words=True)
        maps = handle.capture(**batch).mean(dim=(1, 2)).flatten(2)
        roles, present, targets = (batch[WordBatch.KEYS[name]] for name in ("roles", "present", "targets"))
        inside = targets.flatten(2).gather(2, maps.argmax(dim=2, keepdim=True)).squeeze(2) >= COVERED
        for role, found in zip(roles[present].tolist(), inside[present].tolist(), strict=True):
            hits[min(role, 1)].append(found)
    return {name: float(np.mean(hits[role])) for role, name in enumerate(("question", "answer")) if hits[role]}


def _split(count: int) -> list[list[int]]:
    return [list(range(first, min(first + _EVALUATED, count))) for first in range(0, count, _EVALUATED)]
