"""The settings of extraction, alignment and training: few, frozen, checked when they are made, written beside every result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import ConfigError

Inversion = Literal["ddim", "noise", "null_text", "flow"]
Fit = Literal["pad", "crop", "stretch"]
LongCaptions = Literal["chunks", "truncate", "error"]
HeadReduction = Literal["mean", "max"]
Storage = Literal["float16", "uint8"]
Engine = Literal["local", "ray"]
Offload = Literal["none", "model", "sequential"]
Rows = Literal["predicts", "reads"]
Aggregation = Literal["project_mean", "project_max", "mean_project", "max_project", "mean", "max", "flow", "learned", "parallel"]
AlignerKind = Literal["light", "sim", "deep", "identity"]
Norm = Literal["instance", "batch", "group", "identity"]
Activation = Literal["relu6", "leaky_relu"]
Normalization = Literal["zscore", "sum", "minmax", "max", "none"]
Distance = Literal["mse", "kl"]
Schedule = Literal["constant", "linear", "exponential", "inverse"]
Dtype = Literal["float32", "bfloat16", "float16"]
Match = Literal["exact", "casefold", "root"]
PartOfSpeech = Literal["noun", "adjective", "verb", "subject", "object"]

ConfigT = TypeVar("ConfigT")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_choice(name: str, value: str, choices: Any) -> None:
    _require(value in get_args(choices), f"{name} is {value!r}; choose one of {', '.join(get_args(choices))}")


def from_dict(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Rebuilds a config of this module from `to_dict`'s result or parsed JSON. Raises `ConfigError` on an unknown key."""
    hints = get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    _require(not unknown, f"{cls.__name__} has no setting {', '.join(unknown)}; it has {', '.join(sorted(hints))}")
    return cls(**{name: _typed(name, value, hints[name]) for name, value in values.items()})


def _typed(name: str, value: Any, hint: Any) -> Any:
    """A JSON value as a field's type has it. A list becomes a tuple, one text a tuple of one, an integer a float."""
    options = [hint] if get_origin(hint) not in (Union, UnionType) else list(get_args(hint))
    for option in options:
        inner = get_args(option)
        if get_origin(option) is tuple:
            items = value if isinstance(value, list | tuple) else None
            if items is not None and all(_fits(item, inner[0]) for item in items):
                return tuple(items)
        elif _fits(value, option):
            return float(value) if option is float else value
    several = [get_args(option)[0] for option in options if get_origin(option) is tuple]
    if several and _fits(value, several[0]):
        return (value,)
    expected = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ConfigError(f"{name} is {value!r}; a value of another type was expected: {expected}")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str)  # which one is checked by the config itself
    if get_origin(kind) is Mapping:
        return isinstance(value, Mapping)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def override(config: ConfigT, assignments: Iterable[str]) -> ConfigT:
    """A config with some settings changed by texts like `weight=5`, `layers=[1, 2]` or `arguments.bf16=true`.

    Values are JSON; what is none is a text. Raises `ConfigError` on an unknown setting, or a text without `=`.
    """
    values = to_dict(config)
    for assignment in assignments:
        name, found, text = assignment.partition("=")
        _require(bool(found) and name.count(".") <= 1, f"{assignment!r} sets nothing; expected name=value")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        outer, _, inner = name.strip().partition(".")
        if inner:
            _require(isinstance(values.get(outer), dict), f"{type(config).__name__} has no settings below {outer!r}")
            values[outer] = values[outer] | {inner: value}
        else:
            values[outer] = value
    return from_dict(type(config), values)


def fingerprint(values: Any) -> str:
    """Sixteen hexadecimal digits that change whenever any of the given JSON values does."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


DEFAULT_QUESTION = "Describe the picture."
"""What the user asks where there is a caption only."""
OWN_ARGUMENTS = {
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "per_device_train_batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "warmup_steps": "warmup_steps",
    "save_steps": "save_steps",
    "seed": "seed",
    "data_seed": "seed",
    "gradient_checkpointing": "gradient_checkpointing",
    "output_dir": "fine_tune(out=...)",
    "remove_unused_columns": "False, always",
}
"""Arguments of `transformers.TrainingArguments` that are settings of `TrainingConfig` itself, or may not be changed."""
NORM_GROUPS = 8
"""Groups of the aligner's group norm."""


