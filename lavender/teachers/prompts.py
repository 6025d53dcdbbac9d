"""Which text tokens a diffusers pipeline's denoiser attends to: per pipeline, its tokenizers, templates and first columns."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from operator import attrgetter
from typing import Any

import torch

from ..errors import ModelError
from ..types import Span, Word
from ..words import locate_tokens, offsets_of_ids, tokens_of, words_of

Arguments = Mapping[str, Any]
"""Arguments of the pipeline's call, with its defaults."""
PlacedWords = tuple[str, list[Span | None]]
"""The text that a tokenizer gets, and where each word of the prompt stands in it."""


def place_words(words: Sequence[Word], prompt: str, text: str, before: str = "", after: str = "") -> PlacedWords:
    """The words of a prompt that a pipeline made into `text`, with a template around it."""
    spans = [(word.start, word.end) for word in words] if text == prompt else locate_words(words, text)
    return before + text + after, [span and (len(before) + span[0], len(before) + span[1]) for span in spans]


def locate_words(words: Sequence[Word], text: str) -> list[Span | None]:
    """Where words stand in a cleaned text, whatever their case: words that were changed have what stands in their place."""
    kept = words_of(text)
    spans: list[Span | None] = [None] * len(words)
    sought, found = ([word.text.casefold() for word in texts] for texts in (words, kept))
    for tag, start, end, first, last in SequenceMatcher(None, sought, found, autojunk=False).get_opcodes():
        for w in range(start, end):
            if tag == "equal":
                spans[w] = (kept[first + w - start].start, kept[first + w - start].end)
            elif tag == "replace":
                spans[w] = (kept[first].start, kept[last - 1].end)
    return spans


def _in_template(words: Sequence[Word], prompt: str, render: Callable[[str], str]) -> PlacedWords:
    before, _, after = render("\0").partition("\0")
    text = render(prompt)
    return place_words(words, prompt, text[len(before) : len(text) - len(after)], before, after)


def plain(pipe: Any, tokenizer: Any, prompt: str, words: Sequence[Word], arguments: Arguments) -> PlacedWords:
    return place_words(words, prompt, prompt)


def converted(pipe: Any, tokenizer: Any, prompt: str, words: Sequence[Word], arguments: Arguments) -> PlacedWords:
    """Concepts of textual inversion that have several vectors are written out: a word in their name has all of them."""
    if not hasattr(pipe, "maybe_convert_prompt"):
        return place_words(words, prompt, prompt)
    added = tokenizer.added_tokens_encoder
    concepts = [match.span() for name in added if f"{name}_1" in added for match in re.finditer(re.escape(name), prompt)]
    if not concepts:
        return place_words(words, prompt, prompt)
    spans: list[Span | None] = []
    for word in words:
        around = [(start, end) for start, end in concepts if start < word.end and word.start < end]
        start, end = max(around, key=lambda span: span[1] - span[0], default=(word.start, word.end))
        spans.append((len(_written_out(pipe, tokenizer, prompt[:start])), len(_written_out(pipe, tokenizer, prompt[:end]))))
    return _written_out(pipe, tokenizer, prompt), spans


def _written_out(pipe: Any, tokenizer: Any, text: str) -> str:
    return str(pipe.maybe_convert_prompt(text, tokenizer))


def preprocessed(pipe: Any, tokenizer: Any, prompt: str, words: Sequence[Word], arguments: Arguments) -> PlacedWords:
    """As a pipeline that has such a method makes its prompt lower case, or cleans it."""
    if not hasattr(pipe, "_text_preprocessing"):
        return place_words(words, prompt, prompt)
    text = str(pipe._text_preprocessing(prompt, clean_caption=arguments.get("clean_caption", False))[0])
    return place_words(words, prompt, text)


def _instructed(pipe: Any, tokenizer: Any, prompt: str, words: Sequence[Word], arguments: Arguments) -> PlacedWords:
    text, spans = preprocessed(pipe, tokenizer, prompt, words, arguments)
    before = _instruction(arguments)
    return before + text, [span and (len(before) + span[0], len(before) + span[1]) for span in spans]


