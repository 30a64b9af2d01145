"""What pretraining models refuse, and what they say then."""

import pytest
import timm
import torch

from autoreg_vit.errors import CheckpointError, ModelError, SerializationError, ShapeError, UsageError
from autoreg_vit.models import AutoregressiveViT, create_pretraining_model
from autoreg_vit.models.decoders import MaskedDecoder
from autoreg_vit.models.targets import PixelTarget
from autoreg_vit.serialization import Serialization
from tests.support.designs import BLOBS, build, images


@pytest.mark.parametrize('name', ['randsac_vit_tiny', 'vit_tiny_randsac', 'saim_vit_tiny', 'vit_tiny_saim'])
@pytest.mark.parametrize(('options', 'message'), [
    ({'img_size': 9}, r'9 x 9 pixels.*patches of 2 x 2.*use an image of'),
    ({'img_size': (8, 9)}, '8 x 9 pixels'),
    ({'img_size': 1}, r'1 x 1 pixels.*patches of 2 x 2'),
    ({'patch_size': 16}, '8 x 8 pixels.*patches of 16 x 16'),
    ({'patch_size': 0}, 'patches of 0 x 0'),
    ({'num_heads': 3}, '3 heads do not divide a width of 32'),
    ({'num_heads': 0}, '0 heads'),
    ({'embed_dim': 30}, 'width that 4 divides, got 30'),
])
def test_sizes_that_do_not_fit(tiny, name, options, message):
    with pytest.raises(ShapeError, match=message):
        timm.create_model(name, **{**tiny, **options})


@pytest.mark.parametrize(('x', 'message'), [
    (torch.zeros(2, 1, 8, 10), r'\[B, 1, 8, 8\], got \[2, 1, 8, 10\].*set_input_size'),
    (torch.zeros(2, 1, 1, 1), r'got \[2, 1, 1, 1\]'),
    (torch.zeros(2, 3, 8, 8), r'got \[2, 3, 8, 8\].*in_chans'),
    (torch.zeros(1, 8, 8), r'got \[1, 8, 8\]'),
    (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), 'floating point.*torch.uint8'),
])
def test_images_that_do_not_fit(tiny, x, message):
    with pytest.raises(ShapeError, match=message):
        build(tiny, 'saim')(x)


@pytest.mark.parametrize(('ranks', 'got'), [
    (torch.zeros(3, 15, dtype=torch.int64), r'int64 \(3, 15\)'),
    (torch.zeros(2, 16, dtype=torch.int64), r'int64 \(2, 16\)'),
    (torch.zeros(16, dtype=torch.int64), r'int64 \(16,\)'),
    (torch.zeros(3, 16, dtype=torch.int32), r'int32 \(3, 16\)'),
    (torch.zeros(3, 16), r'float32 \(3, 16\)'),
    ([[0] * 16] * 3, 'list'),
])
def test_ranks_that_do_not_fit(tiny, ranks, got):
    with pytest.raises(ShapeError, match=rf'torch.int64 of shape \(3, 16\).*got.*{got}'):
        build(tiny, 'saim')(images(), ranks)


def test_next_token_decoder_follows_raster_order_alone(tiny):
    model = build(tiny, 'randsac next token')
    raster = torch.arange(16).expand(3, -1)
    assert torch.equal(model(images(), raster).ranks, raster)
    with pytest.raises(SerializationError, match='raster'):
        model(images(), raster.flip(1))
    one_image = raster.clone()
    one_image[1] = torch.arange(15, -1, -1)
    with pytest.raises(SerializationError, match='raster'):
        model(images(), one_image)
    for serialization in ({'serialization': 'random'}, BLOBS):
        with pytest.raises(SerializationError, match="serialization='raster'"):
            timm.create_model('randsac_vit_tiny', **tiny, **serialization, decoder='none')


