"""Published conversations and Karpathy's captions. What is read was written here by hand."""

from __future__ import annotations

import json

import pytest

from lavender.config import DEFAULT_QUESTION
from lavender.data.samples import Conversation, Sample, read_pairs, read_samples
from lavender.errors import ConfigError, DataError

PUBLISHED = [
    {
        "id": "7",
        "image": "a/1.jpg",
        "conversations": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat"}],
    },
    {
        "id": 8,
        "images": ["2.jpg", "3.jpg"],
        "conversations": [
            {"from": "human", "value": "<image> and <image>?"},
            {"from": "gpt", "value": "Two cats"},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes"},
        ],
    },
    {"id": "text", "conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"image": "4.jpg", "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann"}]},
]


def written(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def summary(conversation):
    assert isinstance(conversation, Conversation)
    return conversation.id, conversation.images, [(m.role, m.content) for m in conversation.messages]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.json", json.dumps(PUBLISHED)),
        ("list.txt", "\n \n" + json.dumps(PUBLISHED, indent=2) + "\n"),
        ("lines.json", "\n".join(json.dumps(entry) for entry in PUBLISHED)),
        ("lines.jsonl", "\ufeff" + "\r\n\n".join(json.dumps(entry) for entry in PUBLISHED)),
    ],
)
def test_conversations_as_published(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert [summary(own) for own in read_samples(tmp_path / name)] == [
        ("7", (tmp_path / "a/1.jpg",), [("user", "<image>\nWhat?"), ("assistant", "A cat")]),
        (
            "8",
            (tmp_path / "2.jpg", tmp_path / "3.jpg"),
            [("user", "<image> and <image>?"), ("assistant", "Two cats"), ("user", "Sure?"), ("assistant", "Yes")],
        ),
        ("text", (), [("user", "Hi"), ("assistant", "Hello")]),
        ("4.jpg", (tmp_path / "4.jpg",), [("user", "<image>Who?"), ("assistant", "Ann")]),
    ]
    (tmp_path / "pictures").mkdir()
    samples = read_samples(tmp_path / name, images=tmp_path / "pictures")
    assert samples[0].images == (tmp_path / "pictures/a/1.jpg",)


def test_samples_and_conversations_may_be_mixed(tmp_path):
    path = tmp_path / "data"
    path.write_text(json.dumps([{"image": "1.jpg", "answer": "A dog", "question": "What?"}, PUBLISHED[0]]))
    sample, conversation = read_samples(path)
    assert (sample.id, sample.image, sample.question, sample.answer) == ("1.jpg", tmp_path / "1.jpg", "What?", "A dog")
    assert conversation.id == "7"


def test_several_questions_about_a_picture_need_no_ids(tmp_path):
    """They are told apart by what they say, wherever the file lies; an entry that is there twice is refused."""
    asked = [("What?", "A dog"), ("Where?", "Here"), ("Where?", "There")]
    lines = [{"image": "1.jpg", "question": question, "answer": answer} for question, answer in asked]
    talk = {"image": "1.jpg", "conversations": [{"from": "human", "value": "<image>Who?"}, {"from": "gpt", "value": "Ann"}]}
    found = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = written(tmp_path / folder / "data.jsonl", "\n".join(map(json.dumps, [*lines, talk])))
        found.append([sample.id for sample in read_samples(path)])
    assert found[0] == found[1]
    assert len({*found[0]}) == 4
    assert all(sample_id.startswith("1.jpg#") for sample_id in found[0])  # none of them is the picture's own, as in other files
    regions = [{"turn": 1, "box": [0, 0, 0.5, 0.5]}]
    apart = [*lines, lines[1] | {"regions": regions}, {"image": "2.jpg", "question": "What?", "answer": "A cat"}]
    ids = [sample.id for sample in read_samples(written(tmp_path / "apart.jsonl", "\n".join(map(json.dumps, apart))))]
    assert ids[:3] == found[0][:3]
    assert len({*ids}) == 5
    assert ids[4] == "2.jpg"
    with pytest.raises(DataError, match="twice"):
        read_samples(written(tmp_path / "twice.jsonl", "\n".join(map(json.dumps, [*lines, lines[1]]))))
    with pytest.raises(DataError, match="the id '1' twice"):
        read_samples(written(tmp_path / "ids.jsonl", "\n".join(json.dumps(line | {"id": 1}) for line in lines)))


def test_a_list_of_images_alone_makes_no_file_of_captions(tmp_path):
    path = written(tmp_path / "one.jsonl", PUBLISHED[1])
    assert [own.id for own in read_samples(path)] == ["8"]
    lines = [{"image": f"{n}.jpg", "images": [], "answer": "A dog"} for n in range(2)]
    path = written(tmp_path / "two.jsonl", "\n".join(map(json.dumps, lines)))
    assert [own.id for own in read_samples(path)] == ["0.jpg", "1.jpg"]


FLICKR = {
    "images": [
        {
            "sentids": [0, 1],
            "imgid": 0,
            "sentences": [{"tokens": ["two"], "raw": " Two men. ", "sentid": 0}, {"raw": "Men", "sentid": 1}],
            "split": "train",
            "filename": "1000.jpg",
        },
        {"imgid": 1, "sentences": [{"raw": "A dog.", "sentid": 2}], "split": "val", "filename": "1001.jpg"},
    ],
    "dataset": "flickr30k",
}


COCO = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_9.jpg",
            "cocoid": 9,
            "imgid": 0,
            "split": "restval",
            "sentences": [{"raw": "A man."}],
        }
    ],
}


