"""Encoders as timm's own model tests see them."""

import copy

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from autoreg_vit.errors import CheckpointError, ModelError, ShapeError
from autoreg_vit.models import SinCosVisionTransformer
from tests.support.encoders import ALL, CIFAR, SIZES, TINY, build, images


@pytest.mark.parametrize('name', ALL)
def test_architecture(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    size = name.removeprefix('vit_').rsplit('_', 1)[0]
    width, depth, heads = SIZES[size]
    pixels, patch = (32, 4) if 'patch4' in size else (224, 16)
    assert isinstance(model, SinCosVisionTransformer)
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (width, depth, heads)
    assert model.blocks[0].mlp.fc1.out_features == 4 * width
    assert model.blocks[0].norm1.eps == model.norm.eps == 1e-6
    assert (model.patch_embed.img_size, model.patch_embed.patch_size) == ((pixels, pixels), (patch, patch))
    assert (model.cls_token is None) == name.endswith('randsac')
    assert model.global_pool == ('avg' if name.endswith('randsac') else 'token')
    assert isinstance(model.norm, nn.LayerNorm)
    assert isinstance(model.fc_norm, nn.Identity)
    assert (model.num_classes, model.num_features, model.head_hidden_size) == (0, width, width)
    assert isinstance(model.head, nn.Identity)


@pytest.mark.parametrize('name', ALL)
def test_default_configuration(name):
    cfg = timm.get_pretrained_cfg(name)
    pixels = 32 if 'patch4' in name else 224
    shipped = {known.partition('.')[2] for known in timm.list_models(f'{name}.*', pretrained=True)}
    assert cfg.architecture == name and cfg.tag in (shipped or {'untrained'})
    assert cfg.input_size == (3, pixels, pixels)
    assert cfg.fixed_input_size
    assert (cfg.mean, cfg.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert (cfg.first_conv, cfg.classifier, cfg.num_classes) == ('patch_embed.proj', 'head', 0)
    with torch.device('meta'):
        model = timm.create_model(f'{name}.untrained', num_classes=5)
    assert model.get_submodule(cfg.first_conv).in_channels == 3
    assert model.get_submodule(cfg.classifier).out_features == 5


@pytest.mark.parametrize('name', TINY)
def test_forward(name):
    model = build(name)
    x = images(model)
    with torch.no_grad():
        features, output = model.forward_features(x), model(x)
    assert features.shape == (2, model.patch_embed.num_patches + model.num_prefix_tokens, 192)
    assert output.shape == (2, 192)
    assert torch.isfinite(output).all()
    # RandSAC B.2: the average of the normalised tokens; SAIM: the class token
    expected = features.mean(1) if name.endswith('randsac') else features[:, 0]
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize('name', TINY)
def test_backward_and_gradient_checkpointing(name):
    model = build(name, num_classes=42, depth=4).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = images(model)
    output, again = model(x), twin(x)
    output.mean().backward()
    again.mean().backward()

    assert output.shape == (2, 42)
    torch.testing.assert_close(output, again)
    for (key, ours), theirs in zip(model.named_parameters(), twin.parameters()):
        assert ours.grad is not None, key
        assert torch.isfinite(ours.grad).all(), key
        torch.testing.assert_close(ours.grad, theirs.grad, msg=key)


@pytest.mark.parametrize('name', CIFAR)
def test_heads(name):
    model = build(name, num_classes=5)
    x = images(model)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert model(x).shape == (2, 5)
    assert pooled.shape == (2, model.head_hidden_size)
    assert torch.equal(model.head(pooled), model(x))
    assert model.get_classifier() is model.head

    model.reset_classifier(7)
    assert (model.num_classes, model(x).shape) == (7, (2, 7))
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, '')
    assert torch.equal(model(x), features)


@pytest.mark.parametrize('name', CIFAR)
@pytest.mark.parametrize('channels', [1, 5])
def test_channels(name, channels):
    model = build(name, in_chans=channels)
    assert model(images(model)).shape == (2, 192)


@pytest.mark.parametrize('channels', [1, 6])
@pytest.mark.parametrize('name', CIFAR)
def test_pretrained_weights_adapt_to_channels_and_classes(name, channels, tmp_path):
    model = build(name)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')

    adapted = build(name, in_chans=channels, num_classes=5, pretrained=True,
                    pretrained_cfg_overlay={'file': str(tmp_path / 'weights.pth')})

    assert adapted(images(adapted)).shape == (2, 5)
    assert torch.equal(adapted.blocks[3].mlp.fc1.weight, model.blocks[3].mlp.fc1.weight)
    kernel = model.patch_embed.proj.weight
    expected = kernel.sum(1, keepdim=True) if channels == 1 else kernel.repeat(1, 2, 1, 1) / 2
    torch.testing.assert_close(adapted.patch_embed.proj.weight, expected)


@pytest.mark.parametrize('name', CIFAR)
def test_intermediate_features(name):
    model = build(name)
    x = images(model)
    last, features = model.forward_intermediates(x, indices=[2, 5, 11], norm=True)
    assert torch.equal(last, model.forward_features(x))
    assert [tuple(f.shape) for f in features] == [(2, 192, 8, 8)] * 3
    tokens = last[:, model.num_prefix_tokens:]
    torch.testing.assert_close(features[-1].flatten(2).transpose(1, 2), tokens)
    assert not torch.allclose(features[0], features[1])
    only = model.forward_intermediates(x, indices=[2], norm=True, intermediates_only=True)
    assert torch.equal(only[0], features[0])


@pytest.mark.parametrize('name', CIFAR)
@pytest.mark.parametrize('indices', [None, (0, 4), [11]])
def test_features_only(name, indices):
    model = timm.create_model(name, features_only=True, **({} if indices is None else {'out_indices': indices})).eval()
    features = model(torch.randn(2, 3, 32, 32))
    # three layers by default, as timm's own models of this family have
    assert len(features) == (3 if indices is None else len(indices))
    assert [f.shape[1] for f in features] == model.feature_info.channels() == [192] * len(features)
    assert model.feature_info.reduction() == [4] * len(features)
    assert all(f.shape == (2, 192, 8, 8) for f in features)
    if indices is not None:
        assert model.feature_info.module_name() == [f'blocks.{i}' for i in indices]


@pytest.mark.parametrize('name', CIFAR)
@pytest.mark.parametrize('classes', [0, 5])
def test_features_of_pretrained_weights(name, classes, tmp_path):
    model = build(name, depth=3, num_classes=classes)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    backbone = timm.create_model(
        name, depth=3, features_only=True, out_indices=(1,), pretrained=True,
        pretrained_cfg_overlay={'file': str(tmp_path / 'weights.pth'), 'num_classes': classes}).eval()
    x = images(model)
    assert torch.equal(backbone(x)[0], model.forward_intermediates(x, indices=[1], intermediates_only=True)[0])


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('name', CIFAR)
def test_torchscript(name):
    model = build(name, depth=2, num_classes=5)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
        torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)


