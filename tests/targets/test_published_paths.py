"""Published sets and stores from elsewhere: their names lead to nothing outside of the folders that were given."""

from __future__ import annotations

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lavender.errors import DataError, TargetError
from lavender.images import image_sha256
from lavender.targets.published_export import export_targets
from lavender.targets.published_import import import_targets
from lavender.targets.store import TargetStore

from .test_published_format import make_store, picture, ramp


def test_a_set_names_no_files_outside_of_its_folder(tmp_path):
    """Maps and pictures that are there for the taking, one folder up."""
    for name in ("secret.png", "1.png", "set/maps/cat.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).save(tmp_path / name)
    picture(tmp_path / "p", "1.png", "red")
    maps = {"cat": "maps/cat.png", "dog": "../secret.png", "hat": str(tmp_path / "secret.png"), "sun": "maps/../../secret.png"}
    pairs = [{"word": word, "image": {"bytes": None, "path": path}} for word, path in maps.items()]
    rows = [{"image": {"bytes": None, "path": "../1.png"}, "answers": "cat dog hat sun", "attention_images": pairs}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set/table.parquet")
    with pytest.raises(DataError, match=r"no picture 1\.png in .*set; give its folder"):
        import_one(tmp_path / "set", tmp_path / "none")
    result = import_targets(tmp_path / "set", tmp_path / "t", images=tmp_path / "p", progress=False)
    assert (result.written, result.unused_maps) == (1, 3)
    known = TargetStore(tmp_path / "t")["1.png"].word_maps
    assert [word.text for word, values in zip(known.words, known.maps, strict=True) if np.isfinite(values).all()] == ["cat"]
    reasons = TargetStore(tmp_path / "t").failed["1.png"].split("\n")
    assert [reason.split(" cannot be used: ")[0] for reason in reasons] == [
        f"the map of '{word}'" for word in ("dog", "hat", "sun")
    ]
    assert all("is not in" in reason for reason in reasons)


def import_one(source, out):
    """Raises the reason why the only row of a set cannot be used."""
    import_targets(source, out, progress=False)
    raise DataError(json.loads((out / "manifest.json").read_text())["failed"][0]["reason"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes, which this system lacks")
def test_tables_are_regular_files_and_written_as_such(tmp_path):
    image = picture(tmp_path / "p", "1.png", "red")
    store = make_store(tmp_path / "store", [("1.png", image_sha256(image), [("cat", ramp(0, 1))])])
    (tmp_path / "set").mkdir()
    os.mkfifo(tmp_path / "set/a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet is no parquet file \(.*this is a pipe"):
        import_targets(tmp_path / "set", tmp_path / "t", progress=False)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "o.parquet.partial").symlink_to(tmp_path / "mine")
    export_targets(store, tmp_path / "o.parquet", format="parquet", images=tmp_path / "p", progress=False)
    assert (tmp_path / "mine").read_text() == "mine"
    assert pq.read_table(tmp_path / "o.parquet").num_rows == len(store)


def test_an_id_that_leads_out_of_the_pictures_is_not_followed(tmp_path):
    image = picture(tmp_path, "up.png", "red")
    picture(tmp_path / "p", "in.png", "red")
    store = make_store(tmp_path / "store", [("../up.png", image_sha256(image), [("cat", ramp(0, 1))])])
    result = export_targets(store, tmp_path / "out", format="folder", images=tmp_path / "p", progress=False)
    assert (result.written, [sample_id for sample_id, _ in result.failed]) == (0, ["../up.png"])
    assert "is not in" in result.failed[0][1]


def test_a_path_too_long_for_the_system_costs_its_own_row(tmp_path):
    picture(tmp_path / "set", "1.png", "red")
    data = (tmp_path / "set/1.png").read_bytes()
    long = "a" * 5000
    rows = [
        {"image": {"bytes": None, "path": long}, "answers": "cat", "attention_images": [of("cat", data, "m")]},
        {"image": {"bytes": None, "path": "1.png"}, "answers": "cat hat", "attention_images": [of("cat", data, "m")]},
    ]
    rows[1]["attention_images"].append(of("hat", None, long))
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "map.png")
    for row in rows:
        row["attention_images"][0]["image"]["bytes"] = (tmp_path / "map.png").read_bytes()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set/TABLE.PARQUET")
    for name, source in (("t", tmp_path / "set"), ("u", tmp_path / "set/TABLE.PARQUET")):
        result = import_targets(source, tmp_path / name, images=tmp_path / "set", progress=False)
        assert (result.written, result.failed, result.unused_maps) == (1, 1, 1)
        store = TargetStore(tmp_path / name)
        assert list(store) == ["1.png"]
        assert store.failed.keys() == {long, "1.png"}
        assert "there is no picture aaa" in store.failed[long]
        assert "File name too long" in store.failed["1.png"]
    with pytest.raises(DataError, match="there is nothing at"):
        import_targets(tmp_path / long, tmp_path / "v", progress=False)


def of(word, data, path):
    return {"word": word, "image": {"bytes": data, "path": path}}


def test_a_map_that_lies_elsewhere_is_no_matter_of_the_pictures_folder(tmp_path):
    picture(tmp_path / "set", "1.png", "red")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "map.png")
    maps = [of("cat", (tmp_path / "map.png").read_bytes(), "m"), of("hat", None, "../map.png")]
    rows = [{"image": {"bytes": None, "path": "1.png"}, "answers": "cat hat", "attention_images": maps}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set/table.parquet")
    assert import_targets(tmp_path / "set", tmp_path / "t", progress=False).unused_maps == 1
    reason = TargetStore(tmp_path / "t").failed["1.png"]
    assert "'../map.png' is not in" in reason
    assert reason.endswith("put the map there")
    assert "--images" not in reason


@pytest.mark.parametrize("format", ["folder", "parquet"])
def test_an_export_onto_a_link_to_nothing_is_refused(tmp_path, format):
    image = picture(tmp_path / "p", "1.png", "red")
    store = make_store(tmp_path / "store", [("1.png", image_sha256(image), [("cat", ramp(0, 1))])])
    for target in (tmp_path / "nothing", tmp_path / "no/such/folder"):
        link = tmp_path / "link.parquet"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises(TargetError, match=r"link\.parquet is a link to .*, where nothing is; give"):
            export_targets(store, link, format=format, images=tmp_path / "p", progress=False)
        assert not target.exists()


def test_a_table_may_be_called_in_upper_case(tmp_path):
    image = picture(tmp_path / "p", "1.png", "red")
    store = make_store(tmp_path / "store", [("1.png", image_sha256(image), [("cat", ramp(0, 1))])])
    export_targets(store, tmp_path / "O.PARQUET", format="parquet", images=tmp_path / "p", progress=False)
    assert import_targets(tmp_path / "O.PARQUET", tmp_path / "t", progress=False).written == 1
    np.testing.assert_allclose(TargetStore(tmp_path / "t")["1.png"].word_maps.maps[0], ramp(0, 1), atol=1 / 255)
