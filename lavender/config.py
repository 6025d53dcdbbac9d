"""The settings of extraction, alignment and training: frozen, checked on construction, and written beside every result.

The first sentence of a field's docstring is also its help on the command line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
Rows = Literal["predicts", "reads", "both", "last"]
Aggregation = Literal["project_mean", "project_max", "mean_project", "max_project", "mean", "max", "flow", "learned", "parallel"]
AlignerKind = Literal["light", "sim", "deep", "identity"]
Norm = Literal["instance", "batch", "group", "identity"]
Activation = Literal["relu6", "leaky_relu"]
Normalization = Literal["zscore", "sum", "minmax", "max", "none"]
Distance = Literal["mse", "kl"]
Schedule = Literal["constant", "linear", "exponential", "inverse"]
Dtype = Literal["float32", "bfloat16", "float16"]
Match = Literal["exact", "casefold", "root"]
Captions = Literal["first", "all"]
Format = Literal["folder", "parquet"]
PartOfSpeech = Literal["noun", "adjective", "verb", "subject", "object"]

ConfigT = TypeVar("ConfigT")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def check_fields(config: Any) -> None:
    """Brings every field of a dataclass to the type of its annotation, whoever gave the value: called first by each config.

    A list, a range or a single item becomes a tuple, an integer a float; what NumPy and torch hold counts as the Python numbers
    in it. A bool is no number, and a number is finite. Raises `ConfigError` naming the first field that holds something else.
    """
    for name, hint in get_type_hints(type(config)).items():
        object.__setattr__(config, name, _convert(name, getattr(config, name), hint))


def require_kind(name: str, config: Any, kind: type) -> None:
    """Raises `ConfigError` if what was given for a config is none of its kind."""
    _require(isinstance(config, kind), f"{name} is a {type(config).__name__}; expected one of lavender's {kind.__name__}")


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        _require(getattr(config, name) >= 1, f"{name} is {getattr(config, name)}; it must be at least 1")


def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Rebuilds a config of this module from `to_dict`'s result or parsed JSON. Raises `ConfigError` on an unknown key."""
    hints = get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    _require(not unknown, f"{cls.__name__} has no setting {', '.join(unknown)}; it has {', '.join(sorted(hints))}")
    return cls(**values)


def _convert(name: str, value: Any, hint: Any) -> Any:
    """A value as its field's type; see `check_fields`."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    options = [hint] if get_origin(hint) not in (Union, UnionType) else list(get_args(hint))
    kinds = [option for option in options if get_origin(option) is not tuple]
    item_kinds = [get_args(option)[0] for option in options if get_origin(option) is tuple]
    for kind in item_kinds:
        if isinstance(plain, list | tuple | range) and all(_fits(item, kind) for item in plain):
            return tuple(_as_kind(item, kind) for item in plain)
    for kind in kinds:
        if _fits(plain, kind):
            return _as_kind(plain, kind)
    for kind in item_kinds:
        if _fits(plain, kind):
            return (_as_kind(plain, kind),)
    choices = [choice for kind in (*kinds, *item_kinds) if get_origin(kind) is Literal for choice in get_args(kind)]
    expected = " or ".join(_name_of(option) for option in options)
    raise ConfigError(
        f"{name} is {value!r}; choose {'from' if item_kinds else 'one of'} {', '.join(choices)}"
        if choices
        else f"{name} is {value!r}; a value of another type was expected: {expected}"
    )


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is Mapping:
        return isinstance(value, Mapping) and _is_json(value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # so that NaN does not fit
    return isinstance(value, kind)


def _as_kind(value: Any, kind: Any) -> Any:
    return float(value) if kind is float else dict(value) if get_origin(kind) is Mapping else value


def _is_json(value: Mapping[Any, Any]) -> bool:
    """Whether a config that holds it can be written: by string keys, in JSON's values."""
    try:
        json.dumps(dict(value))
    except (TypeError, ValueError, RecursionError):
        return False
    return all(isinstance(key, str) for key in value)


