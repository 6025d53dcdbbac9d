"""Which token a text column comes from: real text encoders, pipelines that encode otherwise, and what belongs to no prompt.

The independent check: the text encoders' attention is silenced, so that a position sees its own token alone; then exactly the
columns of a token move where its row of the embedding matrix is changed.
"""

from __future__ import annotations

import copy
import pickle
import re
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import lavender
from lavender.config import TeacherConfig
from lavender.errors import CaptureError, DataError, ModelError
from lavender.teachers import alignment, tracing
from lavender.teachers.encoding import TextReader
from lavender.teachers.model import Teacher
from lavender.types import WordMaps
from lavender.words import words_of

from .explicit import SIDE, built, picture
from .pipeline_zoo import PIPELINES
from .test_pipelines import draw
from .test_prompts import Ids
from .tokenizers import byte_level

PROMPT = "a cat in a red hat"
WEIGHTED = "a (cat:1.3) in a red hat"


def silent(name: str, kind: type | None = None) -> Any:
    """A pipeline whose text encoders' tokens do not see each other."""
    pipe = PIPELINES[name]()
    pipe.__class__ = kind or type(pipe)
    with torch.no_grad():
        for encoder in encoders_of(pipe):
            for module_name, module in encoder.named_modules():
                if module_name.endswith(("self_attn.out_proj", "SelfAttention.o")):
                    for parameter in module.parameters():
                        parameter.zero_()
                elif module_name.endswith("final_layer_norm"):  # a new one gives states without a mean
                    for parameter in module.parameters():
                        parameter.uniform_(0.5, 1.5)
    return pipe


def encoders_of(pipe: Any) -> list[Any]:
    return [part for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if (part := getattr(pipe, name, None))]


def moving_columns(encoder: Any, tokenizer: Any, token: str, encode: Callable[[], torch.Tensor]) -> list[int]:
    """The columns that change with one token's row of an encoder's embedding matrix."""
    weight = encoder.get_input_embeddings().weight
    before = encode()
    row = weight[tokenizer.convert_tokens_to_ids(token)]
    with torch.no_grad():
        kept = row.clone()
        row += torch.linspace(-0.5, 1, len(row))
        after = encode()
        row.copy_(kept)
    return (before - after).abs().amax(dim=1).gt(1e-6).nonzero().flatten().tolist()


def columns(weights: torch.Tensor) -> list[int]:
    return weights.nonzero().flatten().tolist()


