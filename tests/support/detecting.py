"""Small detectors on COCO-like data, and COCO's own evaluation of what they find."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import timm
from torch import nn

pytest.importorskip('faster_coco_eval')
pytest.importorskip('torchmetrics')

from autoreg_vit.data.boxes import CocoImages, Part
from autoreg_vit.evaluation.box_scores import KINDS, SCORES
from autoreg_vit.models.dense.detector import ViTMaskRCNN
from autoreg_vit.settings.dense import DetectConfig

SMALL = {'embed_dim': 32, 'depth': 8, 'num_heads': 2, 'num_classes': 0, 'dynamic_img_size': True}


def images_of(root: Path, split: str) -> CocoImages:
    return CocoImages(root / split, root / 'annotations' / f'instances_{split}.json')


def everything(data: CocoImages, transform=None) -> Part:
    return Part(data, np.arange(len(data)), transform)


def small_detector(size: tuple[int, int] = (64, 64), **options) -> nn.Module:
    encoder = timm.create_model('vit_tiny_randsac', **SMALL)
    return ViTMaskRCNN(encoder, 2, size, **{
        'mean': (0.5,) * 3, 'std': (0.25,) * 3, 'window': 2, 'width': 16, 'rois': 16, 'norm': 'layer',
        'anchor_sizes': (8, 16, 32, 64, 128), **options})


def config_for(root: Path, **settings) -> DetectConfig:
    return DetectConfig(**{'weights': 'vit_tiny_randsac', 'data_dir': str(root), 'eval_split': 'val2017',
                           'precision': 'float32', 'workers': 0, **settings})


def pycocotools_scores(file: Path, results: list[dict], images: list[int]) -> dict[str, float]:
    """COCO's own evaluation of the same results against the file that the data came from; -100 for nothing to find."""
    coco_api = pytest.importorskip('pycocotools.coco', reason='compares with pycocotools')
    from pycocotools.cocoeval import COCOeval

    scores = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_api.COCO(str(file))
        for kind, iou_type in KINDS.items():
            # With boxes, it would take the size of masks from them.
            found = truth.loadRes([{k: v for k, v in r.items() if kind == 'box' or k != 'bbox'} for r in results])
            evaluation = COCOeval(truth, found, iou_type)
            evaluation.params.imgIds = images
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            scores |= {f'{kind}_{name}': 100 * value for name, value in zip(SCORES, evaluation.stats[:6].tolist())}
    return scores
