"""Which words of a conversation are compared: of the user and the assistant, in every turn, at their tokens, with their maps."""

from __future__ import annotations

import copy
import logging
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

import lavender
import lavender.targets.store as store_module
from lavender.batches.chat_template import apply_chat_template
from lavender.batches.collator import Collator
from lavender.config import AlignmentConfig, WordsConfig
from lavender.data.regions import Region
from lavender.data.samples import Conversation, Message, Sample, as_conversation
from lavender.errors import ConfigError, DataError, TargetError
from lavender.images import image_sha256
from lavender.targets.manifest import StoreConfig
from lavender.targets.store import Target, TargetStore, TargetWriter
from lavender.types import OUTCOMES, ROLES, WordMaps
from lavender.words import FUNCTION_WORDS, words_of

from .test_chat_template import NO_PICTURES, PARTS, TEMPLATES, talk, with_template
from .test_conversations import ANSWER, BLUE, GREEN, QUESTION, RED, spoken, store_of

BOTH = WordsConfig(roles=("question", "answer"))
ASKED = talk("<image>\nWhere is the zebra?", "Beside a violin.", " Is the violin red? \n", "No, a blue violin.", "Where?", "Here.")
CAPTION = "A zebra beside a violin."
BOX = (0.25, 0.0, 0.75, 0.5)
SIDE = 8


@pytest.fixture(scope="module")
def own_processor(processor):
    return copy.deepcopy(processor)


def content(text: str) -> list[str]:
    return [w.text for w in words_of(text.replace("<image>", "")) if w.text.casefold() not in FUNCTION_WORDS]


def tokens_by_offsets(processor, text: str, batch, b: int, spans) -> list[list[int]]:
    """The positions of the tokens of some characters of a text, by the tokenizer's own offsets where its pictures are expanded."""
    expanded, shift = text.replace("<image>", "<image>" * 64), len("<image>") * 63
    encoded = processor.tokenizer(expanded, add_special_tokens=False, return_offsets_mapping=True)
    mask = batch["attention_mask"][b].bool()
    assert batch["input_ids"][b][mask].tolist() == encoded.input_ids[: int(mask.sum())]
    first, found = int(mask.int().argmax()), []
    for start, end in spans:
        start, end = (at + shift * text.count("<image>", 0, at) for at in (start, end))
        tokens = []
        for t, (left, right) in enumerate(encoded.offset_mapping):
            letters = [at for at in range(max(left, start), min(right, end)) if not expanded[at].isspace()]
            tokens += [first + t] * bool(letters)
        found.append(tokens)
    return found


def tokens_in(batch, b: int) -> dict[int, list[int]]:
    """The positions of each word's tokens in a batch."""
    tokens, words = batch["lavender_tokens"][b], batch["lavender_token_words"][b]
    return {w: tokens[words == w].tolist() for w in words.unique().tolist() if w >= 0}


def rendered_spans(text: str, messages, aligned) -> list[tuple[int, int]]:
    """The characters of words in a text that shows what messages say, one behind the other."""
    begins, at = {}, 0
    for n, message in enumerate(messages):
        said = message.content.replace("<image>", "").strip()
        at = text.index(said, at)
        begins[n] = at - message.content.index(said)
        at += len(said)
    return [(begins[word.turn] + word.word.start, begins[word.turn] + word.word.end) for word in aligned]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in NO_PICTURES])
