from __future__ import annotations

import errno
import os
import posixpath
import shutil
import stat
import subprocess
import sys
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavender.errors import DataError, TargetError
from lavender.files import (
    FolderLock,
    name_full_disk,
    open_regular,
    own_path,
    path_within,
    read_file,
    replace_folder,
    write_atomically,
    write_within,
)
from lavender.images import load_image

NAMES = st.lists(
    st.sampled_from(["..", ".", "a", "b", "", "/", "~", "%2e%2e", "%2f", "..\\", "\0", "é", "root", "file://", "::"]), max_size=8
)


@settings(deadline=None, max_examples=400)
@given(parts=NAMES, joint=st.sampled_from(["/", "", "//"]), absolute=st.sampled_from(["", "/", "root"]))
def test_no_path_leaves_the_root(tmp_path_factory, parts, joint, absolute):
    """Against what the operating system makes of it."""
    root = tmp_path_factory.getbasetemp() / "root"
    name = {"": "", "/": "/", "root": f"{root}/"}[absolute] + joint.join(parts)
    oracle = os.path.realpath(os.path.join(root, name)) if "\0" not in name else "/"
    inside = oracle == str(root) or oracle.startswith(f"{root}/")
    if not inside or "://" in name:
        with pytest.raises(DataError, match=r"line 1: .* is not in .*root, where .*--images"):
            path_within(root, name, "line 1")
    else:
        assert os.path.realpath(path_within(root, name, "line 1")) == oracle


@settings(deadline=None, max_examples=400)
@given(parts=NAMES, joint=st.sampled_from(["/", ""]), whole=st.booleans())
def test_no_path_leaves_a_url(parts, joint, whole):
    root = "https://host/data/root"
    name = (f"{root}/" if whole else "") + joint.join(parts)
    try:
        found = path_within(root, name, "line 1")
    except DataError:
        return
    assert "::" not in found
    for path in (found, unquote(found), unquote(found).replace("\\", "/")):
        reached = posixpath.normpath(path.removeprefix("https://"))
        assert reached == "host/data/root" or reached.startswith("host/data/root/")


@pytest.mark.parametrize("name", ["https://evil/a.png", "file:///etc/passwd", "s3://other/a.png", "https://host/database/a.png"])
def test_urls_are_taken_from_their_own_root_alone(tmp_path, name):
    for root in (tmp_path, "https://host/data"):
        with pytest.raises(DataError, match="--images"):
            path_within(root, name, "line 1")
    assert path_within("https://host/data/", "https://host/data/b/../a.png", "line 1") == "https://host/data/a.png"


def test_a_link_inside_the_root_is_the_users_own_but_dots_behind_it_lead_nowhere_else(tmp_path):
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link").symlink_to(tmp_path / "elsewhere/deep")
    assert path_within(tmp_path / "root", "link/a.png", "line 1") == tmp_path / "root/link/a.png"
    assert path_within(tmp_path / "root", "link/../a.png", "line 1") == tmp_path / "root/a.png"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    for data in ("größer\n", b"\0\xff", memoryview(b"abc")):
        write_atomically(path, data)
        assert path.read_bytes() == (data.encode() if isinstance(data, str) else bytes(data))
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space left"):
                write_atomically(path, "new")
        assert path.read_bytes() == b"abc"
        assert list(tmp_path.iterdir()) == [path]


def test_everything_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """The file's bytes before its name, the folder's entry last: a power cut shows the old file or the new one."""
    steps = []
    fsync, replace = os.fsync, os.replace

    def noted(number):
        steps.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        fsync(number)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("replace"), replace(*paths)))
    write_atomically(tmp_path / "a", "text")
    assert steps == ["file", "replace", "folder"]


def test_a_device_or_a_pipe_is_written_to_and_not_replaced(tmp_path):
    code = "from pathlib import Path; from lavender.files import write_atomically; write_atomically(Path('/dev/stdout'), 'said')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "said"


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "target").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "after"


def test_what_a_users_link_leads_to_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/target").write_text("before")
    (tmp_path / "link").symlink_to("disk/target")
    (tmp_path / "chain").symlink_to("link")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            write_atomically(tmp_path / "chain", "after")
    assert (tmp_path / "disk/target").read_text() == "before"
    write_atomically(tmp_path / "chain", "after")
    assert (tmp_path / "disk/target").read_text() == "after"
    (tmp_path / "new").symlink_to("disk/new")  # to nothing yet
    write_atomically(tmp_path / "new", "first")
    assert (tmp_path / "disk/new").read_text() == "first"
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"target", "new"}


