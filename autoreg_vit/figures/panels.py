"""What all pictures of images are made of: a palette, a grid of panels, images, segments and their outlines."""

import textwrap
from typing import Any, cast

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ..data.transforms import ImageSpec

#: Colours of the order of prediction, from first (blue) to last (red); turbo without its dark ends.
COLOURS = LinearSegmentedColormap.from_list('order', matplotlib.colormaps['turbo'](np.linspace(0.07, 0.93, 256)))
#: Colours of attention and error, from little (dark) to much (bright).
HEAT = matplotlib.colormaps['inferno']
INK, MUTED = '#1f2328', '#59636e'
#: Tokens that are not there yet.
EMPTY = (0.84, 0.86, 0.89)
#: Resolution of every picture, in dots an inch; of a width that README pages show at about half.
DPI = 150
# Inches.
_WIDTH, _NARROWEST, _MARGIN, _GAP, _LABEL = 11.0, 6.0, 0.12, 0.07, 0.24


def panel_grid(
        rows: int, columns: int, size: tuple[int, int], title: str, model: str, caption: str = '', *,
        every_row: bool = False, beside: bool = False, widest: float = 1.8,
) -> tuple[Figure, np.ndarray]:
    """A figure of panels without axes, under a heading and over a caption, and its axes [rows, columns].

    Args:
        size: Height and width of the images, in any unit: the shape of a panel.
        model: What model the picture is of, below the heading.
        every_row: Leave room for `label_panel` over every row, not over the first alone.
        beside: Leave room for `label_row` at the left.
        widest: Largest width of a panel, in inches.
    """
    ratio = size[0] / size[1]
    left = _MARGIN + (0.25 if beside else 0)
    between = _GAP + (_LABEL if every_row else 0)
    rest = left + _MARGIN + (columns - 1) * _GAP
    widest = min(max(widest, (_NARROWEST - rest) / columns), 2.6)  # few panels may be larger
    width = min(widest, (_WIDTH - rest) / columns, 1.3 * widest / ratio)
    height = width * ratio
    total_width = max(columns * width + rest, _NARROWEST)
    # At 9 points a character is about 0.066 inches wide.
    characters = int((total_width - 2 * _MARGIN) / 0.066)
    model_lines, caption_lines = textwrap.wrap(model, characters), textwrap.wrap(caption, characters)
    top = 0.38 + 0.17 * len(model_lines)
    bottom = 0.1 + (0.08 + 0.17 * len(caption_lines) if caption_lines else 0)
    total_height = top + _LABEL + rows * height + (rows - 1) * between + bottom
    figure = Figure(figsize=(total_width, total_height), facecolor='white', dpi=DPI)
    x = _MARGIN / total_width
    figure.text(x, 1 - 0.1 / total_height, title, ha='left', va='top', fontsize=12, fontweight='bold', color=INK)
    for y, side, lines in ((1 - 0.34 / total_height, 'top', model_lines),
                           (0.1 / total_height, 'bottom', caption_lines)):
        figure.text(x, y, '\n'.join(lines), ha='left', va=side, fontsize=9, color=MUTED, linespacing=1.35)
    axes = np.empty((rows, columns), dtype=object)
    for row in range(rows):
        y = total_height - top - _LABEL - (row + 1) * height - row * between
        for column in range(columns):
            x = left + column * (width + _GAP)
            axes[row, column] = figure.add_axes(
                (x / total_width, y / total_height, width / total_width, height / total_height))
            axes[row, column].set_axis_off()
    return figure, axes


def label_panel(axis: Axes, text: str) -> None:
    """A heading over a panel."""
    axis.set_title(text, fontsize=9, color=INK, y=1, pad=3)  # a given y spares the search for one


def label_row(axis: Axes, text: str) -> None:
    """A heading beside the first panel of a row."""
    axis.text(-0.04, 0.5, text, transform=axis.transAxes, ha='right', va='center', rotation=90, fontsize=9, color=INK)


def note(axis: Axes, text: str) -> None:
    """A few words in a panel's lower right corner."""
    axis.text(0.97, 0.04, text, transform=axis.transAxes, ha='right', va='bottom', fontsize=8.5, color='white',
              path_effects=[withStroke(linewidth=1.8, foreground=INK)])


def order_legend(figure: Figure) -> None:
    """What the colours of segments mean, at the upper right."""
    width, height = figure.get_size_inches()
    bar = figure.add_axes((1 - (_MARGIN + 1.42) / width, 1 - 0.28 / height, 1.0 / width, 0.12 / height))
    bar.imshow(np.linspace(0, 1, 128)[None], cmap=COLOURS, aspect='auto')
    bar.set_axis_off()
    for x, text, side in ((-0.06, 'predicted first', 'right'), (1.06, 'last', 'left')):
        bar.text(x, 0.5, text, transform=bar.transAxes, ha=side, va='center', fontsize=9, color=MUTED)


