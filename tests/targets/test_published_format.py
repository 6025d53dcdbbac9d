"""Word maps as published: pictures in folders and in tables. What is read was written here by hand."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lavender.config import DEFAULT_QUESTION
from lavender.data.samples import Conversation, Message, Sample
from lavender.errors import ConfigError, DataError, TargetError
from lavender.images import image_sha256, load_image
from lavender.targets.manifest import StoreConfig
from lavender.targets.published_export import export_targets
from lavender.targets.published_import import import_targets
from lavender.targets.store import Target, TargetStore, TargetWriter
from lavender.types import Word, WordMaps
from lavender.words import words_of


def picture(folder, name, color):
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (6, 4), color).save(folder / name, quality=95)
    return Image.open(folder / name)


def ramp(low, high, size=4):
    """A map that JPEG keeps well: it rises from left to right, [size, size]."""
    return np.tile(np.linspace(low, high, size, dtype=np.float32), (size, 1))


def grey(values):
    return Image.fromarray(np.rint(np.asarray(values) * 255).astype(np.uint8))


def publish(root, name, maps):
    """Writes maps in [0, 1] in the layout of the authors' code."""
    folder = root / name / "lpm_attention" / name.split(".")[0]
    folder.mkdir(parents=True)
    for word, values in maps.items():
        grey(values).save(folder / f"attention_{word}.jpg", quality=100)


def failures(folder):
    entries = json.loads((folder / "manifest.json").read_text())["failed"]
    return [(entry["id"], reason) for entry in entries for reason in entry["reason"].split("\n")]


def run(*arguments, **options):
    return import_targets(*arguments, progress=False, **options)


JPEG_LEVELS = 2
"""How far a map of random places [32, 32] is off after JPEG with quality 100, in steps of 1/255; 1.5 were measured on 300."""


def close(found, expected, levels=1):
    np.testing.assert_allclose(found, expected, rtol=0, atol=(levels + 0.1) / 255)  # the store's float16 is 1/1000 of 1/2


def test_a_folder_as_published_with_samples(tmp_path):
    picture(tmp_path / "p", "1.x.jpg", "red")
    picture(tmp_path / "p", "2.png", "blue")
    publish(tmp_path / "maps", "1.x.jpg", {"a": ramp(0, 1), "cat": ramp(1, 0), "Dog": ramp(0.2, 0.6), "ca": ramp(0, 1)})
    publish(tmp_path / "maps", "2.png", {"ball": ramp(0, 0.5)})
    publish(tmp_path / "maps", "3.jpg", {"ball": ramp(0, 0.5)})
    (tmp_path / "maps/notes").mkdir()
    samples = [
        Sample("one", tmp_path / "p/1.x.jpg", "What?", "A cat sees a dog"),
        Sample("two", str(tmp_path / "p/2.png"), "What?", "No Ball, no ball"),
        Sample("other", tmp_path / "p/none.png", "What?", "unused"),
    ]
    result = run(tmp_path / "maps", tmp_path / "t", samples=samples)
    assert (result.written, result.present, result.failed, result.unused_maps) == (2, 0, 1, 1)
    store = TargetStore(tmp_path / "t")
    assert list(store) == ["one", "two"]
    assert store.config == StoreConfig(map_size=4)
    assert (store.source["model"], store.source["source"]) == ("published", "maps")
    one = store.checked("one", Image.open(tmp_path / "p/1.x.jpg")).word_maps
    assert [word.text for word in one.words] == ["A", "cat", "sees", "a", "dog"]
    assert one.caption == "A cat sees a dog"
    assert np.isnan(one.maps[2]).all()
    for at, expected in ((0, ramp(0, 1)), (1, ramp(1, 0)), (3, ramp(0, 1)), (4, ramp(0.2, 0.6))):
        close(one.maps[at], expected, JPEG_LEVELS)
    two = store["two"].word_maps
    assert np.isnan(two.maps[[0, 2]]).all()
    close(two.maps[[1, 3]], [ramp(0, 0.5)] * 2, JPEG_LEVELS)
    assert failures(tmp_path / "t") == [
        ("one", "the word 'ca' is not in 'A cat sees a dog'"),
        ("3.jpg", "no sample has a picture of this name"),
    ]


