"""The demo's experiment: a small student whose language stage starts from random weights learns to answer questions about pictures,
once plainly and once with the teacher's maps.

Both students start from the same weights and see the same questions in the same order. They are measured on pictures that nothing
has seen: of the training's world, and in clutter, with more objects than the training has.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..batches.collator import Collator
from ..config import AlignmentConfig, TeacherConfig, WordsConfig
from ..errors import DataError, first_line
from ..evaluation.answers import generate
from ..evaluation.localization import compare, localization, measured_words
from ..files import read_json, write_within
from ..patching import patch
from ..students.channels import is_chosen
from ..students.heads import choose_heads
from ..students.patch import StudentPatch
from ..targets.store import TargetStore
from ..types import WordBatch
from . import HELD_OUT_SEED, TRAINING_SEED
from .language import (
    HISTORY,
    LanguageStage,
    QuestionSet,
    conversation_of,
    features_of,
    right_answers,
    small_student,
    train_language,
)
from .measures import compare_answers
from .packing import PackedPictures
from .scenes import STUDY_TYPES, Question, Scene, World, ask_all, make_scenes

ARMS = ("plain", "aligned")
WORLDS: dict[str, World] = {
    "in distribution": World(pairs="common"),
    "clutter": World(counts=(4, 5), shares=(0.5, 0.5), radii=(("small", (6.5, 8.5)),), pairs="common"),
}
"""The fresh pictures' worlds; the first is also the training's."""
MAIN_WORLD = "in distribution"
UNASKED = {"clutter": ("count",)}
"""Types of questions that are not counted in a world: no picture of the training has as many objects."""
TARGETS = "data/targets"
MEASURED = "measured.json"
NUM_EXAMPLES = 3
"""Pictures that are drawn: the first of the fresh ones with three objects."""
_LOOKED_AT = 25
"""Pictures per forward whose maps are read."""
_SCORED = 100
"""Training pictures that layers and heads are chosen by."""

Asked = Sequence[Sequence[Question]]
"""Questions, per picture."""


@dataclass(frozen=True)
class DemoConfig:
    """What `lavender demo` does."""

    num_train: int = 1000
    """Pictures to learn from."""
    num_fresh: int = 200
    """Fresh pictures of each world to measure on."""
    num_curve: int = 40
    """Of these, pictures that the learning curve is measured on."""
    measure_every: int = 100
    """Steps between two measurements of the learning curve."""
    seed: int = 0
    """Chooses the training pictures, their order and the first weights; fresh pictures stay the same."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    words: WordsConfig = field(default_factory=WordsConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    """Its `best:K` are chosen on the training pictures before the training."""
    referents: bool = False
    """Whether answers that name nothing and are about one object are compared too."""
    plain: LanguageStage = field(default_factory=LanguageStage)
    """How the plain student is trained; the order of its questions follows `seed`."""
    aligned: LanguageStage = field(default_factory=LanguageStage)
    """How the aligned student is trained."""

    def stage(self, arm: str) -> LanguageStage:
        """How an arm is trained."""
        return replace(self.plain if arm == "plain" else self.aligned, seed=self.seed)


def demo_config(seed: int = 0) -> DemoConfig:
    """The settings of `lavender demo`, those of the study's main cell but half its steps: of the last layer the rows that read a
    question's words, and the row that predicts the answer; for each student the learning rate that is best for it."""
    return DemoConfig(
        seed=seed,
        teacher=TeacherConfig(inversion="noise", timesteps=(151,), map_size=8),
        words=WordsConfig(roles=("question", "answer")),
        alignment=AlignmentConfig(layers=(2,)),
        plain=LanguageStage(steps=1200, learning_rate=2e-3),
        aligned=LanguageStage(steps=1200, learning_rate=3e-3),
    )


def training_scenes(config: DemoConfig) -> list[Scene]:
    """The pictures of this seed: no two seeds share one."""
    return list(make_scenes(TRAINING_SEED, config.num_train, config.seed * config.num_train, WORLDS[MAIN_WORLD]))