def displayed(image: torch.Tensor, spec: ImageSpec) -> np.ndarray:
    """A normalised image [C, H, W] as RGB, uint8 [H, W, 3]; pixels that are NaN have the colour EMPTY."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    pixels = (image.detach().float().cpu() * std + mean).clamp(0, 1).expand(3, -1, -1)
    pixels = torch.where(pixels.isnan(), torch.tensor(EMPTY).view(3, 1, 1), pixels)
    return (255 * pixels).round().byte().permute(1, 2, 0).numpy()


def show_image(axis: Axes, image: torch.Tensor, spec: ImageSpec) -> None:
    """Draw a normalised image [C, H, W]; pixels that are NaN are left grey. Small images show their pixels."""
    show_pixels(axis, displayed(image, spec))


def show_pixels(axis: Axes, pixels: np.ndarray, **options: Any) -> None:
    """Draw pixels, values [H, W] or uint8 RGB [H, W, 3]."""
    height, width = pixels.shape[:2]
    axis.imshow(pixels, interpolation='nearest' if max(height, width) <= 96 else 'antialiased',
                extent=(0, width, height, 0), **options)
    axis.set_axis_off()


def show_ranks(axis: Axes, ranks: np.ndarray) -> None:
    """Colour tokens by rank, int64 [rows, columns], over what `show_image` has drawn, and outline and number segments
    where they are few."""
    count = ranks.max() + 1
    width, height = _extent(axis)
    axis.imshow(COLOURS((ranks + 0.5) / count), alpha=0.55, extent=(0, width, height, 0), interpolation='nearest')
    if count > 32:
        return
    _add_lines(axis, boundaries(ranks), ranks.shape, color='white', linewidth=1.1, alpha=0.9)
    if count > 16:
        return
    scale = np.array([height / ranks.shape[0], width / ranks.shape[1]])
    size = np.clip(0.7 * _token(axis, ranks.shape[1]), 6.5, 10)
    for rank in range(count):
        y, x = _middle(ranks == rank) * scale
        axis.text(x, y, str(rank + 1), ha='center', va='center', fontsize=size, color='white', fontweight='bold',
                  path_effects=[withStroke(linewidth=1.8, foreground=INK)])


def outline(axis: Axes, member: np.ndarray, colour: tuple | str) -> list:
    """Frame the tokens of `member` [rows, columns] on an image; returns what was drawn, to remove it again."""
    lines = [tuple((x - 1, y - 1) for x, y in line) for line in boundaries(np.pad(member, 1))]
    width = np.clip(0.16 * _token(axis, member.shape[1]), 1, 2)
    return [_add_lines(axis, lines, member.shape, color='white', linewidth=1.8 * width, clip_on=False),
            _add_lines(axis, lines, member.shape, color=colour, linewidth=width, clip_on=False)]


def boundaries(labels: np.ndarray) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where labels [rows, columns] of neighbours differ: lines from (x, y) to (x, y), in tokens."""
    below = [((x, y + 1), (x + 1, y + 1)) for y, x in np.argwhere(labels[:-1] != labels[1:]).tolist()]
    right = [((x + 1, y), (x + 1, y + 1)) for y, x in np.argwhere(labels[:, :-1] != labels[:, 1:]).tolist()]
    return below + right


def _add_lines(axis: Axes, lines: list, grid: tuple[int, ...], **style: Any) -> LineCollection:
    width, height = _extent(axis)
    scale = np.array([width / grid[1], height / grid[0]])
    drawn = LineCollection([np.array(line) * scale for line in lines], capstyle='projecting', **style)
    axis.add_collection(drawn, autolim=False)
    return drawn


def _middle(member: np.ndarray) -> np.ndarray:
    """The point (y, x), in tokens, nearest to the centre of `member` [rows, columns] and well inside it: the middle of
    a token, or where members alone meet."""
    rows, columns = (np.arange(2 * n - 1) for n in member.shape)  # in half tokens
    top, bottom, left, right = rows // 2, (rows + 1) // 2, columns // 2, (columns + 1) // 2
    inside = np.logical_and.reduce([member[np.ix_(y, x)] for y in (top, bottom) for x in (left, right)])
    points = (np.argwhere(inside) + 1) / 2
    centre = np.argwhere(member).mean(0) + 0.5
    return points[np.square(points - centre).sum(1).argmin()]


def _token(axis: Axes, columns: int) -> float:
    """Width of a token on the axes, in points."""
    return axis.get_position().width * cast(Figure, axis.figure).get_figwidth() * 72 / columns


def _extent(axis: Axes) -> tuple[float, float]:
    """Width and height of the image on the axes, in its pixels."""
    _, width, height, _ = axis.images[0].get_extent()
    return width, height
