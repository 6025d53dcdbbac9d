"""`lavender.Collator` on every family's processor: labels and rows are the answer's, and no row knows what comes later."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import ImageDraw
from torch import nn

import lavender
from lavender.batches.collator import Collator
from lavender.config import AlignmentConfig, WordsConfig
from lavender.data.regions import Region
from lavender.data.samples import Conversation, Message, Sample
from lavender.errors import ConfigError, DataError
from lavender.images import image_sha256
from lavender.students.discovery import attention_modules, text_tower
from lavender.students.families import STUDENTS, known_family
from lavender.students.image_tokens import require_pair
from lavender.targets.manifest import StoreConfig
from lavender.targets.store import Target, TargetStore, TargetWriter
from lavender.testing.grid_probe import silenced
from lavender.testing.student import noise_image
from lavender.types import WordMaps
from lavender.words import words_of

from ..conftest import with_targets, without_lavender, words_of_batch
from ..students.zoo import built, families, sampled

# Stand-ins for remote code have no processor with a chat template, and families of another form are refused.
STAND_INS = {"flamingo", "minicpmv"}
COLLATED = [name for name in families(lambda student: student.family.collates) if name not in STAND_INS]
SAMPLES = [
    Sample("0", noise_image(60, 90), "what is this ?", "a red cat in the house"),
    Sample("1", noise_image(96, 48, seed=1), "what is in the picture ?", "dog"),
]


# One picture in a sample, no more and no less, is what a resampler can be followed through.
ONE_PICTURE = {"blip-2", "idefics2"}
SEVERAL = [name for name in COLLATED if name not in ONE_PICTURE]
TURNS = (
    Message("user", "<image>\nwhat is this ?"),
    Message("assistant", "a red cat"),
    Message("user", "<image> in the picture ?"),
    Message("assistant", "the dog and the cat"),
    Message("user", "what of the house ?"),
    Message("assistant", "blue"),
)
ASSISTANT = "{% if message['role'] == 'assistant' %}"


def collator_of(name: str, side: str, *, closes: bool = False, **options) -> Collator:
    """Plain texts one behind the other; or answers between "!" and "</s>"."""
    student = built(name)
    processor = copy.deepcopy(student.processor)
    processor.tokenizer.padding_side = side
    opening, closing = (ASSISTANT + "! {% endif %}", ASSISTANT + "</s>{% endif %}") if closes else ("", "")
    processor.chat_template = (
        "{% for message in messages %}"
        + opening
        + "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + student.placeholder
        + " {% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        + closing
        + " {% endfor %}"
        + ("{% if add_generation_prompt %}! {% endif %}" if closes else "")
    )
    return Collator(processor, options.pop("targets", None), model_config=student.model.config, **options)


def turns_of(name: str) -> tuple[Message, ...]:
    """`TURNS`, of which the second asks about no picture of its own where the family takes one only."""
    if name in ONE_PICTURE:
        return tuple(Message(turn.role, turn.content.replace("<image> in", "in")) for turn in TURNS)
    return TURNS


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", sampled(COLLATED))
def test_labels_are_the_answer_and_rows_its_words(name, side):
    collator = collator_of(name, side)
    batch = collator(SAMPLES)
    tokenizer = collator.processor.tokenizer
    for b, sample in enumerate(SAMPLES):
        assert tokenizer.decode(batch["labels"][b][batch["labels"][b] >= 0]).split() == sample.answer.split()
        words = [word.text for word in Collator.words(sample.answer)]
        batch_words = words_of_batch(batch)
        valid = batch_words.tokens[b] >= 0
        spoken = batch["input_ids"][b][batch_words.tokens[b][valid]]
        assert tokenizer.convert_ids_to_tokens(spoken) == [words[w] for w in batch_words.token_words[b][valid]]
        assert batch_words.present[b].sum() == len(words)


@pytest.mark.parametrize("name", sampled(COLLATED))
def test_a_training_step_aligns_and_no_row_knows_a_later_token(name):
    model = copy.deepcopy(built(name).model)
    torch.manual_seed(0)
    batch = with_targets(collator_of(name, "right")(SAMPLES), 8)
    plain = without_lavender(batch)
    with lavender.patch(model, AlignmentConfig(rows="reads", aligner="identity", weight=1.0)) as patch:
        output = model(**batch)
        assert patch.last.loss > 0
        torch.testing.assert_close(output.loss, model(**plain).loss + patch.last.loss)
    last = int((batch["labels"][0] >= 0).nonzero().max())
    changed = {**plain, "input_ids": plain["input_ids"].clone()}
    changed["input_ids"][0, last] = built(name).processor.tokenizer.convert_tokens_to_ids("tree")
    with torch.no_grad():
        before, after = (model(**inputs, use_cache=False).logits[0] for inputs in (plain, changed))
    torch.testing.assert_close(after[:last], before[:last], rtol=0, atol=1e-5)
    assert (after[last] - before[last]).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", sampled(COLLATED))
def test_labels_are_every_answer_and_what_closes_it(name, side):
    collator = collator_of(name, side, closes=True)
    pictures = (noise_image(60, 90), noise_image(96, 48, seed=1))[: 1 if name in ONE_PICTURE else 2]
    batch = collator([Conversation("0", pictures, turns_of(name)), SAMPLES[1]])
    tokenizer = collator.processor.tokenizer
    answers = ["a red cat", "the dog and the cat", "blue"]
    labels, ids = batch["labels"], batch["input_ids"]
    kept = torch.nonzero(labels[0] >= 0).flatten().tolist()
    assert tokenizer.convert_ids_to_tokens(labels[0][kept]) == " </s> ".join([*answers, ""]).split()
    assert torch.equal(labels[0][kept], ids[0][kept])
    starts = [at for at in kept if at - 1 not in kept]
    assert tokenizer.convert_ids_to_tokens(ids[0][torch.tensor(starts) - 1]) == ["!", "!", "!"]
    assert tokenizer.convert_ids_to_tokens(labels[1][labels[1] >= 0]) == ["dog", "</s>"]


@pytest.mark.parametrize("name", sampled(COLLATED))
def test_no_answer_knows_a_later_turn(name):
    """Neither what is asked then, nor, where a family shows a question and its picture to what stands before, through that."""
    model = built(name).model
    pictures = (noise_image(60, 90), noise_image(96, 48, seed=1))[: 1 if name in ONE_PICTURE else 2]
    collator = collator_of(name, "right", closes=True)
    batch = without_lavender(collator([Conversation("0", pictures, turns_of(name))]))
    kept = torch.nonzero(batch["labels"][0] >= 0).flatten().tolist()
    first_end = next(at for at in kept if at + 1 not in kept)
    tree = collator.processor.tokenizer.convert_tokens_to_ids("tree")
    with torch.no_grad():
        before = model(**batch, use_cache=False).logits[0]
        for at in (first_end, kept[-2]):  # the end of the first answer, and the last answer
            changed = {**batch, "input_ids": batch["input_ids"].clone()}
            changed["input_ids"][0, at] = tree
            after = model(**changed, use_cache=False).logits[0]
            torch.testing.assert_close(after[:at], before[:at], rtol=0, atol=1e-5)
            assert (after[at] - before[at]).abs().max() > 1e-3


@pytest.mark.parametrize("name", sampled(COLLATED))
def test_words_of_both_roles_are_compared_where_their_rows_see_the_picture(name):
    """And only there: behind its tokens, in all of a prompt that sees itself whole, or where the cross-attention says."""
    roles = WordsConfig(roles=("question", "answer"))
    collator = collator_of(name, "left", closes=True, words=roles)
    pictures = (noise_image(60, 90), noise_image(96, 48, seed=1))[: 1 if name in ONE_PICTURE else 2]
    regions = (Region(5, role="prompt end", box=(0, 0, 0.5, 0.5), image=len(pictures) - 1),)
    conversation = Conversation("0", pictures, turns_of(name), regions=regions)
    inputs = collator([conversation, Sample("1", PICTURES[0], "what is the dog ?", "a red cat")])
    batch = words_of_batch(inputs)
    tokenizer = collator.processor.tokenizer
    expected = [["red", "cat", "picture", "dog", "cat", "house", "!", "blue"], ["dog", "red", "cat"]]
    for b, words in enumerate(expected):
        valid = batch.token_words[b] >= 0
        spoken = tokenizer.convert_ids_to_tokens(batch.input_ids[b, batch.tokens[b][valid]])
        assert spoken == [words[w] for w in batch.token_words[b][valid].tolist()] == words
    assert batch.roles[0].tolist() == [1, 1, 0, 1, 1, 0, 2, 1]
    assert batch.roles[1, :3].tolist() == [0, 1, 1]
    model = copy.deepcopy(built(name).model)
    with torch.no_grad(), lavender.patch(model) as patch:
        maps = patch.capture("reads", **inputs)
    assert torch.equal(maps.sum(dim=(1, 2, 4, 5)) > 0, batch.present)
    assert batch.present[0, 2:].all()
    assert batch.present[1, :3].all()


PICTURES = (noise_image(60, 90), noise_image(96, 48, seed=1), noise_image(48, 48, seed=2))


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> TargetStore:
    """Targets of samples "0", "1" and "2", made from the first, second and third of `PICTURES`."""
    words = words_of("a red cat")
    maps = np.random.default_rng(0).random((len(words), 8, 8), dtype=np.float32)
    writer = TargetWriter(tmp_path_factory.mktemp("t") / "targets", {"model": "m", "weights": "w"}, StoreConfig(map_size=8))
    for n, picture in enumerate(PICTURES):
        writer.add(Target(str(n), image_sha256(picture), WordMaps("a red cat", words, maps)))
    writer.close()
    return TargetStore(writer.folder)


def three_pictures(sample_id: str, pictures=PICTURES) -> Conversation:
    """The first two come together, the third with the second question."""
    turns = (Message("user", "what is this ?"), Message("assistant", "a dog"), Message("user", "<image> is what ?"))
    # The first place is the first picture's: those without one come before it.
    return Conversation(sample_id, (pictures[2], *pictures[:2]), (*turns, Message("assistant", "a red cat")))


def test_a_cropped_target_has_the_students_places_in_its_part(tmp_path):
    """The target shows the lower right quarter: only the image tokens there have places, and they fill the map."""
    picture, words = noise_image(48, 48), words_of("a red cat")
    maps = WordMaps("a red cat", words, np.ones((3, 8, 8), np.float32), (0.5, 0.5, 1.0, 1.0))
    with TargetWriter(tmp_path / "t", {"model": "m", "weights": "w"}, StoreConfig(map_size=8)) as writer:
        writer.add(Target("x", image_sha256(picture), maps))
        writer.close()
    sample = Sample("x", picture, "what is this ?", "a red cat")
    own = collator_of("llava", "left", targets=TargetStore(tmp_path / "t"))([sample])["lavender_boxes"][0]
    whole = collator_of("llava", "left")([sample])["lavender_boxes"][0]
    inside = (whole[:, 2] > 0.5) & (whole[:, 3] > 0.5)
    assert 0 < inside.sum() < len(whole)
    assert torch.equal(~own.isnan().any(dim=1), inside)
    torch.testing.assert_close(own[inside], (2 * whole[inside] - 1).clamp(0, 1))


def seen_states(model: nn.Module, cross: bool, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the decoder's first layer reads before any token knows another, [B, T, C]; or the keys of the cross-attention."""
    found: list[torch.Tensor] = []

    def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    decoder = text_tower(model)
    layer = next(m for m in decoder.modules() if isinstance(m, nn.ModuleList))[0]
    handle = (attention_modules(decoder)[0].k_proj if cross else layer).register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad(), silenced(model):
        model(**without_lavender(batch), use_cache=False)
    handle.remove()
    return found[0].reshape(len(batch["input_ids"]), -1, found[0].shape[-1])


