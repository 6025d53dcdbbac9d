"""Captions of every length and script: parts of long ones, words without a map, refusals; batches equal single pictures."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from lavender.config import TeacherConfig
from lavender.errors import DataError
from lavender.images import Picture
from lavender.teachers.model import Teacher
from lavender.teachers.prompts import word_weights
from lavender.words import Caption, words_of

from .explicit import NAMES, SIDE, built, forwards_of, picture

NOISE = TeacherConfig(inversion="noise", timesteps=(151,), image_size=SIDE, map_size=4)
# CLIP's window is 16 tokens, two of them for start and end; every word here is one token, and a full stop is one.
PLAIN = "a cat in a red hat over the blue house a bird riding an astronaut in a green chair"
SENTENCES = "a cat in a red hat over the blue house. two birds in the blue hat over a cat"


def parts_by_hand(caption, cuts):
    """Texts of a caption that is cut before the words with these numbers, a text each to where the next word begins."""
    words = words_of(caption)
    starts = [0, *(words[cut].start for cut in cuts), len(caption)]
    return [caption[start:end] for start, end in pairwise(starts)]


def check_parts(teacher, caption, cuts):
    """Each part's words have the maps that they have when the part is the whole caption."""
    image = picture(0)
    whole = teacher.word_maps(image, caption)
    assert whole.words == words_of(caption)
    assert np.isfinite(whole.maps).all()
    parts = parts_by_hand(caption, cuts)
    apart = [teacher.word_maps(image, part) for part in parts]
    assert [w.text for own in apart for w in own.words] == [w.text for w in whole.words]
    np.testing.assert_allclose(whole.maps, np.concatenate([own.maps for own in apart]), rtol=0, atol=1e-6)


def test_a_long_caption_is_read_in_parts_as_long_as_the_window():
    teacher = Teacher(built("sd"), NOISE)
    first = words_before(teacher, PLAIN, 0)
    assert 0 < first < len(words_of(PLAIN))
    check_parts(teacher, PLAIN, [first])


def words_before(teacher, caption, first):
    """The first word whose tokens are not all read when the caption is read from word `first` on, by the tokenizer alone."""
    words = words_of(caption)
    rest = caption[words[first].start if first else 0 :]
    tokens = teacher.pipe.tokenizer(rest, truncation=True, return_offsets_mapping=True).offset_mapping
    end = max(own[1] for own in tokens) + (words[first].start if first else 0)
    return next(n for n, word in enumerate(words) if word.start >= end)


def test_a_caption_is_cut_behind_a_sentence_that_ends_in_the_second_half():
    teacher = Teacher(built("sd"), NOISE)
    assert words_before(teacher, SENTENCES, 0) == 13, "without the full stop it would be cut here"
    check_parts(teacher, SENTENCES, [10])


@pytest.mark.parametrize("end", ["!", "?", "\n", "。"])
def test_other_ends_of_sentences(end):
    teacher = Teacher(built("sd"), NOISE)
    check_parts(teacher, SENTENCES.replace(". ", f"{end} "), [10])


def test_a_sentence_that_ends_in_the_first_half_cuts_nothing():
    caption = "a cat. in a red hat over the blue house two birds in the blue hat over a cat"
    teacher = Teacher(built("sd"), NOISE)
    check_parts(teacher, caption, [words_before(teacher, caption, 0)])


def test_many_parts():
    caption = ". ".join([SENTENCES.replace(".", "")] * 3)
    teacher = Teacher(built("sd"), NOISE)
    maps = teacher.word_maps(picture(0), caption)
    passages = list(teacher._passages(0, Caption.of(caption)))
    assert "".join(own.text for own in passages) == caption
    assert len(passages) >= 4
    assert np.isfinite(maps.maps).all()
    cuts = np.cumsum([len(own.words) for own in passages])[:-1].tolist()
    check_parts(teacher, caption, cuts)


