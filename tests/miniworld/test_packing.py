from __future__ import annotations

import pytest
import torch

from lavender.batches.collator import Collator
from lavender.config import WordsConfig
from lavender.miniworld.language import QuestionSet, conversation_of, features_of, small_student
from lavender.miniworld.packing import PackedPictures
from lavender.miniworld.scenes import ask_all, make_scenes
from lavender.miniworld.stores import exact_targets
from lavender.types import ROLES, WordBatch

MAP_SIZE = 8


@pytest.fixture(scope="module")
def student():
    model, processor = small_student(3)
    return model.eval().double(), processor


@pytest.fixture(scope="module")
def asked():
    scenes = list(make_scenes(71, 4))
    return [(scene, ask_all(scene, 71)) for scene in scenes]


@pytest.fixture(scope="module")
def data(student, asked, tmp_path_factory):
    model, processor = student
    scenes = [scene for scene, _ in asked]
    store = exact_targets(tmp_path_factory.mktemp("packing"), scenes, MAP_SIZE)
    collator = Collator(processor, store, WordsConfig(roles=("question", "answer")), on_error="raise")
    packed = PackedPictures(collator, (conversation_of(str(n), *each) for n, each in enumerate(asked)))
    kinds = [[question.type for question in questions] for _, questions in asked]
    return QuestionSet(packed, features_of(model, processor, scenes), kinds)


def inputs_alone(processor, scene, question):
    """What transformers' processor makes of one question with its answer, and how many of its tokens are the answer and the end."""
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
        {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
    ]
    whole = processor.apply_chat_template(messages)
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    images = {"images": [scene.image], "add_special_tokens": False, "return_tensors": "pt"}
    inputs = processor(text=whole, **images)
    return inputs, inputs["input_ids"].shape[1] - processor(text=prompt, **images)["input_ids"].shape[1]


def test_every_question_is_answered_as_if_it_stood_alone(student, asked, data):
    model, processor = student
    pictures = [2, 0, 3]
    chosen = [[1, 4, 0, 2], [3], list(range(len(asked[3][1])))]
    batch = data.batch(model, pictures, chosen, with_words=False)
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    first = len(data.packed.prefix)
    for b, (picture, turns) in enumerate(zip(pictures, chosen, strict=True)):
        at = first
        for turn in turns:
            scene, questions = asked[picture]
            alone, of_answer = inputs_alone(processor, scene, questions[turn])
            with torch.no_grad():
                expected = model(**alone, use_cache=False).logits[0]
            end = at + alone["input_ids"].shape[1] - first
            assert batch["input_ids"][b, at:end].tolist() == alone["input_ids"][0, first:].tolist()
            torch.testing.assert_close(logits[b, at:end], expected[first:], rtol=0, atol=1e-12)
            labels = batch["labels"][b, at:end]
            assert (labels[:-of_answer] == -100).all()
            assert labels[-of_answer:].tolist() == alone["input_ids"][0, -of_answer:].tolist()
            at = end
        assert (batch["labels"][b, at:] == -100).all(), "what is padding teaches nothing"
        assert (batch["labels"][b, :first] == -100).all()


def test_a_packed_loss_is_the_mean_over_the_questions_tokens(student, asked, data):
    model, processor = student
    total, count = 0.0, 0
    with torch.no_grad():
        packed = float(model(**data.batch(model, [0, 1], [[0, 2], [1]], with_words=False), use_cache=False).loss)
        for picture, turn in ((0, 0), (0, 2), (1, 1)):
            scene, questions = asked[picture]
            alone, of_answer = inputs_alone(processor, scene, questions[turn])
            logs = model(**alone, use_cache=False).logits[0].log_softmax(dim=-1)
            ids = alone["input_ids"][0]
            for place in range(len(ids) - of_answer, len(ids)):
                total, count = total - float(logs[place - 1, ids[place]]), count + 1
    assert packed == pytest.approx(total / count, abs=1e-6)  # transformers takes the loss in single precision


def test_words_roles_and_targets_are_where_they_belong(student, asked, data):
    """Against the objects: a word that names one has its mask, and its token is that word's, in its own turn."""
    model, processor = student
    pictures = list(range(len(asked)))
    chosen = [list(range(len(questions)))[::-1] for _, questions in asked]
    batch = data.batch(model, pictures, chosen, with_words=True)
    words = WordBatch.split(batch)[1]
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    first = len(data.packed.prefix)
    for b, (scene, questions) in enumerate(asked):
        found = []
        for w in words.present[b].nonzero().flatten().tolist():
            of_word = words.token_words[b] == w
            assert float(words.token_weights[b][of_word].sum()) == pytest.approx(1)
            text = processor.tokenizer.decode(batch["input_ids"][b][words.tokens[b][of_word]]).strip()
            found.append((int(words.tokens[b][of_word][0]), ROLES[int(words.roles[b, w])], text, words.targets[b, w].numpy()))
        expected = []
        at = first
        for turn in chosen[b]:
            question, ids = questions[turn], data.packed.turns[b][turn].ids
            named = [(question.text[r.start : r.end], r.object_index, "question") for r in question.referents]
            if question.type in ("color", "shape"):
                named.append((question.answer, question.object_index, "answer"))
            for text, index, role in named:
                share = scene.masks[index].reshape(MAP_SIZE, 8, MAP_SIZE, 8).mean(axis=(1, 3))
                expected.append((at, at + len(ids), role, text, share))
            at += len(ids)
        assert len(found) == len(expected)
        for (place, role, text, values), (start, end, its_role, its_text, share) in zip(found, expected, strict=True):
            assert start <= place < end
            assert (role, text) == (its_role, its_text)
            assert abs(values - share).max() < 2e-3  # stored in half precision
        at_image = words.image_positions[b]
        assert (batch["input_ids"][b][at_image] == image).all()
        assert len(at_image) == MAP_SIZE**2
        assert words.input_ids[b].equal(batch["input_ids"][b])


def test_turns_without_words_are_batches_too(student, asked, data):
    model, _ = student
    counting = next(n for n, question in enumerate(asked[0][1]) if question.type == "count")
    words = WordBatch.split(data.batch(model, [0], [[counting]], with_words=True))[1]
    assert not words.present.any()
    assert (words.tokens == -1).all()
    assert (words.roles == 0).all()
