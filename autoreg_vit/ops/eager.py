"""The oracle of segment attention: plain matrix products and a softmax, in any floating dtype."""

import torch


def segment_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        limits: torch.Tensor,
        scale: float,
) -> torch.Tensor:
    """See `autoreg_vit.ops.segment_attention`; arguments are taken as already checked."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    scores = (q * scale) @ k.transpose(-2, -1)  # [B, H, Nq, Nk]
    hidden = torch.arange(k.shape[2], device=k.device) >= limits[:, None, :, None]
    # The lowest finite score, not -inf: a row that sees nothing then has probabilities, which the second fill removes
    # together with their gradient, instead of NaN. Elsewhere exp(lowest - maximum) is an exact zero already.
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(dim=-1).masked_fill(limits[:, None, :, None] <= 0, 0)
    return (probabilities @ v).transpose(1, 2)
