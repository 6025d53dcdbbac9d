"""Conversations become batches: every form of them, every answer labelled, the words of answers compared, cut where too long."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import lavender
from lavender.batches.collator import Collator
from lavender.config import AlignmentConfig, WordsConfig
from lavender.data.samples import Conversation, Message, Sample, as_conversation
from lavender.errors import ConfigError, DataError, TargetError
from lavender.images import image_sha256
from lavender.targets.manifest import StoreConfig
from lavender.targets.store import Target, TargetStore, TargetWriter
from lavender.types import OUTCOMES, ROLES, WordMaps
from lavender.words import words_of

RED, BLUE, GREEN = (Image.new("RGB", (64, 64), color) for color in ("red", "blue", "green"))
QUESTION, ANSWER = "What is in the picture?", "A zebra beside a violin."
TURNS = (
    Message("user", "<image>\nWhat is this?"),
    Message("assistant", "A red zebra."),
    Message("user", "And this?\n<image>"),
    Message("assistant", "A blue zebra, quite blue."),
    Message("user", "Thanks, and the zebra?"),
)


def with_template(processor, change):
    own = copy.deepcopy(processor)
    own.chat_template = change(own.chat_template)
    return own


def labelled(processor, row: torch.Tensor) -> list[str]:
    """The texts of each run of labels."""
    at = torch.nonzero(row >= 0).flatten().tolist()
    runs = [[]]
    for before, place in zip([None, *at], at, strict=False):
        if before is not None and place != before + 1:
            runs.append([])
        runs[-1].append(int(row[place]))
    return [processor.tokenizer.decode(run) for run in runs]


def spoken(processor, batch, b: int) -> dict[int, str]:
    """The text of each word's tokens in a batch."""
    found = {}
    for w in batch["lavender_token_words"][b].unique().tolist():
        if w >= 0:
            at = batch["lavender_tokens"][b][batch["lavender_token_words"][b] == w]
            found[w] = processor.tokenizer.decode(batch["input_ids"][b][at]).strip()
    return found


def store_of(folder, targets: dict[str, tuple[Image.Image, str]], maps=None) -> TargetStore:
    """Targets by sample id from pictures and captions; `maps` [W, 8, 8] are random by default."""
    writer = TargetWriter(folder, {"model": "m", "weights": "w"}, StoreConfig(map_size=8))
    for sample_id, (image, caption) in targets.items():
        words = words_of(caption)
        own = np.random.default_rng(0).random((len(words), 8, 8)).astype(np.float16) if maps is None else maps
        writer.add(Target(sample_id, image_sha256(image), WordMaps(caption, words, own.astype(np.float32))))
    writer.close()
    return TargetStore(folder)


SAME = [
    {"id": "x", "image": RED, "question": QUESTION, "answer": ANSWER},
    Conversation("x", (RED,), (Message("user", QUESTION), Message("assistant", ANSWER))),
    Conversation("x", (RED,), (Message("user", f"<image>\n{QUESTION}"), Message("assistant", ANSWER))),
    {"id": "x", "images": [RED], "messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
    {
        "id": "x",
        "image": RED,
        "conversations": [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}],
    },
    {
        "id": "x",
        "images": [RED],
        "messages": [
            # As a table of messages has them: columns that do not apply are None.
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}], "from": None},
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER}], "from": None},
        ],
        "conversations": None,
        "question": None,
    },
]


@pytest.mark.parametrize("form", SAME, ids=lambda form: type(form).__name__)
def test_every_form_of_a_sample_is_the_same_batch(processor, form):
    expected = Collator(processor)([Sample("x", RED, QUESTION, ANSWER)])
    batch = Collator(processor)([form])
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(batch[key], value, rtol=0, atol=0, equal_nan=True)


def test_pictures_stand_where_their_places_are_and_else_before_the_first_user():
    turns = (Message("system", "Be brief. <image>"), Message("user", "Which one?"), Message("assistant", "That."))
    turns += (Message("user", "<image> And this?"), Message("assistant", "No."))
    conversation = as_conversation(Conversation("x", (RED, BLUE, GREEN), turns))
    assert [message.content for message in conversation.messages] == [
        "Be brief. <image>",
        "<image>Which one?",
        "That.",
        "<image> And this?",
        "No.",
    ]
    assert conversation.images == (RED, GREEN, BLUE)
    again = as_conversation(conversation)
    assert (again.images, again.messages) == (conversation.images, conversation.messages)


