"""Merges, exports and imports that are killed, asked to end, out of disk, or two at once: the end is that of an undisturbed one."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavender.data.samples import Sample
from lavender.errors import TargetError
from lavender.files import FolderLock
from lavender.images import image_sha256, load_image
from lavender.signals import SIGNALS, Stopped
from lavender.targets import maintenance, published_export, published_import
from lavender.targets.maintenance import merge, verify
from lavender.targets.published_export import export_targets
from lavender.targets.published_import import import_targets
from lavender.targets.store import Target, TargetStore, TargetWriter

from ..crashes import crash_at
from .stores import CONFIG, SOURCE, make_target


def files_of(path: Path) -> dict[str, bytes]:
    """What a user has in the end: every file but locks, by name."""
    if path.is_file():
        return {"": path.read_bytes()}
    found = {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    return {name: data for name, data in found.items() if name not in (".lock", ".lock.json")}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Two stores, and the samples of both."""
    folder = tmp_path_factory.mktemp("given")
    rng = np.random.default_rng(0)
    samples = [Sample(f"s{number}", folder / f"s{number}.png", "what?", "a red circle") for number in range(6)]
    for sample in samples:
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(sample.image)
    for name, numbers in (("a", range(4)), ("b", range(3, 6))):
        with TargetWriter(folder / name, SOURCE, CONFIG, 2) as writer:
            for number in numbers:
                target, picture = make_target(number), load_image(samples[number].image)
                writer.add(Target(target.id, image_sha256(picture), target.word_maps))
            writer.close()
    export_targets(TargetStore(folder / "a"), folder / "published", format="folder", progress=False, samples=samples[:4])
    return folder, samples


WORKS = {
    "merge": lambda folder, samples, out: merge([folder / "a", folder / "b"], out),
    "export to a folder": lambda folder, samples, out: export_targets(
        TargetStore(folder / "a"), out, format="folder", samples=samples, progress=False
    ),
    "export to a table": lambda folder, samples, out: export_targets(
        TargetStore(folder / "a"), out.with_suffix(".parquet"), format="parquet", samples=samples, progress=False
    ),
    "import": lambda folder, samples, out: import_targets(folder / "published", out, samples=samples, progress=False),
}


MIDDLES = {
    "merge": (maintenance, "_take_new"),
    "export to a folder": (published_export, "_average"),
    "export to a table": (published_export, "_average"),
    "import": (published_import, "_maps_of"),
}
"""What each calls in its middle, several times."""


def result_of(name: str, out: Path) -> dict[str, bytes]:
    return files_of(out.with_suffix(".parquet") if name == "export to a table" else out)


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """Of each work what an undisturbed one ends with."""
    folder = tmp_path_factory.mktemp("whole")
    for name, work in WORKS.items():
        work(*given, folder / name)
    return {name: result_of(name, folder / name) for name in WORKS}


@pytest.mark.parametrize(
    ("name", "stride"),
    [*((name, 7) for name in WORKS), *(pytest.param(name, 1, marks=pytest.mark.full) for name in WORKS)],
)
def test_a_kill_before_or_after_any_step_is_harmless(name, stride, given, whole, tmp_path):
    """Dies at the point; the same command ends as an undisturbed one, and leaves nothing beside its result."""
    deaths = 0
    for point in range(0, 10**6, stride):
        folder = tmp_path / str(point)
        folder.mkdir()
        died = crash_at(point, partial(WORKS[name], *given, folder / "out"))
        deaths += died
        if died and result_of(name, folder / "out") != whole[name]:  # else it had ended, and died while it cleaned up
            WORKS[name](*given, folder / "out")
        assert result_of(name, folder / "out") == whole[name], point
        left = {path.name for path in folder.iterdir()} - {"out", "out.parquet"}
        assert left <= ({"out.exporting", "out.parquet.exporting"} if died else set()), point
        if not died:
            break
    assert deaths >= 20 // stride


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("name", WORKS)
def test_what_is_asked_to_end_ends_and_the_same_command_goes_on(name, number, given, whole, tmp_path, monkeypatch):
    """The signal comes in the middle of the work."""
    module, function = MIDDLES[name]
    original, calls = getattr(module, function), []

    def signaling(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, signaling)
        with pytest.raises(Stopped, match=f"ended by {signal.Signals(number).name}.* the same command") as stopped:
            WORKS[name](*given, tmp_path / "out")
    assert stopped.value.code == 143
    left = [path.name for path in tmp_path.rglob("*") if path.name in (".lock.json", "data", "out.exporting")]
    assert not left
    assert ("out" in [path.name for path in tmp_path.iterdir()]) == (name == "import")  # which is continued in its place
    WORKS[name](*given, tmp_path / "out")
    assert result_of(name, tmp_path / "out") == whole[name]


