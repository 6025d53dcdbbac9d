"""Extractions that are disturbed, divided among processes and fed with rubbish end with the bytes of an undisturbed one."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lavender.config import ExtractionConfig, TeacherConfig
from lavender.data.sources import Pairs, open_pairs
from lavender.errors import ModelError, TargetError
from lavender.extraction import engines
from lavender.extraction.extract import extract
from lavender.miniworld import TEACHER, write_dataset
from lavender.miniworld.scenes import make_scenes
from lavender.signals import SIGNALS, Stopped
from lavender.targets.maintenance import info
from lavender.targets.manifest import read_manifest
from lavender.targets.store import TargetStore

NOISE = TeacherConfig(inversion="noise", timesteps=(51,), map_size=8)
NUM = 60
SIZES = {"batch_size": 2, "shard_size": 16}
ONE, TWO = ExtractionConfig(**SIZES), ExtractionConfig(**SIZES, devices=("cpu", "cpu"))
ON_RAY = ExtractionConfig(**SIZES, devices=("cpu", "cpu"), engine="ray")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(list(make_scenes(seed=3, count=NUM)), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The shards of one process, by name."""
    folder = tmp_path_factory.mktemp("undisturbed") / "t"
    extract(TEACHER, open_pairs(data), folder, NOISE, ONE, progress=False)
    return shards(folder)


def shards(folder):
    found = {path.name: path.read_bytes() for path in sorted(folder.glob("data-*.parquet"))}
    assert len(found) == len(read_manifest(folder)["shards"])
    return found


def arguments(data, out, *more):
    return [
        *("extract", "--model", TEACHER, "--data", data, "--out", out, "--inversion", "noise", "--timesteps", "51"),
        *("--map-size", "8", "--batch-size", "2", "--set", "shard_size=16", *more),
    ]


def lavender(*given, **options):
    command = [sys.executable, "-m", "lavender", *map(str, given)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


def started(*given, **options):
    """A command that runs, the leader of a process group of its own."""
    command = [sys.executable, "-m", "lavender", *map(str, given)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options)


def wait_for(condition, timeout_s=300):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def stored_by(process, out, num_files=1):
    """Waits until a run has stored something."""
    wait_for(lambda: process.poll() is not None or len(list(out.glob("pending/*.parquet"))) >= num_files)
    assert process.poll() is None, process.communicate()


class Disturbed(Pairs):
    """A data set whose reader does something at its middle."""

    def __init__(self, pairs, act):
        self.count, self._pairs, self._act = pairs.count, pairs, act

    def _entries(self):
        for position, entry in enumerate(self._pairs):
            if position == NUM // 2:
                self._act()
            yield entry


def test_two_processes_one_of_which_is_killed(data, undisturbed, tmp_path, capsys):
    killed = []

    def kill():
        killed.append(multiprocessing.active_children()[0])
        os.kill(killed[0].pid, signal.SIGKILL)

    summary = extract(TEACHER, Disturbed(open_pairs(data), kill), tmp_path / "t", NOISE, TWO, progress=False)
    assert summary.written == NUM
    assert "died (signal 9) and is replaced" in capsys.readouterr().out
    assert shards(tmp_path / "t") == undisturbed
    assert not multiprocessing.active_children()


@pytest.mark.full
def test_two_processes_give_what_one_gives(data, undisturbed, tmp_path):
    extract(TEACHER, open_pairs(data), tmp_path / "t", NOISE, TWO, progress=False)
    assert shards(tmp_path / "t") == undisturbed


@pytest.fixture(scope="module")
def cluster():
    """Ray with two cores, started by the user."""
    import ray

    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=2, object_store_memory=100 * 2**20, **options)
    yield ray
    ray.shutdown()


