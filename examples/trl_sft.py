"""LoRA fine-tuning of a vision-language model by TRL's SFTTrainer, with lavender: two lines more than without.

    python examples/trl_sft.py --model NAME --data captions.jsonl --targets targets/ --out runs/trl_sft

Without --data it makes a little data of lavender's own small world first, and trains the small model that belongs to it.
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

import lavender
from lavender.data.samples import as_conversation, read_samples
from lavender.miniworld import STUDENT


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(STUDENT), help="folder or hub id of an image-text-to-text model")
    parser.add_argument("--data", help='JSON lines {"image", "question", "answer"}; needs --targets')
    parser.add_argument("--targets", help="what `lavender extract` made of --data")
    parser.add_argument("--out", default="runs/trl_sft", help="where the LoRA adapter goes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4, help="samples per device")
    parser.add_argument("--accumulation", type=int, default=1, help="batches per step")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--weight", type=float, default=1.0, help="lambda, the weight of the alignment loss")
    args = parser.parse_args()
    if args.data and not args.targets:
        parser.error("--data needs --targets")
    if args.data is None:
        from small_world import make_data

        args.data, args.targets = make_data()

    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=False)
    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=False)
    patch = lavender.patch(model, lavender.AlignmentConfig(weight=args.weight))  # lavender, line one
    collator = lavender.Collator(processor, lavender.TargetStore(args.targets), model_config=model.config)  # line two

    samples = [as_conversation(sample) for sample in read_samples(args.data)]
    rows = [{"id": s.id, "images": [str(i) for i in s.images], "messages": [vars(m) for m in s.messages]} for s in samples]
    arguments = SFTConfig(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=args.learning_rate,
        # A CPU trains in float32, V100 and T4 in fp16.
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
        fp16=torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False),
        logging_steps=5,
        save_strategy="no",
        remove_unused_columns=False,  # the collator reads the samples' own fields
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=collator,
        processing_class=processor,
        peft_config=LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], modules_to_save=["lavender"]),
    )
    # A third line, if you like: loss parts, matched words and pictures of the maps in the Trainer's log.
    trainer.add_callback(lavender.LavenderCallback(trainer))
    trainer.train()
    patch.unpatch()  # the aligner has served: what is saved is an adapter as PEFT knows it
    trainer.save_model()


if __name__ == "__main__":
    main()