@pytest.mark.parametrize("name", sampled(SEVERAL))
def test_image_positions_and_boxes_are_those_of_the_targets_picture(name, targets):
    """Repaint the top left quarter of one picture after the other: image tokens of its sample move, where their boxes say so."""
    student = built(name)
    cross = student.family.cross
    collator = collator_of(name, "left", targets=targets)
    single = Sample("single", noise_image(60, 90), "what is this ?", "a red cat")
    batch = collator([*(three_pictures(str(n)) for n in range(3)), single])
    plain = seen_states(student.model, cross, batch)
    for n in range(3):
        painted = [picture.copy() for picture in PICTURES]
        ImageDraw.Draw(painted[n]).rectangle([0, 0, painted[n].width // 2 - 1, painted[n].height // 2 - 1], fill=(255, 0, 0))
        # Its fingerprint is another one, so that it cannot have targets: the positions are those of the plain batch.
        other = collator_of(name, "left")([three_pictures("x", painted)] * 3 + [single])
        change = (seen_states(student.model, cross, other) - plain).norm(dim=-1)
        words = words_of_batch(batch)
        is_token = words.image_positions[n] >= 0
        positions, boxes = words.image_positions[n][is_token], words.boxes[n][is_token]
        of_image = change[n, positions]
        elsewhere = change[n].clone()
        elsewhere[positions] = 0
        assert elsewhere.max() < 1e-4
        moved = of_image > 0.25 * of_image.max()
        assert of_image.max() > 1e-2
        placed = ~boxes.isnan().any(dim=1)
        assert (boxes[moved & placed][:, :2] < 0.51).all(), "a token moves whose box is elsewhere"
        inside = placed & (boxes[:, 2:] < 0.4).all(dim=1)
        assert moved[inside].all(), "a token does not move whose box was repainted"
        assert (~moved & placed).any()


@pytest.mark.parametrize("name", sampled(name for name in SEVERAL if built(name).family.num_images == (0, float("inf"))))
def test_a_sample_without_a_picture_has_no_image_positions_and_no_words(name):
    collator = collator_of(name, "left")
    text = Conversation("0", (), (Message("user", "what is red ?"), Message("assistant", "a cat")))
    batch = collator([text, SAMPLES[0], three_pictures("2")])
    assert (batch["lavender_columns"][0] == -1).all()
    assert batch["lavender_boxes"][0].isnan().all()
    assert batch["lavender_present"].any(dim=1).tolist() == [False, True, True]
    assert batch["lavender_outcomes"].tolist() == [2, 0, 0]
    assert collator.processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0]).split() == ["a", "cat"]
    model = built(name).model
    with torch.no_grad(), lavender.patch(model) as patch:
        maps = patch.capture("reads", **batch)
    sums = maps.sum(dim=(1, 2, 4, 5))
    assert (sums[0] == 0).all()
    assert (sums[1:][batch["lavender_present"][1:]] > 0).all()


