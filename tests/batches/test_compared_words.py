"""What is compared with what, where a sample leaves it open: the picture, the row before an answer, the place of a region."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from PIL import Image

import lavender
from lavender.batches.chat_template import apply_chat_template
from lavender.batches.collator import Collator
from lavender.config import AlignmentConfig, WordsConfig
from lavender.data.regions import Region
from lavender.data.samples import Conversation, Sample, as_conversation
from lavender.errors import DataError
from lavender.images import image_sha256
from lavender.targets.manifest import StoreConfig
from lavender.targets.store import Target, TargetStore, TargetWriter
from lavender.types import OUTCOMES, WordMaps
from lavender.words import words_of

from .test_aligned_words import BOTH, BOX, CAPTION, SIDE, tokens_by_offsets, tokens_in
from .test_chat_template import NO_PICTURES, TEMPLATES, talk, with_template
from .test_conversations import ANSWER, BLUE, QUESTION, RED, store_of
from .test_families import collator_of, noise_image

WIDE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def own_processor(processor):
    return copy.deepcopy(processor)


def stored(folder, entries) -> TargetStore:
    """Targets (id, picture, caption, crop), each with maps of its own."""
    with TargetWriter(folder, {"model": "m"}, StoreConfig(map_size=SIDE)) as writer:
        for n, (sample_id, picture, caption, crop) in enumerate(entries):
            words = words_of(caption)
            values = np.random.default_rng(n).random((len(words), SIDE, SIDE)).astype(np.float16).astype(np.float32)
            writer.add(Target(sample_id, image_sha256(picture), WordMaps(caption, words, values, crop)))
        writer.close()
    return TargetStore(folder)


WHOLE = (0.0, 0.0, 1.0, 1.0)


def compared(collator, sample) -> dict[tuple[int, str], np.ndarray]:
    """By turn and letters the targets of the words that are compared."""
    batch = collator([sample])
    words = [(word.turn, word.word.text) for word in collator.aligned_words(sample)]
    present = batch["lavender_present"][0].tolist()
    return {word: batch["lavender_targets"][0, w].numpy() for w, word in enumerate(words) if present[w]}


def test_a_word_takes_no_map_of_another_picture_than_the_one_before_it(processor, tmp_path, caplog):
    """Both pictures have targets; a sample compares with one, and says which words it leaves out."""
    store = stored(tmp_path / "t", [("r", RED, "A zebra.", WHOLE), ("b", BLUE, "A blue zebra.", WHOLE)])
    zebra = {name: store[name].word_maps["zebra"] for name in "rb"}
    collator = Collator(processor, store, BOTH)
    with caplog.at_level(logging.WARNING, "lavender"):
        apart = talk("<image>What zebra?", "This zebra.", "<image>And the zebra here?", "A zebra here.")
        found = compared(collator, Conversation("q", (RED, BLUE), apart))
    assert found.keys() == {(0, "zebra"), (1, "zebra")}
    assert all(np.array_equal(values, zebra["r"]) for values in found.values())
    assert "sample 'q' has 2 pictures, and targets that were found by picture 1" in caplog.text
    # The one whose caption is an answer; that answer's words are of it wherever other pictures stand.
    told = talk("<image>What zebra?", "A zebra in blue.", "<image>And the zebra here?", "A blue zebra.", "<image>Zebra?", "Zebra.")
    found = compared(collator, Conversation("q", (RED, BLUE, RED), told))
    assert found.keys() == {(2, "zebra"), (3, "zebra"), (3, "blue")}
    assert np.array_equal(found[3, "zebra"], zebra["b"])
    assert np.array_equal(found[2, "zebra"], zebra["b"])
    found = compared(collator, Conversation("q", (RED, BLUE), talk("<image><image>The first zebra?", "A zebra.")))
    assert found.keys() == {(1, "zebra")}
    assert np.array_equal(found[1, "zebra"], zebra["r"])
    # Nothing is compared where the picture is not the last one; a region names it, and its id says it.
    both = Conversation("q", (RED, BLUE), talk("<image><image>The first zebra?", "This zebra."), regions=())
    red_alone = stored(tmp_path / "one", [("r", RED, "A zebra.", WHOLE)])
    collator = Collator(processor, red_alone, BOTH)
    batch = collator([both])
    assert [OUTCOMES[n] for n in batch["lavender_outcomes"]] == ["no word matched"]
    named = Conversation("q", both.images, both.messages, regions=(Region(1, 5, 10, word="zebra", image=0),))
    found = compared(collator, named)
    assert found.keys() == {(1, "zebra")}
    assert np.array_equal(found[1, "zebra"], zebra["r"])
    found = compared(collator, Conversation("r", both.images, both.messages))
    assert found.keys() == {(0, "zebra"), (1, "zebra")}
    # One picture, shown once, has all that is said behind it.
    later = talk("<image>What zebra?", "This zebra.", "And the zebra?", "No zebra.")
    assert compared(collator, Conversation("q", (RED,), later)).keys() == {(n, "zebra") for n in range(4)}


def test_a_regions_word_is_of_the_picture_that_it_names(processor, tmp_path):
    store = stored(tmp_path / "t", [("r", RED, "A zebra.", WHOLE)])
    strict = Collator(processor, store, on_error="raise")
    said = talk("<image><image>A zebra in the second?", "Yes.")
    with pytest.raises(DataError, match=r"sample 'q' has regions in its picture 1, and .* word 'zebra' are of picture 0"):
        strict([Conversation("q", (RED, BLUE), said, regions=(Region(1, word="zebra", image=1),))])
    with pytest.raises(DataError, match=r"'r' has regions in its picture 1, and targets of picture 0"):
        strict([Conversation("r", (RED, BLUE), said, regions=(Region(1, word="zebra", image=1),))])
    with pytest.raises(DataError, match="has regions in 2 of its pictures"):
        strict([Conversation("q", (RED, BLUE), said, regions=(Region(1, word="zebra", image=0), Region(0, box=BOX, image=1)))])
    both = stored(tmp_path / "both", [("r", RED, "A zebra.", WHOLE), ("b", BLUE, "A zebra.", WHOLE)])
    collator = Collator(processor, both)
    for n, name in enumerate("rb"):
        sample = Conversation("q", (RED, BLUE), said, regions=(Region(1, word="zebra", image=n),))
        assert np.array_equal(compared(collator, sample)[1, "Yes."], both[name].word_maps["zebra"])
    assert collator([sample])["lavender_columns"][0, 0] > collator([Sample("x", RED, "?", "A zebra.")])["lavender_columns"][0, 0]


def test_an_answer_that_is_a_caption_takes_its_maps_whatever_stands_around_it(own_processor, tmp_path):
    """White space, thinking, and a caption that was stored first and shows another part of the picture."""
    processor = with_template(own_processor, "qwen3_5_think_training")
    caption, part = "A zebra beside a zebra.", (0.0, 0.0, 0.5, 1.0)
    store = stored(tmp_path / "t", [("a", RED, "A zebra.", WHOLE), ("b", RED, f" {caption}\n", part), ("c", BLUE, caption, WHOLE)])
    own = store["b"].word_maps.maps[[1, 2, 4]]
    for answer in (caption, f"{caption} ", f"\n{caption}", f"<think>\nA zebra, beside.\n</think>\n\n{caption}"):
        batch = Collator(processor, store)([Sample("q", RED, "What?", answer)])
        assert batch["lavender_present"].sum() == 3, answer
        found = batch["lavender_targets"][0][batch["lavender_present"][0]].numpy()
        assert np.array_equal(found, own)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in NO_PICTURES])
def test_the_end_of_a_prompt_predicts_the_first_token_of_what_the_answer_says(own_processor, name):
    """Whatever a template puts between the prompt and that, and behind the answer's thinking."""
    processor = with_template(own_processor, name)
    for thought in ("", "<think>\nHm, a zebra?\n</think>\n\n"):
        messages = talk("<image>\nA hat?", "No.", "A zebra? ", f"{thought}Yes, a zebra.")
        sample = Conversation("x", (RED,), messages, regions=tuple(Region(n, role="prompt end", box=BOX) for n in (3, 1)))
        collator = Collator(processor, map_size=SIDE, words=WordsConfig(roles=()))
        batch = collator([sample])
        text = apply_chat_template(processor, as_conversation(sample)).text
        first = [text.index("No."), text.rindex("Yes")]
        expected = tokens_by_offsets(processor, text, batch, 0, [(at, at + 1) for at in first])
        assert tokens_in(batch, 0) == {w: [tokens[0] - 1] for w, tokens in enumerate(expected)}
        assert batch["lavender_present"].tolist() == [[True, True]]
        for word, (at, *_) in zip(collator.aligned_words(sample), expected, strict=True):
            (shown,) = word.tokens
            assert processor.tokenizer.decode(batch["input_ids"][0, at - 1]).strip() == shown.strip()


