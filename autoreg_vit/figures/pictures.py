"""Pictures of a pretraining model's order and predictions; `reconstruct` computes what the others draw.

The functions that draw write to `path`. `spec` undoes the normalisation of images, `name` is the model's, by default
timm's.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from PIL import Image

from ..data.transforms import ImageSpec
from ..models import AutoregressiveViT
from ..models.decoders import NextTokenDecoder
from ..models.targets import patchify, unpatchify
from . import panels

#: Steps of a film at most.
MOST_FRAMES = 36


def describe(model: AutoregressiveViT, name: str | None = None) -> str:
    """The model's name, by default timm's, and its order of prediction."""
    order = model.serialization
    segments = ' ' + ' → '.join(map(str, order.segments)) if order.segments else ''
    way = ', shuffled' if order.shuffle else ' in raster order' if order.segment_order == 'raster' else ''
    return f'{name or model.pretrained_cfg["architecture"]}, {order.name}{segments}{way}'


@dataclass(frozen=True)
class Reconstruction:
    """Images and a model's predictions of them, token by token in raster order, in units of the normalised images.

    Attributes:
        truth: What the model reads, [B, N, P * P * C].
        target: What it is to predict, the same or blurred, [B, N, P * P * C].
        given: Mean of each patch of the target, which patch-normalised predictions are shown with, as pixels
            [B, N, P * P * C]; None for raw pixels.
        pred: Its predictions, each from the true pixels of the segments before its own, [B, N, P * P * C].
        loss: Mean squared error of each token in the target's own units, [B, N]; NaN for what is not predicted.
        ranks: Order of prediction, int64 [B, N].
        first: Rank of the first segment that is predicted: 1 where the first segment is given, else 0.
    """
    model: AutoregressiveViT
    truth: torch.Tensor
    target: torch.Tensor
    given: torch.Tensor | None
    pred: torch.Tensor
    loss: torch.Tensor
    ranks: torch.Tensor
    first: int

    @property
    def counts(self) -> list[int]:
        """Number of segments of each image."""
        return (self.ranks.amax(1) + 1).tolist()

    def steps(self, image: int, most: int) -> list[int]:
        """`most` ranks from the first that is predicted to the last, spread evenly; repeated where there are fewer."""
        return np.linspace(self.first, self.counts[image] - 1, most).round().astype(int).tolist()

    def step(self, image: int, number: int) -> torch.Tensor:
        """Patches [N, P * P * C] when rank `number` is predicted: true in the segments before, predicted in that one,
        NaN in those after."""
        return torch.where(self.ranks[image, :, None] < number, self.truth[image], self.predicted(image, number))

    def predicted(self, image: int, number: int) -> torch.Tensor:
        """Predictions [N, P * P * C] of the segments up to rank `number`, NaN in those after."""
        return torch.where(self.ranks[image, :, None] <= number, self.pred[image], torch.nan)

    def pixels(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches [N, P * P * C] as an image [C, H, W]."""
        return unpatchify(patches[None], self.model.serialization.grid, self.model.target.patch_size)[0]

    def on_grid(self, tokens: torch.Tensor) -> np.ndarray:
        """A value for each token, [N], as [rows, columns]."""
        return tokens.view(self.model.serialization.grid).numpy()

    def frame(self, axis: Axes, image: int, number: int) -> list[LineCollection]:
        """Outline the segment of rank `number` in its colour; returns what was drawn."""
        colour = panels.COLOURS((number + 0.5) / self.counts[image])
        return panels.outline(axis, self.on_grid(self.ranks[image]) == number, colour)


