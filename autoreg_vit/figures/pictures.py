"""Pictures of a pretraining model's order and predictions; `reconstruct` computes what the others draw."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image

from ..data.transforms import ImageSpec
from ..models import AutoregressiveViT
from ..models.decoders import NextTokenDecoder
from ..models.targets import patchify, unpatchify
from .panels import (
    COLOURS,
    EMPTY,
    HEAT,
    INK,
    MUTED,
    displayed,
    label_panel,
    label_row,
    note,
    order_legend,
    outline,
    panel_grid,
    show_image,
    show_pixels,
    show_ranks,
)


def describe(model: AutoregressiveViT, name: str | None = None) -> str:
    """The model's name, by default timm's, and its order of prediction."""
    order = model.serialization
    segments = ' ' + ' → '.join(map(str, order.segments)) if order.segments else ''
    way = ''
    if order.shuffle:
        way = ', shuffled'
    if order.segment_order == 'raster':
        way += ' in raster order'
    return f'{name or model.pretrained_cfg["architecture"]}, {order.name}{segments}{way}'


@dataclass(frozen=True)
class Reconstruction:
    """Images and their predictions, token by token in raster order, in units of the normalised images.

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
    truth: torch.Tensor
    target: torch.Tensor
    given: torch.Tensor | None
    pred: torch.Tensor
    loss: torch.Tensor
    ranks: torch.Tensor
    first: int

    def segments(self, image: int) -> int:
        """Number of segments of an image."""
        return int(self.ranks[image].max()) + 1

    def steps(self, image: int, most: int) -> list[int]:
        """`most` ranks from the first that is predicted to the last, spread evenly; repeated where there are fewer."""
        return np.linspace(self.first, self.segments(image) - 1, most).round().astype(int).tolist()

    def step(self, image: int, number: int) -> torch.Tensor:
        """Patches [N, P * P * C] when rank `number` is predicted: true in the segments before, predicted in that one,
        NaN in those after."""
        return torch.where(self.ranks[image, :, None] < number, self.truth[image], self.predicted(image, number))

    def predicted(self, image: int, number: int) -> torch.Tensor:
        """Predictions [N, P * P * C] of the segments up to rank `number`, NaN in those after."""
        return torch.where(self.ranks[image, :, None] <= number, self.pred[image], torch.nan)


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
    target, pred = model.target, out.pred.float().cpu()
    pixels, first = target.pixels(images), int(model.first_segment == 'given')
    loss = (pred - out.target.float().cpu()).square().mean(-1)
    return Reconstruction(
        truth=patchify(images, target.patch_size),
        target=pixels,
        given=target.statistics(pixels)[0].expand_as(pixels) if target.norm_pix else None,
        pred=target.to_pixels(pred, images),
        loss=torch.where(ranks.cpu() < first, torch.nan, loss),
        ranks=ranks.cpu(),
        first=first,
    )


def conditions(model: AutoregressiveViT) -> str:
    """What predictions are made from and shown with, which a picture of them must say."""
    parts = ['Each segment is predicted from the true pixels of those before it']
    if model.first_segment == 'given':
        parts[0] += ', after a first one that is given'
    elif isinstance(model.decoder, NextTokenDecoder):
        parts[0] += ', the first from none'
    elif model.first_segment == 'self':
        parts[0] += ', the first from its own'
    else:
        parts[0] += ', the first from its place alone'
    if model.target.norm_pix:
        parts.append('Predictions are of normalised patches and shown with the true mean and variance of each patch')
    if model.target.blur is not None:
        size, sigma = model.target.blur
        parts.append(f'The target is the image under a Gaussian filter of {size} × {size} pixels, σ = {sigma:g}')
    return '. '.join(parts) + '.'


_FRAMED = 'Framed: the segment predicted at that step; around it the true pixels that it may be predicted from.'