def test_a_prompt_that_ends_in_a_space_ends_before_the_token_that_takes_it(own_processor):
    """A tokenizer may join the space with the answer's first word: the row before that token predicts it."""
    processor = copy.deepcopy(own_processor)
    processor.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    collator = Collator(processor, map_size=SIDE)
    for answer in ("ring", "ring, yes."):
        sample = Sample("x", RED, "A ring?", answer, regions=(Region(1, role="prompt end", box=BOX),))
        batch = collator([sample])
        assert collator.aligned_words(sample)[0].tokens == (":",)
        at = tokens_in(batch, 0)[0][0]
        assert processor.tokenizer.decode(batch["input_ids"][0, at + 1]) == " ring"
        assert batch["lavender_present"][0, 0]


def test_a_region_is_seen_by_all_its_tokens_or_not_compared():
    """Where text reads by cross-attention too: words before the picture in the same message see nothing of it."""
    collator = collator_of("mllama", "right", closes=True, map_size=SIDE)
    text = "what is <image> this ?"
    for start, end, sees in ((0, len(text), False), (0, 7, False), (16, len(text), True)):
        region = Region(0, start, end, box=BOX)
        batch = collator([Conversation("a", (noise_image(60, 90),), talk(text, "a red cat"), regions=(region,))])
        assert batch["lavender_present"][0].any() == sees
        at = batch["lavender_tokens"][0][batch["lavender_token_words"][0] == 0]
        assert batch["cross_attention_mask"][0, at, 0].any(dim=-1).all() == sees