@torch.no_grad()
def reconstruct(model: AutoregressiveViT, images: torch.Tensor, ranks: torch.Tensor | None = None) -> Reconstruction:
    """Predict every segment of images [B, C, H, W], normalised, from the truth before it, in the order of `ranks`
    [B, N], drawn where None."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    if ranks is None:
        ranks = model.draw_ranks(len(images))
    out = model(images.to(device), ranks.to(device))
    model.train(was_training)
    target, pred, ranks = model.target, out.pred.float().cpu(), ranks.cpu()
    pixels, first = target.pixels(images), int(model.first_segment == 'given')
    given = target.statistics(pixels)[0].expand_as(pixels) if target.norm_pix else None
    loss = torch.where(ranks < first, torch.nan, (pred - out.target.float().cpu()).square().mean(-1))
    return Reconstruction(
        model, patchify(images, target.patch_size), pixels, given, target.to_pixels(pred, images), loss, ranks, first)


def conditions(model: AutoregressiveViT) -> str:
    """What predictions are made from and shown with, which a picture of them must say."""
    first = 'the first from its own' if model.first_segment == 'self' else 'the first from its place alone'
    if isinstance(model.decoder, NextTokenDecoder):
        first = 'the first from none'
    if model.first_segment == 'given':
        first = 'after a first one that is given'
    parts = [f'Each segment is predicted from the true pixels of those before it, {first}']
    if model.target.norm_pix:
        parts.append('Predictions are of normalised patches and shown with the true mean and variance of each patch')
    if model.target.blur is not None:
        size, sigma = model.target.blur
        parts.append(f'The target is the image under a Gaussian filter of {size} × {size} pixels, σ = {sigma:g}')
    return '. '.join(parts) + '.'


def _headings(model: AutoregressiveViT, name: str | None) -> tuple[str, str, str]:
    """Title, model and caption of pictures of reconstruction."""
    return 'Reconstruction by segments', describe(model, name), (
        'Framed: the segment predicted at that step; around it the true pixels that it may be predicted from. '
        + conditions(model))


def serialization_figure(
        model: AutoregressiveViT, images: torch.Tensor, spec: ImageSpec, path: Path, name: str | None = None,
) -> None:
    """Images [B, C, H, W], normalised, and several draws of the model's order on each, segments coloured and numbered
    as they are predicted."""
    always_same = bool((model.draw_ranks(8) == model.draw_ranks(1)).all())
    draws = 1 if always_same else 5
    figure, axes = panels.panel_grid(len(images), draws + 1, spec.size, 'Order of prediction', describe(model, name),
                                     'Tokens of one colour are predicted together, from those of all earlier colours.')
    for row, image in enumerate(images):
        panels.show_image(axes[row, 0], image, spec)
        for column, ranks in enumerate(model.draw_ranks(draws).view(draws, *model.serialization.grid), start=1):
            panels.show_image(axes[row, column], image, spec)
            panels.show_ranks(axes[row, column], ranks.numpy())
    panels.label_panel(axes[0, 0], 'image')
    for column, axis in enumerate(axes[0, 1:], start=1):
        panels.label_panel(axis, 'order' if always_same else f'draw {column}')
    panels.order_legend(figure)
    figure.savefig(path)


def reconstruction_figure(done: Reconstruction, spec: ImageSpec, path: Path, name: str | None = None) -> None:
    """Images by segments, a row each: at every step the true pixels so far and, framed, the present prediction."""
    shown = min(6, max(done.counts) - done.first)
    headings = _headings(done.model, name)
    figure, axes = panels.panel_grid(len(done.counts), shown + 3, spec.size, *headings, every_row=True)
    for row, (count, line) in enumerate(zip(done.counts, axes)):
        steps = sorted(set(done.steps(row, shown)))
        for axis, text, patches in [
            (line[0], 'order', done.truth[row]),
            *((axis, f'{number + 1} of {count}', done.step(row, number)) for axis, number in zip(line[1:], steps)),
            (line[-2], 'all predictions', done.pred[row]),
            (line[-1], _target_heading(done.model), done.target[row]),
        ]:
            panels.show_image(axis, done.pixels(patches), spec)
            panels.label_panel(axis, text)
        panels.show_ranks(line[0], done.on_grid(done.ranks[row]))
        for axis, number in zip(line[1:], steps):
            done.frame(axis, row, number)
    panels.order_legend(figure)
    figure.savefig(path)


def reconstruction_film(done: Reconstruction, spec: ImageSpec, path: Path, name: str | None = None) -> None:
    """The steps of `reconstruction_figure`, at most MOST_FRAMES spread evenly, as an animated GIF, beside the
    predictions made so far and the target."""
    images, length = len(done.counts), min(max(done.counts) - done.first, MOST_FRAMES)
    headings = ('seen', 'predicted', _target_heading(done.model))
    if images > 2:  # a column an image, else a row
        figure, axes = panels.panel_grid(3, images, spec.size, *_headings(done.model, name), beside=True, widest=1.5)
        axes = axes.T
        for axis, heading in zip(axes[0], headings):
            panels.label_row(axis, heading)
    else:
        figure, axes = panels.panel_grid(images, 3, spec.size, *_headings(done.model, name), every_row=True)
        for axis, heading in zip(axes.flat, headings * images):
            panels.label_panel(axis, heading)
    nothing = torch.full_like(done.truth[0], torch.nan)
    for row, target in zip(axes, done.target):
        for axis, patches in zip(row, (nothing, nothing, target)):
            panels.show_image(axis, done.pixels(patches), spec)
    panels.order_legend(figure)
    figure.set_dpi(110)

    def draw(heading: str, row: int, seen: torch.Tensor, predicted: torch.Tensor) -> None:
        panels.label_panel(axes[row, 0], heading)
        for axis, patches in zip(axes[row], (seen, predicted)):
            axis.images[0].set_data(panels.displayed(done.pixels(patches), spec))

    canvas, frames = FigureCanvasAgg(figure), []
    for numbers in zip(*(done.steps(i, length) for i in range(images))):
        outlines = []
        for row, number in enumerate(numbers):
            heading = f'segment {number + 1} of {done.counts[row]}'
            draw(heading, row, done.step(row, number), done.predicted(row, number))
            outlines += done.frame(axes[row, 0], row, number)
        frames.append(_snapshot(canvas))
        for lines in outlines:
            lines.remove()
    for row, count in enumerate(done.counts):
        draw(f'all {count} segments', row, done.truth[row], done.pred[row])
    frames.append(_snapshot(canvas))
    pace = int(np.clip(7000 / length, 90, 800)) // 10 * 10  # a GIF counts hundredths of a second
    frames = _share_palette(frames)
    durations = [pace] * length + [2500]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=False)


def comparison_figure(done: Reconstruction, spec: ImageSpec, path: Path, name: str | None = None) -> None:
    """Images beside their predictions, as in SAIM Figure 3: the order, what is predicted, what the display is given,
    the prediction, and the error of each token."""
    model = done.model
    columns = [('image', done.truth), ('order', done.truth)]
    if model.target.blur is not None:
        columns.append((_target_heading(model), done.target))
    if done.given is not None:
        columns.append(('mean of each patch', done.given))
    columns.append(('prediction', done.pred))
    units = 'normalised patches' if model.target.norm_pix else 'normalised pixels'
    caption = f'Error: mean squared error of each token, in {units}, from 0 (black) to {{:.2g}} and more (yellow). '
    if done.given is not None:
        caption += 'Means and variances are given to the display: what is learned is what the prediction adds to them. '
    if done.first:
        caption += 'White is given, not predicted. '
    most = max(float(done.loss.nanquantile(0.98)), 1e-12)
    figure, axes = panels.panel_grid(len(done.loss), len(columns) + 1, spec.size, 'Images and their predictions',
                                     describe(model, name), caption.format(most) + conditions(model))
    for row, (line, loss) in enumerate(zip(axes, done.loss)):
        for axis, (_, patches) in zip(line, columns):
            panels.show_image(axis, done.pixels(patches[row]), spec)
        panels.show_ranks(line[1], done.on_grid(done.ranks[row]))
        panels.show_pixels(line[-1], done.on_grid(loss), cmap=panels.HEAT, vmin=0, vmax=most)
        panels.note(line[-1], f'mean {loss.nanmean():.2f}')
    for axis, text in zip(axes[0], (*(text for text, _ in columns), 'error')):
        panels.label_panel(axis, text)
    panels.order_legend(figure)
    figure.savefig(path)


def _target_heading(model: AutoregressiveViT) -> str:
    return 'target' if model.target.blur is None else 'target, blurred'


def _snapshot(canvas: FigureCanvasAgg) -> Image.Image:
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _share_palette(frames: list[Image.Image]) -> list[Image.Image]:
    """RGB frames in one palette of 256 colours, so that nothing flickers: those of the drawing itself, and those found
    in the last frame, which has everything on it."""
    drawn = np.asarray(panels.COLOURS(np.linspace(0, 1, 28)))[:, :3]
    own = np.array([to_rgb('white'), panels.EMPTY, to_rgb(panels.INK), to_rgb(panels.MUTED), *drawn])
    own = (255 * own).round().astype(np.uint8)
    found = frames[-1].quantize(256 - len(own), Image.Quantize.MEDIANCUT).getpalette() or []
    palette = Image.new('P', (1, 1))
    palette.putpalette([*own.flatten().tolist(), *found])
    colours, shared = palette.getpalette() or [], []
    for frame in frames:
        indices, pixels = np.array(frame.quantize(palette=palette, dither=Image.Dither.NONE)), np.asarray(frame)
        for index in (0, 1):  # Pillow takes the nearest colour but roughly, which shows on plain areas
            indices[(pixels == own[index]).all(-1)] = index
        shared.append(Image.fromarray(indices))
        shared[-1].putpalette(colours)
    return shared
