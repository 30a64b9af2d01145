"""Recorded outputs: what weights give for images that a formula makes, to tell anywhere that they were loaded whole."""

from typing import Any

import torch
from torch import nn

from ..models.interface import encoder_of


def golden_images(channels: int, size: tuple[int, int], batch: int = 2) -> torch.Tensor:
    """Images [batch, channels, height, width] between -1 and 1, the same on every machine: value number i, counted in
    that order, is sin(0.7 i)."""
    count = batch * channels * size[0] * size[1]
    return torch.arange(count, dtype=torch.float64).mul(0.7).sin().float().view(batch, channels, *size)


@torch.no_grad()
def record(model: nn.Module) -> dict[str, Any]:
    """What an encoder or a pretraining model gives for `golden_images`, as plain numbers of six digits.

    Returns:
        `features`: pooled features [2, width] of the encoder. For a pretraining model also `loss` in raster order, one
        token a segment, and `pred`, the prediction [P * P * C] of the first image's last token, which depends on all
        others.
    """
    was_training = model.training
    model.eval()
    encoder = encoder_of(model)
    embed = encoder.patch_embed
    like = next(model.parameters())
    images = golden_images(embed.proj.in_channels, tuple(embed.img_size)).to(like.device)
    features = encoder.forward_head(encoder.forward_features(images), pre_logits=True)
    recorded = {'features': _plain(features)}
    if encoder is not model:
        ranks = torch.arange(embed.num_patches, device=like.device).expand(len(images), -1)
        output = model(images, ranks)
        recorded.update(loss=_plain(output.loss), pred=_plain(output.pred[0, -1]))
    model.train(was_training)
    return recorded


def deviation(recorded: dict[str, Any], expected: dict[str, Any]) -> float:
    """How far two records differ: the root mean square of the difference, relative to that of the expected values, in
    the entry where it is greatest; infinite where an entry is missing, of another shape or not finite."""
    if recorded.keys() != expected.keys():
        return float('inf')
    worst = 0.0
    for name, values in expected.items():
        a, b = (torch.tensor(v, dtype=torch.float64) for v in (recorded[name], values))
        if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
            return float('inf')
        worst = max(worst, ((a - b).norm() / b.norm().clamp_min(1e-12)).item())
    return worst


def _plain(values: torch.Tensor) -> Any:
    return [_plain(v) for v in values] if values.ndim else float(f'{values.item():.6g}')
