"""The settings of extraction, alignment and training: few, frozen, checked when they are made, written beside every result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from .errors import ConfigError

Inversion = Literal["ddim", "noise"]
Rows = Literal["predicts", "reads"]
AlignerKind = Literal["sim", "identity"]
Normalization = Literal["zscore", "minmax"]

ConfigT = TypeVar("ConfigT")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_choice(name: str, value: str, choices: Any) -> None:
    _require(value in get_args(choices), f"{name} is {value!r}; choose one of {', '.join(get_args(choices))}")


def from_dict(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Rebuilds a config of this module from `to_dict`'s result or parsed JSON. Raises `ConfigError` on an unknown key."""
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    _require(not unknown, f"{cls.__name__} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def fingerprint(values: Any) -> str:
    """Sixteen hexadecimal digits that change whenever any of the given JSON values does."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


DEFAULT_QUESTION = "Describe the picture."
"""What the user asks where there is a caption only."""


@dataclass(frozen=True)
class TeacherConfig:
    """How word maps are read from a diffusion model.

    Raises `ConfigError` when a value is out of range.
    """

    inversion: Inversion = "ddim"
    """How a photograph becomes a noisy latent: `ddim` inverts it and reads the maps while denoising it again (the paper's way);
    `noise` adds noise at `timesteps` and reads one forward each, which is cheaper and keeps the picture's geometry exactly."""
    inversion_steps: int = 5
    """`ddim`: number of inversion steps (5 as published)."""
    diffusion_steps: int = 10
    """`ddim`: number of denoising steps that the maps are averaged over (10 as published)."""
    timesteps: tuple[int, ...] = (51, 151, 301)
    """`noise`: the training timesteps at which the picture is noised."""
    last_timestep: int = 1000
    """`ddim`: maps are read at timesteps below this one only; the noisiest steps see little of the picture."""
    layers: tuple[str, ...] = ()
    """Cross-attention modules to read, as name fragments such as `up_blocks.1`; empty for every one."""
    guidance_scale: float = 1.0
    """`ddim`: classifier-free guidance while denoising; maps come from the conditional half only. 1 is no guidance."""
    image_size: int | None = None
    """Side in pixels that pictures are resized to (whole picture, no crop); None takes the model's own."""
    map_size: int = 32
    """Height and width of the stored maps."""
    seed: int = 0
    """Seed of the noise; each picture's noise follows from it and the picture, not from the order of pictures."""

    def __post_init__(self) -> None:
        _require_choice("inversion", self.inversion, Inversion)
        for name in ("inversion_steps", "diffusion_steps"):
            _require(1 <= getattr(self, name) <= 1000, f"{name} is {getattr(self, name)}; it must be from 1 to 1000")
        _require(
            len(self.timesteps) > 0 and all(0 <= t < 1000 for t in self.timesteps),
            f"timesteps is {self.timesteps}; give one or more integers from 0 to 999",
        )
        _require(self.image_size is None or self.image_size >= 1, f"image_size is {self.image_size}; it must be at least 1")
        _require(1 <= self.map_size <= 256, f"map_size is {self.map_size}; it must be from 1 to 256")
        _require(self.guidance_scale >= 1.0, f"guidance_scale is {self.guidance_scale}; it must be at least 1")
        _require(self.last_timestep >= 1, f"last_timestep is {self.last_timestep}; it must be at least 1")


@dataclass(frozen=True)
class AlignmentConfig:
    """What is compared with what, and how strongly (the term `weight * MSE(Aligner(student's map), teacher's map)`).

    Raises `ConfigError` when a value is out of range.
    """

    weight: float = 10.0
    """Lambda, the alignment term's weight beside the language-model loss. 0 switches the term off."""
    rows: Rows = "predicts"
    """Which row of the student speaks for a token: the one that `predicts` it (the row before) or the one that `reads` it."""
    layers: tuple[int, ...] = ()
    """Decoder layers to capture, counted from 0 among the attention layers; empty for all."""
    renormalize: bool = False
    """Whether the softmax runs over the picture's columns alone instead of over every key that the row sees."""
    aligner: AlignerKind = "sim"
    """`sim`: the published three convolutions per layer, then the mean over layers; `identity`: the plain mean over layers and
    heads, so that the term acts on the raw attention."""
    hidden_channels: int = 32
    """Channels of `sim`'s hidden layers."""
    normalization: Normalization = "zscore"
    """How both sides are normalized per map before they are compared. `minmax` is the published choice; in small runs it let a
    bounded aligner collapse to a constant."""

    def __post_init__(self) -> None:
        _require(self.weight >= 0, f"weight is {self.weight}; it must not be negative")
        _require_choice("rows", self.rows, Rows)
        _require_choice("aligner", self.aligner, AlignerKind)
        _require_choice("normalization", self.normalization, Normalization)
        _require(self.hidden_channels >= 1, f"hidden_channels is {self.hidden_channels}; it must be at least 1")
        _require(all(layer >= 0 for layer in self.layers), f"layers is {self.layers}; layers are counted from 0")


@dataclass(frozen=True)
class TrainingConfig:
    """One fine-tuning run of a student by `transformers.Trainer`.

    Raises `ConfigError` when a value is out of range.
    """

    steps: int = 200
    """Optimizer steps."""
    batch_size: int = 16
    """Samples a step and device."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW, without weight decay (1e-4 as published)."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises linearly; it then falls linearly to zero."""
    lora_rank: int = 8
    """Rank of the LoRA adapter (8 as published); 0 fine-tunes every weight."""
    lora_alpha: int = 32
    """LoRA's scale numerator."""
    lora_dropout: float = 0.05
    """Dropout before LoRA's first matrix."""
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Modules that receive LoRA, in the text and in the vision tower."""
    gradient_checkpointing: bool = False
    """Whether to recompute activations in the backward pass (non-reentrant)."""
    save_steps: int = 50
    """A checkpoint is written every so many steps; a killed run continues from the last one."""
    seed: int = 0
    """Seed of the batch order, of the dropout and of the new weights."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_steps"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        _require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}; it must be positive")
        _require(self.lora_rank >= 0, f"lora_rank is {self.lora_rank}; it must be 0 (full fine-tuning) or more")
        _require(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}; it must not be negative")
        _require(0 <= self.lora_dropout < 1, f"lora_dropout is {self.lora_dropout}; it must be in [0, 1)")
