"""Weights of encoders: what they give, how they start, and what stock timm models see of them."""

import itertools
import json
import math

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.support.encoders import ALL, CIFAR, TINY, build, images


def hashed(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Numbers in [-1, 1) from a formula, since random generators may change with the version of PyTorch."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return ((torch.sin(index * 12.9898 + seed * 78.233) * 43758.5453) % 1 * 2 - 1).reshape(shape)


def fill(model: nn.Module) -> None:
    for seed, (key, value) in enumerate(sorted(model.state_dict().items())):
        numbers = hashed(value.shape, seed) * 0.2
        value.copy_(1 + numbers if 'norm' in key and key.endswith('weight') else numbers)


GOLDEN = {
    'vit_tiny_patch4_32_randsac': (
        [-0.86745, -0.47893, 1.66735, 0.0355, -0.7153, -0.44571, 1.33192, -0.00038],
        [0.81466, 0.93895, 0.9713, 1.50626, -0.05521, 0.20419],
    ),
    'vit_tiny_patch4_32_saim': (
        [0.67234, 0.12525, 1.37962, -1.6901, 0.30463, -1.53501, 1.54502, -0.72311],
        [1.49301, 2.00007, 1.8808, 1.80939, 1.06794, 0.82985],
    ),
}


@pytest.mark.parametrize('name', CIFAR)
def test_golden_tensors(name):
    model = build(name)
    fill(model)
    x = hashed((2, 3, 32, 32), 1000).float()
    with torch.no_grad():
        output, features = model(x), model.forward_features(x)
    pooled, tokens = GOLDEN[name]
    torch.testing.assert_close(output[:, [0, 1, 190, 191]].flatten().tolist(), pooled, rtol=0, atol=1e-4)
    torch.testing.assert_close(features[:, [0, 1, -1], 7].flatten().tolist(), tokens, rtol=0, atol=1e-4)


def stock(name: str, **options) -> VisionTransformer:
    """timm's own model of the same architecture, as one without this package has it."""
    base = name.rsplit('_', 1)[0].removesuffix('_patch4_32')
    if 'patch4_32' in name:
        options = {'img_size': 32, 'patch_size': 4, **options}
    if name.endswith('randsac'):
        options = {'class_token': False, 'global_pool': 'avg', 'fc_norm': False, **options}
    return timm.create_model(f'{base}_patch16_224', num_classes=0, **options).eval()


@pytest.mark.parametrize('name', ALL)
def test_parameter_names_are_those_of_stock_models(name):
    with torch.device('meta'):
        ours, theirs = timm.create_model(name).state_dict(), stock(name).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize('name', TINY)
def test_stock_models_run_our_weights(name):
    model, other = build(name), stock(name)
    other.load_state_dict(model.state_dict())
    x = images(model)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
        assert torch.equal(other.forward_features(x), model.forward_features(x))


@pytest.mark.parametrize('name', CIFAR)
@pytest.mark.parametrize('classes', [0, 5])
def test_local_dir_round_trip(name, classes, tmp_path):
    model = build(name, depth=3, img_size=(32, 48), num_classes=classes)
    folder = tmp_path / 'model'
    save_for_hf(model, folder, model_args={'depth': 3, 'img_size': (32, 48)}, safe_serialization=True)
    assert {p.name for p in folder.iterdir()} == {'config.json', 'model.safetensors'}
    assert json.loads((folder / 'config.json').read_text())['architecture'] == name

    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()

    x = images(model)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(loaded.forward_features(x), model.forward_features(x))
    headless = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=0).eval()
    assert torch.equal(headless.forward_features(x), model.forward_features(x))


@pytest.mark.parametrize('name', TINY)
def test_positions_start_as_sines_and_cosines(name):
    model = build(name)
    prefix, grid = model.num_prefix_tokens, model.patch_embed.grid_size
    assert model.pos_embed.requires_grad
    assert (model.pos_embed[:, :prefix] == 0).all()
    positions = model.pos_embed[0, prefix:].detach().double()
    assert positions.abs().max() <= 1
    distance = torch.cdist(positions, positions, compute_mode='donot_use_mm_for_euclid_dist')
    assert distance[~torch.eye(len(positions), dtype=torch.bool)].min() > 0.5
    # A quarter of the width each: sines of one coordinate and of the other, then cosines.
    quarters = positions.unflatten(1, (4, 192 // 4))
    for sine, cosine in ((0, 2), (1, 3)):
        torch.testing.assert_close(quarters[:, sine] ** 2 + quarters[:, cosine] ** 2,
                                   torch.ones(len(positions), 48, dtype=torch.float64))
    # Distances depend on the offset alone, both ways alike, and grow with small offsets.
    at = positions.unflatten(0, grid)
    for row, column in itertools.product(range(grid[0] - 2), range(grid[1] - 2)):
        right = (at[row, column + 1] - at[row, column]).norm()
        torch.testing.assert_close(right, (at[0, 1] - at[0, 0]).norm())
        torch.testing.assert_close((at[row + 1, column] - at[row, column]).norm(), right)
        assert (at[row, column + 2] - at[row, column]).norm() > right


def test_positions_of_a_non_square_grid_follow_rows_and_columns():
    model = build('vit_tiny_patch4_32_randsac', img_size=(16, 32))
    at = model.pos_embed[0].detach().unflatten(0, (4, 8))
    quarters = at.unflatten(2, (4, 48)).unbind(2)
    assert [torch.equal(q[:, :1].expand_as(q), q) for q in quarters] == [True, False, True, False]  # tell the row alone
    assert [torch.equal(q[:1].expand_as(q), q) for q in quarters] == [False, True, False, True]  # the column alone
    assert (at[:4, 0] - at[0, 0]).norm(dim=-1).diff().gt(0).all()


@pytest.mark.parametrize('name', CIFAR)
def test_linear_layers_start_xavier_uniform(name):
    model = build(name, num_classes=64)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 12 * 4 + 1
    for module in linear:
        _assert_xavier(module.weight)
        assert (module.bias == 0).all()
    _assert_xavier(model.patch_embed.proj.weight.flatten(1))
    if model.cls_token is not None:
        assert 0.01 < model.cls_token.std() < 0.03


def _assert_xavier(weight: torch.Tensor) -> None:
    bound = math.sqrt(6 / sum(weight.shape))
    assert weight.abs().max() <= bound
    # of n uniform draws the largest is about bound * n / (n + 1)
    assert weight.abs().max() > 0.99 * bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert abs(weight.mean().item()) < 5 * bound / math.sqrt(3 * weight.numel())