def serialization_figure(
        model: AutoregressiveViT,
        images: torch.Tensor,
        spec: ImageSpec,
        path: Path,
        name: str | None = None,
) -> None:
    """Images and several draws of the model's order on each, segments coloured and numbered as they are predicted.

    Args:
        model: Gives the serialization.
        images: [B, C, H, W], normalised.
        spec: Undoes the normalisation.
        path: File to write.
        name: Of the model.
    """
    always_same = bool((model.draw_ranks(8) == model.draw_ranks(1)).all())
    draws = 1 if always_same else 5
    figure, axes = panel_grid(len(images), draws + 1, spec.size, 'Order of prediction', describe(model, name),
                              'Tokens of one colour are predicted together, from those of all earlier colours.')
    for row, image in enumerate(images):
        show_image(axes[row, 0], image, spec)
        for column, ranks in enumerate(model.draw_ranks(draws).view(draws, *model.serialization.grid), start=1):
            show_image(axes[row, column], image, spec)
            show_ranks(axes[row, column], ranks.numpy())
    label_panel(axes[0, 0], 'image')
    for column, axis in enumerate(axes[0, 1:], start=1):
        label_panel(axis, 'order' if always_same else f'draw {column}')
    order_legend(figure)
    figure.savefig(path)


def reconstruction_figure(
        model: AutoregressiveViT,
        images: torch.Tensor,
        spec: ImageSpec,
        path: Path,
        name: str | None = None,
        reconstruction: Reconstruction | None = None,
) -> None:
    """Images segment by segment, a row each: at every step the true pixels so far and, framed, the present prediction.

    Args:
        model: A pretraining model.
        images: [B, C, H, W], normalised.
        spec: Undoes the normalisation.
        path: File to write.
        name: Of the model.
        reconstruction: What `reconstruct` gives, computed where None.
    """
    done = reconstruction or reconstruct(model, images)
    shown = min(6, max(done.segments(i) - done.first for i in range(len(images))))
    figure, axes = panel_grid(
        len(images), shown + 3, spec.size, 'Reconstruction by segments', describe(model, name),
        f'{_FRAMED} {conditions(model)}', every_row=True)
    for row, image in enumerate(images):
        ranks, count = done.ranks[row].view(model.serialization.grid).numpy(), done.segments(row)
        show_image(axes[row, 0], image, spec)
        show_ranks(axes[row, 0], ranks)
        label_panel(axes[row, 0], 'order')
        for axis, number in zip(axes[row, 1:], sorted(set(done.steps(row, shown)))):
            show_image(axis, _image(model, done.step(row, number)), spec)
            outline(axis, ranks == number, COLOURS((number + 0.5) / count))
            label_panel(axis, f'{number + 1} of {count}')
        show_image(axes[row, -2], _image(model, done.pred[row]), spec)
        label_panel(axes[row, -2], 'all predictions')
        show_image(axes[row, -1], _image(model, done.target[row]), spec)
        label_panel(axes[row, -1], _target_heading(model))
    order_legend(figure)
    figure.savefig(path)