def test_a_folder_without_samples(tmp_path):
    image = picture(tmp_path / "p", "1.png", "red")
    publish(tmp_path / "maps", "1.png", {"dog": ramp(0, 1), "a": ramp(1, 0), "red_fox": ramp(1, 0)})
    publish(tmp_path / "maps", "2.png", {"dog": ramp(0, 1)})
    (tmp_path / "maps/3.png/lpm_attention/3").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no pictures; give the folder of the pictures \(--images\) or samples"):
        run(tmp_path / "maps", tmp_path / "t")
    assert not (tmp_path / "t").exists()
    result = run(tmp_path / "maps", tmp_path / "t", images=tmp_path / "p")
    assert (result.written, result.failed, result.unused_maps) == (1, 2, 1)
    target = TargetStore(tmp_path / "t").checked("1.png", image)
    assert target.word_maps.caption == "a dog red_fox"
    close(target.word_maps["dog"], ramp(0, 1), JPEG_LEVELS)
    reasons = failures(tmp_path / "t")
    assert reasons[0] == ("1.png", "the word 'red_fox' is not in 'a dog red_fox'")  # two words, so the map is nobody's
    assert reasons[1][0] == "2.png"
    assert "there is no picture 2.png in" in reasons[1][1]
    assert reasons[2] == ("3.png", "there are no maps for this picture")


def test_each_of_two_cases_has_its_own_map_and_runs_without_spaces_have_parts(tmp_path):
    picture(tmp_path / "p", "1.png", "red")
    maps = {"A": ramp(0, 1), "a": ramp(1, 0), "猫": ramp(0.5, 1), "色": ramp(0, 0.5)}
    publish(tmp_path / "maps", "1.png", maps)
    caption = "A cat, a dog. 红色的猫"
    run(tmp_path / "maps", tmp_path / "t", samples=[Sample("s", tmp_path / "p/1.png", "?", caption)])
    found = TargetStore(tmp_path / "t")["s"].word_maps
    assert [(w.text, w.start) for w in found.words] == [
        ("A", 0), ("cat", 2), ("a", 7), ("dog", 9), ("红色的猫", 14), ("色", 15), ("猫", 17)
    ]  # fmt: skip
    assert np.isnan(found.maps[[1, 3, 4]]).all()
    close(found.maps[[0, 2, 5, 6]], [maps[w] for w in "Aa色猫"], JPEG_LEVELS)


def test_samples_that_share_a_picture_share_its_maps(tmp_path):
    for name, color in (("1.png", "red"), ("2.png", "blue")):
        picture(tmp_path / "p", name, color)
    picture(tmp_path / "q", "1.png", "green")
    publish(tmp_path / "maps", "1.png", {"cat": ramp(0, 1), "dog": ramp(1, 0), "fox": ramp(0, 1)})
    publish(tmp_path / "maps", "2.png", {"hen": ramp(0, 0.7), "old": ramp(0, 1)})
    talk = (
        Message("user", "<image><image>"),
        Message("assistant", "Yes"),
        Message("user", "?"),
        Message("assistant", "An old hen"),
    )
    first = tmp_path / "p/1.png"
    samples = [
        Sample("1.png#0", first, "?", "A cat"),
        Sample("1.png#1", first, "?", "Dogs, a dog"),
        Sample("1.png#2", first, "?", "Nothing"),
        Conversation("talk", (tmp_path / "p/2.png", tmp_path / "p/none.png"), talk),
    ]
    result = run(tmp_path / "maps", tmp_path / "t", samples=samples)
    assert (result.written, result.failed, result.unused_maps) == (3, 1, 1)
    store = TargetStore(tmp_path / "t")
    close(store["1.png#0"].word_maps["cat"], ramp(0, 1), JPEG_LEVELS)
    close(store["1.png#1"].word_maps["dog"], ramp(1, 0), JPEG_LEVELS)
    assert np.isnan(store["1.png#1"].word_maps["dogs"]).all()
    talked = store.checked("talk", Image.open(tmp_path / "p/2.png")).word_maps
    assert talked.caption == "An old hen"  # the answer that has most of the words
    close(talked["hen"], ramp(0, 0.7), JPEG_LEVELS)
    assert failures(tmp_path / "t") == [
        ("1.png", "the word 'fox' is not in 'A cat' or 'Dogs, a dog' or 'Nothing'"),
        ("1.png#2", "no word of the caption 'Nothing' has a map"),
    ]
    # A name of two pictures says too little.
    both = [samples[0], Sample("q", tmp_path / "q/1.png", "?", "A cat")]
    assert run(tmp_path / "maps", tmp_path / "u", samples=both).failed == 2
    assert "several pictures of this name" in failures(tmp_path / "u")[0][1]
    # A conversation has one target.
    both = [Conversation("talk", (tmp_path / "p/2.png", first), (*talk, Message("assistant", "A cat")))]
    assert run(tmp_path / "maps", tmp_path / "v", samples=both).written == 1
    assert failures(tmp_path / "v")[-1] == ("talk", "another row has maps of this sample too")


