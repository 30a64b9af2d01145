"""How good a segmenter is: windows slide over whole images, and mIoU and pixel accuracy are counted at their size."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import interpolate, pad

from ..data.loaders import own_part
from ..data.samples import Samples
from ..engine.machine import autocast
from ..engine.processes import Processes
from ..models.dense.segmenter import IGNORED


class Windows(NamedTuple):
    """How windows slide over an image.

    Args:
        crop: Height and width of a window.
        stride: Pixels from one window to the next, down and to the right.
        batch_size: Windows of a forward pass, over all processes together.
    """
    crop: tuple[int, int]
    stride: tuple[int, int]
    batch_size: int


@torch.no_grad()
def sliding_logits(
        network: Callable[[torch.Tensor], torch.Tensor], images: list[torch.Tensor], windows: Windows, at_once: int,
) -> list[torch.Tensor]:
    """Logits of whole images, float32 [classes, H, W] each: the mean over all windows that see a pixel.

    Args:
        network: Windows [B, C, *crop] to logits [B, classes, *crop].
        images: [C, H, W] each, of any size. What a window has beyond a smaller one is zero.
        windows: How they slide; the last ones end where the image does.
        at_once: Windows of a forward pass of this process, of whichever images.
    """
    crop, stride = windows.crop, windows.stride
    places = [(number, top, left) for number, image in enumerate(images)
              for top in _starts(image.shape[1], crop[0], stride[0])
              for left in _starts(image.shape[2], crop[1], stride[1])]
    sums: dict[int, torch.Tensor] = {}
    counts = [image.new_zeros(image.shape[1:]) for image in images]
    for first in range(0, len(places), at_once):
        part = places[first:first + at_once]
        seen = [images[n][:, top:top + crop[0], left:left + crop[1]] for n, top, left in part]
        batch = torch.stack([pad(w, (0, crop[1] - w.shape[2], 0, crop[0] - w.shape[1])) for w in seen])
        for (n, top, left), window, logits in zip(part, seen, network(batch).float()):
            height, width = window.shape[1:]
            if n not in sums:
                sums[n] = logits.new_zeros(len(logits), *images[n].shape[1:])
            sums[n][:, top:top + height, left:left + width] += logits[:, :height, :width]
            counts[n][top:top + height, left:left + width] += 1
    return [sums[n] / count for n, count in enumerate(counts)]


def _starts(length: int, crop: int, stride: int) -> list[int]:
    last = max(length - crop, 0)
    return [min(i * stride, last) for i in range(math.ceil(last / stride) + 1)]


def predict(
        network: Callable[[torch.Tensor], torch.Tensor], images: Sequence[torch.Tensor],
        sizes: Sequence[tuple[int, ...]], windows: Windows, *, precision: str, group: Processes,
) -> list[torch.Tensor]:
    """Classes of images' pixels, int64 [H, W] each, on the device.

    Args:
        network: In evaluation mode.
        images: float32 [C, h, w] each.
        sizes: The height and width H, W of each, at which to predict.
        group: Gives the device, and shares out the windows of a forward pass.
    """
    with autocast(precision, group.device):
        found = sliding_logits(network, [image.to(group.device) for image in images], windows,
                               max(windows.batch_size // group.world_size, 1))
    predictions = []
    for logits, size in zip(found, sizes):
        if logits.shape[1:] != size:
            logits = interpolate(logits[None], size=size, mode='bilinear')[0]
        predictions.append(logits.argmax(0))
    return predictions


def evaluate(
        network: Callable[[torch.Tensor], torch.Tensor], dataset: Samples, classes: int, windows: Windows, *,
        precision: str, workers: int, group: Processes,
) -> dict[str, Any]:
    """mIoU and pixel accuracy over `dataset`, of which every process sees its own part of the images, each once.

    Args:
        network: In evaluation mode.
        dataset: Of images and masks, which may be of different sizes.

    Returns:
        On every process, in percent: miou, the mean over classes that are there or were predicted, pixel_accuracy, and
        iou [classes], 0 for those that are neither; besides how many `images`.
    """
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    shared: dict[str, Any] = dict(num_classes=classes, ignore_index=IGNORED, validate_args=False)
    scores = MetricCollection({
        'miou': MulticlassJaccardIndex(average='macro', **shared),
        'iou': MulticlassJaccardIndex(average='none', **shared),
        'pixel_accuracy': MulticlassAccuracy(average='micro', **shared),
    }).to(group.device)
    for batch in own_part(dataset, 4, workers=workers, collate=list, group=group):
        images, masks = zip(*batch)
        sizes = [tuple(mask.shape) for mask in masks]
        found = predict(network, images, sizes, windows, precision=precision, group=group)
        scores.update(torch.cat([prediction.flatten() for prediction in found]),
                      torch.cat([mask.flatten() for mask in masks]).to(group.device))
    result = {name: 100 * value.cpu().double() for name, value in scores.compute().items()}
    return {'miou': result['miou'].item(), 'pixel_accuracy': result['pixel_accuracy'].item(),
            'iou': result['iou'].tolist(), 'images': len(dataset)}