@pytest.mark.parametrize('name', CIFAR)
def test_fx(name):
    model = build(name, depth=2)
    x = images(model)
    names = {'blocks.0': 'first', 'norm': 'last'}
    with torch.no_grad():
        nodes = create_feature_extractor(model, names)(x)
        torch.testing.assert_close(nodes['last'], model.forward_features(x))
    assert nodes['first'].shape == nodes['last'].shape


@pytest.mark.parametrize('name', CIFAR)
@pytest.mark.parametrize(('options', 'size', 'grid'), [
    ({'img_size': (32, 48)}, (32, 48), (8, 12)),
    ({'img_size': 64, 'patch_size': 8}, (64, 64), (8, 8)),
    ({'patch_size': (2, 4)}, (32, 32), (16, 8)),
    ({'img_size': 30, 'patch_size': 6}, (30, 30), (5, 5)),
    ({'dynamic_img_size': True}, (48, 24), (8, 8)),
])
def test_image_and_patch_sizes(name, options, size, grid):
    model = build(name, depth=2, **options)
    assert model.patch_embed.grid_size == grid
    x = torch.randn(2, 3, *size)
    assert model(x).shape == (2, 192)
    tokens = grid[0] * grid[1] if 'dynamic_img_size' not in options else 12 * 6
    assert model.forward_features(x).shape == (2, tokens + model.num_prefix_tokens, 192)


@pytest.mark.parametrize('name', CIFAR)
def test_set_input_size(name):
    model = build(name, depth=2)
    before = model.pos_embed.detach().clone()
    model.set_input_size(img_size=(48, 24))
    assert model.patch_embed.grid_size == (12, 6)
    assert model(torch.randn(2, 3, 48, 24)).shape == (2, 192)
    assert torch.equal(model.pos_embed[:, :model.num_prefix_tokens], before[:, :model.num_prefix_tokens])
    with pytest.raises(AssertionError, match='32'):
        model(torch.randn(2, 3, 32, 32))
    model.set_input_size(patch_size=8, img_size=32)
    assert model.patch_embed.grid_size == (4, 4)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 192)