def test_maps_of_the_wrong_kind_are_listed(tmp_path):
    picture(tmp_path / "p", "1.png", "red")
    (tmp_path / "p/2.png").write_bytes(b"broken")
    publish(tmp_path / "maps", "1.png", {"cat": ramp(0, 1), "dog": ramp(0, 1, 5), "hen": ramp(0, 1)[:3], "fox": ramp(0, 1)})
    (tmp_path / "maps/1.png/lpm_attention/1/attention_owl.jpg").write_bytes(b"broken")
    publish(tmp_path / "maps", "2.png", {"cat": ramp(0, 1)})
    result = run(tmp_path / "maps", tmp_path / "t", images=tmp_path / "p")
    assert (result.written, result.failed, result.unused_maps) == (1, 1, 3)
    found = TargetStore(tmp_path / "t")["1.png"].word_maps
    assert [w.text for w, m in zip(found.words, found.maps, strict=True) if not np.isnan(m).any()] == ["cat", "fox"]
    reasons = failures(tmp_path / "t")
    assert reasons[0] == ("1.png", "the map of 'dog' has 5x5 places; most have 4x4")
    assert reasons[1] == ("1.png", "the map of 'hen' has 3x4 places; most have 4x4")
    assert reasons[2][1].startswith("the map of 'owl' cannot be used: cannot read the image")
    assert (reasons[3][0], "cannot read the image" in reasons[3][1]) == ("2.png", True)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_an_import_is_continued(tmp_path, monkeypatch):
    for n in range(5):
        picture(tmp_path / "p", f"{n}.png", (50 * n, 0, 0))
        publish(tmp_path / "maps", f"{n}.png", {"cat": ramp(0, 0.2 * n + 0.1), "big_dog": ramp(0, 1)})
    run(tmp_path / "maps", tmp_path / "whole", images=tmp_path / "p")
    add = TargetWriter.add
    monkeypatch.setattr(TargetWriter, "add", lambda writer, target: add(writer, target) if len(writer.done) < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "maps", tmp_path / "t", images=tmp_path / "p")
    monkeypatch.undo()
    result = run(tmp_path / "maps", tmp_path / "t", images=tmp_path / "p")
    assert (result.written, result.present, result.failed, result.unused_maps) == (2, 3, 0, 5)
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")
    # Other maps, though of the same words, are another teacher's.
    grey(ramp(1, 0)).save(tmp_path / "maps/2.png/lpm_attention/2/attention_cat.jpg")
    with pytest.raises(TargetError, match="other weights"):
        run(tmp_path / "maps", tmp_path / "t", images=tmp_path / "p")


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


BYTES_AND_PATH = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