def test_words_of_both_roles_stand_where_the_template_shows_them(own_processor, name):
    processor = with_template(own_processor, name)
    processor.tokenizer.padding_side = "left"
    samples = [Conversation("x", (RED,), ASKED), Sample("y", BLUE, QUESTION, ANSWER)]
    collator = Collator(processor, words=BOTH)
    batch = collator(samples)
    for b, sample in enumerate(samples):
        messages = as_conversation(sample).messages
        texts = [message.content for message in messages]
        words = [word for text in texts for word in content(text)]
        aligned = collator.aligned_words(sample)
        assert [word.word.text for word in aligned] == words
        assert [word.turn for word in aligned] == [n for n, text in enumerate(texts) for _ in content(text)]
        assert [word.role for word in aligned] == [("question", "answer")[word.turn % 2] for word in aligned]
        assert [texts[word.turn][word.word.start : word.word.end] for word in aligned] == words
        text = apply_chat_template(processor, as_conversation(sample)).text
        expected = tokens_by_offsets(processor, text, batch, b, rendered_spans(text, messages, aligned))
        assert tokens_in(batch, b) == dict(enumerate(expected))
        ids = [processor.tokenizer(token, add_special_tokens=False).input_ids for word in aligned for token in word.tokens]
        assert all(ids)
        assert ["".join(word.tokens).strip(" .,<?\n>") for word in aligned] == words
        assert batch["lavender_roles"][b, : len(words)].tolist() == [ROLES.index(word.role) for word in aligned]
        assert batch["lavender_present"][b, : len(words)].all()
        assert {w: text.strip(" .,<?\n") for w, text in spoken(processor, batch, b).items()} == dict(enumerate(words))


def test_by_default_the_words_are_those_of_answers(processor):
    collator = Collator(processor)
    sample = Sample("x", RED, QUESTION, ANSWER)
    assert [word.word for word in collator.aligned_words(sample)] == [*Collator.words(ANSWER)]
    batch = collator([sample])
    assert batch["lavender_roles"].tolist() == [[ROLES.index("answer")] * 3]
    asked = Collator(processor, words=WordsConfig(roles="question"))
    assert [(w.role, w.word.text) for w in asked.aligned_words(sample)] == [("question", w) for w in content(QUESTION)]
    unlearned = Conversation("x", (RED,), (ASKED[0], Message("assistant", "A hat.", is_learned=False), *ASKED[2:4]))
    assert [w.turn for w in Collator(processor, words=BOTH).aligned_words(unlearned)] == [0, 2, 2, 3, 3]
    with pytest.raises(ConfigError, match="roles is"):
        WordsConfig(roles=("system",))


def test_words_of_thinking_and_of_the_system_are_none(own_processor):
    processor = with_template(own_processor, "qwen3_5_think_training")
    thought = "<think>\nHm, a hat.\n</think>\n\nA violin."
    messages = (Message("system", "Zebras."), Message("user", "<image>What hat?"), Message("assistant", thought))
    collator = Collator(processor, words=BOTH)
    aligned = collator.aligned_words(Conversation("x", (RED,), messages))
    assert [(word.turn, word.word.text) for word in aligned] == [(1, "hat"), (2, "violin")]
    assert messages[2].content[aligned[1].word.start : aligned[1].word.end] == "violin"
    batch = collator([Conversation("x", (RED,), messages)])
    assert {w: text.strip(".? ") for w, text in spoken(processor, batch, 0).items()} == {0: "hat", 1: "violin"}


SHOUTS = "{% for message in messages %}[" + PARTS.replace("part['text']", "{}") + "]{% endfor %}"


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        (SHOUTS.replace("{}", "(part['text'] | upper if message['role'] == 'user' else part['text'])"), {0, 2}),
        (SHOUTS.replace("{}", "(part['text'] * 2 if message['role'] == 'user' else part['text'])"), {0, 2}),
        (SHOUTS.replace("{}", "('' if message['role'] == 'user' else part['text'])"), {0, 2}),
        ("{{ messages[0]['content'][-1]['text'] }}: " + SHOUTS.replace("{}", "part['text']"), {0}),
        (SHOUTS.replace("{}", "(part['text'] | replace('violin', 'viola') if message['role'] == 'user' else part['text'])"), {2}),
        (SHOUTS.replace("{}", "part['text'] | trim"), set()),
        # Both texts in one message, its pictures first.
        (
            "{% for message in messages %}{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
            "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}|{% endfor %}",
            set(),
        ),
    ],
    ids=["upper", "twice", "silent", "title", "rewritten", "trim", "pictures first"],
)
def test_what_the_user_says_is_found_or_left_out(own_processor, caplog, template, lost):
    """Never at another place; the answers' words are compared all the same."""
    processor = copy.deepcopy(own_processor)
    processor.chat_template = template
    messages = talk("Where <image> is the zebra? ", "Beside a violin.", " Is the violin red?", "No, a blue zebra violin.")
    collator = Collator(processor, words=BOTH)
    aligned = collator.aligned_words(Conversation("x", (RED,), messages))
    assert [word.word.text for word in aligned] == [word for message in messages for word in content(message.content)]
    with caplog.at_level(logging.WARNING, "lavender"):
        batch = collator([Conversation("x", (RED,), messages)])
    found = {w: text.strip(" .,?[]|\n") for w, text in spoken(processor, batch, 0).items()}
    assert found == {w: word.word.text for w, word in enumerate(aligned) if word.turn not in lost}
    assert batch["lavender_present"][0].tolist() == [word.turn not in lost for word in aligned]
    assert all(bool(word.tokens) == (word.turn not in lost) for word in aligned)
    told = [record.getMessage() for record in caplog.records if "once and to the letter" in record.getMessage()]
    assert len(told) == bool(lost)
    if lost:
        assert f"message {min(lost) + 1} once" in told[0]