def test_labels_are_the_assistants_texts_with_what_closes_them(processor):
    system = Message("system", "Zebras only.")
    batch = Collator(processor)([Conversation("x", (RED, BLUE), (system, *TURNS)), Sample("y", RED, QUESTION, ANSWER)])
    end = processor.tokenizer.eos_token
    assert labelled(processor, batch["labels"][0]) == [f"A red zebra.{end}", f"A blue zebra, quite blue.{end}"]
    assert labelled(processor, batch["labels"][1]) == [f"{ANSWER}{end}"]
    kept = batch["labels"] >= 0
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    text = processor.tokenizer.decode(batch["input_ids"][0]).replace("<image>" * 64, "<image>")
    assert text.startswith(
        "<s><|system|>Zebras only.<|user|><image>What is this?<|assistant|>A red zebra.</s><|user|>And this?<image>"
    )


def test_a_token_that_opens_the_next_turn_is_no_label(processor):
    """The answer's last character is the next turn's first token's, as with templates that only put spaces between turns."""
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}the user: {% endif %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    )
    spaced = with_template(processor, lambda _: template)
    assert len(processor.tokenizer(" the", add_special_tokens=False).input_ids) == 1
    batch = Collator(spaced)([Conversation("x", (RED, BLUE), TURNS[:4])])
    assert labelled(processor, batch["labels"][0]) == ["A red zebra.", "A blue zebra, quite blue. "]


def test_a_template_that_leaves_an_answer_out_is_refused(processor):
    """What was said before the last answer is replaced."""
    change = "('Hm.' if message['role'] == 'assistant' and message != messages[-1] else part['text'])"
    unstable = with_template(processor, lambda template: template.replace("part['text']", change))
    assert unstable.chat_template != processor.chat_template
    with pytest.raises(DataError, match=r"sample 'x': the answers cannot be found .* shows message 2 \(assistant\) 0 times"):
        Collator(unstable)([Conversation("x", (RED, BLUE), TURNS)])
    assert (Collator(unstable)([Sample("y", RED, QUESTION, ANSWER)])["labels"] >= 0).any(), "one answer is found all the same"


def test_a_template_may_close_the_last_answer_otherwise(processor):
    end = processor.tokenizer.eos_token
    last = with_template(processor, lambda t: t.replace("{{ eos_token }}", "{% if loop.last %}{{ eos_token }}{% endif %}"))
    batch = Collator(last)([Conversation("x", (RED, BLUE), TURNS[:4]), Conversation("y", (RED, BLUE), TURNS)])
    assert labelled(processor, batch["labels"][0]) == ["A red zebra.", f"A blue zebra, quite blue.{end}"]
    assert labelled(processor, batch["labels"][1]) == ["A red zebra.", "A blue zebra, quite blue."]


def test_templates_that_refuse_a_conversation_are_told(processor):
    strict = with_template(processor, lambda t: "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + t)
    with pytest.raises(DataError, match=r"sample 'x': the chat template refuses the conversation \(one turn\)"):
        Collator(strict)([Conversation("x", (RED, BLUE), TURNS)])
    Collator(strict)([Sample("y", RED, QUESTION, ANSWER)])
    plain = with_template(processor, lambda _: "{% for message in messages %}{{ message['content'] + 1 }}{% endfor %}")
    with pytest.raises(DataError, match=r"sample 'y': the chat template refuses the conversation \(can only concatenate str"):
        Collator(plain)([Sample("y", RED, QUESTION, ANSWER)])


def test_a_picture_may_be_all_that_the_user_says(processor):
    """Some templates look at a message's first part, whatever it is."""
    first = with_template(
        processor, lambda t: t.replace("{% for part in", "{% if message['content'][0]['type'] %}{% endif %}{% for part in")
    )
    silent = (Message("user", "<image>"), Message("assistant", "A zebra."), Message("user", ""), Message("assistant", "A violin."))
    end = processor.tokenizer.eos_token
    batch = Collator(first)([Conversation("x", (RED,), silent)])
    assert labelled(processor, batch["labels"][0]) == [f"A zebra.{end}", f"A violin.{end}"]


ASK, REPLY = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}


