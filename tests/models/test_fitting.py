"""Weights of every wrapping and of other models, through every door: loaded as timm loads them, or one error that says
what differs, whose advice loads them."""

import json
import logging
import re
import runpy
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from autoreg_vit.errors import CheckpointError
from autoreg_vit.hub.folders import export_encoder, export_pretraining
from autoreg_vit.hub.lookup import load_encoder
from autoreg_vit.models.fitting import prefixes, unwrap

HUB = runpy.run_path(str(Path(__file__).parents[2] / 'hubconf.py'))
ENCODER, MODEL = 'vit_tiny_patch4_32_randsac', 'randsac_vit_tiny_patch4_32'
TINY = dict(img_size=16, embed_dim=32, depth=2, num_heads=1)
SEGMENTS = dict(segments=4, decoder_depth=1)


def encoder(**options) -> nn.Module:
    return timm.create_model(ENCODER, **{**TINY, **options})


def pretraining(**options) -> nn.Module:
    return timm.create_model(MODEL, **{**TINY, **SEGMENTS, **options})


def under(prefix: str, weights: dict) -> dict:
    return {prefix + key: value for key, value in weights.items()}


def load(name: str, content: dict, folder: Path, **options) -> nn.Module:
    """The model through timm's door for a file."""
    torch.save(content, folder / 'weights.pth')
    overlay = {'file': str(folder / 'weights.pth'), 'hf_hub_id': None}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)


def options_of(name: str) -> dict:
    return {**TINY, **SEGMENTS} if name == MODEL else TINY


def assert_same(model: nn.Module, weights: dict) -> None:
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('make', [encoder, pretraining])
class TestWrapped:
    @pytest.mark.parametrize('wrap', [
        lambda w: w, lambda w: {'state_dict': w, 'epoch': 3}, lambda w: {'model': w},
        lambda w: {'model': {'state_dict': w}},
        lambda w: under('module.', w), lambda w: under('_orig_mod.', w), lambda w: under('module._orig_mod.', w),
        lambda w: {'state_dict': under('_orig_mod.module.', w)},
        lambda w: {'state_dict': {k: v * 2 for k, v in w.items()}, 'state_dict_ema': w},
        lambda w: {'model': {k: v * 2 for k, v in w.items()}, 'model_ema': under('module.', w)},
    ])
    def test_loads_as_timm_loads(self, make, wrap, tmp_path: Path):
        weights = make().state_dict()
        assert_same(load(ENCODER if make is encoder else MODEL, wrap(weights), tmp_path, **options_of(
            ENCODER if make is encoder else MODEL)), weights)

    @pytest.mark.parametrize(('wrap', 'named'), [
        (lambda w: under('backbone.', w), ["'backbone.'"]), (lambda w: under('module.net.', w), ["'net.'"]),
        (lambda w: {**under('teacher.', w), 'head.mlp.weight': torch.zeros(2)}, ["'teacher.'"]),
        (lambda w: {'teacher': under('backbone.', w), 'student': under('module.backbone.', w), 'epoch': 3},
         ["'student.module.backbone.'", "'teacher.backbone.'"]),
        (lambda w: {'state_dict': under('model.', w)}, ["'model.'"]),
    ])
    def test_other_prefixes_are_named_and_the_advice_loads(self, make, wrap, named: list[str], tmp_path: Path):
        name = ENCODER if make is encoder else MODEL
        weights = make().state_dict()
        with pytest.raises(CheckpointError) as error:
            load(name, wrap(weights), tmp_path, **options_of(name))
        assert all(prefix in str(error.value) for prefix in named)
        overlay = re.search(r'pretrained_cfg_overlay=(dict\(.*?\)\}\))', str(error.value))[1]
        overlay = eval(overlay, {'tensors': unwrap(wrap(weights))})
        loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options_of(name))
        assert_same(loaded, weights)

    def test_a_name_twice_is_an_error(self, make):
        name, weights = ENCODER if make is encoder else MODEL, make().state_dict()
        with pytest.raises(CheckpointError, match=r"twice, with and without the prefix 'module\.'"):
            timm.create_model(name, pretrained=True, **options_of(name), pretrained_cfg_overlay={
                'state_dict': {**weights, **under('module.', weights)}})


