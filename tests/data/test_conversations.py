"""Forms of samples that users of transformers, OpenAI and TRL have, against what these libraries make of them."""

from __future__ import annotations

import base64
import copy
import functools
import http.server
import io
import json
import threading

import pytest
import torch
from datasets import Dataset, Features, Image, Sequence, Value, load_dataset
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from lavender.batches.collator import Collator
from lavender.data.samples import Conversation, Message, Pair, Sample, as_conversation, read_pairs, read_samples
from lavender.data.sources import open_pairs
from lavender.errors import DataError
from lavender.images import image_sha256, load_image
from lavender.targets.manifest import StoreConfig
from lavender.targets.store import Target, TargetStore, TargetWriter
from lavender.types import OUTCOMES, WordMaps
from lavender.words import words_of

RED, BLUE, GREEN = (PILImage.new("RGB", (64, 64), color) for color in ("red", "blue", "green"))


def png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


BASE64 = base64.b64encode(png(BLUE)).decode()
URI = f"data:image/png;base64,{BASE64}"


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def says(words):
    return {"role": "assistant", "content": [text(words)]}


ANSWER = says("A zebra beside a violin.")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    for name, image in (("red", RED), ("a/blue", BLUE), ("green", GREEN)):
        image.save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def served(folder):
    """The URL of the folder, by HTTP on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def with_template(processor, change):
    own = copy.deepcopy(processor)
    own.chat_template = change(own.chat_template)
    return own


TEMPLATES = {
    "own": lambda template: template,
    # Gemma 3 trims every part.
    "trimmed": lambda template: template.replace("{{ part['text'] }}", "{{ part['text'] | trim }}"),
    "marked": lambda template: template.replace("{{ part['text'] }}", "{{ 'the' + part['text'] + ' the' }}"),
}


def assert_as_transformers(processor, sample, messages):
    """The batch of a sample has every token and pixel of what transformers makes of messages that hold their pictures."""
    for change in TEMPLATES.values():
        own = with_template(processor, change)
        expected = own.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        batch = Collator(own)([sample])
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])


def test_the_templates_of_these_tests_differ(processor):
    assert len({change(processor.chat_template) for change in TEMPLATES.values()}) == len(TEMPLATES)


def holding(kind, key, picture):
    return {"type": kind, key: picture}


@pytest.mark.parametrize(
    ("kind", "key", "picture"),
    [
        ("image", "image", BLUE),
        ("image", "image", "a/blue.png"),
        ("image", "image", URI),
        ("image", "image", BASE64),
        ("image", "path", "a/blue.png"),
        ("image", "url", "a/blue.png"),
        ("image", "url", "HTTP"),
        ("image", "base64", BASE64),
        ("image", "base64", URI),
        ("image_url", "image_url", {"url": URI}),
        ("image_url", "image_url", {"url": URI, "detail": "auto"}),
        ("image_url", "image_url", {"url": "HTTP"}),
        ("image_url", "image_url", "a/blue.png"),
        ("image_url", "image_url", URI),
    ],
)
def test_pictures_in_parts_are_those_that_transformers_reads(processor, served, folder, monkeypatch, kind, key, picture):
    """In their places among the texts, white space and all."""
    monkeypatch.chdir(folder)
    if picture == "HTTP":
        picture = f"{served}/a/blue.png"
    elif picture == {"url": "HTTP"}:
        picture = {"url": f"{served}/a/blue.png"}
    part = holding(kind, key, picture)
    messages = [
        {"role": "system", "content": [text("Be brief.\n"), text(" Zebras only.")]},
        user(text("Look:\n"), part, text("\n\nand "), text("this\n"), {"type": "image", "image": GREEN}),
        ANSWER,
        user({"type": "image", "path": "red.png"}, text(" or that?\n")),
        says("A red one."),
    ]
    assert_as_transformers(processor, {"messages": messages}, messages)


@pytest.mark.parametrize("from_file", [False, True], ids=["rows", "file"])
def test_parts_of_a_table_have_the_columns_of_all(processor, folder, monkeypatch, from_file):
    """As arrow stores them: whatever one part has is None in the others, in messages too."""
    monkeypatch.chdir(folder)
    messages = [
        user(text("Look:\n"), {"type": "image", "path": "red.png"}, {"type": "image_url", "image_url": {"url": URI}}, text("?")),
        {**ANSWER, "tool_calls": None, "name": None},
    ]
    empty = dict.fromkeys(("text", "path", "image_url"))
    stored = [
        {"tool_calls": None, "name": None, **message, "content": [empty | part for part in message["content"]]}
        for message in messages
    ]
    row = {"messages": stored, "prompt": None, "answer": None}
    if from_file:
        (folder / "data.jsonl").write_text(json.dumps(row))
        (row,) = read_samples(folder / "data.jsonl")
    else:
        row = Dataset.from_list([row])[0]
    assert as_conversation(row).id == "red.png"
    assert_as_transformers(processor, row, messages)


def test_images_fill_the_parts_that_have_none_as_with_trl(processor):
    from trl.data_utils import prepare_multimodal_messages

    messages = [
        user({"type": "image", "index": 0}, text("and "), {"type": "image", "image": BLUE}, text("and "), {"type": "image"}),
        ANSWER,
        user(text("Or "), {"type": "image", "index": 2}),
        says("No."),
    ]
    for images in ([RED, GREEN, BLUE], [GREEN, RED, RED]):
        sample = {"images": images, "messages": messages}
        plain = copy.deepcopy(messages)
        for message in plain:  # TRL fills what has no "image"
            message["content"] = [{k: v for k, v in part.items() if k != "index"} for part in message["content"]]
        assert_as_transformers(processor, sample, prepare_multimodal_messages(plain, images))
    plain = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "The first."}]
    sample = {"images": [RED, GREEN], "messages": plain}
    assert_as_transformers(processor, sample, prepare_multimodal_messages(plain, [RED, GREEN]))


SPACES = st.sampled_from(["", " ", "\n", "\n\n", " \n"])
PARTS = st.one_of(
    st.tuples(SPACES, st.sampled_from(["red", "the zebra", "", "What?"]), SPACES).map(lambda words: text("".join(words))),
    st.sampled_from([RED, GREEN]).map(lambda image: {"type": "image", "image": image}),
    st.just({"type": "image"}),
)


@given(st.lists(st.lists(PARTS, min_size=1, max_size=4), min_size=1, max_size=3), st.data())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_texts_and_pictures_is_kept(processor, contents, data):
    """Of any number of messages, whether parts hold their pictures or take them from the column; and through a table as well."""
    from trl.data_utils import prepare_multimodal_messages

    messages = [message for content in contents for message in (user(*content), says("A zebra."))]
    assume(any(part["type"] == "image" for part in contents[0]))
    empty = sum(part == {"type": "image"} for content in contents for part in content)
    images = [data.draw(st.sampled_from([RED, BLUE, GREEN])) for _ in range(empty)]
    sample = {"images": images, "messages": messages}
    held = prepare_multimodal_messages(copy.deepcopy(messages), images)
    assert_as_transformers(processor, sample, held)
    table = [{**message, "content": [{"text": None, "image": None, **part} for part in message["content"]]} for message in messages]
    first, second = as_conversation(sample), as_conversation({"images": images, "messages": table})
    assert (first.messages, first.images, first.id) == (second.messages, second.images, second.id)


def test_rows_of_a_vision_dataset_with_an_image_column(processor):
    """As those of HuggingFaceH4/llava-instruct-mix-vsft: parts with an index, pictures in a column that datasets decodes."""
    content = [{"index": Value("int64"), "text": Value("string"), "type": Value("string")}]
    features = Features({"messages": [{"content": content, "role": Value("string")}], "images": Sequence(Image())})
    messages = [
        user({"index": None, "text": "Who? ", "type": "text"}, {"index": 0, "text": None, "type": "image"}),
        {"role": "assistant", "content": [{"index": None, "text": "Ann", "type": "text"}]},
    ]
    rows = Dataset.from_list([{"messages": messages, "images": [RED]}, {"messages": messages, "images": [GREEN]}], features)
    for row, image in zip(rows, (RED, GREEN), strict=True):
        held = [user(text("Who? "), {"type": "image", "image": image}), says("Ann")]
        assert_as_transformers(processor, row, held)
        undecoded = row | {"images": [{"bytes": png(image), "path": None}]}
        assert_as_transformers(processor, undecoded, held)


PROMPTS = {
    "messages": ([user({"type": "image"}, text("Who?"))], [{"role": "assistant", "content": "A zebra."}]),
    "texts": ([{"role": "user", "content": "Who?"}], [{"role": "assistant", "content": "A zebra."}]),
    "turns": ([user({"type": "image"}, text("Who?")), says("A cat."), user(text("Sure?"))], [says("A zebra.")]),
    "system": ([{"role": "system", "content": "Be brief."}, user(text("Who? "), {"type": "image"})], [says("A violin.")]),
}


@pytest.mark.parametrize("images", [{"images": [RED]}, {"image": RED}], ids=["images", "image"])
@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_and_completion_are_learned_as_by_trl(processor, name, images):
    """Tokens, pixels and labels are those of TRL's collator: the completion alone is learned."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    prompt, completion = PROMPTS[name]
    example = {"prompt": prompt, "completion": completion} | images
    batch = Collator(processor)([copy.deepcopy(example), example])
    expected = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)([copy.deepcopy(example)] * 1)
    for key in ("input_ids", "labels"):
        assert torch.equal(batch[key][:1], expected[key]), key
        assert torch.equal(batch[key][1:], expected[key]), key
    assert torch.equal(batch["pixel_values"][:1], expected["pixel_values"])
    conversation = as_conversation(example)
    assert as_conversation(conversation).messages == conversation.messages
    again = {"id": 1, "images": list(conversation.images), "messages": [vars(message) for message in conversation.messages]}
    assert as_conversation(again).messages == conversation.messages