@pytest.mark.parametrize("name", sorted({"paligemma", *ONE_PICTURE}))
def test_families_say_how_many_pictures_they_take(name):
    collator = collator_of(name, "left")
    text = Conversation("t", (), (Message("user", "what is red ?"), Message("assistant", "a cat")))
    expected = "1 or more" if name == "paligemma" else "exactly 1"
    with pytest.raises(DataError, match=f"sample 't' has 0 pictures; .* takes {expected}"):
        collator([text])
    if name in ONE_PICTURE:
        with pytest.raises(DataError, match=r"sample '2' has 3 pictures; .* takes exactly 1"):
            collator([three_pictures("2")])


def test_a_batch_without_pictures_is_refused_where_cross_attention_would_be_left_out(targets):
    text = Conversation("t", (), (Message("user", "what is red ?"), Message("assistant", "a cat")))
    with pytest.raises(DataError, match=r"'t': none of them has a picture.*put a sample with a picture into every batch"):
        collator_of("mllama", "left", targets=targets, on_error="raise")([text])


def test_where_text_sees_the_latest_picture_alone_the_words_of_another_are_absent(targets):
    """Mllama's text sees the latest picture up to the next: "a dog" the second of `three_pictures`, "a red cat" the third."""
    batch = collator_of("mllama", "right", targets=targets)([three_pictures(str(n)) for n in range(3)])
    assert batch["lavender_present"].any(dim=1).tolist() == [False, False, True]
    assert batch["lavender_outcomes"].tolist() == [2, 2, 0]
    model = copy.deepcopy(built("mllama").model)
    with torch.no_grad(), lavender.patch(model) as patch:
        maps = patch.capture("reads", **batch)
    sees = maps.sum(dim=(1, 2, 4, 5)) > 0
    assert sees.tolist() == [[False, False, False], [True, False, False], [False, True, True]]  # dog, red, cat


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", sampled(COLLATED))
def test_a_cut_batch_is_the_beginning_of_the_whole_one(name, side):
    """Token by token, whatever the processor says of them; the model reads it."""
    conversation = Conversation("0", (noise_image(60, 90),), turns_of("blip-2"))
    samples = [conversation, SAMPLES[1]]
    whole = collator_of(name, side, closes=True)(samples)
    lengths = whole["attention_mask"].sum(dim=1).tolist()
    cut = collator_of(name, side, closes=True, max_length=max(lengths) - 4)(samples)
    assert cut["input_ids"].shape[1] == max(lengths) - 4
    changed = [key for key in without_lavender(whole) if whole[key].shape[:2] == whole["input_ids"].shape]
    assert {"input_ids", "attention_mask", "labels"} <= {*changed}
    for b in range(2):
        before, after = whole["attention_mask"][b].bool(), cut["attention_mask"][b].bool()
        assert after.sum() == min(lengths[b], max(lengths) - 4)
        assert after[-1 if side == "left" else 0], "the padding has changed its side"
        for key in changed:
            assert torch.equal(cut[key][b][after], whole[key][b][before][: after.sum()]), key
        for field in ("image_positions", "tokens"):
            if field == "image_positions" and built(name).family.cross:
                continue
            positions = [getattr(words_of_batch(batch), field)[b] for batch in (whole, cut)]
            ids = [batch["input_ids"][b][at[at >= 0]] for batch, at in zip((whole, cut), positions, strict=True)]
            assert torch.equal(ids[0][: len(ids[1])], ids[1])
    # "blue </s>", the last answer of the longest sample, is cut off with "?" and "!"; "red cat" and "dog and cat" are left.
    longest = lengths.index(max(lengths))
    assert whole["lavender_present"][longest].tolist() == [True] * 5
    assert cut["lavender_present"][longest].tolist() == [True] * 4 + [False]
    assert cut["lavender_outcomes"][longest] == 0
    inputs = without_lavender(cut)
    with torch.no_grad():
        assert built(name).model(**inputs, use_cache=False).loss.isfinite()