MAPS = [{"cat": ramp(0, 1), "3.5": ramp(1, 0)}, {"Dog": ramp(0.2, 0.4)}]


def table_of(kind, folder):
    """`MAPS` as a column in one of the forms that published tables have."""
    images = [{word: encoded(grey(values)) for word, values in maps.items()} for maps in MAPS]
    if kind == "datasets":
        from datasets import Dataset, Features, Value
        from datasets import Image as ImageFeature

        words = {word: ImageFeature() for word in ("cat", "3.5", "Dog")}
        rows = [{word: {"bytes": own[word], "path": None} if word in own else None for word in words} for own in images]
        features = Features({"image": ImageFeature(), "answers": Value("string"), "attention_images": words})
        pictures = [str(folder / f"p/{n}.png") for n in (1, 2)]
        data = Dataset.from_dict({"image": pictures, "answers": ["A cat, 3.5 m", "dog"], "attention_images": rows}, features)
        data.to_parquet(folder / "maps.parquet")
        return
    if kind == "struct of bytes":
        column = pa.array(images)
    elif kind == "struct of paths":
        for row in images:
            for word, data in row.items():
                (folder / f"{word}.png").write_bytes(data)
        column = pa.array([{word: f"{word}.png" for word in row} for row in images])
    elif kind == "map":
        rows = [[(word, {"bytes": data, "path": None}) for word, data in row.items()] for row in images]
        column = pa.array(rows, pa.map_(pa.string(), BYTES_AND_PATH))
    else:
        rows = [[{"word": word, "image": {"bytes": data, "path": None}} for word, data in row.items()] for row in images]
        column = pa.array(rows, pa.list_(pa.struct([("word", pa.string()), ("image", BYTES_AND_PATH)])))
    answers = [["A cat, 3.5 m"], ["dog"]] if kind == "list" else ["A cat, 3.5 m", "dog"]
    pictures = [f"p/{n}.png" for n in (1, 2)]
    if kind == "map":
        pictures = [{"bytes": (folder / name).read_bytes(), "path": name} for name in pictures]
    pq.write_table(pa.table({"image": pictures, "answers": answers, "attention_images": column}), folder / "maps.parquet")


@pytest.mark.parametrize("kind", ["datasets", "struct of bytes", "struct of paths", "map", "list"])
def test_tables_of_every_form(tmp_path, kind):
    images = [picture(tmp_path / "p", f"{n}.png", color) for n, color in ((1, "red"), (2, "blue"))]
    table_of(kind, tmp_path)
    for source, out in ((tmp_path / "maps.parquet", "t"), (tmp_path, "u")):
        result = run(source, tmp_path.parent / (tmp_path.name + out))
        assert (result.written, result.failed, result.unused_maps) == (2, 0, 0)
        store = TargetStore(tmp_path.parent / (tmp_path.name + out))
        one, two = store.checked("1.png", images[0]).word_maps, store.checked("2.png", images[1]).word_maps
        assert (one.caption, two.caption) == ("A cat, 3.5 m", "dog")
        assert [word.text for word in one.words] == ["A", "cat", "3.5", "m"]
        assert np.isnan(one.maps[[0, 3]]).all()
        close(one.maps[[1, 2]], [MAPS[0]["cat"], MAPS[0]["3.5"]], 0.5)
        close(two.maps, [MAPS[1]["Dog"]], 0.5)
    # Samples give ids and captions, as with a folder.
    result = run(tmp_path / "maps.parquet", tmp_path / "v", samples=[Sample("own", tmp_path / "p/1.png", "?", "Cat")])
    assert (result.written, result.failed, result.unused_maps) == (1, 1, 1)
    close(TargetStore(tmp_path / "v")["own"].word_maps.maps, [MAPS[0]["cat"]], 0.5)