def test_a_pretraining_models_encoder_loads_by_its_prefix(tmp_path: Path):
    weights = pretraining().state_dict()
    with pytest.raises(CheckpointError, match=r"under 'encoder\.'") as error:
        load(ENCODER, weights, tmp_path, **TINY)
    overlay = eval(re.search(r'overlay=(dict\(.*?\)\}\))', str(error.value))[1], {'tensors': weights})
    loaded = timm.create_model(ENCODER, pretrained=True, pretrained_cfg_overlay=overlay, **TINY)
    assert_same(loaded, {k.removeprefix('encoder.'): v for k, v in weights.items()})


@pytest.mark.parametrize(('name', 'source', 'options'), [
    (ENCODER, 'vit_tiny_patch4_32_saim', {}), (ENCODER, 'vit_tiny_patch16_224', {'patch_size': 4, 'num_classes': 0}),
    (ENCODER, ENCODER, {'depth': 3}), (ENCODER, ENCODER, {'reg_tokens': 2}), (ENCODER, ENCODER, {'embed_dim': 64}),
    (ENCODER, ENCODER, {'mlp_ratio': 2.0}), (ENCODER, ENCODER, {'embed_dim': 64, 'depth': 1, 'class_token': True}),
    ('vit_tiny_patch4_32_saim', ENCODER, {}), ('vit_tiny_patch4_32_saim', 'vit_tiny_patch4_32_saim', {'depth': 1}),
    (MODEL, MODEL, {'depth': 3}), (MODEL, MODEL, {'embed_dim': 64}), (MODEL, MODEL, {'in_chans': 1}),
    (MODEL, MODEL, {'patch_size': 8, 'segments': 2}), (MODEL, MODEL, {'class_token': True}),
])
@pytest.mark.parametrize('door', ['file', 'local-dir', 'state_dict', 'hub'])
def test_weights_of_another_shape(name: str, source: str, options: dict, door: str, tmp_path: Path):
    """The error names the options that differ, and the model that has them loads the weights."""
    trained = timm.create_model(source, **{**options_of(source), **options})

    def attempt(**more) -> nn.Module:
        given = {**options_of(name), **more}
        if door == 'file':
            return load(name, trained.state_dict(), tmp_path, **given)
        if door in ('state_dict', 'hub'):
            make = HUB[name] if door == 'hub' else partial(timm.create_model, name)
            return make(pretrained=True, pretrained_cfg_overlay={'state_dict': trained.state_dict()}, **given)
        save_file(trained.state_dict(), tmp_path / 'model.safetensors')
        (tmp_path / 'config.json').write_text(json.dumps({'architecture': name, 'pretrained_cfg': {'num_classes': 0}}))
        return timm.create_model(f'local-dir:{tmp_path}', pretrained=True, **given)

    with pytest.raises(CheckpointError, match='Create the model with ') as error:
        attempt()
    advice = re.search(r'Create the model with (.*), and what else they were trained with', str(error.value))[1]
    more = {'segments': options['segments']} if 'segments' in options else {}
    assert_same(attempt(**eval(f'dict({advice})'), **more), trained.state_dict())


@pytest.mark.parametrize(('architecture', 'message'), [
    (ENCODER, 'Create the model with depth=2, and'), ('vit_tiny_patch16_224', 'RuntimeError.*blocks')])