@pytest.mark.parametrize('name', CIFAR)
@pytest.mark.parametrize(('size', 'other'), [((32, 32), (16, 64)), ((16, 64), (32, 32)), ((16, 64), (64, 16))])
@pytest.mark.parametrize('trained', [True, False])
def test_positions_follow_a_grid_of_as_many_tokens(name, size, other, trained):
    model = build(name, depth=1, img_size=size)
    model.pos_embed.requires_grad_(trained)
    before, prefix = model.pos_embed.detach().clone(), model.num_prefix_tokens
    model.set_input_size(img_size=other)
    # what timm does for a grid of another number of tokens
    grid = before[:, prefix:].unflatten(1, (size[0] // 4, size[1] // 4)).permute(0, 3, 1, 2)
    new = (other[0] // 4, other[1] // 4)
    expected = nn.functional.interpolate(grid, new, mode='bicubic', antialias=True).flatten(2).mT
    assert model.pos_embed.requires_grad == trained
    torch.testing.assert_close(model.pos_embed.detach()[:, prefix:], expected)
    assert torch.equal(model.pos_embed[:, :prefix], before[:, :prefix])
    assert model(torch.randn(2, 3, *other)).shape == (2, 192)


@pytest.mark.parametrize('name', CIFAR)
@pytest.mark.parametrize('options', [{'img_size': (48, 32)}, {'patch_size': 8}, {'img_size': 64, 'patch_size': 8}])
def test_pretrained_weights_fit_other_sizes(name, options, tmp_path):
    model = build(name, depth=2)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    resized = build(name, depth=2, **options, pretrained=True,
                    pretrained_cfg_overlay={'file': str(tmp_path / 'weights.pth')})
    assert resized(images(resized)).shape == (2, 192)
    assert torch.equal(resized.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
    if options == {'img_size': 64, 'patch_size': 8}:
        torch.testing.assert_close(resized.pos_embed, model.pos_embed)  # the same grid


@pytest.mark.parametrize('name', TINY)
def test_missing_weights_are_said_so(name):
    with pytest.raises(CheckpointError, match=f"'{name}.untrained' has no trained weights.*/encoder'.*_224.mae'"):
        timm.create_model(f'{name}.untrained', pretrained=True)
    with pytest.raises(ModelError, match=f"'{name}' has no tag 'nowhere'.*untrained"):
        timm.create_model(f'{name}.nowhere')


def test_bad_options_are_refused():
    with pytest.raises(ModelError, match=r"no option 'depht'.*'depth'"):
        timm.create_model('vit_tiny_randsac', depht=3)
    with pytest.raises(ShapeError, match='embed_dim is the width of an encoder or a decoder, at least 1, got -48'):
        timm.create_model('vit_tiny_randsac', embed_dim=-48)
    with pytest.raises(ShapeError, match='5 heads do not divide a width of 192'):
        timm.create_model('vit_tiny_randsac', num_heads=5)
    with pytest.raises(ShapeError, match='230 x 230'):
        timm.create_model('vit_tiny_randsac', img_size=230)


@pytest.mark.parametrize('name', CIFAR)
@pytest.mark.parametrize('options', [{'num_classes': 5}, {'num_classes': 5, 'reg_tokens': 2}])
def test_layer_groups(name, options):
    """Layer decay covers every parameter: rates rise from the stem over the blocks to the head."""
    model = build(name, depth=3, **options)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(layers) == {key for key, _ in model.named_parameters()}
    assert layers['patch_embed.proj.weight'] == layers['pos_embed'] == layers.get('reg_token', 0) == 0
    assert [layers[f'blocks.{i}.norm1.weight'] for i in range(3)] == [1, 2, 3]
    assert layers['head.weight'] == max(layers.values())

    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.05, layer_decay=0.65)
    names = {id(p): key for key, p in model.named_parameters()}
    groups = {names[id(p)]: group for group in optimizer.param_groups for p in group['params']}
    assert set(groups) == set(layers)
    for key, group in groups.items():
        assert group['lr_scale'] == pytest.approx(0.65 ** (max(layers.values()) - layers[key])), key
        is_matrix = key.endswith('weight') and model.get_parameter(key).ndim > 1
        assert group['weight_decay'] == (0.05 if is_matrix else 0), key


@pytest.mark.parametrize('name', CIFAR)
def test_no_weight_decay_names_parameters(name):
    model = build(name)
    exempt = model.no_weight_decay()
    assert 'pos_embed' in exempt
    assert ('cls_token' in {key for key, _ in model.named_parameters()} & exempt) == name.endswith('saim')