def test_rows_of_one_picture_are_told_apart_by_their_answers(tmp_path):
    picture(tmp_path / "p", "1.png", "red")
    maps = [{"cat": encoded(grey(ramp(0, 1)))}, {"cat": encoded(grey(ramp(1, 0))), "dog": encoded(grey(ramp(0, 0.5)))}]
    table = {"image": ["p/1.png"] * 2, "answers": [["A cat"], ["cat, dog", "Dog"]], "attention_images": maps}
    pq.write_table(pa.table(table), tmp_path / "maps.parquet")
    assert run(tmp_path / "maps.parquet", tmp_path / "t").written == 3
    store = TargetStore(tmp_path / "t")
    assert {i: store[i].word_maps.caption for i in store} == {"1.png#0": "A cat", "1.png#1": "cat, dog", "1.png#2": "Dog"}
    close(store["1.png#2"].word_maps.maps, [ramp(0, 0.5)], 0.5)
    samples = [Sample("x", tmp_path / "p/1.png", "?", "cat, dog"), Sample("y", tmp_path / "p/1.png", "?", "A cat")]
    assert run(tmp_path / "maps.parquet", tmp_path / "u", samples=samples).written == 2
    store = TargetStore(tmp_path / "u")
    close(store["x"].word_maps["cat"], ramp(1, 0), 0.5)
    close(store["y"].word_maps["cat"], ramp(0, 1), 0.5)


