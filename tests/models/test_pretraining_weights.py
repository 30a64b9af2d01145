"""Weights of pretraining models, through the doors of timm and of exported folders."""

import pytest
import timm
import torch

from autoreg_vit.errors import CheckpointError
from autoreg_vit.hub.folders import export_encoder, export_pretraining
from tests.support.designs import build, images


@pytest.mark.parametrize('classes', [0, 10])
@pytest.mark.parametrize(('source', 'options', 'named'), [
    ('resnet18', {}, r'bn1\.running_mean'),
    ('vit_tiny_randsac', {'depth': 5}, r'blocks\.4\.'),
    ('vit_tiny_randsac', {'depth': 3}, r'blocks\.3\.'),
    ('vit_tiny_randsac', {'embed_dim': 64}, r'with embed_dim=64,'),
    ('vit_tiny_saim', {}, 'Unexpected: cls_token.* with class_token=True,'),
])
def test_weights_of_another_architecture(tiny, tmp_path, source, options, named, classes):
    """Whether or not a new classifier is asked for, weights that do not fit are never left out in silence."""
    sizes = {} if source == 'resnet18' else {**tiny, 'in_chans': 3}
    torch.save(timm.create_model(source, num_classes=0, **{**sizes, **options}).state_dict(), tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=named):
        timm.create_model('vit_tiny_randsac', pretrained=True, num_classes=classes, **{**tiny, 'in_chans': 3},
                          pretrained_cfg_overlay={'file': str(tmp_path / 'other.pth')})


@pytest.mark.parametrize(('source', 'options', 'named'), [
    ('vit_tiny_randsac', {}, r'encoder\.blocks\.0'),
    ('randsac_vit_tiny', {'depth': 5}, r'encoder\.blocks\.4\.'),
    ('randsac_vit_tiny', {'decoder_depth': 2}, r'decoder\.blocks\.2\.'),
    ('randsac_vit_tiny', {'decoder': 'parallel'}, r'decoder\.blocks\.0'),
])
def test_pretraining_weights_of_another_architecture(tiny, tmp_path, source, options, named):
    segments = {'segments': (5, 2)} if source == 'randsac_vit_tiny' else {}
    torch.save(timm.create_model(source, **{**tiny, **segments, **options}).state_dict(), tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=named):
        timm.create_model('randsac_vit_tiny', pretrained=True, **tiny, segments=(5, 2),
                          pretrained_cfg_overlay={'file': str(tmp_path / 'other.pth')})


@pytest.mark.parametrize('design', ['randsac', 'saim', 'saim shared', 'randsac next token'])
def test_own_weights_load_through_timms_door(tiny, tmp_path, design):
    model = build(tiny, design).eval()
    torch.save(model.state_dict(), tmp_path / 'weights.pth')

    loaded = build(tiny, design, pretrained=True,
                   pretrained_cfg_overlay={'file': str(tmp_path / 'weights.pth')}).eval()

    x, ranks = images(), model.draw_ranks(3)
    assert torch.equal(loaded(x, ranks).pred, model(x, ranks).pred)


def test_own_weights_fit_another_image_size(tiny, tmp_path):
    model = build(tiny, 'randsac')
    torch.save(model.state_dict(), tmp_path / 'weights.pth')

    wide = build(tiny, 'randsac', img_size=(8, 16), pretrained=True,
                 pretrained_cfg_overlay={'file': str(tmp_path / 'weights.pth')})

    assert torch.equal(wide.decoder.pos_embed, build(tiny, 'randsac', img_size=(8, 16)).decoder.pos_embed)
    assert torch.equal(wide.encoder.blocks[0].attn.qkv.weight, model.encoder.blocks[0].attn.qkv.weight)
    assert wide(images(size=(8, 16))).pred.shape == (3, 32, 4)


@pytest.mark.parametrize('design', ['randsac registers', 'saim'])
@pytest.mark.parametrize('channels', [1, 2, 3, 5])
def test_exported_folders_load(tiny, tmp_path, design, channels):
    model = build(tiny, design, in_chans=channels).eval()
    export_encoder(model.encoder, tmp_path / 'encoder')
    export_pretraining(model, tmp_path / 'pretrain')

    encoder = timm.create_model(f'local-dir:{tmp_path / "encoder"}', pretrained=True).eval()
    loaded = timm.create_model(f'local-dir:{tmp_path / "pretrain"}', pretrained=True).eval()

    x, ranks = images(3, channels), model.draw_ranks(3)
    assert torch.equal(encoder(x), model.encoder(x))
    assert torch.equal(loaded(x, ranks).pred, model(x, ranks).pred)
