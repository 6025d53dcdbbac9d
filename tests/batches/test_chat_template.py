"""Answers in what chat templates make of conversations: all templates that TRL ships, by transformers' marks and by TRL."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template
from trl.data_utils import apply_chat_template as trl_apply_chat_template

from lavender.batches.chat_template import ChatText, apply_chat_template
from lavender.batches.collator import Collator
from lavender.data.samples import PLACEHOLDER, Conversation, Message
from lavender.errors import DataError

from .test_conversations import labelled, spoken

TEMPLATES = {path.stem: path.read_text() for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
MARKED = [name for name, template in TEMPLATES.items() if re.search(r"{%-? *generation", template)]
PICTURES = ["<|vision_start|><|image_pad|><|vision_end|>", "<start_of_image>", "<|image|>", "<|patch|>", "<image>"]
"""What they write for a picture."""
THOUGHT = "<think>\nHm, a hat.\n</think>\n\n"
UNFOUND = {("glm4moe", "thinking alone"), ("glm4moe_training", "thinking alone")}
"""What has no answer is rendered in a form of its own."""
NO_PICTURES = {"glm4moe", "glm4moe_training"}
"""They take parts, and leave pictures out."""
RED = Image.new("RGB", (64, 64), "red")


def talk(*texts: str) -> tuple[Message, ...]:
    """What the user and the assistant say in turn."""
    return tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts))


ONE = talk("What is it?", "A blue zebra.")
THREE = talk("What is it?", "A zebra.", "A zebra.", "A zebra beside a zebra.", "And now?", "A zebra.")
TALKS = {
    "one": ONE,
    "three": THREE,
    "question last": THREE[:5],
    "white space": talk(" What? \n", " A zebra. \n", "\nAnd?", "A hat.\n\n", "And?\t", "  No.  "),
    "thinking": talk("What?", f"{THOUGHT}A zebra.", "And?", f"{THOUGHT}No zebra."),
    "one thought": talk("What?", f"{THOUGHT}A zebra."),
    "thinking alone": talk("What?", "<think>\nHm.\n</think>", "And?", "A hat."),
    "look-alikes": talk(
        "{{ messages }} {% if x %}", 'Say \ue000"0:1\ue001, <think and {{ eos_token }}.',
        "[/INST]", "'text': '[/INST]'}]", "<|im_end|>", "user",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def own_processor(processor):
    return copy.deepcopy(processor)


def with_template(processor: Any, name: str) -> Any:
    """A processor with a template of TRL's, whose pictures are this processor's."""
    template = TEMPLATES[name]
    for picture in PICTURES:
        template = template.replace(picture, processor.image_token)
    processor.chat_template = template
    return processor


def render(processor: Any, messages: Sequence[Message], **options: Any) -> tuple[str, list[tuple[int, int]], list[dict]]:
    """A conversation as text by transformers, what its marks say of it, and the messages in the form that the template takes."""
    forms = (
        lambda text: [{"type": "image"}] * text.count(PLACEHOLDER) + [{"type": "text", "text": text.replace(PLACEHOLDER, "")}],
        lambda text: text,
    )
    for form in forms:
        contents = [{"role": message.role, "content": form(message.content)} for message in messages]
        try:
            text = processor.apply_chat_template(contents, tokenize=False, **options)
        except Exception:  # whatever a template does to lists
            continue
        if messages[0].content.replace(PLACEHOLDER, "").strip() in text and not re.search(r"['\"]type['\"]: ?['\"]text", text):
            break
    tokens = processor.tokenizer.special_tokens_map
    marked = {"chat_template": processor.chat_template, "return_assistant_tokens_mask": True}
    (again,), (marks,) = render_jinja_template([contents], **marked, **tokens) if not options else ((text,), ([],))
    assert again == text
    return text, marks, contents


def turns_of(chat: ChatText) -> list[str]:
    return [chat.text[turn.start : turn.end] for turn in chat.turns]


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_are_what_the_assistant_says(own_processor, name):
    """The text is the template's, and each turn is the answer between what the generation prompt says and what closes it."""
    processor = with_template(own_processor, name)
    for kind, messages in TALKS.items():
        if (name, kind) in UNFOUND:
            with pytest.raises(DataError, match="the answers cannot be found"):
                apply_chat_template(processor, Conversation("x", (), messages))
            continue
        chat = apply_chat_template(processor, Conversation("x", (), messages))
        text, _, contents = render(processor, messages)
        assert chat.text == text
        if messages[-1].role == "assistant":
            completion = trl_apply_chat_template({"prompt": contents[:-1], "completion": contents[-1:]}, processor)["completion"]
            assert turns_of(chat)[-1] == completion, kind
        answers = [message.content for message in messages if message.role == "assistant"]
        assert len(chat.turns) == len(answers)
        for answer, turn, said in zip(answers, chat.turns, turns_of(chat), strict=True):
            plain = answer.split("</think>")[-1].strip()
            assert turn.answer.strip() == plain
            assert text.endswith(plain, turn.start, turn.answer_end)
            assert re.fullmatch(f"{HEADER}{THINKING}{re.escape(plain)}{CLOSING}", said), (kind, said)


