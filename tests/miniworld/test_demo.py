"""The demo from end to end, with few pictures and steps; its figures beside what transformers says of its students."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch.nn import functional as F

from lavender.batches.collator import Collator
from lavender.data.samples import read_samples
from lavender.errors import TargetError
from lavender.evaluation.answers import generate
from lavender.miniworld import demo, language
from lavender.miniworld.demo import run_demo
from lavender.miniworld.experiment import (
    ARMS,
    WORLDS,
    DemoConfig,
    ask,
    choose_alignment,
    demo_config,
    fresh_scenes,
    training_scenes,
    write_questions,
)
from lavender.miniworld.language import conversation_of, small_student
from lavender.students.loading import load_student
from lavender.targets.store import TargetStore

SHORT = {"steps": 50, "pictures": 4, "questions": 8, "warmup_steps": 5}
CONFIG = replace(
    demo_config(seed=3),
    num_train=10,
    num_fresh=6,
    num_curve=3,
    measure_every=20,
    plain=replace(demo_config().plain, **SHORT),
    aligned=replace(demo_config().aligned, **SHORT),
)
TIMES = ("cpu_s",)


def in_this_process(patch):
    """One core, and states often enough to be killed between two."""
    patch.setattr(demo, "_cores", lambda: 1)
    patch.setattr(language, "SAVE_EVERY", 15)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        in_this_process(patch)
        run_demo(out, CONFIG)
    return out


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def figures(out):
    return without_times(json.loads((out / "results.json").read_text()))


def weights(out):
    return {arm: load_file(out / arm / "model/model.safetensors") for arm in ARMS}


def require_same(first, second):
    assert figures(first) == figures(second)
    for arm in ARMS:
        one, two = weights(first)[arm], weights(second)[arm]
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    # What the page says of seconds is time.
    pages = [re.sub(r"How they learned.*?<h2>", "", (out / "report.html").read_text(), flags=re.S) for out in (first, second)]
    assert pages[0] == pages[1]


def test_what_a_demo_leaves(finished, capsys):
    results = json.loads((finished / "results.json").read_text())
    assert set(results) == {"answers", "attention", "history", "examples", "teacher", "config", "environment"}
    for arm in ARMS:
        assert [entry["step"] for entry in results["history"][arm]] == [20, 40, 50]
        assert ("alignment_loss" in results["history"][arm][0]) == (arm == "aligned")
    plain, aligned = weights(finished).values()
    assert any(not torch.equal(plain[name], aligned[name]) for name in plain)
    tower = [name for name in plain if "vision_tower" in name]
    assert tower
    assert all(torch.equal(plain[name], aligned[name]) for name in tower)
    html = (finished / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', html), "nothing is loaded from elsewhere"


@pytest.mark.parametrize("referents", [False, True])
def test_the_questions_are_a_data_set_of_their_own(finished, tmp_path, referents):
    """What the file says is what the students learned: the same batch, with the targets of the store beside it."""
    config = replace(CONFIG, referents=referents)
    shutil.copytree(finished / "data/images", tmp_path / "images")
    write_questions(tmp_path, config)
    scenes = training_scenes(config)
    learned = [conversation_of(str(n), *pair, referents=referents) for n, pair in enumerate(zip(scenes, ask(scenes), strict=True))]
    _, processor = small_student(0)
    collator = Collator(processor, TargetStore(finished / "data/targets"), config.words, on_error="raise")
    first, second = collator(read_samples(tmp_path / "questions.jsonl")), collator(learned)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["lavender_present"].any(dim=1).all()


def test_answers_are_those_of_greedy_generation(finished):
    """Question by question, from the folders that the demo leaves; the figures follow by hand."""
    found = json.loads((finished / "results.json").read_text())["answers"]
    for world in WORLDS:
        scenes = fresh_scenes(world, CONFIG.num_fresh)
        right: dict[str, dict[str, list[bool]]] = {}
        for arm in ARMS:
            model, processor = load_student(str(finished / arm / "model"))
            for scene, questions in zip(scenes, ask(scenes), strict=True):
                texts = [question.text for question in questions]
                said = generate(model, processor, [scene.image] * len(questions), texts, max_new_tokens=8)
                for question, answer in zip(questions, said, strict=True):
                    right.setdefault(question.type, {}).setdefault(arm, []).append(answer.strip() == question.answer)
        if world == "clutter":
            del right["count"]
        for kind, by_arm in right.items():
            plain, aligned = (np.mean(by_arm[arm]) for arm in ARMS)
            row = found[world][kind]
            assert row["questions"] == len(by_arm["plain"])
            assert row["first"]["mean"] == pytest.approx(plain, abs=1e-4)
            assert row["second"]["mean"] == pytest.approx(aligned, abs=1e-4)
            assert row["difference"]["mean"] == pytest.approx(aligned - plain, abs=1e-4)
        of_all = [np.mean([np.mean(by_arm[arm]) for by_arm in right.values()]) for arm in ARMS]
        assert min(of_all) > 0.1, "students that never answer would agree with anything"
        assert [found[world]["all"][part]["mean"] for part in ("first", "second")] == pytest.approx(of_all, abs=1e-4)
        assert found[world].keys() == {*right, "all"}


def test_pointing_is_that_of_eager_attention(finished):
    """Of every question alone: the mean over the compared layers' heads, of a word's row and of the one before an answer."""
    found = json.loads((finished / "results.json").read_text())["attention"]
    for arm in ARMS:
        model, processor = load_student(str(finished / arm / "model"))
        model.set_attn_implementation("eager")
        hits: dict[str, list[bool]] = {"question": [], "answer": []}
        for scene, questions in zip(fresh_scenes("in distribution", 6), ask(fresh_scenes("in distribution", 6)), strict=True):
            for question in questions:
                text = f"<s><|user|><image>{question.text}<|assistant|>"
                inputs = processor(text=text, images=[scene.image], add_special_tokens=False, return_tensors="pt")
                ids = inputs["input_ids"][0].tolist()
                with torch.no_grad():
                    every = model(**inputs, output_attentions=True).attentions
                attention = torch.stack([every[layer] for layer in CONFIG.alignment.layers]).mean(dim=(0, 2))[0]
                places = [n for n, token in enumerate(ids) if token == model.config.image_token_index]
                rows = []
                for referent in question.referents:
                    word = processor.tokenizer.encode(" " + question.text[referent.start : referent.end], add_special_tokens=False)
                    assert len(word) == 1
                    rows.append(("question", ids.index(word[0]), referent))
                if question.object_index is not None:
                    rows.append(("answer", len(ids) - 1, None))
                for role, row, referent in rows:
                    values = attention[row, places].double().view(1, 1, 8, 8)
                    large = F.interpolate(values, size=(64, 64), mode="bilinear", align_corners=False).flatten()
                    mask = scene.masks[question.object_index if referent is None else referent.object_index]
                    hits[role].append(bool(mask.flat[int(large.argmax())]))
        for role, expected in hits.items():
            assert found[arm][role]["maps"]["words"] == len(expected)
            assert found[arm][role]["maps"]["pointing"] == pytest.approx(np.mean(expected), abs=1e-4)


class Killed(BaseException):
    """What nothing catches, as nothing catches a kill."""


def test_a_demo_that_was_killed_ends_the_same(finished, tmp_path, monkeypatch):
    """Killed again and again, each time before a file takes its name; what was written stays."""
    in_this_process(monkeypatch)
    replaced, out = os.replace, tmp_path / "demo"
    for fatal in (
        "data/targets/manifest.json",
        "plain/before_fall.pt",
        "aligned/before_fall.pt",
        "aligned/measured.json",
        "report.html",
    ):

        def dies(source, target, fatal=out / fatal):
            if target == fatal:
                raise Killed
            replaced(source, target)

        monkeypatch.setattr(os, "replace", dies)
        with pytest.raises(Killed):
            run_demo(out, CONFIG)
    monkeypatch.setattr(os, "replace", replaced)
    run_demo(out, CONFIG)
    require_same(finished, out)


def test_a_finished_demo_is_read(finished, monkeypatch):
    in_this_process(monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    known = figures(finished)
    run_demo(finished, CONFIG)
    assert figures(finished) == known
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before


def test_a_folder_of_something_else_is_refused_in_a_line(finished, tmp_path, monkeypatch):
    in_this_process(monkeypatch)

    def refused(out, config=CONFIG):
        with pytest.raises(TargetError) as caught:
            run_demo(out, config)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "seed=3, now 4" in refused(finished, replace(CONFIG, seed=4))
    assert "(alignment.weight=1.0, now 0.5)" in refused(finished, replace(CONFIG, alignment=replace(CONFIG.alignment, weight=0.5)))
    before = (finished / "demo.json").read_text()
    (finished / "demo.json").write_text(json.dumps({**json.loads(before), "version": "0.0.1"}))
    assert "version='0.0.1', now" in refused(finished)
    (finished / "demo.json").write_text(before)
    monkeypatch.setattr(demo, "LAYOUT", 99)
    assert "layout=2, now 99" in refused(finished)
    old = tmp_path / "old"
    (old / "none").mkdir(parents=True)
    (old / "captions.jsonl").write_text("")
    message = refused(old)
    assert str(old) in message
    assert "earlier version" in message
    assert sorted(path.name for path in old.iterdir()) == [".lock", "captions.jsonl", "none"], "nothing is written there"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "demo.json").write_text("{")
    assert "damaged" in refused(broken)
    with FileLock(tmp_path / ".lock"):
        assert "another process" in refused(tmp_path)


def test_layers_and_heads_are_chosen_before_the_training(finished):
    """By the training pictures' targets, in the untrained student: the same every time, for both students."""
    open_ = replace(CONFIG, alignment=replace(CONFIG.alignment, layers="best:1"))
    chosen = choose_alignment(finished, open_)
    assert len(chosen.alignment.layers) == 1
    assert chosen == choose_alignment(finished, open_)
    assert choose_alignment(finished, CONFIG) == CONFIG


