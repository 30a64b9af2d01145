"""Charts of a run: its loss, by time and by place in the order, its confusions, and its mix of encoder blocks."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from ..evaluation.metrics import METRICS
from ..models import AutoregressiveViT
from ..models.decoders import MaskedDecoder, ParallelDecoder
from .panels import DPI, INK, MUTED
from .pictures import describe


def loss_figure(log: Sequence[dict], path: Path) -> None:
    """Loss against images seen and, where the run has labels, accuracies before and after training, from the lines of
    log.jsonl: training lines have 'loss' and 'images', evaluation lines 'knn' and 'linear'."""
    steps = [line for line in log if line.get('event') == 'step']
    evaluations = [line for line in log if 'linear' in line]
    figure = Figure(figsize=(9 if evaluations else 5.5, 3.6), layout='constrained')
    axes = figure.subplots(1, 2 if evaluations else 1, squeeze=False)[0]
    axes[0].plot([line['images'] for line in steps], [line['loss'] for line in steps], color='C0')
    axes[0].set(xlabel='images seen', ylabel='loss (mean squared error)', title='Pretraining loss')
    axes[0].grid(alpha=0.3)
    if evaluations:
        for colour, metric in (('C1', 'linear'), ('C2', 'knn')):
            points = [(line['images'], line[metric]) for line in evaluations]
            axes[1].plot(*zip(*points), 'o-', color=colour, label=METRICS[metric].label)
            for x, y in (points[0], points[-1]):
                axes[1].annotate(f'{y:.1f}', (x, y), textcoords='offset points', xytext=(0, 6), ha='center')
        axes[1].margins(0.12)
        axes[1].set(xlabel='images seen (0: untrained encoder)', ylabel='accuracy (%)', title='Frozen features')
        axes[1].legend()
        axes[1].grid(alpha=0.3)
    figure.savefig(path, dpi=130)


class LossByRank(NamedTuple):
    """How hard each segment is to predict, by its place in the order; a first segment that is given (AIM) has none."""
    mean: torch.Tensor  # squared error of the tokens of each rank, in the target's units, float64 [ranks]
    error: torch.Tensor  # standard error of that mean over images, float64 [ranks]
    tokens: torch.Tensor  # tokens of each rank, int64 [ranks]


@torch.no_grad()
def loss_by_rank(model: AutoregressiveViT, images: torch.Tensor, batch_size: int = 64) -> LossByRank:
    """The loss of `images` [B, C, H, W], normalised, taken apart by rank, with orders drawn anew."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    parts, orders = [], []
    for part in images.split(batch_size):
        out = model(part.to(device))
        parts.append((out.pred.double() - out.target.double()).square().mean(-1).cpu())  # [B, N]
        orders.append(out.ranks.cpu())
    model.train(was_training)
    losses, ranks = torch.cat(parts), torch.cat(orders)
    shape = (len(losses), int(ranks.max()) + 1)
    sums = torch.zeros(shape, dtype=torch.float64).scatter_add_(1, ranks, losses)
    tokens = torch.zeros(shape, dtype=torch.int64).scatter_add_(1, ranks, torch.ones_like(ranks))
    mean = sums.sum(0) / tokens.sum(0)
    # Of a ratio of sums: images count by the tokens they have of a rank.
    residual = (sums - mean * tokens).square().sum(0).sqrt()
    first = int(model.first_segment == 'given')
    return LossByRank(*(x[first:] for x in (mean, residual / tokens.sum(0), tokens.sum(0))))


