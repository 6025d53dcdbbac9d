"""Words of a prompt in a denoiser's text columns: every pipeline's own prompt encoding, with text encoders that repeat token ids.

The pipelines run their own `__call__` up to the encoded prompt, or `encode_prompt` alone, without a denoiser and without weights.
Where a word stands is read off the returned ids' letters, which needs no offsets and nothing of `lavender.families.prompts`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import T5Tokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from lavender.errors import ModelError
from lavender.teachers import prompts as tables
from lavender.teachers.encoding import TextReader
from lavender.teachers.prompts import PARTS, parts_of
from lavender.words import words_of

from .pipeline_zoo import clip_tokenizer
from .tokenizers import (
    QWEN_CHAT,
    SPECIAL,
    byte_level,
    chat_glm,
    mistral_processor,
    spaced,
    t5,
)


class Ids(nn.Module):
    """A text encoder whose every hidden state is the token ids, in channel 0."""

    def __init__(self, *, pooled: bool = False, sequence_first: bool = False) -> None:
        super().__init__()
        self.pooled, self.sequence_first = pooled, sequence_first
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.config = SimpleNamespace(use_attention_mask=False, projection_dim=4, hidden_size=4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> Any:
        states = torch.zeros(*input_ids.shape, 4)
        states[..., 0] = input_ids
        if self.sequence_first:
            states = states.transpose(0, 1)
        layers = (states,) * 31
        if self.pooled:
            return CLIPTextModelOutput(text_embeds=torch.zeros(len(input_ids), 4), last_hidden_state=states, hidden_states=layers)
        pooler = torch.zeros(len(input_ids), 4)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooler, hidden_states=layers)


DENOISER = SimpleNamespace(
    config=SimpleNamespace(
        sample_size=8, in_channels=4, patch_size=(1, 2, 2), time_cond_proj_dim=None, joint_attention_dim=4, guidance_embeds=True
    ),
    dtype=torch.float32,
)
"""What the pipelines' calls read of a denoiser before the prompt is encoded."""


class Encoded(Exception):
    """Raised when a pipeline has encoded its prompt, with what it got."""


def pipeline(name: str, **parts: Any) -> Any:
    """A pipeline of these parts and of nothing else."""
    # diffusers shows Kolors only where sentencepiece is installed.
    module = importlib.import_module("diffusers.pipelines.kolors.pipeline_kolors" if name.startswith("Kolors") else "diffusers")
    cls = getattr(module, name)
    required = [key for key, p in inspect.signature(cls.__init__).parameters.items() if p.default is p.empty and key != "self"]
    pipe = cls(**{**dict.fromkeys(required), **parts})
    setattr(pipe, "unet" if "unet" in required else "transformer", DENOISER)
    return pipe