def test_prompt_and_completion_as_texts_are_a_question_and_its_answer(processor, folder):
    sample = {"id": "x", "image": RED, "prompt": "Who?", "completion": "A zebra."}
    batch, expected = (Collator(processor)([s]) for s in (sample, Sample("x", RED, "Who?", "A zebra.")))
    assert all(torch.equal(batch[key], expected[key]) for key in ("input_ids", "labels", "pixel_values"))
    (folder / "data.jsonl").write_text(
        json.dumps({"image": "red.png", "prompt": "Who?", "completion": "A zebra.", "answer": None})
        + "\n"
        + json.dumps({"images": ["green.png"], "prompt": "Is <image> green?", "completion": "Yes."})
    )
    first, second = read_samples(folder / "data.jsonl")
    assert (first.id, first.images) == ("red.png", (folder / "red.png",))
    assert [m.content for m in first.messages] == ["<image>Who?", "A zebra."]
    assert [m.content for m in second.messages] == ["Is <image> green?", "Yes."]


def test_pictures_of_a_file_lie_in_it_or_in_its_folder(folder):
    entries = [
        {"messages": [user({"type": "image", "path": "a/blue.png"}, text("?")), ANSWER]},
        {"messages": [user({"type": "image", "base64": BASE64}, text("?")), ANSWER]},
        {"messages": [user({"type": "image", "url": f"file://{folder}/a/../red.png"}, text("?")), ANSWER]},
        {"image": URI, "answer": "A zebra."},
        {"image": f"file://{folder}/green.png", "answer": "A zebra."},
    ]
    (folder / "data.json").write_text(json.dumps(entries))
    samples = read_samples(folder / "data.json")
    pictures = [s.images[0] if isinstance(s, Conversation) else s.image for s in samples]
    assert [load_image(p).getpixel((0, 0)) for p in pictures] == [(0, 0, 255), (0, 0, 255), (255, 0, 0), (0, 0, 255), (0, 128, 0)]
    assert [s.id.partition(":")[0] for s in samples] == ["a/blue.png", "sha256", "file", "sha256", "file"]
    assert [s.has_id for s in samples] == [True, False, True, False, True]
    for outside in ("../x.png", "/etc/x.png", "file:///etc/x.png", "http://127.0.0.1/x.png"):
        (folder / "data.json").write_text(json.dumps([{"messages": [user({"type": "image", "url": outside}), ANSWER]}]))
        with pytest.raises(DataError, match=r"entry 1: .*its pictures: the picture '.*x.png' is not in"):
            read_samples(folder / "data.json")


