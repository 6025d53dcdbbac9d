"""Writers that are killed, refused, out of disk or out of order: the store ends as that of an undisturbed run."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lavender.errors import TargetError
from lavender.targets.maintenance import merge
from lavender.targets.store import TargetStore, TargetWriter

from .stores import CONFIG, SOURCE, contents, fill, ids_of, make_target, shards


def test_a_store_is_continued_where_it_stopped(tmp_path):
    fill(tmp_path / "whole", range(8)).close()
    fill(tmp_path / "t", range(5))  # no close: as if killed, with one shard and two pending samples
    with pytest.raises(TargetError, match="has not finished"):
        TargetStore(tmp_path / "t")
    fill(tmp_path / "t", range(8)).close()
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")


def test_a_kill_between_shard_and_clean_up_duplicates_nothing(tmp_path):
    fill(tmp_path / "t", range(2))
    pending = {p.name: p.read_bytes() for p in (tmp_path / "t" / "pending").iterdir()}
    fill(tmp_path / "t", range(3))  # writes the shard and empties `pending`
    for name, data in pending.items():
        (tmp_path / "t" / "pending" / name).write_bytes(data)
    fill(tmp_path / "t", range(4)).close()
    assert list(TargetStore(tmp_path / "t")) == ["s0", "s1", "s2", "s3"]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_shards_do_not_depend_on_the_order_of_work_or_on_restarts(data):
    """Any batches, finished in any order, with advances and restarts anywhere: the shards of a run in order."""
    count = data.draw(st.integers(1, 14))
    failed = data.draw(st.sets(st.integers(0, count - 1)))
    batches: list[list[int]] = []
    for n in range(count):
        if batches and data.draw(st.booleans()):
            batches[data.draw(st.integers(0, len(batches) - 1))].append(n)
        else:
            batches.append([n])
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        good = [n for n in range(count) if n not in failed]
        fill(folder / "whole", good).close()
        finished: set[int] = set()
        writer = TargetWriter(folder / "t", SOURCE, CONFIG, 3)
        for batch in data.draw(st.permutations(batches)):
            places = [n for n in batch if n not in failed]
            writer.add(*[make_target(n) for n in places], position=places)
            finished |= set(batch)
            if data.draw(st.booleans()):
                writer.advance(next(n for n in range(count + 1) if n not in finished))
            if data.draw(st.booleans()):
                writer.release()
                writer = TargetWriter(folder / "t", SOURCE, CONFIG, 3)
        writer.close()
        assert shards(folder / "t") == shards(folder / "whole")
        assert contents(folder / "t") == contents(folder / "whole")


def test_samples_stay_pending_until_the_input_has_passed_them(tmp_path):
    with TargetWriter(tmp_path / "t", SOURCE, CONFIG, 3) as writer:
        writer.add(*[make_target(n) for n in (4, 5, 6, 7)], position=4)
        writer.advance(4)
        assert not shards(tmp_path / "t")
        writer.add(*[make_target(n) for n in (0, 1, 3)], position=[0, 1, 3])
        writer.advance(6)  # 2 failed
        assert [ids_of(tmp_path / "t", n) for n in range(1)] == [["s0", "s1", "s3"]]
        assert len(list((tmp_path / "t/pending").iterdir())) == 1
        writer.advance(7)
        assert ids_of(tmp_path / "t", 1) == ["s4", "s5", "s6"]
        writer.add(make_target(8))  # behind everything so far
        writer.close()
        assert ids_of(tmp_path / "t", 2) == ["s7", "s8"]
        assert not (tmp_path / "t/pending").exists()


class Killed(BaseException):
    pass


def test_a_kill_at_any_step_is_harmless(tmp_path, monkeypatch):
    """Stops the writer at each of its steps in turn, as a kill would; the next one ends with the store of a quiet run."""
    work = [([3, 4], 0), ([0], 0), ([1, 2], 5), ([6], 5), ([5, 7], 8)]

    def run(folder, steps):
        left = iter(range(steps))

        def counted(step):
            def counting(*arguments, **options):
                if next(left, None) is None:
                    raise Killed
                return step(*arguments, **options)

            return counting

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            writer = TargetWriter(folder, SOURCE, CONFIG, 3)
            try:
                for numbers, passed in work:
                    new = [n for n in numbers if f"s{n}" not in writer.done]
                    writer.add(*[make_target(n) for n in new], position=new)
                    writer.advance(passed)
                writer.close()
            finally:
                writer._lock._lock.release()  # and nothing else: that is what a kill leaves

    run(tmp_path / "whole", 10**6)
    for steps in range(1, 100):
        folder = tmp_path / str(steps)
        try:
            run(folder, steps)
        except Killed:
            ended = False
            run(folder, 10**6)
        else:
            ended = True
        assert shards(folder) == shards(tmp_path / "whole"), steps
        assert contents(folder) == contents(tmp_path / "whole"), steps
        if ended:
            break
    assert steps > 15


HOLD = """
import sys, time
from pathlib import Path
from tests.targets.stores import fill
writer = fill(Path(sys.argv[1]), range(5))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", HOLD, str(tmp_path / "t")]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(TargetError, match=rf"another process \(process {first.pid} on .*, since 2.*\) is writing") as error:
            fill(tmp_path / "t", [])
        assert "wait until it has finished, or give another folder" in str(error.value)
        first.send_signal(signal.SIGKILL)
    writer = fill(tmp_path / "t", range(6))
    assert len(writer.done) == 6
    with pytest.raises(TargetError, match=f"process {os.getpid()} on"):  # in one process too
        fill(tmp_path / "t", [])
    writer.close()
    fill(tmp_path / "t", range(7)).close()
    assert not {".lock.json"} & {path.name for path in (tmp_path / "t").iterdir()}


