"""timm's own options with the defaults of each method: a model that runs, or an error that names the option and what it
does not go with. No other ending."""

import itertools
import json

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock

from autoreg_vit.errors import ModelError, UsageError
from autoreg_vit.hub.folders import export_encoder, export_pretraining

ENCODERS = ['vit_tiny_randsac', 'vit_tiny_patch4_32_saim']
PRETRAINING = ['randsac_vit_tiny_patch4_32', 'saim_vit_tiny']
SIZES = dict(img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=1)
SEGMENTS = dict(segments=2, decoder_depth=1)
POOLS = [None, '', 'avg', 'avgmax', 'max', 'token', 'map', 'prr', 'mean']
OTHERS = [{'reg_tokens': 2}, {'dynamic_img_size': True}, {'no_embed_class': True}, {'final_norm': False}]
SINGLE = [
    {'reg_tokens': -1}, {'dynamic_img_pad': True}, {'pos_embed': 'none'}, {'pos_embed': 'fixed'}, {'pre_norm': True},
    {'qkv_bias': False}, {'qk_norm': True}, {'scale_attn_norm': True}, {'scale_mlp_norm': True}, {'proj_bias': False},
    {'init_values': 1e-5}, {'pool_include_prefix': True}, {'drop_rate': 0.1}, {'pos_drop_rate': 0.1},
    {'patch_drop_rate': 0.1}, {'proj_drop_rate': 0.1}, {'attn_drop_rate': 0.1}, {'drop_path_rate': 0.1},
    {'drop_path_rate': 1.5}, {'drop_path_rate': float('nan')}, {'weight_init': 'moco'}, {'weight_init': 'zeros'},
    {'fix_init': True}, {'norm_layer': 'rmsnorm'}, {'norm_layer': 'nosuch'}, {'act_layer': 'silu'},
    {'act_layer': 'nosuch'}, {'attn_layer': 'nosuch'}, {'attn_layer': 'diff'}, {'block_fn': ResPostBlock},
    {'block_fn': ParallelScalingBlock}, {'embed_norm_layer': 'layernorm'}, {'in_chans': 0}, {'in_chans': 2.5},
    {'num_classes': 3}, {'img_size': '8'}, {'img_size': (8,)}, {'img_size': (8, 8, 8)}, {'patch_size': 0},
    {'depth': 0}, {'depth': 2.0}, {'embed_dim': 30}, {'embed_dim': 32.0}, {'num_heads': 3}, {'features_only': True},
    {'features_only': True, 'out_indices': (0, -1)}, {'features_only': True, 'out_indices': (2,)},
    {'dtype': torch.bfloat16},
]


def given(**options: object) -> dict:
    return {key: value for key, value in options.items() if value is not None}


def attempt(name: str, options: dict) -> str | None:
    """Make and run a model; the message of the UsageError where it is refused, and a failed test for any other end."""
    sizes = {**SIZES, **SEGMENTS} if name.startswith('randsac') else SIZES
    images = torch.randn(2, 3, 8, 8, dtype=options.get('dtype', torch.float32))
    try:
        output = timm.create_model(name, **{**sizes, **options})(images)
    except UsageError as error:
        return str(error)
    if hasattr(output, 'loss'):
        output.loss.backward()
        output = output.loss
    assert all(part.isfinite().all() for part in (output if isinstance(output, list) else [output]))
    return None


@pytest.mark.parametrize('name', [*ENCODERS, *PRETRAINING])
def test_made_or_refused_by_name(name: str):
    tokens = [{}, {'class_token': True}, {'class_token': False}]
    pools = itertools.product(POOLS, [None, True, False]) if name in ENCODERS else []
    pools = [given(global_pool=pool, fc_norm=norm) for pool, norm in pools]
    grid = [{**token, **other} for token, other in itertools.product(tokens, [*pools, *OTHERS])]
    made = 0
    for options in [*grid, *SINGLE]:
        message = attempt(name, options)
        made += message is None
        names = [f"{key}='{value}'" for key, value in options.items() if isinstance(value, str)]
        assert message is None or any(word in message for word in [*options, *names, 'heads', 'width', 'Attention']), (
            options, message)
    assert made > 10


@pytest.mark.parametrize(('name', 'options', 'named'), [
    ('vit_tiny_randsac', {'global_pool': 'token'}, ["global_pool='token'", 'class_token=False']),
    ('vit_tiny_saim', {'global_pool': 'token', 'class_token': False}, ["global_pool='token'", 'class_token=False']),
    ('randsac_vit_tiny', {'global_pool': 'avg'}, ['global_pool is of a classifier', 'vit_tiny_randsac']),
    ('saim_vit_tiny', {'num_classes': 10}, ['num_classes is of a classifier', 'vit_tiny_saim']),
    ('saim_vit_tiny', {'dynamic_img_size': True}, ['leave dynamic_img_size at the default']),
    ('randsac_vit_tiny', {'block_fn': ParallelScalingBlock}, ['leave block_fn out (got ParallelScalingBlock)']),
    ('vit_tiny_saim', {'features_only': True, 'out_indices': 3}, ['from 1 to 2; got 3']),
    ('vit_tiny_saim', {'norm_layer': 'nosuch'}, ["norm_layer='nosuch'"]),
])
def test_what_does_not_go_together_is_named(name: str, options: dict, named: list[str]):
    message = attempt(name, options)
    assert message and all(part in message for part in named), message


@pytest.mark.parametrize('method', ['randsac', 'saim'])
def test_without_a_class_token_the_average_is_the_feature(method: str):
    encoder = timm.create_model(f'vit_tiny_{method}', class_token=False, **SIZES).eval()
    segments = SEGMENTS if method == 'randsac' else {}
    model = timm.create_model(f'{method}_vit_tiny', class_token=False, **SIZES, **segments)
    images = torch.randn(2, 3, 8, 8)
    assert encoder.global_pool == model.encoder.global_pool == 'avg' and model.encoder.num_prefix_tokens == 0
    torch.testing.assert_close(encoder(images), encoder.forward_features(images).mean(1))


def test_three_maps_or_as_many_as_there_are_blocks():
    for depth, count in ((2, 2), (3, 3), (5, 3)):
        maps = timm.create_model('vit_tiny_saim', **{**SIZES, 'depth': depth}, features_only=True)
        assert maps.feature_info.module_name() == [f'blocks.{i}' for i in range(depth - count, depth)]


def test_a_dtype_is_the_whole_models():
    model = timm.create_model('randsac_vit_tiny', **SIZES, segments=2, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize('name', [ENCODERS[0], PRETRAINING[1]])
def test_exported_configurations_hold_names_and_numbers_alone(name: str, tmp_path):
    export = export_encoder if name in ENCODERS else export_pretraining
    export(timm.create_model(name, **SIZES, dtype=torch.float64), tmp_path / 'a')
    assert 'dtype' not in json.loads((tmp_path / 'a' / 'config.json').read_text())['model_args']
    with pytest.raises(ModelError, match=r'norm_layer=.*LayerNorm.* cannot be written to config\.json'):
        export(timm.create_model(name, **SIZES, norm_layer=torch.nn.LayerNorm), tmp_path / 'b')
    assert not (tmp_path / 'b').exists()