def test_words_before_the_picture_are_not_compared(processor):
    """Not of the message that shows it either, if they stand before it there."""
    messages = talk("A zebra and a violin?", "No zebra.", "A zebra here <image> and a violin there?", "A hat.")
    collator = Collator(processor, words=BOTH)
    batch = collator([Conversation("x", (RED,), messages)])
    words = [(word.turn, word.word.text) for word in collator.aligned_words(Conversation("x", (RED,), messages))]
    present = [word for word, is_present in zip(words, batch["lavender_present"][0].tolist(), strict=True) if is_present]
    assert present == [(2, "violin"), (3, "hat")]
    asked = Collator(processor, words=WordsConfig(roles=("question",)))([Conversation("y", (RED,), talk("Zebra <image>", "Yes."))])
    assert asked["lavender_outcomes"].tolist() == [2]


def test_questions_of_a_picture_share_its_targets(processor, tmp_path, monkeypatch):
    """Each with an id of its own; the store's pictures are listed once, and not for each sample."""
    store = store_of(tmp_path / "t", {"red.png": (RED, CAPTION), "blue.png": (BLUE, "A hat.")})
    reads = []
    listed = store_module._identities
    monkeypatch.setattr(store_module, "_identities", lambda path: reads.append(path) or listed(path))
    collator = Collator(processor, store, BOTH)
    samples = [Sample(f"q{n}", RED, f"Is there a zebra {n}?", "Yes, a violin.") for n in range(10)]
    batch = collator([*samples, Sample("other", GREEN, "A zebra?", "Yes.")])
    assert [OUTCOMES[n] for n in batch["lavender_outcomes"]] == ["matched"] * 10 + ["no target"]
    assert len(reads) == len(store.shards)
    maps = store["red.png"].word_maps
    for b in range(10):
        found = {text.strip("?.,"): batch["lavender_targets"][b, w].numpy() for w, text in spoken(processor, batch, b).items()}
        assert np.array_equal(found["zebra"], maps["zebra"])
        assert np.array_equal(found["violin"], maps["violin"])
    with pytest.raises(TargetError, match=r"sample 'red.png' in .* were made from another picture than its own"):
        Collator(processor, store, on_error="raise")([Sample("red.png", BLUE, QUESTION, ANSWER)])


