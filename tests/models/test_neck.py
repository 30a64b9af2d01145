"""The neck of dense prediction: four strides from any timm ViT, for segmentation and detection."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autoreg_vit.errors import ModelError, ShapeError
from autoreg_vit.models.dense.neck import STRIDES, DetectionBackbone, FeaturePyramid, SmpEncoder, register_smp_encoder

SMALL = {'embed_dim': 32, 'depth': 4, 'num_heads': 2, 'num_classes': 0, 'dynamic_img_size': True}


def pyramid_of(name: str, **options) -> FeaturePyramid:
    return FeaturePyramid(timm.create_model(name, **{**SMALL, **options}))


@pytest.mark.parametrize('name', ['vit_base_patch16_224', 'vit_small_patch14_dinov2', 'vit_small_patch32_224',
                                  'vit_base_patch8_224', 'vit_base_patch16_clip_224', 'vit_tiny_saim',
                                  'vit_tiny_patch4_32_randsac'])
def test_any_vit_gives_the_four_strides(name: str):
    """With and without class token, register-free or with pre-norm, and every parameter learns."""
    options = {'no_embed_class': True, 'reg_tokens': 2} if 'dinov2' in name else {}
    pyramid = pyramid_of(name, **options)
    maps = pyramid(torch.randn(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 32, 64 // s, 96 // s) for s in STRIDES]
    info = pyramid.feature_info
    assert info.reduction() == list(STRIDES) and info.channels() == [32] * 4
    assert [pyramid.get_submodule(name) for name in info.module_name()] == list(pyramid.levels)
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    assert not [name for name, p in pyramid.named_parameters() if p.grad is None or not p.grad.abs().sum()]


def test_patch_16_is_beits():
    """Two transposed convolutions, one, none and max-pooling, after a quarter, half, three quarters and the end."""
    pyramid = pyramid_of('vit_base_patch16_224', depth=12)
    kinds = [[type(m).__name__ for m in level.modules() if not list(m.children())] for level in pyramid.levels]
    assert pyramid.blocks == [2, 5, 8, 11]
    assert [kind.count('ConvTranspose2d') for kind in kinds] == [2, 1, 0, 0] and kinds[3] == ['MaxPool2d']


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([4, 7, 8, 12, 14, 16, 24, 32]), st.integers(1, 100), st.integers(1, 100), st.integers(1, 5))
def test_any_patch_size_and_depth(patch: int, height: int, width: int, depth: int):
    """Maps are as large as those of a convolutional network of the same strides, whatever is padded."""
    pyramid = pyramid_of('vit_tiny_randsac', patch_size=patch, img_size=2 * patch, depth=depth)
    maps = pyramid(torch.randn(1, 3, height, width))
    assert [m.shape[-2:] for m in maps] == [(-(-height // s), -(-width // s)) for s in STRIDES]


def test_maps_are_those_of_the_blocks():
    """At patch 16 the third map is the output of the third quarter, and the last one pools the last block's."""
    encoder = timm.create_model('vit_base_patch16_224', **SMALL, img_size=64).eval()
    image = torch.randn(1, 3, 64, 64)
    expected = encoder.forward_intermediates(image, intermediates_only=True)
    maps = FeaturePyramid(encoder)(image)
    torch.testing.assert_close(maps[2], expected[2])
    torch.testing.assert_close(maps[3], torch.nn.functional.max_pool2d(expected[3], 2))


@pytest.mark.parametrize('name', ['vit_base_patch16_224', 'vit_base_saim', 'vit_base_randsac'])
def test_positions_fit_the_image(name: str, randomise):
    """Interpolated once for `img_size`, and in each pass for other images: both see the same positions."""
    def encoder():
        torch.manual_seed(0)
        return randomise(timm.create_model(name, **SMALL, img_size=(64, 64)).eval())

    image = torch.randn(1, 3, 32, 128)  # as many tokens as 64 x 64
    once, each = FeaturePyramid(encoder(), (32, 128)), FeaturePyramid(encoder())
    each.levels.load_state_dict(once.levels.state_dict())
    assert once.encoder.patch_embed.grid_size == (2, 8) and once.encoder.pos_embed.requires_grad
    for a, b in zip(once(image), each(image)):
        torch.testing.assert_close(a, b)


