"""Stores that lavender wrote before manifests of version 3 load, go on, and keep the fingerprint that run folders recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lavender.config import ExtractionConfig, TeacherConfig
from lavender.data.samples import read_pairs
from lavender.errors import TargetError
from lavender.extraction.extract import extract
from lavender.miniworld import TEACHER
from lavender.targets.maintenance import info, merge, verify
from lavender.targets.manifest import StoreConfig, read_manifest
from lavender.targets.published_import import import_targets
from lavender.targets.store import TargetStore, TargetWriter

OLD = Path(__file__).parent / "old_stores"
"""`finished` has the maps of four pictures of `data`, `unfinished` a shard and a pending file, `imported` the first picture of
`published`."""
CONFIG = TeacherConfig(inversion="noise", timesteps=(51,), map_size=4, storage="uint8")
UINT8 = StoreConfig(map_size=4, storage="uint8")
WORK = ExtractionConfig(batch_size=1, shard_size=2)


@pytest.fixture
def old(tmp_path):
    shutil.copytree(OLD, tmp_path / "old")
    return tmp_path / "old"


@pytest.fixture(autouse=True)
def _recorded_weights(monkeypatch):
    """The digits of a teacher's weights, which depend on the version of diffusers too, as the stores have them."""
    weights = read_manifest(OLD / "finished")["teacher"]["weights"]
    monkeypatch.setattr("lavender.teachers.model._weights_fingerprint", lambda pipe: weights)


def run(old, name, config=CONFIG):
    return extract(TEACHER, read_pairs(old / "data/captions.jsonl"), old / name, config, WORK, progress=False)


def test_a_finished_store_loads_as_what_it_is(old):
    store = TargetStore(old / "finished")
    assert list(store) == [f"images/0000{n}.png" for n in range(4)]
    assert store.failed == {"empty": "the caption '...' has no words"}
    assert store.config == UINT8
    assert (store.source["model"], store.source["timesteps"]) == ("teacher", [51])
    assert np.isfinite(store["images/00003.png"].word_maps.maps).all()
    assert verify(old / "finished", read_pairs(old / "data/captions.jsonl")[:4]) == []
    assert info(old / "finished").samples == 4
    assert info(old / "unfinished").samples == 3
    with pytest.warns(FutureWarning, match="TargetStore.source"):
        assert store.teacher == read_manifest(old / "finished")["teacher"]


def test_an_extraction_that_is_made_again_has_the_same_fingerprint(old, tmp_path):
    extract(TEACHER, read_pairs(old / "data/captions.jsonl")[:4], tmp_path / "again", CONFIG, WORK, progress=False)
    again = TargetStore(tmp_path / "again")
    assert read_manifest(again.folder)["version"] == 3
    assert again.fingerprint == TargetStore(old / "finished").fingerprint


def test_a_run_folder_knows_its_store_again(old):
    """What `run.json` recorded of the targets."""
    store = TargetStore(old / "finished")
    recorded = json.loads((OLD / "recorded.json").read_text())["targets_fingerprint"]
    assert [store.fingerprint, store.contents()] == recorded


@pytest.mark.parametrize(("name", "present"), [("finished", 4), ("unfinished", 3)])
def test_an_extraction_is_continued(old, name, present):
    before = {path.name: path.read_bytes() for path in (old / name).glob("data-*.parquet")}
    fingerprint = read_manifest(old / name)["fingerprint"]
    with pytest.raises(TargetError, match=r"timesteps: \[51\] there, \[151\] now"):
        run(old, name, TeacherConfig(inversion="noise", timesteps=(151,), map_size=4, storage="uint8"))
    summary = run(old, name)
    assert (summary.written, summary.present, summary.failed) == (5 - present, present, 0)
    assert before.items() <= {path.name: path.read_bytes() for path in (old / name).glob("data-*.parquet")}.items()
    store = TargetStore(old / name)
    assert len(store) == 5
    assert store.fingerprint == fingerprint
    assert verify(old / name, read_pairs(old / "data/captions.jsonl")) == []


def test_other_weights_are_refused(old):
    source = TargetStore(old / "finished").source
    with pytest.raises(TargetError, match="other weights"):
        TargetWriter(old / "finished", source | {"weights": "0"}, UINT8)
    TargetWriter(old / "finished", source | {"model": "the same in another folder"}, UINT8).release()


def test_an_import_is_continued(old):
    result = import_targets(old / "published", old / "imported", images=old / "data/images", progress=False)
    assert (result.written, result.present, result.failed) == (1, 1, 0)
    assert verify(old / "imported") == []


@pytest.mark.parametrize("newest_first", [False, True])
def test_old_and_new_are_merged(old, newest_first):
    run(old, "new")
    assert read_manifest(old / "new")["version"] == 3
    folders = [old / "finished", old / "new"][:: -1 if newest_first else 1]
    assert merge(folders, old / "all") == 5
    assert verify(old / "all") == []
    assert TargetStore(old / "all").config == UINT8
    other = old / "other"
    run(old, "other", TeacherConfig(inversion="noise", timesteps=(51,), map_size=4, seed=7, storage="uint8"))
    with pytest.raises(TargetError, match="seed: "):
        merge([old / "finished", other], old / "none")