def loss_by_rank_figure(model: AutoregressiveViT, by_rank: LossByRank, path: Path) -> None:
    """Loss against the place in the order of prediction: how hard early and late segments are."""
    figure = Figure(figsize=(6, 3.8), layout='constrained')
    axes = figure.subplots()
    mean, error = by_rank.mean.numpy(), by_rank.error.numpy()
    places = np.arange(1, len(mean) + 1) + (model.first_segment == 'given')
    axes.fill_between(places, mean - 2 * error, mean + 2 * error, color='C0', alpha=0.25, linewidth=0)
    axes.plot(places, mean, 'o-' if len(mean) <= 32 else '-', color='C0', markersize=4)
    average = float((by_rank.mean * by_rank.tokens).sum() / by_rank.tokens.sum())
    axes.axhline(average, color='0.5', linewidth=1, linestyle='--')
    axes.annotate(f'all tokens {average:.3f}', (1, average), xycoords=('axes fraction', 'data'), xytext=(-4, 3),
                  textcoords='offset points', ha='right', fontsize=8, color='0.4')
    units = 'normalised patches' if model.target.norm_pix else 'normalised pixels'
    axes.set(xlabel='segment, in the order of prediction', ylabel=f'mean squared error ({units})')
    seen = model.first_segment == 'self' and isinstance(model.decoder, MaskedDecoder | ParallelDecoder)
    note = 'the first segment is predicted from its own encoding; ' if seen else ''
    axes.set_title(f'{describe(model)}: loss by place in the order\n({note}band: two standard errors)', fontsize=9)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def confusion_figure(confusion: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """How often images of each class are taken for each other class, in percent of the true class, from `confusion`,
    images, int64 [classes, classes]: rows the true class, columns the predicted one."""
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
    axes.set_title(f'{right:.1f} % of {confusion.sum():,} images right; cells: percent of the true class', fontsize=9)
    for row in places:
        for column in places:
            if percent[row, column] >= 0.5:
                axes.text(column, row, f'{percent[row, column]:.0f}', ha='center', va='center', fontsize=8,
                          color='white' if percent[row, column] > 50 else 'black')
    figure.savefig(path, dpi=130)


def mix_figure(mix: np.ndarray, path: Path, name: str) -> None:
    """The learned mix W of encoder blocks that each decoder layer reads (RandSAC 4.2), [decoder layers, encoder
    blocks], of the model `name`."""
    layers, blocks = mix.shape
    largest = float(np.abs(mix).max())
    figure = Figure(figsize=(0.9 + max(0.52 * blocks, 6.5), 1.6 + 0.42 * layers), layout='constrained')
    axes = figure.subplots()
    axes.imshow(mix, cmap='RdBu_r', vmin=-largest, vmax=largest, aspect='auto')
    axes.set_xticks(range(blocks), map(str, range(1, blocks + 1)))
    axes.set_yticks(range(layers), map(str, range(1, layers + 1)))
    axes.tick_params(length=0, colors=MUTED, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set_xlabel('encoder block k', color=INK, fontsize=9)
    axes.set_ylabel('decoder layer l', color=INK, fontsize=9)
    for layer, row in enumerate(mix):
        for block, weight in enumerate(row):
            axes.text(block, layer, f'{weight:.2f}', ha='center', va='center', fontsize=8.5,
                      color='white' if abs(weight) > 0.6 * largest else INK)
    axes.set_title('What each decoder layer reads', loc='left', fontsize=12, fontweight='bold', color=INK, pad=36)
    axes.annotate(f'{name}\nW in Z$^l$ = Σ$_k$ W$_{{lk}}$ H$^k$, the learned mix of encoder blocks', (0, 1),
                  xycoords='axes fraction', xytext=(0, 7), textcoords='offset points', fontsize=9, color=MUTED,
                  linespacing=1.35)
    figure.savefig(path, dpi=DPI)


def learning_figure(runs: dict[str, Sequence[dict]], path: Path) -> None:
    """Loss and scores against images seen, from the lines of log.jsonl by the name of the run, one or several."""
    several = len(runs) > 1
    scores = [key for key, metric in METRICS.items()
              if metric.headline and any(key in line for lines in runs.values() for line in lines)]
    figure = Figure(figsize=(10, 3.8), layout='constrained')
    losses, right = figure.subplots(1, 2)
    for number, (name, lines) in enumerate(runs.items()):
        steps = [line for line in lines if line['event'] == 'step']
        losses.plot([line['images'] for line in steps], [line['loss'] for line in steps], color=f'C{number}',
                    label=name if several else None)
        evaluations = [line for line in lines if line['event'] == 'evaluation']
        for style, (key, marker) in enumerate(zip(scores, 'os^v')):
            points = [(line['images'], line[key]) for line in evaluations if key in line]
            if not points:
                continue
            label = f'{name}, {METRICS[key].label}' if several else METRICS[key].label
            right.plot(*zip(*points), marker=marker, linestyle=('-', '--', ':', '-.')[style],
                       color=f'C{number if several else style}', label=f'{label}: {points[-1][1]:.1f}')
    losses.set(xlabel='images seen', ylabel='loss', title='Training loss', ylim=(0, None))
    right.set(xlabel='images seen', ylabel='%', title='Evaluation, with the last score')
    for axis in (losses, right):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
