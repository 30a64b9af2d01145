"""Encoders and pretraining models; importing this package registers them with timm."""

from .designs import create_pretraining_model, pretraining_models
from .encoders import SinCosVisionTransformer
from .pretraining import AutoregressiveViT, PretrainOutput, compose

__all__ = [
    'AutoregressiveViT', 'PretrainOutput', 'SinCosVisionTransformer', 'compose', 'create_pretraining_model',
    'pretraining_models',
]