@pytest.mark.parametrize(('options', 'message'), [
    ({'segments': 100}, r'100 segments do not fit.*4 x 4 = 16 tokens'),
    ({'segments': (2, 5)}, r'\(11, 5\), not \(5, 11\)'),
    ({'segments': ()}, r'got segments=\(\)'),
    ({'segments': 0}, 'got 0'),
    ({'segments': (5, -1)}, 'got -1'),
    ({'segments': 2.5}, '2.5'),
    ({'serialization': 'squares', 'segments': 5}, '5 squares do not tile.*Possible here: 16, 4'),
    ({'serialization': 'squares', 'segments': None}, 'squares needs the number of segments'),
    ({'serialization': 'random', 'segments': 5}, 'neither segments'),
    ({'serialization': 'raster', 'shuffle': True}, 'nor shuffle'),
    ({'serialization': 'blob', 'segments': None}, "'blob'.*'blobs'"),
    ({'first_segment': 'all'}, "'self'.*'none'.*'all'"),
])
def test_serializations_that_cannot_be(tiny, options, message):
    with pytest.raises(SerializationError, match=message):
        timm.create_model('randsac_vit_tiny', **{**tiny, **options})


@pytest.mark.parametrize(('options', 'message'), [
    ({'decoder': 'cross'}, "'masked', 'parallel' or 'none'.*'cross'"),
    ({'memory': 'first'}, "'mix' or 'last'.*'first'"),
    ({'memory': 'output'}, "'mix' or 'last'.*'output'"),
    ({'decoder': 'parallel', 'memory': 'mix'}, "'output' or 'input'.*'mix'"),
    ({'decoder': 'parallel', 'memory': 'input'}, 'shared=True'),
    ({'head': 'conv'}, "'linear' or 'mlp'.*'conv'"),
    ({'shared': True}, "shared=True has no effect with decoder='masked'"),
    ({'decoder': 'parallel', 'decoder_dim': 16}, "decoder_dim=16 has no effect with decoder='parallel'"),
    ({'decoder': 'parallel', 'decoder_heads': 2}, "decoder_heads=2 has no effect with decoder='parallel'"),
    ({'decoder': 'none', 'serialization': 'raster', 'segments': None, 'memory': 'mix'},
     "memory='mix' has no effect with decoder='none'"),
    ({'decoder': 'none', 'serialization': 'raster', 'segments': None, 'decoder_depth': 2},
     "decoder_depth=2 has no effect with decoder='none'"),
    ({'decoder': 'parallel', 'decoder_depth': 3}, r'divide the 4 encoder blocks: one of \[1, 2, 4\], got 3'),
    ({'decoder': 'parallel', 'decoder_depth': 0}, 'got 0'),
    ({'decoder': 'parallel', 'decoder_depth': 2, 'shared': True}, 'leave decoder_depth out'),
    ({'decoder_depth': 0}, 'of at least 1, got 0'),
    ({'decoder_depth': 2.5}, '2.5'),
    ({'attn_drop_rate': 0.1}, 'attn_drop_rate'),
    ({'patch_drop_rate': 0.5}, 'patch_drop_rate'),
    ({'pos_embed': 'none'}, 'pos_embed'),
    ({'dynamic_img_size': True}, 'dynamic_img_size'),
    ({'depth': 0}, 'depth'),
    ({'blur': (4, 1.0)}, r'odd kernel size.*\(4, 1.0\)'),
    ({'blur': (9, 0.0)}, 'positive sigma'),
    ({'blur': (9, float('nan'))}, 'positive sigma'),
    ({'blur': (9,)}, r'\(9,\)'),
    ({'blur': 9}, r'such as \(9, 1.0\); got 9'),
    ({'blur': True}, r'such as \(9, 1.0\); got True'),
    ({'blur': ('wide', 1.0)}, 'wide'),
    ({'patch_size': 1}, 'norm_pix=False'),
])
def test_models_that_cannot_be(tiny, options, message):
    with pytest.raises(ModelError, match=message):
        timm.create_model('randsac_vit_tiny', **{**tiny, 'segments': (5, 2), **options})


@pytest.mark.parametrize('options', [
    {'decoder_dim': 30}, {'decoder_heads': 3}, {'decoder_dim': 0}, {'decoder_heads': 0}, {'decoder_dim': -32}])
