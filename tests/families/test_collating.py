"""`lavender.Collator` on every family's processor: labels and rows are the answer's, and no row knows what comes later."""

from __future__ import annotations

import copy

import pytest
import torch

import lavender
from lavender.collator import Collator
from lavender.config import AlignmentConfig
from lavender.data import Sample

from .probe import noise
from .test_contract import NAMES, built, family_of

# Stand-ins for remote code have no processor with a chat template, and families of another form are refused.
STAND_INS = {"flamingo", "minicpmv"}
COLLATED = [name for name in NAMES if name not in STAND_INS and family_of(built(name)).collates]
SAMPLES = [
    Sample("0", noise(60, 90), "what is this ?", "a red cat in the house"),
    Sample("1", noise(96, 48, seed=1), "what is in the picture ?", "dog"),
]


def collator_of(name: str, side: str) -> Collator:
    student = built(name)
    processor = copy.deepcopy(student.processor)
    processor.tokenizer.padding_side = side
    processor.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + student.placeholder
        + " {% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    )
    return Collator(processor, model_config=student.model.config)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", COLLATED)
def test_labels_are_the_answer_and_rows_its_words(name, side):
    collator = collator_of(name, side)
    batch = collator(SAMPLES)
    tokenizer = collator.processor.tokenizer
    for b, sample in enumerate(SAMPLES):
        assert tokenizer.decode(batch["labels"][b][batch["labels"][b] >= 0]).split() == sample.answer.split()
        words = [word.text for word in Collator.words(sample.answer)]
        valid = batch["lavender_tokens"][b] >= 0
        spoken = batch["input_ids"][b][batch["lavender_tokens"][b][valid]]
        assert tokenizer.convert_ids_to_tokens(spoken) == [words[w] for w in batch["lavender_token_words"][b][valid]]
        assert batch["lavender_present"][b].sum() == len(words)


@pytest.mark.parametrize("name", COLLATED)
def test_a_training_step_aligns_and_no_row_knows_a_later_token(name):
    model = copy.deepcopy(built(name).model)
    batch = collator_of(name, "right")(SAMPLES)
    targets = torch.rand(*batch["lavender_present"].shape, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = {k: v for k, v in batch.items() if not k.startswith("lavender_")}
    with lavender.patch(model, AlignmentConfig(rows="reads", aligner="identity", weight=1.0)) as patch:
        output = model(**batch, lavender_targets=targets)
        assert patch.term > 0
        torch.testing.assert_close(output.loss, model(**plain).loss + patch.term)
    last = int((batch["labels"][0] >= 0).nonzero().max())
    changed = {**plain, "input_ids": plain["input_ids"].clone()}
    changed["input_ids"][0, last] = built(name).processor.tokenizer.convert_tokens_to_ids("tree")
    with torch.no_grad():
        before, after = (model(**inputs, use_cache=False).logits[0] for inputs in (plain, changed))
    torch.testing.assert_close(after[:last], before[:last], rtol=0, atol=1e-5)
    assert (after[last] - before[last]).abs().max() > 1e-3