def test_of_several_captions_an_answer_takes_its_own_and_other_words_those_of_all(processor, tmp_path):
    captions = ["A zebra beside a zebra.", "A zebra and a violin.", "A violin."]
    maps = [np.random.default_rng(n).random((len(words_of(caption)), SIDE, SIDE), np.float32) for n, caption in enumerate(captions)]
    crop = (0.0, 0.0, 0.5, 1.0)
    with TargetWriter(tmp_path / "t", {"model": "m"}, StoreConfig(map_size=SIDE)) as writer:
        for n, (caption, values) in enumerate(zip(captions, maps, strict=True)):
            writer.add(Target(f"a.png#{n}", image_sha256(RED), WordMaps(caption, words_of(caption), values)))
        writer.add(Target("a.png#3", image_sha256(RED), WordMaps("A violin", words_of("A violin"), maps[2], crop)))
        writer.close()
    store = TargetStore(tmp_path / "t")
    stored = [store[f"a.png#{n}"].word_maps.maps for n in range(3)]
    conversation = talk("A zebra with a violin?", captions[0], "Sure?", "A zebra.")
    batch = Collator(processor, store, BOTH)([Conversation("own", (RED,), conversation)])
    words = [text.strip("?.") for _, text in sorted(spoken(processor, batch, 0).items())]
    assert words == ["zebra", "violin", "zebra", "beside", "zebra", "Sure", "zebra"]
    zebra = np.mean([stored[0][[1, 4]].mean(axis=0), stored[1][1]], axis=0)
    violin = np.mean([stored[1][4], stored[2][1]], axis=0)
    expected = [zebra, violin, stored[0][1], stored[0][2], stored[0][4], None, zebra]
    assert batch["lavender_present"][0].tolist() == [values is not None for values in expected]
    for found, values in zip(batch["lavender_targets"][0].numpy(), expected, strict=True):
        np.testing.assert_allclose(found, 0 if values is None else values, rtol=1e-6)
    # By its id, a sample has one target, and no other caption's.
    batch = Collator(processor, store, BOTH)([Conversation("a.png#0", (RED,), conversation)])
    assert batch["lavender_present"][0].tolist() == [True, False, True, True, True, False, True]


def test_questions_are_chosen_by_the_config_as_answers_are(processor, tmp_path):
    store = store_of(tmp_path / "t", {"x": (RED, "A zebra beside a Violin.")})
    sample = Sample("x", RED, "A violin with a zebra?", "A violin.")

    def present(**config):
        return Collator(processor, store, WordsConfig(roles=("question", "answer"), **config))([sample])[
            "lavender_present"
        ].tolist()

    assert present() == [[True, True, True]]
    assert present(exclude=("zebra",)) == [[True, False, True]]
    assert present(match="exact") == [[False, True, False]]
    assert present(min_coverage=0.99) == [[False] * 3]


def drawn(region: Region, size: int = SIDE, crop=(0.0, 0.0, 1.0, 1.0)) -> np.ndarray:
    (sound,) = as_conversation(Sample("x", RED, QUESTION, ANSWER, regions=(region,))).regions
    return sound.raster(size, crop)


def test_a_region_is_a_word_of_the_batch(processor, tmp_path):
    """In its place, in place of the words that it shares characters with; its map is its own, or the stored one of another word."""
    store = store_of(tmp_path / "t", {"x": (RED, CAPTION)})
    maps = store["x"].word_maps
    answer = "Left, by the violin of it."
    violin = answer.index("violin")
    regions = (
        Region(1, violin, violin + len("violin of"), box=BOX),
        Region(0, points=(0.5, 0.25)),
        Region(1, 0, 4, word="zebra"),
        Region(-1, 0, 4, word=(8, 16)),
        Region(1, role="prompt end", map=np.eye(4)),
    )
    sample = Sample("x", RED, "A zebra?", answer, regions=regions)
    collator = Collator(processor, store, BOTH)
    batch = collator([sample, Sample("y", RED, "A zebra?", "A violin.")])
    aligned = collator.aligned_words(sample)
    assert [(word.turn, word.role, word.word.text) for word in aligned] == [
        (0, "question", "A zebra?"),
        (1, "prompt end", ""),
        (1, "answer", "Left"),
        (1, "answer", "Left"),
        (1, "answer", "violin of"),
    ]
    assert batch["lavender_roles"][0].tolist() == [0, 2, 1, 1, 1]
    assert batch["lavender_present"][0].all()
    first = int(torch.nonzero(batch["labels"][0] >= 0)[0])
    found = tokens_in(batch, 0)
    assert found[1] == [first - 1]
    assert aligned[1].tokens == ("<|assistant|>",)
    assert "".join(aligned[0].tokens) == "Azebra?"
    assert [processor.tokenizer.decode(at) for at in batch["input_ids"][0, found[0]]] == [t.strip() for t in aligned[0].tokens]
    assert processor.tokenizer.decode(batch["input_ids"][0, found[4]]).strip() == "violin of"
    weights = batch["lavender_token_weights"][0][batch["lavender_token_words"][0] == 0]
    torch.testing.assert_close(weights, torch.full((len(found[0]),), 1 / len(found[0])))
    discs = drawn(regions[1])
    expected = [discs / discs.max(), drawn(regions[4]), maps["zebra"], maps["beside"], drawn(regions[0])]
    np.testing.assert_allclose(batch["lavender_targets"][0].numpy(), np.stack(expected), rtol=1e-6)
    assert batch["lavender_present"][1].tolist() == [True, True, False, False, False]
    # Without questions among the roles, a region on one is there all the same.
    answers = Collator(processor, store)
    assert [word.role for word in answers.aligned_words(sample)] == [word.role for word in aligned]