HEADER = r"( to=user<\|message\|>|<\|channel\|>final<\|message\|>)?"
"""Of Muse Glimmer and GPT-OSS: the assistant says to whom it speaks."""
THINKING, CLOSING = r"(\s|</?think>|Hm\.|Hm, a hat\.)*", r"(\s|<[^<>]*>)*"


@pytest.mark.parametrize("name", MARKED)
def test_turns_are_what_the_template_marks(own_processor, name):
    """But for what the generation prompt says before the assistant does, which some templates mark."""
    processor = with_template(own_processor, name)
    for kind, messages in TALKS.items():
        if (name, kind) in UNFOUND:
            continue
        chat = apply_chat_template(processor, Conversation("x", (), messages))
        text, spans, _ = render(processor, messages)
        marked = {at for span in spans for at in range(*span)}
        prompt = render(processor, messages[:1], add_generation_prompt=True)[0].partition(messages[0].content.strip())[2]
        end = 0
        for turn in chat.turns:
            assert {at for at in range(turn.start, turn.end) if not text[at].isspace()} <= marked, kind
            prompted = "".join(text[at] for at in range(end, turn.start) if at in marked)
            assert prompted in prompt, (kind, prompted)
            end = turn.end
        assert marked <= {*range(end)}


# Templates whose generation prompt ends where their marks begin.
EXACT = ["gemma3_training", "qwen3_training", "lfm2_training", "smolvlm_training", "llama3_training", "glm4moe_training"]
PIECES = (
    *(
        "zebra",
        "Zebra.",
        "user",
        "<",
        "<b>",
        " ",
        "\n",
        "'",
        '"',
        "\\n",
        "{{ x }}",
        "{%",
        "\ue000",
        '\ue000"',
        ":1\ue001",
        "é",
        "[",
        "]",
    ),
    *("\u200d", "<|im_end|>", "<end_of_turn>\n<start_of_turn>user\n", "<|user|>\n", "</s>", "model\n"),
)
NASTY = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)
SAID = NASTY.filter(lambda text: text.strip())


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(EXACT), texts=st.lists(st.tuples(NASTY, SAID), min_size=1, max_size=3), more=st.none() | NASTY)
def test_whatever_is_said_turns_are_what_the_template_marks(own_processor, name, texts, more):
    processor = with_template(own_processor, name)
    messages = talk(*(text for pair in texts for text in pair), *([] if more is None else [more]))
    chat = apply_chat_template(processor, Conversation("x", (), messages))
    options = {"chat_template": processor.chat_template, "return_assistant_tokens_mask": True}
    parts = name in ("gemma3_training", "smolvlm_training", "glm4moe_training")
    contents = [[{"type": "text", "text": m.content}] if parts else m.content for m in messages]
    messages = [{"role": m.role, "content": content} for m, content in zip(messages, contents, strict=True)]
    (text,), (spans,) = render_jinja_template([messages], **options, **processor.tokenizer.special_tokens_map)
    assert chat.text == text
    assert [(turn.start, turn.end) for turn in chat.turns] == spans


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_and_words_are_the_answers(own_processor, name):
    """By the collator, with a picture: labels are the turns, and the words are those of the answers, not of their thinking."""
    processor = with_template(own_processor, name)
    collator = Collator(processor)
    takes_thinking = talk("<image>\nWhat?", f"{THOUGHT}A red zebra.", "And a hat?", f"{THOUGHT}Blue zebra, blue hat. \n")
    two = (takes_thinking, "red zebra Blue zebra blue hat"), (talk("<image>What?", " A blue hat."), "blue hat")
    if name in NO_PICTURES:
        with pytest.raises(DataError, match="LlavaProcessor does not take them"):
            collator([Conversation("x", (RED,), takes_thinking)])
        return
    batch = collator([Conversation("x", (RED,), messages) for messages, _ in two])
    for b, (messages, words) in enumerate(two):
        expected = apply_chat_template(processor, Conversation("x", (RED,), messages))
        assert processor.image_token in expected.text
        ids = processor.tokenizer(expected.text, add_special_tokens=False, return_offsets_mapping=True)
        within = [
            [
                i
                for i, (left, right) in zip(ids.input_ids, ids.offset_mapping, strict=True)
                if turn.start <= left < right <= turn.end
            ]
            for turn in expected.turns
        ]
        assert labelled(processor, batch["labels"][b]) == [processor.tokenizer.decode(tokens) for tokens in within]
        found = spoken(processor, batch, b)
        assert [found[w].strip(" .,<\n") for w in sorted(found)] == words.split()
        answers = [message.content for message in messages if message.role == "assistant"]
        assert [word.text for answer in answers for word in Collator.words(answer)] == words.split()
        assert batch["lavender_present"][b, : len(found)].all()


