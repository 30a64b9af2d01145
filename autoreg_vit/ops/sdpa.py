"""Segment attention through torch.nn.functional.scaled_dot_product_attention with a boolean mask."""

import torch
import torch.nn.functional as F


def segment_attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, limits: torch.Tensor, scale: float) -> torch.Tensor:
    """See `autoreg_vit.ops.segment_attention`; arguments are taken as already checked."""
    empty = limits[:, None, :, None] <= 0
    visible = torch.arange(k.shape[1], device=k.device) < limits[:, None, :, None]  # [B, 1, Nq, Nk]
    # Backends disagree about rows that see nothing: let them see everything and clear the result.
    x = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible | empty, scale=scale)
    return x.masked_fill(empty, 0).transpose(1, 2)
