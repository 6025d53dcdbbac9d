"""Where the main job's time goes on the embedded small world: a forward of the teacher, a training step of the student.

    python bench/main_job.py [--repeats N] [--threads N] [--json OUT.json]

Ways of doing the same take turns within one run; medians are compared, `x plain` is the median of a round's ratios. The shares are
of one profiled round: the part of the processor's time that the capture's operations and the losses take.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import lavender
from lavender.batches.collator import Collator
from lavender.config import AlignmentConfig, TeacherConfig
from lavender.data.samples import Sample
from lavender.miniworld import STUDENT, TEACHER
from lavender.miniworld.report import environment
from lavender.miniworld.scenes import DESCRIBE, make_scenes
from lavender.students.loading import load_student
from lavender.teachers.model import Teacher
from lavender.types import WordBatch

Row = dict[str, object]
BATCH = 16
WORDS = 8


def compare(job: str, ways: dict[str, Callable[[], object]], repeats: int) -> list[Row]:
    """Rows of one job; its first way is the plain one."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if repeat:
                times[name].append((time.perf_counter() - start) * 1e3)
    plain = next(iter(times.values()))
    return [
        {
            "job": job,
            "way": name,
            "median_ms": round(statistics.median(milliseconds), 2),
            "x_plain": round(statistics.median(a / b for a, b in zip(milliseconds, plain, strict=True)), 3),
            "share_of_capture": round(share_of_capture(ways[name]), 4),
        }
        for name, milliseconds in times.items()
    ]


def share_of_capture(way: Callable[[], object]) -> float:
    """The part of the processor's time spent inside lavender's operations, forward and backward."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        way()
    averages = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in averages)
    return sum(event.cpu_time_total for event in averages if event.key.startswith("lavender::")) / total


def teacher_ways() -> dict[str, Callable[[], object]]:
    """One forward of the denoiser for one picture."""
    teacher = Teacher(TEACHER, TeacherConfig())
    size = teacher.pipe.unet.config.sample_size
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, teacher.pipe.unet.config.in_channels, size, size, generator=generator)
    caption = next(iter(make_scenes(seed=5, count=1))).caption
    with torch.no_grad():
        prompt, _ = teacher.pipe.encode_prompt(caption, "cpu", 1, False)
    weights = torch.zeros(1, WORDS, prompt.shape[1])
    weights[0, torch.arange(WORDS), torch.arange(WORDS) + 1] = 1.0

    def forward(capture: bool, fused: bool = False) -> None:
        with torch.no_grad(), teacher.hooks.capture(weights, fused=fused) if capture else nullcontext():
            teacher.pipe.unet(latents, torch.tensor(151), prompt)

    return {
        "plain": lambda: forward(False),
        "capture beside the attention": lambda: forward(True),
        "capture fused with it": lambda: forward(True, fused=True),
    }


def student_ways() -> dict[str, Callable[[], object]]:
    """Forward and backward pass of a batch, all weights trained."""
    model, processor = load_student(STUDENT)
    scenes = list(make_scenes(seed=5, count=BATCH))
    samples = [Sample(str(i), scene.image, DESCRIBE, scene.caption) for i, scene in enumerate(scenes)]
    batch = Collator(processor)(samples)
    inputs, words = WordBatch.split(batch)
    assert words is not None
    targets = torch.rand((*words.present.shape, 32, 32), generator=torch.Generator().manual_seed(0))
    keys = replace(words, targets=targets).to_batch()

    def step(student: torch.nn.Module, maps: bool) -> None:
        student(**inputs, **(keys if maps else {})).loss.backward()
        student.zero_grad()

    ways: dict[str, Callable[[], object]] = {}
    plain = copy.deepcopy(model).train()
    ways["plain"] = lambda: step(plain, False)
    for aligner in ("identity", "sim"):
        student = copy.deepcopy(model).train()
        lavender.patch(student, AlignmentConfig(aligner=aligner))
        ways[f"with maps, {aligner} aligner"] = lambda student=student: step(student, True)
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    print(f"{'job':24} {'way':32} {'ms':>9} {'x plain':>8} {'in capture':>11}")
    for job, make in (("teacher, one forward", teacher_ways), (f"student, batch of {BATCH}", student_ways)):
        for row in compare(job, make(), arguments.repeats):
            rows.append(row)
            print("{:24} {:32} {:9.2f} {:8.3f} {:11.1%}".format(*row.values()), flush=True)
    if arguments.json:
        record = {"environment": environment(), "threads": arguments.threads, "rows": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