def test_two_actors_one_of_which_is_killed(cluster, data, undisturbed, tmp_path):
    before = []

    def kill():
        wait_for(lambda: any(tmp_path.glob("t/pending/*.parquet")))
        own = psutil.Process().children(recursive=True)
        actors = [process for process in own if "MapWorker" in " ".join(process.cmdline())]
        before.append((len(actors), sum(pq.read_metadata(path).num_rows for path in tmp_path.glob("t/pending/*.parquet"))))
        actors[0].kill()

    thread = threading.Thread(target=kill)
    thread.start()
    summary = extract(TEACHER, open_pairs(data), tmp_path / "t", NOISE, ON_RAY, progress=False)
    thread.join()
    [(num_actors, num_stored)] = before
    assert num_actors == 2
    assert num_stored < NUM
    assert summary.written == NUM
    assert shards(tmp_path / "t") == undisturbed
    assert cluster.is_initialized()
    assert cluster.data.DataContext.get_current().enable_progress_bars


@pytest.mark.full
def test_what_actors_raise_arrives_as_itself(cluster, data, tmp_path):
    with pytest.raises(ModelError, match=r"^cannot load a text-to-image pipeline from 'nothing'") as raised:
        extract("nothing", open_pairs(data), tmp_path / "t", NOISE, ON_RAY, progress=False)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "t").exists()


@pytest.mark.full
def test_rays_own_cluster_is_quiet_and_gone_afterwards(data, undisturbed, tmp_path):
    place = tempfile.mkdtemp(dir="/tmp", prefix="ray")  # sockets have short names
    try:
        result = lavender(
            *arguments(data, tmp_path / "t", "--engine", "ray", "--device", "cpu,cpu"),
            env={**os.environ, "RAY_TMPDIR": place, "RAY_ADDRESS": ""},
        )
        assert result.returncode == 0, result.stderr
        noise = [line for line in result.stderr.replace("\r", "\n").split("\n") if not line.startswith("word maps:")]
        assert not any("ray" in line.lower() for line in noise), noise
        assert shards(tmp_path / "t") == undisturbed
        assert not [process for process in psutil.process_iter(["cmdline"]) if place in " ".join(process.info["cmdline"] or [])]
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.mark.parametrize(
    "work",
    [ONE, pytest.param(TWO, marks=pytest.mark.full), pytest.param(ON_RAY, marks=pytest.mark.full)],
    ids=["one", "two", "ray"],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.full)])
def test_a_run_that_is_asked_to_end_stores_what_is_in_work(request, data, undisturbed, tmp_path, work, number):
    if work is ON_RAY:
        request.getfixturevalue("cluster")
    handlers = [signal.getsignal(each) for each in SIGNALS]
    pairs = Disturbed(open_pairs(data), lambda: os.kill(os.getpid(), number))
    with pytest.raises(Stopped, match=f"ended by {number.name}, .* the same command continues") as stopped:
        extract(TEACHER, pairs, tmp_path / "t", NOISE, work, progress=False)
    assert stopped.value.code == 143
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    assert not multiprocessing.active_children()
    assert not (tmp_path / "t/.lock.json").exists()
    stored = info(tmp_path / "t")
    assert not stored.complete
    assert 0 < stored.samples < NUM
    assert stored.samples % SIZES["batch_size"] == 0
    if work is ONE:  # the batch before was not begun when the reader was in the middle
        assert stored.samples == NUM // 2 - 2
    summary = extract(TEACHER, open_pairs(data), tmp_path / "t", NOISE, ONE, progress=False)
    assert (summary.written, summary.present) == (NUM - stored.samples, stored.samples)
    assert shards(tmp_path / "t") == undisturbed


@pytest.mark.full
@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_that_is_asked_to_end_says_so_in_one_line(data, undisturbed, tmp_path, devices, number):
    process = started(*arguments(data, tmp_path / "t", "--device", devices))
    stored_by(process, tmp_path / "t")
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)  # as Slurm does
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    lines = [line for line in errors.replace("\r", "\n").splitlines() if "word maps:" not in line and line.strip()]
    assert len(lines) == 1, lines
    [line] = lines
    assert line.startswith(f"lavender: ended by {signal.Signals(number).name}, ")
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert not (tmp_path / "t/.lock.json").exists()
    assert lavender(*arguments(data, tmp_path / "t", "--device", devices)).returncode == 0
    assert shards(tmp_path / "t") == undisturbed