@pytest.mark.parametrize("name", sampled(families()))
def test_every_processor_goes_with_its_own_model(name):
    require_pair(built(name).processor, built(name).model.config)


@pytest.mark.parametrize(
    ("processor", "model", "message"),
    [
        ("llava", "qwen2_vl", "LlavaProcessor is not the processor of a model of type 'qwen2_vl': it serves llava, vipllava"),
        ("qwen2_vl", "llava", "Qwen2VLProcessor is not the processor of a model of type 'llava'"),
        ("llava/pixtral", "llava", "PixtralProcessor is not the processor of a model of type 'llava'"),
        ("mllama", "gemma3", "MllamaProcessor is not"),
    ],
)
def test_another_models_processor_is_refused(processor, model, message):
    given = copy.deepcopy(built(processor).processor)
    given.chat_template = "{{ messages }}"
    with pytest.raises(ConfigError, match=message):
        Collator(given, model_config=built(model).model.config)


def test_a_model_with_another_image_token_is_refused():
    given = copy.deepcopy(built("llava").processor)
    given.chat_template = "{{ messages }}"
    config = copy.deepcopy(built("llava").model.config)
    config.image_token_id = given.tokenizer.convert_tokens_to_ids("cat")
    with pytest.raises(ConfigError, match=f"its image token has the id 4, and the model's, {config.image_token_id}, is none"):
        Collator(given, model_config=config)


@pytest.mark.parametrize("model_type", sorted(STUDENTS))
def test_families_travel_to_worker_processes(model_type):
    family = known_family(model_type)
    again = pickle.loads(pickle.dumps(family))
    assert again.boxes is family.boxes
    assert (again.resamplers is None) == (family.resamplers is None)


@pytest.mark.parametrize("name", ["llava", "idefics3", "internvl", "blip-2", "mllama", "gemma3"])
def test_a_pickled_collator_makes_the_same_batches(name, targets):
    collator = collator_of(name, "left", targets=targets, max_length=500)
    batch, again = collator(SAMPLES[1:]), pickle.loads(pickle.dumps(collator))(SAMPLES[1:])
    assert batch.keys() == again.keys()
    for key in batch:
        torch.testing.assert_close(again[key], batch[key], rtol=0, atol=0, equal_nan=True)
