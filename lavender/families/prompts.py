"""Which text tokens a diffusers pipeline's denoiser attends to: per pipeline, its tokenizers, templates and first columns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ModelError
from ..types import Span, Word
from ..words import offsets_of_ids, tokens_of

Arguments = Mapping[str, Any]
"""Arguments of the pipeline's call, with its defaults."""


def _plain(pipe: Any, text: str, arguments: Arguments) -> str:
    return text


def _converted(pipe: Any, text: str, arguments: Arguments) -> str:
    """CLIP's pipelines write out the tokens that textual inversion added."""
    return str(pipe.maybe_convert_prompt(text, pipe.tokenizer)) if hasattr(pipe, "maybe_convert_prompt") else text


def _preprocessed(pipe: Any, text: str, arguments: Arguments) -> str:
    return str(pipe._text_preprocessing(text, clean_caption=arguments.get("clean_caption", False))[0])


def _instructed(pipe: Any, text: str, arguments: Arguments) -> str:
    """Sana's prompt follows an instruction."""
    return "\n".join(arguments.get("complex_human_instruction") or []) + _preprocessed(pipe, text, arguments)


def _instruction_tokens(pipe: Any, arguments: Arguments) -> int:
    """Of an instruction's tokens Sana keeps two columns' worth: the first token, and what makes up the length."""
    instruction = "\n".join(arguments.get("complex_human_instruction") or [])
    return len(pipe.tokenizer.encode(instruction)) - 2 if instruction else 0


def _cleaned(pipe: Any, text: str, arguments: Arguments) -> str:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return str(prompt_clean(text))


def _introduced(pipe: Any, text: str, arguments: Arguments) -> str:
    return f"{arguments.get('system_prompt') or pipe.system_prompt} <Prompt Start> {text}"


def _in_qwen_template(pipe: Any, text: str, arguments: Arguments) -> str:
    return str(pipe.prompt_template_encode.format(text))


def _qwen_start(pipe: Any, arguments: Arguments) -> int:
    return int(pipe.prompt_template_encode_start_idx)


def _hunyuan_template(arguments: Arguments) -> Mapping[str, Any]:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    return arguments.get("prompt_template") or DEFAULT_PROMPT_TEMPLATE


def _in_hunyuan_template(pipe: Any, text: str, arguments: Arguments) -> str:
    return str(_hunyuan_template(arguments)["template"].format(text))


def _hunyuan_start(pipe: Any, arguments: Arguments) -> int:
    template = _hunyuan_template(arguments)
    start = template.get("crop_start")
    # The pipeline's own rule: all but the end of the turn and the place of the prompt.
    return int(start) if start is not None else len(pipe.tokenizer(template["template"], padding="max_length").input_ids) - 2


def _none_dropped(pipe: Any, arguments: Arguments) -> int:
    return 0


@dataclass(frozen=True)
class Part:
    """One tokenizer's stretch of the text columns.

    Attributes:
        tokenizer: the pipeline's attribute.
        prompts: the call's arguments that it reads: the first of them that is given.
        encoder: the attribute of its text encoder; without it the stretch is zeros.
        text: what is given to the tokenizer, from the pipeline, the prompt and the call's arguments.
        dropped: how many of the first tokens' embeddings are dropped.
        after: the part that stands before this one, as an index into the pipeline's parts; None at the first column.
        left: whether padding comes first.
        fixed: whether the stretch is the tokenizer's `model_max_length`; else it goes on to the last column.
    """

    tokenizer: str = "tokenizer"
    prompts: tuple[str, ...] = ("prompt",)
    encoder: str = "text_encoder"
    text: Callable[[Any, str, Arguments], str] = _plain
    dropped: Callable[[Any, Arguments], int] = _none_dropped
    after: int | None = None
    left: bool = False
    fixed: bool = False


_CLIP = Part(text=_converted, fixed=True)
_T5 = Part(tokenizer="tokenizer_2", prompts=("prompt_2", "prompt"), encoder="text_encoder_2")

PARTS: dict[str, tuple[Part, ...]] = {
    "StableDiffusion": (_CLIP,),
    "StableDiffusionXL": (_CLIP,),
    "LatentConsistencyModel": (_CLIP,),
    "Kolors": (Part(left=True),),
    "StableDiffusion3": (
        _CLIP,
        Part(tokenizer="tokenizer_3", prompts=("prompt_3", "prompt"), encoder="text_encoder_3", after=0),
    ),
    "Flux": (_T5,),
    "Chroma": (Part(),),
    "QwenImage": (Part(text=_in_qwen_template, dropped=_qwen_start),),
    "AuraFlow": (Part(),),
    "Lumina2": (Part(text=_introduced),),
    "CogView4": (Part(left=True),),
    "HunyuanVideo": (Part(text=_in_hunyuan_template, dropped=_hunyuan_start),),
    "PixArtAlpha": (Part(text=_preprocessed),),
    "PixArtSigma": (Part(text=_preprocessed),),
    "Sana": (Part(text=_instructed, dropped=_instruction_tokens),),
    "Wan": (Part(text=_cleaned),),
    "LTX": (Part(),),
}
"""First part of a pipeline's class name -> its text; `StableDiffusionXL` serves `StableDiffusionXLControlNetPipeline` too."""


