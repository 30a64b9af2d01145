"""Pictures of a run: the loss, the serialization, and what the model predicts."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ..models import AutoregressiveViT
from ..models.decoders import MaskedDecoder, ParallelDecoder
from ..models.targets import unpatchify
from .data import ImageSpec

COLOURS = matplotlib.colormaps['turbo']


def loss_figure(log: Sequence[dict], path: Path) -> None:
    """Loss against images seen and, where the run has labels, accuracies before and after training.

    Args:
        log: Lines of log.jsonl: training lines have 'loss' and 'images', evaluation lines 'knn' and 'linear'.
        path: File to write.
    """
    steps = [line for line in log if line.get('event') == 'step']
    evaluations = [line for line in log if 'linear' in line]
    figure = Figure(figsize=(9 if evaluations else 5.5, 3.6), layout='constrained')
    axes = figure.subplots(1, 2 if evaluations else 1, squeeze=False)[0]
    seen = np.array([line['images'] for line in steps])
    axes[0].plot(seen, [line['loss'] for line in steps], color='C0')
    axes[0].set(xlabel='images seen', ylabel='loss (mean squared error)', title='Pretraining loss')
    axes[0].grid(alpha=0.3)
    if evaluations:
        for colour, metric in (('C1', 'linear'), ('C2', 'knn')):
            points = [(line['images'], line[metric]) for line in evaluations]
            axes[1].plot(*zip(*points), 'o-', color=colour, label={'knn': 'kNN'}.get(metric, metric))
            for x, y in (points[0], points[-1]):
                axes[1].annotate(f'{y:.1f}', (x, y), textcoords='offset points', xytext=(0, 6), ha='center')
        axes[1].margins(0.12)
        axes[1].set(xlabel='images seen (0: untrained encoder)', ylabel='accuracy (%)', title='Frozen features')
        axes[1].legend()
        axes[1].grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def serialization_figure(model: AutoregressiveViT, images: torch.Tensor, spec: ImageSpec, path: Path) -> None:
    """An image, its segments coloured and numbered in the order of prediction, for several draws.

    Args:
        model: Gives the serialization.
        images: [B, C, H, W], normalised; the first two are shown.
        spec: Undoes the normalisation.
        path: File to write.
    """
    draws, rows = 5, min(2, len(images))
    grid = model.serialization.grid
    figure = Figure(figsize=(1.9 * (draws + 1), 1.9 * rows + 0.5), layout='constrained')
    axes = figure.subplots(rows, draws + 1, squeeze=False)
    figure.suptitle(f'{_describe(model)}: tokens of one colour and number are predicted together', fontsize=10)
    for row in range(rows):
        show_image(axes[row, 0], images[row], spec)
        for column, ranks in enumerate(model.draw_ranks(draws).view(draws, *grid), start=1):
            show_image(axes[row, column], images[row], spec)
            show_ranks(axes[row, column], ranks.numpy())
    axes[0, 0].set_title('image', fontsize=9)
    for column in range(1, draws + 1):
        axes[0, column].set_title(f'draw {column}', fontsize=9)
    figure.savefig(path, dpi=130)


@torch.no_grad()
def reconstruction_figure(model: AutoregressiveViT, images: torch.Tensor, spec: ImageSpec, path: Path) -> None:
    """Images, their segments, the predictions as the order unfolds, and the targets.

    Every token is predicted from the true pixels of the segments before its own. Patch-normalised predictions are
    shown with the true mean and variance of each patch, and the caption says so.

    Args:
        model: A pretraining model.
        images: [B, C, H, W], normalised; up to six are shown.
        spec: Undoes the normalisation.
        path: File to write.
    """
    was_training = model.training
    model.eval()
    images = images[:6]
    device = next(model.parameters()).device
    out = model(images.to(device))
    model.train(was_training)
    grid, target = model.serialization.grid, model.target
    pred = target.to_pixels(out.pred.float(), images.to(device)).cpu()
    truth = target.pixels(images)
    ranks = out.ranks.cpu()
    stages = (0.25, 0.5, 0.75, 1.0)
    titles = ['image', 'order', *(f'{stage:.0%} of tokens predicted' if stage < 1 else 'all predicted'
                                  for stage in stages), 'target' + (' (blurred)' if target.blur else '')]
    figure = Figure(figsize=(1.5 * len(titles), 1.5 * len(images) + 0.7), layout='constrained')
    axes = figure.subplots(len(images), len(titles), squeeze=False)
    caption = 'each token predicted from the true pixels of earlier segments'
    if model.first_segment == 'self' and isinstance(model.decoder, MaskedDecoder | ParallelDecoder):
        caption += ', of the first segment from its own'
    if target.norm_pix:
        caption += '; patch-normalised predictions shown with the true mean and variance of each patch'
    figure.suptitle(f'{_describe(model)}\n{caption}', fontsize=9)
    for row, image in enumerate(images):
        show_image(axes[row, 0], image, spec)
        show_image(axes[row, 1], image, spec)
        show_ranks(axes[row, 1], ranks[row].view(grid).numpy())
        by_rank = ranks[row].sort().values
        for column, stage in enumerate(stages, start=2):
            # The whole segment that holds the token at this point of the order.
            last = by_rank[max(int(stage * len(by_rank)) - 1, 0)]
            hidden = ranks[row] > last
            show_image(axes[row, column], unpatchify(pred[row:row + 1], grid, target.patch_size)[0], spec,
                  hidden.view(grid).numpy())
        show_image(axes[row, len(titles) - 1], unpatchify(truth[row:row + 1], grid, target.patch_size)[0], spec)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=7)
    figure.savefig(path, dpi=130)


class LossByRank(NamedTuple):
    """How hard each segment is to predict, by its place in the order.

    mean: Mean squared error of the tokens of each rank, in the target's units, float64 [ranks].
    error: Standard error of that mean over images, float64 [ranks].
    tokens: Tokens of each rank, int64 [ranks].
    """
    mean: torch.Tensor
    error: torch.Tensor
    tokens: torch.Tensor


@torch.no_grad()
def loss_by_rank(model: AutoregressiveViT, images: torch.Tensor, batch_size: int = 64) -> LossByRank:
    """The loss of `images` [B, C, H, W], normalised, taken apart by rank, with orders drawn anew."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    losses, ranks = [], []
    for part in images.split(batch_size):
        out = model(part.to(device))
        losses.append((out.pred.double() - out.target.double()).square().mean(-1).cpu())  # [B, N]
        ranks.append(out.ranks.cpu())
    model.train(was_training)
    losses, ranks = torch.cat(losses), torch.cat(ranks)
    shape = (len(losses), int(ranks.max()) + 1)
    sums = torch.zeros(shape, dtype=torch.float64).scatter_add_(1, ranks, losses)
    tokens = torch.zeros(shape, dtype=torch.int64).scatter_add_(1, ranks, torch.ones_like(ranks))
    mean = sums.sum(0) / tokens.sum(0)
    # Of a ratio of sums: images count by the tokens they have of a rank.
    residual = (sums - mean * tokens).square().sum(0).sqrt()
    return LossByRank(mean, residual / tokens.sum(0), tokens.sum(0))