class LongPrompts(diffusers.StableDiffusionPipeline):
    """As community pipelines for long prompts: weights are taken out, chunks of the window are laid one after another."""

    def encode_prompt(self, prompt, device=None, num_images_per_prompt=1, do_classifier_free_guidance=False, *args, **kwargs):
        texts = [prompt] if isinstance(prompt, str) else prompt
        rows = [self._tokens(text) for text in [*texts, *[""] * len(texts)]]
        room = self.tokenizer.model_max_length - 2
        count = max(1, *(-(-len(ids) // room) for ids, _ in rows))
        embeddings = []
        for ids, weights in rows:
            end = self.tokenizer.eos_token_id
            ids, weights = ids + [end] * (count * room - len(ids)), weights + [1.0] * (count * room - len(weights))
            chunks = []
            for start in range(0, len(ids), room):
                chunk = torch.tensor([[self.tokenizer.bos_token_id, *ids[start : start + room], end]])
                scale = torch.tensor([1.0, *weights[start : start + room], 1.0])
                states = self.text_encoder(chunk)[0]
                weighted = states * scale[None, :, None]
                chunks.append(weighted * (states.mean() / weighted.mean()))
            embeddings.append(torch.cat(chunks, dim=1))
        both = torch.cat(embeddings)
        return both[: len(texts)], both[len(texts) :]

    def _tokens(self, text: str) -> tuple[list[int], list[float]]:
        ids, weights = [], []
        for plain, inside, weight in re.findall(r"([^()]+)|\(([^():]+)(?::([\d.]+))?\)", text):
            tokens = self.tokenizer(plain or inside, add_special_tokens=False).input_ids
            ids += tokens
            weights += [float(weight or 1.1) if inside else 1.0] * len(tokens)
        return ids, weights


class StableDiffusionLongPromptPipeline(LongPrompts):
    """One whose name begins as those of diffusers do."""


def read(pipe: Any, *args: Any, **kwargs: Any) -> tuple[Any, tuple[torch.Tensor, ...]]:
    with TextReader(pipe).reading() as texts, torch.no_grad():
        return texts, pipe.encode_prompt(*args, **kwargs)


@pytest.mark.parametrize("kind", [LongPrompts, StableDiffusionLongPromptPipeline])
@pytest.mark.parametrize("prompt", [WEIGHTED, f"{WEIGHTED} over (the:0.6) blue house (riding) two birds an astronaut"])
def test_weighted_words_of_long_prompts_are_at_the_columns_of_their_tokens(kind, prompt):
    pipe = silent("StableDiffusionPipeline", kind)
    texts, (embeddings, empty) = read(pipe, prompt, do_classifier_free_guidance=True)
    carried = texts.identify(embeddings[0], ["a bird", prompt])
    assert (carried.text, carried.index) == (prompt, 1)
    words = words_of(prompt)
    weights, missing = carried.weights(words)
    assert [word.text for word in missing] == [word.text for word in words if word.text[0].isdigit()]
    for w, word in enumerate(words):
        if word not in missing and [each.text for each in words].count(word.text) == 1:

            def encode() -> torch.Tensor:
                # Without the mean that couples all columns.
                return torch.nn.functional.normalize(pipe.encode_prompt(prompt)[0][0], dim=1)

            token = f"{word.text}</w>"
            assert columns(weights[w]) == moving_columns(pipe.text_encoder, pipe.tokenizer, token, encode), word
    assert texts.identify(empty[0], [prompt]) is None
    assert texts.identify(empty[0], [prompt, ""]).text == ""


def compel(pipe: Any, prompt: str, weights: dict[str, float]) -> torch.Tensor:
    """As Compel weighs: between the embedding of the empty prompt and the prompt's."""
    texts = pipe.tokenizer([prompt, ""], padding="max_length", return_tensors="pt").input_ids
    states, empty = pipe.text_encoder(texts[:1])[0], pipe.text_encoder(texts[1:])[0]
    scale = [weights.get(token, 1.0) for token in pipe.tokenizer.convert_ids_to_tokens(texts[0])]
    return (empty + (states - empty) * torch.tensor(scale)[None, :, None])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixes", [False, True])
def test_prompts_between_the_empty_one_and_themselves(mixes, dtype):
    pipe = PIPELINES["StableDiffusionPipeline"]() if mixes else silent("StableDiffusionPipeline")
    with TextReader(pipe).reading() as texts, torch.no_grad():
        embedding = compel(pipe, PROMPT, {"cat</w>": 1.4, "red</w>": 0.3}).to(dtype)
    weights, missing = texts.identify(embedding, [PROMPT]).weights(words_of(PROMPT))
    assert missing == []
    assert [columns(own) for own in weights] == [[1], [2], [3], [4], [5], [6]]
    if not mixes and dtype == torch.float32:
        with torch.no_grad():
            for w, token in ((1, "cat</w>"), (4, "red</w>"), (5, "hat</w>")):
                moving = moving_columns(
                    pipe.text_encoder, pipe.tokenizer, token, lambda: compel(pipe, PROMPT, {"cat</w>": 1.4, "red</w>": 0.3})
                )
                assert columns(weights[w]) == moving


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_encoders_side_by_side_weighted_towards_the_end_of_the_text(dtype):
    pipe = PIPELINES["StableDiffusionXLPipeline"]()
    with TextReader(pipe).reading() as texts, torch.no_grad():
        states = []
        for text in (PROMPT, ""):
            ids = [t(text, padding="max_length", return_tensors="pt").input_ids for t in (pipe.tokenizer, pipe.tokenizer_2)]
            both = zip((pipe.text_encoder, pipe.text_encoder_2), ids, strict=True)
            states.append(torch.cat([encoder(own, output_hidden_states=True).hidden_states[-2] for encoder, own in both], dim=2)[0])
    embedding = states[0].to(dtype)
    for column, weight in ((2, 1.4), (5, 0.6)):
        embedding[column] = embedding[-1] + (embedding[column] - embedding[-1]) * weight
    prompt = "a (cat:1.4) in a (red:0.6) hat"
    carried = texts.identify(embedding, [prompt])
    weights, missing = carried.weights(words_of(prompt))
    assert [word.text for word in missing] == ["1.4", "0.6"]
    assert [columns(own) for own in weights if own.any()] == [[1], [2], [3], [4], [5], [6]]


def test_a_blend_of_two_prompts_is_neither():
    pipe = PIPELINES["StableDiffusionPipeline"]()
    others = [PROMPT, "two birds over the blue house"]
    texts, (embeddings, _) = read(pipe, others, "cpu", 1, False)
    assert texts.identify(embeddings.mean(dim=0), others) is None
    assert texts.identify(torch.randn(16, embeddings.shape[2]), others) is None
    assert texts.identify(torch.zeros_like(embeddings[0]), others) is None
    assert texts.identify(embeddings[0] @ torch.randn(2 * (embeddings.shape[2],)), others) is None
    assert [texts.identify(embedding, others).index for embedding in embeddings] == [0, 1]


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline"])
@pytest.mark.parametrize("clip_skip", [None, 1])
def test_two_prompts_side_by_side_and_layers_skipped(name, clip_skip):
    pipe = silent(name)
    if clip_skip is not None and name == "StableDiffusionXLPipeline":
        clip_skip = 0  # of two layers
    second = "two red birds"

    def encode() -> torch.Tensor:
        return pipe.encode_prompt(
            prompt=PROMPT,
            prompt_2=second,
            device="cpu",
            do_classifier_free_guidance=False,
            clip_skip=clip_skip,
            **({"prompt_3": second} if name == "StableDiffusion3Pipeline" else {}),
        )[0][0]

    with TextReader(pipe).reading() as texts, torch.no_grad():
        embedding = encode()
    for text, encoder, tokenizer, token in [
        (PROMPT, pipe.text_encoder, pipe.tokenizer, "cat"),
        (PROMPT, pipe.text_encoder, pipe.tokenizer, "hat"),
        (second, pipe.text_encoder_2, pipe.tokenizer_2, "birds"),
        (second, pipe.text_encoder_2, pipe.tokenizer_2, "red"),
    ]:
        carried = texts.identify(embedding, [text])
        words = [word.text for word in words_of(text)]
        weights, missing = carried.weights(words_of(text))
        assert missing == []
        assert weights.sum(dim=1).tolist() == pytest.approx([1.0] * len(words))
        with torch.no_grad():
            moving = moving_columns(encoder, tokenizer, f"{token}</w>", encode)
        if name == "StableDiffusion3Pipeline" and text == second:  # T5 has it as well, with pieces of its own
            clip = [column for column in columns(weights[words.index(token)]) if column < 16]
            assert clip == moving
            assert weights[words.index(token), clip].sum() == pytest.approx(0.5)
        else:
            assert columns(weights[words.index(token)]) == moving
    assert texts.identify(embedding, ["a bird"]) is None


@pytest.mark.parametrize("without", [True, False])
def test_stable_diffusion_3_with_and_without_its_third_text_encoder(without):
    pipe = silent("StableDiffusion3Pipeline")
    if without:
        pipe.text_encoder_3 = None

    def encode() -> torch.Tensor:
        return pipe.encode_prompt(PROMPT, None, None, device="cpu", do_classifier_free_guidance=False)[0][0]

    with TextReader(pipe).reading() as texts, torch.no_grad():
        embedding = encode()
    weights, missing = texts.identify(embedding, [PROMPT]).weights(words_of(PROMPT))
    assert missing == []
    with torch.no_grad():
        expected = moving_columns(pipe.text_encoder, pipe.tokenizer, "red</w>", encode)
        if not without:
            expected += moving_columns(pipe.text_encoder_3, pipe.tokenizer_3, "▁red", encode)
    assert columns(weights[4]) == expected
    assert weights[4].sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("prompts", "equals"),
    [
        (["a cat", "A cat", "two birds"], [[0, 1], [0, 1], [2]]),
        ([" a  cat ", "a hat", "a cat"], [[0, 2], [1], [0, 2]]),
        (["two birds", "", " "], [[0], [1, 2], [1, 2]]),
        # Beyond the window of 16 tokens; the first of them fills it.
        (
            [PROMPT + " the" * 8, PROMPT + " the" * 8 + " red birds", PROMPT + " the" * 9, PROMPT + " the" * 7],
            [[0, 1, 2]] * 3 + [[3]],
        ),
        (["a cat", "a cat over", "cat", "a cat cat"], [[0], [1], [2], [3]]),
    ],
)
def test_prompts_that_are_made_into_the_same_tokens_are_all_named(prompts, equals):
    pipe = silent("StableDiffusionPipeline")
    texts, (embeddings, _) = read(pipe, prompts, "cpu", 1, False)
    ids = pipe.tokenizer(prompts, padding="max_length", truncation=True).input_ids
    for row, embedding in enumerate(embeddings):
        carried = texts.identify(embedding, prompts)
        assert [prompts.index(text) for text in carried.equals] == equals[row]
        assert equals[row] == [other for other, tokens in enumerate(ids) if tokens == ids[row]]
        for text in carried.equals:
            other = carried.as_text(text)
            assert (other.text, other.index, other.equals) == (text, prompts.index(text), carried.equals)
            weights, missing = other.weights(words_of(text))
            # Every word is a token, and 14 of them fit into the window.
            assert [columns(own) for own in weights if own.any()] == [[n + 1] for n in range(min(14, len(words_of(text))))]
            assert missing == list(words_of(text)[14:])
        with pytest.raises(KeyError):
            carried.as_text("a chair")


def test_prompts_of_one_encoders_tokens_that_another_tells_apart_are_not_equal():
    pipe = PIPELINES["StableDiffusion3Pipeline"]()  # CLIP has no capitals, T5 has
    prompts = ["a cat", "A cat", "a cat "]
    texts, (embeddings, *_) = read(pipe, prompts, None, None, device="cpu", do_classifier_free_guidance=False)
    assert [texts.identify(embedding, prompts).equals for embedding in embeddings] == [
        ("a cat", "a cat "),
        ("A cat",),
        ("a cat", "a cat "),
    ]


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline"])
def test_what_the_first_encoder_was_given_is_the_prompt_whatever_the_others_were(name):
    pipe = PIPELINES[name]()
    first, others = ["a cat", "two birds"], ["two birds", "a cat"]
    more = {"prompt_3": others} if name == "StableDiffusion3Pipeline" else {}
    texts, (embeddings, *_) = read(pipe, first, prompt_2=others, device="cpu", do_classifier_free_guidance=False, **more)
    assert [texts.identify(embedding, first).text for embedding in embeddings] == first
    assert [texts.identify(embedding, others).text for embedding in embeddings] == first


def test_the_work_grows_with_the_batch_and_not_with_its_square(monkeypatch):
    pipe, counts = PIPELINES["StableDiffusionXLPipeline"](), {}

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*args: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return function(*args)

        monkeypatch.setattr(module, name, call)

    for module, name in ((tracing, "_runs"), (tracing, "_keys"), (alignment, "_tokenize")):
        counted(module, name)
    work = []
    for size in (4, 8):
        prompts = [f"a cat in a red hat {'birds ' * n}" for n in range(size)]
        texts, (embeddings, *_) = read(pipe, prompts, device="cpu", do_classifier_free_guidance=False)
        counts.clear()
        assert [texts.identify(embedding, prompts).index for embedding in embeddings] == list(range(size))
        work.append(dict(counts))
    assert work[0]["_tokenize"] == 2 * 4  # each of the prompts, for each of the tokenizers
    assert all(work[1][name] <= 2 * work[0][name] for name in work[0])


class Nested(torch.nn.Module):
    """transformers 4 has CLIP's encoder inside the model, where diffusers looks for the last norm."""

    def __init__(self, text_model: torch.nn.Module) -> None:
        super().__init__()
        self.text_model, self.config, self.dtype = text_model, text_model.config, text_model.dtype

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any) -> Any:
        return self.text_model(input_ids=input_ids, attention_mask=attention_mask, **options)


def test_a_norm_that_the_pipeline_calls_after_it_skipped_a_layer():
    pipe = PIPELINES["StableDiffusionPipeline"]()
    pipe.text_encoder = Nested(pipe.text_encoder)
    texts, (embeddings, _) = read(pipe, PROMPT, "cpu", 1, False, clip_skip=1)
    weights, _ = texts.identify(embeddings[0], [PROMPT]).weights(words_of(PROMPT))
    assert [columns(own) for own in weights] == [[n + 1] for n in range(6)]


def test_concepts_of_one_and_several_vectors_and_tokens_that_are_no_words():
    pipe = silent("StableDiffusionPipeline")
    width = pipe.text_encoder.config.hidden_size
    pipe.load_textual_inversion({"<*>": torch.randn(3, width)}, token="<*>")
    pipe.load_textual_inversion({"<one>": torch.randn(1, width)}, token="<one>")
    prompt = "a <*> in <one> hat"

    def encode() -> torch.Tensor:
        return pipe.encode_prompt(prompt, "cpu", 1, False)[0][0]

    with TextReader(pipe).reading() as texts, torch.no_grad():
        embedding = encode()
    carried = texts.identify(embedding, [prompt])
    tokens = ["<*>", "<|startoftext|>", 7, "<one>", "<two>", 16, "<|endoftext|>"]
    weights, missing = carried.weights(words_of(prompt), tokens)
    assert missing == ["<two>", 16]
    with torch.no_grad():
        vectors = [moving_columns(pipe.text_encoder, pipe.tokenizer, token, encode) for token in ("<*>", "<*>_1", "<*>_2", "<one>")]
        hat = moving_columns(pipe.text_encoder, pipe.tokenizer, "hat</w>", encode)
    rows = [columns(own) for own in weights]
    assert rows[3] == hat
    assert rows[2] == rows[7] == vectors[3]
    assert rows[4] == sorted(vectors[0] + vectors[1] + vectors[2])
    assert rows[5:7] == [[0], [7]]
    assert rows[10] == [column for column, token in enumerate(carried.columns) if token == "<|endoftext|>"]
    assert carried.columns[1] == "a</w>"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("there the hat", {"the": [5], "he": []}),
        ("a scat in a cat hat", {"cat": [6], "at": []}),
        ("a sksa and a sks hat", {"sks": [7], "sksa": [2]}),
        ("an a hat", {"a": [2], "an": [1]}),
        ("a cat", {"at": [], "cat": [2], "a cat": [1, 2], "a c": []}),
        ("a<*>b <*> <**>", {"<*>": [2], "*": []}),
        ("a 7cat, cat7 cat", {"cat": [7], "7": [], "cat7": [5, 6], "7</w>": [2, 6]}),
        ("a cat's (red)", {"cat": [2], "(red)": [5, 6, 7], "red)": [6, 7]}),
        ("e\u0301 e hat", {"e": [3]}),
    ],
)
def test_a_token_that_stands_in_the_text_is_no_part_of_another_word(prompt, expected):
    pipe = PIPELINES["StableDiffusionPipeline"]()
    pipe.tokenizer.add_tokens(["sks", "sksa", "<*>", "<**>"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    texts, (embeddings, _) = read(pipe, prompt, "cpu", 1, False)
    weights, missing = texts.identify(embeddings[0], [prompt]).weights((), list(expected))
    assert {token: columns(own) for token, own in zip(expected, weights, strict=True)} == expected
    assert missing == [token for token, found in expected.items() if not found]


@pytest.mark.parametrize("preset", [None, "daam"])
def test_a_words_map_is_the_same_with_a_token_of_that_name(preset):
    pipe = PIPELINES["StableDiffusionPipeline"]()
    prompt, found = "there the Hat the hat", []
    for tokens in ((), ("the", "hat", "the Hat", "the</w>", "e")):
        with lavender.patch(pipe, preset=preset, tokens=tokens) as lens:
            pipe(prompt, num_inference_steps=2, height=24, width=24, output_type="np", generator=torch.Generator().manual_seed(0))
            found.append(lens.maps)
    plain, maps = found
    for word in ("the", "hat", "Hat", "the Hat"):
        assert torch.equal(maps[word].values, plain[word].values)
        assert maps[word].word == plain[word].word
    assert torch.equal(maps.heat_map("the", occurrence=1).values, plain.heat_map("the", occurrence=1).values)
    both = (plain.heat_map("the", occurrence=0).values + plain.heat_map("the", occurrence=1).values) / 2
    torch.testing.assert_close(maps["the</w>"].values, both)
    assert "e" in maps  # a token's string
    assert "e" not in plain


def chat(template: str) -> tuple[Any, Callable[[str], torch.Tensor]]:
    """A pipeline that nobody wrote a table for, and how it encodes."""
    pipe = SimpleNamespace(prompt_template=template, tokenizer=byte_level(), text_encoder=Ids())

    def encode(text: str) -> torch.Tensor:
        ids = pipe.tokenizer(template.format(text), padding="max_length", max_length=64, return_tensors="pt").input_ids
        return pipe.text_encoder(ids).last_hidden_state[0]

    return pipe, encode


def test_a_template_that_nobody_wrote_down_is_read_and_a_prompt_that_stands_in_it_is_refused():
    pipe, encode = chat("<|im_start|>user\nDraw a cat: {}<|im_end|>\n<|im_start|>assistant\n")
    with TextReader(pipe).reading() as texts:
        embedding, twice, other = encode("two birds"), encode("a cat"), encode("a hat")
    weights, _ = texts.identify(embedding, ["two birds"]).weights(words_of("two birds"))
    tokens = pipe.tokenizer.convert_ids_to_tokens(embedding[:, 0].long().tolist())
    spelled = ["".join(tokens[c] for c in columns(own)).strip("Ġ") for own in weights]
    assert spelled == ["two", "birds"]
    with pytest.raises(CaptureError, match=r"'a cat' stands several times.*capture\(word_weights\)"):
        texts.identify(twice, ["a cat"])
    # Words that are no part of the template belong to another prompt.
    assert texts.identify(other, ["a"]) is None
    assert texts.identify(embedding, ["two", "birds"]) is None
    pipe.prompt_template = ""
    assert texts.identify(embedding, ["two birds"]) is None


def test_a_text_of_which_the_template_alone_reaches_the_denoiser_is_not_carried():
    pipe, encode = chat("<|im_start|>user\nDraw this: {}<|im_end|>\n")
    with TextReader(pipe).reading() as texts:
        embedding = encode("a red hat")
    words = len(pipe.tokenizer("<|im_start|>user\nDraw this:").input_ids)
    assert texts.identify(embedding[:words], ["a red hat"]) is None
    cut = texts.identify(embedding[words:], ["a red hat"])
    assert cut.weights(words_of("a red hat"))[1] == []


@pytest.mark.parametrize("kind", [LongPrompts, StableDiffusionLongPromptPipeline])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_a_patched_pipeline_with_weighted_prompts_has_the_maps_of_the_plain_words(kind, guidance_scale):
    def maps(pipe: Any, prompt: str) -> lavender.maps.Maps:
        with lavender.patch(pipe) as lens:
            draw(pipe, "StableDiffusionPipeline", prompt=prompt, guidance_scale=guidance_scale)
            return lens.maps

    plain = maps(PIPELINES["StableDiffusionPipeline"](), PROMPT)
    pipe = PIPELINES["StableDiffusionPipeline"]()
    pipe.__class__ = kind
    weighted = maps(pipe, WEIGHTED.replace("1.3", "1.0"))
    assert list(weighted) == list(plain)
    assert [word.text for word in weighted.missing] == ["1.0"]
    for word in plain:
        torch.testing.assert_close(weighted[word].values, plain[word].values, rtol=1e-5, atol=1e-7)


def test_a_prompt_that_is_written_anew_is_another():
    pipe = PIPELINES["StableDiffusionPipeline"]()
    texts, (embeddings, _) = read(pipe, "a cat in a blue hat", "cpu", 1, False)
    for other in (
        PROMPT,
        "a cat",
        "cat in a blue hat",
        "a cat in a blue hat over",
        "a cat in a (blue:1.3) house",
        "a cat, in a blue hat over",
    ):
        assert texts.identify(embeddings[0], [other]) is None
    assert texts.identify(embeddings[0], ["a cat in (a blue:1.2) hat"]).text == "a cat in (a blue:1.2) hat"
    assert texts.received == ["a cat in a blue hat"]


def test_forwards_of_callbacks_and_of_other_threads_are_kept_apart():
    pipe = PIPELINES["StableDiffusionPipeline"]()
    pipe.text_encoder_2 = pipe.text_encoder  # a part that has two names
    results = {}
    with TextReader(pipe).reading() as outer:
        own = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0][0]
        with TextReader(pipe).reading() as inner:
            callback = pipe.encode_prompt("two birds", "cpu", 1, False)[0][0]

        def elsewhere() -> None:
            results["other"] = pipe.encode_prompt("the blue house", "cpu", 1, False)[0][0]

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        twin = copy.deepcopy(pipe.text_encoder)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.text_encoder.modules())
    pickle.dumps(pipe.text_encoder)
    assert len(twin.state_dict()) == len(pipe.text_encoder.state_dict())
    candidates = [PROMPT, "two birds", "the blue house"]
    assert outer.identify(own, candidates).text == PROMPT
    assert outer.identify(callback, candidates) is None
    assert outer.identify(results["other"], candidates) is None
    assert inner.identify(callback, candidates).text == "two birds"