def test_seeds_share_no_picture_of_the_training():
    captions = [[s.pixels.tobytes() for s in training_scenes(DemoConfig(num_train=8, seed=seed))] for seed in (0, 1)]
    fresh = [s.pixels.tobytes() for world in WORLDS for s in fresh_scenes(world, 8)]
    assert len({*captions[0], *captions[1], *fresh}) == 32


SCRIPT = """
import pathlib, sys
from lavender.miniworld import demo
from tests.miniworld.test_demo import CONFIG
demo._cores = lambda: 2
if __name__ == "__main__":
    demo.run_demo(pathlib.Path(sys.argv[1]), CONFIG)
"""


@pytest.mark.full
def test_processes_that_are_killed_leave_what_ends_the_same(finished, tmp_path):
    """The demo's own process, then a training's: SIGKILL. The trainings end with the demo, and the same command continues."""
    script, out = tmp_path / "run.py", tmp_path / "demo"
    script.write_text(SCRIPT)

    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def start():
        return subprocess.Popen(
            [sys.executable, script, out],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def children(process):
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            pids = [int(pid) for pid in file.read().split()]
        return [pid for pid in pids if b"spawn_main" in open(f"/proc/{pid}/cmdline", "rb").read()]

    def wait_for(condition):
        end = time.monotonic() + 900  # a machine may be busy
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)

    for sign in ("data/targets", "plain/settings.json", "aligned/before_fall.pt"):
        process = start()
        wait_for(lambda sign=sign, process=process: (out / sign).exists() or process.poll() is not None)
        assert (out / sign).exists(), process.stderr.read()
        workers = children(process)
        process.kill()
        process.communicate()
        wait_for(lambda workers=workers: not any(os.path.exists(f"/proc/{pid}") for pid in workers))
    process = start()
    wait_for(lambda: len(children(process)) == 2)
    os.kill(children(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 1
    assert "ended with exit code -9; the same command continues it" in errors
    assert start().wait(timeout=900) == 0
    require_same(finished, out)
