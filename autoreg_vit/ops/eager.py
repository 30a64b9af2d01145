"""The oracle of segment attention: plain matrix products and a softmax, in any floating dtype."""

import torch


def segment_attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, limits: torch.Tensor, scale: float) -> torch.Tensor:
    """See `autoreg_vit.ops.segment_attention`; arguments are taken as already checked."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    scores = (q * scale) @ k.transpose(-2, -1)  # [B, H, Nq, Nk]
    hidden = torch.arange(k.shape[2], device=k.device) >= limits[:, None, :, None]
    # The lowest finite score, not -inf, so that a row that sees nothing has no NaN; elsewhere exp(lowest - maximum) is
    # an exact zero already. Both fills are in place: a step on a CPU is bound by memory here.
    scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
    x = scores.softmax(dim=-1) @ v  # [B, H, Nq, D]
    # Clearing the output of empty rows cuts their gradient too.
    return x.masked_fill_(limits[:, None, :, None] <= 0, 0).transpose(1, 2)