def _arguments(function: Callable[..., Any], pipe: Any, options: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(function).bind(pipe, **options)
    bound.apply_defaults()
    return dict(bound.arguments)


def through_call(pipe: Any, prompts: Any, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """The prompts' embeddings as the pipeline's own call asks for them, and the call's arguments."""
    encode = pipe.encode_prompt

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Encoded(encode(*args, **kwargs)[0])

    pipe.encode_prompt = stop
    options = {"prompt": prompts, "height": 64, "width": 64, **options}
    if "use_resolution_binning" in inspect.signature(type(pipe).__call__).parameters:
        options["use_resolution_binning"] = False
    with pytest.raises(Encoded) as caught, TextReader(pipe).reading() as texts:
        pipe(**options)
    del pipe.encode_prompt
    pipe.read = texts, caught.value.args[0]
    return caught.value.args[0], _arguments(type(pipe).__call__, pipe, options)


def through_encode_prompt(pipe: Any, prompts: Any, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """The embeddings of prompts that a user encodes, and the arguments of that."""
    known = inspect.signature(type(pipe).encode_prompt).parameters
    required = {key: None for key, p in known.items() if p.default is p.empty and key != "self"}
    required |= {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    options = {**{key: value for key, value in required.items() if key in known}, "prompt": prompts, **options}
    with TextReader(pipe).reading() as texts:
        embeddings = pipe.encode_prompt(**options)[0]
    pipe.read = texts, embeddings
    return embeddings, _arguments(type(pipe).encode_prompt, pipe, options)


ROUTES = [through_call, through_encode_prompt]


def word_weights(pipe: Any, prompts: list[str], words: Any, num_columns: int, arguments: dict[str, Any]) -> Any:
    """By the tables, and the same read off the ids that the text encoders received."""
    weights, missing = tables.word_weights(pipe, prompts, words, num_columns, arguments)
    if hasattr(pipe, "read"):
        texts, embeddings = pipe.read
        for p, prompt in enumerate(prompts):
            carried = texts.identify(embeddings[p], prompts, arguments)
            if carried is None:  # another prompt alone reaches the embedding
                assert missing[p] == list(words[p])
                continue
            assert carried.text == prompt
            read, lacking = carried.weights(words[p])
            torch.testing.assert_close(read, weights[p, : len(read)], rtol=0, atol=0)
            assert lacking == missing[p]
    return weights, missing


def stable_diffusion(name: str = "StableDiffusionPipeline") -> Any:
    return pipeline(name, tokenizer=clip_tokenizer(), text_encoder=Ids(), requires_safety_checker=False)


def stable_diffusion_xl(**parts: Any) -> Any:
    tokenizers = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer()}
    encoders = {"text_encoder": Ids(pooled=True), "text_encoder_2": Ids(pooled=True)}
    return pipeline("StableDiffusionXLPipeline", **{**tokenizers, **encoders, **parts})


def stable_diffusion_3(**parts: Any) -> Any:
    tokenizers = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer(), "tokenizer_3": t5()}
    encoders = {"text_encoder": Ids(pooled=True), "text_encoder_2": Ids(pooled=True), "text_encoder_3": Ids()}
    return pipeline("StableDiffusion3Pipeline", **{**tokenizers, **encoders, **parts})


def flux() -> Any:
    return pipeline("FluxPipeline", tokenizer=clip_tokenizer(), text_encoder=Ids(), tokenizer_2=t5(), text_encoder_2=Ids())


def kolors() -> Any:
    return pipeline("KolorsPipeline", tokenizer=chat_glm(), text_encoder=Ids(sequence_first=True))


def one_tokenizer(name: str, make: Callable[[], Any] = t5) -> Any:
    return pipeline(name, tokenizer=make(), text_encoder=Ids())


def qwen_image() -> Any:
    pipe = one_tokenizer("QwenImagePipeline", byte_level)
    # 34 with Qwen's own vocabulary.
    pipe.prompt_template_encode_start_idx = len(pipe.tokenizer(pipe.prompt_template_encode.partition("{}")[0]).input_ids)
    return pipe


def hunyuan_video(**settings: Any) -> Any:
    tokenizer = byte_level("<|begin_of_text|>", **settings)
    parts = {"tokenizer": tokenizer, "text_encoder": Ids(), "tokenizer_2": clip_tokenizer(), "text_encoder_2": Ids()}
    return pipeline("HunyuanVideoPipeline", **parts)


def hunyuan_template(crop_start: int | None = None) -> dict[str, Any]:
    template = "<|start_header_id|>system<|end_header_id|>\n\nA cat in a hat:<|eot_id|>user\n\n{}<|eot_id|>"
    return {"template": template, "crop_start": crop_start}


@dataclass
class Case:
    """A pipeline, and options under which its window ends before `LONG` does."""

    build: Callable[[], Any]
    short: dict[str, Any] = field(default_factory=lambda: {"max_sequence_length": 24})
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "StableDiffusion": Case(stable_diffusion, short={}),
    "LatentConsistencyModel": Case(partial(stable_diffusion, "LatentConsistencyModelPipeline"), short={}),
    "StableDiffusionXL": Case(stable_diffusion_xl, short={}),
    "StableDiffusion3": Case(stable_diffusion_3),
    "Kolors": Case(kolors, short={}),
    "Flux": Case(flux),
    # A system message of about 110 letters comes first.
    "Flux2": Case(partial(one_tokenizer, "Flux2Pipeline", mistral_processor), short={"max_sequence_length": 200}),
    "Flux2Klein": Case(partial(one_tokenizer, "Flux2KleinPipeline", partial(byte_level, chat_template=QWEN_CHAT))),
    "Chroma": Case(partial(one_tokenizer, "ChromaPipeline")),
    "QwenImage": Case(qwen_image),
    "AuraFlow": Case(partial(one_tokenizer, "AuraFlowPipeline", partial(spaced, "<s>"))),
    "Lumina2": Case(partial(one_tokenizer, "Lumina2Pipeline", partial(spaced, "<s>")), short={"max_sequence_length": 160}),
    "CogView4": Case(
        partial(one_tokenizer, "CogView4Pipeline", partial(byte_level, "[gMASK]", "<sop>", side="left")),
        short={"max_sequence_length": 20},
    ),
    "HunyuanVideo": Case(hunyuan_video, options={"prompt_template": hunyuan_template(16)}),
    "PixArtAlpha": Case(partial(one_tokenizer, "PixArtAlphaPipeline")),
    "PixArtSigma": Case(partial(one_tokenizer, "PixArtSigmaPipeline")),
    "Sana": Case(partial(one_tokenizer, "SanaPipeline", partial(spaced, "<s>"))),
    "Wan": Case(partial(one_tokenizer, "WanPipeline")),
    "LTX": Case(partial(one_tokenizer, "LTXPipeline")),
}


def tokenizers_of(pipe: Any) -> list[tuple[Any, slice]]:
    """Tokenizer and columns of every stretch of the embeddings that stands for the prompt."""
    name = type(pipe).__name__
    if name == "StableDiffusionXLPipeline":
        return [(pipe.tokenizer or pipe.tokenizer_2, slice(None))]
    if name == "StableDiffusion3Pipeline":
        clip = pipe.tokenizer.model_max_length
        return [(pipe.tokenizer, slice(clip)), (pipe.tokenizer_3, slice(clip, None))]
    if name == "FluxPipeline":
        return [(pipe.tokenizer_2, slice(None))]
    if name == "Flux2Pipeline":
        return [(pipe.tokenizer.tokenizer, slice(None))]
    return [(pipe.tokenizer, slice(None))]


def letters_of(tokenizer: Any, ids: list[int]) -> list[tuple[str, set[int]]]:
    """Every letter that the tokens spell, with its tokens; white space is left out, a special token is a NUL."""
    special = {*SPECIAL, "<|startoftext|>", "<|endoftext|>", ""}
    found: list[tuple[str, set[int]]] = []
    space: set[int] = set()
    for place, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        spelled = "\0" if token in special else token.removesuffix("</w>").strip("▁ĠĊ\n")
        found += [(letter, {place} | space) for letter in spelled.casefold()]
        # T5 begins every word with "▁", which may be a token of its own; elsewhere it is the space in between.
        space = {place} if token == "▁" and isinstance(tokenizer, T5Tokenizer) else set()
    return found


def expected_columns(pipe: Any, own: str, row: torch.Tensor) -> list[list[set[int]]]:
    """Per word of the cleaned prompt `own`, per stretch: the columns whose ids spell it. row: an embedding [N, channels]."""
    found: list[list[set[int]]] = [[] for _ in words_of(own)]
    for tokenizer, columns in tokenizers_of(pipe):
        first = columns.start or 0
        letters = letters_of(tokenizer, row[columns, 0].long().tolist())
        text, sought = "".join(letter for letter, _ in letters), "".join(own.casefold().split())
        length = max(n for n in range(len(sought) + 1) if sought[:n] in text)
        assert length == 0 or text.count(sought[:length]) == 1, "the test needs a prompt that stands in the template only once"
        base = text.index(sought[:length])
        for word, stretches in zip(words_of(own), found, strict=True):
            start = len("".join(own[: word.start].split()))
            end = min(start + len(word.text), length)
            stretches.append({first + place for n in range(start, end) for place in letters[base + n][1]})
    return found


def check(pipe: Any, encoded: tuple[torch.Tensor, dict[str, Any]], prompts: list[str], owns: list[str] | None = None) -> list[int]:
    """Compares the weights of all words; `owns` are the cleaned prompts. Returns how many words each prompt lacks."""
    embeddings, arguments = encoded
    words = [words_of(prompt) for prompt in prompts]
    weights, missing = word_weights(pipe, prompts, words, embeddings.shape[1], arguments)
    assert weights.shape == (len(prompts), max(map(len, words)), embeddings.shape[1])
    for p, own in enumerate(owns or prompts):
        expected = expected_columns(pipe, own, embeddings[p])
        lacking = []
        for w, (word, stretches) in enumerate(zip(words[p], expected, strict=True)):
            wanted = torch.zeros(embeddings.shape[1])
            present = [sorted(columns) for columns in stretches if columns]
            for columns in present:
                wanted[columns] = 1 / len(columns) / len(present)
            torch.testing.assert_close(weights[p, w], wanted, msg=lambda m, word=word: f"{word}: {m}")
            lacking += [] if present else [word]
        assert missing[p] == lacking
        assert not weights[p, len(words[p]) :].any()
    return [len(own) for own in missing]


PROMPTS = ["a cat in a red hat", "an astronaut riding a zebra, over a hat"]


LONG = "a red hat" + " an astronaut riding" * 22


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=[through_call, through_encode_prompt])
def route(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_every_pipeline_that_is_known_has_a_case():
    assert {stem for stem, parts in PARTS.items() if parts} == set(CASES)


def test_words_stand_where_their_tokens_are(case, route):
    pipe = case.build()
    assert check(pipe, route(pipe, PROMPTS, **case.options), PROMPTS) == [0, 0]
    assert check(pipe, route(pipe, PROMPTS[1], **case.options), PROMPTS[1:]) == [0]


def test_words_beyond_the_window_are_missing_and_one_at_its_end_has_the_tokens_that_are_left(case, route):
    pipe = case.build()
    lacking, none = check(pipe, route(pipe, [LONG, PROMPTS[0]], **case.options, **case.short), [LONG, PROMPTS[0]])
    assert 0 < lacking < 69
    assert none == 0


def test_case_and_white_space_do_not_matter(case, route):
    pipe, prompts = case.build(), ["  A Cat in\n a RED  hat ", "Over THE house"]
    assert check(pipe, route(pipe, prompts, **case.options), prompts) == [0, 0]


def test_a_prompt_that_stands_in_the_template_too_is_found_in_its_own_place(case, route):
    pipe = case.build()
    for same, other in [("user", "vxyz"), ("sist", "vxyz"), ("NST", "XYZ"), ("d", "z"), ("s", "z")]:
        embeddings, arguments = route(pipe, [same, other], **case.options)
        weights, missing = word_weights(pipe, [same, other], [words_of(same), words_of(other)], embeddings.shape[1], arguments)
        changed = (embeddings[0] != embeddings[1]).any(-1)
        assert missing == [[], []]
        assert changed.any()
        for own in weights[:, 0]:
            assert own[changed].all()
            # What else may be there is T5's token before a word.
            assert own.count_nonzero() in (changed.sum(), changed.sum() + 1)


VARIANTS = {
    "StableDiffusionImg2ImgPipeline": "StableDiffusion",
    "ChromaImg2ImgPipeline": "Chroma",
    "CogView4ControlPipeline": "CogView4",
    "Flux2KleinInpaintPipeline": "Flux2Klein",
    "LTXConditionPipeline": "LTX",
    "LTXImageToVideoPipeline": "LTX",
    "QwenImageImg2ImgPipeline": "QwenImage",
    "SanaSprintPipeline": "Sana",
    "SanaVideoPipeline": "Sana",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_pipelines_of_a_family_encode_their_prompt_alike(name):
    template = CASES[VARIANTS[name]].build()
    pipe = pipeline(name, tokenizer=template.tokenizer, text_encoder=Ids())
    assert parts_of(pipe) is PARTS[VARIANTS[name]]
    assert check(pipe, through_encode_prompt(pipe, PROMPTS), PROMPTS) == [0, 0]


@pytest.mark.parametrize(
    "name",
    ["QwenImageEditPlusPipeline", "HunyuanVideoImageToVideoPipeline", "SanaWMPipeline", "HunyuanVideo15Pipeline", "LTX2Pipeline"],
)
def test_pipelines_that_encode_their_prompt_otherwise_are_refused(name):
    with pytest.raises(ModelError, match=rf"{name}.*'Flux2'"):
        parts_of(type(name, (), {})())


@pytest.mark.parametrize("instruction", [None, [], ["Enhance a cat in", "a red hat: "], ["a"]])
def test_sana_with_and_without_an_instruction(instruction, route):
    pipe = CASES["Sana"].build()
    for length in (24, 64):
        encoded = route(pipe, [LONG, PROMPTS[0]], complex_human_instruction=instruction, max_sequence_length=length)
        assert encoded[0].shape[1] == length
        lacking, none = check(pipe, encoded, [LONG, PROMPTS[0]])
        assert lacking
        assert none == 0


def test_hunyuan_video_counts_its_template_where_no_start_is_given(route):
    # Without a longest text nothing is padded to it.
    pipe = hunyuan_video(model_max_length=10**30)
    assert check(pipe, route(pipe, PROMPTS, prompt_template=hunyuan_template()), PROMPTS) == [0, 0]
    pipe = CASES["HunyuanVideo"].build()
    # The pipeline's own template and start, which stands amid the template in this vocabulary.
    assert check(pipe, route(pipe, PROMPTS, max_sequence_length=512), PROMPTS) == [0, 0]


def test_hunyuan_video_drops_the_prompt_where_its_template_is_padded(route):
    pipe = hunyuan_video()  # up to 512 tokens
    embeddings, arguments = route(pipe, PROMPTS, prompt_template=hunyuan_template())
    weights, missing = word_weights(pipe, PROMPTS, [words_of(p) for p in PROMPTS], embeddings.shape[1], arguments)
    assert not weights.any()
    assert [len(own) for own in missing] == [6, 8]


def test_hunyuan_video_pads_on_the_tokenizers_side(route):
    pipe = hunyuan_video(side="left")
    assert check(pipe, route(pipe, PROMPTS, prompt_template=hunyuan_template(16)), PROMPTS) == [0, 0]


@pytest.mark.parametrize("system", ["", "A cat in a hat and:", None])
def test_lumina_2_with_another_system_prompt(system, route):
    pipe = CASES["Lumina2"].build()
    assert check(pipe, route(pipe, PROMPTS, system_prompt=system), PROMPTS) == [0, 0]


def test_qwen_image_keeps_a_part_of_its_template_with_another_start(route):
    pipe = qwen_image()
    pipe.prompt_template_encode_start_idx = 34
    assert check(pipe, route(pipe, PROMPTS), PROMPTS) == [0, 0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["AuraFlow", "QwenImage", "Flux2Klein"])
def test_padding_is_on_the_tokenizers_side(name, side, route):
    pipe = CASES[name].build()
    pipe.tokenizer.padding_side = side
    assert check(pipe, route(pipe, PROMPTS), PROMPTS) == [0, 0]


def test_stable_diffusion_3_without_its_third_text_encoder(route):
    pipe = stable_diffusion_3(text_encoder_3=None)
    embeddings, arguments = route(pipe, PROMPTS, max_sequence_length=24)
    assert embeddings.shape[1] == 16 + 24
    weights, missing = word_weights(pipe, PROMPTS, [words_of(p) for p in PROMPTS], 40, arguments)
    assert not weights[:, :, 16:].any()
    assert check(pipe, (embeddings, arguments), PROMPTS) == [0, 0]
    assert missing == [[], []]


@pytest.mark.parametrize("build", [stable_diffusion_3, flux, stable_diffusion_xl])
def test_words_are_sought_only_where_their_own_prompt_is_read(build, route):
    pipe = build()
    name = "prompt_3" if build is stable_diffusion_3 else "prompt_2"
    others = ["a green chair", PROMPTS[1]]
    assert check(pipe, route(pipe, PROMPTS, **{name: PROMPTS}), PROMPTS) == [0, 0]
    assert check(pipe, route(pipe, PROMPTS[0], **{name: ""}), PROMPTS[:1]) == [0]  # as if it were not given
    embeddings, arguments = route(pipe, PROMPTS, **{name: others})
    weights, missing = word_weights(pipe, PROMPTS, [words_of(p) for p in PROMPTS], embeddings.shape[1], arguments)
    assert [len(own) for own in missing] == ([6, 0] if build is flux else [0, 0])
    if build is stable_diffusion_3:
        assert not weights[0, :, 16:].any()
        assert weights[1, :, 16:].any()


def test_a_refiner_of_stable_diffusion_xl_has_the_second_text_encoder_alone(route):
    pipe = stable_diffusion_xl(tokenizer=None, text_encoder=None)
    assert check(pipe, route(pipe, PROMPTS), PROMPTS) == [0, 0]


@pytest.mark.parametrize(
    ("build", "name"), [(stable_diffusion, "tokenizer"), (flux, "tokenizer_2"), (stable_diffusion_xl, "tokenizer")]
)
def test_a_concept_of_several_vectors_has_all_their_columns(build, name, route):
    pipe = build()
    vectors = ["<new_toy>", "<new_toy>_1", "<new_toy>_2"]
    for tokenizer in {"tokenizer", "tokenizer_2"} & set(pipe.components):
        getattr(pipe, tokenizer).add_tokens([*vectors, "<one>"])
    tokenizer = getattr(pipe, name)
    prompt = "a <new_toy> 1 <one> hat <new_toy>"
    embeddings, arguments = route(pipe, prompt)
    weights, missing = word_weights(pipe, [prompt], [words_of(prompt)], embeddings.shape[1], arguments)
    assert missing == [[]]
    row = embeddings[0, :, 0].long().tolist()
    tokens = tokenizer.convert_ids_to_tokens(row)
    first, last = (n for n, token in enumerate(tokens) if token == vectors[0])
    found = {word.start: weights[0, w].nonzero().flatten().tolist() for w, word in enumerate(words_of(prompt))}
    named = {start: [tokens[c] for c in columns if tokens[c] != "▁"] for start, columns in found.items()}
    a, new, toy, one, single, hat, new_again, toy_again = named
    assert named[new] == named[toy] == named[new_again] == named[toy_again] == vectors
    assert named[single] == ["<one>"]
    assert "".join(named[one]).strip("▁").removesuffix("</w>") == "1"
    assert "".join(named[hat]).strip("▁").removesuffix("</w>") == "hat"
    assert found[new][0] == first
    assert found[new_again][0] == last
    assert max(found[new]) < min(found[one]) < min(found[hat]) < last
    assert max(found[a]) < first


def test_what_wan_cleans_is_found_under_its_new_letters(route):
    pipe = CASES["Wan"].build()
    prompt, own = "  a   cat &amp; a caf&eacute; hat ", "a cat & a café hat"
    embeddings, arguments = route(pipe, prompt)
    words = words_of(prompt)
    weights, missing = word_weights(pipe, [prompt], [words], embeddings.shape[1], arguments)
    a, cat, again, cafe, hat = (columns for (columns,) in expected_columns(pipe, own, embeddings[0]))
    expected = [a, cat, set(), again, cafe, cafe, hat]
    assert [word.text for word in words] == ["a", "cat", "amp", "a", "caf", "eacute", "hat"]
    assert [set(own.nonzero().flatten().tolist()) for own in weights[0]] == expected
    assert [word.text for word in missing[0]] == ["amp"]


def test_flux_2_takes_the_mark_of_a_picture_out_of_its_prompt(route):
    pipe = CASES["Flux2"].build()
    prompt = "a cat [IMG] in a hat [IMG]"
    embeddings, arguments = route(pipe, prompt)
    weights, missing = word_weights(pipe, [prompt], [words_of(prompt)], embeddings.shape[1], arguments)
    a, cat, inside, again, hat = (columns for (columns,) in expected_columns(pipe, "a cat  in a hat ", embeddings[0]))
    assert [set(own.nonzero().flatten().tolist()) for own in weights[0]] == [a, cat, set(), inside, again, hat, set()]
    assert [word.text for word in missing[0]] == ["IMG", "IMG"]


def test_flux_2_writes_another_prompt_whose_words_are_not_known():
    pipe = CASES["Flux2"].build()
    arguments = _arguments(type(pipe).__call__, pipe, {"prompt": PROMPTS, "caption_upsample_temperature": 0.15})
    weights, missing = word_weights(pipe, PROMPTS, [words_of(p) for p in PROMPTS], 512, arguments)
    assert not weights.any()
    assert [len(own) for own in missing] == [6, 8]