def fresh_scenes(world: str, count: int) -> list[Scene]:
    """Pictures that no training has seen, whatever its seed."""
    return list(make_scenes(HELD_OUT_SEED, count, world=WORLDS[world]))


def ask(scenes: Sequence[Scene]) -> list[tuple[Question, ...]]:
    """The questions about each scene."""
    return [ask_all(scene, 0) for scene in scenes]


def example_numbers(scenes: Sequence[Scene]) -> list[int]:
    """The fresh pictures that are drawn."""
    return [n for n, scene in enumerate(scenes) if len(scene.objects) == 3][:NUM_EXAMPLES]


def example_questions(questions: Sequence[Question]) -> list[int]:
    """The questions about a drawn picture that are drawn: the first of each type."""
    kinds = [question.type for question in questions]
    return [kinds.index(kind) for kind in STUDY_TYPES if kind in kinds]


def question_set(
    model: Any,
    processor: Any,
    scenes: Sequence[Scene],
    words: WordsConfig,
    store: TargetStore | None = None,
    referents: bool = False,
) -> QuestionSet:
    """The questions about scenes, with the targets of a store."""
    asked = ask(scenes)
    collator = Collator(processor, store, words, on_error="raise")
    conversations = (conversation_of(str(n), *each, referents=referents) for n, each in enumerate(zip(scenes, asked, strict=True)))
    packed = PackedPictures(collator, conversations)
    return QuestionSet(packed, features_of(model, processor, scenes), [[q.type for q in questions] for questions in asked])


def training_questions(
    out: Path, config: DemoConfig, model: Any, processor: Any, aligned: bool, count: int | None = None
) -> QuestionSet:
    """The questions about the first `count` training pictures; those of the aligned student have targets."""
    store = TargetStore(out / TARGETS) if aligned else None
    scenes = training_scenes(config)[:count]
    return question_set(model, processor, scenes, config.words, store, aligned and config.referents)


def choose_alignment(out: Path, config: DemoConfig) -> DemoConfig:
    """The same with the layers and heads that `best:K` names: those that localize best in the untrained student."""
    if is_chosen(config.alignment):
        return config
    model, processor = small_student(config.seed)
    data = training_questions(out, config, model, processor, True, _SCORED)
    batches = (data.batch(model, [n], [range(len(kinds))], with_words=True) for n, kinds in enumerate(data.kinds))
    return replace(config, alignment=choose_heads(model, config.alignment, batches).config)


def run_arm(out: Path, arm: str, config: DemoConfig, tell: Callable[[str, float], None]) -> None:
    """Trains and measures one student in the folder `out/arm`: `model/`, `history.json` and `measured.json`. The config is that of
    `choose_alignment`.

    What an earlier call has done stays. `tell` hears of `"step"` with the number of steps that are done, and of `"answers"` with
    the share of right answers on the learning curve.
    """
    folder = out / arm
    if (folder / MEASURED).exists():
        return
    model, processor = small_student(config.seed)
    scenes = {world: fresh_scenes(world, config.num_fresh) for world in WORLDS}
    every_word = WordsConfig(roles=("question", "answer"), exclude=())
    fresh = {world: question_set(model, processor, some, every_word) for world, some in scenes.items()}
    aligned = arm == "aligned"
    data = training_questions(out, config, model, processor, aligned)

    def measure(student: Any) -> dict[str, Any]:
        right = {kind: float(np.mean(hits)) for kind, hits in right_answers(student, fresh[MAIN_WORLD], config.num_curve).items()}
        tell("answers", float(np.mean(list(right.values()))))
        return {"answers": {kind: round(share, 4) for kind, share in right.items()}}

    train_language(
        model,
        data,
        config.stage(arm),
        folder,
        alignment=config.alignment if aligned else None,
        measure=measure,
        measure_every=config.measure_every,
        on_step=partial(tell, "step"),
    )
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    with patch(model, replace(config.alignment, aligner="identity", aggregation="mean")) as handle:
        measured = {
            "answers": {world: hits_by_picture(model, questions) for world, questions in fresh.items()},
            "attention": attention(handle, fresh[MAIN_WORLD], scenes[MAIN_WORLD]),
            "examples": _look_at_examples(handle, processor, fresh[MAIN_WORLD], scenes[MAIN_WORLD]),
        }
    write_within(folder, MEASURED, json.dumps(measured) + "\n")


