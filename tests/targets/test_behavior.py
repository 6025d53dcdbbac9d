"""What a store's teacher does, as its manifest has it: checked before it is compared, and learned where nobody wrote it down."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest

from lavender.errors import TargetError
from lavender.targets.maintenance import info, merge, verify
from lavender.targets.manifest import different_teacher, new_manifest, read_manifest
from lavender.targets.store import TargetStore, TargetWriter

from .stores import CONFIG, SOURCE, make_target
from .test_old_stores import OLD, UINT8

NUMBERS = np.random.default_rng(0).normal(size=12)


def behavior(scale=1.0, tolerance=0.01):
    return {"tolerance": tolerance, "tokens": "t0", "maps": (scale * NUMBERS).tolist(), "levels": [1.0, 2, 3.0]}


def source(**entries):
    return {**SOURCE, "weights_as_loaded": "old", **entries}


def write(folder, numbers, made_from):
    with TargetWriter(folder, made_from, CONFIG, 3) as writer:
        writer.add(*[make_target(number) for number in numbers if f"s{number}" not in writer.done])
        writer.close()


def edit(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest["source"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


def first_map(value):
    return lambda known: known["behavior"]["maps"].__setitem__(0, value)


DAMAGE = {
    "weights 3": lambda known: known.update(weights=3),
    "weights_as_loaded {}": lambda known: known.update(weights_as_loaded={}),
    "weights_as_loaded []": lambda known: known.update(weights_as_loaded=[1]),
    "text": lambda known: known.update(behavior="x"),
    "list": lambda known: known.update(behavior=[1]),
    "none": lambda known: known.update(behavior=None),
    "empty": lambda known: known.update(behavior={}),
    "no tolerance": lambda known: known["behavior"].pop("tolerance"),
    **{
        f"tolerance {value}": lambda known, value=value: known["behavior"].update(tolerance=value)
        for value in (9, 9.0, 0.11, 0, 0.0, -1.0, "x", None, True, [0.01])
    },
    "texts": lambda known: known["behavior"].update(maps=["a"] * 12),
    "nested": first_map([1, 2]),
    "map none": first_map(None),
    "map true": first_map(True),
    "map 1e300": first_map(1e300),
    "map 1e400": first_map(10**400),
    "number": lambda known: known["behavior"].update(maps=1.0),
    "digits": lambda known: known["behavior"].update(digits={"a": 1}),
    "continued_by": lambda known: known.update(continued_by={"tolerance": 9.0}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_entry_that_cannot_be_compared_is_one_line(tmp_path, damage):
    write(tmp_path / "t", range(3), source(behavior=behavior()))
    edit(tmp_path / "t", DAMAGE[damage])
    for use in (
        lambda: write(tmp_path / "t", range(4), source(behavior=behavior(1.5))),
        lambda: TargetStore(tmp_path / "t"),
        lambda: info(tmp_path / "t"),
        lambda: verify(tmp_path / "t"),
        lambda: merge([tmp_path / "t"], tmp_path / "u"),
    ):
        with pytest.raises(TargetError, match=r"manifest\.json is damaged \(the \w+ of its source") as error:
            use()
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500
    wrong = source(behavior=behavior())
    DAMAGE[damage](wrong)
    with pytest.raises(TargetError, match=r"^the (weights|behavior|continued).*expected"):
        new_manifest(wrong, CONFIG)


def test_numbers_that_were_edited_are_another_teacher(tmp_path):
    """Within what the schema allows: as large as can be, as tolerant as can be, fewer, none at all."""
    here = source(behavior=behavior())
    for change in (
        first_map(9e29),
        first_map(10**29),
        lambda known: known["behavior"].pop("maps"),
        lambda known: known["behavior"].update(maps=[]),
        lambda known: known["behavior"].update(maps=known["behavior"]["maps"][1:]),
        lambda known: known["behavior"].update(maps="x"),
    ):
        there = json.loads(json.dumps(here))
        change(there)
        assert "otherwise in maps:" in different_teacher(there, here)
        assert "otherwise in maps:" in different_teacher(here, there)


def test_the_stricter_tolerance_counts(tmp_path):
    write(tmp_path / "t", range(3), source(behavior=behavior(1.0, 0.01)))
    edit(tmp_path / "t", lambda known: known["behavior"].update(tolerance=0.1))
    with pytest.raises(TargetError, match="behaves otherwise in maps"):
        write(tmp_path / "t", range(4), source(behavior=behavior(1.05, 0.01)))
    write(tmp_path / "t", range(4), source(behavior=behavior(1.005, 0.01)))
    assert len(TargetStore(tmp_path / "t")) == 4


def test_an_older_store_learns_what_its_teacher_does(tmp_path, caplog):
    """From the first continuation that stores something, by which every later one is compared."""
    write(tmp_path / "t", range(3), SOURCE)
    fingerprint = TargetStore(tmp_path / "t").fingerprint
    with caplog.at_level(logging.WARNING, logger="lavender"):
        write(tmp_path / "t", range(3), source(behavior=behavior(3.0)))
        assert "continued_by" not in read_manifest(tmp_path / "t")["source"], "nothing was stored"
        write(tmp_path / "t", range(4), source(behavior=behavior()))
        assert len(caplog.records) == 2
        write(tmp_path / "t", range(5), source(behavior=behavior(1.001)))
        assert len(caplog.records) == 2
    known = read_manifest(tmp_path / "t")["source"]
    assert "behavior" not in known
    assert known["continued_by"] == behavior()
    before = (tmp_path / "t/manifest.json").read_bytes()
    for numbers in (range(5), range(6)):
        with pytest.raises(TargetError, match="behaves otherwise in maps"):
            write(tmp_path / "t", numbers, source(behavior=behavior(3.0)))
    assert (tmp_path / "t/manifest.json").read_bytes() == before
    store = TargetStore(tmp_path / "t")
    assert (len(store), store.fingerprint, store.source) == (5, fingerprint, SOURCE)
    assert verify(tmp_path / "t") == []


def test_a_continuation_that_is_cut_off_has_been_noted(tmp_path):
    write(tmp_path / "t", range(3), SOURCE)
    with TargetWriter(tmp_path / "t", source(behavior=behavior()), CONFIG, 3) as writer:
        writer.add(make_target(3))
        shutil.copytree(tmp_path / "t", tmp_path / "killed")
    for name in ("t", "killed"):
        with pytest.raises(TargetError, match="behaves otherwise in maps"):
            write(tmp_path / name, range(5), source(behavior=behavior(3.0)))


def test_a_store_of_version_2_learns_it_too(tmp_path):
    shutil.copytree(OLD / "finished", tmp_path / "t")
    store = TargetStore(tmp_path / "t")
    made_from = {**store.source, "behavior": behavior()}
    with TargetWriter(tmp_path / "t", made_from, UINT8) as writer:
        writer.add(make_target(0))
        writer.close()
    assert read_manifest(tmp_path / "t")["teacher"]["continued_by"] == behavior()
    assert TargetStore(tmp_path / "t").fingerprint == store.fingerprint
    assert TargetStore(tmp_path / "t").source == store.source
    with pytest.raises(TargetError, match="behaves otherwise in maps"):
        TargetWriter(tmp_path / "t", {**made_from, "behavior": behavior(3.0)}, UINT8)


def test_a_merge_keeps_what_is_known_of_some_of_its_maps(tmp_path):
    write(tmp_path / "old", range(2), SOURCE)
    write(tmp_path / "new", range(2, 4), source(behavior=behavior()))
    assert merge([tmp_path / "old", tmp_path / "new"], tmp_path / "all") == 4
    known = read_manifest(tmp_path / "all")["source"]
    assert ("behavior" in known, known["continued_by"]) == (False, behavior())
    write(tmp_path / "other", range(4, 6), source(behavior=behavior(3.0)))
    with pytest.raises(TargetError, match="behaves otherwise in maps"):
        merge([tmp_path / "all", tmp_path / "other"], tmp_path / "none")
