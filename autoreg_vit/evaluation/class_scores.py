"""Accuracies of a classifier."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import accuracy
from torch.nn.functional import cross_entropy

from ..data.loaders import own_part
from ..data.samples import Samples
from ..engine.machine import autocast
from ..engine.processes import Processes
from .features import images_at_once


@torch.no_grad()
def evaluate(
        predict: Callable[[torch.Tensor], torch.Tensor], dataset: Samples, classes: int, *, precision: str,
        workers: int, group: Processes,
) -> dict[str, Any]:
    """Accuracies over `dataset`, of which every process sees its own part of the images, each once.

    Args:
        predict: Images [B, C, H, W] on the device to logits [B, classes].
        dataset: Of (image, label).

    Returns:
        On every process: top1 and, for more than five classes, top5 in percent, the mean cross entropy `loss`, how many
        `images`, and `confusion`, int64 [classes, classes], rows the true class, columns the predicted one.
    """
    # Counts as float64, exact below 2^53: the confusion matrix, then hits of top 1 and 5, loss and images.
    counts = torch.zeros(classes * classes + 4, dtype=torch.float64)
    for images, labels in own_part(dataset, images_at_once(group.device), workers=workers, group=group):
        with autocast(precision, group.device):
            logits = predict(images.to(group.device, non_blocking=True))
        logits = logits.float().cpu()
        hits = [a.item() * len(labels) / 100 for a in accuracy(logits, labels, topk=(1, 5))]
        counts[:-4] += torch.bincount(labels * classes + logits.argmax(1), minlength=classes * classes)
        counts[-4:] += torch.tensor([*hits, cross_entropy(logits, labels, reduction='sum'), len(labels)])
    if group.world_size > 1:
        dist.all_reduce(counts, group=group.control)
    top1, top5, loss, images = counts[-4:].tolist()
    result: dict[str, Any] = {'top1': 100 * top1 / images}
    if classes > 5:
        result['top5'] = 100 * top5 / images
    confusion = counts[:-4].view(classes, classes).long().numpy()
    return {**result, 'loss': loss / images, 'images': int(images), 'confusion': confusion}