def hits_by_picture(model: Any, data: QuestionSet) -> list[list[bool]]:
    """Which answers are right, per picture in the order of its questions."""
    right = {kind: iter(hits) for kind, hits in right_answers(model, data).items()}
    return [[next(right[kind]) for kind in kinds] for kinds in data.kinds]


def read_maps(handle: StudentPatch, data: QuestionSet, pictures: Sequence[int], asked: Asked) -> list[list[np.ndarray]]:
    """The maps [W, y, x] of each question about some pictures: those of the question's words, then those of the answer's.

    The words are `Collator.words` of both; `data` compares every word. A map is the mean over the layers and heads that are
    compared.
    """
    result = []
    for first in range(0, len(pictures), _LOOKED_AT):
        some = list(pictures[first : first + _LOOKED_AT])
        batch = data.batch(handle.model, some, [list(range(len(data.kinds[n]))) for n in some], with_words=True)
        maps = handle.align(**batch).detach().numpy()
        for b, questions in enumerate(asked[first : first + _LOOKED_AT]):
            counts = [len(Collator.words(q.text)) + len(Collator.words(q.answer)) for q in questions]
            assert int(batch[WordBatch.KEYS["present"]][b].sum()) == sum(counts)
            result.append(np.split(maps[b, : sum(counts)], np.cumsum(counts)[:-1]))
    return result


def named_words(question: Question) -> list[tuple[int, str, int]]:
    """The words of a question and its answer that stand for an object: the number of the map in `read_maps`, the role, the object.

    Of an answer it is the first word, which is predicted before anything of it is written.
    """
    words = Collator.words(question.text)
    spans = [(word.start, word.end) for word in words]
    named = [(spans.index((r.start, r.end)), "question", r.object_index) for r in question.referents]
    return named if question.object_index is None else [*named, (len(words), "answer", question.object_index)]


def attention(handle: StudentPatch, data: QuestionSet, scenes: Sequence[Scene]) -> dict[str, dict[str, dict[str, float]]]:
    """Where the rows of words look that stand for an object: per role a `compare` with control and chance."""
    asked = ask(scenes)
    maps = read_maps(handle, data, range(len(scenes)), asked)
    return {
        role: compare(
            measured_words(
                scene.masks,
                [
                    (of_question[number], index)
                    for question, of_question in zip(questions, of_picture, strict=True)
                    for number, its_role, index in named_words(question)
                    if its_role == role
                ],
            )
            for scene, questions, of_picture in zip(scenes, asked, maps, strict=True)
        )
        for role in ("question", "answer")
    }


def _look_at_examples(
    handle: StudentPatch, processor: Any, data: QuestionSet, scenes: Sequence[Scene]
) -> list[list[dict[str, Any]]]:
    """What the student says to the drawn questions, and the maps that are drawn: per picture and question `said` and `maps`."""
    numbers = example_numbers(scenes)
    asked = ask([scenes[number] for number in numbers])
    maps = read_maps(handle, data, numbers, asked)
    examples = []
    for number, questions, of_picture in zip(numbers, asked, maps, strict=True):
        drawn = example_questions(questions)
        images = [scenes[number].image] * len(drawn)
        said = generate(handle.model, processor, images, [questions[n].text for n in drawn], max_new_tokens=6)
        examples.append(
            [{"said": text.strip(), "maps": np.round(of_picture[n], 6).tolist()} for n, text in zip(drawn, said, strict=True)]
        )
    return examples


def write_questions(folder: Path, config: DemoConfig) -> None:
    """Writes `questions.jsonl` beside the `captions.jsonl` of `write_dataset`: a conversation about each training picture, with the
    regions of its referents, if there are any."""
    lines = []
    scenes = training_scenes(config)
    for number, (scene, questions) in enumerate(zip(scenes, ask(scenes), strict=True)):
        name = f"images/{number:05d}.png"
        conversation = conversation_of(name, scene, questions, referents=config.referents)
        line: dict[str, Any] = {"id": name, "image": name}
        line["conversations"] = [{"role": m.role, "content": m.content} for m in conversation.messages]
        if conversation.regions:
            line["regions"] = [{"turn": region.turn, "word": region.word} for region in conversation.regions]
        lines.append(json.dumps(line))
    write_within(folder, "questions.jsonl", "\n".join(lines) + "\n")


