"""Pretraining models are as large as published, with the defaults of their papers."""

import pytest
import timm
import torch
from torch import nn

from autoreg_vit.models import AutoregressiveViT, pretraining_models
from autoreg_vit.models.decoders import MaskedDecoder
from autoreg_vit.serialization import Serialization

ARCHITECTURES = ['base', 'large', 'small', 'small_patch4_32', 'tiny', 'tiny_patch4_32']


def count(*modules: nn.Module) -> float:
    """Parameters in millions."""
    return sum(p.numel() for m in modules for p in m.parameters()) / 1e6


def on_meta(name: str, **options) -> AutoregressiveViT:
    with torch.device('meta'):
        return timm.create_model(name, **options)


def test_randsac_base_is_as_large_as_published():
    model = on_meta('randsac_vit_base')  # RandSAC Table 10: 86M and 16M
    assert 85.5 < count(model.encoder) < 86.5
    assert 16 < count(model.decoder, model.head) < 18.5
    assert len(model.decoder.blocks) == 4
    assert model.decoder.dim == 512
    assert model.decoder.blocks[0].cross_attn.num_heads == model.decoder.blocks[0].self_attn.num_heads == 16


def test_randsac_cifar_is_as_large_as_published():
    model = on_meta('randsac_vit_tiny_patch4_32')  # Table 8: 5M and 2M
    assert 5 < count(model.encoder) < 5.5
    assert 1.5 < count(model.decoder, model.head) < 2.5


def test_randsac_imagenet100_is_as_large_as_published():
    model = on_meta('randsac_vit_small')  # Table 8: 21M and 9M
    assert 21 < count(model.encoder) < 22
    assert 9 < count(model.decoder, model.head) < 10
    assert model.decoder.blocks[0].self_attn.num_heads == 2 * model.encoder.blocks[0].attn.num_heads


@pytest.mark.parametrize(('name', 'depth', 'low', 'high'), [
    ('randsac_vit_tiny_patch4_32', 16, 7, 7.5), ('randsac_vit_small', 17, 30, 31)])
def test_two_stream_is_as_large_as_published(name, depth, low, high):
    model = on_meta(name, decoder='parallel', shared=True, depth=depth)  # Table 8: 7M and 30M, no decoder
    assert low < count(model.encoder) < high
    assert count(model.decoder) == 0
    assert not any(key.startswith('decoder') for key in model.state_dict())


def test_saim_decoder_is_as_large_as_its_encoder():
    model = on_meta('saim_vit_base')
    assert 85.5 < count(model.encoder) < 86.5
    assert count(model.decoder) == count(model.encoder.blocks)
    assert isinstance(model.head.act, nn.GELU)
    assert model.head.fc1.out_features == 4 * 768


@pytest.mark.parametrize(('name', 'segments', 'depth'), [
    ('randsac_vit_base', (11, 7, 3), 4), ('randsac_vit_large', (11, 7, 3), 4), ('randsac_vit_small', (11, 5), 4),
    ('randsac_vit_tiny', (11, 5), 3), ('randsac_vit_tiny_patch4_32', (11, 5), 3),
    ('randsac_vit_small_patch4_32', (11, 5), 6)])
def test_randsac_defaults(name, segments, depth):
    model = on_meta(name)
    assert model.serialization == Serialization('blobs', model.encoder.patch_embed.grid_size, segments)
    assert isinstance(model.decoder, MaskedDecoder)
    assert len(model.decoder.blocks) == depth
    assert (model.decoder.memory, model.first_segment) == ('mix', 'self')
    assert (model.target.norm_pix, model.target.blur) == (True, None)
    assert model.encoder.num_prefix_tokens == 0


@pytest.mark.parametrize('size', ARCHITECTURES)
def test_saim_defaults(size):
    model = on_meta(f'saim_vit_{size}')
    assert model.serialization.name == 'random'
    assert len(model.decoder.blocks) == len(model.encoder.blocks)
    assert (model.decoder.memory, model.first_segment) == ('output', 'none')
    assert (model.target.norm_pix, model.target.blur) == (True, (9, 1.0))
    assert model.encoder.cls_token is not None


def test_registry():
    assert timm.list_models('randsac_vit_*') == [f'randsac_vit_{size}' for size in ARCHITECTURES]
    assert timm.list_models('saim_vit_*') == [f'saim_vit_{size}' for size in ARCHITECTURES]
    assert sorted(pretraining_models()) == timm.list_models(['randsac_vit_*', 'saim_vit_*'])
    encoders = timm.list_models('vit_*')
    ours = [name for name in encoders if 'randsac' in name or 'saim' in name]
    assert sorted(ours) == sorted(f'vit_{size}_{method}' for size in ARCHITECTURES for method in ('randsac', 'saim'))
    assert not set(encoders) & set(pretraining_models())