def talk(*messages, **more):
    return {"id": "x", "images": [RED], "messages": list(messages)} | more


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (7, "a sample is a int; expected a Sample, a Conversation or a mapping"),
        ({"id": "x", "image": RED, "caption": "A cat."}, "a sample lacks question, answer; it has id, image, caption"),
        (talk(ASK, REPLY, id=None), 'a sample has no "id"'),
        (talk(ASK, REPLY, messages="hello"), "'x': its messages are a str; expected a list"),
        (talk(ASK, REPLY, image=RED), '\'x\' has both "image" and "images"'),
        (talk("hello"), "'x', message 1 is a str; expected a mapping"),
        (talk({"role": "tool", "content": "5"}, REPLY), "'x', message 1 has the role 'tool'; expected system, user or assistant"),
        (talk(ASK), "'x' has no message of the assistant"),
        (talk(), "'x' has no message of the assistant"),
        (talk(REPLY, ASK), "'x' begins with a message of the assistant"),
        (talk(ASK, {"role": "assistant", "content": " \n"}), "'x' has an empty answer"),
        (talk(ASK, {"role": "assistant", "content": None}), "'x', message 2 says a NoneType; expected a text"),
        (talk(ASK, {"role": "assistant", "content": "\ud83d"}), "'x', message 2 of the assistant is no valid Unicode"),
        (talk(ASK, {"role": "assistant", "content": "An <image>."}), "'x', message 2: the answer holds '<image>'"),
        (talk({"role": "user", "content": "<image><image>"}, REPLY), "'x' has 2 times '<image>' but 1 pictures"),
        (talk({"role": "system", "content": "Be brief."}, REPLY), "'x' has 1 pictures but no message of the user"),
        (talk({"role": "user", "content": [{"type": "video"}]}, REPLY), "'x', message 1 has a part {'type': 'video'}; expected"),
        (talk({"role": "user", "content": ["What?"]}, REPLY), "'x', message 1 has a part 'What\\?'; expected"),
        (talk({"role": "user", "content": [{"type": "image", "url": "a.jpg"}]}, REPLY), "holds a picture under 'url'"),
        (talk({"role": "user", "content": [{"type": "text", "text": "<image>?"}]}, REPLY), "a text holds '<image>'"),
        (talk(ASK, REPLY, images=["nowhere.png"]), "sample 'x': there is no image at nowhere.png"),
        (talk(ASK, REPLY, images=[[1]]), "sample 'x': an image is a list; expected a path"),
        (Sample("x", RED, "What is <image>?", ANSWER), "'x': the question holds '<image>', which stands for the picture"),
        (Sample("x", RED, QUESTION, "<image>"), "'x': the answer holds '<image>', which stands for the picture"),
        (Sample("x", RED, QUESTION, ""), "'x' has an empty answer"),
        (Sample("x", RED, 5, ANSWER), "'x', message 1 says a int; expected a text"),
    ],
)
def test_wrong_samples_are_told_what_is_wrong(processor, sample, message):
    with pytest.raises(DataError, match=message):
        Collator(processor)([Sample("fine", RED, QUESTION, ANSWER), sample])


def test_the_processors_own_placeholder_is_refused_in_texts(processor):
    own = copy.deepcopy(processor)
    own.image_token = "<s>"
    asked = Conversation("x", (RED,), (Message("user", "<image> What is <s>?"), Message("assistant", ANSWER)))
    with pytest.raises(DataError, match=r"'x': message 1 \(user\) holds '<s>', which stands for the picture; .* write '<image>'"):
        Collator(own)([asked])


def test_what_the_processor_does_not_take_is_told(processor):
    """The template forgets the pictures."""
    blind = with_template(processor, lambda template: template.replace("<image>", ""))
    with pytest.raises(DataError, match=r"samples 'x', 'y': LlavaProcessor does not take them .*<image>"):
        Collator(blind)([Sample(name, RED, QUESTION, ANSWER) for name in "xy"])


@pytest.mark.parametrize("max_length", [0, -3])
def test_a_wrong_length_is_refused(processor, max_length):
    with pytest.raises(ConfigError, match=f"max_length is {max_length}; it must be at least 1"):
        Collator(processor, max_length=max_length)


