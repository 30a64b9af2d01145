"""Layouts in which projections hand queries, keys and values to attention."""

import torch


def split(projections: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views q, k, v, each [B, N, H, D], of [q, k, v], of [q, kv] with kv [B, N, 2, H, D], or of [qkv] with
    qkv [B, N, 3, H, D]."""
    if len(projections) == 1:
        return projections[0].unbind(2)
    if len(projections) == 2:
        return projections[0], *projections[1].unbind(2)
    return tuple(projections)