def test_decoder_sizes_that_do_not_fit(tiny, options):
    with pytest.raises(UsageError, match=str(next(iter(options.values())))):
        timm.create_model('randsac_vit_tiny', **tiny, segments=(5, 2), **options)


@pytest.mark.parametrize(('name', 'option', 'near'), [
    ('randsac_vit_tiny', 'decoder_dept', 'decoder_depth'),
    ('saim_vit_tiny', 'serialisation', 'serialization'),
    ('vit_tiny_saim', 'img_sise', 'img_size'),
    ('vit_tiny_randsac', 'global_poool', 'global_pool'),
])
def test_unknown_option_names_the_near_one(tiny, name, option, near):
    with pytest.raises(ModelError, match=rf"{name} has no option '{option}'.*'{near}'"):
        timm.create_model(name, **tiny, **{option: 2})


def test_options_of_a_classifier_are_refused(tiny):
    for option in ({'num_classes': 10}, {'global_pool': 'avg'}, {'features_only': True}):
        with pytest.raises(ModelError):
            timm.create_model('saim_vit_tiny', **tiny, **option)


@pytest.mark.parametrize(('name', 'message'), [
    ('saim_vit_tny', "Unknown.*'saim_vit_tny'.*'saim_vit_tiny'"),
    ('randsac', "Did you mean 'randsac_vit"),
    ('vit_tiny_saim', "encoder.*'saim_vit_tiny'"),
    ('resnet18', 'encoder.*Known:.*saim_vit_tiny'),
    ('', 'Known:.*saim_vit_tiny'),
    ('saim_vit_tiny.cifar10', "'saim_vit_tiny' has no tag 'cifar10'.*untrained"),
    ('saim_vit_tiny.untraind', "Did you mean 'untrained'"),
])
def test_unknown_model_or_tag(name, message):
    with pytest.raises(ModelError, match=message):
        create_pretraining_model(name)


def test_create_pretraining_model(tiny):
    for name in ('saim_vit_tiny', 'saim_vit_tiny.untrained'):
        assert isinstance(create_pretraining_model(name, **tiny), AutoregressiveViT)


def test_no_published_weights_yet_is_said_so(tiny):
    with pytest.raises(CheckpointError, match=r"'saim_vit_tiny' has no trained weights.*local-dir:runs/NAME/pretrain'"):
        timm.create_model('saim_vit_tiny', pretrained=True, **tiny)


@pytest.mark.parametrize(('name', 'options', 'message'), [
    ('resnet18', {}, 'VisionTransformer.*got ResNet'),
    ('vit_small_patch16_18x2_224', {'img_size': 32, 'depth': 2}, 'plain Blocks.*got ParallelThingsBlock'),
    ('vit_tiny_patch16_224', {'img_size': 32, 'attn_drop_rate': 0.1}, 'attn_drop_rate'),
    ('vit_tiny_patch16_224', {'img_size': 32, 'scale_attn_norm': True}, 'scale_attn_norm'),
    ('vit_tiny_patch16_224', {'img_size': 32, 'no_embed_class': True}, 'no_embed_class'),
])
def test_only_plain_vision_transformers_are_pretrained(name, options, message):
    decoder = MaskedDecoder(timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=0), 32, 1, 2)
    with pytest.raises(ModelError, match=message):
        AutoregressiveViT(timm.create_model(name, num_classes=0, **options), Serialization('random', (2, 2)), decoder,
                          PixelTarget((16, 16), 3))


def test_stock_vision_transformer_is_pretrained():
    encoder = timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=0, init_values=0.1, depth=2)
    model = AutoregressiveViT(
        encoder, Serialization('random', (2, 2)), MaskedDecoder(encoder, 32, 1, 2), PixelTarget((16, 16), 3))
    model(images(2, 3, (32, 32))).loss.backward()
    assert encoder.blocks[1].attn.qkv.weight.grad.abs().sum() > 0
    assert encoder.cls_token.grad.abs().sum() > 0