def test_the_words_compared_are_those_of_every_answer(processor, tmp_path):
    """In the answer that is the caption of the target each has its own map; in the others the map of the same word."""
    caption = TURNS[1].content
    store = store_of(tmp_path / "t", {"known": (RED, caption), "other": (BLUE, "A violin and a zebra.")})
    samples = [Conversation(name, (RED, BLUE), TURNS) for name in ("known", "other")]
    batch = Collator(processor, store)([*samples, Conversation("none", (GREEN, GREEN), TURNS)])
    words = {0: "red", 1: "zebra", 2: "blue", 3: "zebra", 4: "quite", 5: "blue"}
    assert [spoken(processor, batch, b) for b in range(3)] == [words] * 3
    answers = [processor.tokenizer("<|assistant|>", add_special_tokens=False).input_ids[0]] * 2
    starts = torch.nonzero(batch["input_ids"] == answers[0])[:, 1].view(3, 2)
    tokens, of_first = batch["lavender_tokens"], batch["lavender_token_words"] < 2
    for b in range(3):
        assert (tokens[b][of_first[b]] < starts[b, 1]).all()
        assert (tokens[b][~of_first[b]] > starts[b, 1]).all()
    # The second picture stands behind the first answer.
    present = [[True, True, False, True, False, False], [False, False, False, True, False, False], [False] * 6]
    assert batch["lavender_present"].tolist() == present
    assert batch["lavender_roles"].tolist() == [[ROLES.index("answer")] * 6] * 3
    expected = dict(zip((w.text for w in words_of(caption)), store["known"].word_maps.maps, strict=True))
    assert np.array_equal(batch["lavender_targets"][0, 0].numpy(), expected["red"])
    for w in (1, 3):
        assert np.array_equal(batch["lavender_targets"][0, w].numpy(), expected["zebra"])
    assert np.array_equal(batch["lavender_targets"][1, 3].numpy(), store["other"].word_maps["zebra"])
    assert (batch["lavender_targets"][~batch["lavender_present"]] == 0).all()
    assert [OUTCOMES[n] for n in batch["lavender_outcomes"]] == ["matched", "matched", "no target"]


def test_the_picture_is_the_targets_or_the_last_before_the_answer(processor, tmp_path):
    store = store_of(tmp_path / "t", {"first": (RED, ANSWER), "second": (BLUE, TURNS[3].content)})
    later = Conversation(
        "x", (RED, BLUE), (Message("user", "<image> What?"), Message("assistant", ANSWER), Message("user", "<image>"))
    )
    batch = Collator(processor, store)(
        [
            Conversation("first", (RED, BLUE), TURNS),
            Conversation("second", (RED, BLUE), TURNS),
            Conversation("x", (RED, BLUE), TURNS),
        ]
    )
    image_tokens = torch.nonzero(batch["input_ids"][0] == processor.image_token_id).flatten()
    assert torch.equal(batch["lavender_columns"], torch.stack([image_tokens[:64], image_tokens[64:], image_tokens[64:]]))
    batch = Collator(processor)([later])
    assert torch.equal(batch["lavender_columns"][0], image_tokens[:64] - (image_tokens[0] - batch["lavender_columns"][0, 0]))
    assert batch["lavender_outcomes"].tolist() == [0]
    with pytest.raises(TargetError, match=r"sample 'first' in .* were made from another picture than its own"):
        Collator(processor, store, on_error="raise")([Sample("first", BLUE, QUESTION, ANSWER)])


def test_an_answer_before_the_targets_picture_compares_nothing(processor, tmp_path, caplog):
    store = store_of(tmp_path / "t", dict.fromkeys("xy", (BLUE, TURNS[1].content)))
    batch = Collator(processor, store)([Conversation("x", (RED, BLUE), TURNS[:3]), Conversation("y", (RED, BLUE), TURNS)])
    assert not batch["lavender_present"][0].any()
    assert batch["lavender_outcomes"].tolist() == [2, 0]
    assert "no picture stands before its answer" in caplog.text
    assert batch["lavender_present"][1].tolist() == [False, False, False, True, False, False], "the zebra behind it"


