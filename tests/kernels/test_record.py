"""A record cannot pass for one of other sources."""

from __future__ import annotations

import pytest

from . import record


def test_a_record_of_other_sources_fails_with_the_command_that_renews_it(monkeypatch):
    monkeypatch.setitem(record.RECORDS, "cuda", (lambda: "another key", dict))
    with pytest.raises(pytest.fail.Exception, match=r"cuda.json is not of these sources.*python -m tests.kernels.record cuda"):
        record.recorded("cuda")


def test_a_key_depends_on_contents_names_and_versions(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.write_text(path.name)
    keys = {
        record.key_of([one], ["1"]),
        record.key_of([one, other], ["1"]),
        record.key_of([one], ["2"]),
        record.key_of([other], ["1"]),
    }
    before = record.key_of([one], ["1"])
    one.write_text("changed")
    assert len({*keys, record.key_of([one], ["1"])}) == 5
    one.write_text("one")
    assert record.key_of([one], ["1"]) == before
