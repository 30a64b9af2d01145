"""Pictures of segmentation: classes in colour over images."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch.nn.functional import interpolate

from ..data.transforms import ImageSpec
from .panels import displayed

#: Classes in a legend at most, the most frequent ones.
MOST = 20


def palette(classes: int) -> np.ndarray:
    """A colour for each class, float [classes, 3]: told apart easily up to twenty, spread over all hues beyond."""
    if classes <= 20:
        return matplotlib.colormaps['tab20'](np.arange(classes) if classes > 10 else 2 * np.arange(classes))[:, :3]
    hues = np.arange(classes) * 0.618034 % 1  # neighbours in number are far apart in hue
    return matplotlib.colors.hsv_to_rgb(np.stack([hues, *np.resize([(0.9, 0.5), (0.9, 0.9)], (classes, 2)).T], axis=1))


def predictions_figure(
        images: Sequence[torch.Tensor], truths: Sequence[torch.Tensor], predictions: Sequence[torch.Tensor],
        classes: Sequence[str], spec: ImageSpec, path: Path,
) -> None:
    """Images, their classes as annotated and as predicted, and what the colours mean.

    Args:
        images: float32 [C, h, w] each, normalised, which `spec` undoes.
        truths: int64 [H, W] each, negative where there is no class.
        predictions: int64 [H, W] each.
    """
    colours = palette(len(classes))
    figure = Figure(figsize=(11, 0.7 + sum(3.0 * i.shape[1] / i.shape[2] for i in images)), layout='constrained')
    axes = figure.subplots(len(images), 3, squeeze=False)
    for row, (image, truth, prediction) in zip(axes, zip(images, truths, predictions)):
        enlarged = interpolate(image[None].float(), size=truth.shape, mode='bilinear')[0]
        pixels = displayed(enlarged, spec) / 255
        for axis, labels in zip(row, (None, truth.cpu().numpy(), prediction.cpu().numpy())):
            over = 0 if labels is None else np.where((labels >= 0)[..., None], 0.65 * colours[labels.clip(0)], 0)
            axis.imshow(pixels if labels is None else 0.35 * pixels + over)
            axis.set_axis_off()
    for axis, title in zip(axes[0], ('image', 'annotated (dark: no class)', 'predicted')):
        axis.set_title(title, fontsize=10)
    shown = torch.cat([mask.cpu().flatten() for mask in (*truths, *predictions)])
    counts = np.bincount(shown[shown >= 0].numpy(), minlength=len(classes))
    legend = [n for n in np.sort(np.argsort(-counts)[:MOST]) if counts[n]]
    figure.legend(handles=[Patch(color=colours[n], label=classes[n]) for n in legend], loc='outside lower center',
                  ncols=min(len(legend), 7), fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)