def test_words_are_chosen_by_their_config(processor, tmp_path):
    """Left out by name, by too sparse a target, and by how exactly it is the caption's word."""
    caption = "A zebra beside a Violin."
    maps = np.zeros((5, 8, 8), np.float16)
    maps[:, 0, 0] = maps[4] = 1  # the violin is everywhere, all else at one place
    maps[4, 7, 7] = 0
    store = store_of(tmp_path / "t", {"x": (RED, caption)}, maps)

    def present(**config):
        batch = Collator(processor, store, WordsConfig(**config))([Sample("x", RED, QUESTION, ANSWER)])
        return dict(zip(("zebra", "beside", "violin"), batch["lavender_present"][0].tolist(), strict=True)), batch

    assert present()[0] == {"zebra": True, "beside": True, "violin": True}
    assert present(exclude=("Beside",))[0] == {"zebra": True, "beside": False, "violin": True}
    assert present(min_coverage=0.1)[0] == {"zebra": False, "beside": False, "violin": True}
    assert present(match="exact")[0] == {"zebra": True, "beside": True, "violin": False}
    nothing, batch = present(exclude=("zebra", "beside", "violin"))
    assert not any(nothing.values())
    assert batch["lavender_outcomes"].tolist() == [2]


def test_every_outcome_is_counted_and_told_once(processor, tmp_path, caplog):
    store = store_of(tmp_path / "t", dict.fromkeys(("good", "empty", "empty2", "long"), (RED, "A zebra and a violin.")))
    long = Sample("long", RED, "very " * 20 + QUESTION, "Yes, yes, yes: a zebra.")
    max_length = int(Collator(processor)([long])["lavender_tokens"].max())  # up to the zebra's last token
    collator = Collator(processor, store, max_length=max_length)
    samples = [
        Sample("good", RED, QUESTION, "The zebra."),
        Sample("none", GREEN, QUESTION, "The zebra."),
        Sample("empty", RED, QUESTION, "A dog."),
        long,
        Sample("none2", GREEN, QUESTION, "The zebra."),
        Sample("empty2", RED, QUESTION, "A dog."),
    ]
    with caplog.at_level(logging.WARNING, "lavender"):
        outcomes = [collator(samples)["lavender_outcomes"].tolist() for _ in range(2)]
    assert outcomes == [[0, 1, 2, 3, 1, 2]] * 2
    told = [record.getMessage() for record in caplog.records if record.name == "lavender"]
    assert len(told) == 3
    assert "sample 'none' has no target" in told[0]
    assert "no word of sample 'empty' is compared: its answer is 'A dog.', and its target was made from 'A zebra" in told[1]
    assert f"max_length={max_length} cuts the answer of sample 'long' off before its words; raise it" in told[2]
    plain = Collator(processor, max_length=max_length)([samples[1], Sample("y", RED, QUESTION, "It is."), long])
    assert plain["lavender_outcomes"].tolist() == [0, 2, 0]
    assert plain["lavender_present"][2].any(), "without targets, any word is compared"
    assert "lavender_targets" not in plain


