"""Windows over images, mIoU by hand, and pictures of predictions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip('segmentation_models_pytorch')
pytest.importorskip('torchmetrics')
pytest.importorskip('sklearn')

from autoreg_vit.data.masks import Plain
from autoreg_vit.data.transforms import ImageSpec
from autoreg_vit.engine.processes import Processes
from autoreg_vit.evaluation.mask_scores import Windows, evaluate, sliding_logits
from autoreg_vit.figures.predicted_masks import palette, predictions_figure
from autoreg_vit.models.dense.segmenter import IGNORED
from autoreg_vit.settings.dense import SegmentConfig
from tests.support.segmenting import reading
from tests.support.shapes import CLASSES, draw

CPU = Processes(torch.device('cpu'))


class TestEvaluation:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.integers(1, 16), st.integers(1, 5))
    def test_windows_cover_the_image(self, height: int, width: int, crop: int, stride: int, at_once: int):
        """Windows of a network that gives back its pixels put the image together again, in order."""
        stride = min(stride, crop)
        images = [torch.randn(2, height, width), torch.randn(2, width, height)]
        sizes = []

        def network(batch: torch.Tensor) -> torch.Tensor:
            sizes.append(batch.shape)
            return batch

        found = sliding_logits(network, images, Windows((crop, crop), (stride, stride), at_once), at_once)
        for image, logits in zip(images, found):
            torch.testing.assert_close(logits, image)
        assert all(len(s) == 4 and s[0] <= at_once and s[2:] == (crop, crop) for s in sizes)

    def test_scores_by_hand(self):
        """mIoU is over classes that are there or predicted; ignored pixels count for nothing."""
        masks = torch.tensor([[0, 0, 0, 1], [1, 1, IGNORED, IGNORED]])
        logits = torch.nn.functional.one_hot(torch.tensor([[0, 0, 1, 1], [1, 0, 2, 0]]), 4).permute(2, 0, 1).float()
        config = SegmentConfig(weights='x', data_dir='x', crop_size=(2, 4), precision='float32', workers=0)
        found = evaluate(lambda batch: batch, [(logits, masks)], 4, **reading(config))
        assert found['iou'] == pytest.approx([100 * 2 / 4, 100 * 2 / 4, 0, 0])
        assert found['miou'] == pytest.approx(50) and found['pixel_accuracy'] == pytest.approx(100 * 4 / 6)

    def test_predictions_have_the_size_of_the_masks(self):
        """Images that are resized first are scored at their own size."""
        image, mask = draw(1)
        config = SegmentConfig(weights='x', data_dir='x', crop_size=(16,), short_side=20, precision='float32',
                               workers=0)
        resized, truth = Plain(config, ImageSpec((16, 16), 3, (0.0,) * 3, (1.0,) * 3))(
            torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask.astype(np.int64)).clamp(max=2))
        assert resized.shape == (3, 24, 20) and truth.shape == (48, 40)

        def by_colour(batch: torch.Tensor) -> torch.Tensor:  # a disc is blue, a square red
            return torch.stack([torch.full_like(batch[:, 0], 0.25), batch[:, 0] - batch[:, 2],
                                batch[:, 2] - batch[:, 0]], dim=1)

        assert evaluate(by_colour, [(resized, truth)], 3, **reading(config))['miou'] > 70


    def test_pictures_show_what_they_should(self, tmp_path: Path):
        """Next to a grey image its classes in colour over the same grey, and pixels without a class dark."""
        truth = torch.full((40, 60), 1)
        truth[:20] = IGNORED
        predictions_figure([torch.zeros(3, 20, 30)], [truth], [torch.full((40, 60), 2)], CLASSES,
                           ImageSpec((20, 30), 3, (0.5,) * 3, (0.25,) * 3), tmp_path / 'picture.png')
        pixels = np.asarray(Image.open(tmp_path / 'picture.png').convert('RGB')).reshape(-1, 3).astype(int)
        grey, colours = np.array([128] * 3), 255 * palette(3)
        for part, colour in ((0.2, grey), (0.1, 0.35 * grey), (0.1, 0.35 * grey + 0.65 * colours[1]),
                             (0.2, 0.35 * grey + 0.65 * colours[2])):
            assert (abs(pixels - colour).max(1) <= 2).mean() > part
