"""A run that continues a store reads no picture whose file has the size and time that it had, and is never misled by its notes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter

import pytest

from lavender import images
from lavender.config import ExtractionConfig, TeacherConfig
from lavender.data.pairs import Pair
from lavender.data.sources import open_pairs
from lavender.errors import DataError, TargetError
from lavender.extraction.extract import extract
from lavender.extraction.preview import preview
from lavender.extraction.seen import FILE
from lavender.miniworld import TEACHER, write_dataset
from lavender.targets.maintenance import verify
from lavender.targets.store import TargetStore

from ..data.forms import as_shards

NOISE = TeacherConfig(inversion="noise", timesteps=(51,), map_size=8)
WORK = ExtractionConfig(batch_size=2)
COUNT = 4


@pytest.fixture
def reads(monkeypatch):
    """How often each file was read for a picture in it."""
    counted, read_file = Counter(), images.read_file

    def reading(location, *rest):
        counted[str(location)] += 1
        return read_file(location, *rest)

    monkeypatch.setattr(images, "read_file", reading)
    return counted


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory):
    """A data set and the finished store of it."""
    folder = tmp_path_factory.mktemp("whole")
    write_dataset(scenes[:COUNT], folder / "data")
    extract(TEACHER, open_pairs(folder / "data/captions.jsonl"), folder / "t", NOISE, WORK, progress=False)
    return folder


@pytest.fixture
def begun(whole, tmp_path, reads):
    """The same at other paths, looked at once, and the function that continues it."""
    shutil.copytree(whole, tmp_path / "w")
    (tmp_path / "w/t" / FILE).unlink()

    def again(**options):
        reads.clear()
        return extract(
            TEACHER, open_pairs(tmp_path / "w/data/captions.jsonl"), tmp_path / "w/t", NOISE, WORK, progress=False, **options
        )

    assert again().present == COUNT
    assert sum(reads.values()) == COUNT
    again.folder = tmp_path / "w"
    return again


def test_only_files_that_changed_are_read_again(begun, reads):
    assert (begun().present, sum(reads.values())) == (COUNT, 0)
    picture = begun.folder / "data/images/00001.png"
    os.utime(picture, ns=(0, 0))
    assert (begun().present, dict(reads)) == (COUNT, {str(picture): 1})
    assert (begun().present, sum(reads.values())) == (COUNT, 0)
    assert (begun(rehash=True).present, sum(reads.values())) == (COUNT, COUNT)
    other = begun.folder / "data/images/00002.png"
    other.write_bytes((begun.folder / "data/images/00003.png").read_bytes())
    with pytest.raises(TargetError, match=r"another picture for sample 'images/00002\.png'"):
        begun()


def test_a_run_that_was_cut_off_has_noted_what_it_stored(whole, reads, tmp_path):
    def cut_off(pairs):
        for position, pair in enumerate(pairs):
            if position == 3:
                raise KeyboardInterrupt
            yield pair

    pairs = list(open_pairs(whole / "data/captions.jsonl"))
    with pytest.raises(KeyboardInterrupt):
        extract(TEACHER, cut_off(pairs), tmp_path / "t", NOISE, WORK, progress=False)
    reads.clear()
    assert extract(TEACHER, pairs, tmp_path / "t", NOISE, WORK, progress=False).present == 2
    assert reads == {str(pair.image): 1 for pair in pairs[2:]}


def test_what_size_and_time_hide_is_found_by_rehash(begun, reads, scenes):
    picture = begun.folder / "data/images/00001.png"
    scenes[1].image.save(picture, "BMP")  # the same pixels, in a format whose size does not depend on them
    assert (begun().present, set(reads)) == (COUNT, {str(picture)})
    before = picture.stat()
    scenes[COUNT].image.save(picture, "BMP")
    assert picture.stat().st_size == before.st_size
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (begun().present, sum(reads.values())) == (COUNT, 0)  # the limit that --rehash is for
    with pytest.raises(TargetError, match=r"another picture for sample 'images/00001\.png'"):
        begun(rehash=True)


@pytest.mark.parametrize("spoil", ["missing", "cut", "rubbish", "link", "folder", "pipe", "of another store"])
def test_notes_that_are_lost_or_spoilt_cost_only_reading(begun, reads, tmp_path, spoil):
    notes, kept = begun.folder / "t" / FILE, begun.folder / "kept"
    text = notes.read_text()
    kept.write_text("mine")
    if spoil == "cut":
        notes.write_text(text[:-20])
    else:
        notes.unlink()
    if spoil == "rubbish":
        notes.write_bytes(b'\xff\xfe[1, 2]\n{"a": 1}\n')
    elif spoil == "link":
        notes.symlink_to(kept)
    elif spoil == "folder":
        notes.mkdir()
    elif spoil == "pipe":
        os.mkfifo(notes)
    elif spoil == "of another store":
        lines = [json.loads(line) for line in text.splitlines()]
        notes.write_text(
            "".join(json.dumps([one[0], other[1]]) + "\n" for one, other in zip(lines, lines[1:] + lines[:1], strict=True))
        )
    before = {path.name: path.read_bytes() for path in (begun.folder / "t").glob("[dm]*")}
    assert (begun().present, sum(reads.values())) == (COUNT, 1 if spoil == "cut" else COUNT)
    assert (begun().present, sum(reads.values())) == (COUNT, COUNT if spoil == "folder" else 0)
    assert before == {path.name: path.read_bytes() for path in (begun.folder / "t").glob("[dm]*")}
    assert kept.read_text() == "mine"
    assert len(TargetStore(begun.folder / "t")) == COUNT


def test_pictures_in_tars_are_known_by_the_tar(scenes, reads, tmp_path):
    data = as_shards(scenes[:COUNT], tmp_path / "data")
    for present, count in ((0, COUNT), (COUNT, 0)):
        reads.clear()
        summary = extract(TEACHER, open_pairs(data), tmp_path / "t", NOISE, WORK, progress=False)
        assert (summary.present, sum(reads.values())) == (present, count)
    os.utime(data / "00000.tar", ns=(0, 0))
    extract(TEACHER, open_pairs(data), tmp_path / "t", NOISE, WORK, progress=False)
    assert dict(reads) == {str(data / "00000.tar"): 2}


def test_a_data_set_of_nothing_is_refused_before_a_store_is_begun(tmp_path):
    with pytest.raises(DataError, match="no picture with a caption in the data"):
        extract("nowhere", [], tmp_path / "t", NOISE, WORK, progress=False)
    assert not (tmp_path / "t").exists()


def test_a_link_that_leads_to_another_picture_is_read_again(whole, reads, scenes, tmp_path):
    """Of the same size and time: the link's place and the file's state tell the two apart by nothing but the file itself."""
    for name, scene in (("one", scenes[0]), ("other", scenes[1])):
        scene.image.save(tmp_path / f"{name}.bmp")  # of a size that does not depend on the pixels
        os.utime(tmp_path / f"{name}.bmp", ns=(0, 10**18))
    assert (tmp_path / "one.bmp").stat().st_size == (tmp_path / "other.bmp").stat().st_size
    link = tmp_path / "link.bmp"
    link.symlink_to(tmp_path / "one.bmp")
    pairs = [Pair("s", link, scenes[0].caption)]
    extract(TEACHER, pairs, tmp_path / "t", NOISE, WORK, progress=False)
    for _ in range(2):
        reads.clear()
        assert extract(TEACHER, pairs, tmp_path / "t", NOISE, WORK, progress=False).present == 1
        assert not reads
    link.unlink()
    link.symlink_to(tmp_path / "other.bmp")
    with pytest.raises(TargetError, match="another picture for sample 's'"):
        extract(TEACHER, pairs, tmp_path / "t", NOISE, WORK, progress=False)
    link.unlink()
    link.symlink_to(tmp_path / "one.bmp")
    assert extract(TEACHER, pairs, tmp_path / "t", NOISE, WORK, progress=False).present == 1


def test_notes_without_the_files_number_are_read_once_more(begun, reads):
    """As they were written before: the hash of path, offset, size and time."""
    store, notes = begun.folder / "t", {}
    for sample_id in TargetStore(store):
        picture, target = begun.folder / "data" / sample_id, TargetStore(store)[sample_id]
        stamp = f"{picture}\0{0}\0{picture.stat().st_size}\0{picture.stat().st_mtime_ns}"
        note = hashlib.sha256(f"{stamp}\0{target.image_sha256}\0{target.file_sha256}".encode()).hexdigest()[:32]
        notes[sample_id] = note
    (store / FILE).write_text("".join(json.dumps(note) + "\n" for note in notes.items()))
    assert (begun().present, sum(reads.values())) == (COUNT, COUNT)
    assert (begun().present, sum(reads.values())) == (COUNT, 0)


def test_the_name_of_a_data_set_is_opened(whole, scenes, tmp_path):
    data = as_shards(scenes[:COUNT], tmp_path / "data")
    for place in (data / "00000.tar", str(data / "00000.tar"), f"{data}/00000.ta?"):
        summary = extract(TEACHER, place, tmp_path / "t", NOISE, WORK, progress=False)
    assert (summary.present, list(TargetStore(tmp_path / "t"))) == (2, ["00000/00000", "00000/00001"])
    assert verify(tmp_path / "t", str(data / "00000.tar")) == []
    assert preview(TEACHER, data, tmp_path / "p", 1, NOISE, WORK).num_pictures is None
    with pytest.raises(DataError, match=r"there is no data at .*nothing\.tar"):
        extract(TEACHER, tmp_path / "nothing.tar", tmp_path / "u", NOISE, WORK, progress=False)
    assert not (tmp_path / "u").exists()