def test_the_patch_is_resampled_to_a_power_of_two():
    """What patches of 14 pixels see, patches of 16 see in an image enlarged by 16/14."""
    encoder = timm.create_model('vit_small_patch14_dinov2', **SMALL, img_size=56).eval()
    smooth = torch.nn.functional.interpolate(torch.randn(1, 3, 4, 4), size=112, mode='bicubic')
    before = encoder.patch_embed(torch.nn.functional.interpolate(smooth, size=56, mode='area'))
    after = FeaturePyramid(encoder).encoder.patch_embed(
        torch.nn.functional.interpolate(smooth, size=64, mode='bilinear', antialias=True))
    assert encoder.patch_embed.patch_size == (16, 16) and before.shape == after.shape
    assert torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1] > 0.95


def test_encoders_that_do_not_fit():
    with pytest.raises(ModelError, match='dynamic_img_size=True'):
        FeaturePyramid(timm.create_model('vit_tiny_patch16_224'))
    with pytest.raises(ModelError, match='got ResNet'):
        FeaturePyramid(timm.create_model('resnet18'))
    with pytest.raises(ModelError, match='square patches, got 16 x 8'):
        FeaturePyramid(timm.create_model('vit_tiny_patch16_224', **SMALL, patch_size=(16, 8)))
    with pytest.raises(ShapeError, match='not a whole number of patches'):
        FeaturePyramid(timm.create_model('vit_tiny_patch16_224', **SMALL), 100)


def test_gradient_checkpointing_changes_nothing():
    pyramid = pyramid_of('vit_tiny_patch16_224').eval()
    image = torch.randn(1, 3, 64, 64)
    expected = pyramid(image)
    pyramid.encoder.set_grad_checkpointing()
    for a, b in zip(pyramid(image), expected):
        torch.testing.assert_close(a, b)