def _dying(pipe, device, model, config, work):
    """Stands for a process that has too little memory; spawned processes find it by its name."""
    os.kill(os.getpid(), signal.SIGKILL)


def _dying_at_work(pipe, device, model, config, work):
    pipe.send({"model": str(model), "weights": "0"})
    batch = pipe.recv()
    if batch.positions[0] == 4:
        _dying(pipe, device, model, config, work)
    pipe.send(engines.Finished(batch.positions[0], (), (), tuple((pair.id, "not tried") for pair in batch.pairs)))
    _dying_at_work(pipe, device, model, config, work)


def _raising(pipe, device, model, config, work):
    pipe.send(ModelError("too little memory"))


@pytest.mark.parametrize(
    ("serve", "message"),
    [
        pytest.param(_dying, r"died 3 times at loading the teacher .*signal 9", marks=pytest.mark.full),
        (
            _dying_at_work,
            r"died 3 times at images/00004\.png .*signal 9.* smaller batch_size\. .* the same command continues",
        ),
        (_raising, "^too little memory$"),
    ],
)
def test_processes_that_die_or_fail_end_the_run(data, tmp_path, monkeypatch, serve, message):
    monkeypatch.setattr(engines, "_serve", serve)
    work = ExtractionConfig(batch_size=1, devices=("cpu", "cpu"), max_retries=2)
    with pytest.raises(ModelError, match=message):
        extract(TEACHER, open_pairs(data), tmp_path / "t", NOISE, work, progress=False)
    assert not multiprocessing.active_children()
    if serve is _dying_at_work:
        assert not read_manifest(tmp_path / "t")["complete"]


def test_too_little_memory_is_named(data, tmp_path, monkeypatch):
    import torch

    from lavender.teachers.model import Teacher

    whole, calls = Teacher.word_maps_of, []

    def maps(self, images, captions):
        calls.append(images)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")
        return whole(self, images, captions)

    monkeypatch.setattr(Teacher, "word_maps_of", maps)
    with pytest.raises(ModelError, match=r"^cpu has too little memory for 2 pictures at a time \(CUDA out.* smaller batch_size"):
        extract(TEACHER, open_pairs(data), tmp_path / "t", NOISE, ONE, progress=False)
    pending = list((tmp_path / "t/pending").glob("*.parquet"))
    assert sum(pq.read_metadata(path).num_rows for path in pending) == 4


@pytest.mark.full
def test_a_wrong_model_is_one_line_from_processes_too(data, tmp_path):
    result = lavender(*arguments(data, tmp_path / "t", "--model", tmp_path / "no", "--device", "cpu,cpu"))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("lavender: ")]
    assert "cannot load a text-to-image pipeline" in line


@pytest.mark.parametrize("devices", ["cpu", pytest.param("cpu,cpu", marks=pytest.mark.full)])
def test_an_interrupt_is_one_line_and_leaves_nothing_behind(data, undisturbed, tmp_path, devices):
    process = started(*arguments(data, tmp_path / "t", "--device", devices))
    stored_by(process, tmp_path / "t")
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "lavender: interrupted; the same command continues" in errors
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert not (tmp_path / "t/.lock.json").exists()
    extract(TEACHER, open_pairs(data), tmp_path / "t", NOISE, ONE, progress=False)
    assert shards(tmp_path / "t") == undisturbed


def test_processes_do_not_outlive_the_one_that_started_them(data, undisturbed, tmp_path):
    process = started(*arguments(data, tmp_path / "t", "--device", "cpu,cpu"))
    stored_by(process, tmp_path / "t")
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(children, timeout=5)[1]
    extract(TEACHER, open_pairs(data), tmp_path / "t", NOISE, ONE, progress=False)
    assert shards(tmp_path / "t") == undisturbed