FILL_LIMITED = """
import resource, sys
from pathlib import Path
from lavender.errors import TargetError
from tests.targets.stores import fill
folder = Path(sys.argv[1])
for limit in sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), -1))
    try:
        fill(folder, range(20), 16).close()
    except TargetError as error:
        print(f"{error}; partial: {list(folder.rglob('*.partial'))}; samples: {len(list(folder.glob('pending/*.parquet')))}")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on the size of files, which this system lacks")
def test_a_full_disk_is_named_and_loses_nothing(tmp_path):
    fill(tmp_path / "whole", range(20), 16).close()
    shard = (tmp_path / "whole/data-00000.parquet").stat().st_size
    # No space for a manifest, for a sample, for a shard.
    command = [sys.executable, "-c", FILL_LIMITED, str(tmp_path / "t"), "300", "2000", str(shard - 1)]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    said = "cannot write to {}: File too large. What is stored there is safe; free some space and run the same command again to"
    folder = tmp_path / "t"
    for line, (place, samples) in zip(
        result.stdout.splitlines(), [(folder, 0), (folder / "pending", 0), (folder, 16)], strict=True
    ):
        assert line.startswith(said.format(place)), result
        assert line.endswith(f"partial: []; samples: {samples}"), result
    fill(tmp_path / "t", range(20), 16).close()
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")


def test_any_error_that_means_a_full_disk_is_named(tmp_path, monkeypatch):
    numbers = iter((errno.ENOSPC, errno.EDQUOT, errno.EIO))

    def fail(descriptor):
        raise OSError(next(numbers), "broken")

    with fill(tmp_path / "t", range(2)) as writer, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        for error, message in ((TargetError, "free some space"), (TargetError, "free some space"), (OSError, "broken")):
            with pytest.raises(error, match=message):
                writer.add(make_target(2))
            assert "s2" not in writer.done


def test_half_written_files_are_ignored(tmp_path):
    fill(tmp_path / "t", range(2))
    (tmp_path / "t" / "pending" / "000002.parquet.partial").write_bytes(b"half")
    (tmp_path / "t" / "data-00000.parquet.partial").write_bytes(b"half")
    fill(tmp_path / "t", range(3)).close()
    assert list(TargetStore(tmp_path / "t")) == ["s0", "s1", "s2"]


KILLED = """
import sys
import time
import numpy as np
from pathlib import Path
from lavender.targets.shards import encoded, to_table
from lavender.targets.manifest import StoreConfig
from lavender.targets.store import TargetWriter
from tests.targets.stores import CONFIG, SOURCE, make_target
encoded(to_table([make_target(0)], "float16"), "zstd")  # what is imported late is imported now
folder, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
writer = TargetWriter(folder, SOURCE, CONFIG, 4)
batches = [range(n, n + 3) for n in range(0, count, 3)]
finished = set()
for batch in np.random.default_rng(seed).permutation(len(batches)):
    new = [n for n in batches[batch] if f"s{n}" not in writer.done]
    writer.add(*[make_target(n) for n in new], position=new)
    finished.update(batches[batch])
    writer.advance(next(n for n in range(count + 1) if n not in finished))
    time.sleep(0.01 * bool(new))  # so that a kill which comes late still finds work in progress
