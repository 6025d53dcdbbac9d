"""Tiny students in the ways that users of transformers and PEFT compose, and the check of each against its definition."""

from __future__ import annotations

import copy
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch

import lavender
from lavender.config import AlignmentConfig
from lavender.errors import LavenderError
from lavender.students.families import ProcessedImages
from lavender.students.image_tokens import place_image_tokens
from lavender.testing.student import Student, noise_image
from lavender.types import ROLES, WordBatch

from .definition import alignment_loss, attention_weights, compared_maps, word_maps
from .flash import flash_on_cpu
from .zoo import built

STUDENTS = {"llava": "LlamaAttention", "qwen2_vl": "Qwen2VLAttention", "mllama": "MllamaTextCrossAttention"}
"""The students, and the class of the attention by which their text reads the picture."""
AXES: dict[str, tuple[str, ...]] = {
    "student": tuple(STUDENTS),
    "attention": ("sdpa", "eager", "flex_attention", "flash_attention_2"),
    "padding": ("left", "right", "none"),
    "packing": ("none", "positions", "cu_seq_lens", "lengths_alone", "two_rows"),
    "cache": ("off", "on"),
    "peft": ("none", "lora", "dora", "ia3", "modules_to_save", "prompt", "prefix", "p_tuning"),
    "patched": ("before", "after"),
    "checkpointing": ("none", "non_reentrant", "reentrant"),
    "dtype": ("float32", "float64", "bfloat16", "float16", "autocast"),
    "content": ("plain", "no_words", "no_picture", "two_pictures"),
    "labels": ("labels", "none", "tuple", "tuple_without"),
    "aligner": ("identity", "sim"),
    "rows": ("predicts", "reads", "both", "last"),
    "question_rows": ("same", "predicts", "reads", "both", "last"),
    "roles": ("none", "question", "prompt_end"),
    "heads": ("mean", "0.1,0.0", "0.1"),
    "question_heads": ("same", "0.0,0.1", "0.0", "mean"),
    "softmax": ("all_keys", "picture"),
}
"""What can be composed, the plainest first. `patched`: before PEFT wraps the model, or after."""
NUM_VIRTUAL = 3
PROMPTS = ("prompt", "p_tuning", "prefix")
"""PEFT kinds that put virtual tokens before the text."""
WEIGHT = 3.0
FLOOR = {"float64": 1e-5, "float32": 1e-5, "float16": 1e-2, "bfloat16": 3e-2, "autocast": 3e-2}
"""What rounding may change, relative to the size of a value, beyond four times what it changes in plain eager attention."""


