"""Question-answer data by transformers' Trainer with lavender: words of questions, and answers that point without naming.

    python examples/question_answering.py --model NAME --data questions.jsonl --targets targets/ --out runs/question_answering

Several questions about one picture share its targets, which are found by the picture. A word of a question is compared with the
caption's word; a "yes" is compared with whatever `regions` says that it is about: a word of the caption, a box, a mask, points.
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
    parser.add_argument("--data", help='JSON lines {"id", "image", "question", "answer", "regions"}; needs --targets')
    parser.add_argument("--targets", help="what `lavender extract` made of captions of the same pictures")
    parser.add_argument("--out", default="runs/question_answering", help="where the LoRA adapter goes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="samples per device")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight", type=float, default=1.0, help="lambda, the weight of the alignment loss")
    args = parser.parse_args()
    if args.data and not args.targets:
        parser.error("--data needs --targets")
    if args.data is None:
        from small_world import make_questions

        args.data, args.targets = make_questions()

    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=False)
    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=False)
    # The row that reads a word of the question looks for it; the row that predicts an answer looks where that comes from.
    patch = lavender.patch(model, lavender.AlignmentConfig(weight=args.weight, rows="predicts", question_rows="reads"))
    lora = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"], modules_to_save=["lavender"])
    model = get_peft_model(model, lora)
    words = lavender.WordsConfig(roles=("question", "answer"))
    collator = lavender.Collator(processor, lavender.TargetStore(args.targets), words, model_config=model.config)

    samples = read_samples(args.data)
    compared = collator(samples[:1])["lavender_present"][0].tolist()
    for word, is_compared in zip(collator.aligned_words(samples[0]), compared, strict=True):
        if is_compared:
            print(f"{word.role}: {word.word.text}")
    arguments = TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        logging_steps=5,
        save_strategy="no",
        remove_unused_columns=False,  # the collator reads the samples' own fields
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=samples, data_collator=collator)
    trainer.add_callback(lavender.LavenderCallback(trainer))
    trainer.train()
    patch.unpatch()  # the aligner has served: what is saved is an adapter as PEFT knows it
    trainer.save_model()


if __name__ == "__main__":
    main()