@pytest.mark.full
def test_kill_9_at_twenty_random_moments(tmp_path):
    count = 150
    data = write_dataset(list(make_scenes(seed=4, count=count)), tmp_path / "data")
    extract(TEACHER, open_pairs(data), tmp_path / "whole", NOISE, ONE, progress=False)
    moments = random.Random(0)
    kills = runs = 0
    while kills < 20:
        out = tmp_path / f"t{runs}"
        process = started(*arguments(data, out, "--device", "cpu,cpu" if kills % 4 == 3 else "cpu"))
        wait_for(lambda out=out, process=process: process.poll() is not None or _writer_of(out) == process.pid)
        time.sleep(moments.uniform(0, 0.7))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0
            runs += 1
    assert lavender(*arguments(data, out)).returncode == 0
    for folder in {out, *(tmp_path / f"t{run}" for run in range(runs))}:
        assert shards(folder) == shards(tmp_path / "whole")
        result = lavender("targets", "verify", folder, "--data", data)
        assert result.returncode == 0, result.stdout
        assert f"{count} samples" in result.stdout


def _writer_of(out):
    try:
        return json.loads((out / ".lock.json").read_text())["pid"]
    except (OSError, ValueError):
        return None


@pytest.mark.full
def test_a_second_run_on_a_store_is_refused(data, undisturbed, tmp_path):
    first = started(*arguments(data, tmp_path / "t"))
    stored_by(first, tmp_path / "t")
    first.send_signal(signal.SIGSTOP)  # so that it cannot finish meanwhile
    with pytest.raises(TargetError, match=rf"another process \(process {first.pid} on "):
        extract(TEACHER, open_pairs(data), tmp_path / "t", NOISE, ONE, progress=False)
    first.send_signal(signal.SIGCONT)
    first.communicate()
    assert first.returncode == 0
    assert shards(tmp_path / "t") == undisturbed


def _spoil(folder):
    """Spoils pictures and captions; returns the bad ids, with what is said about them, and the good ones."""
    pictures = sorted((folder / "images").glob("*.png"))
    whole = Image.open(pictures[0])
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    pictures[0].write_bytes(pictures[0].read_bytes()[:200])
    pictures[1].write_bytes(b"")
    whole.convert("CMYK").save(pictures[2], "JPEG")
    whole.convert("RGBA").save(pictures[3])
    Image.fromarray(np.asarray(whole.convert("L")).astype(np.uint16) * 257).save(pictures[4])
    whole.save(pictures[5], "GIF", save_all=True, append_images=[whole.rotate(90)])
    exif = whole.getexif()
    exif[0x0112] = 6
    whole.save(pictures[6], exif=exif)
    Image.new("1", (20000, 20000)).save(pictures[7])
    shutil.copy(pictures[9], pictures[8])
    pictures[10].unlink()
    captions = {11: "", 12: "a red ring " * 3334, 13: "😀🎈", 14: "חתול אדום יושב", 15: "一只红色的猫", 16: "a red \ud83d ring"}
    for number, caption in captions.items():
        lines[number]["caption"] = caption
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    bad = {0: "cannot read the image", 1: "empty", 7: "pixels", 10: "no image at", 11: "no words", 16: "no valid Unicode"}
    return {lines[number]["image"]: reason for number, reason in bad.items()}, [line["image"] for line in lines]