def test_nothing_inside_a_folder_that_lavender_keeps_is_written_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("a.json", "b.json.partial"):
        (kept / name).symlink_to(victim)
    os.link(victim, kept / "c.json")
    for name in ("a.json", "b.json", "c.json"):
        write_within(kept, name, "ours")
        assert (kept / name).read_text() == "ours"
        assert not (kept / name).is_symlink()
    assert victim.read_text() == "mine"
    (tmp_path / "away").mkdir()
    (kept / "pending").symlink_to(tmp_path / "away")
    for name in ("pending/a", "pending/deeper/a"):
        with pytest.raises(DataError, match=r"kept/pending is a link to .*away; in .* remove it"):
            write_within(kept, name, "ours")
    with pytest.raises(DataError, match="is a link"):
        own_path(kept, "pending")
    assert not list((tmp_path / "away").iterdir())
    (tmp_path / "link").symlink_to(kept)  # the folder itself is where the user says
    write_within(tmp_path / "link", "a.json", "again")
    assert (kept / "a.json").read_text() == "again"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes, which this system lacks")
def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path, kind in ((tmp_path / "pipe", "a pipe"), ("/dev/zero", "a device"), (tmp_path / "link", "a device")):
        for read in (open_regular, read_file, lambda path: read_file(f"file://{path}")):
            with pytest.raises(OSError, match=f"expected a regular file, and this is {kind}"):
                read(path)
        with pytest.raises(DataError, match=f"cannot read the image .*{path}.*: .*{kind}"):
            load_image(path)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    (tmp_path / "file").write_bytes(b"abcd")
    assert read_file(tmp_path / "file", 1, 2) == read_file(f"file://{tmp_path}/file", 1, 2) == b"bc"


HOLDER = """
import sys, time
from pathlib import Path
from lavender.files import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_folder_is_locked_by_one_process_until_that_dies(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(
            TargetError, match=rf"^another process \(process {holder.pid} on .*, since .*\) is using {tmp_path}; go away$"
        ):
            FolderLock(tmp_path, "using", "go away", TargetError)
        holder.kill()
    with FolderLock(tmp_path) as lock:
        assert lock.is_held()
        with pytest.raises(DataError, match=rf"another process \(process {os.getpid()} on .* is writing"):
            FolderLock(tmp_path)
    assert not lock.is_held()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_what_lies_in_the_place_of_a_lock_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for make, message in (
        (lambda p: p.mkdir(), "is no file"),
        (os.mkfifo, "is no file"),
        (lambda p: p.symlink_to("mine"), "is a link"),
    ):
        folder = tmp_path / message.replace(" ", "")
        folder.mkdir(exist_ok=True)
        path = folder / ".lock"
        make(path)
        with pytest.raises(TargetError, match=rf"\.lock {message}"):
            FolderLock(folder, error=TargetError)
        path.rmdir() if path.is_dir() else path.unlink()
        os.mkfifo(folder / ".lock.json")  # whoever reads it waits for ever
        with FolderLock(folder), pytest.raises(DataError, match="another process"):
            FolderLock(folder)
        assert [path.name for path in folder.iterdir()] == [".lock"]
        (folder / ".lock").unlink()


def test_a_full_disk_is_named_and_other_faults_are_themselves(tmp_path):
    message = rf"cannot write to {tmp_path}: No space left.*run the same command again"
    with pytest.raises(TargetError, match=message), name_full_disk(tmp_path, TargetError):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), name_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_written_to_where_somebody_reads_it(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="No such device or address"):
        write_atomically(pipe, "text")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, "text")
        assert os.read(reader, 99) == b"text"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_folder_takes_the_place_of_whatever_had_its_name(tmp_path):
    for make in (os.mkfifo, os.mkdir, lambda path: open(path, "x").close()):
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "a").write_text("a")
        make(tmp_path / "folder")
        replace_folder(tmp_path / "made", tmp_path / "folder")
        assert (tmp_path / "folder" / "a").read_text() == "a"
        shutil.rmtree(tmp_path / "folder")
