"""What must hold for a captured forward to be what it says, and for its loss to train: each check raises, none repairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.autograd import Variable

from ..errors import CaptureError
from ..types import WordBatch
from .aligner import HiddenStates


def require_whole_sequences(module: nn.Module, inputs: dict[str, Any]) -> None:
    """Raises `CaptureError` in a replica of `nn.DataParallel`, and where a sequence is split over processes."""
    if getattr(module, "_is_replica", False):
        raise CaptureError(
            "the model runs under nn.DataParallel, whose copies lavender cannot follow; start one process per GPU (torchrun, "
            "accelerate launch), or show the script one GPU only (CUDA_VISIBLE_DEVICES=0)"
        )
    if "shift_labels" in inputs:
        raise CaptureError(
            "the sequence is split over processes (context or sequence parallelism); lavender reads rows of whole sequences: "
            "switch it off"
        )


def tokens_before_text(
    model: Any, words: WordBatch, inputs: dict[str, Any], length: int, *, crosses: bool, reads: torch.Tensor
) -> int:
    """How many virtual tokens stand before the text of a forward of `length` positions, as PEFT's prompt tuning puts them there.

    Checked are the tokens that maps are read at, those of words and of the picture: they must be the batch's. Where the forward
    got embeddings in place of ids, they must be those of the batch's ids. The check waits for the device once.

    Args:
        model: the student.
        words: the batch's.
        inputs: the forward's.
        length: T, with what stands before the text.
        crosses: whether the picture's keys are those of a cross-attention, and no positions of the text.
        reads: bool [B, R], the tokens whose own row is read, not the one before it alone.

    Raises:
        CaptureError: the forward is of another text, or nothing proves that it is of the same.
    """
    names = ("decoder_input_ids", "decoder_inputs_embeds") if model.config.is_encoder_decoder else ("input_ids", "inputs_embeds")
    ids, embeddings = (inputs.get(name) for name in names)
    batch = ids if ids is not None else embeddings
    if batch is None:  # labels alone, of which an encoder-decoder makes its text
        return 0
    if len(batch) != len(words.tokens):
        raise CaptureError(
            f"the forward is over {len(batch)} rows of text, and the batch has the words of {len(words.tokens)} samples; give each "
            "sample a row of its own: lavender reads no packed batches that it did not make"
        )
    text = words.input_ids if words.input_ids is not None else ids
    if text is None:
        raise CaptureError(
            f"the forward got {names[1]} in place of {names[0]}, and the batch has no {WordBatch.KEYS['input_ids']}: nothing says "
            "which text the words' positions are of. Make the batch with lavender.Collator, or add its input_ids by that key"
        )
    before = length - text.shape[1]
    if before < 0 or (before and ids is not None):
        raise CaptureError(
            f"the forward is over {length} tokens, and the words' positions are of a text of {text.shape[1]}; cut or extend "
            "the text before lavender.Collator makes the batch (its max_length=...), or pack no samples"
        )
    text, at = text.to(batch.device), words.tokens.to(batch.device)
    # A token that the last row predicts need not be there itself.
    beyond = at > text.shape[1] - reads.to(at.device).long()
    images = words.image_positions.to(batch.device)
    if not crosses:
        at, beyond = torch.cat([at, images], dim=1), torch.cat([beyond, images >= text.shape[1]], dim=1)
    inside = (at >= 0) & (at < text.shape[1])
    expected = text.gather(1, at.where(inside, 0))
    if ids is not None:
        others = ids.gather(1, at.where(inside, 0)) != expected
    else:
        index = (at.where(inside, 0) + before)[..., None].expand(-1, -1, batch.shape[2])
        with torch.no_grad():
            others = (batch.gather(1, index) != model.get_input_embeddings()(expected)).any(dim=2)
    wrong = beyond | (inside & others)
    token = None if crosses else getattr(model.config, "image_token_id", None)
    no_images = torch.zeros_like(images, dtype=torch.bool)
    if token is not None:
        no_images = (images >= 0) & (text.gather(1, images.clamp(0, text.shape[1] - 1)) != token)
    if torch.stack([wrong.any(), no_images.any()]).any():
        _refuse_text(model, names[1] if ids is None else "", text, at, wrong, images, no_images, before)
    return before


def _refuse_text(
    model: Any,
    embeddings: str,
    text: torch.Tensor,
    at: torch.Tensor,
    wrong: torch.Tensor,
    images: torch.Tensor,
    no_images: torch.Tensor,
    before: int,
) -> NoReturn:
    """Raises the `CaptureError` of positions that hold something else."""
    if wrong.any() and embeddings:
        raise CaptureError(
            f"the forward got {embeddings} that are not the embeddings of the batch's text{f' behind {before} more' * bool(before)}"
            ": lavender does not know where the words and the picture are. Give input_ids, or embeddings of the batch's input_ids, "
            "with pixel_values beside them"
        )
    if wrong.any():
        b, place = wrong.nonzero()[0].tolist()
        raise CaptureError(
            f"{int(wrong.sum())} of the positions that maps are read at hold other tokens than the batch was made with, such "
            f"as position {int(at[b, place])} of row {b}. Was the text of {text.shape[1]} tokens cut, shifted or packed after "
            "lavender.Collator made it? Leave it as it is"
        )
    b, place = no_images.nonzero()[0].tolist()
    raise CaptureError(
        f"the batch was made for another model: {int(no_images.sum())} of its image positions hold other tokens (such as "
        f"{int(text[b, images[b, place]])}) than {type(model).__name__}'s image token {model.config.image_token_id}. Make it with "
        "this model's own processor: lavender.Collator(AutoProcessor.from_pretrained(...), model_config=model.config)"
    )


def require_gradient(model: Any, decoder: nn.Module, source: torch.Tensor | HiddenStates) -> None:
    """Raises `CaptureError` if a training forward's attention, or the aligner, cannot learn."""
    if not torch.is_grad_enabled():
        return
    aligner = [p for p in model.lavender.parameters() if p.is_floating_point()]
    if any(p.requires_grad for p in aligner) and hasattr(model, "peft_config") and not hasattr(model.lavender, "modules_to_save"):
        raise CaptureError(
            "the aligner trains beside a PEFT adapter that does not save it; patch the model before get_peft_model with "
            "LoraConfig(..., modules_to_save=['lavender']), or pass the PeftModel to lavender.patch"
        )
    if not model.training:
        return
    if aligner and not any(p.requires_grad for p in aligner):
        raise CaptureError(
            "every weight of the aligner is frozen; with PEFT, name it: LoraConfig(..., modules_to_save=['lavender'])"
        )
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in decoder.modules())
    trainable = any(p.requires_grad for p in decoder.parameters())
    captured = source if isinstance(source, torch.Tensor) else source.queries
    require_no_reentrant_checkpointing(checkpointed and trainable and not captured.requires_grad)