@pytest.mark.full
def test_what_is_bad_is_listed_and_can_be_repaired(tmp_path):
    scenes = list(make_scenes(seed=5, count=24))
    data = write_dataset(scenes, tmp_path / "data")
    sound = {path: path.read_bytes() for path in sorted(data.parent.rglob("*.*")) if path.is_file()}
    bad, ids = _spoil(data.parent)
    result = lavender(*arguments(data, tmp_path / "t", "--device", "cpu,cpu"))
    assert result.returncode == 0, result.stderr
    store = TargetStore(tmp_path / "t")
    told = set(bad) | (set(store.failed) - set(bad))
    assert set(store) == set(ids) - told
    assert told - set(bad) <= {ids[13]}, store.failed  # an emoji may or may not be a word
    for own_id, reason in bad.items():
        assert reason in store.failed[own_id]
        assert f"skipped {own_id}: " in result.stdout
    assert set(np.shape(store[ids[12]].word_maps.maps)[:1]) == {10002}
    for own_id in (ids[2], ids[3], ids[4], ids[5], ids[6], ids[14], ids[15]):
        assert store[own_id].word_maps.maps.size
    np.testing.assert_array_equal(store[ids[8]].image_sha256, store[ids[9]].image_sha256)
    before = shards(tmp_path / "t")

    # All of the pictures that failed, and their captions; what is stored stays as it was.
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for line, scene in zip(lines, scenes, strict=True):
        if line["image"] in told:
            (data.parent / line["image"]).write_bytes(sound[data.parent / line["image"]])
            line["caption"] = scene.caption
    data.write_text("\n".join(map(json.dumps, lines)) + "\n")
    result = lavender(*arguments(data, tmp_path / "t", "--failed-only"))
    assert result.returncode == 0, result.stderr
    assert f"{len(told)} written, 0 there before, 0 skipped" in result.stdout
    after = shards(tmp_path / "t")
    assert before.items() <= after.items()
    assert set(TargetStore(tmp_path / "t")) == set(ids)
    assert lavender("targets", "verify", tmp_path / "t", "--data", data).returncode == 0

    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").glob("data-*")}
    result = lavender(*arguments(data, tmp_path / "t"))
    assert f"0 written, {len(ids)} there before, 0 skipped" in result.stdout
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "t").glob("data-*")}
    assert shards(tmp_path / "t") == after


@pytest.mark.parametrize("devices", ["cpu", pytest.param("cpu,cpu", marks=pytest.mark.full)])
def test_a_full_disk_is_one_line_and_the_same_command_continues(data, undisturbed, tmp_path, devices):
    import resource

    limit = len(undisturbed["data-00001.parquet"]) - 1

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    result = lavender(*arguments(data, tmp_path / "t", "--device", devices), preexec_fn=full)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("lavender: ")]
    assert "cannot write to" in line
    assert "run the same command again" in line
    assert not read_manifest(tmp_path / "t")["complete"]
    assert lavender(*arguments(data, tmp_path / "t", "--device", devices)).returncode == 0
    assert shards(tmp_path / "t") == undisturbed


def _forms(data, folder):
    """The same pictures as a data set of every form."""
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    pictures = [(data.parent / line["image"]).read_bytes() for line in lines]
    captions = [line["caption"] for line in lines]
    (folder / "folder").mkdir()
    entries = []
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            (folder / f"folder/{number:03d}.png").write_bytes(picture)
            entries.append({"file_name": f"{number:03d}.png", "text": caption})
            for ending, content in (("png", picture), ("txt", caption.encode())):
                path = folder / "member"
                path.write_bytes(content)
                tar.add(path, f"{number:03d}.{ending}")
    (folder / "folder/metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    pq.write_table(pa.table({"image": pictures, "caption": captions}), folder / "table.parquet")
    (folder / "beside").mkdir()
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        (folder / f"beside/{number:03d}.png").write_bytes(picture)
        (folder / f"beside/{number:03d}.txt").write_text(caption)
    with open(folder / "beside/table.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file_name", "caption"], *([f"{n:03d}.png", caption] for n, caption in enumerate(captions))])
    others = {"csv": folder / "beside/table.csv", "texts": folder / "beside"}
    return others | {
        "lines": data,
        "imagefolder": folder / "folder",
        "parquet": folder / "table.parquet",
        "tar": folder / "shard.tar",
    }


@pytest.mark.parametrize("work", [ONE, pytest.param(TWO, marks=pytest.mark.full)], ids=["one process", "two processes"])
def test_every_form_of_a_data_set_gives_the_same_maps(tmp_path, work):
    data = write_dataset(list(make_scenes(seed=6, count=10)), tmp_path / "data")
    found = {}
    for name, form in _forms(data, tmp_path).items():
        extract(TEACHER, open_pairs(form), tmp_path / name, NOISE, work, progress=False)
        table = pq.read_table([Path(path) for path in sorted((tmp_path / name).glob("data-*.parquet"))])
        found[name] = table.drop_columns(["id"])
        assert table.num_rows == 10
    assert all(table.equals(found["lines"]) for table in found.values())