def test_a_region_that_the_processor_cuts_off_is_told(processor, caplog):
    """A processor may show the middle of a wide picture alone."""
    collator = Collator(processor, map_size=SIDE)
    boxes = {"left": (0, 0, 1, 0.2), "middle": (0, 0.3, 1, 0.5), "right": (0, 0.8, 1, 1), "all of the middle": (0, 0.2, 1, 0.8)}
    shown = collator([Sample("x", WIDE, "?", "Yes.")])["lavender_boxes"][0]
    assert (float(shown[:, 1].min()), float(shown[:, 3].max())) == (0.25, 0.75)
    present = {}
    for name, box in boxes.items():
        caplog.clear()
        collator = Collator(processor, map_size=SIDE)
        with caplog.at_level(logging.WARNING, "lavender"):
            batch = collator([Sample("x", WIDE, "Where?", "There.", regions=(Region(1, box=box),))])
        present[name] = bool(batch["lavender_present"].any())
        assert ("the region of 'There.' in message 2 of sample 'x' is not compared" in caplog.text) != present[name]
    assert present == {"left": False, "middle": True, "right": False, "all of the middle": False}
    with caplog.at_level(logging.WARNING, "lavender"):
        collator = Collator(processor, map_size=SIDE)
        collator([Sample("x", RED, QUESTION, ANSWER, regions=(Region(1, role="prompt end", box=(0, 0, 1, 1)),))])
    assert "no word of sample 'x' is compared: its regions cannot be compared" in caplog.text
    assert "the region of the prompt's end before message 2 of sample 'x' is not compared" in caplog.text


def test_small_regions_teach_as_large_ones(student, processor):
    """Neither the size of what is shown nor the scale of a map decides about the gradient."""
    values = np.exp(-((np.mgrid[:64, :64] - 30) ** 2).sum(axis=0) / 50)
    scaled = [Region(1, map=values * scale) for scale in (1.0, 1 / values.sum(), 1e-30, 1e30)]
    sized = [Region(1, box=(0.5, 0.5, 0.5 + side, 0.5 + side)) for side in (0.001, 0.002, 0.05)]
    sizes = {}
    for kind, regions in {"scaled": scaled, "sized": sized}.items():
        batches = [
            Collator(processor, map_size=16, model_config=student.config)([Sample("x", RED, "Where?", "There.", regions=(region,))])
            for region in regions
        ]
        for batch in batches:
            torch.testing.assert_close(batch["lavender_targets"], batches[0]["lavender_targets"], rtol=1e-5, atol=1e-7)
            assert batch["lavender_targets"].max() == 1
        with lavender.patch(student, AlignmentConfig(weight=1.0, aligner="identity")) as patch:
            student.zero_grad()
            student(**batches[-1])
            (gradient,) = torch.autograd.grad(patch.term, [student.get_parameter("model.language_model.embed_tokens.weight")])
            sizes[kind] = float(gradient.norm())
    assert min(sizes.values()) > 0.01 * max(sizes.values())


def test_regions_of_one_of_two_captions_and_a_store_without_the_picture(processor, tmp_path):
    """The caption of the picture that is compared is no other picture's."""
    store = store_of(tmp_path / "t", {"x": (BLUE, CAPTION)})
    collator = Collator(processor, store)
    batch = collator([Sample("q", RED, QUESTION, ANSWER, regions=(Region(1, 2, 7, box=BOX), Region(1, 17, 23, word="violin")))])
    assert [OUTCOMES[n] for n in batch["lavender_outcomes"]] == ["matched"]
    assert batch["lavender_present"].sum() == 1
