"""Encoders and pretraining models; importing this package registers them with timm."""

from .encoders import SinCosVisionTransformer
from .pretraining import (
    AutoregressiveViT,
    PretrainOutput,
    compose,
    create_pretraining_model,
    pretraining_models,
)

__all__ = [
    'AutoregressiveViT', 'PretrainOutput', 'SinCosVisionTransformer', 'compose', 'create_pretraining_model',
    'pretraining_models',
]
