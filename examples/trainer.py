"""LoRA fine-tuning of a vision-language model by transformers' Trainer and PEFT, with lavender: two lines more than without.

    python examples/trainer.py --model NAME --data captions.jsonl --targets targets/ --out runs/trainer

Without --data it makes a little data of lavender's own small world first, and trains the small model that belongs to it.
"""

import argparse

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import lavender
from lavender.data.samples import read_samples
from lavender.miniworld import STUDENT


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(STUDENT), help="folder or hub id of an image-text-to-text model")
    parser.add_argument("--data", help='JSON lines {"image", "question", "answer"}; needs --targets')
    parser.add_argument("--targets", help="what `lavender extract` made of --data")
    parser.add_argument("--out", default="runs/trainer", help="where the LoRA adapter goes")
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
    lora = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], modules_to_save=["lavender"])
    model = get_peft_model(model, lora)
    collator = lavender.Collator(processor, lavender.TargetStore(args.targets), model_config=model.config)  # line two

    arguments = TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=args.learning_rate,
        logging_steps=5,
        save_strategy="no",
        remove_unused_columns=False,  # the collator reads the samples' own fields
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=read_samples(args.data), data_collator=collator)
    # A third line, if you like: loss parts, matched words and pictures of the maps in the Trainer's log.
    trainer.add_callback(lavender.LavenderCallback(trainer))
    trainer.train()
    patch.unpatch()  # the aligner has served: what is saved is an adapter as PEFT knows it
    trainer.save_model()


if __name__ == "__main__":
    main()