def _name_of(option: Any) -> str:
    if get_origin(option) is tuple:
        return f"a list of {_name_of(get_args(option)[0])}"
    names = {float: "float, finite", type(None): "None"}
    if get_origin(option) is Mapping:
        return "Mapping of strings to JSON values"
    return names.get(option, getattr(option, "__name__", str(option)))


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def fingerprint(values: Any) -> str:
    """Sixteen hexadecimal digits of a hash of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


DEFAULT_QUESTION = "Describe the picture."
"""The question of a sample that has only a caption."""
RESERVED_ARGUMENTS = {
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
"""Arguments of `transformers.TrainingArguments` that `TrainingConfig` sets, and the setting that replaces each."""
NORM_GROUPS = 8
"""Groups of the aligner's group norm."""


@dataclass(frozen=True)
class TeacherConfig:
    """How word maps are read from a diffusion model.

    Raises `ConfigError` when a value is out of range.
    """

    inversion: Inversion = "ddim"
    """How a picture becomes a noisy latent: by `ddim`, `null_text` with exact guidance, `flow` for SD 3 and Flux, or `noise`.

    - `ddim` inverts it (Song et al. 2021) and reads the maps while denoising it again, as published;
    - `null_text` inverts it by DDIM, then fits the empty caption at every step until guided denoising returns to the picture
      (Mokady et al. 2023): many forwards and a backward per step;
    - `flow` is `ddim` for flow-matching models, by Euler steps;
    - `noise` adds noise at `timesteps` and reads one forward each, with any model: cheap, exact about the picture's geometry.
    """
    inversion_steps: int = 5
    """Steps of the inversion by `ddim` and `flow` (5 as published). `null_text` takes `diffusion_steps` in both directions."""
    diffusion_steps: int = 10
    """Steps of the denoising that maps are averaged over (10 as published). `noise` has none."""
    inner_steps: int = 10
    """At most this many Adam steps per timestep, for `null_text`."""
    timesteps: tuple[int, ...] = (51, 151, 301)
    """Training timesteps, from 0 to 999, for `noise`. Of a flow-matching model, thousandths of sigma; of an EDM one, its
    scheduler's noise levels in the order of sigma."""
    first_timestep: int = 0
    """Maps are read at this timestep and above; `noise` has `timesteps` instead."""
    last_timestep: int = 1000
    """Maps are read up to this timestep; `noise` has `timesteps` instead. The noisiest steps see little of the picture."""
    timestep_weights: tuple[float, ...] = ()
    """Weights of the forwards that are read, in their order (a denoising goes from noise to picture); empty for their mean."""
    layers: tuple[str, ...] = ()
    """Attention modules to read, by parts of their names, such as `up_blocks.1`; empty for all."""
    layer_weights: tuple[float, ...] = ()
    """One weight per entry of `layers`, for the modules that it names (the first entry that fits a module counts); empty for
    their mean."""
    resolutions: tuple[int, ...] = ()
    """Layers to read, by the longer side of their grid, such as 16 or 32; empty for all."""
    heads: tuple[int, ...] = ()
    """Heads to read, counted from 0; empty for all."""
    head_reduction: HeadReduction = "mean"
    """How the heads of a layer become one map: by their `mean`, or their `max` at every place."""
    renormalize: bool = False
    """Whether a word's attention is divided by that of the whole text. It matters where one softmax runs over text and picture
    (Stable Diffusion 3, Flux)."""
    normalization: Normalization = "none"
    """How every finished map is normalized, by the formulas of `lavender.kernels.map_loss`. `none` stores raw attention, which
    training normalizes as it needs."""
    storage: Storage = "float16"
    """How maps are stored: as `float16`, or as `uint8` between each map's minimum and maximum, in half the space."""
    guidance_scale: float = 1.0
    """Classifier-free guidance while denoising; 1 is none. Maps come from the conditional half only. Models with guidance as an
    input (Flux) are given this number and computed once. `noise` has no guidance."""
    long_captions: LongCaptions = "chunks"
    """What happens to captions beyond the text encoder's window: they are read in `chunks`, truncated, or refused by an
    `error`. A chunk is a caption of its own, cut between sentences if possible; words beyond a truncation have no maps."""
    image_size: int | None = None
    """Side, in pixels, of the square that pictures are brought to; None takes the model's own."""
    fit: Fit = "pad"
    """How pictures become square: padded, cropped to their middle, or stretched. `pad` adds gray, which is cut from the maps;
    `crop` stores its place with the maps."""
    vae_tiling: bool = False
    """Whether the autoencoder works in tiles: less memory, at slightly different latents."""
    dtype: Dtype = "float32"
    """Dtype in which the teacher's weights are loaded and run."""
    map_size: int = 32
    """Height and width of the stored maps."""
    seed: int = 0
    """Seed of the noise. A picture's noise depends on the seed and the picture, not the order."""

    def __post_init__(self) -> None:
        check_fields(self)
        _require_positive(self, "inner_steps")
        for name in ("inversion_steps", "diffusion_steps"):
            _require(1 <= getattr(self, name) <= 1000, f"{name} is {getattr(self, name)}; it must be from 1 to 1000")
        _require(
            len(self.timesteps) > 0 and all(0 <= t < 1000 for t in self.timesteps),
            f"timesteps is {self.timesteps}; give one or more integers from 0 to 999",
        )
        for name in ("timestep_weights", "layer_weights"):
            weights = getattr(self, name)
            _require(
                not weights or (all(w >= 0 for w in weights) and sum(weights) > 0),
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
        _require(abs(self.seed) < 2**63, f"seed is {self.seed}; it must be a number of 64 bits")
        _require(1 <= self.map_size <= 256, f"map_size is {self.map_size}; it must be from 1 to 256")
        _require(self.guidance_scale >= 1, f"guidance_scale is {self.guidance_scale}; it must be at least 1")
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
    """How an extraction is executed. Nothing here changes what the maps are.

    Raises `ConfigError` when a value is out of range.
    """

    batch_size: int = 8
    """Pictures per batch."""
    devices: tuple[str, ...] = ("cpu",)
    """Devices of the teachers, one process per entry, such as `cpu`, `mps`, `cuda`, or `cuda:0` and `cuda:1`. An entry may be
    repeated."""
    engine: Engine = "local"
    """What starts the processes: `local` does on this machine, `ray` (Ray Data) on a cluster's, one actor per device. Of
    `devices`, `ray` takes the kind and the count, not the numbers."""
    offload: Offload = "none"
    """What leaves the GPU while it is not used: whole models (`model`) or single layers (`sequential`). By diffusers'
    `enable_model_cpu_offload` and `enable_sequential_cpu_offload`."""
    threads: int = 1
    """Threads per teacher on a CPU. Several `devices` use many cores better; another number of threads changes the last bits of
    the maps."""
    vae_slicing: bool = False
    """Whether the autoencoder takes the pictures of a batch one by one, which needs less memory."""
    shard_size: int = 256
    """Samples per file of the store."""
    max_retries: int = 3
    """How often a batch whose process died is tried again before the run fails."""

    def __post_init__(self) -> None:
        check_fields(self)
        _require_positive(self, "batch_size", "threads", "shard_size")
        _require(self.max_retries >= 0, f"max_retries is {self.max_retries}; it must not be negative")
        _require(len(self.devices) >= 1, "devices is empty; give one or more, such as cuda:0")


_BY_ROLE = ("rows", "layers", "heads")
"""Settings of `AlignmentConfig` that words of questions may have of their own."""


def num_best(value: Any) -> int | None:
    """K of `best:K`; None for anything else."""
    found = re.fullmatch(r"best:0*([1-9]\d{0,5})", value) if isinstance(value, str) else None
    return None if found is None else int(found[1])


def parse_heads(name: str, heads: str) -> tuple[tuple[int, int], ...]:
    """Layer and head of each item of `3.1,5.0`. Raises `ConfigError` naming the setting."""
    items = [re.fullmatch(r"(\d{1,6})\.(\d{1,6})", item.strip(), re.ASCII) for item in heads.split(",")]
    places = tuple((int(item[1]), int(item[2])) for item in items if item is not None)
    _require(
        len(places) == len(items),
        f"{name} is {heads!r}; give mean, best:K with K of at least 1, or heads as layer.head, such as 3.1,5.0",
    )
    _require(len(set(places)) == len(places), f"{name} is {heads!r}; a head stands there twice")
    return places


OUTSIDE = ("left", "right", "above", "below", "top", "bottom", "small", "large")
"""English words that say where things are or how large, and name none."""


@dataclass(frozen=True)
class AlignmentConfig:
    """What is compared with what, and how strongly.

    The loss is `weight * MSE(Aligner(student's map), teacher's map)`. Defaults are what the study on the small world supports; its
    figures are right answers over the second half of training (docs/alignment-study.md). `PUBLISHED` has the paper's settings.

    Raises `ConfigError` when a value is out of range.
    """

    weight: float = 1.0
    """Lambda at the start, the alignment loss's weight beside the language loss; 0 switches it off.

    In the study .71 at 1; .46, .55, .63 and .63 at 0.1, 0.3, 3 and 10, which is published."""
    schedule: Schedule = "constant"
    """How lambda falls during training. The formulas are in `lavender.students.lambda_schedule`."""
    decay: float = 5.0
    """How fast `exponential` and `inverse` fall."""
    rows: Rows = "predicts"
    """Which rows speak for a word: those before its tokens, which `predicts` them; those that `reads` them; `both`; or `last`.

    A word of `both` is two comparisons, each with the word's target. `last` is the row that reads the word's last token, which
    alone has read all of it. The end of a prompt (`lavender.types.ROLES`) is always read at its own row. In the study .71 where
    questions are read and answers predicted, .53 where both are read, .61 by both rows of both."""
    layers: tuple[int, ...] | str = ()
    """Decoder layers to align, counted from 0 among the attention layers; empty for all, `best:K` for those that localize best.

    That is known before the training, by the scores of `lavender.choose_heads`. A student of three layers had .71 by its last
    layer alone, .70 by the second, .52 by the first, .48 by all together; the one that localized best had .65."""
    renormalize: bool = False
    """Whether the softmax runs over the image tokens alone, not over all keys that the row sees."""
    aggregation: Aggregation = "project_mean"
    """How the maps A of L layers and H heads become one. G is the aligner; heads are its channels where they are kept apart:

    - `project_mean`, `project_max`: mean or maximum over layers of G(A_l); the first is published;
    - `mean_project`, `max_project`: G of the mean or maximum over layers;
    - `mean`, `max`: G of the mean or maximum over layers and heads, one channel;
    - `flow`: G of the product over layers per head (attention flow), each scaled to mean 1 in log space, where none underflows;
    - `learned`: G of a mean over layers and heads with learned weights (a softmax, uniform at first), one channel;
    - `parallel`: in place of the student's own attention, new projections of the captured layers' hidden states attend from
      words to image tokens; then as `project_mean`. For students that read the picture by self-attention.
    """
    aligner: AlignerKind = "identity"
    """The aligner: `identity` has no weights; `light`, `sim` and `deep` are the published three, by size. The three have two,
    three and five convolutions (18,465, 27,681 and 46,113 weights for 32 heads); `identity` is the mean over channels, so that
    the loss acts on the attention itself: .71 in the study, where `sim` had .50."""
    hidden_channels: int = 32
    """Channels of the aligner's hidden layers (32 as published)."""
    max_grid: int = 32
    """Largest grid height and width that the aligner sees; larger attention is resized to it, by shared area. The teacher's
    maps have 32; four tiles of Llama 3.2 Vision have 80, at six times the aligner's memory."""
    norm: Norm = "instance"
    """The norm after each of the aligner's 3x3 convolutions, without weights (`instance` as published). `group` has 8 groups.
    The statistics of `batch` are each process's own."""
    activation: Activation = "relu6"
    """The activation after the norm: `relu6` (as published), or `leaky_relu` of slope 0.1."""
    parallel_heads: int = 8
    """Heads of `parallel`'s projections."""
    parallel_width: int = 64
    """Width of each of `parallel`'s heads."""
    normalization: Normalization = "zscore"
    """How both sides are normalized per map before they are compared, by the formulas of `lavender.kernels.map_loss`. `zscore`
    had .71 in the study, `minmax`, which is published, .39. `sum` and `max` expect maps that are not negative: with them the
    output of the convolutions goes through softplus. `sum` is meant for `kl`: the squared error of distributions over many
    places is close to zero."""
    distance: Distance = "mse"
    """`mse`, or `kl`: the Kullback-Leibler divergence of the target from the student, for `normalization="sum"`; .71 and .46 in
    the study."""
    heads: str = "mean"
    """Heads to align: `mean` for all; chosen ones by layer and head, as in `3.1,5.0`; `best:K` for those that localize best.

    `mean` says that no head is chosen: an aggregation may keep them apart. K chosen ones, of whatever layers (numbered as in
    `layers`), are the K channels of one map: `project_mean`, `project_max`, `mean_project` and `max_project` are then G of
    these channels; `mean`, `max` and `learned` go over them; `flow` and `parallel` take none. In the study the best two heads
    before training had .51, the best four .53, and all heads of one layer .71."""
    question_rows: Rows | None = "reads"
    """`rows` of the words that the user says (`WordsConfig.roles`); None takes the answer's."""
    question_layers: tuple[int, ...] | str | None = None
    """`layers` of the words that the user says; None takes the answer's."""
    question_heads: str | None = None
    """`heads` of the words that the user says; None takes the answer's. Of another number than these, where heads are the
    aligner's channels, they need `aligner="identity"`."""
    until: float = 1.0
    """Share of the training, in (0, 1], after which lambda is zero; the schedule runs from the start to there."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("weight", "decay"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must be a number that is not negative")
        _require_positive(self, "hidden_channels", "max_grid", "parallel_heads", "parallel_width")
        _require(
            self.norm != "group" or self.hidden_channels % NORM_GROUPS == 0,
            f"hidden_channels is {self.hidden_channels}; norm='group' needs a multiple of {NORM_GROUPS}",
        )
        _require(
            self.distance != "kl" or self.normalization == "sum",
            f"distance='kl' compares distributions: use normalization='sum', not {self.normalization!r}",
        )
        _require(0 < self.until <= 1, f"until is {self.until}; it must be in (0, 1], a share of the training")
        for prefix in ("", "question_"):
            self._check_places(f"{prefix}layers", f"{prefix}heads")
        if any(getattr(self, f"question_{name}") is not None for name in _BY_ROLE):
            try:
                _ = self.of_question
            except ConfigError as error:
                raise ConfigError(
                    f"of questions' words, which take from the answers' what question_... is not given: {error}"
                ) from None

    def _check_places(self, layers_name: str, heads_name: str) -> None:
        """Writes the heads in their shortest form. Raises `ConfigError` for layers and heads that cannot be."""
        layers, heads = getattr(self, layers_name), getattr(self, heads_name)
        if isinstance(layers, str):
            _require(
                num_best(layers) is not None,
                f"{layers_name} is {layers!r}; give integers, an empty list for all layers, or best:K with K of at least 1",
            )
        elif layers is not None:
            _require(all(layer >= 0 for layer in layers), f"{layers_name} is {layers}; layers are counted from 0")
            _require(len(set(layers)) == len(layers), f"{layers_name} is {layers}; a layer stands there twice")
        if heads is None or heads == "mean":
            return
        _require(
            self.aggregation not in ("flow", "parallel"),
            f"{heads_name} is {heads!r} and aggregation {self.aggregation!r}, which takes no chosen heads; leave heads='mean', or "
            "choose another aggregation",
        )
        if num_best(heads) is not None:
            return
        places = parse_heads(heads_name, heads)
        object.__setattr__(self, heads_name, ",".join(f"{layer}.{head}" for layer, head in places))
        _require(
            not isinstance(layers, str),
            f"{heads_name} is {heads!r} and {layers_name} {layers!r}: the heads name their layers; leave {layers_name} out",
        )
        beyond = sorted({layer for layer, _ in places} - set(layers)) if layers else []
        _require(not beyond, f"{heads_name} is {heads!r}, and {layers_name} {layers} lacks {beyond}; leave {layers_name} out")

    @property
    def of_question(self) -> AlignmentConfig:
        """The settings by which words of questions are read, as a config whose words are all read so.

        Raises `ConfigError` where they do not go together.
        """
        own: dict[str, Any] = {name: getattr(self, f"question_{name}") for name in _BY_ROLE}
        if own["layers"] is None and own["heads"] not in (None, "mean") and num_best(own["heads"]) is None:
            own["layers"] = ()  # heads name theirs
        return replace(self.of_answer, **{name: value for name, value in own.items() if value is not None})

    @property
    def of_answer(self) -> AlignmentConfig:
        """The same of answers' words."""
        return replace(self, question_rows=None, question_layers=None, question_heads=None)


PUBLISHED = AlignmentConfig(weight=10.0, aligner="sim")
"""The paper's settings, but for its normalization, `minmax`: with it a bounded aligner collapsed to a constant in small runs."""


@dataclass(frozen=True)
class WordsConfig:
    """Which words of a conversation are aligned, and with which words of the targets' caption.

    Raises `ConfigError` when a value is out of range.
    """

    match: Match = "casefold"
    """When a word of the answer is a word of the caption. `exact`: letter by letter; `casefold`: whatever its case; `root`:
    when both have one lemma by `tagger` ("dogs", "Dog")."""
    parts_of_speech: tuple[PartOfSpeech, ...] = ()
    """Parts of speech to keep, by `tagger`, which reads the whole answer; empty keeps all but function words. `noun` includes
    proper ones; `subject` and `object` are of a verb or preposition."""
    tagger: str = ""
    """A spaCy pipeline, by name or folder: `en_core_web_sm`. `root` and `parts_of_speech` need it."""
    exclude: tuple[str, ...] = OUTSIDE
    """More words that are never aligned, whatever their case; by default English ones of place and size, which name nothing.

    With these the small world's study had .71 right answers, without .61: a word's map is of something else then."""
    min_coverage: float = 0.0
    """Least share of the map's places, in [0, 1), at which a word's target reaches half of its range. Sparser words are left
    out: a lone hot place is noise more often than an object."""
    roles: tuple[Literal["question", "answer"], ...] = ("answer",)
    """Whose words: those of every answer that is learned, those of every message of the user's, or both. A word is compared
    only behind the picture in the text. Empty leaves samples' regions alone."""

    def __post_init__(self) -> None:
        check_fields(self)
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
    """Samples per step and device."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW, without weight decay (1e-4 as published)."""
    aligner_learning_rate: float | None = None
    """Peak learning rate of the aligner's weights; None takes the student's."""
    aligner_steps: int = 0
    """Optimizer steps of a first stage, of the aligner alone, with its own schedule; 0 skips it."""
    freeze_student: bool = True
    """Whether the student is frozen in the first stage."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises linearly; it then falls linearly to zero."""
    lora_rank: int = 8
    """Rank of the LoRA adapter (8 as published); 0 fine-tunes every weight."""
    lora_alpha: int = 32
    """LoRA's scale numerator."""
    lora_dropout: float = 0.05
    """Dropout before LoRA's first matrix."""
    lora_targets: tuple[str, ...] | str = ("q_proj", "v_proj")
    """Modules that receive LoRA, as PEFT takes them. Ends of names, in the text and the vision tower (as published), or a
    regular expression for whole names: `.*language_model.*\\.(q|v)_proj`."""
    dtype: Dtype = "float32"
    """Dtype in which the student's weights are loaded. Half precision is for LoRA, whose weights stay in float32; a full
    fine-tuning by mixed precision keeps its weights in float32."""
    max_length: int | None = None
    """Tokens after which a sample is cut off, image tokens included; None cuts nothing."""
    gradient_checkpointing: bool = False
    """Whether to recompute activations in the backward pass (non-reentrant)."""
    save_steps: int = 50
    """Steps between checkpoints; a killed run continues from the last one."""
    seed: int = 0
    """Seed of the batch order, the dropout and the new weights."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `transformers.TrainingArguments`, such as `{"bf16": True}`. They set precision, engine
    (`{"deepspeed": "zero3.json"}`), gradient accumulation, trackers (`{"report_to": "tensorboard"}`) and the number of
    checkpoints kept."""

    def __post_init__(self) -> None:
        check_fields(self)
        _require_positive(self, "steps", "batch_size", "save_steps")
        for name in ("learning_rate", "aligner_learning_rate"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} is {value}; it must be a positive number")
        _require(0 <= self.seed < 2**32, f"seed is {self.seed}; it must be from 0 to 2**32 - 1, as NumPy takes it")
        _require(self.aligner_steps >= 0, f"aligner_steps is {self.aligner_steps}; it must not be negative")
        _require(
            self.dtype == "float32" or self.lora_rank > 0,
            f"dtype is {self.dtype!r} and lora_rank 0; a full fine-tuning keeps its weights in float32: leave dtype, and compute "
            'in half precision by arguments={"bf16": True} or {"fp16": True}',
        )
        _require(self.max_length is None or self.max_length >= 1, f"max_length is {self.max_length}; it must be at least 1")
        reserved = sorted(RESERVED_ARGUMENTS.keys() & self.arguments.keys())
        _require(
            not reserved,
            f"arguments holds {', '.join(reserved)}, set elsewhere: {', '.join(RESERVED_ARGUMENTS[name] for name in reserved)}",
        )
        _require(self.lora_rank >= 0, f"lora_rank is {self.lora_rank}; it must be 0 (full fine-tuning) or more")
        _require(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}; it must not be negative")
        _require(0 <= self.lora_dropout < 1, f"lora_dropout is {self.lora_dropout}; it must be in [0, 1)")