def _instruction(arguments: Arguments) -> str:
    """What Sana's prompt follows."""
    return "\n".join(arguments.get("complex_human_instruction") or [])


def _instruction_tokens(pipe: Any, tokenizer: Any, arguments: Arguments) -> int:
    """Sana keeps the first token's column, and of the rest as many as make up the length without an instruction."""
    return len(tokenizer.encode(_instruction(arguments))) - 2 if arguments.get("complex_human_instruction") else 0


def cleaned(pipe: Any, tokenizer: Any, prompt: str, words: Sequence[Word], arguments: Arguments) -> PlacedWords:
    """As the function of this name in the pipeline's module cleans the prompt."""
    modules = [sys.modules.get(kind.__module__) for kind in type(pipe).__mro__]
    clean = next((vars(module)["prompt_clean"] for module in modules if module and hasattr(module, "prompt_clean")), str)
    return place_words(words, prompt, str(clean(prompt)))


def _introduced(pipe: Any, tokenizer: Any, prompt: str, words: Sequence[Word], arguments: Arguments) -> PlacedWords:
    system = arguments.get("system_prompt")
    return place_words(words, prompt, prompt, before=f"{pipe.system_prompt if system is None else system} <Prompt Start> ")


def _in_qwen_template(pipe: Any, tokenizer: Any, prompt: str, words: Sequence[Word], arguments: Arguments) -> PlacedWords:
    return _in_template(words, prompt, pipe.prompt_template_encode.format)


def _qwen_start(pipe: Any, tokenizer: Any, arguments: Arguments) -> int:
    return int(pipe.prompt_template_encode_start_idx)


def _in_hunyuan_template(pipe: Any, tokenizer: Any, prompt: str, words: Sequence[Word], arguments: Arguments) -> PlacedWords:
    template = arguments.get("prompt_template")
    return _in_template(words, prompt, template["template"].format) if template else place_words(words, prompt, prompt)


def _hunyuan_start(pipe: Any, tokenizer: Any, arguments: Arguments) -> int:
    template = arguments["prompt_template"]
    start = template.get("crop_start")
    # The pipeline's own rule: all but the end of the turn and the place of the prompt.
    return int(start) if start is not None else len(tokenizer(template["template"], padding="max_length").input_ids) - 2


def _in_mistral_chat(pipe: Any, tokenizer: Any, prompt: str, words: Sequence[Word], arguments: Arguments) -> PlacedWords:
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    if arguments.get("caption_upsample_temperature"):  # the text encoder writes another prompt
        return prompt, [None] * len(words)
    return _in_template(
        words, prompt, lambda text: str(pipe.tokenizer.apply_chat_template(format_input([text], pipe.system_message))[0])
    )


def _in_qwen3_chat(pipe: Any, tokenizer: Any, prompt: str, words: Sequence[Word], arguments: Arguments) -> PlacedWords:
    def render(text: str) -> str:
        messages = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False))

    return _in_template(words, prompt, render)


def _none_dropped(pipe: Any, tokenizer: Any, arguments: Arguments) -> int:
    return 0


@dataclass(frozen=True)
class Part:
    """One tokenizer's stretch of the text columns, padded on the tokenizer's own side.

    Attributes:
        tokenizer: the pipeline's attribute.
        prompts: the call's arguments that it reads: the first of them that is given.
        encoder: the attribute of its text encoder; without it the stretch is zeros.
        text: what is given to the tokenizer, from the pipeline, the tokenizer, the prompt, its words and the call's arguments.
        special: whether the tokenizer adds special tokens; a chat template has its own.
        dropped: how many of the first tokens' embeddings are dropped.
        after: the part that stands before this one, as an index into the pipeline's parts; None at the first column.
        fixed: whether the stretch is the tokenizer's `model_max_length`; else it goes on to the last column.
        longest: the call's argument that limits the tokens where the stretch may be longer.
        packed: whether the padding is taken out and zeros are put last.
    """

    tokenizer: str = "tokenizer"
    prompts: tuple[str, ...] = ("prompt",)
    encoder: str = "text_encoder"
    text: Callable[[Any, Any, str, Sequence[Word], Arguments], PlacedWords] = plain
    special: bool = True
    dropped: Callable[[Any, Any, Arguments], int] = _none_dropped
    after: int | None = None
    fixed: bool = False
    longest: str | None = None
    packed: bool = False