def test_the_placeholder_of_a_template_without_parts_is_the_processors(own_processor):
    """As users of transformers write it; pictures stand where their places are."""
    processor = copy.deepcopy(own_processor)
    processor.chat_template = "{% for message in messages %}{{ message['content'] + '.' }}{% endfor %}"
    messages = talk("<image>\nOne", "A zebra", "and <image>", "a hat")
    chat = apply_chat_template(processor, Conversation("x", (RED, RED), messages))
    assert chat.text == "<image>\nOne.A zebra.and <image>.a hat."
    assert turns_of(chat) == ["A zebra.", "a hat."]
    assert [turn.num_images for turn in chat.turns] == [1, 2]
    assert Collator(processor)([Conversation("x", (RED, RED), messages)])["lavender_outcomes"].tolist() == [0]
    strict = "{% if messages[0]['content'] is not string %}{{ raise_exception('texts alone') }}{% endif %}"
    processor.chat_template = strict + processor.chat_template
    assert apply_chat_template(processor, Conversation("x", (RED, RED), messages)) == chat
    processor.image_token = None
    with pytest.raises(DataError, match=r"'x': .*texts alone.*names no image_token that could stand in a text"):
        apply_chat_template(processor, Conversation("x", (RED, RED), messages))
    assert turns_of(apply_chat_template(processor, Conversation("x", (), talk("One", "two")))) == ["two."]