def test_file_uris_are_paths(folder):
    RED.save(folder / "a b.png")
    (conversation,) = (as_conversation({"image": f"file://{folder}/a%20b.png", "question": "Who?", "answer": "Ann"}),)
    assert load_image(conversation.images[0]).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(DataError, match="names a file of the computer 'there'"):
        as_conversation({"image": "file://there/a.png", "question": "Who?", "answer": "Ann"})


def test_a_sample_without_an_id_is_called_by_its_path_or_its_content():
    asked = {"question": "Who?", "answer": "Ann"}
    assert as_conversation({"image": "a/1.jpg", **asked}).id == "a/1.jpg"
    assert as_conversation({"id": None, "image": "a/1.jpg", **asked}).id == "a/1.jpg"
    assert as_conversation({"image": {"path": "1.jpg", "bytes": png(RED)}, **asked}).id == "1.jpg"
    conversation = as_conversation({"image": RED, **asked})
    # The name is the same in every process and version.
    assert conversation.id == "sha256:968bf8fbc6388b8f3e28509394ba8ed9"
    assert not conversation.has_id
    reopened = PILImage.open(io.BytesIO(png(RED)))
    assert as_conversation({"image": reopened, **asked}).id == conversation.id
    others = [{"image": BLUE, **asked}, {"image": RED, **asked, "answer": "Eve"}, {"image": png(RED), **asked}]
    others.append({"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann"}]})
    assert len({as_conversation(other).id for other in others} | {conversation.id}) == 5