@dataclass(frozen=True)
class Composition:
    """One choice of each of `AXES`."""

    student: str = "llava"
    attention: str = "sdpa"
    padding: str = "left"
    packing: str = "none"
    cache: str = "off"
    peft: str = "none"
    patched: str = "before"
    checkpointing: str = "none"
    dtype: str = "float32"
    content: str = "plain"
    labels: str = "labels"
    aligner: str = "identity"
    rows: str = "predicts"
    question_rows: str = "same"
    roles: str = "none"
    heads: str = "mean"
    question_heads: str = "same"
    softmax: str = "all_keys"

    @property
    def config(self) -> AlignmentConfig:
        """What is aligned, and how."""
        # The rounding of half precision takes maps over the kinks of an aligner's activations, where gradients jump.
        aligner = self.aligner if self.dtype in ("float32", "float64") else "identity"
        settings: dict[str, Any] = {"aligner": aligner, "rows": self.rows, "renormalize": self.softmax == "picture"}
        settings |= {"heads": self.heads}
        of_questions = {"question_rows": self.question_rows, "question_heads": self.question_heads}
        settings |= {name: None if value == "same" else value for name, value in of_questions.items()}
        return AlignmentConfig(weight=WEIGHT, hidden_channels=4, **settings)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the weights."""
        dtype: torch.dtype = getattr(torch, self.dtype.replace("autocast", "float32"))
        return dtype

    def surroundings(self) -> ExitStack:
        """In which the student runs: functions for flash attention, autocast, autograd."""
        stack = ExitStack()
        if self.attention == "flash_attention_2":
            stack.enter_context(flash_on_cpu())
        if self.dtype == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        stack.enter_context(torch.set_grad_enabled(self.attention != "flex_attention"))
        return stack

    @property
    def is_segmented(self) -> bool:
        """Whether attention keeps the packed sequences apart: each base attention in its own way. A prompt has no positions."""
        if self.attention == "flash_attention_2":
            with_lengths = self.packing in ("cu_seq_lens", "lengths_alone")
            return with_lengths or (self.packing == "positions" and self.peft not in ("prompt", "p_tuning"))
        # A model that fills a cache, or gets a prefix as one, does not ask for positions.
        reads_positions = self.peft not in PROMPTS and (self.cache == "off" or self.checkpointing != "none")
        return reads_positions and self.packing in ("positions", "cu_seq_lens", "two_rows")

    @property
    def num_virtual(self) -> tuple[int, int]:
        """The number of virtual tokens before the rows, and before the keys, of the text's attention to itself."""
        # A prefix comes as a filled cache, and checkpointing takes that away.
        keys = self.peft in PROMPTS and (self.peft != "prefix" or self.checkpointing == "none")
        return NUM_VIRTUAL * (keys and self.peft != "prefix"), NUM_VIRTUAL * keys


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of one composition.

    Attributes:
        inputs: the model's, labels included.
        words: the words, with targets.
        segments: int64 [B, T], the number of each token's sequence; -1 is padding.
    """

    inputs: dict[str, Any]
    words: WordBatch
    segments: torch.Tensor


def make_batch(composition: Composition) -> Batch:
    """Word 0 of a row is its last token, word 1 the two before; of packed rows, word 2 is of the sequence before."""
    student = built(composition.student)
    processor = copy.deepcopy(student.processor)
    images = [[noise_image(60, 90)], [noise_image(96, 48, seed=1)]]
    if composition.content == "no_picture":
        images[1] = []
    if composition.content == "two_pictures":
        images[0].append(noise_image(48, 48, seed=2))
    texts = ("what is this ? a red cat", "a dog in the house ?")
    prompts = [" ".join([student.placeholder] * len(own) + [text]) for own, text in zip(images, texts, strict=True)]
    if composition.packing == "none":
        chosen = [0, 1]
        if composition.padding == "none":
            chosen = [1] if composition.content in ("no_words", "no_picture") else [0]
        else:
            processor.tokenizer.padding_side = composition.padding
        rows = [[images[n]] for n in chosen]
        inputs = _encode(processor, [images[n] for n in chosen], [prompts[n] for n in chosen])
        segments = torch.where(inputs["attention_mask"] > 0, 0, -1)
    else:
        orders = [[0, 1], [1, 0]] if composition.packing == "two_rows" else [[1, 0]]
        alone = [_encode(processor, [own], [prompt]) for own, prompt in zip(images, prompts, strict=True)]
        rows = [[images[n] for n in order] for order in orders]
        inputs = _stacked([_packed(composition, student, [alone[n] for n in order]) for order in orders])
        lengths = [one["input_ids"].shape[1] for one in alone]
        segments = torch.stack([torch.cat([torch.full((lengths[n],), s) for s, n in enumerate(order)]) for order in orders])
    inputs = {k: v.to(composition.torch_dtype) if k == "pixel_values" else v for k, v in inputs.items()}
    words = _words(composition, student, processor, inputs, segments, rows)
    inputs["use_cache"] = composition.cache == "on"
    if composition.labels in ("labels", "tuple"):
        inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
        for b, own in enumerate(segments):
            for segment in range(int(own.max()) + 1):
                at = (own == segment).nonzero().flatten()[-4:]
                inputs["labels"][b, at] = inputs["input_ids"][b, at]
    return Batch(inputs, words, segments)


def _encode(processor: Any, images: list[list[Any]], prompts: list[str]) -> dict[str, Any]:
    given = images if any(images) else None
    return dict(processor(images=given, text=prompts, padding=True, return_tensors="pt"))


def _packed(composition: Composition, student: Student, alone: list[dict[str, Any]]) -> dict[str, Any]:
    """Batches of one sequence each, laid end to end: [1, T], without a padding mask."""
    lengths = [one["input_ids"].shape[1] for one in alone]
    packed: dict[str, Any] = {}
    for name in alone[0].keys() | alone[1].keys():
        values = [one[name] for one in alone if name in one]
        if name == "attention_mask":
            continue
        if name == "cross_attention_mask":  # [1, T, pictures, tiles]: each sequence sees its own pictures
            blocks = [one[name][0].unbind(-1) if name in one else [torch.zeros(len(one["input_ids"][0]), 0)] * 4 for one in alone]
            packed[name] = torch.stack([torch.block_diag(*by_tile) for by_tile in zip(*blocks, strict=True)], dim=-1)[None].long()
        else:
            by_picture = name in ("pixel_values", "image_grid_thw") and composition.student != "mllama"
            packed[name] = torch.cat(values, dim=0 if by_picture else 1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    if composition.student == "qwen2_vl":
        model: Any = student.model.model
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
        own = [model.get_rope_index(**{name: one[name] for name in names if name in one})[0] for one in alone]
        by_axis = torch.cat(own, dim=-1)
        # The text's positions come first; the model splits the row by them, and only where they are given.
        positions = by_axis if composition.packing == "lengths_alone" else torch.cat([positions[None], by_axis])
    if composition.packing != "lengths_alone" or composition.student == "qwen2_vl":
        packed["position_ids"] = positions
    if composition.packing in ("cu_seq_lens", "lengths_alone"):
        borders = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
        packed |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    return packed


def _stacked(rows: list[dict[str, Any]]) -> dict[str, Any]:
    if len(rows) == 1:
        return rows[0]
    return {
        name: torch.cat([row[name] for row in rows], dim=int(rows[0][name].ndim == 3 and name == "position_ids"))
        for name in rows[0]
    }


def _words(
    composition: Composition, student: Student, processor: Any, inputs: dict[str, Any], segments: torch.Tensor, rows: list[Any]
) -> WordBatch:
    every = [image for row in rows for own in row for image in own]
    sizes = [(image.height, image.width) for image in every]
    config = student.model.config
    boxes = student.family.boxes(ProcessedImages(processor, inputs, sizes, config)) if every else []
    # The picture of a row is the last one that its last sequence sees.
    shown = [(sum(map(len, row)), sum(map(len, row)) - 1 if row[-1] else None) for row in rows]
    positions, places = place_image_tokens(inputs["input_ids"], boxes, student.family, processor, config, shown=shown)
    tokens, of_words = torch.full((len(rows), 4), -1), torch.full((len(rows), 4), -1)
    present = torch.zeros(len(rows), 3, dtype=torch.bool)
    for b, row in enumerate(rows):
        last = int(segments[b].max())
        if (composition.content == "no_words" and b == len(rows) - 1) or not row[-1]:
            continue
        at = (segments[b] == last).nonzero().flatten()
        tokens[b, :3], of_words[b, :3] = at[[-1, -2, -3]], torch.tensor([0, 1, 1])
        present[b, :2] = True
        if last:
            tokens[b, 3], of_words[b, 3] = (segments[b] == last - 1).nonzero().flatten()[-1], 2
    shares = torch.tensor([1.0, 0.5, 0.5, 1.0]).expand(len(rows), -1)
    targets = torch.rand(len(rows), 3, 5, 5, generator=torch.Generator().manual_seed(0))
    ids = {"input_ids": inputs["input_ids"]} if "input_ids" in WordBatch.KEYS else {}
    names = {"none": (), "question": ("question", "answer", "answer"), "prompt_end": ("prompt end", "question", "answer")}
    roles = torch.tensor([ROLES.index(name) for name in names[composition.roles]]).expand(len(rows), -1)
    more = ids if composition.roles == "none" else {**ids, "roles": roles}
    return WordBatch(tokens, of_words, shares * (of_words >= 0), positions, present, places, targets=targets, **more)


def make_model(composition: Composition, dtype: torch.dtype, attention: str, patches: ExitStack | None = None) -> torch.nn.Module:
    """The student in training, wrapped by PEFT, in the composition's order patched within `patches`; or plain."""
    model: Any = built(composition.student).copy().model.to(dtype).train()
    if composition.peft in PROMPTS and composition.student == "llava":
        model.resize_token_embeddings(40)  # PEFT takes the first weight of as many rows as the vocabulary for the embeddings
    model.get_decoder().config._attn_implementation = attention  # `set_attn_implementation` wants the flash_attn package
    torch.manual_seed(1)
    if patches is not None and composition.patched == "before":
        patches.enter_context(lavender.patch(model, composition.config))
    if composition.peft != "none":
        saved = ["lavender"] * (patches is not None and composition.patched == "before")
        model = peft.get_peft_model(model, _peft_config(composition, saved))
        for name, parameter in model.named_parameters():
            if "ia3" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            if composition.peft in PROMPTS and "lavender" in name:  # these kinds have no modules to save
                parameter.requires_grad_(True)
    if patches is not None and composition.patched == "after":
        patches.enter_context(lavender.patch(model, composition.config))
    # Checkpointing takes a prefix away: the definition of that is to do so too, by the kind that keeps every gradient.
    if composition.checkpointing != "none" and (patches is not None or composition.peft == "prefix"):
        reentrant = patches is not None and composition.checkpointing == "reentrant"
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
    return model.train()