_CLIP = Part(text=converted, fixed=True)
_SECOND = Part(tokenizer="tokenizer_2", prompts=("prompt_2", "prompt"), encoder="text_encoder_2", text=converted)

PARTS: dict[str, tuple[Part, ...]] = {
    "StableDiffusion": (_CLIP,),
    "StableDiffusionXL": (_CLIP, replace(_SECOND, fixed=True)),
    "LatentConsistencyModel": (_CLIP,),
    "Kolors": (Part(),),
    "StableDiffusion3": (
        Part(fixed=True),
        Part(tokenizer="tokenizer_3", prompts=("prompt_3", "prompt"), encoder="text_encoder_3", after=0),
    ),
    "Flux": (_SECOND,),
    "Flux2": (Part(tokenizer="tokenizer.tokenizer", text=_in_mistral_chat, special=False),),
    "Flux2Klein": (Part(text=_in_qwen3_chat),),
    "Chroma": (Part(text=converted),),
    "QwenImage": (Part(text=_in_qwen_template, dropped=_qwen_start, packed=True),),
    "AuraFlow": (Part(),),
    "Lumina2": (Part(text=_introduced),),
    "CogView4": (Part(longest="max_sequence_length"),),
    "HunyuanVideo": (Part(text=_in_hunyuan_template, dropped=_hunyuan_start),),
    "PixArtAlpha": (Part(text=preprocessed),),
    "PixArtSigma": (Part(text=preprocessed),),
    "Sana": (Part(text=_instructed, dropped=_instruction_tokens),),
    "Wan": (Part(text=cleaned),),
    "LTX": (Part(),),
    # Pictures stand among these pipelines' text tokens, their prompt is made into text in another way, or comes first in the batch.
    "Flux2KleinKV": (),
    "HunyuanVideoImageToVideo": (),
    "LTXI2VLongMultiPrompt": (),
    "QwenImageEdit": (),
    "SanaWM": (),
    "StableDiffusionInstructPix2Pix": (),
    "StableDiffusionXLInstructPix2Pix": (),
    "WanImageToVideo": (),
}
"""First part of a pipeline's class name -> its text; `StableDiffusionXL` serves `StableDiffusionXLControlNetPipeline` too."""


def parts_of(pipe: Any) -> tuple[Part, ...]:
    """The text parts of a pipeline. Raises `ModelError` naming the known ones."""
    parts = known_parts(pipe)
    if not parts:
        raise ModelError(
            f"lavender does not know how {type(pipe).__name__} makes text columns of a prompt; it knows "
            f"{sorted(stem for stem, known_parts in PARTS.items() if known_parts)}. Give the words' weights yourself: "
            "patch.capture(word_weights)"
        )
    return parts


def known_parts(pipe: Any) -> tuple[Part, ...]:
    """The text parts of a pipeline, by its class or the first of those it inherits from that is known; none if none is."""
    for kind in type(pipe).__mro__:
        known = [stem for stem in PARTS if re.match(rf"{stem}(?![a-z0-9])", kind.__name__)]
        if known:
            return PARTS[max(known, key=len)]
    return ()