@pytest.mark.parametrize("sample_id", [7, "7", torch.tensor(7).numpy()[()]])
def test_ids_may_be_whole_numbers(sample_id):
    messages = (Message("user", "Who?"), Message("assistant", "Ann"))
    for sample in (
        {"id": sample_id, "image": RED, "question": "Who?", "answer": "Ann"},
        Sample(sample_id, RED, "Who?", "Ann"),
        Conversation(sample_id, (RED,), messages),
    ):
        conversation = as_conversation(sample)
        assert (conversation.id, type(conversation.id), conversation.has_id) == ("7", str, True)
    assert Pair(sample_id, RED, "A cat.").id == "7"


def store_of(folder, targets) -> TargetStore:
    """Targets from ids, pictures and captions; each word's map is the number of its sample."""
    with TargetWriter(folder, {"model": "m"}, StoreConfig(map_size=8)) as writer:
        for n, pair in enumerate(targets, start=1):
            words = words_of(pair.caption)
            maps = torch.full((len(words), 8, 8), float(n))
            maps[:, 0] = 0
            writer.add(Target(pair.id, image_sha256(load_image(pair.image)), WordMaps(pair.caption, words, maps.numpy())))
        writer.close()
    return TargetStore(folder)


def number_of(batch, b: int) -> int:
    """Of the sample that the targets in row b were made from."""
    return int(batch["lavender_targets"][b].max())


def test_targets_meet_the_samples_of_the_same_data_without_ids(processor, tmp_path):
    """Whatever `lavender extract` called them: rows of a table, whose pictures have no path when datasets has decoded them."""
    rows = [{"image": image, "caption": f"A zebra, {n}."} for n, image in enumerate((RED, BLUE, GREEN))]
    Dataset.from_list(rows, Features({"image": Image(), "caption": Value("string")})).to_parquet(tmp_path / "data.parquet")
    pairs = list(open_pairs(tmp_path / "data.parquet"))
    assert [pair.id for pair in pairs] == ["data.parquet#0", "data.parquet#1", "data.parquet#2"]
    store = store_of(tmp_path / "t", pairs)
    decoded = load_dataset("parquet", data_files=str(tmp_path / "data.parquet"), split="train", cache_dir=str(tmp_path / "c"))
    samples = [{"image": row["image"], "question": "What?", "answer": row["caption"]} for row in decoded]
    batch = Collator(processor, store)(samples[::-1])
    assert [OUTCOMES[n] for n in batch["lavender_outcomes"]] == ["matched"] * 3
    assert [number_of(batch, b) for b in range(3)] == [3, 2, 1]
    named = [sample | {"id": "another"} for sample in samples]
    batch = Collator(processor, store)(named)
    assert [OUTCOMES[n] for n in batch["lavender_outcomes"]] == ["matched"] * 3, "by their pictures, whatever their ids"
    assert [number_of(batch, b) for b in range(3)] == [1, 2, 3]


