"""Small tokenizers of every kind that diffusers' pipelines have, with a token per letter."""

from __future__ import annotations

import sys
from itertools import accumulate
from string import ascii_letters, digits, punctuation
from types import ModuleType
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ProcessorMixin, T5Tokenizer

from .pipeline_zoo import WORDS

LETTERS = [*ascii_letters, *digits, *punctuation]


SPECIAL = [
    "<pad>", "<s>", "</s>", "<unk>", "[gMASK]", "<sop>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
]  # fmt: skip


def t5() -> T5Tokenizer:
    """The first three letters of each known word are a piece; the other letters stand alone."""
    starts = dict.fromkeys(f"▁{word[:3]}" for word in WORDS)
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(piece, -1.0) for piece in starts] + [(letter, -5.0) for letter in [*LETTERS, "é"]]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=64)


def _fast(space: str, prefix: tuple[str, ...], side: str, letters: list[str], **settings: Any) -> PreTrainedTokenizerFast:
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        for parts in ([space, *word[:3]], [*word[:3]], "{}"):  # a template's placeholder is one token of Llama's
            merges.update(dict.fromkeys(zip(accumulate(parts), parts[1:], strict=False)))
    tokens = [*SPECIAL, space, *letters, *map("".join, merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), unk_token="<unk>"))
    if space == "Ġ":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", space)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    if prefix:
        single = [*prefix, "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(t, vocab[t]) for t in prefix])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side=side, **{"model_max_length": 512, **settings}
    )


def byte_level(*prefix: str, side: str = "right", **settings: Any) -> PreTrainedTokenizerFast:
    """As Qwen's, GLM 4's, Llama 3's and Mistral's: bytes, a word's space at its front."""
    return _fast("Ġ", prefix, side, sorted(pre_tokenizers.ByteLevel.alphabet()), **settings)


def spaced(*prefix: str, side: str = "left", **settings: Any) -> PreTrainedTokenizerFast:
    """As Gemma's and Llama's: spaces are letters."""
    return _fast("▁", prefix, side, [*LETTERS, "\n"], **settings)


MISTRAL_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}[SYSTEM_PROMPT]{{ message['content'][0]['text'] }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ message['content'][0]['text'] }}[/INST]{% endif %}{% endfor %}"
)


QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


class Processor(ProcessorMixin):
    """A processor of text alone; Pixtral's needs torchvision."""

    attributes = ("tokenizer",)
    tokenizer_class = "PreTrainedTokenizerFast"


def mistral_processor() -> Processor:
    tokenizer = byte_level("<s>", side="left", bos_token="<s>")
    return Processor(tokenizer=tokenizer, chat_template=MISTRAL_CHAT)


class Pieces:
    """What ChatGLM's tokenizer needs of SentencePiece's processor: a piece per known word's first three letters, and letters."""

    def __init__(self, model_file: str) -> None:
        starts = dict.fromkeys(f"▁{word[:3]}" for word in WORDS)
        self.pieces = ["<unk>", "<s>", "</s>", *starts, "▁", *LETTERS]

    def vocab_size(self) -> int:
        return len(self.pieces)

    get_piece_size = vocab_size

    def unk_id(self) -> int:
        return 0

    def bos_id(self) -> int:
        return 1

    def eos_id(self) -> int:
        return 2

    def PieceToId(self, piece: str) -> int:
        return self.pieces.index(piece) if piece in self.pieces else 0

    def IdToPiece(self, index: int) -> str:
        return self.pieces[index]

    def EncodeAsPieces(self, text: str) -> list[str]:
        found = []
        for word in text.split():
            rest = f"▁{word}"
            while rest:
                piece = next((rest[:n] for n in (4, 3, 2) if rest[:n] in self.pieces), rest[0])
                found.append(piece)
                rest = rest[len(piece) :]
        return found

    def DecodePieces(self, pieces: list[str]) -> str:
        return "".join(pieces).replace("▁", " ").removeprefix(" ")


def chat_glm() -> Any:
    """The tokenizer of Kolors, over the stand-in for SentencePiece."""
    from diffusers.pipelines.kolors import tokenizer

    module = ModuleType("sentencepiece")
    module.SentencePieceProcessor = Pieces  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "is_sentencepiece_available", lambda: True)
        patch.setitem(sys.modules, "sentencepiece", module)
        return tokenizer.ChatGLMTokenizer(__file__)  # a file that exists