def compare_arms(out: Path, config: DemoConfig) -> dict[str, Any]:
    """What `run_arm` measured of both students, side by side: `{"answers", "attention", "history", "examples"}`."""
    measured = {arm: _read(out / arm / MEASURED) for arm in ARMS}
    usual = _usual_answers(ask(training_scenes(config)))
    answers = {}
    for world in WORLDS:
        asked = ask(fresh_scenes(world, config.num_fresh))
        kinds = [[question.type for question in questions] for questions in asked]
        counted = [kind for kind in STUDY_TYPES if kind not in UNASKED.get(world, ())]
        plain, aligned = (measured[arm]["answers"][world] for arm in ARMS)
        rows = compare_answers(kinds, plain, aligned, counted)
        for kind, row in rows.items():
            if kind != "all":
                hits = [q.answer == usual[kind] for questions in asked for q in questions if q.type == kind]
                row["usual"] = round(sum(hits) / len(hits), 4)
        rows["all"]["usual"] = round(float(np.mean([row["usual"] for kind, row in rows.items() if kind != "all"])), 4)
        answers[world] = rows
    return {
        "answers": answers,
        "attention": {arm: measured[arm]["attention"] for arm in ARMS},
        "history": {arm: _read(out / arm / HISTORY) for arm in ARMS},
        "examples": _examples(fresh_scenes(MAIN_WORLD, config.num_fresh), [measured[arm]["examples"] for arm in ARMS]),
    }


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is damaged ({first_line(error)}); remove {path.parent}, and the same command trains anew"
        ) from None


def _usual_answers(asked: Asked) -> dict[str, str]:
    """The most frequent answer to each type of question."""
    counts: dict[str, Counter[str]] = {}
    for questions in asked:
        for question in questions:
            counts.setdefault(question.type, Counter())[question.answer] += 1
    return {kind: answers.most_common(1)[0][0] for kind, answers in counts.items()}


def _examples(scenes: Sequence[Scene], by_arm: Sequence[list[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """The drawn pictures: of each question what both students say, and their maps of the words that stand for an object and of the
    answer, with whether the hottest place lies in that object."""
    examples = []
    for number, *of_arms in zip(example_numbers(scenes), *by_arm, strict=True):
        questions = ask([scenes[number]])[0]
        drawn = [questions[n] for n in example_questions(questions)]
        examples.append(
            {
                "picture": number,
                "questions": [
                    {
                        "type": question.type,
                        "text": question.text,
                        "answer": question.answer,
                        "said": {arm: looks["said"] for arm, looks in zip(ARMS, of_question, strict=True)},
                        "words": _drawn_words(scenes[number], question, [looks["maps"] for looks in of_question]),
                    }
                    for question, *of_question in zip(drawn, *of_arms, strict=True)
                ],
            }
        )
    return examples


def _drawn_words(scene: Scene, question: Question, maps: Sequence[list[Any]]) -> list[dict[str, Any]]:
    words = Collator.words(question.text)
    named: dict[int, tuple[str, int | None]] = {number: (role, index) for number, role, index in named_words(question)}
    if Collator.words(question.answer):  # "no" is none
        named.setdefault(len(words), ("answer", None))
    drawn = []
    for number, (role, index) in sorted(named.items()):
        word: dict[str, Any] = {"word": question.answer if role == "answer" else words[number].text, "role": role, "object": index}
        word["maps"] = {arm: of_arm[number] for arm, of_arm in zip(ARMS, maps, strict=True)}
        if index is not None:
            word["found"] = {
                arm: localization(measured_words(scene.masks, [(np.array(values), index)])).pointing == 1
                for arm, values in word["maps"].items()
            }
        drawn.append(word)
    return drawn
