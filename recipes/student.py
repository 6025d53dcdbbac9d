"""The small student: a Llava of about 1.4 million parameters that describes scenes and answers questions, and its recipe.

What comes out is an ordinary transformers folder: `AutoModelForImageTextToText.from_pretrained(folder)` and
`AutoProcessor.from_pretrained(folder)` load it. The vision tower learns first, by naming the form and the color under each
patch; then it is frozen and the language model with its projector learns captions and answers from the tower's features.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lavender.miniworld.scenes import COLORS, DESCRIBE, IMAGE_SIZE, SHAPES, Scene, make_scenes

from .fitting import declare_float32, fit

PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<image>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class StudentRecipe:
    """Everything that decides the student's weights. Learning rates are AdamW's peak; batches count pictures."""

    seed: int = 0
    scene_seed: int = 2
    num_scenes: int = 24576
    vision_steps: int = 4000
    vision_batch: int = 64
    vision_learning_rate: float = 1e-3
    language_steps: int = 3000
    language_batch: int = 32
    language_learning_rate: float = 1.5e-3
    covered_share: float = 0.2
    """A patch is named after the object that covers at least this share of it."""


def train_student(folder: Path, recipe: StudentRecipe) -> None:
    """Trains tokenizer, vision tower, then projector and language model; writes a transformers folder and `recipe.json`.

    Stages that were finished before are taken from `folder/training/`, unfinished ones continue.
    """
    states = folder / "training"
    states.mkdir(parents=True, exist_ok=True)
    scenes = list(tqdm(make_scenes(recipe.scene_seed, recipe.num_scenes), "scenes", recipe.num_scenes, mininterval=5))
    processor = make_processor(scenes)
    torch.manual_seed(recipe.seed)
    model = make_model(processor)
    vision_cost = _train_vision(model, scenes, recipe, states)
    language_cost = _train_language(model, processor, scenes, recipe, states)
    model.half().save_pretrained(folder)
    declare_float32(folder / "config.json")
    processor.save_pretrained(folder)
    record = {"recipe": asdict(recipe), "cost": {"vision": vision_cost, "language": language_cost}}
    (folder / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")


def make_processor(scenes: list[Scene]) -> LlavaProcessor:
    """A Llava processor for 64x64 pictures, with a byte-level BPE tokenizer learned from the scenes' texts."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    texts = (t for s in scenes[:4096] for t in (s.caption, *(f"{q.text}\n{q.answer}" for q in s.questions)))
    trainer = BpeTrainer(
        vocab_size=600,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="right",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=256,
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """The untrained student: a 4-layer CLIP vision tower (8x8 patches) and a 4-layer Llama with grouped-query attention."""
    tokenizer = processor.tokenizer
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=IMAGE_SIZE,
                patch_size=PATCH_SIZE,
            ),
            text_config=LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=320,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            ),
            image_token_index=tokenizer.image_token_id,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_seq_length=GRID * GRID,
            tie_word_embeddings=True,
        )
    )


def _normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, 64, 64] to what the processor's image processor makes of them."""
    processor = CLIPImageProcessorPil()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
    return (pixels.float() / 255 - mean) / std


def _patch_labels(scenes: list[Scene], covered_share: float) -> torch.Tensor:
    """Form and color index under every patch, int64 [scenes, 2, 64]; index 0 is background."""
    labels = np.zeros((len(scenes), 2, GRID, GRID), np.int64)
    colors = list(COLORS)
    for i, scene in enumerate(scenes):
        share = scene.masks.reshape(-1, GRID, PATCH_SIZE, GRID, PATCH_SIZE).mean(axis=(2, 4))
        winner = share.argmax(axis=0)
        covered = share.max(axis=0) >= covered_share
        forms = np.array([SHAPES.index(o.shape) + 1 for o in scene.objects])
        paints = np.array([colors.index(o.color) + 1 for o in scene.objects])
        labels[i, 0] = np.where(covered, forms[winner], 0)
        labels[i, 1] = np.where(covered, paints[winner], 0)
    return torch.from_numpy(labels).flatten(2)


def _vision_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """The patch features that the projector receives, [B, 64, 128]."""
    return model.model.vision_tower(_normalize(pixels), output_hidden_states=True).hidden_states[-1][:, 1:]


def _pixels(scenes: list[Scene]) -> torch.Tensor:
    return torch.from_numpy(np.stack([s.pixels for s in scenes])).permute(0, 3, 1, 2).contiguous()