def test_truncated_captions_lack_maps_at_their_end():
    teacher = Teacher(built("sd"), replace(NOISE, long_captions="truncate"))
    first = words_before(teacher, PLAIN, 0)
    maps = teacher.word_maps(picture(0), PLAIN).maps
    assert np.isnan(maps[first:]).all()
    assert np.isfinite(maps[:first]).all()
    start = parts_by_hand(PLAIN, [first])[0]
    np.testing.assert_allclose(maps[:first], teacher.word_maps(picture(0), start).maps, rtol=0, atol=1e-6)


def test_long_captions_are_refused_with_their_counts():
    teacher = Teacher(built("sd"), replace(NOISE, long_captions="error"))
    first, count = words_before(teacher, PLAIN, 0), len(words_of(PLAIN))
    reason = teacher.refusal(Caption.of(PLAIN))
    assert reason == f"the caption has {count} words, and the text encoder reads the first {first}"
    with pytest.raises(DataError, match=f"{count} words.* first {first}"):
        teacher.word_maps(picture(0), PLAIN)
    start = parts_by_hand(PLAIN, [first])[0]
    assert teacher.refusal(Caption.of(start)) is None
    assert np.isfinite(teacher.word_maps(picture(0), start).maps).all()
    for other in ("chunks", "truncate"):
        assert Teacher(built("sd"), replace(NOISE, long_captions=other)).refusal(Caption.of(PLAIN)) is None


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart"])
def test_t5_reads_long_captions_at_once(name):
    """Where CLIP reads the beginning only, T5 has all of the words (hundreds of tokens)."""
    teacher = Teacher(built(name), replace(NOISE, long_captions="truncate"))
    with forwards_of(teacher.family.denoiser) as forwards:
        maps = teacher.word_maps(picture(0), PLAIN).maps
    assert len(forwards) == 1
    assert np.isfinite(maps).all()
    np.testing.assert_array_equal(maps, Teacher(built(name), NOISE).word_maps(picture(0), PLAIN).maps)


@pytest.mark.parametrize("long_captions", ["chunks", "truncate", "error"])
@pytest.mark.parametrize("caption", ["", " \n\t", "...", "🎈", "—"])
def test_captions_without_words_are_refused(caption, long_captions):
    teacher = Teacher(built("sd"), replace(NOISE, long_captions=long_captions))
    assert "has no words" in teacher.refusal(Caption.of(caption))
    with pytest.raises(DataError, match="has no words"):
        teacher.word_maps(picture(0), caption)


def test_broken_text_is_refused():
    teacher = Teacher(built("sd"), NOISE)
    assert teacher.refusal(Caption.of("a \ud800 cat")) is not None


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart"])
@pytest.mark.parametrize(
    "caption",
    [
        "a red 🎈 over 👩‍👩‍👧 the cat",
        "קובייה אדומה ליד הבית",
        "مكعب أحمر بجانب البيت a cat",
        "一只戴着红帽子的猫",
        "红色的帽子，蓝色的房子。猫",
        "Café naïve — élan",
        "  a   cat\n\nin\ta HAT  ",
    ],
)
def test_all_scripts_have_maps(name, caption):
    """No word of any of them is without a finite map that is not the same everywhere, whatever pieces it is made of."""
    teacher = Teacher(built(name), replace(NOISE, map_size=6))
    assert teacher.refusal(Caption.of(caption)) is None
    maps = teacher.word_maps(picture(0), caption)
    assert maps.words == words_of(caption)
    assert len(maps.words) > 0
    assert np.isfinite(maps.maps).all()
    assert (maps.maps.min(axis=(1, 2)) > 0).all()
    assert (np.ptp(maps.maps, axis=(1, 2)) > 0).all()


