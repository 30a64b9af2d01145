"""Average precision of boxes and masks, as COCO defines it."""

from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..data.boxes import Part, collate
from ..data.labelled import distinct
from ..data.loaders import own_part
from ..data.samples import Samples
from ..engine.machine import autocast
from ..engine.processes import Processes

#: What torchmetrics calls map, map_50, ...: COCO's AP, AP50, AP75, and APs, APm and APl, of objects below 32 x 32
#: pixels, up to 96 x 96, and above.
SCORES = {'ap': 'map', 'ap50': 'map_50', 'ap75': 'map_75', 'ap_small': 'map_small', 'ap_medium': 'map_medium',
          'ap_large': 'map_large'}
KINDS: dict[str, Literal['bbox', 'segm']] = {'box': 'bbox', 'mask': 'segm'}

Detections = dict[str, Any]


@torch.no_grad()
def evaluate(
        model: nn.Module, dataset: Samples, categories: dict[int, str], *, precision: str, workers: int,
        group: Processes,
) -> dict[str, Any]:
    """Detect on every image of `dataset`, of which every process sees its own part, each once, and score the result.

    Args:
        model: torchvision's Mask R-CNN, in evaluation.
        dataset: Gives what `CocoImages` gives.
        categories: Names by id, in the order of labels.

    Returns:
        On every process box_ap, mask_ap, box_ap50 and so on, in percent, of all `SCORES` for which there is an object;
        `per_class`, box_ap and mask_ap by name; how many `images`. On the main process besides `detections`, for each
        image in the order of `dataset` what was found: boxes float32 [n, 4], scores float32 [n], labels int64 [n], and
        masks as run lengths of COCO.
    """
    from torchmetrics.detection import MeanAveragePrecision

    # COCO's own thresholds: torchmetrics' default ones are rounded to float32, and an overlap of exactly 0.6 below 0.6.
    metric = MeanAveragePrecision(
        iou_type=tuple(KINDS.values()), iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(), class_metrics=True, backend='faster_coco_eval',
        sync_on_compute=False)
    metric.warn_on_many_detections = False
    detections: list[Detections] = []
    at_once = 1 if group.device.type == 'cpu' else 4
    for images, targets in own_part(dataset, at_once, workers=workers, collate=collate, group=group):
        with autocast(precision, group.device):
            outputs = model([image.to(group.device) / 255 for image in images])
        for output, target in zip(outputs, targets):
            output['masks'] = (output['masks'][:, 0] >= 0.5).to(torch.uint8)  # [n, H, W]
            output = {name: value.cpu() for name, value in output.items()}
            metric.update([output], [target])
            output['masks'] = encode_masks(output['masks'])
            detections.append(output)
    parts: list[Any] | None = group.gather((metric.metric_state, detections))
    if parts is not None:
        # Image i was on process i % world_size, so that interleaving gives the order of one process.
        for name in metric.metric_state:
            setattr(metric, name, _interleave([states[name] for states, _ in parts]))
        detections = _interleave([found for _, found in parts])
    scores = group.on_main(lambda: summary(metric.compute(), categories))
    return {**scores, 'images': len(dataset), 'detections': detections}


def encode_masks(masks: torch.Tensor) -> list[dict[str, Any]]:
    """Run lengths, as COCO's files of results have them, of masks uint8 [n, H, W]."""
    from faster_coco_eval.core import mask as coco_mask

    encoded = [coco_mask.encode(np.asfortranarray(mask)) for mask in masks.numpy()]
    return [{'size': list(code['size']), 'counts': code['counts'].decode('ascii')} for code in encoded]


def summary(scores: dict[str, torch.Tensor], categories: dict[int, str]) -> dict[str, Any]:
    """torchmetrics' scores in percent, under the names that `evaluate` gives; -1 there stands for nothing to find."""
    result: dict[str, Any] = {
        f'{kind}_{name}': 100 * scores[f'{prefix}_{key}'].item()
        for kind, prefix in KINDS.items() for name, key in SCORES.items() if scores[f'{prefix}_{key}'] >= 0}
    names, labels = distinct(list(categories.values())), scores['classes'].view(-1).tolist()
    result['per_class'] = {names[label - 1]: {} for label in labels}
    for kind, prefix in KINDS.items():
        for label, value in zip(labels, scores[f'{prefix}_map_per_class'].view(-1).tolist()):
            if value >= 0:
                result['per_class'][names[label - 1]][f'{kind}_ap'] = 100 * value
    return result


def coco_results(detections: list[Detections], dataset: Part) -> list[dict[str, Any]]:
    """What `evaluate` found on `dataset` in COCO's format of results, which pycocotools reads. It takes a detection's
    size from its box where there is one, so leave boxes out of what masks are scored by: their small, medium and large
    ones differ else."""
    identities = list(dataset.dataset.categories)
    results = []
    for index, found in zip(dataset.indices, detections):
        for (left, top, right, bottom), score, label, mask in zip(
                found['boxes'].tolist(), found['scores'].tolist(), found['labels'].tolist(), found['masks']):
            results.append({'image_id': dataset.dataset.ids[index], 'category_id': identities[label - 1],
                            'bbox': [left, top, right - left, bottom - top], 'score': score, 'segmentation': mask})
    return results


def _interleave(parts: list[list]) -> list:
    """Items of several processes in the order of the data set."""
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]