@pytest.mark.parametrize("wrap", ["peft", "compiled", "compiled in place"])
def test_wrapped_text_encoders(wrap):
    pipe = PIPELINES["StableDiffusionPipeline"]()
    plain = pipe.text_encoder
    torch.compiler.reset()
    if wrap == "peft":
        pipe.text_encoder = get_peft_model(plain, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    elif wrap == "compiled":
        pipe.text_encoder = torch.compile(plain, backend="eager")
    else:
        plain.compile(backend="eager")
    ids = pipe.tokenizer([PROMPT], padding="max_length", return_tensors="pt").input_ids
    before = pipe.text_encoder(ids)[0]
    call = plain._compiled_call_impl
    with TextReader(pipe).reading() as texts:
        embedding = pipe.text_encoder(ids)[0][0]
    assert torch.equal(embedding, before[0])
    assert plain._compiled_call_impl is call
    weights, missing = texts.identify(embedding, [PROMPT]).weights(words_of(PROMPT))
    assert missing == []
    assert [columns(own) for own in weights] == [[n + 1] for n in range(6)]
    torch.compiler.reset()


NOISE = TeacherConfig(inversion="noise", timesteps=(151,), image_size=SIDE, map_size=4)


def with_class(kind: type) -> Any:
    pipe = built("sd")
    pipe.__class__ = kind
    return pipe


@pytest.mark.parametrize("kind", [LongPrompts, StableDiffusionLongPromptPipeline])
def test_a_teacher_that_encodes_otherwise_has_the_maps_of_its_own_columns(kind):
    plain, teacher = Teacher(built("sd"), NOISE), Teacher(with_class(kind), NOISE)
    expected = plain.word_maps(picture(0), PROMPT)
    read = teacher.word_maps(picture(0), WEIGHTED.replace("1.3", "1.0"))
    words = [word.text for word in read.words]
    assert words == ["a", "cat", "1.0", "in", "a", "red", "hat"]
    missing = np.isnan(read.maps).any(axis=(1, 2))
    assert missing.tolist() == [word == "1.0" for word in words]
    np.testing.assert_allclose(read.maps[~missing], expected.maps, rtol=0, atol=1e-6)
    lost = WordMaps("1.5", words_of("1.5"), np.full((1, 4, 4), np.nan, dtype=np.float32))
    with pytest.raises(DataError, match=r"no word of the caption '1\.5' is found"):
        teacher.require_finite(lost)


class Mixed(diffusers.StableDiffusionPipeline):
    """Its text goes through a connector, which mixes tokens."""

    def encode_prompt(self, *args, **kwargs):
        prompt, empty = super().encode_prompt(*args, **kwargs)
        return prompt.cumsum(dim=1), empty


def test_a_teacher_whose_columns_cannot_be_traced_is_refused_before_the_first_picture():
    with pytest.raises(ModelError, match=r"this Mixed cannot be traced.*\(red:1\.3\) cat"):
        Teacher(with_class(Mixed), NOISE)