class TestDoors:
    @pytest.mark.parametrize('head', ['UPerNet', 'FPN', 'Unet'])
    def test_smp(self, head: str):
        smp = pytest.importorskip('segmentation_models_pytorch')
        register_smp_encoder('a_vit', pyramid_of('vit_base_patch16_224'))
        network = getattr(smp, head)('a_vit', encoder_weights=None, classes=5)
        logits = network(torch.randn(2, 3, 64, 96))
        assert logits.shape == (2, 5, 64, 96)
        (logits * torch.randn_like(logits)).sum().backward()
        assert not [name for name, p in network.named_parameters() if p.grad is None]

    @pytest.mark.parametrize(('head', 'options', 'strides'), [
        ('Unet', {'decoder_channels': (32, 16, 8, 4)}, [4, 8, 16]), ('Unet', {'decoder_channels': (16, 8, 4)}, [4, 8]),
        ('UnetPlusPlus', {'decoder_channels': (16, 8)}, [4]), ('MAnet', {'decoder_channels': (16, 8, 4)}, [4, 8]),
        ('Linknet', {}, [4, 8, 16, 32]), ('PSPNet', {'psp_out_channels': 16}, [4, 8]),
        ('Segformer', {'decoder_segmentation_channels': 16}, [4, 8, 16, 32]),
        ('DeepLabV3', {'decoder_channels': 16}, [4, 8, 8, 8]),
        ('DeepLabV3Plus', {'decoder_channels': 16}, [4, 8, 16, 16]), ('PAN', {'decoder_channels': 8}, [4, 8, 16, 16])])
    def test_smp_of_other_depths_and_strides(self, head: str, options: dict, strides: list[int]):
        smp = pytest.importorskip('segmentation_models_pytorch')
        if head in ('Unet', 'UnetPlusPlus', 'MAnet'):
            options = {**options, 'encoder_depth': len(options['decoder_channels'])}
        register_smp_encoder('a_vit', pyramid_of('vit_tiny_randsac'))
        network = getattr(smp, head)('a_vit', encoder_weights=None, classes=2, **options).eval()
        images = torch.randn(1, 3, 128, 160)
        maps = network.encoder(images)[2:]
        assert [tuple(m.shape[-2:]) for m in maps] == [(128 // s, 160 // s) for s in strides]
        assert network.encoder.blocks == {1: [3], 2: [1, 3], 3: [1, 2, 3], 4: [0, 1, 2, 3]}[len(strides)]
        assert network(images).shape == (1, 2, 128, 160)

    def test_smp_finer_maps_are_those_of_the_blocks(self):
        encoder = SmpEncoder(pyramid_of('vit_tiny_patch4_32_randsac'))
        images = torch.randn(1, 3, 64, 64)
        coarse, names = encoder(images), encoder.state_dict().keys()
        encoder.make_dilated(16)
        fine = encoder(images)
        assert encoder.output_stride == 16 and encoder.state_dict().keys() == names
        for a, b in zip(coarse[:5], fine[:5]):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(nn.functional.max_pool2d(fine[5], 2), coarse[5])

    @pytest.mark.parametrize('depth', [1, 6])
    def test_smp_depths_that_no_map_has(self, depth: int):
        smp = pytest.importorskip('segmentation_models_pytorch')
        register_smp_encoder('a_vit', pyramid_of('vit_tiny_randsac'))
        with pytest.raises(ModelError, match=f'encoder_depth is 2 to 5, got {depth}'):
            smp.Unet('a_vit', encoder_weights=None, encoder_depth=depth, decoder_channels=(8,) * depth)
        with pytest.raises(ModelError, match='encoder_output_stride is one of 4, 8, 16, 32, got 2'):
            SmpEncoder(pyramid_of('vit_tiny_randsac')).make_dilated(2)

    def test_smp_other_channels(self):
        smp = pytest.importorskip('segmentation_models_pytorch')
        register_smp_encoder('a_grey_vit', pyramid_of('vit_base_patch16_224', in_chans=1))
        assert smp.UPerNet('a_grey_vit', encoder_weights=None, in_channels=1)(torch.randn(2, 1, 32, 32)).shape[1] == 1
        with pytest.raises(ModelError, match='in_chans=3'):
            smp.UPerNet('a_grey_vit', encoder_weights=None)

    def test_torchvision(self):
        """Mask R-CNN trains on images of two sizes; every parameter gets a gradient."""
        from torchvision.models.detection import MaskRCNN

        backbone = DetectionBackbone(pyramid_of('vit_tiny_patch4_32_randsac'), out_channels=16)
        maps = backbone(torch.randn(1, 3, 64, 96))
        assert {k: v.shape[1:] for k, v in maps.items()} == {
            **{str(i): (16, 64 // s, 96 // s) for i, s in enumerate(STRIDES)}, 'pool': (16, 1, 2)}
        network = MaskRCNN(backbone, num_classes=3, min_size=64, max_size=96, box_detections_per_img=5)
        images = [torch.rand(3, 60, 90), torch.rand(3, 64, 64)]
        targets = [{'boxes': torch.tensor([[8.0, 8.0, 40.0, 48.0]]), 'labels': torch.tensor([1 + i]),
                    'masks': torch.ones(1, *image.shape[-2:], dtype=torch.uint8)} for i, image in enumerate(images)]
        sum(network(images, targets).values()).backward()
        assert not [name for name, p in network.named_parameters() if p.grad is None]
        detections = network.eval()(images)
        assert detections[0]['masks'].shape[-2:] == (60, 90)