def test_a_picture_is_never_cut(processor):
    samples = [Sample("short", RED, QUESTION, ANSWER), Conversation("x", (RED, BLUE), TURNS)]
    whole = Collator(processor)(samples)
    length = int(whole["attention_mask"][1].sum())
    end = int(torch.nonzero(whole["input_ids"][1] == processor.image_token_id).max()) + 1
    with pytest.raises(DataError, match=f"'x' has {length} tokens, its pictures reach to the {end}th, and max_length is {end - 1}"):
        Collator(processor, max_length=end - 1)(samples)
    cut = Collator(processor, max_length=end)(samples)
    assert cut["input_ids"].shape[1] == end
    assert torch.equal(cut["lavender_columns"], whole["lavender_columns"])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_cut_words_are_their_tokens_and_labels_are_answers(processor, data):
    """Sequences of every length, padded left and right: what is left is right, and what is there is not left out."""
    padded = copy.deepcopy(processor)
    padded.tokenizer.padding_side = side = data.draw(st.sampled_from(["left", "right"]))
    words = st.lists(st.sampled_from(["zebra", "violin", "3.5", "red-haired", "the", "naïve", "x"]), min_size=1, max_size=6)
    turns = [TURNS[0]]
    for _ in range(data.draw(st.integers(1, 3))):
        turns += [Message("assistant", " ".join(data.draw(words)) + "."), Message("user", " ".join(data.draw(words)))]
    samples = [Conversation("x", (RED,), tuple(turns)), Sample("y", BLUE, QUESTION, ANSWER)]
    whole = Collator(padded)(samples)
    lengths = whole["attention_mask"].sum(dim=1).tolist()
    first = [int(torch.nonzero(row == padded.image_token_id).max()) for row in whole["input_ids"]]
    starts = [length - whole["input_ids"].shape[1] if side == "left" else 0 for length in lengths]
    least = max(at + start for at, start in zip(first, starts, strict=True)) + 1
    max_length = data.draw(st.integers(least, max(lengths) + 1))
    batch = Collator(padded, max_length=max_length)(samples)
    for b in range(2):
        kept = min(lengths[b], max_length)
        real = batch["attention_mask"][b].bool()
        before = whole["attention_mask"][b].bool()
        for key in ("input_ids", "labels"):
            assert torch.equal(batch[key][b][real], whole[key][b][before][:kept])
        assert (batch["labels"][b][~real] == -100).all()
        answer = as_conversation(samples[b]).messages
        expected = [w.text for m in answer if m.role == "assistant" for w in Collator.words(m.content)]
        found = spoken(padded, batch, b)
        present = batch["lavender_present"][b]
        assert {w: expected[w] for w in found} == found
        assert set(torch.nonzero(present).flatten().tolist()) == set(found)
        ends = {
            w: int(whole["lavender_tokens"][b][whole["lavender_token_words"][b] == w].max()) + starts[b]
            for w in range(len(expected))
        }
        assert set(found) == {w for w, end in ends.items() if end < max_length}
        outcome = 0 if found else 3 if expected else 2
        assert batch["lavender_outcomes"][b] == outcome


def test_a_sample_whose_answers_are_all_cut_goes_on_without_labels(processor):
    sample = Sample("x", RED, "very " * 20 + QUESTION, ANSWER)
    batch = Collator(processor, max_length=70)([sample])
    assert (batch["labels"] == -100).all()
    assert batch["lavender_outcomes"].tolist() == [3]
    assert (batch["lavender_tokens"] == -1).all()
    assert (batch["lavender_columns"] >= 0).all()


def test_a_trainer_takes_conversations_through_workers(student, processor, tmp_path):
    from transformers import Trainer, TrainingArguments

    import lavender
    from lavender.config import AlignmentConfig

    store = store_of(tmp_path / "t", {str(n): (BLUE, TURNS[3].content) for n in range(3)})
    samples = [Conversation(str(n), (RED, BLUE if n < 3 else GREEN), TURNS) for n in range(4)]
    arguments = TrainingArguments(
        tmp_path / "o", max_steps=1, per_device_train_batch_size=4, remove_unused_columns=False, report_to=[], disable_tqdm=True,
        save_strategy="no", dataloader_num_workers=1, max_grad_norm=1.0,
    )  # fmt: skip
    collator = Collator(processor, store, model_config=student.config, max_length=200)
    before = student.model.language_model.layers[0].self_attn.q_proj.weight.clone()
    with lavender.patch(student, AlignmentConfig(weight=1.0, aligner="sim")) as patch:
        Trainer(model=student, args=arguments, train_dataset=samples, data_collator=collator).train()
        assert patch.last.outcomes.tolist() == [3, 1, 0, 0, 0]
        assert patch.last.loss > 0
    assert not torch.equal(student.model.language_model.layers[0].self_attn.q_proj.weight, before)


def test_a_batch_that_is_cut_off_entirely_harms_no_weight(student, processor, samples):
    """The model's mean over no label is NaN; its gradient is zero all the same, and the Trainer's log leaves such losses out."""
    prompt = Collator(processor)(samples[:1])["labels"][0].ne(-100).int().argmax()
    batch = Collator(processor, max_length=int(prompt))(samples[:1])
    assert (batch["labels"] == -100).all()
    assert batch["lavender_outcomes"].tolist() == [3]
    targets = torch.zeros(*batch["lavender_present"].shape, 8, 8)
    with lavender.patch(student.train(), AlignmentConfig(weight=10.0, aligner="sim")):
        student(**batch, lavender_targets=targets).loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())