@pytest.mark.parametrize("name", WORKS)
def test_of_two_at_once_one_works_and_the_other_is_told_who_does(name, given, whole, tmp_path, monkeypatch):
    """The second one begins while the first one is in the middle, in another process."""
    module, function = MIDDLES[name]
    original, said = getattr(module, function), []

    def meanwhile(*arguments):
        if not said:
            said.append("")
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    WORKS[name](*given, tmp_path / "out")
                    os.write(writing, b"it worked")
                except TargetError as error:
                    os.write(writing, str(error).encode())
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            os.close(writing)
            with open(reading, "rb") as answer:
                said[0] = answer.read().decode()
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, meanwhile)
        WORKS[name](*given, tmp_path / "out")
    assert f"another process (process {os.getpid()} on " in said[0]
    assert "\n" not in said[0]
    assert result_of(name, tmp_path / "out") == whole[name]


@pytest.mark.parametrize("name", ["merge", "export to a folder", "export to a table"])
def test_one_that_comes_in_as_the_other_ends_changes_nothing(name, given, whole, tmp_path, monkeypatch):
    """It looked for the name before, and gets the lock after."""
    module = maintenance if name == "merge" else published_export
    require_new, calls = module._require_new, []

    def late(*arguments):
        require_new(*arguments)
        calls.append(arguments)
        if len(calls) == 1:
            WORKS[name](*given, tmp_path / "out")

    monkeypatch.setattr(module, "_require_new", late)
    with pytest.raises(TargetError, match=r"exists; give a new (folder|name)"):
        WORKS[name](*given, tmp_path / "out")
    assert result_of(name, tmp_path / "out") == whole[name]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on the size of files, which this system lacks")
@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(name, share, given, whole, tmp_path):
    largest = max(map(len, whole[name].values()))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * largest), -1))
            WORKS[name](*given, tmp_path / "out")
        except TargetError as error:
            os.write(writing, str(error).encode())
        except BaseException as error:
            os.write(writing, repr(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with open(reading, "rb") as answer:
        said = answer.read().decode()
    assert said.startswith("cannot write to "), said
    assert "free some space and run the same command again" in said
    if name.startswith("export"):
        assert not list(tmp_path.iterdir())
    WORKS[name](*given, tmp_path / "out")
    assert result_of(name, tmp_path / "out") == whole[name]


def test_what_is_no_folder_of_an_export_is_left_alone(given, tmp_path):
    folder, samples = given
    for make in (
        lambda path: (path.mkdir(), (path / "mine").touch()),
        lambda path: path.touch(),
        lambda path: path.symlink_to(folder),
    ):
        make(tmp_path / "out.exporting")
        before = files_of(folder)
        with pytest.raises(TargetError, match=r"out\.exporting is (no folder of an export|a link)"):
            WORKS["export to a folder"](folder, samples, tmp_path / "out")
        assert files_of(folder) == before
        (tmp_path / "out.exporting").rename(tmp_path / f"kept{len(list(tmp_path.iterdir()))}")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_store_that_is_being_written_is_read_as_it_was_or_refused(given, tmp_path):
    """A finished store that is added to: what it had is there, or one line says that it is not finished."""
    folder, samples = given
    merge([folder / "a"], tmp_path / "a")
    before = files_of(tmp_path / "a")
    store = TargetStore(tmp_path / "a")
    with TargetWriter(tmp_path / "a", SOURCE, CONFIG, 2) as writer:
        assert merge([tmp_path / "a", folder / "b"], tmp_path / "early") == 6  # nothing was added yet
        writer.add(make_target(8))
        with pytest.raises(TargetError, match="has not finished"):
            merge([tmp_path / "a", folder / "b"], tmp_path / "late")
        with pytest.raises(TargetError, match="has not finished"):
            export_targets(TargetStore(tmp_path / "a"), tmp_path / "late", format="folder")
        export_targets(store, tmp_path / "read before", format="folder", samples=samples, progress=False)
        writer.close()
    assert before.items() - files_of(tmp_path / "a").items() == {("manifest.json", before["manifest.json"])}
    export_targets(TargetStore(folder / "a"), tmp_path / "whole", format="folder", samples=samples, progress=False)
    assert files_of(tmp_path / "read before") == files_of(tmp_path / "whole")
    assert verify(tmp_path / "early") == verify(tmp_path / "a") == []


def test_a_lock_of_a_process_that_died_stops_nobody(given, whole, tmp_path):
    """`.lock` and the holder's name are left, and nobody holds them."""
    for name, place in (("merge", "out.merging"), ("export to a folder", "out.exporting"), ("import", "out")):
        folder = tmp_path / name
        (folder / place).mkdir(parents=True)
        holder = threading.Thread(target=lambda place=folder / place: FolderLock(place).release())
        holder.start()
        holder.join()
        (folder / place / ".lock.json").write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "then"}))
        WORKS[name](*given, folder / "out")
        assert result_of(name, folder / "out") == whole[name]
