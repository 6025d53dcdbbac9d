from __future__ import annotations

import pytest

from lavender.errors import ModelError
from lavender.evaluation.answers import accuracy, generate
from lavender.miniworld import STUDENT
from lavender.students.loading import load_student


def test_wilson_interval():
    """Against the closed form worked by hand for 8 of 10."""
    result = accuracy([True] * 8 + [False] * 2)
    assert (result.accuracy, result.low, result.high) == (0.8, 0.4902, 0.9433)
    assert accuracy([True] * 5).high == 1.0


def test_generated_answers_do_not_depend_on_the_batch(scenes):
    model, processor = load_student(STUDENT)
    questions = [s.questions[i % 3].text for i, s in enumerate(scenes[:6])]
    together = generate(model, processor, [s.image for s in scenes[:6]], questions, 6)
    alone = [generate(model, processor, [s.image], [q], 6)[0] for s, q in zip(scenes[:6], questions, strict=True)]
    assert together == alone
    assert together == [s.questions[i % 3].answer for i, s in enumerate(scenes[:6])]


def test_generated_answers_are_greedy_whatever_the_students_config_asks_for(scenes):
    model, processor = load_student(STUDENT)
    questions = [(scene.image, question.text) for scene in scenes[:2] for question in scene.questions]
    images, texts = [image for image, _ in questions], [text for _, text in questions]
    expected = generate(model, processor, images, texts, max_new_tokens=6)
    own = model.generation_config
    for name, value in {"num_beams": 4, "max_time": 0.0, "return_dict_in_generate": True, "repetition_penalty": 9.0}.items():
        setattr(own, name, value)
    assert generate(model, processor, images, texts, max_new_tokens=6) == expected
    assert model.generation_config is own
    own.eos_token_id = "x"
    with pytest.raises(ModelError, match=r"generates no answers .*give the generation_config\.json"):
        generate(model, processor, images, texts, max_new_tokens=6)