PARTS = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)
PROMPT = "{% if add_generation_prompt %}AI:{% endif %}"


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        # llava-hf's: a space behind each text, the role in capitals, pictures first.
        (
            "{% for message in messages %}{{ message['role'].upper() + ': '}}{% for content in message['content'] | "
            "selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}{% for content in message['content'] | "
            "selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
            [" A zebra. ", " A zebra.\n "],
        ),
        # Pixtral's: what the system says stands in the user's message if that is the last.
        (
            "{% for message in messages %}{% if message['role'] == 'user' %}[INST]{% if loop.last %}SYSTEM{% endif %}" + PARTS +
            "[/INST]{% else %}" + PARTS + "</s>{% endif %}{% endfor %}",
            ["A zebra.</s>", "A zebra.\n</s>"],
        ),
        # The end of the text behind the last message alone.
        ("{% for message in messages %}[{{ message['role'] }}]" + PARTS + "{% endfor %}{% if add_generation_prompt %}[assistant]"
         "{% else %}</s>{% endif %}", ["A zebra.", "A zebra.\n</s>"]),
        # What the user says is left out, or looked at.
        ("{% for message in messages %}{% if message['role'] == 'user' %}<image>{% else %}" + PARTS + "|{% endif %}{% endfor %}",
         ["A zebra.|", "A zebra.\n|"]),
        ("{% for message in messages %}{% if (message['content'] | map(attribute='text', default='') | join)[-1] == '?' %}"
            "Q: {% endif %}" + PARTS +
         "|{% endfor %}" + PROMPT, ["A zebra.|", "A zebra.\n|"]),
        # A prompt that no message has.
        ("{% for message in messages %}" + PARTS + "|{% endfor %}" + PROMPT, ["A zebra.|", "A zebra.\n|"]),
    ],
    ids=["llava", "pixtral", "end", "silent", "questions", "prompt"],
)  # fmt: skip
def test_templates_of_other_kinds(own_processor, template, turns):
    processor = copy.deepcopy(own_processor)
    processor.chat_template = template
    messages = talk("<image>What?", "A zebra.", "And?\n<image>", "A zebra.\n")
    chat = apply_chat_template(processor, Conversation("x", (RED, RED), messages))
    assert turns_of(chat) == turns
    assert all(chat.text.endswith("A zebra.", turn.start, turn.answer_end) for turn in chat.turns)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for message in messages %}GPT: " + PARTS + "{% endfor %}" + PROMPT, "prompts for message 2 by .*AI:' .* by .*GPT: '"),
        ("{% for message in messages %}" + PARTS + PARTS + "{% endfor %}", r"shows message 2 \(assistant\) 2 times"),
        ("{% for message in messages[:1] %}" + PARTS + "{% endfor %}", r"shows message 2 \(assistant\) 0 times"),
        (
            "{% for message in messages %}" + PARTS + "{{ message['content'][-1]['text'] | length }}{% endfor %}",
            "renders messages otherwise if they are longer",
        ),
        ("nothing", "leaves out what the messages say"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_found_are_named(own_processor, template, reason):
    processor = copy.deepcopy(own_processor)
    processor.chat_template = template
    with pytest.raises(DataError, match=rf"sample 'x': .*{reason}"):
        apply_chat_template(processor, Conversation("x", (RED,), talk("<image>What?", "A zebra.")))


def test_what_the_assistant_says_after_the_assistant_is_another_turn(own_processor):
    messages = (*ONE, Message("assistant", "A zebra. "), Message("assistant", "A hat."))
    chat = apply_chat_template(with_template(own_processor, "qwen2_5_vl"), Conversation("x", (), messages))
    assert turns_of(chat) == ["A blue zebra.<|im_end|>\n", "A zebra. <|im_end|>\n", "A hat.<|im_end|>\n"]


def test_a_caption_is_the_answer_without_its_thinking(own_processor, tmp_path):
    """Each of two zebras has its own map, which words that are found by their text alone have not."""
    from .test_conversations import store_of

    store = store_of(tmp_path / "t", {"x": (RED, "A zebra beside a zebra.")})
    messages = talk("What?", f"{THOUGHT}A zebra beside a zebra.", "Thanks!", "Yes, a zebra.")
    batch = Collator(with_template(own_processor, "qwen3_5_think_training"), store)([Conversation("x", (RED,), messages)])
    assert spoken(own_processor, batch, 0) == {0: "zebra", 1: "beside", 2: "zebra", 3: "Yes", 4: "zebra"}
    maps = store["x"].word_maps.maps
    assert torch.equal(batch["lavender_targets"][0, :3], torch.from_numpy(maps[[1, 2, 4]]))
    assert torch.equal(batch["lavender_targets"][0, 4], torch.from_numpy(maps[[1, 4]].mean(axis=0)))
    assert batch["lavender_present"].tolist() == [[True, True, True, False, True]]


def test_a_template_that_takes_parts_gets_no_texts(own_processor):
    """Not even if it fails on the parts of one conversation, and would show texts: it would not show pictures as they are shown."""
    processor = copy.deepcopy(own_processor)
    processor.chat_template = (
        "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{{ message['content'][-1]['text'] + '' }}{% endif %}{% endfor %}"
    )
    assert turns_of(apply_chat_template(processor, Conversation("x", (), talk("What?", "A zebra.")))) == ["A zebra."]
    with pytest.raises(DataError, match=r"'x': the chat template refuses the conversation \('dict object' has no attribute 'text'"):
        apply_chat_template(processor, Conversation("x", (RED,), talk("What?<image>", "A zebra.")))


SYSTEM_AS_TEXT = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'system' %}{{ m.content | string | trim }}{% else %}"
    "{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Llama 3.2's takes parts of the user's, and writes what the system says as it is."""


def test_a_system_message_is_never_written_as_a_list(processor):
    copied = copy.deepcopy(processor)
    copied.chat_template = SYSTEM_AS_TEXT
    messages = (Message("system", "Be terse."), Message("user", "<image>What?"), Message("assistant", "A ring."))
    chat = apply_chat_template(copied, Conversation("x", (), messages))
    assert chat.text == "<system>Be terse.</><user><image>What?</><assistant>A ring.</>"
    assert chat.text[chat.turns[0].start : chat.turns[0].end] == "A ring.</>"
    copied.chat_template = SYSTEM_AS_TEXT.replace("m.content | string | trim", "[{'type': 'text'}]")
    with pytest.raises(DataError, match="as a list"):
        apply_chat_template(copied, Conversation("x", (), messages))