def parts_of(pipe: Any) -> tuple[Part, ...]:
    """The text parts of a pipeline. Raises `ModelError` naming the known ones."""
    name = type(pipe).__name__
    known = [stem for stem in PARTS if re.match(rf"{stem}(?![a-z0-9])", name)]
    if not known:
        raise ModelError(
            f"lavender does not know how {name} makes text columns of a prompt; it knows {sorted(PARTS)}. Give the words' weights "
            "yourself: patch.capture(word_weights)"
        )
    return PARTS[max(known, key=len)]


def word_weights(
    pipe: Any, prompts: Sequence[str], words: Sequence[Sequence[Word]], num_columns: int, arguments: Arguments
) -> tuple[torch.Tensor, list[list[Word]]]:
    """Each text column's share of each word, and the words that no column stands for.

    Args:
        pipe: a pipeline of diffusers.
        prompts: P prompts.
        words: words of each prompt.
        num_columns: N, the length of the prompt's embedding.
        arguments: of the pipeline's call, with defaults.

    Returns:
        float32 [P, W, N], where a word's columns share 1 evenly (over the parts that have it, and in each over its tokens), zero
        for words beyond a tokenizer's window; and per prompt the words that are zero.
    """
    parts = parts_of(pipe)
    weights = torch.zeros(len(prompts), max(1, max(len(own) for own in words)), num_columns)
    missing: list[list[Word]] = []
    for p, (prompt, own) in enumerate(zip(prompts, words, strict=True)):
        for part in parts:
            for w, columns in enumerate(_columns(pipe, part, parts, prompt, own, num_columns, arguments, p)):
                if columns:
                    weights[p, w, columns] += 1 / len(columns)
        missing.append([word for w, word in enumerate(own) if not weights[p, w].any()])
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
    nothing: list[list[int]] = [[] for _ in words]
    if getattr(pipe, part.encoder, None) is None or _own_prompt(part, arguments, index, prompt) != prompt:
        return nothing
    tokenizer = getattr(pipe, part.tokenizer)
    first = 0 if part.after is None else getattr(pipe, parts[part.after].tokenizer).model_max_length
    width = tokenizer.model_max_length if part.fixed else num_columns - first
    dropped = part.dropped(pipe, arguments)
    text = part.text(pipe, prompt, arguments)
    tokens, text, offsets = _tokenized(tokenizer, text, width + dropped)
    start = first + (width - len(tokens) if part.left else -dropped)
    found = []
    for span in _spans(words, prompt, text):
        columns = [start + t for t in tokens_of(span, offsets, text)] if span is not None else []
        found.append([c for c in columns if first <= c < first + width])
    return found


def _own_prompt(part: Part, arguments: Arguments, index: int, prompt: str) -> str:
    """What this part's text encoder is given: a pipeline's second prompt may differ from the first, whose words are sought."""
    given = next((arguments[name] for name in part.prompts if arguments.get(name) is not None), prompt)
    return given if isinstance(given, str) else given[index]


def _tokenized(tokenizer: Any, text: str, length: int) -> tuple[list[int], str, list[Span]]:
    """Tokens without padding, the text that their characters are counted in, and those characters."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, truncation=True, max_length=length, return_offsets_mapping=True)
        return encoded.input_ids, text, encoded.offset_mapping
    ids = tokenizer(text, truncation=True, max_length=length).input_ids
    decoded, offsets = offsets_of_ids(tokenizer.decode, ids)
    return ids, decoded, offsets


def _spans(words: Sequence[Word], prompt: str, text: str) -> list[Span | None]:
    """Where the prompt's words stand in what the tokenizer was given: a template around it, or a cleaned text."""
    base = text.rfind(prompt)
    if base >= 0:
        return [(base + word.start, base + word.end) for word in words]
    spans: list[Span | None] = []
    folded, reached = text.casefold(), 0
    if len(folded) != len(text):  # a letter that folds to two would shift what follows
        folded = text
    for word in words:
        at = folded.find(word.text.casefold(), reached)
        spans.append((at, at + len(word.text)) if at >= 0 else None)
        reached = at + len(word.text) if at >= 0 else reached
    return spans
