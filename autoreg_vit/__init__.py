"""Autoregressive self-supervised pretraining of Vision Transformers: RandSAC, SAIM and everything between.

Importing this package registers its encoders and pretraining models with timm.
"""

from . import models, ops, serialization
from .version import __version__

__all__ = ['__version__', 'models', 'ops', 'serialization']
