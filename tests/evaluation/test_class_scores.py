"""Scores of a classifier, against a loop over images."""

import pytest
import torch

pytest.importorskip('sklearn')

from autoreg_vit.engine.processes import Processes
from autoreg_vit.evaluation import class_scores
from autoreg_vit.evaluation.class_scores import evaluate

CPU = Processes(torch.device('cpu'))


class TestEvaluate:
    def test_counts_each_image_once(self, monkeypatch):
        """Against a loop over images, with a last batch that is not whole."""
        images, labels = torch.randn(23, 7), torch.arange(23) % 7
        dataset = torch.utils.data.TensorDataset(images, labels)
        sizes = []
        monkeypatch.setattr(class_scores, 'images_at_once', lambda device: 5)
        found = evaluate(lambda x: sizes.append(len(x)) or x, dataset, 7, precision='float32', workers=0, group=CPU)
        assert sizes == [5, 5, 5, 5, 3]
        order = images.argsort(1, descending=True)
        assert found['top1'] == pytest.approx(100 * (order[:, 0] == labels).float().mean().item())
        assert found['top5'] == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).float().mean().item())
        assert found['loss'] == pytest.approx(torch.nn.functional.cross_entropy(images, labels).item(), rel=1e-6)
        for true in range(7):
            for predicted in range(7):
                assert found['confusion'][true, predicted] == ((labels == true) & (order[:, 0] == predicted)).sum()

    def test_no_top5_of_few_classes(self):
        dataset = torch.utils.data.TensorDataset(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
        assert 'top5' not in evaluate(lambda x: x, dataset, 3, precision='float32', workers=0, group=CPU)