def test_regions_align_without_targets(processor):
    """As a store does: the same keys, outcomes and skipping."""
    collator = Collator(processor, map_size=16)
    region = Region(1, 2, 7, box=BOX)
    samples = [Sample("x", RED, QUESTION, ANSWER, regions=(region,)), Sample("y", BLUE, QUESTION, ANSWER)]
    samples += [Sample("bad", RED, QUESTION, ANSWER, regions=(Region(1, box=(0, 0, 0, 0)),))]
    batch = collator(samples)
    assert [OUTCOMES[n] for n in batch["lavender_outcomes"]] == ["matched", "no target", "skipped"]
    assert batch.keys() == collator(samples[1:2]).keys()
    assert batch["lavender_present"].sum(dim=1).tolist() == [1, 0, 0]
    assert "its boxes are" in collator.skipped["bad"]
    w = int(batch["lavender_present"][0].int().argmax())
    np.testing.assert_array_equal(batch["lavender_targets"][0, w].numpy(), drawn(region, 16))
    assert Collator(processor, map_size=16, on_error="raise").on_error == "raise"
    looked = Collator(processor)(samples[:1])
    assert "lavender_targets" not in looked
    assert looked["lavender_present"].all()
    for size in (0, -2, 1):
        with pytest.raises(ConfigError, match=f"map_size is {size}; it must be at least 2"):
            Collator(processor, map_size=size)
    with pytest.raises(ConfigError, match=r"map_size is 8\.0; expected a whole number"):
        Collator(processor, map_size=8.0)


def test_a_region_is_cut_to_what_the_targets_show(processor, tmp_path, caplog):
    crop = (0.5, 0.0, 1.0, 1.0)
    with TargetWriter(tmp_path / "t", {"model": "m"}, StoreConfig(map_size=SIDE)) as writer:
        values = np.random.default_rng(0).random((len(words_of(CAPTION)), SIDE, SIDE), np.float32)
        writer.add(Target("x", image_sha256(RED), WordMaps(CAPTION, words_of(CAPTION), values, crop)))
        writer.close()
    regions = (Region(1, 2, 7, box=BOX), Region(0, box=(0.0, 0.0, 0.4, 1.0)))
    collator = Collator(processor, TargetStore(tmp_path / "t"))
    with caplog.at_level(logging.WARNING, "lavender"):
        batch = collator([Sample("x", RED, "A zebra?", "A zebra.", regions=regions)])
    assert batch["lavender_present"].tolist() == [[False, True]]
    np.testing.assert_array_equal(batch["lavender_targets"][0, 1].numpy(), drawn(regions[0], SIDE, crop))
    assert "the region of 'A zebra?' in message 1 of sample 'x' is not compared: it lies outside of the part" in caplog.text


