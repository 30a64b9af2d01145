"""UPerNet on an encoder: sizes, gradients, the loss."""

import pytest
import timm
import torch

pytest.importorskip('segmentation_models_pytorch')

from autoreg_vit.engine.optimizers import create_optimizer
from autoreg_vit.models.dense.segmenter import IGNORED, Segmenter, pixel_loss
from autoreg_vit.settings.dense import SegmentConfig
from tests.support.shapes import TINY


class TestNetwork:
    def test_any_image_size_and_every_gradient(self):
        encoder = timm.create_model('vit_tiny_patch4_32_saim', **TINY, num_classes=0, dynamic_img_size=True)
        model = Segmenter(encoder, 5, 32)
        images, masks = torch.randn(2, 3, 30, 41), torch.randint(-1, 5, (2, 30, 41))
        model(images, masks).backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
        assert model.eval()(images).shape == (2, 5, 30, 41)

    def test_ignored_pixels_count_for_nothing_in_the_sum(self):
        """The mean over parts of a batch is that over the batch, however many pixels of each part are ignored."""
        logits, masks = torch.randn(4, 3, 5, 5), torch.randint(0, 3, (4, 5, 5))
        masks[0] = IGNORED
        masks[1, :2] = IGNORED
        whole = pixel_loss(logits, masks)
        torch.testing.assert_close(whole, (pixel_loss(logits[:2], masks[:2]) + pixel_loss(logits[2:], masks[2:])) / 2)
        changed = torch.where((masks == IGNORED)[:, None], 7.0, logits)
        torch.testing.assert_close(pixel_loss(changed, masks), whole)
        assert pixel_loss(logits[:1], masks[:1]) == 0

    def test_layer_decay(self):
        """The last block learns at 0.65 of the heads' rate, the one below at 0.65 of that, and so on to the stem."""
        encoder = timm.create_model('vit_tiny_patch4_32_saim', **TINY, num_classes=0, dynamic_img_size=True)
        model = Segmenter(encoder, 5, 32)
        config = SegmentConfig(weights='x', data_dir='x')
        optimizer = create_optimizer(config, model)
        names = {id(p): name for name, p in model.named_parameters()}
        scale, decay = {}, {}
        for group in optimizer.param_groups:
            for p in group['params']:
                scale[names[id(p)]], decay[names[id(p)]] = group['lr_scale'], group['weight_decay']
        inside = 'network.encoder.pyramid.encoder.'
        assert set(scale) == set(names.values())
        for name, power in (('pos_embed', 5), ('cls_token', 5), ('blocks.0.mlp.fc1.weight', 4),
                            ('blocks.3.mlp.fc1.weight', 1)):
            assert scale[inside + name] == pytest.approx(0.65 ** power)
        assert scale['network.segmentation_head.1.weight'] == scale['auxiliary.0.weight'] == 1
        assert decay[inside + 'pos_embed'] == decay[inside + 'blocks.0.norm1.weight'] == 0
        assert decay[inside + 'blocks.0.mlp.fc1.weight'] == 0.05
