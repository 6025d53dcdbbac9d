"""How a teacher should be asked: inversions, timesteps, layers and heads compared on the small world, with what each costs.

Every way reads the same held-out scenes, whose masks are exact. The results are the four measures of `lavender.evaluation` with
the word-agnostic control, 95 % intervals by resampling scenes, forwards and seconds per picture (one thread), and a plot.
Controls: a U-Net of random weights, and chance.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from tqdm import tqdm

from lavender.config import TeacherConfig, to_dict
from lavender.evaluation.localization import compare
from lavender.miniworld import TEACHER
from lavender.miniworld.measures import held_out_scenes, scene_words, teacher_maps
from lavender.miniworld.report import environment
from lavender.teachers.model import Teacher, load_pipeline

SCENE_SEED = 6060
"""Scenes that no other measurement of this project has used."""
RESAMPLES = 1000


def ways(teacher: Teacher) -> Iterator[tuple[str, str, TeacherConfig]]:
    """Group, name and config of each way; those of one group differ in one thing."""

    def noise(**changes: Any) -> TeacherConfig:
        return TeacherConfig(**{"inversion": "noise", **changes})

    yield "inversion", "noise 51, 151, 301", noise()
    yield "inversion", "noise 151", noise(timesteps=(151,))
    yield "inversion", "DDIM 5 + 10", TeacherConfig()
    yield "inversion", "DDIM 5 + 10, up to 500", TeacherConfig(last_timestep=500)
    yield "inversion", "DDIM 10 + 10", TeacherConfig(inversion_steps=10)
    yield "inversion", "DDIM 20 + 20", TeacherConfig(inversion_steps=20, diffusion_steps=20)
    yield "inversion", "DDIM 10 + 10, guidance 7.5", TeacherConfig(inversion_steps=10, guidance_scale=7.5)
    yield "inversion", "null-text 10, guidance 7.5", TeacherConfig(inversion="null_text", diffusion_steps=10, guidance_scale=7.5)
    for timestep in (1, 51, 101, 151, 201, 301, 401, 501, 601, 701, 801, 901):
        yield "timestep", str(timestep), noise(timesteps=(timestep,))
    for layer in teacher.hooks.modules:
        yield "layer", layer.replace("transformer_blocks.0.", ""), noise(layers=(layer,))
    for side in (16, 8):
        yield "layer", f"all of {side} x {side}", noise(resolutions=(side,))
    yield "heads", "mean", noise()
    yield "heads", "max", noise(head_reduction="max")
    for head in range(2):
        yield "heads", f"head {head}", noise(heads=(head,))
    for seed in (1, 2):
        yield "seed", f"noise 51, 151, 301, seed {seed}", noise(seed=seed)


def measure(teacher: Teacher, scenes: list[Any]) -> dict[str, Any]:
    """The measures, their intervals and the cost of one way."""
    forwards = 0

    def count(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal forwards
        forwards += len(args[0] if args else kwargs["sample"])

    handle = teacher.family.denoiser.register_forward_pre_hook(count, with_kwargs=True)
    started = time.perf_counter()
    maps = teacher_maps(teacher, scenes)
    seconds = time.perf_counter() - started
    handle.remove()
    per_scene = [scene_words(scene, maps_of_scene) for scene, maps_of_scene in zip(scenes, maps, strict=True)]
    figures: dict[str, Any] = compare(per_scene)
    figures["intervals"] = _intervals(per_scene)
    return figures | {"forwards": round(forwards / len(scenes), 1), "seconds": round(seconds / len(scenes), 4)}


def _intervals(per_scene: list[Any]) -> dict[str, list[float]]:
    """95 % intervals of pointing and own object, by resampling scenes."""
    scores = {"pointing": [], "own_object": []}  # type: dict[str, list[tuple[float, int]]]
    for words in per_scene:
        figures = compare([words])["maps"] if words else None
        for name, values in scores.items():
            measured = figures is not None and not np.isnan(figures[name])
            values.append((figures[name] * figures["words"], figures["words"]) if measured else (0.0, 0))  # type: ignore[index]
    chosen = np.random.default_rng(0).integers(len(per_scene), size=(RESAMPLES, len(per_scene)))
    intervals = {}
    for name, values in scores.items():
        hits, counts = np.array(values).T
        shares = hits[chosen].sum(axis=1) / counts[chosen].sum(axis=1)
        intervals[name] = [round(float(edge), 4) for edge in np.percentile(shares, [2.5, 97.5])]
    return intervals


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Pointing and own object of every way, its control beside it; cost in the labels."""
    from matplotlib.figure import Figure

    groups = [group for group in ("inversion", "timestep", "layer", "heads") if any(r["group"] == group for r in results)]
    heights = [sum(r["group"] == group for r in results) + 1.5 for group in groups]
    figure = Figure(figsize=(11, 0.26 * sum(heights) + 1), layout="constrained")
    axes = figure.subplots(len(groups), 2, gridspec_kw={"height_ratios": heights}, sharex=True, squeeze=False)
    for row, group in zip(axes, groups, strict=True):
        shown = [r for r in results if r["group"] == group] + [r for r in results if r["group"] == "control"]
        places = np.arange(len(shown))
        for ax, name in zip(row, ("pointing", "own_object"), strict=True):
            values = np.array([r["maps"][name] for r in shown])
            edges = np.array([r["intervals"][name] for r in shown])
            ax.errorbar(values, places, xerr=abs(edges.T - values), fmt="o", color="#b33", label="word maps", capsize=2)
            ax.plot([r["control"][name] for r in shown], places, "x", color="#888", label="word-agnostic control")
            ax.axvline(shown[0]["chance"][name], color="#bbb", linestyle=":", label="chance")
            ax.set_yticks(
                places, [f"{r['name']}  ({r['forwards']:g} fwd, {1000 * r['seconds']:.0f} ms)" for r in shown], fontsize=7
            )
            ax.invert_yaxis()
            ax.set_xlim(0, 1.02)
            ax.grid(axis="x", alpha=0.3)
            ax.set_title(f"{group}: {name.replace('_', ' ')}", fontsize=9)
        row[1].set_yticklabels([])
    axes[0][1].legend(fontsize=7, loc="lower left")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("bench/results/teacher_study"), help="without the ending")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scenes = held_out_scenes(args.scenes, SCENE_SEED)
    pipe = load_pipeline(TEACHER)
    first = Teacher(pipe, TeacherConfig())
    chosen = list(ways(first))
    first.close()
    results: list[dict[str, Any]] = []

    def run(group: str, name: str, model: Any, config: TeacherConfig) -> None:
        teacher = Teacher(model, config)
        results.append({"group": group, "name": name, "config": to_dict(config), **measure(teacher, scenes)})
        teacher.close()

    for group, name, config in tqdm(chosen, desc="ways"):
        run(group, name, pipe, config)
    untrained = copy.copy(pipe)
    torch.manual_seed(0)
    untrained.unet = UNet2DConditionModel.from_config(pipe.unet.config).to(memory_format=torch.channels_last)
    run("control", "untrained U-Net, noise 51, 151, 301", untrained, TeacherConfig(inversion="noise"))
    record = {"environment": environment(), "scenes": args.scenes, "scene_seed": SCENE_SEED, "results": results}
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    draw(results, args.out.with_suffix(".svg"))
    for result in results:
        print(f"{result['group']:<10} {result['name']:<40} {result['maps']['pointing']:.3f} {result['maps']['own_object']:.3f}")


if __name__ == "__main__":
    main()
