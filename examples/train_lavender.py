"""Lavender training from start to end: one process on a CPU, one V100 or A100, or a node of eight.

    python examples/train_lavender.py
    torchrun --nproc_per_node 8 examples/train_lavender.py --preset llama-3.2-11b-vision-lora --data DATA --targets STORE
    accelerate launch --config_file examples/engines/fsdp2.yaml examples/train_lavender.py --preset ... --data DATA --targets STORE
    deepspeed examples/train_lavender.py --deepspeed examples/engines/zero3.json --preset ... --data DATA --targets STORE

Without --data it trains the small world's student. The run folder has everything: settings, checkpoints (the same command
continues a run that was killed), the adapter or model, the aligner, losses and pictures of the maps.
"""

import argparse
import logging
import os

import torch

from lavender import TargetStore, fine_tune
from lavender.cli.presets import PRESETS, preset
from lavender.data.samples import read_samples


def precision_here():
    """bf16 where the GPU computes in it, fp16 on older ones (V100, T4), fp32 on a CPU."""
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small-world", help="settings to start from")
    parser.add_argument("--model", help="folder or hub id of the student, in place of the preset's")
    parser.add_argument("--data", help="samples: JSON lines, or a published format; needs --targets")
    parser.add_argument("--targets", help="what `lavender extract` made of --data")
    parser.add_argument("--out", default="runs/train", help="run folder")
    parser.add_argument("--adapter", help="LoRA adapter to start from")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--bf16", dest="precision", action="store_const", const="bf16", help="A100 and newer")
    precision.add_argument("--fp16", dest="precision", action="store_const", const="fp16", help="V100, T4: with loss scaling")
    precision.add_argument("--fp32", dest="precision", action="store_const", const="fp32")
    parser.add_argument("--deepspeed", help="DeepSpeed's config file")
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, ... as transformers names them")
    parser.add_argument("--set", nargs="+", action="extend", default=[], help="alignment.weight=5 training.steps=100 ...")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    args = parser.parse_args()
    if bool(args.data) != bool(args.targets):
        parser.error("--data and --targets go together")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lavender").setLevel(logging.INFO)  # says which kernels run, and what could not be aligned

    chosen = preset(args.preset)
    precision = args.precision or precision_here()
    if precision != "fp32":
        chosen = chosen.in_precision(precision)
    settings = [f"training.arguments.report_to={args.report_to}"]
    if args.deepspeed:
        settings.append(f"training.arguments.deepspeed={args.deepspeed}")
    chosen = chosen.with_settings(settings + args.set)
    if args.data is None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            parser.error("several processes need --data and --targets; `python examples/small_world.py` makes the small world's")
        from small_world import make_data

        args.data, args.targets = make_data()
    fine_tune(
        args.model or chosen.model,
        read_samples(args.data),
        args.out,
        chosen.training,
        targets=TargetStore(args.targets),
        alignment=chosen.alignment,
        words=chosen.words,
        adapter=args.adapter,
    )


if __name__ == "__main__":
    main()
