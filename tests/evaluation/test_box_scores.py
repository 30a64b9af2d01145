"""Average precision of boxes and masks, against pycocotools."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip('faster_coco_eval')
pytest.importorskip('torchmetrics')

from autoreg_vit.data.boxes import CocoImages
from autoreg_vit.engine.processes import Processes
from autoreg_vit.evaluation.box_scores import KINDS, SCORES, coco_results, evaluate, summary
from tests.support.coco import CATEGORIES, write_coco
from tests.support.detecting import everything, images_of, pycocotools_scores, small_detector

CPU = Processes(torch.device('cpu'))
READING = dict(precision='float32', workers=0, group=CPU)


class Guesses(nn.Module):
    """Stands for a detector: what is annotated, shifted, some of it missed, some twice, some of another class."""

    def __init__(self, data: CocoImages, seed: int = 0):
        super().__init__()
        self.data, self.seed, self.at = data, seed, 0

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        self.at += len(images)
        return [self.guess(index) for index in range(self.at - len(images), self.at)]

    def guess(self, index: int) -> dict[str, torch.Tensor]:
        _, target = self.data[index]
        draw = torch.Generator().manual_seed(1000 * self.seed + index)
        keep = torch.rand(len(target['labels']), generator=draw) < 0.8
        chosen = keep.nonzero().flatten().tolist() * 2
        shift = torch.randint(-4, 5, (len(chosen), 2), generator=draw)
        masks = [target['masks'][i].roll(tuple(s), (0, 1)) for i, s in zip(chosen, shift.tolist())]
        masks = torch.stack(masks) if masks else target['masks'][:0]
        labels = target['labels'][chosen]
        odd = torch.rand(len(chosen), generator=draw) < 0.2
        return {'boxes': target['boxes'][chosen].float() + shift.flip(1).repeat(1, 2), 'masks': masks[:, None].float(),
                'labels': torch.where(odd, 3 - labels, labels),
                'scores': torch.rand(len(chosen), generator=draw).round(decimals=2)}


class TestEvaluation:
    @pytest.mark.parametrize('seed', [0, 1, 2])
    def test_equals_pycocotools(self, seed: int, tmp_path: Path):
        """On the same predictions, with crowds, images without objects, ties of scores and ids with gaps."""
        write_coco(tmp_path, 'val2017', 12, seed=seed, size=(150, 200))
        data = everything(images_of(tmp_path, 'val2017'))
        result = evaluate(Guesses(data.dataset, seed), data, data.dataset.categories, **READING)
        results = json.loads(json.dumps(coco_results(result['detections'], data)))
        expected = pycocotools_scores(tmp_path / 'annotations' / 'instances_val2017.json', results, data.dataset.ids)
        assert 5 < result['box_ap'] < 95 and result['images'] == 12
        for name, value in expected.items():
            assert result.get(name, -100) == pytest.approx(value, abs=1e-4), name
        assert set(result['per_class']) == {c['name'] for c in CATEGORIES}

    def test_two_categories_of_one_name(self):
        scores = {f'{p}_{k}': torch.tensor(0.5) for p in KINDS.values() for k in SCORES.values()}
        scores.update({'classes': torch.tensor([1, 2]), 'bbox_map_per_class': torch.tensor([0.2, 0.9]),
                       'segm_map_per_class': torch.tensor([0.1, -1.0])})
        assert {name: {k: round(v) for k, v in found.items()} for name, found in summary(
            scores, {3: 'dog', 7: 'dog'})['per_class'].items()} == {
                'dog': {'box_ap': 20, 'mask_ap': 10}, 'dog (2)': {'box_ap': 90}}

    def test_nothing_found(self, coco: Path):
        data = everything(images_of(coco, 'val2017'))
        model = small_detector().eval()
        model.roi_heads.score_thresh = 2.0
        result = evaluate(model, data, data.dataset.categories, **READING)
        assert result['box_ap'] == result['mask_ap'] == 0 and 'box_ap_large' not in result
        assert all(not len(found['boxes']) for found in result['detections']) and len(result['detections']) == 5
        assert coco_results(result['detections'], data) == []

    def test_what_is_annotated_is_perfect(self, coco: Path):
        class Oracle(Guesses):
            def guess(self, index: int) -> dict[str, torch.Tensor]:
                target = self.data[index][1]
                keep = target['iscrowd'] == 0
                return {**{k: target[k][keep] for k in ('boxes', 'labels')}, 'scores': torch.ones(int(keep.sum())),
                        'masks': target['masks'][keep][:, None].float()}

        data = everything(images_of(coco, 'val2017'))
        result = evaluate(Oracle(data.dataset), data, data.dataset.categories, **READING)
        assert result['box_ap'] == pytest.approx(100) and result['mask_ap'] == pytest.approx(100)
