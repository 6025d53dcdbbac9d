"""The embedded models load as anybody's would, and know what the demo and the tests build on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lavender.config import TeacherConfig
from lavender.miniworld import STUDENT, TEACHER, WEIGHTS
from lavender.miniworld.experiment import DemoConfig, fresh_scenes, training_scenes
from lavender.miniworld.measures import compare_targets, evaluate_answers, held_out_scenes, teacher_maps
from lavender.teachers.model import Teacher
from recipes.cards import autoencoder_psnr


@pytest.fixture(scope="module")
def held_out():
    return held_out_scenes(60)


def test_everything_together_is_at_most_8_mb():
    assert sum(p.stat().st_size for p in WEIGHTS.rglob("*") if p.is_file()) <= 8 * 2**20
    assert not [p for p in WEIGHTS.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_the_teacher_is_an_ordinary_diffusers_folder():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(TEACHER)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "A large white square, a small pink star and an orange ring.",
        num_inference_steps=15, guidance_scale=3.0, generator=torch.Generator().manual_seed(0), output_type="np",
    ).images[0]  # fmt: skip
    assert image.shape == (64, 64, 3)
    # It draws: white, pink and orange things on a grey ground.
    white = (image.min(axis=2) > 0.85).mean()
    orange = ((image[..., 0] > 0.75) & (image[..., 2] < 0.35)).mean()
    assert 0.005 < white < 0.4
    assert 0.005 < orange < 0.4


def test_the_student_is_an_ordinary_transformers_folder():
    from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

    model = AutoModelForImageTextToText.from_pretrained(STUDENT)
    assert type(model) is LlavaForConditionalGeneration
    assert model.dtype == torch.float32
    assert AutoProcessor.from_pretrained(STUDENT).chat_template


def test_the_teacher_knows_where_words_lie(held_out):
    teacher = Teacher(TEACHER, TeacherConfig(inversion="noise"))
    figures = compare_targets(held_out, teacher_maps(teacher, held_out))
    assert figures["maps"]["own_object"] >= 0.9
    assert figures["maps"]["own_object"] >= figures["control"]["own_object"] + 0.25
    assert figures["maps"]["pointing"] >= 0.85


def test_so_it_does_by_the_published_inversion(held_out):
    scenes = held_out[:15]
    figures = compare_targets(scenes, teacher_maps(Teacher(TEACHER, TeacherConfig()), scenes))
    assert figures["maps"]["own_object"] >= 0.9
    assert figures["maps"]["pointing"] >= 0.8


def test_untrained_weights_do_not(held_out):
    from lavender.teachers.model import load_pipeline
    from recipes.teacher import make_text_encoder, make_unet

    pipe = load_pipeline(TEACHER)
    torch.manual_seed(0)
    pipe.unet, pipe.text_encoder = make_unet(), make_text_encoder(pipe.tokenizer)
    figures = compare_targets(held_out, teacher_maps(Teacher(pipe, TeacherConfig(inversion="noise")), held_out))
    assert figures["maps"]["pointing"] < 0.2


def test_the_autoencoder_keeps_the_picture(held_out):
    from lavender.teachers.model import load_pipeline

    assert autoencoder_psnr(load_pipeline(TEACHER).vae, held_out) >= 28


def test_the_student_answers(held_out):
    from lavender.students.loading import load_student

    answers = evaluate_answers(*load_student(STUDENT), held_out)
    assert answers["color"]["accuracy"] >= 0.95
    assert answers["shape"]["accuracy"] >= 0.95


def test_cards_are_there_and_name_recipe_and_cost():
    for folder in (TEACHER, STUDENT):
        card = (folder / "README.md").read_text()
        assert "python -m recipes train" in card
        assert "CPU seconds" in card
        assert "pointing" in card
        assert (folder / "recipe.json").exists()


def test_training_seeds_share_no_picture():
    captions = [[s.pixels.tobytes() for s in training_scenes(DemoConfig(num_train=8, seed=seed))] for seed in (0, 1)]
    held = [s.pixels.tobytes() for s in held_out_scenes(8)]
    assert len({*captions[0], *captions[1], *held}) == 24
    fresh = [s.pixels.tobytes() for world in ("in distribution", "clutter") for s in fresh_scenes(world, 8)]
    assert len({*captions[0], *captions[1], *fresh}) == 32


def test_word_maps_of_the_embedded_teacher_are_finite():
    scene = held_out_scenes(1)[0]
    maps = Teacher(TEACHER, TeacherConfig(inversion="noise")).word_maps(scene.image, scene.caption)
    assert np.isfinite(maps.maps).all()
    assert (maps.maps >= 0).all()
    assert (maps.maps <= 1).all()