def test_tables_may_hold_pictures_as_text(tmp_path):
    RED.save(tmp_path / "red.png")
    images = [URI, BASE64, f"file://{tmp_path}/red.png", "red.png", "data:,x"]
    Dataset.from_list([{"image": image, "caption": "A cat."} for image in images]).to_parquet(tmp_path / "data.parquet")
    *pairs, bad = open_pairs(tmp_path / "data.parquet")
    assert [load_image(pair.image).getpixel((0, 0)) for pair in pairs] == [(0, 0, 255)] * 2 + [(255, 0, 0)] * 2
    assert [pair.id for pair in pairs] == ["data.parquet#0", "data.parquet#1", images[2], "red.png"]
    assert bad.id == "data.parquet#4"
    assert "holds no base64" in bad.reason


def test_targets_meet_the_samples_of_a_file_without_ids(processor, folder):
    entries = [{"image": name, "caption": f"A zebra, {name}."} for name in ("red.png", "a/blue.png", URI)]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries))
    pairs, samples = read_pairs(folder / "data.jsonl"), read_samples(folder / "data.jsonl")
    assert [pair.id for pair in pairs[:2]] == [sample.id for sample in samples[:2]] == ["red.png", "a/blue.png"]
    store = store_of(folder / "t", pairs)
    assert [number_of(Collator(processor, store)([sample]), 0) for sample in samples] == [1, 2, 3]
    # A path that is written otherwise leads to the same picture.
    moved = {"image": folder / "red.png", "question": "What?", "answer": "A zebra."}
    assert number_of(Collator(processor, store)([moved]), 0) == 1


def test_of_several_targets_of_a_picture_the_answers_own_is_taken(processor, tmp_path):
    store = store_of(tmp_path / "t", [Pair(f"p#{n}", RED, caption) for n, caption in enumerate(("A cat.", "A zebra.", "A dog."))])
    for answer, number in (("A zebra.", 2), ("A dog.", 3), ("Some cat.", 1)):
        assert number_of(Collator(processor, store)([{"image": RED, "question": "Who?", "answer": answer}]), 0) == number
    blue = {"image": BLUE, "question": "Who?", "answer": "A zebra."}
    assert Collator(processor, store)([blue])["lavender_outcomes"].tolist() == [OUTCOMES.index("no target")]


