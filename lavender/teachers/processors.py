"""How diffusers' attention processors attend: whether it can be read, how to make it so, and what makes their keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def hides_attention(module: Any) -> bool:
    """Whether an attention module is known, without running it, not to call `scaled_dot_product_attention` just now."""
    name = type(getattr(module, "processor", None)).__name__
    backend = _backend_of(module)
    known = "XFormers" in name or "Sliced" in name or name == "AttnProcessor"
    return known or (backend is not None and "native" not in backend)


def remedy_of(module: Any) -> str:
    """What keeps an attention module from calling `scaled_dot_product_attention`, and how to switch it off."""
    processor = getattr(module, "processor", None)
    name = type(processor).__name__
    if "XFormers" in name:
        return f"its processor is {name}: call pipe.disable_xformers_memory_efficient_attention()"
    if "Sliced" in name:
        return f"its processor is {name}: call pipe.disable_attention_slicing()"
    backend, own = _backend_of(module), getattr(processor, "_attention_backend", None)
    if own is None and (backend == "native" or (backend is None and name.endswith("2_0"))):
        return (
            f"its processor is {name}, which can be read: the denoiser ran compiled before it was patched (patch it first, or call "
            "torch.compiler.reset()), or its forward did not get so far"
        )
    if backend is None:
        return (
            f"its processor is {name}, which does not call torch's scaled_dot_product_attention: give the denoiser one that does, "
            "set_attn_processor(AttnProcessor2_0()) for a U-Net"
        )
    if own is None:
        return (
            f"the attention backend in force is {backend!r}: leave the `with attention_backend({backend!r})` around the pipeline's "
            "call, or the environment's DIFFUSERS_ATTN_BACKEND, or choose 'native'"
        )
    return f"its attention backend is {backend!r}: call reset_attention_backend() on the denoiser, or set it to 'native'"


def _backend_of(module: Any) -> str | None:
    """diffusers' attention backend that a module's next call takes; None where its processor asks for none."""
    processor = getattr(module, "processor", None)
    if processor is None or not hasattr(processor, "_attention_backend"):
        return None
    backend = processor._attention_backend
    if backend is None:  # the one of the context manager or the environment
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        backend, _ = _AttentionBackendRegistry.get_active_backend()
    return str(getattr(backend, "value", backend))


def key_weight_of(module: nn.Module) -> torch.Tensor | None:
    """The weight that makes an attention's keys of its text; None where it is not known, or where the text is changed before."""
    if getattr(module, "norm_cross", None):
        return None
    projection: Any = getattr(module, "to_kv" if getattr(module, "fused_projections", False) else "to_k", None)
    while hasattr(projection, "base_layer"):  # below an adapter of PEFT
        projection = projection.base_layer
    return getattr(projection, "weight", None)