writer.close()
print("done")
"""


@pytest.mark.full
def test_kill_9_at_random_moments_loses_nothing(tmp_path):
    """Start, kill after a random while, start again with another order: the store ends as that of an undisturbed run."""
    count = 120
    root = Path(__file__).parents[2]
    rng = np.random.default_rng(0)
    kills = 0
    for seed in range(60):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "t"), str(count), str(seed)]
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE)
        while process.poll() is None and not (tmp_path / "t/.lock.json").exists():
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.15)))
        process.send_signal(signal.SIGKILL)
        if b"done" in process.communicate()[0]:
            break
        (tmp_path / "t/.lock.json").unlink(missing_ok=True)  # so that the next wait is for the next process
        kills += 1
    else:
        pytest.fail("killed too early each time")
    assert kills >= 2
    fill(tmp_path / "whole", range(count), 4).close()
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")


def test_an_empty_store_may_be_begun_anew(tmp_path):
    TargetWriter(tmp_path / "t", SOURCE | {"inversion_steps": 7}, CONFIG)
    fill(tmp_path / "t", range(2)).close()
    assert TargetStore(tmp_path / "t").source == SOURCE


def test_a_sample_twice_is_refused(tmp_path):
    writer = fill(tmp_path / "t", range(2))
    with pytest.raises(TargetError, match="'s1'"):
        writer.add(make_target(1))


def test_a_finished_store_stays_finished_until_something_is_added(tmp_path):
    fill(tmp_path / "t", range(3)).close()
    before = (tmp_path / "t/manifest.json").read_bytes()
    with TargetWriter(tmp_path / "t", SOURCE, CONFIG, 3) as writer:
        writer.begin_run()
        with pytest.raises(TargetError, match="another caption"):
            writer.has("s0", Image.new("RGB", (4, 4)), "other words")
    assert (tmp_path / "t/manifest.json").read_bytes() == before
    assert len(TargetStore(tmp_path / "t")) == 3
    with TargetWriter(tmp_path / "t", SOURCE, CONFIG, 3) as writer:
        writer.add(make_target(3))
    with pytest.raises(TargetError, match="has not finished"):
        TargetStore(tmp_path / "t")
    fill(tmp_path / "t", range(4)).close()
    assert list(TargetStore(tmp_path / "t")) == ["s0", "s1", "s2", "s3"]


@pytest.mark.parametrize("name", [".lock.json", "x.partial", "manifest.json.partial", "data-00003.parquet.partial"])
@pytest.mark.parametrize("is_empty", [True, False])
def test_a_folder_under_a_name_of_the_stores_files(tmp_path, name, is_empty):
    fill(tmp_path / "t", range(7)).close()
    (tmp_path / "t" / name).mkdir()
    if not is_empty:
        (tmp_path / "t" / name / "mine").touch()
    if name == ".lock.json":  # it only says who writes
        fill(tmp_path / "t", range(9)).close()
        assert len(TargetStore(tmp_path / "t")) == 9
    else:
        before = contents(tmp_path / "t")
        with pytest.raises(TargetError, match=rf"{name} is a folder, where a store has a file.*move it elsewhere"):
            fill(tmp_path / "t", range(9))
        assert contents(tmp_path / "t") == before
        assert len(TargetStore(tmp_path / "t")) == 7
    assert (tmp_path / "t" / name).is_dir()


def test_a_link_to_nothing_is_no_folder_for_a_store(tmp_path):
    fill(tmp_path / "t", range(3)).close()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(TargetError, match="link is a link that leads to nothing; give --out a folder"):
        fill(tmp_path / "link", range(3))
    with pytest.raises(TargetError, match="link exists; give a new folder"):
        merge([tmp_path / "t"], tmp_path / "link")
    assert not (tmp_path / "nothing").exists()
