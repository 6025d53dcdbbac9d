"""A model is asked about a picture, and shows where each word of its answer looked."""

from __future__ import annotations

import copy

import pytest
import torch

import lavender
from lavender.batches.collator import Collator
from lavender.data.samples import Sample
from lavender.errors import CaptureError, ConfigError, DataError, ModelError
from lavender.students.families import STUDENTS
from lavender.students.image_tokens import image_token_of, model_type_of
from lavender.students.look import append_answer, ask_by_template, process_question
from lavender.testing.student import noise_image

from .zoo import built, families, sampled

# Idefics wants picture and text in one list: its prompts are not of the others' form. A stand-in for remote code cannot generate.
ASKED = [name for name in families(lambda student: student.model.can_generate()) if name != "idefics"]
ENCODER_DECODER = {"florence2"}


@pytest.mark.parametrize("name", sampled(name for name in ASKED if name not in ENCODER_DECODER))
def test_one_forward_over_prompt_and_answer_is_what_the_model_generated(name):
    student = built(name)
    model = student.model
    prompt = f"{student.placeholder} what is this ?"
    inputs = {k: v for k, v in process_question(student.processor, noise_image(60, 90), None, prompt).items() if k != "labels"}
    generated = model.generate(
        **inputs,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        suppress_tokens=[image_token_of(student.processor, model.config)],
    )
    length = inputs["input_ids"].shape[1]
    ids = generated.sequences[0, -4:].tolist()
    batch, first = append_answer(model, inputs, ids, student.family.answer_type)
    assert first == length
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[0, first - 1 : -1]
    torch.testing.assert_close(logits, torch.cat(generated.logits), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", sampled(ASKED))
def test_every_word_of_an_answer_has_a_map(name):
    student = built(name)
    with lavender.patch(student.model, processor=student.processor) as lens:
        maps = lens.look(noise_image(60, 90), answer="a red cat", prompt=f"{student.placeholder} what is this ?")
        assert lens.maps is maps
    assert list(maps) == ["a", "red", "cat"]
    assert len(maps.layers) == lens.num_layers
    red, cat = maps["red"], maps["cat"]
    assert red.values.min() >= 0
    assert 0 < red.sum() <= 1 + 1e-5
    assert not torch.equal(red.values, cat.values)
    assert not red.values.requires_grad


def test_the_maps_of_its_own_answer_are_those_of_a_collated_batch(processor, scenes):
    """On the embedded kind of model, whose chat template both sides use."""
    from lavender.miniworld import STUDENT
    from lavender.students.loading import load_student

    model, processor = load_student(STUDENT)
    model.eval()
    image = scenes[0].image
    with torch.no_grad(), lavender.patch(model, processor=processor) as lens:
        maps = lens.look(image, "Describe the picture.", max_new_tokens=40, do_sample=False)
        batch = Collator(processor)([Sample("0", image, "Describe the picture.", maps.text.strip())])
        expected = lens.capture(**batch)[0].mean((0, 1))
    content = [i for i, word in enumerate(maps.words) if word.text in {w.text for w in Collator.words(maps.text)}]
    assert len(content) == len(expected) > 2
    for place, own in zip(content, expected, strict=True):
        torch.testing.assert_close(maps.heat_map_of(place).values, own, rtol=1e-4, atol=1e-6)
    head = maps.heat_map(maps.words[content[0]].text, head=1, layers=[2])
    assert head.values.shape == expected.shape[-2:]


def test_what_is_missing_is_said(processor, scenes):
    name = "llava"
    student = built(name)
    image = scenes[0].image
    with lavender.patch(student.model) as lens:
        with pytest.raises(CaptureError, match="look at a picture first"):
            lens.maps  # noqa: B018
        with pytest.raises(ConfigError, match="processor=processor"):
            lens.look(image)
    with lavender.patch(student.model, processor=student.processor) as lens:
        with pytest.raises(ConfigError, match="no chat template"):
            lens.look(image, "what is this ?")
        with pytest.raises(CaptureError, match="no words"):
            lens.look(image, prompt="<image> what", answer="?")
    registered = STUDENTS.pop("llava")
    try:
        with lavender.patch(student.model, processor=student.processor) as lens, pytest.raises(ModelError, match="register_family"):
            lens.look(image, prompt="<image> what", answer="a cat")
    finally:
        STUDENTS["llava"] = registered


def test_pictures_are_read_as_the_collator_reads_them(tmp_path):
    """Upright, from a file as from memory; arrays are refused by name."""
    from PIL import Image

    student = built("qwen2_vl")
    image = noise_image(60, 90)
    turned = image.getexif()
    turned[0x0112] = 6
    image.save(tmp_path / "a.png", exif=turned)
    prompt = f"{student.placeholder} what"
    with lavender.patch(student.model, processor=student.processor) as lens:
        shape = lens.look(tmp_path / "a.png", prompt=prompt, answer="a cat")["cat"].values.shape
        upright = lens.look(image.rotate(-90, expand=True), prompt=prompt, answer="a cat")["cat"].values.shape
        assert shape == upright
        assert shape[0] > shape[1]
        with pytest.raises(DataError, match="expected a path"):
            lens.look([Image.new("RGB", (8, 8))], prompt=prompt)
    with pytest.raises(CaptureError, match="patch was undone"):
        lens.look(image, prompt=prompt, answer="a cat")


def test_a_family_of_ones_own_comes_before_the_processors(tmp_path):
    student = built("llava")
    config = student.model.config
    named = type(config).model_type
    type(config).model_type = "my_model"
    lavender.register_family("my_model", lavender.Family(boxes=lambda images: []))
    try:
        assert model_type_of(student.processor, config) == "my_model"
    finally:
        type(config).model_type = named
        del STUDENTS["my_model"]


QWEN3 = "<|im_start|>{{ messages[0].role }}\n{{ messages[0].content }}<|im_end|>{% if add_generation_prompt %}A:{% endif %}"
"""As text-only templates do: the content is written as it is, a list as a list."""


def test_a_template_that_takes_texts_alone_gets_a_text(processor):
    copied = copy.deepcopy(processor)
    copied.chat_template = QWEN3
    assert ask_by_template(copied, "What is 'it'?") == "<|im_start|>user\n<image>What is 'it'?<|im_end|>A:"
    copied.chat_template = "{% for part in messages[0].content %}{% if part.type == 'image' %}<image>{% endif %}{% endfor %}"
    with pytest.raises(ConfigError, match="shows no question"):
        ask_by_template(copied, "What is it?")