def loss_by_rank_figure(model: AutoregressiveViT, by_rank: LossByRank, path: Path) -> None:
    """Loss against the place in the order of prediction: how hard early and late segments are.

    Args:
        model: Names the order and the target.
        by_rank: What `loss_by_rank` gives.
        path: File to write.
    """
    figure = Figure(figsize=(6, 3.8), layout='constrained')
    axes = figure.subplots()
    mean, error = by_rank.mean.numpy(), by_rank.error.numpy()
    places = np.arange(1, len(mean) + 1)
    axes.fill_between(places, mean - 2 * error, mean + 2 * error, color='C0', alpha=0.25, linewidth=0)
    axes.plot(places, mean, 'o-' if len(mean) <= 32 else '-', color='C0', markersize=4)
    average = float((by_rank.mean * by_rank.tokens).sum() / by_rank.tokens.sum())
    axes.axhline(average, color='0.5', linewidth=1, linestyle='--')
    axes.annotate(f'all tokens {average:.3f}', (1, average), xycoords=('axes fraction', 'data'), xytext=(-4, 3),
                  textcoords='offset points', ha='right', fontsize=8, color='0.4')
    units = 'normalised patches' if model.target.norm_pix else 'normalised pixels'
    axes.set(xlabel='segment, in the order of prediction', ylabel=f'mean squared error ({units})')
    title = f'{_describe(model)}: loss by place in the order'
    if model.first_segment == 'self' and isinstance(model.decoder, MaskedDecoder | ParallelDecoder):
        title += '\n(the first segment is predicted from its own encoding; band: two standard errors)'
    else:
        title += '\n(band: two standard errors)'
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def confusion_figure(confusion: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """How often images of each class are taken for each other class, in percent of the true class.

    Args:
        confusion: Images, int64 [classes, classes]: rows the true class, columns the predicted one.
        classes: Their names.
        path: File to write.
    """
    percent = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = 2.2 + 0.5 * len(classes)
    figure = Figure(figsize=(side, side), layout='constrained')
    axes = figure.subplots()
    axes.imshow(percent, cmap='Blues', vmin=0, vmax=100)
    places = range(len(classes))
    axes.set_xticks(places, classes, rotation=45, ha='right')
    axes.set_yticks(places, classes)
    axes.set(xlabel='predicted', ylabel='true class')
    right = 100 * np.trace(confusion) / max(confusion.sum(), 1)
    axes.set_title(f'{right:.1f} % of {confusion.sum():,} test images right; cells: percent of the true class',
                   fontsize=9)
    for row in places:
        for column in places:
            if percent[row, column] >= 0.5:
                axes.text(column, row, f'{percent[row, column]:.0f}', ha='center', va='center', fontsize=8,
                          color='white' if percent[row, column] > 50 else 'black')
    figure.savefig(path, dpi=130)


def _describe(model: AutoregressiveViT) -> str:
    order = model.serialization
    return order.name + (' ' + ' → '.join(map(str, order.segments)) if order.segments else '') + (
        ', shuffled' if order.shuffle else '')


def show_image(axis, image: torch.Tensor, spec: ImageSpec, hidden: np.ndarray | None = None) -> None:
    """Draw a normalised image [C, H, W]; tokens of `hidden` [rows, columns] are left grey."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    pixels = (image.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    if hidden is not None:
        mask = np.kron(hidden, np.ones((pixels.shape[0] // hidden.shape[0], pixels.shape[1] // hidden.shape[1])))
        pixels = np.where(mask[..., None] > 0, 0.85, pixels)
    axis.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap='gray', vmin=0, vmax=1,
                extent=(0, 1, 1, 0))
    axis.set_axis_off()


def show_ranks(axis, ranks: np.ndarray) -> None:
    """Colour tokens by rank and number segments at their centres, over an image drawn on the unit square."""
    rows, columns = ranks.shape
    count = ranks.max() + 1
    axis.imshow(COLOURS((ranks + 0.5) / count), alpha=0.6, extent=(0, 1, 1, 0), interpolation='nearest')
    if count > 16:
        return
    y, x = (np.indices(ranks.shape) + 0.5) / np.array([rows, columns]).reshape(2, 1, 1)
    for rank in range(count):
        member = ranks == rank
        # The token nearest to the centre, which lies inside even where a segment is curved.
        distance = (y - y[member].mean()) ** 2 + (x - x[member].mean()) ** 2
        at = np.unravel_index(np.where(member, distance, np.inf).argmin(), ranks.shape)
        axis.text(x[at], y[at], str(rank + 1), ha='center', va='center', fontsize=7, color='white', fontweight='bold',
                  path_effects=[withStroke(linewidth=1.5, foreground='black')])
