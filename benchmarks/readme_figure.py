"""The picture at the top of the README: four orders of prediction and the prefix that each token may attend to.

    python -m benchmarks.readme_figure
"""

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image

from autoreg_vit import serialization
from autoreg_vit.data.transforms import ImageSpec
from autoreg_vit.figures.panels import COLOURS, show_image, show_ranks

from .report import RESULTS

GRID = (14, 14)
ROWS = (
    ('raster\niGPT-style', {'name': 'raster'}),
    ('random\nSAIM', {'name': 'random'}),
    ('squares 49', {'name': 'squares', 'segments': 49}),
    ('blobs 11\nRandSAC, flat', {'name': 'blobs', 'segments': 11}),
    ('blobs 11 → 7 → 3\nRandSAC', {'name': 'blobs', 'segments': (11, 7, 3)}),
)


def main() -> None:
    photo = torch.from_numpy(load_sample_image('china.jpg').copy()).permute(2, 0, 1) / 255
    photo = F.interpolate(photo[None, :, :, 60:487], (224, 224), mode='bilinear', antialias=True)[0]
    spec = ImageSpec((224, 224), 3, (0.0,) * 3, (1.0,) * 3)
    figure = Figure(figsize=(1.75 * (len(ROWS) + 1), 4.2), layout='constrained')
    axes = figure.subplots(2, len(ROWS) + 1)
    show_image(axes[0, 0], photo, spec)
    axes[0, 0].set_title('image,\n14 × 14 tokens', fontsize=8)
    axes[1, 0].set_axis_off()
    axes[1, 0].text(
        0, 0.5, 'Tokens sorted by rank:\nrow i may attend to the\nfirst limits[i] columns.\n'
        'Every mask is a prefix;\nnone is stored.', fontsize=8, va='center')
    for column, (title, options) in enumerate(ROWS, start=1):
        generator = torch.Generator().manual_seed(3)
        ranks = serialization.Serialization(grid=GRID, **options)(1, generator=generator)
        show_image(axes[0, column], photo, spec)
        show_ranks(axes[0, column], ranks.view(GRID).numpy())
        axes[0, column].set_title(title, fontsize=8)
        _, ordered = serialization.sort_by_rank(ranks)
        limits = serialization.source_limits(ordered)[0]
        visible = torch.arange(len(limits)) < limits[:, None]
        colours = COLOURS((ordered[0].numpy() + 0.5) / (ordered.max().item() + 1))
        picture = torch.ones(len(limits), len(limits), 4)
        picture[visible] = torch.from_numpy(colours).float().expand(len(limits), -1, -1)[visible]
        axes[1, column].imshow(picture.numpy(), interpolation='nearest')
        axes[1, column].set(xticks=[], yticks=[])
    axes[1, 1].set_ylabel('queries in order', fontsize=7)
    axes[1, 1].set_xlabel('keys in order', fontsize=7)
    figure.savefig(RESULTS / 'orders.png', dpi=140)


if __name__ == '__main__':
    main()
