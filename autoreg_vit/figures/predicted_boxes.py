"""Pictures of detections."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ..data.boxes import Part, decode_mask
from ..evaluation.box_scores import Detections
from .panels import label_row, panel_grid, show_pixels


def detection_figure(dataset: Part, detections: list[Detections], path: Path, images: int = 4) -> None:
    """The first `images` with what is annotated on them, and below with what was found, as `evaluate` gives it: boxes,
    masks, classes, scores."""
    names, images = list(dataset.dataset.categories.values()), min(images, len(dataset))
    detections, text = detections[:images], 'of scores from 0.5 on, at most 20 an image'
    shown = [[i for i, score in enumerate(found['scores']) if score >= 0.5][:20] for found in detections]
    if not any(shown):  # an early detector is sure of nothing
        shown = [list(range(min(len(found['scores']), 3))) for found in detections]
        text = 'the three of highest score in each image, since none has 0.5' if any(shown) else 'nothing'
    figure, axes = panel_grid(2, images, (3, 4), 'Detections', 'Above what is annotated, crowds dashed; below what '
                              f'was found: {text}. A class has one colour.', beside=True, widest=2.6)
    for axis, heading in zip(axes[:, 0], ('annotated', 'found')):
        label_row(axis, heading)
    for column in range(images):
        image, target = dataset.read(column)
        for axis in axes[:, column]:
            show_pixels(axis, image.expand(3, -1, -1).permute(1, 2, 0).numpy())
        for box, label, mask, crowd in zip(target['boxes'], target['labels'], target['masks'], target['iscrowd']):
            draw_object(axes[0, column], box, int(label), names[label - 1], mask.numpy(), dashed=bool(crowd))
        found = detections[column]
        for i in reversed(shown[column]):
            label = int(found['labels'][i])
            draw_object(axes[1, column], found['boxes'][i], label, f'{names[label - 1]} {found["scores"][i]:.2f}',
                        decode_mask(found['masks'][i], *image.shape[1:]))
    figure.savefig(path)


def draw_object(axis: Axes, box: torch.Tensor, label: int, text: str, mask: np.ndarray, dashed: bool = False) -> None:
    """A box [4], left, top, right, bottom, with its mask [H, W] and a text, in the colour of the label."""
    colour = np.array(matplotlib.colormaps['hsv'](label * 0.618034 % 1))  # neighbours far apart
    left, top, right, bottom = box.tolist()
    layer = np.zeros((*mask.shape, 4))
    layer[mask > 0] = [*colour[:3], 0.45]
    axis.imshow(layer, extent=(0, mask.shape[1], mask.shape[0], 0), interpolation='nearest')
    axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.0,
                             linestyle='--' if dashed else '-'))
    axis.text(left, top, text, fontsize=5.5, color='white', ha='left', va='bottom', clip_on=True,
              bbox={'facecolor': colour, 'edgecolor': 'none', 'alpha': 0.85, 'pad': 0.6})