def _peft_config(composition: Composition, saved: list[str]) -> Any:
    common: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    virtual = {**common, "num_virtual_tokens": NUM_VIRTUAL}
    lora = {**common, "r": 2, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}
    match composition.peft:
        case "prompt":
            return peft.PromptTuningConfig(**virtual)
        case "p_tuning":
            return peft.PromptEncoderConfig(**virtual, encoder_hidden_size=8)
        case "prefix":
            return peft.PrefixTuningConfig(**virtual)
        case "ia3":
            return peft.IA3Config(
                **common, target_modules=["k_proj", "v_proj"], feedforward_modules=[], modules_to_save=saved or None
            )
        case "modules_to_save":
            return peft.LoraConfig(**lora, modules_to_save=[*saved, "lm_head"])
        case kind:
            return peft.LoraConfig(**lora, use_dora=kind == "dora", modules_to_save=saved or None)


@dataclass(frozen=True, eq=False)
class Values:
    """What a step of training gives: the logits of real tokens, loss, aligned maps, captured maps, and gradients by name."""

    logits: torch.Tensor
    loss: torch.Tensor
    term: torch.Tensor
    aligned: torch.Tensor
    maps: torch.Tensor
    gradients: dict[str, torch.Tensor]


def _gradients(loss: torch.Tensor, named: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    if not loss.requires_grad:
        return {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def _trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad and "lavender" not in n}


def as_patched(composition: Composition, batch: Batch) -> tuple[Values, torch.nn.Module, Any]:
    """A step of the patched student, the student without its patch, and its aligner."""
    with ExitStack() as patches:
        model: Any = make_model(composition, composition.torch_dtype, composition.attention, patches)
        handle: Any = lavender.patch(model)
        alignment = handle.model.lavender
        alignment = getattr(alignment, "modules_to_save", {"default": alignment})["default"]
        named = _trainable(model) | {f"aligner.{n}": p for n, p in alignment.named_parameters()}
        with composition.surroundings():
            values = _step(composition, batch, model, handle, named)
    return values, model, alignment


def _step(composition: Composition, batch: Batch, model: Any, handle: Any, named: dict[str, torch.nn.Parameter]) -> Values:
    options = {"return_dict": False} if composition.labels.startswith("tuple") else {}
    output = model(**batch.inputs, **batch.words.to_batch(), **options)
    loss = output[0] if isinstance(output, tuple) else output.loss
    logits = output[int(composition.labels == "tuple")] if isinstance(output, tuple) else output.logits
    term, aligned = handle.last.loss, handle.last.aligned
    if composition.labels == "tuple_without":  # the first value is the logits
        _require_refused_backward(logits)
        loss = logits.new_zeros(())
    if composition.checkpointing == "reentrant":  # torch.autograd.grad does not go through it
        loss.backward()
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}
    else:
        gradients = _gradients(loss, named)
    with torch.no_grad():
        unplaced = replace(batch.words, boxes=None, targets=None)
        maps = handle.capture(**{k: v for k, v in batch.inputs.items() if k != "use_cache"}, **unplaced.to_batch())
    real = logits[:, -batch.segments.shape[1] :][batch.segments >= 0].detach()
    return Values(real, loss.detach(), term, aligned, maps, gradients)


