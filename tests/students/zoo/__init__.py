"""Tiny random vision-language models with their real processors, one per family: built from configs, nothing is downloaded."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.video_processing_utils import BaseVideoProcessor

from lavender import __version__
from lavender.testing.student import Student

_WORDS = "a b c d e f g h red blue green cat dog hat tree house what is in the picture of and on . ? !"
WORDS = tuple(_WORDS.split())
"""What the zoo's tokenizers know, a token each, beside special tokens."""


def tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer, padding on the left, that knows `WORDS` and the given special tokens.

    `named` special tokens become attributes as well: `image_token="<image>"` gives `tokenizer.image_token` and `image_token_id`.
    """
    tokens = list(dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *special, *named.values(), *WORDS]))
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    backend.add_special_tokens([*special, *named.values()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=dict(named),
    )


def with_video(processor: type, video: type[BaseVideoProcessor] = BaseVideoProcessor, **parts: Any) -> Any:
    """A processor of a class that wants a video processor as well.

    The families' own need torchvision, and so does the check of the parts' classes: it is left out where the processor is made, and
    the processor keeps its real class.
    """
    with patch.object(processor, "check_argument_for_proper_class"):
        return processor(**parts, video_processor=video())


MODULES = ("square", "thw", "sizes", "anyres", "tiles", "cross", "resampler")
"""One per grid rule."""
NUM_SAMPLED = 12
"""Families that the fast gate tests; all of them carry the mark `full`."""


def students() -> dict[str, Callable[[], Student]]:
    """Every tiny model's builder by name: the model type, or `type/variant`."""
    return {name: builder for builders in _by_rule().values() for name, builder in builders.items()}


@cache
def built(name: str) -> Student:
    """A tiny model, the same object at every call: tests that change it take `built(name).copy()`."""
    return students()[name]()


def families(where: Callable[[Student], bool] = lambda student: True) -> list[str]:
    """Sorted names of the students that a condition holds for."""
    return [name for name in sorted(students()) if where(built(name))]


def sampled(names: Iterable[str]) -> list[Any]:
    """Names as parameters of a test: those that are not in this commit's sample carry the mark `full`.

    The first name stays in the fast gate where the sample has none of them.
    """
    names = list(names)
    fast = sample_of(_commit()).intersection(names) or names[:1]
    return [name if name in fast else pytest.param(name, marks=pytest.mark.full) for name in names]


def sample_of(commit: str) -> frozenset[str]:
    """`NUM_SAMPLED` names that a commit's hash chooses, one per grid rule at least."""

    def order(name: str) -> bytes:
        return hashlib.sha256(f"{commit} {name}".encode()).digest()

    chosen = {min(builders, key=order) for builders in _by_rule().values()}
    rest = sorted(students().keys() - chosen, key=order)
    return frozenset(chosen | {*rest[: NUM_SAMPLED - len(chosen)]})


@cache
def _by_rule() -> dict[str, dict[str, Callable[[], Student]]]:
    return {module: import_module(f"{__name__}.{module}").STUDENTS for module in MODULES}


@cache
def _commit() -> str:
    """The checked-out commit; lavender's version where there is no git."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return __version__
