"""Mask R-CNN on a ViT: windows, parts, and sizes that do not fit."""


import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autoreg_vit.errors import ModelError, ShapeError
from autoreg_vit.models.dense.detector import Canvas, ViTMaskRCNN
from autoreg_vit.models.dense.windowed import WindowedAttention, use_windows
from tests.support.detecting import SMALL, small_detector


class TestWindows:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 10), st.integers(0, 2))
    def test_tokens_see_their_window_alone(self, rows: int, columns: int, window: int, prefix: int):
        """Against attention to each window by itself, edges and prefix tokens included."""
        attention = timm.layers.Attention(8, num_heads=2)
        x = torch.randn(2, prefix + rows * columns, 8)
        out = WindowedAttention(attention, (rows, columns), window, prefix)(x)
        grid, expected, prefixes = x[:, prefix:].unflatten(1, (rows, columns)), torch.empty(2, rows, columns, 8), []
        for top in range(0, rows, window):
            for left in range(0, columns, window):
                part = grid[:, top:top + window, left:left + window]
                seen = attention(torch.cat([x[:, :prefix], part.flatten(1, 2)], dim=1))
                prefixes.append(seen[:, :prefix])
                expected[:, top:top + window, left:left + window] = seen[:, prefix:].view_as(part)
        expected = torch.cat([torch.stack(prefixes).mean(0), expected.flatten(1, 2)], dim=1)
        torch.testing.assert_close(out, expected)

    @pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'vit_tiny_randsac'])
    def test_a_window_as_large_as_the_image_is_global_attention(self, name: str):
        """With and without a class token; padding is not seen, since there is none."""
        encoder = timm.create_model(name, **{**SMALL, 'img_size': (96, 80), 'drop_path_rate': 0.5}).eval()
        image = torch.randn(2, 3, 96, 80)
        expected = encoder.forward_features(image)
        use_windows(encoder, 6, global_blocks=(1,))
        assert [isinstance(block.attn, WindowedAttention) for block in encoder.blocks] == [True, False, *[True] * 6]
        torch.testing.assert_close(encoder.forward_features(image), expected)
        for block in encoder.blocks[2:]:
            block.attn.window = 2
        assert not torch.allclose(encoder.forward_features(image), expected)

    def test_what_windows_do_not_fit(self):
        encoder = timm.create_model('vit_tiny_patch16_224', **SMALL)
        encoder.blocks[2].attn = nn.Identity()
        with pytest.raises(ModelError, match=r'Block 2 .* no plain timm Attention'):
            use_windows(encoder, 6, (0,))
        with pytest.raises(ModelError, match='takes no mask'):
            encoder.blocks[1].attn(torch.randn(1, 3, 32), attn_mask=torch.ones(3, 3))


class TestDetector:
    def test_the_published_setting(self):
        """Global attention at the end of each quarter of ViT-B, windows of 14 elsewhere, a synchronised batch norm."""
        with torch.device('meta'):
            encoder = timm.create_model('vit_base_patch16_224', num_classes=0, dynamic_img_size=True)
        encoder.to_empty(device='cpu')
        model = ViTMaskRCNN(encoder, 80, (1024, 1024), mean=(0.5,) * 3, std=(0.25,) * 3)
        windowed = [isinstance(block.attn, WindowedAttention) for block in encoder.blocks]
        assert [i for i, w in enumerate(windowed) if not w] == [2, 5, 8, 11]
        assert encoder.blocks[0].attn.window == 14 and encoder.blocks[0].attn.grid == (64, 64)
        assert encoder.pos_embed.shape == (1, 64 * 64 + 1, 768)
        kinds = [type(module).__name__ for module in model.roi_heads.box_head.modules()]
        assert kinds.count('Conv2d') == kinds.count('BatchNorm2d') == 4 and kinds.count('Linear') == 1
        assert [type(m).__name__ for m in model.rpn.head.conv.modules()].count('Conv2d') == 2
        assert [type(m).__name__ for m in model.roi_heads.mask_head.modules()].count('BatchNorm2d') == 4
        assert [type(m).__name__ for m in model.backbone.fpn.modules()].count('BatchNorm2d') == 8

    @pytest.mark.parametrize('norm', ['batch', 'layer'])
    @pytest.mark.parametrize('attention', ['windowed', 'global'])
    def test_trains(self, norm: str, attention: str):
        """On images of two sizes, one without objects; also where no image of the batch has any."""
        model = small_detector((64, 96), norm=norm, attention=attention)
        images = [torch.rand(3, 60, 90), torch.rand(3, 64, 64)]
        nothing = {'boxes': torch.zeros(0, 4), 'labels': torch.zeros(0, dtype=torch.int64),
                   'masks': torch.zeros(0, 64, 64, dtype=torch.uint8)}
        targets = [{'boxes': torch.tensor([[8.0, 8.0, 40.0, 48.0]]), 'labels': torch.tensor([1]),
                    'masks': torch.ones(1, 60, 90, dtype=torch.uint8)}, nothing]
        sum(model(images, targets).values()).backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None]
        model.zero_grad()
        sum(model(images[1:], targets[1:]).values()).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        assert all(torch.isfinite(b).all() for b in model.buffers())

    def test_coordinates_stay_float32_in_bfloat16(self):
        """Anchors, proposals and boxes: bfloat16 would hold those of a large image to several pixels."""
        model = small_detector((32, 608)).eval()
        model.roi_heads.score_thresh = 0.0
        proposals = []
        model.rpn.register_forward_hook(lambda module, inputs, output: proposals.append(output[0][0]))
        with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
            boxes = model([torch.rand(3, 32, 608)])[0]['boxes']
        for found in (proposals[0], boxes):
            assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())
        assert model.rpn.anchor_generator.cell_anchors[0].dtype == torch.float32

    def test_the_canvas(self):
        """In evaluation images fit in at their aspect, upper left; in training they come as they are."""
        canvas = Canvas((64, 96), (0.5,) * 3, (0.5,) * 3).eval()
        batch, _ = canvas([torch.ones(3, 100, 50), torch.ones(3, 10, 30)])
        assert batch.tensors.shape == (2, 3, 64, 96) and batch.image_sizes == [(64, 32), (32, 96)]
        assert torch.allclose(batch.tensors[0, :, :, :32], torch.ones(())) and not batch.tensors[0, :, :, 32:].any()
        batch, _ = canvas.train()([torch.ones(3, 20, 30)], None)
        assert batch.image_sizes == [(20, 30)] and batch.tensors.sum() == 3 * 20 * 30
        with pytest.raises(ShapeError, match='65 x 10 pixels does not fit'):
            canvas([torch.ones(3, 65, 10)])

    @pytest.mark.parametrize('options, error, words', [
        ({'size': (64, 100)}, ShapeError, '64 x 100'), ({'attention': 'local'}, ModelError, "got 'local'"),
        ({'norm': 'group'}, ModelError, "got 'group'"), ({'anchor_sizes': (8, 16)}, ModelError, 'five numbers')])
    def test_what_does_not_fit(self, options: dict, error: type, words: str):
        with pytest.raises(error, match=words):
            small_detector(**options)