def test_what_holds_no_maps_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("no table")
    pq.write_table(pa.table({"image": ["a"], "text": ["b"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"image": ["a"], "attention_images": ["b"]}), tmp_path / "text_maps.parquet")
    (tmp_path / "maps/1.png/lpm_attention/1").mkdir(parents=True)
    for name, message in (
        ("none", "there is nothing at"),
        ("empty", "has no maps: expected <picture>/lpm_attention"),
        ("text.parquet", "is no parquet file"),
        ("other.parquet", "has the columns image, text; expected image, question, answers and attention_images"),
        ("text_maps.parquet", "attention_images is string; expected words with their pictures"),
        ("maps", "has no map that can be read"),
    ):
        with pytest.raises(DataError, match=message):
            run(tmp_path / name, tmp_path / "t", images=tmp_path)
    assert not (tmp_path / "t").exists()


@pytest.fixture
def store(tmp_path):
    """Two samples, random maps [32, 32]; "a" has two, "3.5" none or an unsafe name, "dog" none."""
    rng = np.random.default_rng(0)
    writer = TargetWriter(tmp_path / "store", {"model": "test", "weights": "x"})
    for name, color, caption in (("1.png", "red", "A big cat, a dog, a 猫"), ("2.jpg", "blue", "3.5 balls")):
        words = words_of(caption)
        maps = (rng.random((len(words), 32, 32)) ** 4 * 3 - 1).astype(np.float16).astype(np.float32)
        maps[[word.text == "dog" for word in words]] = np.nan
        writer.add(Target(name, image_sha256(picture(tmp_path / "p", name, color)), WordMaps(caption, words, maps)))
    writer.close()
    return TargetStore(tmp_path / "store")


def scaled(values):
    return (values - values.min()) / (values.max() - values.min())


def expected_of(store):
    """By sample and word what has to be published."""
    one, two = (store[name].word_maps.maps for name in ("1.png", "2.jpg"))
    return {
        "1.png": {"A": one[0], "big": one[1], "cat": one[2], "a": (one[3] + one[5]) / 2, "猫": one[6]},
        "2.jpg": {"3.5": two[0], "balls": two[1]},
    }


def test_the_folder_is_as_published(store, tmp_path):
    result = export_targets(store, tmp_path / "out", format="folder", progress=False)
    assert (result.written, result.maps) == (2, 6)
    assert result.failed == (("2.jpg", "the word '3.5' cannot be part of a file name as published; a table can have it"),)
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert files == [
        *(f"1.png/lpm_attention/1/attention_{word}.jpg" for word in ("A", "a", "big", "cat", "猫")),
        "2.jpg/lpm_attention/2/attention_balls.jpg",
    ]
    for name, maps in expected_of(store).items():
        for word, values in maps.items():
            if word == "3.5":
                continue
            image = Image.open(tmp_path / "out" / name / "lpm_attention" / name[0] / f"attention_{word}.jpg")
            assert (image.format, image.mode, image.size) == ("JPEG", "L", (32, 32))
            close(np.asarray(image) / 255, scaled(values), JPEG_LEVELS)
    again = run(tmp_path / "out", tmp_path / "t", samples=samples_of(store, tmp_path))
    assert (again.written, again.failed, again.unused_maps) == (2, 0, 0)
    check_round_trip(store, TargetStore(tmp_path / "t"), JPEG_LEVELS)


def samples_of(store, tmp_path):
    return [Sample(i, tmp_path / "p" / i, f"What is in {i}?", store[i].word_maps.caption) for i in store]


def check_round_trip(store, back, levels):
    expected = expected_of(store)
    for sample_id in store:
        found, original = back[sample_id], store[sample_id]
        assert found.word_maps.caption == original.word_maps.caption
        assert found.image_sha256 == original.image_sha256
        texts = [word.text for word in original.word_maps.words]
        assert [word.text for word in found.word_maps.words] == texts
        for text, values in zip(texts, found.word_maps.maps, strict=True):
            if text in expected[sample_id] and not (levels > 1 and text == "3.5"):
                close(values, scaled(expected[sample_id][text]), levels)
            else:
                assert np.isnan(values).all()


def test_the_table_is_as_published(store, tmp_path):
    from datasets import load_dataset

    path = tmp_path / "new/maps.parquet"
    result = export_targets(store, path, format="parquet", samples=samples_of(store, tmp_path), progress=False)
    assert (result.written, result.maps, result.failed) == (2, 7, ())
    assert [p.name for p in path.parent.iterdir()] == ["maps.parquet"]
    data = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert data.column_names == ["image", "question", "answers", "attention_images"]
    for row, (name, maps) in zip(data, expected_of(store).items(), strict=True):
        assert image_sha256(row["image"]) == store[name].image_sha256
        assert (row["question"], row["answers"]) == (f"What is in {name}?", store[name].word_maps.caption)
        assert {word for word, image in row["attention_images"].items() if image is not None} == maps.keys()
        for word, values in maps.items():
            close(np.asarray(row["attention_images"][word]) / 255, scaled(values), 0.5)
    # With the picture files themselves.
    raw = pq.read_table(path)["image"].to_pylist()
    assert [own["bytes"] for own in raw] == [(tmp_path / "p" / own["path"]).read_bytes() for own in raw]
    again = run(path, tmp_path / "t")
    assert (again.written, again.failed, again.unused_maps) == (2, 0, 0)
    check_round_trip(store, TargetStore(tmp_path / "t"), 0.9)  # half a step, and the store's float16


def test_the_folder_of_the_pictures_serves_for_samples(store, tmp_path):
    path = tmp_path / "maps.parquet"
    result = export_targets(store, path, format="parquet", images=tmp_path / "p", progress=False)
    assert (result.written, result.failed) == (2, ())
    assert pq.read_table(path)["question"].to_pylist() == [DEFAULT_QUESTION] * 2
    check_round_trip(store, TargetStore(run_into(path, tmp_path / "t")), 0.9)


def run_into(source, out, **options):
    run(source, out, **options)
    return out


def test_pictures_in_memory_and_conversations_are_exported(store, tmp_path):
    talk = (Message("user", "<image><image>\nWhich?"), Message("assistant", "3.5 balls"))
    samples = [
        Sample("1.png", Image.open(tmp_path / "p/1.png"), "What?", "A big cat, a dog, a 猫"),
        Conversation("2.jpg", (tmp_path / "p/1.png", tmp_path / "p/2.jpg"), talk),
    ]
    path = tmp_path / "maps.parquet"
    assert export_targets(store, path, format="parquet", samples=samples, progress=False).written == 2
    rows = pq.read_table(path, columns=["image", "question"]).to_pylist()
    assert [(row["image"]["path"], row["question"]) for row in rows] == [("1.png", "What?"), ("2.jpg", "Which?")]
    check_round_trip(store, TargetStore(run_into(path, tmp_path / "t")), 0.9)


def test_targets_of_other_pictures_are_not_exported(store, tmp_path):
    picture(tmp_path / "p", "1.png", "green")
    samples = samples_of(store, tmp_path)
    for options in ({"samples": samples}, {"images": tmp_path / "p"}):
        result = export_targets(store, tmp_path / f"out{len(options)}{'images' in options}", format="folder", **options)
        assert result.written == 1
        assert result.failed[0][0] == "1.png"
        assert "made from another picture" in result.failed[0][1]
    (tmp_path / "p/2.jpg").unlink()
    result = export_targets(store, tmp_path / "few", format="folder", samples=samples[1:])
    assert [(i, reason.split(" at ")[0]) for i, reason in result.failed] == [
        ("1.png", "no sample has this id"),
        ("2.jpg", "there is no image"),
    ]
    with pytest.raises(TargetError, match=r"no word of .*store has a map that could be written: no sample has this id"):
        export_targets(store, tmp_path / "none.parquet", format="parquet", samples=[])
    assert not (tmp_path / "none.parquet").exists()


def make_store(folder, targets):
    """Targets (id, fingerprint, [(word, map)]) as a store, whatever their words."""
    writer = TargetWriter(folder, {"model": "test", "weights": "x"}, StoreConfig(map_size=4))
    for sample_id, digest, maps in targets:
        caption = " ".join(word for word, _ in maps)
        words = []
        for word, _ in maps:
            start = words[-1].end + 1 if words else 0
            words.append(Word(word, start, start + len(word)))
        writer.add(Target(sample_id, digest, WordMaps(caption, tuple(words), np.stack([values for _, values in maps]))))
    writer.close()
    return TargetStore(folder)


def test_nothing_is_written_outside_of_the_folder(tmp_path):
    words = ["../../evil", "a/b", "..", "ok", "x" * 300, "猫" * 80, "猫" * 81, "a\\b", "a_b", "a.b", "a\x00b", "क्\u200dष", "a:b"]
    store = make_store(
        tmp_path / "store",
        [
            ("../../up.jpg", "1", [(word, ramp(0, 1)) for word in words]),
            ("..", "2", [("cat", ramp(0, 1))]),
            ("", "3", [("cat", ramp(0, 1))]),
            ("a\\..\\b.jpg", "4", [("cat", ramp(0, 1))]),
            ("y" * 256, "5", [("cat", ramp(0, 1))]),
            (".hidden", "6", [("cat", ramp(0, 1))]),
        ],
    )
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    result = export_targets(store, tmp_path / "a/b/out", format="folder", progress=False)
    new = {str(path.relative_to(tmp_path / "a/b/out")) for path in tmp_path.rglob("*") if path.is_file() and path not in before}
    assert new == {
        "up.jpg/lpm_attention/up/attention_ok.jpg",
        "up.jpg/lpm_attention/up/attention_क्\u200dष.jpg",
        f"up.jpg/lpm_attention/up/attention_{'猫' * 80}.jpg",
        ".hidden/lpm_attention/.hidden/attention_cat.jpg",
    }
    assert [sample_id for sample_id, _ in result.failed] == ["..", "", "a\\..\\b.jpg", "y" * 256] + ["../../up.jpg"] * 10
    assert (result.written, result.maps) == (2, 4)


def test_samples_of_one_picture_share_a_folder(tmp_path):
    store = make_store(
        tmp_path / "store",
        [
            ("p/1.b.jpg#0", "1", [("cat", ramp(0, 3)), ("dog", ramp(2, 1))]),
            ("p/1.b.jpg#1", "1", [("cat", ramp(1, 0)), ("flat", ramp(2, 2))]),
            ("q/1.b.jpg", "2", [("cat", ramp(1, 0))]),
        ],
    )
    with np.errstate(all="raise"):
        result = export_targets(store, tmp_path / "out", format="folder", progress=False)
    assert (result.written, result.maps) == (2, 3)
    assert result.failed == (("q/1.b.jpg", "another picture is called 1.b.jpg too"),)
    folder = tmp_path / "out/1.b.jpg/lpm_attention/1"
    for word, expected in (("cat", ramp(0, 1)), ("dog", ramp(1, 0)), ("flat", ramp(0, 0))):
        close(np.asarray(Image.open(folder / f"attention_{word}.jpg")) / 255, expected, JPEG_LEVELS)


def test_wrong_ways_to_export_are_named(store, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    (tmp_path / "full.parquet").write_text("mine")
    images = tmp_path / "p"
    for error, message, out, options in (
        (ConfigError, "format is 'zip'", "out", {"format": "zip"}),
        (ConfigError, "ends in .parquet", "out", {"format": "parquet", "images": images}),
        (ConfigError, r"give samples \(--samples\) or the folder", "out.parquet", {"format": "parquet"}),
        (TargetError, "full exists; give a new name", "full", {"format": "folder"}),
        (TargetError, "mine exists", "full/mine", {"format": "folder"}),
        (TargetError, "full.parquet exists", "full.parquet", {"format": "parquet", "images": images}),
    ):
        with pytest.raises(error, match=message):
            export_targets(store, tmp_path / out, **options)
    assert (tmp_path / "full/mine").read_text() == (tmp_path / "full.parquet").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def lavender(*arguments):
    return subprocess.run([sys.executable, "-m", "lavender", *map(str, arguments)], capture_output=True, text=True)


def test_the_commands(store, tmp_path):
    entries = [
        {
            "filename": name,
            "split": split,
            "sentences": [{"raw": store[name].word_maps.caption}],
        }
        for name, split in (("1.png", "train"), ("2.jpg", "test"))
    ]
    karpathy = tmp_path / "captions.json"
    karpathy.write_text(json.dumps({"images": entries}))
    options = ("--samples", karpathy, "--images", tmp_path / "p")
    result = lavender("targets", "export", store.folder, tmp_path / "out", "--format", "folder", *options)
    assert result.returncode == 0, result.stderr
    assert "skipped 2.jpg: the word '3.5'" in result.stdout
    assert "out: 2 samples with 6 maps written, 1 skipped" in result.stdout
    result = lavender("targets", "import", tmp_path / "out", "--out", tmp_path / "t", *options)
    assert result.returncode == 0, result.stderr
    assert "2 written, 0 there before, 0 skipped, 0 maps not used" in result.stdout
    check_round_trip(store, TargetStore(tmp_path / "t"), JPEG_LEVELS)
    result = lavender("targets", "export", store.folder, tmp_path / "o.parquet", "--format", "parquet")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("lavender: a table contains the pictures")
    assert "Traceback" not in result.stderr


def test_a_cropped_map_is_published_in_its_place(tmp_path):
    """The middle half of a wide picture, hot at its upper left corner: published maps cover the whole picture."""
    Image.new("RGB", (16, 8)).save(tmp_path / "a.png")
    maps = np.zeros((1, 8, 8), np.float32)
    maps[0, :4, :2] = 1
    word_maps = WordMaps("cat", words_of("cat"), maps, (0.0, 0.25, 1.0, 0.75))
    writer = TargetWriter(tmp_path / "t", {"model": "test", "weights": "x"}, StoreConfig(map_size=8))
    writer.add(Target("a.png", image_sha256(load_image(tmp_path / "a.png")), word_maps))
    writer.close()
    export_targets(TargetStore(tmp_path / "t"), tmp_path / "out.parquet", format="parquet", images=tmp_path, progress=False)
    import_targets(tmp_path / "out.parquet", tmp_path / "back", progress=False)
    store = TargetStore(tmp_path / "back")
    [sample_id] = store
    values = store[sample_id].word_maps.maps[0]
    y, x = np.unravel_index(values.argmax(), values.shape)
    assert (y < 4, x) == (True, 2)
    assert values[:, [0, 1, 6, 7]].max() == values.min()
