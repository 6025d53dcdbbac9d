"""Settings to start from: a student, what of it is aligned, and how it is trained. Each preset is a
function; `PRESETS` names them all.

All of them follow the published run of Llama-3.2-11B-Vision: LoRA of rank 8 on q_proj and v_proj, AdamW
at 1e-4 without weight decay, lambda 10. Steps, batches and the rate of full fine-tuning are not
published: they are choices made here. Only the small world's preset was run; the others were not run on
their checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from ..config import PUBLISHED, AlignmentConfig, TrainingConfig, WordsConfig
from ..errors import ConfigError
from ..miniworld import STUDENT
from .settings import override

Precision = Literal["bf16", "fp16"]


@dataclass(frozen=True)
class Preset:
    """A place to start from.

    Attributes:
        model: the student, a hub id or a folder.
        alignment: what is compared.
        training: how it is trained.
        words: which words are compared.
    """

    model: str
    alignment: AlignmentConfig
    training: TrainingConfig
    words: WordsConfig = field(default_factory=WordsConfig)

    def with_settings(self, assignments: Iterable[str]) -> Preset:
        """Returns a copy with some settings changed by texts like `alignment.weight=5`, `words.match=exact`
        or `training.arguments.deepspeed=zero3.json`. Raises `ConfigError` on an unknown setting."""
        changed: dict[str, list[str]] = {"alignment": [], "training": [], "words": []}
        for assignment in assignments:
            part, _, rest = assignment.partition(".")
            if part not in changed or "=" not in rest:
                raise ConfigError(
                    f"{assignment!r} changes nothing; expected {', '.join(changed)} and a setting: alignment.weight=5"
                )
            changed[part].append(rest)
        return replace(self, **{part: override(getattr(self, part), texts) for part, texts in changed.items() if texts})

    def in_precision(self, precision: Precision) -> Preset:
        """Returns a copy in `bf16` (A100 and newer) or `fp16` (V100, T4; with loss scaling).

        The frozen weights below a LoRA adapter are loaded in half precision; those of a full fine-tuning
        stay in float32. Raises `ConfigError`.
        """
        if precision not in ("bf16", "fp16"):
            raise ConfigError(f"the precision is {precision!r}; choose bf16 or fp16")
        halves = {"bf16": "bfloat16", "fp16": "float16"}
        arguments = {**self.training.arguments, "bf16": precision == "bf16", "fp16": precision == "fp16"}
        dtype = halves[precision] if self.training.lora_rank else "float32"
        return replace(self, training=replace(self.training, dtype=dtype, arguments=arguments))  # type: ignore[arg-type]


def llama_3_2_11b_vision_lora() -> Preset:
    """Llama-3.2-11B-Vision by LoRA: its eight cross-attention layers are aligned. Its weights alone take
    21 GB in half precision: shard them (ZeRO-3 or FSDP2) over cards of 24 or 32 GB."""
    return _lora("meta-llama/Llama-3.2-11B-Vision-Instruct", PUBLISHED)


def llama_3_2_11b_vision_full() -> Preset:
    """Llama-3.2-11B-Vision with every weight trained, for a node of eight with ZeRO-3 or FSDP2; a tenth of
    LoRA's learning rate (not published)."""
    lora = llama_3_2_11b_vision_lora()
    return replace(lora, training=replace(lora.training, lora_rank=0, learning_rate=1e-5))


def llava_1_5_7b() -> Preset:
    """LLaVA-1.5-7B by LoRA. It reads the picture by self-attention, over 24 x 24 image tokens."""
    return _lora("llava-hf/llava-1.5-7b-hf", PUBLISHED)


def qwen2_5_vl_7b() -> Preset:
    """Qwen2.5-VL-7B by LoRA. Pictures keep their shape; give its processor `max_pixels` if they are large."""
    return _lora("Qwen/Qwen2.5-VL-7B-Instruct", PUBLISHED)


def minicpm_v_4_6() -> Preset:
    """MiniCPM-V 4.6 by LoRA: the one of its family whose code is part of transformers."""
    return _lora("openbmb/MiniCPM-V-4.6", PUBLISHED)


def small_world() -> Preset:
    """The small student inside the package, on a CPU: it answers already, and learns captions (`bench/miniworld_study.py`)."""
    alignment = AlignmentConfig(weight=1.0, rows="reads", aligner="identity")
    return Preset(str(STUDENT), alignment, TrainingConfig(learning_rate=1e-3))


def _lora(model: str, alignment: AlignmentConfig) -> Preset:
    """2,000 steps of 16 samples per device, one at a time: a fraction of an epoch of the published 0.13
    million samples."""
    training = TrainingConfig(
        steps=2000,
        batch_size=1,
        warmup_steps=60,
        gradient_checkpointing=True,
        save_steps=200,
        arguments={"gradient_accumulation_steps": 16, "dataloader_num_workers": 4, "max_grad_norm": 1.0},
    )
    return Preset(model, alignment, training)


PRESETS: dict[str, Callable[[], Preset]] = {
    "llama-3.2-11b-vision-lora": llama_3_2_11b_vision_lora,
    "llama-3.2-11b-vision-full": llama_3_2_11b_vision_full,
    "llava-1.5-7b": llava_1_5_7b,
    "qwen2.5-vl-7b": qwen2_5_vl_7b,
    "minicpm-v-4.6": minicpm_v_4_6,
    "small-world": small_world,
}
"""Names of the presets."""


def preset(name: str) -> Preset:
    """A preset by its name. Raises `ConfigError` naming all."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()