def test_karpathys_captions(tmp_path):
    path = written(tmp_path / "dataset_flickr30k.json", FLICKR)

    def read(**options):
        samples, pairs = read_samples(path, **options), read_pairs(path, **options)
        assert all(isinstance(own, Sample) and own.question == DEFAULT_QUESTION for own in samples)
        assert [(p.id, p.image, p.caption) for p in pairs] == [(s.id, s.image, s.answer) for s in samples]
        return [(own.id, own.image, own.answer) for own in samples]

    first, second = tmp_path / "1000.jpg", tmp_path / "1001.jpg"
    assert read() == [("1000.jpg", first, "Two men.")]
    assert read(split="val") == [("1001.jpg", second, "A dog.")]
    assert read(split=None) == [("1000.jpg", first, "Two men."), ("1001.jpg", second, "A dog.")]
    assert read(captions="all") == [("1000.jpg#0", first, "Two men."), ("1000.jpg#1", first, "Men")]
    (tmp_path / "pictures").mkdir()
    assert read(images=tmp_path / "pictures")[0][1] == tmp_path / "pictures/1000.jpg"
    path = written(tmp_path / "coco.txt", json.dumps(COCO, indent=1))
    assert read(split="restval") == [("COCO_val2014_9.jpg", tmp_path / "val2014/COCO_val2014_9.jpg", "A man.")]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([PUBLISHED[0], 3], "entry 2 is no JSON object"),
        ([{"image": "1.jpg"}], "entry 1: no answer"),
        ([{"image": 5, "conversations": []}], "entry 1: 'image' is 5; expected a path or a list of paths"),
        ([{**PUBLISHED[0], "image": ["1.jpg", ""]}], r"entry 1: 'image' is \['1.jpg', ''\]"),
        ([PUBLISHED[2], {"conversations": PUBLISHED[2]["conversations"]}], 'entry 2: a sample has no "id"'),
        ([{**PUBLISHED[0], "images": ["2.jpg"]}], "entry 1: sample '7' has both"),
        ([{**PUBLISHED[0], "conversations": [{"role": "user", "content": "Hi"}]}], "entry 1: sample '7' has no message of the as"),
        ("\n".join(json.dumps(e) for e in (PUBLISHED[2], {"id": 1, "messages": "Hi"})), "line 2: sample 1: its messages are a str"),
        ([PUBLISHED[0], PUBLISHED[0]], "the id '7' twice"),
        ("[]", "is empty"),
        ('[{"image": "1.jpg"},\n\n{"image" "2"}]', "line 3 is no JSON"),
        ({**FLICKR, "images": [{"split": "train"}]}, "image 1 is {'split': 'train'}; expected an object with a file name"),
        ({**FLICKR, "images": FLICKR["images"][1:]}, "no pictures of the split 'train'; its splits are val"),
        ({"images": []}, "its splits are none"),
        ({"images": [{"filename": "a.jpg", "split": "train", "sentences": []}]}, r"image 1 \(a.jpg\): no captions"),
        ({"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": " "}]}]}, r"image 1 \(a.jpg\): no captions"),
        ({"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "\ud83d"}]}]}, "caption 1 is no valid Unicode"),
        ({"images": [FLICKR["images"][0]] * 2}, "the id '1000.jpg' twice"),
    ],
)
def test_wrong_data_is_named(tmp_path, value, message):
    with pytest.raises(DataError, match=message) as caught:
        read_samples(written(tmp_path / "data.json", value))
    assert str(tmp_path / "data.json") in str(caught.value)


def test_wrong_options_of_readers_are_named(tmp_path):
    path = written(tmp_path / "data.json", FLICKR)
    with pytest.raises(ConfigError, match="captions is 'best'; choose first or all"):
        read_samples(path, captions="best")
    for read in (read_samples, read_pairs):
        with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
            read(path, images=tmp_path / "nowhere")