def reconstruction_film(
        model: AutoregressiveViT,
        images: torch.Tensor,
        spec: ImageSpec,
        path: Path,
        name: str | None = None,
        reconstruction: Reconstruction | None = None,
        most_frames: int = 36,
) -> None:
    """The steps of `reconstruction_figure` as an animated GIF, beside the predictions made so far and the target.

    Args:
        model: A pretraining model.
        images: [B, C, H, W], normalised.
        spec: Undoes the normalisation.
        path: File to write.
        name: Of the model.
        reconstruction: What `reconstruct` gives, computed where None.
        most_frames: Steps shown at most, evenly spread over the order.
    """
    done = reconstruction or reconstruct(model, images)
    counts = [done.segments(i) for i in range(len(images))]
    length = min(max(counts) - done.first, most_frames)
    headings = ('seen', 'predicted', _target_heading(model))
    text = 'Reconstruction by segments', describe(model, name), f'{_FRAMED} {conditions(model)}'
    if len(images) > 2:  # a column an image, else a row
        figure, axes = panel_grid(3, len(images), spec.size, *text, beside=True, widest=1.5)
        axes = axes.T
        for axis, heading in zip(axes[0], headings):
            label_row(axis, heading)
    else:
        figure, axes = panel_grid(len(images), 3, spec.size, *text, every_row=True)
        for row in axes:
            for axis, heading in zip(row, headings):
                label_panel(axis, heading)
    nothing = torch.full_like(done.truth[0], torch.nan)
    for row, target in zip(axes, done.target):
        for axis, patches in zip(row, (nothing, nothing, target)):
            show_image(axis, _image(model, patches), spec)
    order_legend(figure)
    figure.set_dpi(110)

    def draw(heading: str, row: int, seen: torch.Tensor, predicted: torch.Tensor) -> None:
        label_panel(axes[row, 0], heading)
        for axis, patches in zip(axes[row], (seen, predicted)):
            axis.images[0].set_data(displayed(_image(model, patches), spec))

    canvas, frames = FigureCanvasAgg(figure), []
    for numbers in zip(*(done.steps(i, length) for i in range(len(images)))):
        frame = []
        for row, (number, count) in enumerate(zip(numbers, counts)):
            draw(f'segment {number + 1} of {count}', row, done.step(row, number), done.predicted(row, number))
            ranks = done.ranks[row].view(model.serialization.grid).numpy()
            frame += outline(axes[row, 0], ranks == number, COLOURS((number + 0.5) / count))
        frames.append(_snapshot(canvas))
        for lines in frame:
            lines.remove()
    for row, count in enumerate(counts):
        draw(f'all {count} segments', row, done.truth[row], done.pred[row])
    frames.append(_snapshot(canvas))
    pace = int(np.clip(7000 / length, 90, 800)) // 10 * 10  # a GIF counts hundredths of a second
    frames = _share_palette(frames)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[pace] * length + [2500], loop=0,
                   optimize=False)


def comparison_figure(
        model: AutoregressiveViT,
        images: torch.Tensor,
        spec: ImageSpec,
        path: Path,
        name: str | None = None,
        reconstruction: Reconstruction | None = None,
) -> None:
    """Images beside their predictions, as in SAIM Figure 3: the order, what is predicted, what the display is given,
    the prediction, and the error of each token.

    Args:
        model: A pretraining model.
        images: [B, C, H, W], normalised.
        spec: Undoes the normalisation.
        path: File to write.
        name: Of the model.
        reconstruction: What `reconstruct` gives, computed where None.
    """
    done = reconstruction or reconstruct(model, images)
    grid = model.serialization.grid
    columns: list[tuple[str, torch.Tensor | None]] = [('image', done.truth), ('order', None)]
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
    figure, axes = panel_grid(len(images), len(columns) + 1, spec.size,
                              'Images and their predictions', describe(model, name),
                              caption.format(most) + conditions(model))
    for row in range(len(images)):
        for axis, (_, patches) in zip(axes[row], columns):
            show_image(axis, _image(model, (done.truth if patches is None else patches)[row]), spec)
            if patches is None:
                show_ranks(axis, done.ranks[row].view(grid).numpy())
        show_pixels(axes[row, -1], done.loss[row].view(grid).numpy(), cmap=HEAT, vmin=0, vmax=most)
        note(axes[row, -1], f'mean {done.loss[row].nanmean():.2f}')
    for axis, text in zip(axes[0], (*(text for text, _ in columns), 'error')):
        label_panel(axis, text)
    order_legend(figure)
    figure.savefig(path)


def _target_heading(model: AutoregressiveViT) -> str:
    return 'target' if model.target.blur is None else 'target, blurred'


def _image(model: AutoregressiveViT, patches: torch.Tensor) -> torch.Tensor:
    """Patches [N, P * P * C] as an image [C, H, W]."""
    return unpatchify(patches[None], model.serialization.grid, model.target.patch_size)[0]


def _snapshot(canvas: FigureCanvasAgg) -> Image.Image:
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _share_palette(frames: list[Image.Image]) -> list[Image.Image]:
    """RGB frames in one palette of 256 colours, so that nothing flickers: those of the drawing itself, and those found
    in the last frame, which has everything on it."""
    drawn = np.asarray(COLOURS(np.linspace(0, 1, 28)))[:, :3]
    own = np.array([to_rgb('white'), EMPTY, to_rgb(INK), to_rgb(MUTED), *drawn])
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
