"""The specification of `column_attention`: plain differentiable operations, on any device."""

from __future__ import annotations

import torch

from ..numerics import masked_softmax
from .call import ColumnCall


def column_maps_reference(call: ColumnCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, H, Q, E] and maps [B, C, W, Q]."""
    dtype = call.word_weights.dtype
    scores = call.scale * call.query.to(dtype) @ call.key.to(dtype).mT
    probabilities = masked_softmax(scores if call.bias is None else scores + call.bias)
    maps = call.word_weights[:, None] @ probabilities.mT
    if call.head_weights is not None:
        maps = torch.einsum("h,bhwq->bwq", call.head_weights, maps)[:, None]
    return (probabilities @ call.value.to(dtype)).to(call.query.dtype), maps