@pytest.mark.parametrize(
    ("region", "reason"),
    [
        (Region(1, word="dog"), r"the targets' caption 'A zebra beside a violin\.' has no map for its word 'dog'"),
        (Region(1, word=(90, 95)), r"has no map for its word \(90, 95\)"),
        (Region(0, 0, 5, box=BOX), "its picture does not stand before it"),
    ],
)
def test_a_region_without_a_map_or_a_picture_is_told(processor, tmp_path, caplog, region, reason):
    store = store_of(tmp_path / "t", {"x": (RED, CAPTION)})
    messages = talk("Right here <image>, a zebra?", "Yes.")
    with caplog.at_level(logging.WARNING, "lavender"):
        batch = Collator(processor, store)([Conversation("x", (RED,), messages, regions=(region,))])
    assert batch["lavender_outcomes"].tolist() == [2]
    assert not batch["lavender_present"].any()
    lines = [record.getMessage() for record in caplog.records if "the region of" in record.getMessage()]
    assert len(lines) == 1
    assert re.search(reason, lines[0])


def test_a_sample_compares_with_one_picture(processor, tmp_path):
    talked = talk("<image> and <image>?", "A zebra.")
    both = (Region(1, box=BOX, image=0), Region(1, box=BOX, image=1))
    with pytest.raises(DataError, match="sample 'x' has regions in 2 of its pictures; a sample compares words with one picture"):
        Collator(processor)([Conversation("x", (RED, BLUE), talked, regions=both)])
    columns = [
        Collator(processor)([Conversation("x", (RED, BLUE), talked, regions=(region,))])["lavender_columns"] for region in both
    ]
    assert (columns[0] < columns[1]).all()
    store = store_of(tmp_path / "t", {"x": (RED, CAPTION)})
    strict = Collator(processor, store, on_error="raise")
    assert torch.equal(strict([Conversation("x", (RED, BLUE), talked, regions=both[:1])])["lavender_columns"], columns[0])
    with pytest.raises(DataError, match="'x' has regions in its picture 1, and targets of picture 0; a sample compares"):
        strict([Conversation("x", (RED, BLUE), talked, regions=both[1:])])
    # Targets of another picture are not those of one that is found by its picture.
    by_picture = strict([Conversation("z", (RED, BLUE), talked, regions=both[1:])])
    assert torch.equal(by_picture["lavender_columns"], columns[1])
    assert by_picture["lavender_present"].sum() == 1


def test_a_region_may_be_of_an_answer_that_is_not_learned(processor):
    said = (Message("user", "<image>A hat?"), Message("assistant", "A zebra.", is_learned=False), *talk("Sure?", "Yes."))
    sample = Conversation("x", (RED,), said, regions=(Region(1, 2, 7, box=BOX),))
    collator = Collator(processor, map_size=SIDE)
    batch = collator([sample])
    assert [(word.turn, word.word.text) for word in collator.aligned_words(sample)] == [(1, "zebra"), (3, "Yes")]
    assert spoken(processor, batch, 0)[0] == "zebra"
    assert batch["lavender_present"].tolist() == [[True, False]]
    assert (batch["labels"][0, tokens_in(batch, 0)[0]] == -100).all()


