"""The one training loop behind every stage of the small world's recipes: deterministic, resumable, with averaged weights."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

SAVE_EVERY = 500


def declare_float32(config_path: Path) -> None:
    """Makes transformers load a model that was saved in float16 as float32, the precision that its users expect."""
    config = json.loads(config_path.read_text())
    config["dtype"] = "float32"
    for part in ("text_config", "vision_config"):
        if isinstance(config.get(part), dict):
            config[part]["dtype"] = "float32"
    config_path.write_text(json.dumps(config, indent=2) + "\n")


def fit(
    name: str,
    module: nn.Module,
    loss_of: Callable[[torch.Generator], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    folder: Path,
    weight_decay: float = 0.01,
    warmup: int = 100,
    ema_decay: float = 0.999,
) -> dict[str, float]:
    """Trains `module` in place by AdamW with a cosine schedule and leaves it holding its exponentially averaged weights.

    `loss_of(generator)` draws its batch from the generator alone, which is seeded by `(seed, step)`: a run that was killed
    continues from `folder/<name>.state.pt` (written every 500 steps) and ends with the weights of an undisturbed run.

    Returns the cost: `{"steps", "cpu_seconds", "loss"}`, the loss averaged over the last 100 steps.
    """
    state_path = folder / f"{name}.state.pt"
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99))
    averaged = [p.detach().clone() for p in parameters]
    first, recent, cpu_before = 0, [], 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        averaged = state["averaged"]
        first, recent, cpu_before = state["step"], state["recent"], state["cpu_seconds"]
    start = time.process_time()
    module.train()
    with tqdm(total=steps, initial=first, desc=name, mininterval=5) as bar:
        for step in range(first, steps):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            progress = step / steps
            rate = learning_rate * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = loss_of(generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            # A short memory at first, so that the average does not remember the random start.
            decay = min(ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - decay)
            recent = [*recent[-99:], float(loss.detach())]
            bar.update()
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", refresh=False)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                state = {
                    "module": module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "averaged": averaged,
                    "step": step + 1,
                    "recent": recent,
                    "cpu_seconds": cpu_before + time.process_time() - start,
                }
                partial = state_path.with_suffix(".partial")
                torch.save(state, partial)
                os.replace(partial, state_path)
    with torch.no_grad():
        for parameter, average in zip(parameters, averaged, strict=True):
            parameter.copy_(average)
    module.eval()
    return {
        "steps": steps,
        "cpu_seconds": round(cpu_before + time.process_time() - start),
        "loss": round(sum(recent) / len(recent), 5),
    }
