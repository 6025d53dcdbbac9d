"""Full fine-tuning of a vision-language model by a loop of one's own, with lavender: two lines more than without.

    python examples/plain_loop.py --model NAME --data captions.jsonl --targets targets/ --out runs/plain_loop

Without --data it makes a little data of lavender's own small world first, and trains the small model that belongs to it.
"""

import argparse
import itertools

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

import lavender
from lavender.data.samples import read_samples
from lavender.miniworld import STUDENT


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(STUDENT), help="folder or hub id of an image-text-to-text model")
    parser.add_argument("--data", help='JSON lines {"image", "question", "answer"}; needs --targets')
    parser.add_argument("--targets", help="what `lavender extract` made of --data")
    parser.add_argument("--out", default="runs/plain_loop", help="where the model goes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4, help="samples per device")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--weight", type=float, default=1.0, help="lambda, the weight of the alignment loss")
    args = parser.parse_args()
    if args.data and not args.targets:
        parser.error("--data needs --targets")
    if args.data is None:
        from small_world import make_data

        args.data, args.targets = make_data()

    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=False)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False)
    patch = lavender.patch(model, lavender.AlignmentConfig(weight=args.weight))  # lavender, line one
    collator = lavender.Collator(processor, lavender.TargetStore(args.targets), model_config=model.config)  # line two

    # On several devices: some vision towers have layers that are not used.
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    loader = DataLoader(read_samples(args.data), batch_size=args.batch_size, shuffle=True, collate_fn=collator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))  # one after the other
    for step, batch in zip(range(1, args.steps + 1), epochs, strict=False):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step}: loss {loss:.4f}, alignment loss {patch.last.loss:.4f}")

    patch.unpatch()  # the aligner has served: what is saved is a model as transformers knows it
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.out)
        processor.save_pretrained(args.out)


if __name__ == "__main__":
    main()