ASK, TALK = {"role": "user", "content": "Who?"}, [user(text("Who?")), ANSWER]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"image": RED, "text": "USER: Who? ASSISTANT: Ann"}, 'a sample without an id has a "text" and no answer'),
        ({"image": "a.png", "prompt": "Who?"}, 'the sample of a.png has a "prompt" and no "completion"'),
        ({"prompt": [ASK], "chosen": [ANSWER], "rejected": [ANSWER]}, "has 'chosen', 'rejected': it is a preference"),
        ({"chosen": TALK, "rejected": TALK}, "it is a preference"),
        ({"prompt": "Who?", "completion": "Ann", "label": False}, "has 'label': it is a preference"),
        ({"prompt": "Who?", "completion": [ANSWER]}, "its prompt is a str and its completion a list; expected two texts"),
        ({"prompt": [ASK], "completion": [ASK, ANSWER]}, "its completion has messages of user, assistant; expected one of the as"),
        ({"messages": TALK, "conversations": TALK}, 'has both "messages" and "conversations"'),
        ({"messages": TALK, "tools": [{"name": "f"}]}, "has 'tools', which lavender does not read"),
        ({"messages": TALK, "system": "Be brief."}, "has 'system', which lavender does not read; put what is said into the mess"),
        ({"messages": TALK, "videos": ["a.mp4"]}, "has 'videos'"),
        ({"messages": [ASK, ANSWER | {"tool_calls": [{"name": "f"}]}]}, "message 2 has 'tool_calls', which lavender does not read"),
        ({"messages": [ASK, ANSWER | {"weight": 0}]}, "message 2 has 'weight'"),
        ({"messages": [ASK | {"from": "gpt"}, ANSWER]}, 'message 1 has both "role" and "from"'),
        ({"messages": [ASK | {"value": "What?"}, ANSWER]}, 'message 1 has both "content" and "value"'),
        ({"messages": [user(text("?") | {"cache_control": 1}), ANSWER]}, "has a part of text with 'cache_control'"),
        ({"messages": [user(text("?") | {"image": RED}), ANSWER]}, "has a part of text with 'image'"),
        ({"messages": [user({"type": "image", "image": RED, "max_pixels": 4}), ANSWER]}, "with 'max_pixels', .*the processor has"),
        ({"messages": [user({"type": "image", "image": RED, "text": "cat"}), ANSWER]}, "of the type 'image' with 'text'"),
        ({"messages": [user({"type": "image", "image": RED, "url": "a"}), ANSWER]}, "a picture under 'image' and 'url'"),
        ({"messages": [user({"type": "image_url"}), ANSWER]}, 'holds nothing under "image_url"'),
        ({"messages": [user({"type": "image_url", "image_url": {"file": "a"}}), ANSWER]}, '"image_url" has file; expected a text'),
        ({"messages": [user({"type": "image", "base64": "no"}), ANSWER]}, 'no picture under "base64"; expected an encoded pic'),
        ({"messages": [user({"type": "image", "image": {"file": "a"}}), ANSWER]}, "a picture has file; expected bytes or a path"),
        ({"messages": [user({"type": "image", "url": "data:,cat"}), ANSWER]}, "the data URI 'data:,cat'... holds no base64"),
        ({"messages": [user({"type": "image", "url": "data:text/plain;base64,%"}), ANSWER]}, "the data URI 'data:text"),
        ({"messages": [user({"type": "video", "video": "a.mp4"}), ANSWER]}, "has a part {'type': 'video'.*expected"),
        ({"messages": [user({"type": "image"}), ANSWER]}, 'has 1 parts {"type": "image"} without a picture, but 0 pictures'),
        ({"images": [RED, BLUE], "messages": [user({"type": "image"}), ANSWER]}, "has 1 parts .* but 2 pictures"),
        (
            {"images": [RED, BLUE], "messages": [user({"type": "image", "image": RED}, {"type": "image"}), ANSWER]},
            "has 1 parts .*, and one holds a picture under 'image', but 2 pictures",
        ),
        (
            {"images": [RED, BLUE], "messages": [user({"type": "image", "index": 1}, {"type": "image", "index": 0}), ANSWER]},
            "a part has the index 1, but it is the place of picture 0",
        ),
        ({"id": True, "messages": TALK}, "the id is a bool; expected a text or a whole number"),
        ({"id": 1.5, "messages": TALK}, "the id is a float"),
        ({"id": None, "messages": TALK}, 'a sample has no "id"'),
        (Sample(None, RED, "Who?", "Ann"), 'a sample has no "id"'),
        (Conversation(None, (RED,), ()), "a sample: the id is a NoneType"),
        (Conversation("x", RED, (Message("user", "Who?"),)), "'x': its images are a .*Image; expected a tuple"),
        (Conversation("x", (RED,), (ASK,)), "'x', message 1 is a dict; expected a Message"),
        (Conversation("x", (RED,), (Message("user", "Who?", ("Where?",)),)), "'x', message 1 has parts that are not its content"),
    ],
)
def test_what_is_not_read_is_refused_by_name(sample, message):
    with pytest.raises(DataError, match=message) as refusal:
        as_conversation(sample)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", RED, 5), "pair 'x': the caption is a int; expected a text"),
        ((None, RED, "A cat."), "a pair: the id is a NoneType; expected a text or a whole number"),
        ((True, RED, "A cat."), "a pair: the id is a bool"),
    ],
)
def test_a_pair_of_another_type_is_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        Pair(*arguments)


def test_empty_columns_count_as_missing():
    row = {"image": RED, "images": [], "messages": [ASK, ANSWER], "tools": [], "system": ""}
    assert as_conversation(row).images == (RED,)
    messages = [Message("user", "Who?"), Message("assistant", "Ann", is_learned=False), Message("user", "And?")]
    turns = as_conversation({"image": RED, "messages": [*messages, Message("assistant", "Eve")]}).messages
    assert [(turn.content, turn.is_learned) for turn in turns[1:]] == [("Ann", False), ("And?", True), ("Eve", True)]
    with pytest.raises(DataError, match="no message of the assistant"):
        as_conversation({"image": RED, "messages": messages})


def test_other_columns_of_a_table_do_not_matter():
    """As in data sets for several kinds of training."""
    row = {"prompt": "Who?", "chosen": TALK, "rejected": TALK, "score": 1.5, "source": "x", "messages": [ASK, ANSWER], "tools": []}
    assert [m.content for m in as_conversation(row).messages] == ["Who?", "A zebra beside a violin."]