def test_a_folder_whose_configuration_is_of_another_model(architecture: str, message: str, tmp_path: Path):
    """By --weights, of this package's encoders and of timm's."""
    export_encoder(encoder(), tmp_path / 'a')
    config = json.loads((tmp_path / 'a' / 'config.json').read_text())
    config['model_args']['depth'] = 3
    (tmp_path / 'a' / 'config.json').write_text(json.dumps({**config, 'architecture': architecture}))
    with pytest.raises(CheckpointError, match=message) as error:
        load_encoder(str(tmp_path / 'a'))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(('content', 'message'), [
    (timm.create_model('test_resnet').state_dict(), 'not the weights of such a model'), ({}, 'Missing: '),
    ({'epoch': 3, 'lr': 0.1}, 'not the weights of such a model'), ([1, 2], r'Cannot load \S+weights\.pth into'),
])
@pytest.mark.parametrize('name', [ENCODER, MODEL])
def test_what_is_no_vision_transformer(name: str, content: object, message: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match=message) as error:
        load(name, content, tmp_path, **options_of(name))
    assert '\n' not in str(error.value) and len(str(error.value)) < 1000


def test_an_encoders_weights_are_none_of_a_pretraining_model(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"such a model .* but an encoder's, which encoders load"):
        load(MODEL, encoder().state_dict(), tmp_path, **options_of(MODEL))


@pytest.mark.parametrize(('channels', 'own'), [(1, 3), (5, 3), (5, 1)])
def test_channels_that_cannot_be_adapted(channels: int, own: int, tmp_path: Path):
    """A file says nothing of its channels, and its configuration three: never a random patch embedding."""
    weights = encoder(in_chans=channels).state_dict()
    with pytest.raises(CheckpointError, match=f'of {channels} channels .* with in_chans={channels}'):
        load(ENCODER, weights, tmp_path, **TINY, in_chans=own)
    if channels == 1:
        assert_same(load(ENCODER, weights, tmp_path, **TINY, in_chans=1), weights)


@pytest.mark.parametrize(('classes', 'kept'), [(5, True), (7, False)])
def test_a_classifier_is_kept_where_it_fits(classes: int, kept: bool, tmp_path: Path, caplog):
    weights = encoder(num_classes=5).state_dict()
    with caplog.at_level(logging.WARNING):
        loaded = load(ENCODER, weights, tmp_path, **TINY, num_classes=classes)
    assert torch.equal(loaded.norm.weight, weights['norm.weight'])
    assert kept == (loaded.head.weight.shape == (5, 32) and torch.equal(loaded.head.weight, weights['head.weight']))
    assert kept != ('classifier of 5 classes is left out' in caplog.text)


@pytest.mark.parametrize('size', [8, 24, (16, 24)])
def test_other_grids_and_patches_are_resampled(size: int | tuple[int, int], tmp_path: Path):
    source = encoder(class_token=True, reg_tokens=1)
    for options in ({'img_size': size}, {'img_size': 32, 'patch_size': 8}):
        loaded = load(ENCODER, source.state_dict(), tmp_path, **{**TINY, **options}, class_token=True, reg_tokens=1)
        assert torch.equal(loaded.pos_embed[:, :2], source.pos_embed[:, :2])
        assert torch.equal(loaded.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_ones_own_weights_are_not_built_as_the_default_tags(tmp_path: Path):
    """A state dict given beside a model that has trained weights is fitted to the model asked for."""
    weights = encoder().state_dict()
    model = timm.create_model(ENCODER, pretrained=True, pretrained_cfg_overlay={'state_dict': weights}, **TINY)
    assert_same(model, weights)


@pytest.mark.parametrize('export', [export_encoder, export_pretraining])
def test_of_a_run_loads_whole(export, tmp_path: Path):
    model = pretraining()
    export(model.encoder if export is export_encoder else model, tmp_path / 'a')
    loaded = timm.create_model(f'local-dir:{tmp_path / "a"}', pretrained=True)
    assert_same(loaded, (model.encoder if export is export_encoder else model).state_dict())


def test_prefixes():
    weights = dict.fromkeys(['patch_embed.proj.weight', 'blocks.0.norm1.weight', 'pos_embed'], 1)
    assert prefixes(weights) == ['']
    assert prefixes({'teacher': under('a.b.', weights), **under('x.', weights)}) == ['teacher.a.b.', 'x.']
    assert prefixes({'my_patch_embed.proj.weight': 1, 'blocks.0.norm1.weight': 1}) == []
