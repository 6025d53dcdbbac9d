"""What maps cost: an extraction with maps beside the same inversion and denoising without a look, time and peak memory.

Both ways run in this process, in turns, after a round that pays for what is loaded late; medians of several rounds, written with
`--json`. `--model` is a folder or hub id; without it, the small world's teacher and a U-Net of random weights with Stable Diffusion
1.5's layers: on a CPU a fifth as wide and at 256 pixels, on a GPU whole, at 512 pixels. Before anything is timed the two ways'
last latents are compared: equal up to rounding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attn_fusion import peak_bytes
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from lavender.config import TeacherConfig
from lavender.images import Picture
from lavender.miniworld import TEACHER
from lavender.miniworld.report import environment
from lavender.teachers import model as teaching
from lavender.teachers.bound_denoiser import BoundDenoiser
from lavender.teachers.model import Teacher, load_pipeline
from lavender.words import Caption

CAPTION = "A large red circle above a small green square to the left of a blue star."
"""Sixteen words."""


def sd15(width: int, device: str) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's layers with random weights, `width` channels at the finest level (320 in the real one).

    Text encoder and scheduler are the small world's.
    """
    torch.manual_seed(0)
    embedded = load_pipeline(TEACHER)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        attention_head_dim=8,
        cross_attention_dim=embedded.text_encoder.config.hidden_size,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64, 64) if device == "cpu" else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    return StableDiffusionPipeline(**embedded.components | {"vae": vae, "unet": unet}, requires_safety_checker=False)


class _WithoutMaps(BoundDenoiser):
    """The same predictions; nothing is recorded."""

    def predict_guided(self, latents: torch.Tensor, timestep: torch.Tensor, record: bool) -> torch.Tensor:
        return super().predict_guided(latents, timestep, False)

    def maps(self, inside: Any) -> torch.Tensor:
        return torch.zeros(len(self._text), self._word_weights.shape[1], self._config.map_size, self._config.map_size)


def measure(teacher: Teacher, batch: int, rounds: int) -> dict[str, Any]:
    """Medians of seconds a picture and of peak bytes, with maps and without, and their ratios."""
    noise = np.random.default_rng(0).integers(0, 255, (batch, teacher.side // 8, teacher.side // 8, 3), np.uint8)
    pictures = [Picture.open(Image.fromarray(pixels).resize((teacher.side, teacher.side))) for pixels in noise]
    last: dict[str, torch.Tensor] = {}

    def run(kind: type) -> None:
        read_maps = teaching.read_maps

        def keep(*args: Any) -> Any:
            latents = read_maps(*args)
            last[kind.__name__] = latents[1]
            return latents

        teaching.BoundDenoiser, teaching.read_maps = kind, keep
        try:
            teacher.word_maps_of(pictures, [Caption.of(CAPTION)] * batch)
        finally:
            teaching.BoundDenoiser, teaching.read_maps = BoundDenoiser, read_maps

    kinds = {"with_maps": BoundDenoiser, "without": _WithoutMaps}
    for kind in kinds.values():
        run(kind)
    with_maps, without = last["BoundDenoiser"].double(), last["_WithoutMaps"].double()
    drift = float((with_maps - without).norm() / without.norm())
    tolerance = 1e-3 if teacher.config.dtype == "float32" else 5e-2
    if not drift < tolerance:
        raise SystemExit(f"the two ways end in latents that differ by {drift:.1e}; expected less than {tolerance}")
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    peaks: dict[str, list[int]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, kind in kinds.items():
            if teacher.device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            run(kind)
            if teacher.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
            peaks[name].append(peak_bytes(lambda kind=kind: run(kind), teacher.device))
    found: dict[str, Any] = {"drift": drift, "batch": batch, "side": teacher.side, "layers": len(teacher.hooks.modules)}
    for name in kinds:
        found[f"{name}_s"] = round(statistics.median(seconds[name]) / batch, 4)
        found[f"{name}_peak_mb"] = round(statistics.median(peaks[name]) / 2**20, 1)
    found["time_ratio"] = round(statistics.median(a / b for a, b in zip(seconds["with_maps"], seconds["without"], strict=True)), 3)
    found["peak_ratio"] = round(statistics.median(peaks["with_maps"]) / statistics.median(peaks["without"]), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a teacher")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dtype = args.dtype or ("float32" if args.device == "cpu" else "float16")
    config = TeacherConfig(dtype=dtype)
    on_cpu = args.device == "cpu"
    teachers: dict[str, Any] = {"small world": TEACHER, "sd15-like": None} if args.model is None else {args.model: args.model}
    results: dict[str, Any] = {}
    for name, model in teachers.items():
        own, batch = config, args.batch
        if model is None:
            model = sd15(64 if on_cpu else 320, args.device).to(getattr(torch, dtype))
            own = TeacherConfig(dtype=dtype, image_size=256 if on_cpu else 512)
            batch = 2 if on_cpu else args.batch
        teacher = Teacher(model, own, args.device)
        results[name] = measure(teacher, batch, args.rounds)
        teacher.close()
        print(name, json.dumps(results[name]))
    if args.json:
        record = {"environment": environment(), "device": args.device, "dtype": dtype, "threads": torch.get_num_threads()}
        if args.device != "cpu":
            record["gpu"] = torch.cuda.get_device_name()
        args.json.write_text(json.dumps(record | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