def _require_refused_backward(logits: torch.Tensor) -> None:
    """Whoever trains by a loss of their own, made of the logits, trains without the term: that must not go unnoticed."""
    if not logits.requires_grad:
        return
    try:
        logits.double().square().mean().backward()
    except LavenderError:
        return
    raise AssertionError("a loss of the logits trained without the alignment, and nothing was said")


def by_definition(
    composition: Composition, batch: Batch, weights: dict[str, torch.Tensor], alignment: Any, dtype: torch.dtype
) -> Values:
    """The same by eager attention of the same weights in `dtype`."""
    model: Any = make_model(composition, dtype, "eager")
    model.load_state_dict(weights)
    if dtype == torch.float64:
        model.double()  # also what PEFT keeps in float32
    alignment = copy.deepcopy(alignment).double()
    inputs = {k: v for k, v in batch.inputs.items() if "cu_seq" not in k and "max_length" not in k}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    before_rows, before_keys = composition.num_virtual
    mask = visible_keys(composition, batch.segments, before_rows, before_keys)
    additive = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -1e4 if dtype == torch.float16 else -1e30)

    def give_mask(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": additive[:, None]}

    handle = model.get_decoder().register_forward_pre_hook(give_mask, with_kwargs=True)
    surroundings = composition.surroundings() if dtype == composition.torch_dtype else torch.set_grad_enabled(True)
    with attention_weights(model, STUDENTS[composition.student]) as probabilities, surroundings:
        output = model(**inputs)
    handle.remove()
    first_key = 0 if composition.student == "mllama" else before_keys
    config = composition.config
    compared = compared_maps(probabilities, batch.words, config, first_row=before_rows, first_key=first_key)
    maps = word_maps(batch.words, config, compared)
    if "mean" not in (config.heads, config.question_heads or config.heads):
        maps = maps[:, :1]  # chosen heads are of the first layer, and no other one is captured
    term, aligned = alignment_loss(alignment, compared, batch.words, config)
    loss = WEIGHT * term + (output.loss if "labels" in inputs else 0)
    named = _trainable(model) | {f"aligner.{n}": p for n, p in alignment.named_parameters()}
    real = output.logits[:, -batch.segments.shape[1] :][batch.segments >= 0].detach()
    return Values(real, loss.detach(), term.detach(), aligned.detach(), maps.detach(), _gradients(loss, named))


def visible_keys(composition: Composition, segments: torch.Tensor, before_rows: int, before_keys: int) -> torch.Tensor:
    """bool [B, T, N]: what each row of the self-attention may see by the composition alone. Padding sees itself."""
    length = segments.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & (segments >= 0)[:, None]
    if composition.is_segmented:
        seen = seen & (segments[:, :, None] == segments[:, None])
    seen = seen | torch.eye(length, dtype=torch.bool)
    seen = torch.cat([seen.new_ones(len(segments), length, before_keys), seen], dim=2)
    virtual = torch.ones(before_rows, seen.shape[2], dtype=torch.bool).tril().expand(len(segments), -1, -1)
    return torch.cat([virtual, seen], dim=1)


def fault_without_lavender(composition: Composition, batch: Batch) -> str | None:
    """Why the composition does not train without lavender either; None if it does."""
    try:
        model: Any = make_model(composition, composition.torch_dtype, composition.attention)
        if composition.checkpointing != "none":
            reentrant = composition.checkpointing == "reentrant"
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        with composition.surroundings():
            output = model(**batch.inputs)
            if "labels" in batch.inputs and output.loss.requires_grad:
                output.loss.backward()
    except Exception as error:  # whatever the libraries say
        return f"{type(error).__name__}: {error}"
    # Eager attention in float64 makes NaN of rows that are padding.
    return None if output.logits.isfinite().all() else "outputs are not finite"


def check(composition: Composition) -> str:
    """How a composition fares: "equal", "refused: ...", "unsupported: ...". Raises `AssertionError` where it is anything else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = make_batch(composition)
        try:
            found, model, alignment = as_patched(composition, batch)
            if not found.logits.isfinite().all():
                raise FloatingPointError("outputs are not finite")
        except LavenderError as error:
            return f"refused: {error}"
        except Exception:
            reason = fault_without_lavender(composition, batch)
            if reason is None:
                raise
            return f"unsupported: {reason}"
        weights = {name: value for name, value in model.state_dict().items() if "lavender" not in name}
        exact = by_definition(composition, batch, weights, alignment, torch.float64)
        plain = by_definition(composition, batch, weights, alignment, composition.torch_dtype)
    require_equal(composition, found, plain, exact, batch.words)
    return "equal"


def require_equal(composition: Composition, found: Values, plain: Values, exact: Values, words: WordBatch) -> None:
    """Raises `AssertionError` unless values are within four times the rounding of plain eager attention."""
    floor = FLOOR[composition.dtype]

    def compare(name: str, ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor, size: float | None = None) -> None:
        ours, theirs, truth = ours.double(), theirs.double(), truth.double()
        error, rounding = (ours - truth).norm().item(), (theirs - truth).norm().item()
        allowed = 4 * rounding + floor * (truth.norm().item() if size is None else size) + 1e-7
        assert error <= allowed, f"{name}: off by {error:.3g} where {allowed:.3g} is allowed, of {truth.norm().item():.3g}"

    compare("logits", found.logits, plain.logits, exact.logits)
    # `capture` fills no cache: transformers then keeps packed sequences apart that the training did not.
    if composition.cache == "off" or composition.packing == "none":
        compare("maps", found.maps, plain.maps, exact.maps)
    compare("aligned", *(v.aligned[words.present] for v in (found, plain, exact)))
    compare("term", found.term, plain.term, exact.term)
    if composition.labels == "tuple_without":
        return
    compare("loss", found.loss, plain.loss, exact.loss)
    assert found.gradients.keys() == exact.gradients.keys()
    whole = sum(g.double().square().sum().item() for g in exact.gradients.values()) ** 0.5
    for name, gradient in found.gradients.items():
        size = exact.gradients[name].double().norm().item() + 0.5 * whole
        compare(f"gradient of {name}", gradient, plain.gradients[name], exact.gradients[name], size)
