"""Published sets and stores from elsewhere: their names lead to nothing outside of the folders that were given."""

from __future__ import annotations

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lavender.errors import DataError
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
