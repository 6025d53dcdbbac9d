"""Small tokenizers of the four kinds that models use, made here: nasty words fall apart into bytes, and no text is unknown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise

from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from transformers import CLIPTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer, T5Tokenizer

KINDS = ("clip", "llama", "t5", "qwen")

_TEXTS = (
    "a photo of a red cat's hat and the well-known moon, it isn't on the small table",
    "the dog and a cat stand in a field; two birds fly over the old house near water",
    "A painting of an astronaut riding a horse in the style of the 19th century, 3.5 m",
    "naïve café über straße déjà garçon señor œuvre fiancé",
    "кот на столе и собака в доме под красной луной",
    "قطة على الطاولة وكلب في البيت",
    "חתול על השולחן וכלב בבית",
    "लड़की बिल्ली के साथ खेल रही है",
    "แมวนั่งบนโต๊ะและสุนัขอยู่ในบ้าน",
    "一只红色的猫坐在桌子上 猫がテーブルの上に座っている",
    "고양이가 탁자 위에 앉아 있다",
    "👩‍🚀 🐱 👍🏽 “quoted” ‘words’ – and — dashes… 3.14 1,000",
)
_LETTERS = "▁abcdefghilmnoprstuvwyéAT0135.,'’”-атокилقطةالबचलकीहैแมวนั่猫が红고"
"""SentencePiece's letters; all others are bytes, so that words mix both."""
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """One of `KINDS`; its vocabulary is the same on every run."""
    return {"clip": _clip, "llama": _llama, "t5": _t5, "qwen": _qwen}[kind]()


def _clip() -> CLIPTokenizer:
    """Lower case, NFC, byte-level BPE whose words end in `</w>`."""
    pieces = ([*piece[:-1], f"{piece[-1]}</w>"] for piece in _pieces(CLIPTokenizer()))
    merges = _merges(pieces, 260)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges)]
    return CLIPTokenizer(vocab=_numbered([*tokens, "<|startoftext|>", "<|endoftext|>"]), merges=merges, model_max_length=77)


def _llama() -> LlamaTokenizer:
    """SentencePiece's BPE: a space is `▁`, one leads the text, rare characters are bytes; nothing is normalized."""
    merges = _merges(_known_runs(), 140)
    tokens = ["<unk>", "<s>", "</s>", *_BYTES, *_LETTERS, *(a + b for a, b in merges)]
    return LlamaTokenizer(vocab=_numbered(tokens), merges=merges)


def _t5() -> T5Tokenizer:
    """SentencePiece's Unigram: NFKC and plain white space, as by its compiled rules; rare characters are bytes, as umT5's."""
    special = ["<pad>", "</s>", "<unk>", *_BYTES]
    longer = [a + b for a, b in _merges(_known_runs(), 100)]
    scores = {**dict.fromkeys(special, 0.0), **dict.fromkeys(_LETTERS, -9.0)}
    scores |= {piece: -6.0 - rank / 50 for rank, piece in enumerate(longer)}
    tokenizer = T5Tokenizer(vocab=list(scores.items()), extra_ids=0)
    backend = tokenizer.backend_tokenizer
    backend.model = Unigram(list(scores.items()), unk_id=2, byte_fallback=True)
    backend.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def _qwen() -> Qwen2Tokenizer:
    """tiktoken's byte-level BPE after a pattern that parts letters, digits and the rest; NFC."""
    merges = _merges(_pieces(Qwen2Tokenizer()), 350)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges), "<|endoftext|>"]
    return Qwen2Tokenizer(vocab=_numbered(tokens), merges=merges)


def _pieces(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts as a byte-level tokenizer parts them before it merges."""
    own = tokenizer.backend_tokenizer
    return [piece for text in _TEXTS for piece, _ in own.pre_tokenizer.pre_tokenize_str(own.normalizer.normalize_str(text))]


def _known_runs() -> list[str]:
    """Words with `▁` for their space, cut where a character is left to its bytes."""
    spaced = "".join(letter if letter in _LETTERS else "\n" for text in _TEXTS for letter in f"▁{text}".replace(" ", "\n▁"))
    return spaced.split("\n")


def _merges(pieces: Iterable[Sequence[str]], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding: the most frequent pair, again and again.

    The library's trainers break ties by the order of a hash table, which differs from run to run; here the spelling does.
    """
    words = [list(piece) for piece in pieces]
    merges: list[tuple[str, str]] = []
    for _ in range(count):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in words:
            for i in reversed(range(len(word) - 1)):
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = ["".join(best)]
    return merges


def _numbered(tokens: Iterable[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}