@dataclass(frozen=True)
class TeacherConfig:
    """How word maps are read from a diffusion model.

    Raises `ConfigError` when a value is out of range.
    """

    inversion: Inversion = "ddim"
    """How a photograph becomes a noisy latent:

    - `ddim` inverts it (Song et al. 2021) and reads the maps while denoising it again: the paper's way;
    - `null_text` inverts it so, and then fits the empty caption at every step until guided denoising returns to the picture
      (Mokady et al. 2023): many forwards and a backward pass each;
    - `flow` does the same as `ddim` for flow-matching models, by Euler steps: Stable Diffusion 3, Flux;
    - `noise` adds noise at `timesteps` and reads one forward each, with any model: cheap, and exact about the picture's geometry.
    """
    inversion_steps: int = 5
    """`ddim`, `flow`: steps of the inversion (5 as published). `null_text` takes `diffusion_steps` for both ways."""
    diffusion_steps: int = 10
    """`ddim`, `flow`, `null_text`: steps of the denoising that the maps are averaged over (10 as published)."""
    inner_steps: int = 10
    """`null_text`: at most so many steps of Adam at each timestep."""
    timesteps: tuple[int, ...] = (51, 151, 301)
    """`noise`: the training timesteps, from 0 to 999, at which the picture is noised; of a flow-matching model, thousandths of its
    sigma."""
    first_timestep: int = 0
    """All but `noise`: maps are read at this timestep and above only."""
    last_timestep: int = 1000
    """All but `noise`: maps are read up to this timestep only; the noisiest steps see little of the picture."""
    timestep_weights: tuple[float, ...] = ()
    """Weights of the forwards that are read, in their order (a denoising goes from noise to picture); empty for their mean."""
    layers: tuple[str, ...] = ()
    """Attention modules to read, as name fragments such as `up_blocks.1`; empty for every one."""
    layer_weights: tuple[float, ...] = ()
    """Weights of the modules that each of `layers` names (the first that fits a module counts); empty for their mean."""
    resolutions: tuple[int, ...] = ()
    """Layers to read by the longer side of their grid, in places, such as 16 or 32; empty for all."""
    heads: tuple[int, ...] = ()
    """Heads to read, counted from 0; empty for all."""
    head_reduction: HeadReduction = "mean"
    """How the heads of a layer become one map: their `mean`, or their `max` at every place."""
    renormalize: bool = False
    """Whether a word's attention is divided by that of the whole text. It matters where text and picture are attended to at once
    (Stable Diffusion 3, Flux)."""
    normalization: Normalization = "none"
    """How every finished map is normalized, by the formulas of `lavender.kernels.map_loss`; `none` stores raw attention, which
    training normalizes as it needs."""
    storage: Storage = "float16"
    """What maps are stored as: `float16`, or `uint8` between each map's own lowest and highest value, in half the space."""
    guidance_scale: float = 1.0
    """`ddim`, `null_text`, `flow`: classifier-free guidance while denoising; maps come from the conditional half only. 1 is no
    guidance. Models with guidance as an input (Flux) are given this number and computed once."""
    long_captions: LongCaptions = "chunks"
    """What happens to a caption that is longer than the text encoder's window: it is read in `chunks`, each a caption of its own,
    cut between sentences if possible; or `truncate` leaves the words beyond without maps; or `error` refuses it."""
    image_size: int | None = None
    """Side in pixels of the square that pictures are brought to; None takes the model's own."""
    fit: Fit = "pad"
    """How a picture is brought to that square: `pad` keeps its aspect ratio and adds gray beside it, which is cut from the maps;
    `crop` keeps it and takes the middle, whose place is stored with the maps; `stretch` does not keep it."""
    vae_tiling: bool = False
    """Whether the autoencoder works in tiles: less memory for large pictures, at slightly different latents."""
    dtype: Dtype = "float32"
    """In which the teacher's weights are loaded and run."""
    map_size: int = 32
    """Height and width of the stored maps."""
    seed: int = 0
    """Seed of the noise; each picture's noise follows from it and the picture, not from the order of pictures."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("inversion", Inversion),
            ("head_reduction", HeadReduction),
            ("normalization", Normalization),
            ("storage", Storage),
            ("long_captions", LongCaptions),
            ("fit", Fit),
            ("dtype", Dtype),
        ):
            _require_choice(name, getattr(self, name), choices)
        for name in ("inversion_steps", "diffusion_steps"):
            _require(1 <= getattr(self, name) <= 1000, f"{name} is {getattr(self, name)}; it must be from 1 to 1000")
        _require(self.inner_steps >= 1, f"inner_steps is {self.inner_steps}; it must be at least 1")
        _require(
            len(self.timesteps) > 0 and all(0 <= t < 1000 for t in self.timesteps),
            f"timesteps is {self.timesteps}; give one or more integers from 0 to 999",
        )
        for name in ("timestep_weights", "layer_weights"):
            weights = getattr(self, name)
            _require(
                not weights or (all(0 <= w < math.inf for w in weights) and sum(weights) > 0),
                f"{name} is {weights}; weights are not negative, and not all zero",
            )
        _require(
            len(self.layer_weights) in (0, len(self.layers)),
            f"layer_weights has {len(self.layer_weights)} numbers for {len(self.layers)} layers; give one for each of `layers`",
        )
        _require(
            self.inversion != "noise" or len(self.timestep_weights) in (0, len(self.timesteps)),
            f"timestep_weights has {len(self.timestep_weights)} numbers for {len(self.timesteps)} timesteps; give one for each",
        )
        for name in ("resolutions", "heads"):
            values, least = getattr(self, name), 1 if name == "resolutions" else 0
            _require(all(v >= least for v in values), f"{name} is {values}; they are integers from {least}")
            _require(len(set(values)) == len(values), f"{name} is {values}; a number stands there twice")
        _require(self.image_size is None or self.image_size >= 1, f"image_size is {self.image_size}; it must be at least 1")
        _require(1 <= self.map_size <= 256, f"map_size is {self.map_size}; it must be from 1 to 256")
        _require(1.0 <= self.guidance_scale < math.inf, f"guidance_scale is {self.guidance_scale}; it must be at least 1")
        _require(
            self.inversion != "null_text" or self.guidance_scale > 1,
            f"guidance_scale is {self.guidance_scale}; null_text is there to make guidance exact: give one above 1, such as 7.5",
        )
        _require(
            0 <= self.first_timestep <= self.last_timestep,
            f"first_timestep is {self.first_timestep} and last_timestep {self.last_timestep}; the first is at least 0, and no "
            "larger than the last",
        )


@dataclass(frozen=True)
class ExtractionConfig:
    """How the work of an extraction is done. Nothing here is part of what the maps are.

    Raises `ConfigError` when a value is out of range.
    """

    batch_size: int = 8
    """Pictures that are computed together."""
    devices: tuple[str, ...] = ("cpu",)
    """Where teachers run, one process for each of them: `cpu`, `cuda`, or `cuda:0` and `cuda:1`; a device may stand there twice."""
    engine: Engine = "local"
    """Who starts the processes: `local` does on this machine; with `ray`, Ray Data does on the machines of a cluster, one actor for
    each of `devices` (of which the kind counts, not the number)."""
    offload: Offload = "none"
    """What leaves the GPU while it is not used: `model` moves whole models, `sequential` one layer after the other, by diffusers'
    `enable_model_cpu_offload` and `enable_sequential_cpu_offload`."""
    threads: int = 1
    """Threads of each teacher on a CPU. More `devices` use more cores, and better; another number of threads changes the maps' last
    bits."""
    vae_slicing: bool = False
    """Whether the autoencoder takes the pictures of a batch one by one, which needs less memory."""
    shard_size: int = 256
    """Samples in a file of the store."""
    max_retries: int = 3
    """How often a batch whose process died is tried again before the run gives up."""

    def __post_init__(self) -> None:
        _require_choice("engine", self.engine, Engine)
        _require_choice("offload", self.offload, Offload)
        for name in ("batch_size", "threads", "shard_size"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        _require(self.max_retries >= 0, f"max_retries is {self.max_retries}; it must not be negative")
        _require(len(self.devices) >= 1, "devices is empty; give one or more, such as cuda:0")


@dataclass(frozen=True)
class AlignmentConfig:
    """What is compared with what, and how strongly (the term `weight * MSE(Aligner(student's map), teacher's map)`).

    Raises `ConfigError` when a value is out of range.
    """

    weight: float = 10.0
    """Lambda at the start, the alignment term's weight beside the language-model loss. 0 switches the term off."""
    schedule: Schedule = "constant"
    """How lambda falls with training's progress p from 0 to 1: `constant`; `linear`, weight (1 - p); `exponential`, weight
    exp(-decay p); `inverse`, weight / (1 + decay p). It is never negative."""
    decay: float = 5.0
    """How fast `exponential` and `inverse` fall."""
    rows: Rows = "predicts"
    """Which row of the student speaks for a token: the one that `predicts` it (the row before) or the one that `reads` it."""
    layers: tuple[int, ...] = ()
    """Decoder layers to capture, counted from 0 among the attention layers; empty for all."""
    renormalize: bool = False
    """Whether the softmax runs over the picture's columns alone instead of over every key that the row sees."""
    aggregation: Aggregation = "project_mean"
    """How the maps A of L layers and H heads become one, G being the aligner (heads are its channels where they are kept apart):

    - `project_mean`, `project_max`: mean or maximum over layers of G(A_l); the first is the published choice;
    - `mean_project`, `max_project`: G of the mean or maximum over layers;
    - `mean`, `max`: G of the mean or maximum over layers and heads, one channel;
    - `flow`: G of the product over layers per head, each product scaled to the mean 1 in log space, where it cannot underflow;
    - `learned`: G of a mean over layers and heads with learned weights (a softmax, even at first), one channel;
    - `parallel`: instead of the student's own attention, new projections of the hidden states of the captured layers attend from
      words to image tokens; then as `project_mean`. For students that read the picture by self-attention.
    """
    aligner: AlignerKind = "sim"
    """The aligner G: `light`, `sim` and `deep` are the published two, three and five convolutions (18,465, 27,681 and 46,113
    weights for 32 heads); `identity` is the mean over its channels, so that the term acts on the attention itself."""
    hidden_channels: int = 32
    """Channels of the aligner's hidden layers (32 as published)."""
    max_grid: int = 32
    """Height and width, in places, above which attention is brought to a grid of that size before the aligner sees it, by shared
    area. The teacher's maps have 32; four tiles of Llama 3.2 Vision have 80, at six times the aligner's memory."""
    norm: Norm = "instance"
    """The norm after each of the aligner's 3x3 convolutions, without weights of its own (`instance` as published). `group` has 8
    groups. The statistics of `batch` are each process's own."""
    activation: Activation = "relu6"
    """What follows the norm: `relu6` (as published), or `leaky_relu` with a slope of 0.1."""
    parallel_heads: int = 8
    """Heads of `parallel`'s projections."""
    parallel_width: int = 64
    """Width of each of `parallel`'s heads."""
    normalization: Normalization = "zscore"
    """How both sides are normalized per map before they are compared, by the formulas of `lavender.kernels.map_loss`. `minmax` is
    the published choice; in small runs it let a bounded aligner collapse to a constant. `sum` and `max` expect maps that are not
    negative: with them the output of the convolutions goes through softplus. `sum` is meant for `kl`: the squared error of
    distributions over many places is next to nothing."""
    distance: Distance = "mse"
    """`mse`, or `kl`: the Kullback-Leibler divergence of the target from the student, for `normalization="sum"`."""

    def __post_init__(self) -> None:
        _require(0 <= self.weight < math.inf, f"weight is {self.weight}; it must be a number that is not negative")
        _require(0 <= self.decay < math.inf, f"decay is {self.decay}; it must be a number that is not negative")
        for name, choices in (
            ("schedule", Schedule),
            ("rows", Rows),
            ("aggregation", Aggregation),
            ("aligner", AlignerKind),
            ("norm", Norm),
            ("activation", Activation),
            ("normalization", Normalization),
            ("distance", Distance),
        ):
            _require_choice(name, getattr(self, name), choices)
        for name in ("hidden_channels", "max_grid", "parallel_heads", "parallel_width"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        _require(
            self.norm != "group" or self.hidden_channels % NORM_GROUPS == 0,
            f"hidden_channels is {self.hidden_channels}; norm='group' needs a multiple of {NORM_GROUPS}",
        )
        _require(
            self.distance != "kl" or self.normalization == "sum",
            f"distance='kl' compares distributions: use normalization='sum', not {self.normalization!r}",
        )
        _require(all(layer >= 0 for layer in self.layers), f"layers is {self.layers}; layers are counted from 0")
        _require(len(set(self.layers)) == len(self.layers), f"layers is {self.layers}; a layer stands there twice")

    def weight_at(self, progress: float) -> float:
        """Lambda at a training progress from 0 to 1 (values outside are clipped)."""
        p = min(max(progress, 0.0), 1.0)
        factors = {"constant": 1.0, "linear": 1 - p, "exponential": math.exp(-self.decay * p), "inverse": 1 / (1 + self.decay * p)}
        return self.weight * factors[self.schedule]


@dataclass(frozen=True)
class WordsConfig:
    """Which words of an answer are aligned, and with which words of the caption that the targets were made from.

    Raises `ConfigError` when a value is out of range.
    """

    match: Match = "casefold"
    """When a word of the answer is a word of the caption: `exact`, letter by letter; `casefold`, whatever its case; `root`, when
    both have the same lemma by `tagger` ("dogs" and "dog"), whatever its case."""
    parts_of_speech: tuple[PartOfSpeech, ...] = ()
    """Words are kept if they are one of these by `tagger`, which reads the whole answer: `noun` (proper ones too), `adjective`,
    `verb`, or the `subject` or `object` of a verb or preposition. Empty keeps every word that is no function word."""
    tagger: str = ""
    """A spaCy pipeline, by name or folder, such as `en_core_web_sm`; needed by `root` and by `parts_of_speech`."""
    exclude: tuple[str, ...] = ()
    """More words that are never aligned, whatever their case."""
    min_coverage: float = 0.0
    """Words whose target is too sparse are left out: less than this share of its places, in [0, 1), reaches half of the map's
    range (a lone hot place is noise more often than an object)."""

    def __post_init__(self) -> None:
        _require_choice("match", self.match, Match)
        for part in self.parts_of_speech:
            _require_choice("parts_of_speech", part, PartOfSpeech)
        _require(
            bool(self.tagger) or not (self.parts_of_speech or self.match == "root"),
            "match='root' and parts_of_speech need a tagger: name a spaCy pipeline, for example tagger='en_core_web_sm' (after "
            "`pip install spacy` and `python -m spacy download en_core_web_sm`)",
        )
        _require(0 <= self.min_coverage < 1, f"min_coverage is {self.min_coverage}; it must be in [0, 1)")


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
    aligner_learning_rate: float | None = None
    """Peak learning rate of the aligner's weights; None takes the student's."""
    aligner_steps: int = 0
    """Optimizer steps of a first stage that trains the aligner alone, with a schedule of its own; 0 leaves it out."""
    freeze_student: bool = True
    """Whether the student stands still in the first stage."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises linearly; it then falls linearly to zero."""
    lora_rank: int = 8
    """Rank of the LoRA adapter (8 as published); 0 fine-tunes every weight."""
    lora_alpha: int = 32
    """LoRA's scale numerator."""
    lora_dropout: float = 0.05
    """Dropout before LoRA's first matrix."""
    lora_targets: tuple[str, ...] | str = ("q_proj", "v_proj")
    """Modules that receive LoRA, as PEFT takes them: ends of names, in the text and in the vision tower (as published); or one
    regular expression for whole names, such as `.*language_model.*\\.(q|v)_proj`."""
    dtype: Dtype = "float32"
    """In which the student's weights are loaded. Half precision is for LoRA, whose own weights stay in float32; a full fine-tuning
    by mixed precision keeps its weights in float32."""
    max_length: int | None = None
    """Tokens after which a sample is cut off, pictures included; None cuts nothing."""
    gradient_checkpointing: bool = False
    """Whether to recompute activations in the backward pass (non-reentrant)."""
    save_steps: int = 50
    """A checkpoint is written every so many steps; a killed run continues from the last one."""
    seed: int = 0
    """Seed of the batch order, of the dropout and of the new weights."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `transformers.TrainingArguments`, such as `{"bf16": True, "deepspeed": "zero3.json", "report_to":
    "tensorboard"}`: precision, engine, gradient accumulation, trackers, the number of checkpoints kept."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_steps"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "aligner_learning_rate"):
            value = getattr(self, name)
            _require(value is None or 0 < value < math.inf, f"{name} is {value}; it must be a positive number")
        _require(self.aligner_steps >= 0, f"aligner_steps is {self.aligner_steps}; it must not be negative")
        _require_choice("dtype", self.dtype, Dtype)
        _require(
            self.dtype == "float32" or self.lora_rank > 0,
            f"dtype is {self.dtype!r} and lora_rank 0; a full fine-tuning keeps its weights in float32: leave dtype, and compute "
            'in half precision by arguments={"bf16": True} or {"fp16": True}',
        )
        _require(self.max_length is None or self.max_length >= 1, f"max_length is {self.max_length}; it must be at least 1")
        taken = sorted(OWN_ARGUMENTS.keys() & self.arguments.keys())
        _require(
            not taken,
            f"arguments holds {', '.join(taken)}, set elsewhere: {', '.join(OWN_ARGUMENTS[name] for name in taken)}",
        )
        _require(self.lora_rank >= 0, f"lora_rank is {self.lora_rank}; it must be 0 (full fine-tuning) or more")
        _require(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}; it must not be negative")
        _require(0 <= self.lora_dropout < 1, f"lora_dropout is {self.lora_dropout}; it must be in [0, 1)")
