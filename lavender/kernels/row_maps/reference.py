"""The specification of `row_maps`: plain differentiable operations, on any device."""

from __future__ import annotations

import torch

from ..numerics import accumulator, masked_softmax
from .call import RowCall


def row_maps_reference(call: RowCall) -> torch.Tensor:
    """Maps [B, C, W, M]. Only the value of `call.lse` is used, not its gradient."""
    dtype = accumulator(call.query)
    keys = call.key.to(dtype).repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
    scores, bias = call.scale * call.gather_rows() @ keys.mT, call.visible_bias()
    scores = scores if bias is None else scores + bias
    probabilities = masked_softmax(scores)
    if call.lse is not None:  # the softmax's gradient with the value of the caller's normalizer
        normalized = (scores - call.lse[..., None]).exp().nan_to_num(0.0, posinf=0.0)
        probabilities = probabilities * (normalized / probabilities).detach().nan_to_num(0.0, posinf=0.0)
    column_index = call.columns.clamp_min(0)[:, None, None].expand(-1, *probabilities.shape[1:3], -1)
    kept = probabilities.gather(3, column_index) * (call.columns >= 0)[:, None, None].to(dtype)
    maps = call.indicator().detach()[:, None] @ kept
    return maps if call.head_weights is None else torch.einsum("h,bhwm->bwm", call.head_weights, maps)[:, None]
