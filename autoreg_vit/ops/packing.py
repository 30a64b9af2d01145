"""Layouts in which projections hand queries, keys and values to attention: [q, k, v], [q, kv] with kv [B, N, 2, H, D],
or [qkv] with qkv [B, N, 3, H, D]."""

from collections.abc import Sequence

import torch


def split(projections: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views q, k and v, each [B, N, H, D]."""
    if len(projections) == 1:
        q, k, v = projections[0].unbind(2)
    elif len(projections) == 2:
        q, (k, v) = projections[0], projections[1].unbind(2)
    else:
        q, k, v = projections
    return q, k, v


def shapes(projections: Sequence[torch.Tensor]) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Shapes of q, k and v, without views of them, which autograd would have to record."""
    if len(projections) == 3:
        q, k, v = projections
        return q.shape, k.shape, v.shape
    batch, tokens, _, heads, width = projections[-1].shape
    packed = (batch, tokens, heads, width)
    return (packed if len(projections) == 1 else projections[0].shape), packed, packed
