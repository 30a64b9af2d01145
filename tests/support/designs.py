"""Pretraining models of every design, small enough to train in a test."""

import pytest
import timm
import torch

from autoreg_vit.models import AutoregressiveViT

BLOBS = {'serialization': 'blobs', 'segments': (5, 2)}

DESIGNS = {
    'randsac': ('randsac_vit_tiny', BLOBS),
    'randsac last': ('randsac_vit_tiny', {**BLOBS, 'memory': 'last'}),
    'randsac narrow decoder': ('randsac_vit_tiny', {**BLOBS, 'decoder_dim': 16, 'decoder_heads': 4}),
    'randsac two-stream': ('randsac_vit_tiny', {**BLOBS, 'decoder': 'parallel', 'shared': True}),
    'randsac parallel': ('randsac_vit_tiny', {**BLOBS, 'decoder': 'parallel', 'decoder_depth': 2}),
    'randsac next token': ('randsac_vit_tiny', {'serialization': 'raster', 'decoder': 'none'}),
    'randsac registers': ('randsac_vit_tiny', {**BLOBS, 'reg_tokens': 2, 'qk_norm': True, 'init_values': 0.1}),
    'saim': ('saim_vit_tiny', {}),
    'saim shared': ('saim_vit_tiny', {'decoder': 'parallel', 'shared': True, 'memory': 'output'}),
    'saim one query block': ('saim_vit_tiny', {'decoder_depth': 1}),
    'saim masked': ('saim_vit_tiny', {'decoder': 'masked', 'head': 'mlp'}),
    'saim next token': ('saim_vit_tiny', {'serialization': 'raster', 'decoder': 'none'}),
}

every_design = pytest.mark.parametrize('design', DESIGNS)


def build(tiny: dict, design: str, **options) -> AutoregressiveViT:
    name, own = DESIGNS[design]
    return timm.create_model(name, **{**tiny, **own, **options})


def images(batch: int = 3, channels: int = 1, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    return torch.randn(batch, channels, *size)