WORDS = st.lists(st.sampled_from(["zebra", "violin", "3.5", "red-haired", "the", "naïve", "x"]), min_size=1, max_size=5)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_said_asked_and_cut_words_and_regions_are_their_tokens(processor, data):
    """Turns, roles, regions, padding and `max_length` in any composition."""
    padded = copy.deepcopy(processor)
    padded.tokenizer.padding_side = data.draw(st.sampled_from(["left", "right"]))
    roles = tuple(data.draw(st.sets(st.sampled_from(["question", "answer"]))))
    texts = [" ".join(data.draw(WORDS)) for _ in range(2 * data.draw(st.integers(1, 3)))]
    messages = talk(f"<image>{texts[0]}", *texts[1:])
    regions = []
    for _ in range(data.draw(st.integers(0, 3))):
        turn = data.draw(st.integers(0, len(texts) - 1))
        kind = data.draw(st.sampled_from(["whole", "span", "end"]))
        if kind == "end":
            regions.append(Region(turn | 1, role="prompt end", box=BOX))
        elif kind == "whole":
            regions.append(Region(turn, box=BOX))
        else:
            shift = len("<image>") * (turn == 0)
            start = data.draw(st.sampled_from([at for at, letter in enumerate(texts[turn]) if not letter.isspace()]))
            end = data.draw(st.integers(start + 1, len(texts[turn])))
            regions.append(Region(turn, shift + start, shift + end, box=BOX))
    sample = Conversation("x", (RED,), messages, regions=tuple(regions))
    samples, config = [sample, Sample("y", BLUE, QUESTION, ANSWER)], WordsConfig(roles=roles)
    whole = Collator(padded, words=config)(samples)
    aligned = Collator(padded, words=config).aligned_words(sample)
    text = apply_chat_template(padded, as_conversation(sample)).text
    expected = tokens_by_offsets(padded, text, whole, 0, rendered_spans(text, messages, aligned))
    starts = [int(at) for at in torch.nonzero(whole["labels"][0] >= 0) if whole["labels"][0, at - 1] < 0]
    for w, word in enumerate(aligned):
        if word.role == "prompt end":
            expected[w] = [starts[word.turn // 2] - 1]
    assert tokens_in(whole, 0) == {w: tokens for w, tokens in enumerate(expected) if tokens}
    assert whole["lavender_present"][0, : len(aligned)].tolist() == [bool(tokens) for tokens in expected]
    # Each word of a role is there or gives way to a region, which are all there.
    begins = [len("<image>"), *[0] * len(texts)]
    spans = [
        (r.turn, begins[r.turn] if r.start is None else r.start, r.end or begins[r.turn] + len(texts[r.turn]))
        for r in regions
        if r.role is None
    ]
    kept = [
        (n, word.start + begins[n], word.end + begins[n])
        for n, text in enumerate(texts)
        for word in words_of(text)
        if ("question", "answer")[n % 2] in roles and word.text not in FUNCTION_WORDS
    ]
    kept = [
        (n, *word) for n, *word in kept if not any(n == turn and word[0] < end and start < word[1] for turn, start, end in spans)
    ]
    assert sorted(kept + spans) == sorted((w.turn, w.word.start, w.word.end) for w in aligned if w.role != "prompt end")
    assert len(aligned) == len(kept) + len(regions)
    # Cut, words that are left are at the same tokens, and the others are not there.
    lengths = whole["attention_mask"].sum(dim=1)
    least = int(torch.nonzero(whole["input_ids"] == padded.image_token_id)[:, 1].max()) + 1
    max_length = data.draw(st.integers(least, int(lengths.max()) + 1))
    cut = Collator(padded, words=config, max_length=max_length)(samples)
    ids = {w: whole["input_ids"][0, tokens] for w, tokens in tokens_in(whole, 0).items()}
    found = tokens_in(cut, 0)
    begin = int(whole["attention_mask"][0].int().argmax())
    ends = {w: max(tokens) - begin + (aligned[w].role == "prompt end") for w, tokens in tokens_in(whole, 0).items()}
    assert found.keys() == {w for w, end in ends.items() if end < max_length}
    assert all(torch.equal(cut["input_ids"][0, tokens], ids[w]) for w, tokens in found.items())


def by_definition(model, batch, config) -> torch.Tensor:
    """The alignment loss in float64 from what eager attention returns, in which an even look at 64 places is one at each."""
    words, present = batch["lavender_token_words"], batch["lavender_present"]
    inputs = {key: value for key, value in batch.items() if not key.startswith("lavender")}
    weights = 64 * torch.stack(model(**inputs, output_attentions=True).attentions).double().mean(dim=(0, 2))
    losses = []
    for b, w in torch.nonzero(present).tolist():
        rows = config.question_rows if batch["lavender_roles"][b, w] == ROLES.index("question") else config.rows
        shift = 1 if rows == "predicts" and batch["lavender_roles"][b, w] != ROLES.index("prompt end") else 0
        rows = weights[b, batch["lavender_tokens"][b][words[b] == w] - shift][:, batch["lavender_columns"][b]]
        losses.append((rows.mean(dim=0).view(8, 8) - batch["lavender_targets"][b, w].double()).square().mean())
    return torch.stack(losses).mean()


@pytest.fixture
def aligned_batch(processor, tmp_path):
    store = store_of(tmp_path / "t", {"x": (RED, CAPTION), "y": (BLUE, "A hat.")})
    asked = Conversation("q", (RED,), ASKED, regions=(Region(3, role="prompt end", word="zebra"), Region(5, box=BOX)))
    samples = [asked, Sample("a", RED, "A zebra beside it?", "Yes, a violin.", regions=(Region(1, 0, 3, points=(0.5, 0.5)),))]
    return store, [*samples, Sample("b", BLUE, "A hat?", "No zebra.")]


def test_loss_and_gradients_are_the_definitions(student: LlavaForConditionalGeneration, processor, aligned_batch):
    store, samples = aligned_batch
    batch = Collator(processor, store, BOTH, model_config=student.config)(samples)
    assert set(batch["lavender_roles"][batch["lavender_present"]].tolist()) == {0, 1, 2}
    student.double().set_attn_implementation("eager")
    config = AlignmentConfig(weight=3.0, rows="predicts", question_rows="reads", aligner="identity", normalization="none")
    batch["pixel_values"] = batch["pixel_values"].double()
    expected = by_definition(student, batch, config)
    plain = student(**{key: value for key, value in batch.items() if not key.startswith("lavender")}).loss
    (plain + 3.0 * expected).backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    with lavender.patch(student, config) as patch:
        loss = student(**batch).loss
        loss.backward()
        torch.testing.assert_close(loss.double(), plain + 3.0 * expected, rtol=1e-6, atol=0)
        assert patch.last.loss > 0
    bound = 1e-6 * max(float(gradient.abs().max()) for gradient in gradients.values())  # the model's own loss is float32's
    for name, gradient in gradients.items():
        torch.testing.assert_close(student.get_parameter(name).grad, gradient, rtol=1e-5, atol=bound, msg=name)


def test_a_trainer_and_trls_take_rows_with_regions(student, processor, aligned_batch, tmp_path):
    """Rows of datasets, as `SFTTrainer` hands them to a collator of one's own; each step's loss is the definition's."""
    from datasets import Dataset, Image, List
    from trl import SFTConfig, SFTTrainer

    store, _ = aligned_batch
    regions = [{"turn": 1, "start": 0, "end": 3, "box": [0.0, 0.0, 0.5, 0.5]}, {"turn": 1, "role": "prompt end", "word": "zebra"}]
    prompt, completion = (
        [{"role": role, "content": text}] for role, text in (("user", "A zebra?"), ("assistant", "Yes, a violin."))
    )
    rows = [{"images": [RED], "prompt": prompt, "completion": completion, "regions": regions}] * 4
    dataset = Dataset.from_list(rows).cast_column("images", List(Image()))
    collator = Collator(processor, store, BOTH, model_config=student.config)
    eager = copy.deepcopy(student).double()  # no step changes a weight
    eager.set_attn_implementation("eager")
    seen = []

    def noted(samples):
        seen.append(collator(samples))
        return seen[-1]

    settings = {
        "max_steps": 1, "per_device_train_batch_size": 2, "remove_unused_columns": False, "report_to": [], "disable_tqdm": True,
        "save_strategy": "no", "learning_rate": 0.0, "use_cpu": True, "bf16": False,
    }  # fmt: skip
    kwargs = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
    makers = [
        (Trainer, TrainingArguments(tmp_path / "a", **settings), {}),
        (SFTTrainer, SFTConfig(tmp_path / "b", **settings, **kwargs), {"processing_class": processor}),
    ]
    config = AlignmentConfig(weight=3.0, rows="predicts", question_rows="reads", aligner="identity", normalization="none")
    for kind, arguments, more in makers:
        with lavender.patch(student, config) as patch:
            trainer = kind(model=student, args=arguments, train_dataset=dataset, data_collator=noted, **more)
            trainer.train()
            assert patch.last.outcomes.tolist() == [2, 0, 0, 0, 0]
            last = patch.last.loss.detach()
        batch = seen[-1]
        assert batch["lavender_roles"].tolist() == [[0, 2, 1, 1]] * 2
        assert batch["lavender_present"].all()
        with torch.no_grad():
            expected = by_definition(eager, batch | {"pixel_values": batch["pixel_values"].double()}, config)
        torch.testing.assert_close(last.double(), expected, rtol=1e-4, atol=0)
