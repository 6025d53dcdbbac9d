"""The functions of the `flash_attn` package on a CPU, by their definition: transformers' own flash attention runs over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from transformers import modeling_flash_attention_utils as utils


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False,
):  # fmt: skip
    """Attention of q [B, T, H, D] to k and v [B, N, G, D]; causality and window are aligned to the last row and key."""
    assert (dropout_p, softcap, alibi_slopes) == (0, 0, None)
    share = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(share, 2), v.repeat_interleave(share, 2)
    scores = torch.einsum("bthd,bnhd->bhtn", q.double(), k.double()) * (softmax_scale or q.shape[-1] ** -0.5)
    place = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    key = torch.arange(k.shape[1])
    left, right = window_size
    hidden = torch.zeros_like(scores[0, 0], dtype=torch.bool)
    if causal:
        hidden |= key > place
    if left >= 0:
        hidden |= key < place - left
    if right >= 0:
        hidden |= key > place + right
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhtn,bnhd->bthd", weights, v.double()).to(q.dtype)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """The same within each of several sequences laid end to end: q [sum T, H, D], k and v [sum N, G, D]."""
    assert block_table is None
    borders = zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], cu_seqlens_k.tolist(), cu_seqlens_k.tolist()[1:], strict=False)
    output = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for q0, q1, k0, k1 in borders:
        if q1 > q0:
            part = flash_attn_func(
                q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
            )
            output = torch.cat([output[:q0], part[0], output[q1:]])
    return output


@contextmanager
def flash_on_cpu() -> Iterator[None]:
    """Within, transformers' `flash_attention_forward` calls these functions in place of a package's or a kernel's."""
    functions = (flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input)
    with (
        patch.object(utils, "_lazy_imports", lambda *args, **kwargs: functions),
        patch.object(utils, "_loaded_implementation", None),
    ):
        yield
    utils._loaded_implementation = None