def _train_vision(
    model: LlavaForConditionalGeneration, scenes: list[Scene], recipe: StudentRecipe, states: Path
) -> dict[str, float]:
    pixels, labels = _pixels(scenes), _patch_labels(scenes, recipe.covered_share)
    head = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, len(SHAPES) + len(COLORS) + 2))

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(pixels), (recipe.vision_batch,), generator=generator)
        images, truth = pixels[chosen], labels[chosen].unflatten(2, (GRID, GRID))
        if torch.rand((), generator=generator) < 0.5:  # every form is its own mirror image
            images, truth = images.flip(-1), truth.flip(-1)
        forms, paints = truth.flatten(2).unbind(1)
        scores = head(_vision_features(model, images)).transpose(1, 2)
        form_scores, paint_scores = scores.split([len(SHAPES) + 1, len(COLORS) + 1], dim=1)
        return F.cross_entropy(form_scores, forms) + F.cross_entropy(paint_scores, paints)

    return fit(
        "vision",
        nn.ModuleList([model.model.vision_tower, head]),
        loss_of,
        steps=recipe.vision_steps,
        learning_rate=recipe.vision_learning_rate,
        seed=recipe.seed,
        folder=states,
        ema_decay=0.998,
    )


@dataclass(frozen=True)
class _Packed:
    """Every scene's caption and questions behind one shared picture, so that the picture is read once.

    `ids`, `turns`, `positions`, `labels`: int64 [scenes, T]. `turns` is 0 for the shared prefix, -1 for padding, else the
    number of the turn, and tokens of different turns do not see each other. `is_caption`: bool [scenes, T].
    """

    ids: torch.Tensor
    turns: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    is_caption: torch.Tensor


def _pack(processor: LlavaProcessor, scenes: list[Scene]) -> _Packed:
    tokenizer = processor.tokenizer
    image = tokenizer.image_token_id
    rows = []
    for scene in scenes:
        ids: list[int] = []
        turns: list[int] = []
        positions: list[int] = []
        labels: list[int] = []
        is_caption: list[bool] = []
        for turn, (question, answer) in enumerate([(DESCRIBE, scene.caption), *((q.text, q.answer) for q in scene.questions)]):
            messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
            full = processor.apply_chat_template([*messages, {"role": "assistant", "content": answer}])
            num_prompt = len(tokenizer(prompt, add_special_tokens=False).input_ids)
            tokens = tokenizer(full, add_special_tokens=False).input_ids
            start = tokens.index(image)
            if not ids:
                ids += tokens[:start] + [image] * GRID * GRID
                turns += [0] * len(ids)
                positions += range(len(ids))
                labels += [-100] * len(ids)
                is_caption += [False] * len(ids)
                prefix = len(ids)
            text, num_hidden = tokens[start + 1 :], num_prompt - start - 1
            ids += text
            turns += [turn + 1] * len(text)
            positions += range(prefix, prefix + len(text))
            labels += [-100] * num_hidden + text[num_hidden:]
            is_caption += [turn == 0] * len(text)
        rows.append((ids, turns, positions, labels, is_caption))
    length = max(len(row[0]) for row in rows)
    paddings = (tokenizer.pad_token_id, -1, 0, -100, False)
    fields = zip(zip(*rows, strict=True), paddings, strict=True)
    return _Packed(*(torch.tensor([values + [padding] * (length - len(values)) for values in field]) for field, padding in fields))


def _train_language(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scenes: list[Scene],
    recipe: StudentRecipe,
    states: Path,
) -> dict[str, float]:
    packed = _pack(processor, scenes)
    with torch.no_grad():
        chunks = tqdm(_pixels(scenes).split(128), "features", mininterval=5)
        features = torch.cat([_vision_features(model, chunk) for chunk in chunks])
    image = processor.tokenizer.image_token_id
    decoder, projector = model.model.language_model, model.model.multi_modal_projector

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(features), (recipe.language_batch,), generator=generator)
        ids, turns, labels = packed.ids[chosen], packed.turns[chosen], packed.labels[chosen]
        length = int((turns >= 0).sum(1).max())
        ids, turns, labels = ids[:, :length], turns[:, :length], labels[:, :length]
        embeddings = decoder.embed_tokens(ids).clone()
        embeddings[ids == image] = projector(features[chosen]).flatten(0, 1)
        same = (turns[:, :, None] == turns[:, None, :]) | (turns[:, None, :] == 0)
        visible = same & torch.ones(length, length, dtype=torch.bool).tril()
        hidden = decoder(
            inputs_embeds=embeddings,
            attention_mask=visible[:, None],
            position_ids=packed.positions[chosen][:, :length],
            use_cache=False,
        ).last_hidden_state
        # A turn's last visible token predicts nothing of the next turn: labels are shifted within turns.
        targets = labels[:, 1:]
        counted = (targets != -100) & (turns[:, 1:] == turns[:, :-1])
        scores = model.lm_head(hidden[:, :-1][counted])
        losses = F.cross_entropy(scores, targets[counted], reduction="none")
        in_caption = packed.is_caption[chosen][:, 1:length][counted]
        return losses[in_caption].mean() + losses[~in_caption].mean()

    return fit(
        "language",
        nn.ModuleList([decoder, projector]),
        loss_of,
        steps=recipe.language_steps,
        learning_rate=recipe.language_learning_rate,
        seed=recipe.seed,
        folder=states,
        ema_decay=0.998,
    )