def require_no_reentrant_checkpointing(is_reentrant: bool) -> None:
    """Raises `CaptureError` if gradient checkpointing is of the kind that runs layers with autograd off."""
    if is_reentrant:
        raise CaptureError(
            "the captured attention carries no gradient: the model uses re-entrant gradient checkpointing. Enable it with "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )


def watch_term(term: torch.Tensor, hidden: torch.Tensor, then: Callable[[], None]) -> None:
    """Raises `CaptureError` from a backward pass that reached the text tower's output `hidden` and not `term`; else calls `then`.

    Such a pass trains by a loss that the term was not added to.
    """
    reached: list[bool] = []

    def check() -> None:
        if not reached:
            raise CaptureError(
                "the loss that was trained by does not hold the alignment: the model's own loss, to which lavender adds it, was "
                "dropped. A Trainer does so with label_smoothing_factor, with compute_loss_func, and where its compute_loss makes "
                "a loss of the logits: leave these out, train by outputs.loss, or add patch.term to the loss"
            )
        then()

    def at_hidden(gradient: torch.Tensor) -> None:
        # At the end of the pass, in whatever order it reaches its nodes.
        Variable._execution_engine.queue_callback(check)

    term.register_hook(lambda gradient: reached.append(True))
    hidden.register_hook(at_hidden)


class StepWatch:
    """Which weights an optimizer step changed: an aligner that stays as it is while the student changes is in no group."""

    def __init__(self, model: nn.Module) -> None:
        trained = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
        self._versions = [(name, p, p._version) for name, p in trained]

    def require_steps(self) -> bool:
        """Whether a step changed the aligner. Raises `CaptureError` if it changed the student, and left weights of the aligner."""
        changed = [p._version != version for _, p, version in self._versions]
        both = list(zip(changed, (name for name, _, _ in self._versions), strict=True))
        left = [name for new, name in both if is_of_aligner(name) and not new]
        if left and any(new for new, name in both if not is_of_aligner(name)):
            raise CaptureError(
                f"an optimizer step changed the student and left {len(left)} weights of the aligner as they were, such as "
                f"{left[0]}: they are in none of its groups. Make the optimizer after lavender.patch, from model.parameters()"
            )
        return any(new for new, name in both if is_of_aligner(name))


def is_of_aligner(name: str) -> bool:
    """Whether a parameter of a patched model, by its dotted name, belongs to the aligner."""
    return name.startswith("lavender.")