def test_a_word_longer_than_the_window_has_its_first_tokens():
    """Its map is that of what the text encoder reads of it; the words around it keep theirs."""
    caption = f"a cat {'z' * 60} red hat"
    teacher = Teacher(built("sd"), NOISE)
    maps = teacher.word_maps(picture(0), caption).maps
    assert np.isfinite(maps).all()
    passages = list(teacher._passages(0, Caption.of(caption)))
    assert "".join(own.text for own in passages) == caption
    assert [w.text for own in passages for w in own.words] == ["a", "cat", "z" * 60, "red", "hat"]
    cuts = np.cumsum([len(own.words) for own in passages])[:-1].tolist()
    check_parts(teacher, caption, cuts)


def test_the_longest_words_alone():
    teacher = Teacher(built("sd"), NOISE)
    for caption in ("z" * 1000, "z" * 1000 + " cat", "cat " + "z" * 1000, " ".join(["z" * 100] * 5)):
        maps = teacher.word_maps(picture(0), caption)
        assert len(maps.maps) == len(words_of(caption))
        assert np.isfinite(maps.maps).all()


@pytest.mark.parametrize("long_captions", [pytest.param("chunks", marks=pytest.mark.full), "truncate", "error"])
def test_ten_thousand_words(long_captions, monkeypatch):
    """The tokenizer is given each word a few times at most: nobody reads the rest of the caption again for every part."""
    given = []

    def counted(pipe, prompts, *rest):
        given.extend(map(len, prompts))
        return word_weights(pipe, prompts, *rest)

    monkeypatch.setattr("lavender.teachers.model.word_weights", counted)
    teacher = Teacher(built("sd"), replace(NOISE, long_captions=long_captions))
    caption = ". ".join([PLAIN] * 600)
    count = len(words_of(caption))
    assert count > 10_000
    if long_captions == "error":
        assert f"{count} words" in teacher.refusal(Caption.of(caption))
    else:
        pictures = [Picture.open(picture(n)) for n in range(8)]
        maps = teacher.word_maps_of(pictures, [*map(Caption.of, [caption, *["a cat"] * 7])])[0].maps
        assert maps.shape == (count, 4, 4)
        missing = np.isnan(maps).any(axis=(1, 2))
        assert missing.sum() == (0 if long_captions == "chunks" else count - words_before(teacher, caption, 0))
    assert len(caption) * (long_captions == "chunks") < sum(given) < 4 * len(caption)


@pytest.mark.parametrize("name", NAMES)
def test_batches_equal_pictures_one_by_one(name):
    """Captions of different lengths, of which one takes several parts, and pictures of different shapes."""
    flow_matching = name in ("sd3", "sd3.5", "flux")
    config = replace(NOISE, inversion="flow" if flow_matching else "ddim", inversion_steps=2, diffusion_steps=2, guidance_scale=3.0)
    teacher = Teacher(built(name), config)
    images = [picture(0), picture(1, 96, 48), picture(2, 40, 120)]
    captions = ["a cat", f"{PLAIN}. {PLAIN}", "two birds over the house"]
    pictures, texts = [*map(Picture.open, images)], [*map(Caption.of, captions)]
    together = teacher.word_maps_of(pictures, texts)
    for image, caption, maps in zip(images, captions, together, strict=True):
        alone = teacher.word_maps(image, caption)
        assert (maps.caption, maps.words, maps.crop) == (caption, words_of(caption), alone.crop)
        np.testing.assert_allclose(maps.maps, alone.maps, rtol=0, atol=1e-5 * alone.maps.max())
    backwards = teacher.word_maps_of(pictures[::-1], texts[::-1])[::-1]
    for one, other in zip(together, backwards, strict=True):
        np.testing.assert_allclose(one.maps, other.maps, rtol=0, atol=1e-5 * one.maps.max())


def test_repeated_words_have_maps_of_their_own():
    maps = Teacher(built("sd"), NOISE).word_maps(picture(0), "a cat over a cat").maps
    assert not np.array_equal(maps[1], maps[4])
    assert not np.array_equal(maps[0], maps[3])
