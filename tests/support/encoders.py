"""The registered encoders, and those small enough to run in every test."""

import timm
import torch
from torch import nn

from autoreg_vit.models import SinCosVisionTransformer

SIZES = {  # width, depth, heads
    'tiny': (192, 12, 3), 'small': (384, 12, 6), 'base': (768, 12, 12), 'large': (1024, 24, 16),
    'tiny_patch4_32': (192, 12, 3), 'small_patch4_32': (384, 12, 6),
}

ALL = [f'vit_{size}_{method}' for size in SIZES for method in ('randsac', 'saim')]

TINY = [name for name in ALL if 'tiny' in name]

CIFAR = ['vit_tiny_patch4_32_randsac', 'vit_tiny_patch4_32_saim']


def build(name: str, **options) -> SinCosVisionTransformer:
    return timm.create_model(name, **options).eval()


def images(model: nn.Module, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