def word_weights(
    pipe: Any, prompts: Sequence[str], words: Sequence[Sequence[Word]], num_columns: int, arguments: Arguments
) -> tuple[torch.Tensor, list[list[Word]]]:
    """Each text column's share of each word, and the words that no column stands for.

    Args:
        pipe: a pipeline of diffusers.
        prompts: P prompts.
        words: words of each prompt.
        num_columns: N, the length of the prompt's embedding.
        arguments: of the pipeline's call, or of `encode_prompt`, with defaults.

    Returns:
        float32 [P, W, N], where a word's columns share 1 evenly (over the parts that have it, and in each over its tokens), zero
        for words beyond a tokenizer's window; and per prompt the words that are zero.
    """
    parts = parts_of(pipe)
    weights = torch.zeros(len(prompts), max(1, max(len(prompt_words) for prompt_words in words)), num_columns)
    missing: list[list[Word]] = []
    for p, (prompt, prompt_words) in enumerate(zip(prompts, words, strict=True)):
        for part in parts:
            for w, columns in enumerate(_columns(pipe, part, parts, prompt, prompt_words, num_columns, arguments, p)):
                if columns:
                    weights[p, w, columns] += 1 / len(columns)
        missing.append([word for w, word in enumerate(prompt_words) if not weights[p, w].any()])
    return weights / weights.sum(dim=2, keepdim=True).clamp_min(1), missing


def _columns(
    pipe: Any,
    part: Part,
    parts: Sequence[Part],
    prompt: str,
    words: Sequence[Word],
    num_columns: int,
    arguments: Arguments,
    index: int,
) -> list[list[int]]:
    """The text columns of every word in one tokenizer's stretch."""
    if getattr(pipe, part.encoder, None) is None or _prompt_of(part, arguments, index, prompt) != prompt:
        return [[] for _ in words]
    tokenizer = attrgetter(part.tokenizer)(pipe)
    first = 0 if part.after is None else attrgetter(parts[part.after].tokenizer)(pipe).model_max_length
    width = tokenizer.model_max_length if part.fixed else num_columns - first
    dropped = part.dropped(pipe, tokenizer, arguments)
    text, spans = part.text(pipe, tokenizer, prompt, words, arguments)
    length = width + dropped if part.longest is None else min(width, arguments[part.longest])
    offsets, decoded = _tokenize(tokenizer, text, length, part.special)
    if decoded != text:
        texts = words_of(text)
        moved = {word.start: span for word, span in zip(texts, locate_words(texts, decoded), strict=True)}
        text, spans = decoded, [span and moved.get(span[0]) for span in spans]
    padded_left = tokenizer.padding_side == "left" and not part.packed
    start = first + (width - len(offsets) if padded_left else -dropped)
    columns_of_words = []
    for span in spans:
        columns = [start + t for t in tokens_of(span, offsets, text)] if span is not None else []
        columns_of_words.append([c for c in columns if first <= c < first + width])
    return columns_of_words


def _prompt_of(part: Part, arguments: Arguments, index: int, prompt: str) -> str:
    """What this part's text encoder is given: a pipeline's second prompt may differ from the first, whose words are sought."""
    prompts = next((arguments[name] for name in part.prompts if arguments.get(name)), prompt)
    return prompts if isinstance(prompts, str) else prompts[index]


def _tokenize(tokenizer: Any, text: str, length: int, special: bool) -> tuple[list[Span], str]:
    """The characters of every token before padding, and the text that they are counted in."""
    settings: dict[str, Any] = {"truncation": True, "max_length": length}
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, **settings)
        return encoded.offset_mapping, text
    # A tokenizer without offsets: those of the whole text, decoded, where its tokens stand among the special ones.
    plain = tokenizer(text, add_special_tokens=False).input_ids
    ids = tokenizer(text, add_special_tokens=special, **settings).input_ids
    decoded, spans = offsets_of_ids(tokenizer.decode, plain)
    offsets: list[Span] = [(0, 0)] * len(ids)
    for place, span in zip(locate_tokens(plain, ids), spans, strict=True):
        if place >= 0:
            offsets[place] = span
    return offsets, decoded
